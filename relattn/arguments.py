"""What one attention call consists of, after validation: its tensors and its settings, with the names of the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Tensors(NamedTuple):
    """Tensor arguments of a call. B batch, Hq / Hkv query / key heads, Lq / Lk lengths, D / Dv head sizes, R table rows."""

    query: Tensor  # (B, Hq, Lq, D)
    key: Tensor  # (B, Hkv, Lk, D)
    value: Tensor  # (B, Hkv, Lk, Dv)
    rel_k: Tensor | None = None  # (R, D) or (Hq, R, D)
    rel_q: Tensor | None = None  # (R, D) or (Hq, R, D)
    rel_v: Tensor | None = None  # (R, Dv) or (Hq, R, Dv)
    rel_bias: Tensor | None = None  # (R,) or (Hq, R)
    pos_bias_u: Tensor | None = None  # (Hq, D)
    pos_bias_v: Tensor | None = None  # (Hq, D)
    attn_mask: Tensor | None = None  # bool or float, broadcastable to (B, Hq, Lq, Lk)
    key_mask: Tensor | None = None  # bool (B, Lk)
    key_lengths: Tensor | None = None  # int (B,)
    query_offsets: Tensor | None = None  # int (B,), added to Settings.query_offset


# The first ten are floating point (attn_mask may be) and can require a gradient.
DIFFERENTIABLE = Tensors._fields[:10]


class Settings(NamedTuple):
    """Non-tensor arguments of a call."""

    left: int  # the tables' row 0 is distance -left ...
    right: int  # ... and their last row distance +right
    is_causal: bool
    window_left: int | None
    window_right: int | None
    query_offset: int
    dropout_p: float
    scale: float


FARTHEST = 2**62  # an offset or a side of a window may be, so that distances fit 64-bit numbers


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the log-sum-exp and of accumulations: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def hidden_from(dtype: torch.dtype) -> float:
    """Entries of a float mask at or below this value hide the key: libraries write `finfo.min` where they mean -inf."""
    return torch.finfo(dtype).min / 2


def heads_last(tensor: Tensor) -> bool:
    """True if a (B, H, L, D) tensor lies in memory as (B, L, H, D), as it does after `x.view(B, L, H, D).transpose(1, 2)`."""
    return tensor.stride(1) < tensor.stride(2)


def empty_with_layout(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised dense (B, H, L, D) tensor of `like`'s dtype and device in the memory order of `like`."""
    if heads_last(like):
        batch, heads, length, size = shape
        return like.new_empty((batch, length, heads, size)).transpose(1, 2)
    return like.new_empty(shape)


def with_layout(like: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` (B, H, L, D), copied if need be into the memory order that `empty_with_layout` gives."""
    if heads_last(like):
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor.contiguous()


def shape_text(tensor: Tensor) -> str:
    """A shape as error messages give it."""
    return str(tuple(tensor.shape))


def autocast_enabled(device_type: str) -> bool:
    """As torch.is_autocast_enabled, which does not know the meta device."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def empty_gradient(tensor: Tensor) -> Tensor:
    """An uninitialised gradient for one of the differentiable tensors: query, key, value and a 4-D mask keep their memory order."""
    if tensor.dim() == 4:
        return empty_with_layout(tensor, tensor.shape)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
