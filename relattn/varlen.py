"""Packed sequences: the public function for sequences that lie one after the other, without padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from relattn import functional, sharding
from relattn.arguments import Settings, Tensors, shape_text


def relative_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_k: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    rel_q: Tensor | None = None,
    rel_v: Tensor | None = None,
    rel_bias: Tensor | None = None,
    pos_bias_u: Tensor | None = None,
    pos_bias_v: Tensor | None = None,
    max_relative_position: int | tuple[int, int] | None = None,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    chunk: tuple[int, int | None] | None = None,
    query_offset: int | Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`relative_attention` of N sequences that lie one after the other: what FlashAttention's ``flash_attn_varlen_func`` takes.

    Sequence n has the queries cu_seqlens_q[n] ... cu_seqlens_q[n + 1] - 1 and the keys cu_seqlens_k[n] ... cu_seqlens_k[n + 1] - 1. It
    attends to itself only, and its positions start anew. Nothing is padded: time goes with the sum of the squares of the lengths, memory
    with their sum. Results for a sequence are those of a call of its own: the same bits on backend "cpu" but for the tables' gradients,
    which are sums over all of them; up to rounding elsewhere (of dropout's mask: batch element n's). Backend "triton" never reads the
    lengths on the CPU: nothing waits for the GPU, and a CUDA graph can hold the call. Where there are few sequences of few queries, it
    can cut their keys among more programs if it is told max_seqlen_k.

    Args:
        query: (Tq, Hq, D), Tq being the number of all queries; float32, float64, bfloat16 or float16.
        key: (Tk, Hkv, D), of the query's dtype.
        value: (Tk, Hkv, Dv), of the query's dtype.
        cu_seqlens_q: int32 or int64 (N + 1,): 0, and the number of queries of the first n sequences. Sequences may be empty.
        cu_seqlens_k: the same of keys; None = `cu_seqlens_q`.
        max_seqlen_q, max_seqlen_k: no sequence has more queries or keys; None = unknown. Checked, and never needed: they tell the Triton
            kernels how far distances go, and how finely to cut the work.
        key_mask: bool (Tk,), True = may be attended to.
        key_lengths: integer (N,): keys of a sequence from there on are not seen.
        query_offset: position of a sequence's query 0 relative to its key 0, an int or an integer tensor (N,). None = 0, but an error if
            `is_causal` or `chunk` and `cu_seqlens_k` are given, where the two customary meanings differ.

        All others are those of `relative_attention`, which says what they are. There is no attn_mask.

    Returns:
        (Tq, Hq, Dv) of the query's dtype; with `return_lse` also the log-sum-exp, (Hq, Tq), float32 (float64 for float64).

    Raises:
        ValueError, TypeError, RuntimeError: as `relative_attention`; and where cu_seqlens descend, do not begin at 0 or end at the number
            of tokens, or a sequence is longer than max_seqlen. (On a GPU this last kind of check, of what tensors there hold, is made
            there without a synchronisation, and fails as an assertion does.)
    """
    sharding.refuse("packed sequences (cu_seqlens) are")
    tensors, settings = packed_call(
        query, key, value, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        rel_k=rel_k, rel_q=rel_q, rel_v=rel_v, rel_bias=rel_bias, pos_bias_u=pos_bias_u, pos_bias_v=pos_bias_v,
        max_relative_position=max_relative_position, key_mask=key_mask, key_lengths=key_lengths, is_causal=is_causal, window=window,
        chunk=chunk, query_offset=query_offset, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa,
    )  # fmt: skip
    output, lse = functional.attend(functional.implementation(tensors, settings, backend), tensors, settings)
    output = output[0].transpose(0, 1)
    return (output, lse[0]) if return_lse else output


def packed_call(
    query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None, key_mask: Tensor | None = None, **others: Any,
) -> tuple[Tensors, Settings]:  # fmt: skip
    """`functional.validated` of the arguments of `relative_attention_varlen`."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        functional.check_tensor(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(f"{name}: expected 3 dimensions (tokens, heads, head size), got shape {shape_text(tensor)}")
    _check_ends("cu_seqlens_q", cu_seqlens_q)
    if cu_seqlens_k is None:
        if query.shape[0] != key.shape[0]:
            raise ValueError(f"cu_seqlens_k: {key.shape[0]} keys beside {query.shape[0]} queries need it, got None")
        cu_seqlens_k = cu_seqlens_q
    _check_ends("cu_seqlens_k", cu_seqlens_k)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(f"cu_seqlens_k: expected {shape_text(cu_seqlens_q)} as cu_seqlens_q, got {shape_text(cu_seqlens_k)}")
    if key_mask is not None:
        functional.check_tensor("key_mask", key_mask)
        if key_mask.shape != key.shape[:1]:
            raise ValueError(f"key_mask: expected ({key.shape[0]},), got {shape_text(key_mask)}")
        key_mask = key_mask[None]
    longest, longest_key = _longest("max_seqlen_q", max_seqlen_q), _longest("max_seqlen_k", max_seqlen_k)
    if longest_key is None and cu_seqlens_k is cu_seqlens_q:
        longest_key = longest
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    return functional.validated(
        query=query, key=key, value=value, attn_mask=None, key_mask=key_mask, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=longest, max_seqlen_k=longest_key, **others,
    )  # fmt: skip


def _check_ends(name: str, ends: Tensor) -> None:
    """Shape and dtype; what it holds is looked at where it is used."""
    functional.check_tensor(name, ends)
    if ends.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected torch.int32 (or torch.int64), got {ends.dtype}")
    if ends.dim() != 1 or ends.shape[0] == 0:
        raise ValueError(f"{name}: expected (N + 1,), got {shape_text(ends)}")


def _longest(name: str, length):
    if length is None:
        return None
    if not functional.is_integer(length):
        raise TypeError(f"{name}: expected an int, got {type(length).__name__}")
    length = functional.plain(length)
    if isinstance(length, int) and length < 0:
        raise ValueError(f"{name}: expected a length of at least 0, got {length}")
    return length
