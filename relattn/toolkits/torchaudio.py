"""torchaudio's Conformer: named, as it is taken for one with relative positions."""

from __future__ import annotations

from relattn.conversion import Plan

PLANS: dict[str, Plan | str] = {
    "ConformerLayer": "torchaudio's Conformer has no relative term: its attention is torch.nn.MultiheadAttention, without positions",
}
