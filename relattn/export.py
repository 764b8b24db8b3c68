"""Out of Python: the operator `relattn::forward` as plain ATen operations, for runtimes that know no operator of ours.

A graph of torch.export holds the operator itself. `decompositions` says what to put in its place, for AOTInductor packages that run without
relattn, and for ONNX::

    program = torch.export.export(model.eval(), inputs, dynamic_shapes=...)
    program = program.run_decompositions(relattn.export.decompositions())
    torch._inductor.aoti_compile_and_package(program, package_path="model.pt2")
    torch.onnx.export(program, (), "model.onnx")

The skew is the published pad-and-reshape, for any two lengths: each query is multiplied with as many table rows as there are distances, and
what has a column per distance becomes what has a column per key by reading it with another row length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from relattn.arguments import Settings, Tensors, hidden_from, lse_dtype, with_layout
from relattn.backends.reference import relative_position, visible


def decompositions(rows: int | None = None) -> dict[Any, Callable]:
    """For `ExportedProgram.run_decompositions`: relattn's operator as plain ATen operations. All else stays as it is.

    The graph computes what `relative_attention` does, with all its arguments, and for all batch sizes and lengths that the program was
    exported for; but it is for inference:

    - no dropout;
    - packed sequences if queries and keys are the same tokens, as one sequence of which each token sees its own (a mask of all pairs);
    - what keys hold that `key_mask` and `key_lengths` hide has no influence, whatever it is; but values that are not finite do have one
      where only `is_causal`, `window`, `chunk` or `attn_mask` hides them (0 * NaN).

    Args:
        rows: None = no loop: fast while sequences are short, and every target takes it, but the graph holds (B, H, Lq, Lk) scores and,
            before the skew, (B, H, Lq, Lq + Lk) products with the table. A number: so many queries at a time in a `torch.while_loop`
            (`Loop` in ONNX), so that memory is O(rows x L); fewer queries than that are computed as if there were so many.

    Raises:
        ValueError: when the program is decomposed: a call has dropout, or packed sequences of other keys or with offsets of their own.
    """
    if rows is not None and rows < 1:
        raise ValueError(f"rows: expected None or a number of at least 1, got {rows}")
    return {torch.ops.relattn.forward.default: functools.partial(_forward, rows)}


def _forward(rows: int | None, backend: str, *call) -> tuple[Tensor, Tensor, Tensor]:
    """As `relattn::forward`; the backend's name is that of the machine that exported, and of no consequence."""
    tensors, settings = Tensors(*call[: len(Tensors._fields)]), Settings(*call[len(Tensors._fields) :])
    if settings.dropout_p > 0.0:
        raise ValueError(f"dropout_p: expected 0 in a program that is decomposed, got {settings.dropout_p}; export after model.eval()")
    if tensors.cu_seqlens_q is not None:
        tensors, settings = _unpacked(tensors, settings)
    queries = tensors.query.shape[2]
    whole = rows is None or (isinstance(queries, int) and queries <= rows)
    output, lse = _attention(tensors, settings) if whole else _in_strips(rows, tensors, settings)
    return with_layout(tensors.query, output), lse, tensors.query.new_empty((0,), dtype=torch.int64)


def _unpacked(tensors: Tensors, settings: Settings) -> tuple[Tensors, Settings]:
    """Sequences one after the other as one, in which distances are what they were, with a mask."""
    ends, lengths = tensors.cu_seqlens_q, tensors.key_lengths
    if tensors.cu_seqlens_k is not ends:
        raise ValueError("cu_seqlens_k: packed keys that are not the queries' tokens have no decomposition; export a model that pads them")
    if tensors.query_offsets is not None:
        raise ValueError("query_offset: one for each packed sequence has no decomposition; export a model that pads them")
    assert ends is not None
    token = torch.arange(tensors.query.shape[2], device=ends.device)
    number = (token[:, None] >= ends[1:]).sum(-1)  # of its sequence
    place = token - ends[:-1].to(torch.int64)[number]
    seen = number[:, None] == number
    if lengths is not None:
        seen = seen & (place < lengths[number])
    if settings.chunk_size is not None:
        at = (place + settings.query_offset)[:, None]
        start, stop = settings.chunk_start(at), settings.chunk_stop(at)
        seen = seen & (place < stop) if start is None else seen & (place >= start) & (place < stop)
    tensors = tensors._replace(attn_mask=seen[None, None], key_lengths=None, cu_seqlens_q=None, cu_seqlens_k=None)
    return tensors, settings._replace(chunk_size=None, chunk_left=None)


def _in_strips(rows: Any, tensors: Tensors, settings: Settings) -> tuple[Tensor, Tensor]:
    """So many queries at a time.

    No tensor is padded to a multiple of `rows` or cut back, which would be a condition on its length: rows beyond the last repeat it, and
    are not taken into the results.
    """
    from torch._higher_order_ops.while_loop import while_loop_op  # `torch.while_loop` would compile what is being traced

    batch, heads, queries, _ = tensors.query.shape
    count = (queries + rows - 1) // rows
    # Query, key and value are often views of one product, and a loop's operands must not share memory.
    mask = tensors.attn_mask
    present = [tensor if tensor is mask else tensor.clone() for tensor in tensors if tensor is not None]
    sizes: list[Any] = [number for number in settings if isinstance(number, torch.SymInt)]

    def unfinished(index, output, lse, count, *others):
        return index < count

    def strip(index, output, lse, count, *others):
        given = iter(others)  # what a loop's body knows is what it is handed
        operands: list[Any] = [None if tensor is None else next(given) for tensor in tensors]
        numbers: list[Any] = [next(given) if isinstance(number, torch.SymInt) else number for number in settings]
        inner, of_strip = Tensors(*operands), Settings(*numbers)
        own = index * rows + torch.arange(rows, device=index.device)
        taken = own.clamp(max=inner.query.shape[2] - 1)
        inner = inner._replace(query=inner.query.index_select(2, taken))
        if mask is not None and mask.dim() > 1 and mask.shape[-2] != 1:
            assert inner.attn_mask is not None
            inner = inner._replace(attn_mask=inner.attn_mask.index_select(-2, taken))
        part, part_lse = _attention(inner, of_strip._replace(query_offset=of_strip.query_offset + index * rows))
        return index + 1, output.index_copy(2, own, part), lse.index_copy(2, own, part_lse)

    query = tensors.query
    start: Any = (
        torch.zeros((), dtype=torch.int64, device=query.device),
        query.new_zeros((batch, heads, count * rows, tensors.value.shape[3])),
        query.new_zeros((batch, heads, count * rows), dtype=lse_dtype(query.dtype)),
    )
    _, output, lse = while_loop_op(unfinished, strip, start, (count, *present, *sizes))
    real = torch.arange(queries, device=query.device)
    return output.index_select(2, real), lse.index_select(2, real)


def _attention(tensors: Tensors, settings: Settings) -> tuple[Tensor, Tensor]:
    """The definition (`relattn.backends.reference`), with rows of the tables taken once per distance instead of scores once per key."""
    query, dtype = tensors.query, tensors.query.dtype
    batch, heads, queries, _ = query.shape
    key, value = (_for_each_query_head(tensor, heads) for tensor in (tensors.key, tensors.value))
    keys = key.shape[2]
    if any(isinstance(size, int) and size == 0 for size in (queries, keys)):  # a size that is not known yet is not 0
        lse = query.new_full((batch, heads, queries), -torch.inf, dtype=lse_dtype(dtype))
        return query.new_zeros((batch, heads, queries, value.shape[3])), lse

    def rows(table: Tensor, distance: Tensor) -> Tensor:
        """Of each distance, (columns,): ([H,] columns, D); or ([B, 1 or H,] columns, D) where offsets differ by batch."""
        distance = distance - settings.query_offset
        if tensors.query_offsets is not None:
            distance = distance - tensors.query_offsets.to(torch.int64)[:, None]
        row = distance.clamp(-settings.left, settings.right) + settings.left
        taken = table.index_select(-2, row.flatten())
        if row.dim() == 1:
            return taken
        taken = taken.unflatten(-2, row.shape)
        return taken[:, None] if table.dim() == 2 else taken.transpose(0, 1)

    def plus(bias: Tensor | None) -> Tensor:  # scaled before the products, which could overflow float16
        return settings.scale * (query if bias is None else query + bias.to(dtype)[:, None, :])

    forth = torch.arange(-queries, keys, device=query.device)  # the distances of the columns that `_skewed` takes
    back = torch.arange(keys, -queries, -1, device=query.device)  # ... and where keys are the rows, whose distances run the other way
    scores = plus(tensors.pos_bias_u) @ key.transpose(-2, -1)
    if tensors.rel_k is not None:
        table = rows(tensors.rel_k.to(dtype), forth)
        scores = scores + _skewed(plus(tensors.pos_bias_v) @ table.transpose(-2, -1), keys)
    if tensors.rel_q is not None:
        table = rows(tensors.rel_q.to(dtype), back)
        scores = scores + _skewed((settings.scale * key) @ table.transpose(-2, -1), queries).transpose(-2, -1)
    scores = scores.to(lse_dtype(dtype))
    if tensors.rel_bias is not None:
        by_distance = rows(tensors.rel_bias.to(scores.dtype)[..., None], forth).transpose(-2, -1)
        scores = scores + _skewed(by_distance.expand(*by_distance.shape[:-2], queries, -1), keys)
    mask = tensors.attn_mask
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.to(scores.dtype).masked_fill(mask <= hidden_from(mask.dtype), 0.0)
    allowed = visible(tensors, settings, relative_position(tensors, settings))
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)

    # A weight of 0 does not keep a NaN out of the sum.
    if tensors.key_mask is not None:
        value = value.masked_fill(~tensors.key_mask[:, None, :, None], 0.0)
    if tensors.key_lengths is not None:
        hidden = torch.arange(keys, device=query.device) >= tensors.key_lengths[:, None]
        value = value.masked_fill(hidden[:, None, :, None], 0.0)
    weights = scores.softmax(-1).to(dtype)
    output = weights @ value
    if tensors.rel_v is not None:
        output = output + _unskewed(weights) @ rows(tensors.rel_v.to(dtype), forth)
    if allowed is not None:  # a query that sees nothing has weights 0 / 0
        output = output.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    return output, scores.logsumexp(-1)


def _for_each_query_head(tensor: Tensor, heads: int) -> Tensor:
    """(B, Hkv, L, D) as (B, Hq, L, D): query head h reads key head h // (Hq / Hkv)."""
    batch, own, length, size = tensor.shape
    if own == heads:
        return tensor
    return tensor[:, :, None].expand(batch, own, heads // own, length, size).flatten(1, 2)


def _skewed(products: Tensor, keys: int) -> Tensor:
    """(..., rows, rows + keys), column c being position c - rows after the row's own, as (..., rows, keys), one column per position.

    The entry of row i and key j has column j - i + rows, so that it lies at i * (rows + keys - 1) + j + rows: rows that are shorter by one,
    from entry `rows` on. (`relattn.skew` does without the first column, and with a case for a single row.)
    """
    rows, columns = products.shape[-2:]
    return products.flatten(-2)[..., rows:].unflatten(-1, (rows, columns - 1))[..., :keys]


def _unskewed(weights: Tensor) -> Tensor:
    """The inverse of `_skewed`, 0 where no key is."""
    rows, keys = weights.shape[-2:]
    flat = F.pad(weights, (0, rows - 1)).flatten(-2)
    return F.pad(flat, (rows, 0)).unflatten(-1, (rows, rows + keys))
