"""What one attention call consists of, after validation: its tensors and its settings, with the names of the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Tensors(NamedTuple):
    """Tensor arguments of a call. B batch, Hq / Hkv query / key heads, Lq / Lk lengths, D / Dv head sizes, R table rows.

    In a packed call N sequences lie one after the other where others have lengths: query is (1, Hq, Tq, D), key and value (1, Hkv, Tk, D),
    key_mask (1, Tk), and what is said of batch elements, (B,), is said of sequences, (N,). It has both cu_seqlens and no attn_mask.
    """

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
    cu_seqlens_q: Tensor | None = None  # int (N + 1,): sequence n's queries are those from cu_seqlens_q[n] to cu_seqlens_q[n + 1]
    cu_seqlens_k: Tensor | None = None  # int (N + 1,)


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
    chunk_size: int | None = None  # None: no chunks
    chunk_left: int | None = None  # how many chunks before its own a query sees; None: all
    max_seqlen_q: int | None = None  # of a packed call: no sequence is longer; None: nobody said
    max_seqlen_k: int | None = None
    # A call may be a block of a larger one (see relattn.distributed), whose dropout and chunks count heads, queries and keys from
    # here on; first_key is a multiple of 4. query_offset and the tables stay the block's own.
    first_head: int = 0
    first_query: int = 0
    first_key: int = 0
    # Its output will be joined with those of other keys, and is of the dtype of accumulation (where the backend can). The output and the
    # log-sum-exp that the backward pass is handed are the joined ones: neither may be found anew.
    is_part: bool = False

    def output_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The output's, of a query of this dtype."""
        return lse_dtype(dtype) if self.is_part else dtype

    def chunk_start(self, position):
        """The first key of those chunks that a query at `position`, an int or a tensor of them, sees; None: no bound."""
        if self.chunk_size is None or self.chunk_left is None:
            return None
        return ((position + self.first_key) // self.chunk_size - self.chunk_left) * self.chunk_size - self.first_key

    def chunk_stop(self, position):
        """The first key behind its chunk; None: no bound."""
        if self.chunk_size is None:
            return None
        return ((position + self.first_key) // self.chunk_size + 1) * self.chunk_size - self.first_key


FARTHEST = 2**62  # an offset or a side of a window may be, so that distances fit 64-bit numbers
LARGEST_CHUNK = 2**30  # a chunk and a number of chunks may be, likewise


def check_cu_seqlens(tensors: Tensors, settings: Settings) -> None:
    """Whether a packed call's sequences fill it. On a GPU the check joins the stream, and a failure shows there as a device-side assertion.

    Raises:
        ValueError: cu_seqlens descend, do not begin at 0 or end at the number of tokens, or a sequence is longer than was said.
    """
    checks = (
        ("cu_seqlens_q", tensors.cu_seqlens_q, tensors.query.shape[2], settings.max_seqlen_q),
        ("cu_seqlens_k", tensors.cu_seqlens_k, tensors.key.shape[2], settings.max_seqlen_k),
    )
    for name, ends, total, longest in checks:
        if ends is None or (name == "cu_seqlens_k" and ends is tensors.cu_seqlens_q and total == tensors.query.shape[2]):
            continue
        lengths = ends.diff()
        if ends.device.type != "cpu":
            fits = (ends[0] == 0) & (ends[-1] == total) & (lengths >= 0).all()
            fits = fits if longest is None else fits & (lengths <= longest).all()
            torch._assert_async(fits, f"relattn: {name} descends, does not begin at 0 or end at {total}, or exceeds max_seqlen")
            continue
        if ends[0] != 0 or ends[-1] != total:
            found = f"{int(ends[0])} and {int(ends[-1])}"
            raise ValueError(f"{name}: expected to begin at 0 and end at {total}, the number of tokens, got {found}")
        if (lengths < 0).any():
            raise ValueError(f"{name}: expected numbers that do not descend, got {int(lengths.min())} from one to the next")
        if longest is not None and (lengths > longest).any():
            raise ValueError(f"max_seqlen{name[-2:]}: a sequence has {int(lengths.max())} tokens, more than the {longest} given")


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the log-sum-exp and of accumulations: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def hidden_from(dtype: torch.dtype) -> float:
    """Entries of a float mask at or below this value hide the key: libraries write `finfo.min` where they mean -inf."""
    return torch.finfo(dtype).min / 2


def heads_last(tensor: Tensor) -> bool:
    """True if a (B, H, L, D) tensor lies in memory as (B, L, H, D), as it does after `x.view(B, L, H, D).transpose(1, 2)`."""
    return tensor.stride(1) < tensor.stride(2)


def empty_with_layout(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised dense (B, H, L, D) tensor of `like`'s device, dtype (unless one is given) and memory order."""
    if heads_last(like):
        batch, heads, length, size = shape
        return like.new_empty((batch, length, heads, size), dtype=dtype).transpose(1, 2)
    return like.new_empty(shape, dtype=dtype)


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
