"""The code of README and manual runs as it stands, block after block of a page; links between files lead somewhere; the README is short."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

CLONE = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(CLONE)) for path in (CLONE / "docs").rglob("*.md") if "_build" not in path.parts)]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (CLONE / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    small = BertConfig(vocab_size=53, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    names: dict[str, Any] = {"BertForMaskedLM": BertForMaskedLM, "config": small}
    for block in blocks(page):
        exec(block, names)
    if page == "README.md":
        assert names["rel_k"].grad is not None
        torch.testing.assert_close(torch.cat(names["steps"], dim=1), names["y"][:, :100], atol=1e-4, rtol=1e-4)
    if page == "docs/models.md":
        assert names["model"].config.relative_attention["max_relative_position"] == [128, 128]


def test_which_pages_have_code():
    having = {page for page in PAGES if blocks(page)}
    assert having >= {"README.md", "docs/index.md", "docs/masks.md", "docs/models.md", "docs/devices.md", "docs/determinism.md"}


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as its renderers make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [*PAGES, *("CONTRIBUTING.md", "kernels/README.md", "benchmarks/README.md", "examples/chorales/README.md")]
)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (CLONE / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            file, _, anchor = target.partition("#")
            path = (CLONE / page).parent / file if file else CLONE / page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target


def test_readme_is_short():
    assert len((CLONE / "README.md").read_bytes()) <= 8192
