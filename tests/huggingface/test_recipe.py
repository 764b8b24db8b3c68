"""The recipe of the README for layers of ESPnet, NeMo and their like."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from relattn import relative_attention
from tests.huggingface.models import HEADS, HIDDEN, LENGTH, close, mask_of


class RelPositionMultiHeadedAttention(nn.Module):
    """As ESPnet's and NeMo's, written from Transformer-XL's formula (Dai et al. 2019, section 3.3):

    s_ij = ((q_i + u) . k_j + (q_i + v) . W R_(i-j)) / sqrt(d), with the rows of pos_emb from distance i - j = L - 1
    down to -(L - 1). With fewer queries than keys the last stand at the last; `zero_triu` as in ESPnet drops the position term
    where i < j; `attn` are the weights.
    """

    def __init__(self, heads: int, size: int, dropout: float = 0.0, zero_triu: bool = False) -> None:
        super().__init__()
        self.zero_triu, self.attn = zero_triu, None
        self.h, self.d_k = heads, size // heads
        self.linear_q, self.linear_k, self.linear_v, self.linear_out = (nn.Linear(size, size) for _ in range(4))
        self.linear_pos = nn.Linear(size, size, bias=False)
        self.pos_bias_u, self.pos_bias_v = (nn.Parameter(torch.randn(heads, self.d_k)) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward_qkv(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        pairs = ((self.linear_q, query), (self.linear_k, key), (self.linear_v, value))
        return tuple(linear(x).view(x.shape[0], -1, self.h, self.d_k).transpose(1, 2) for linear, x in pairs)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, pos_emb: Tensor, mask: Tensor | None) -> Tensor:
        """mask: (B, 1, L) or (B, L, L), zero where hidden."""
        q, k, v = self.forward_qkv(query, key, value)
        p = self.linear_pos(pos_emb).view(1, -1, self.h, self.d_k).transpose(1, 2)[0]
        length = key.shape[1]
        i, j = torch.arange(length - query.shape[1], length)[:, None], torch.arange(length)
        content = torch.einsum("bhid,bhjd->bhij", q + self.pos_bias_u[:, None], k)
        position = torch.einsum("bhid,hijd->bhij", q + self.pos_bias_v[:, None], p[:, length - 1 - (i - j)])
        if self.zero_triu:
            position = position.tril(length - query.shape[1])
        scores = (content + position) / self.d_k**0.5
        if mask is not None:
            hidden = mask[:, None] == 0
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        if mask is not None:
            weights = weights.masked_fill(hidden, 0.0)
        self.attn = weights
        return self.linear_out((self.dropout(weights) @ v).transpose(1, 2).flatten(2))


def swapped_forward() -> Callable:
    """As the README has it."""
    blocks = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if "def swapped_forward" in block]
    names: dict[str, Any] = {"relative_attention": relative_attention, "torch": torch}
    exec(block, names)
    return names["swapped_forward"]


@pytest.mark.parametrize("masked", ["none", "padding", "chunks"])
@pytest.mark.parametrize("cached", [0, 6])
@pytest.mark.parametrize("zero_triu", [False, True])
@pytest.mark.parametrize("plotted", [False, True])
def test_recipe_for_toolkits(masked: str, cached: int, zero_triu: bool, plotted: bool, monkeypatch) -> None:
    """It was 1.3 off where cached frames precede, took no notice of zero_triu, and left `attn`, which ESPnet plots by a hook, unset."""
    torch.manual_seed(0)
    layer = RelPositionMultiHeadedAttention(HEADS, HIDDEN, zero_triu=zero_triu).double()
    x, pos_emb = torch.randn(2, LENGTH, HIDDEN).double(), torch.randn(1, 2 * LENGTH - 1, HIDDEN).double()
    masks = {"none": None, "padding": mask_of(LENGTH)[:, None]}
    masks["chunks"] = (torch.arange(cached, LENGTH)[:, None] // 4 >= torch.arange(LENGTH) // 4).expand(2, -1, -1)
    factor, plots = torch.randn(2, LENGTH - cached, HIDDEN).double(), []
    if plotted:
        layer.register_forward_hook(lambda module, *_: plots.append(module.attn.detach()))
    found = []
    for forward in (RelPositionMultiHeadedAttention.forward, swapped_forward()):
        monkeypatch.setattr(RelPositionMultiHeadedAttention, "forward", forward)
        output = layer(x[:, cached:], x, x, pos_emb, masks[masked])
        layer.zero_grad()
        (output * factor).sum().backward()
        found.append([output, *(parameter.grad for parameter in layer.parameters()), *plots[-1:]])
    for ours, theirs in zip(found[1], found[0], strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("shape", [(1, LENGTH), (1, 2 * LENGTH), (1, 2 * LENGTH - 3), (2, 2 * LENGTH - 1)], ids=str)
def test_recipe_refuses_other_tables(shape: tuple[int, int], monkeypatch) -> None:
    """wenet's have a row per key and no relative positions: the recipe read them as distances."""
    monkeypatch.setattr(RelPositionMultiHeadedAttention, "forward", swapped_forward())
    x = torch.randn(2, LENGTH, HIDDEN)
    with pytest.raises(ValueError, match=rf"^pos_emb: expected \(1, {2 * LENGTH - 1}, size\) for {LENGTH} keys"):
        RelPositionMultiHeadedAttention(HEADS, HIDDEN)(x, x, x, torch.randn(*shape, HIDDEN), None)
