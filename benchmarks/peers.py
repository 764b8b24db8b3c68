"""What relattn is measured against."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def materialising_skew(query: Tensor, key: Tensor, value: Tensor, rel_k: Tensor) -> Tensor:
    """Relative attention as the field's code does it: Q E^T at L x (2L-1), pad, reshape, drop, slice (Huang et al. 2018).

    query, key, value (B, H, L, D); rel_k (2L - 1, D). Memory: several tensors of (B, H, L, 2L).
    """
    batch, heads, length, size = query.shape
    logits = query @ rel_k.transpose(0, 1)  # (B, H, L, 2L - 1)
    logits = F.pad(logits, (0, 1)).reshape(batch, heads, 2 * length * length)
    logits = F.pad(logits, (0, length - 1)).reshape(batch, heads, length + 1, 2 * length - 1)
    logits = logits[:, :, :length, length - 1 :]
    scores = (query @ key.transpose(-2, -1) + logits) / size**0.5
    return scores.softmax(-1) @ value


def sdpa(query: Tensor, key: Tensor, value: Tensor, rel_k: Tensor) -> Tensor:
    """torch's attention with no relative term at all: a lower bound on the work, not a peer."""
    return F.scaled_dot_product_attention(query, key, value)


def causal_sdpa(query: Tensor, key: Tensor, value: Tensor, rel_k: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)
