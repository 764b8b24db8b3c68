"""The published skew against the notebook's own code, and against the right one."""

# ruff: noqa: E402 (what cannot be imported is skipped first)

import pytest

from tests.chorales.helpers import require
from tests.chorales.study.helpers import cell

require("transformers", "accelerate")

import torch
from torch.nn import functional as F

from examples.chorales.study import published
from examples.chorales.study.cells import AS_PUBLISHED
from examples.chorales.study.model import build_cell_model, resize_positions
from examples.chorales.study.published import published_skew


def notebook_skewing(tensor):
    """The seed notebook's `_skewing`, verbatim."""
    batch_size, num_heads, length, _ = tensor.shape
    padded = F.pad(tensor, (1, 0))
    reshaped = padded.reshape(batch_size, num_heads, 2 * length, length)
    skewed = reshaped[:, :, length:, :]
    return skewed


def right_skew(relative):
    """Logits by distance, (B, H, L, 2 L - 1), as logits by key: entry (i, j) is that of distance j - i."""
    length = relative.shape[-2]
    at = torch.arange(length)[None, :] - torch.arange(length)[:, None] + length - 1
    return relative.gather(-1, at.expand(*relative.shape[:2], -1, -1))


@pytest.mark.parametrize("length", [2, 5, 16])
def test_published_skew_is_the_notebooks_and_not_the_right_one(length):
    relative = torch.randn(2, 3, length, 2 * length - 1)
    assert torch.equal(published_skew(relative), notebook_skewing(relative))
    assert not torch.allclose(published_skew(relative), right_skew(relative))


def test_published_skew_shows_a_row_the_logits_of_other_queries():
    """Row i gets query L / 2 + i // 2, as its docstring says; the first half of the queries never counts."""
    length = 16
    query = torch.arange(length, dtype=torch.float)[None, None, :, None].expand(1, 1, length, 2 * length - 1) + 1
    seen = published_skew(query)[0, 0]
    for i, row in enumerate(seen):
        assert set(row[row > 0].tolist()) == {length // 2 + i // 2 + 1}


def test_published_attention_is_the_notebooks_forward():
    """The whole function against the notebook's arithmetic, inside BERT, with padding."""
    torch.manual_seed(0)
    model = build_cell_model(cell(AS_PUBLISHED), 53).eval()
    ids = torch.randint(7, 53, (3, 16))
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    module, seen = model.bert.encoder.layer[0].attention.self, {}

    def hook(_, args, kwargs, out):
        seen.update(x=args[0] if args else kwargs["hidden_states"], out=out[0])

    module.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
        projections = (module.query, module.key, module.value)
        query, key, value = (part(seen["x"]).view(3, 16, 4, 32).permute(0, 2, 1, 3) for part in projections)
        relative = (query.reshape(12, 16, 32) @ module.published_table.T).reshape(3, 4, 16, 31)
        scores = (query @ key.transpose(-2, -1) + notebook_skewing(relative)) / 32**0.5
        scores = scores + (1.0 - mask[:, None, None].float()) * torch.finfo(torch.float32).min
        expected = (scores.softmax(-1) @ value).permute(0, 2, 1, 3).reshape(3, 16, 128)
    torch.testing.assert_close(seen["out"], expected, atol=1e-6, rtol=1e-5)


def test_the_skew_is_all_that_separates_the_published_arm(monkeypatch):
    """With the right skew in its place, the study's function and relattn give equal models, also beyond the clip."""
    torch.manual_seed(0)
    ids = torch.randint(7, 53, (2, 24))
    for length in (16, 24):  # 24 tokens reach beyond the tables of a window of 16
        models = [
            build_cell_model(cell(AS_PUBLISHED | dict(skew=skew)), 53).eval() for skew in ("published", "correct")
        ]
        resize_positions(models[0], length)
        with torch.no_grad():
            logits = [model(input_ids=ids[:, :length]).logits for model in models]
            assert (logits[0] - logits[1]).abs().max() > 2e-3
            with monkeypatch.context() as patch:
                patch.setattr(published, "published_skew", right_skew)
                repaired = models[0](input_ids=ids[:, :length]).logits
        torch.testing.assert_close(repaired, logits[1], atol=2e-6, rtol=1e-5)
