"""The README's code runs as it stands, block after block."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM


def test_code_blocks_run(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    monkeypatch.chdir(tmp_path)
    small = BertConfig(vocab_size=53, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    names = {"BertForMaskedLM": BertForMaskedLM, "config": small}
    for block in blocks:
        exec(block, names)
    assert names["rel_k"].grad is not None
    torch.testing.assert_close(torch.cat(names["steps"], dim=1), names["y"], atol=1e-4, rtol=1e-4)
    assert names["model"].config.relative_attention["max_relative_position"] == [128, 128]
