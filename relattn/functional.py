"""The public function: validation, casting, choice of a backend."""

from __future__ import annotations

import inspect
import operator
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from relattn import backends, plans, sharding
from relattn.arguments import (
    DIFFERENTIABLE,
    FARTHEST,
    LARGEST_CHUNK,
    Settings,
    Tensors,
    autocast_enabled,
    check_cu_seqlens,
    shape_text,
)
from relattn.backends import reference
from relattn.operators import PLAIN, RelativeAttentionFunction, no_autocast
from relattn.philox import draw_seed
from relattn.tracing import is_tracing, traced

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_TABLES = ("rel_k", "rel_q", "rel_v", "rel_bias")


def relative_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_k: Tensor | None = None,
    *,
    rel_q: Tensor | None = None,
    rel_v: Tensor | None = None,
    rel_bias: Tensor | None = None,
    pos_bias_u: Tensor | None = None,
    pos_bias_v: Tensor | None = None,
    max_relative_position: int | tuple[int, int] | None = None,
    attn_mask: Tensor | None = None,
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
    r"""Exact attention whose scores depend on the query's content and on the distance to the key.

    For batch b, query head h, query i and key j::

        d(i,j) = j - (i + query_offset)
        r(i,j) = clamp(d, -left, right) + left
        s_ij   = scale * [(q_i + u_h).k_j + (q_i + v_h).rel_k[h,r] + k_j.rel_q[h,r]] + rel_bias[h,r] + attn_mask[b,h,i,j]
        w_ij   = dropout(softmax_j(s_ij))
        o_i    = sum_j w_ij (v_j + rel_v[h,r])
        lse_i  = logsumexp_j s_ij

    Memory is O(L D), or O(block x L), never L x L, on every backend but ``"reference"``. Below B is the batch, Hq and Hkv the numbers
    of query and key heads, Lq and Lk the lengths, D and Dv the head sizes, R = left + right + 1 the number of table rows; row 0
    belongs to the farthest distance to the left. Every floating-point tensor gets a gradient.

    Args:
        query: (B, Hq, Lq, D); float32, float64, bfloat16 or float16.
        key: (B, Hkv, Lk, D), of the query's dtype.
        value: (B, Hkv, Lk, Dv), of the query's dtype.
        rel_k: (R, D) shared by the heads, or (Hq, R, D). Shaw et al. 2018 (a^K), Huang et al. 2018 (E^r), Transformer-XL (W R).
        rel_q: (R, D) or (Hq, R, D); BERT's ``relative_key_query``, DeBERTa's position-to-content term.
        rel_v: (R, Dv) or (Hq, R, Dv), added to the values; Shaw et al. 2018 (a^V), VITS.
        rel_bias: (R,) or (Hq, R), added to the scaled scores; T5, ALiBi as a table.
        pos_bias_u, pos_bias_v: (Hq, D), added to the query before the content and the position product; Transformer-XL (Dai et al.
            2019), Conformer.
        max_relative_position: k for (k, k), or (left, right): distances beyond clamp to the edge rows. None: the tables' R is odd and
            they are symmetric. Independent of `is_causal`; a causal call may use (left, 0).
        attn_mask: broadcastable to (B, Hq, Lq, Lk). Boolean: True = may attend. Floating (the query's dtype or float32): added; an
            entry at or below half of its dtype's lowest finite number hides the key.
        key_mask: bool (B, Lk), True = may be attended to.
        key_lengths: integer (B,): keys from there on are not seen.
        is_causal: keys with d > 0 are not seen.
        window: (left, right): only keys with -left <= d <= right are seen; None on a side = unbounded.
        chunk: (size, left_chunks): a query sees the keys of its own chunk and of so many before it, None = of all before it. Chunks are of
            `size` positions, the first from key 0 on: key j is seen if c(i) - left_chunks <= c(j) <= c(i), with c(j) = j // size and
            c(i) = (i + query_offset) // size. wenet's and ESPnet's ``num_left_chunks`` (there -1 = all) is `left_chunks`; NeMo's
            ``chunked_limited`` with ``att_context_size`` [left, right] is (right + 1, left // (right + 1)).
        query_offset: position of query 0 relative to key 0, an int or an integer tensor (B,) (or of shape ()), of magnitude at most
            2**62. None = 0, but an error if Lq != Lk and `is_causal` or `chunk`, where the two customary meanings differ.
        dropout_p: probability of dropping a weight. The mask is a function of a seed drawn from torch's generator, the same in all
            backends.
        scale: None = 1 / sqrt(D).
        enable_gqa: allow Hq to be a multiple of Hkv; query head h then reads key head h // (Hq / Hkv).
        return_lse: also return the log-sum-exp of the scores.
        backend: None = the fastest that supports the call; "triton", "cpu", "blocked" or "reference" insists on one. See `explain`.

    Returns:
        (B, Hq, Lq, Dv) of the query's dtype, in the query's memory order; with `return_lse` also the natural-log log-sum-exp before
        dropout, (B, Hq, Lq), float32 (float64 for float64), differentiable. A query that may see no key (also when Lk = 0) gets
        output 0, lse -inf and no gradient, never NaN. Lq = 0 gives an empty output.

        What is not seen has no influence, whatever it holds (padding of NaN, infinities, the largest numbers): outputs and gradients
        are the same to the last bit, and gradients at keys and values that nobody sees are 0. Likewise for queries whose output gets
        no gradient: they owe none to anything (backend "triton": in calls that hide something).

    Raises:
        ValueError: a shape, size or setting does not fit; or the backend named cannot take the call. The message names the argument.
        TypeError: a dtype or type is not supported.
        RuntimeError: on a second derivative, which only ``backend="reference"`` has.

    Under autocast all floating tensors but float64 ones are cast to autocast's dtype, as torch's own attention does. Outside it tables
    and biases may be float32 beside half-precision query, key and value.

    DTensors that are sharded by batch and heads are computed where they lie, what else is sharded is gathered. All floating-point
    tensors are DTensors then; a mask without a gradient may be plain.

    Packed sequences: `relative_attention_varlen`. Two-dimensional positions (SAM, Swin) are not supported.
    """
    if sharding.active:
        return sharding.sharded(
            query, key, value, rel_k, rel_q=rel_q, rel_v=rel_v, rel_bias=rel_bias, pos_bias_u=pos_bias_u, pos_bias_v=pos_bias_v,
            max_relative_position=max_relative_position, attn_mask=attn_mask, key_mask=key_mask, key_lengths=key_lengths,
            is_causal=is_causal, window=window, chunk=chunk, query_offset=query_offset, dropout_p=dropout_p, scale=scale,
            enable_gqa=enable_gqa, return_lse=return_lse, backend=backend,
        )  # fmt: skip
    if not torch.compiler.is_compiling() and is_tracing():
        output, lse, _ = traced(
            query, key, value, rel_k=rel_k, rel_q=rel_q, rel_v=rel_v, rel_bias=rel_bias, pos_bias_u=pos_bias_u, pos_bias_v=pos_bias_v,
            max_relative_position=max_relative_position, attn_mask=attn_mask, key_mask=key_mask, key_lengths=key_lengths,
            is_causal=is_causal, window=window, chunk=chunk, query_offset=query_offset, dropout_p=dropout_p, scale=scale,
            enable_gqa=enable_gqa, backend=backend,
        )  # fmt: skip
        return (output, lse) if return_lse else output
    signature = None
    if not torch.compiler.is_compiling() and sharding.first_head == 0:
        offset, offsets = (None, query_offset) if isinstance(query_offset, Tensor) else (query_offset, None)
        given = (
            query, key, value, rel_k, rel_q, rel_v, rel_bias, pos_bias_u, pos_bias_v, attn_mask, key_mask, key_lengths, offsets, None, None
        )  # fmt: skip
        present = [tensor for tensor in given if tensor is not None]
        numbers = (is_causal, dropout_p, scale, enable_gqa, backend)
        signature = plans.signature_of(given, offset, (max_relative_position, window, chunk), numbers)
        plan = None if signature is None else plans.find(signature)
        if plan is not None:
            output, lse = plan.attend(present, offset or 0)
            return (output, lse) if return_lse else output
    tensors, settings = validated(
        query, key, value, rel_k, rel_q, rel_v, rel_bias, pos_bias_u, pos_bias_v, max_relative_position, attn_mask, key_mask,
        key_lengths, is_causal, window, chunk, query_offset, dropout_p, scale, enable_gqa,
    )  # fmt: skip
    name = implementation(tensors, settings, backend)
    if signature is not None and name != "reference" and all(map(operator.is_, tensors, given)):
        plan = plans.keep(signature, name, tensors, settings)
        output, lse = plan.attend(present, settings.query_offset)
    else:
        output, lse = attend(name, tensors, settings)
    return (output, lse) if return_lse else output


def implementation(tensors: Tensors, settings: Settings, backend: str | None) -> str:
    """Of the backend that is asked for (None: the fastest that takes the call)."""
    chosen = backends.select(tensors, settings, backend)
    return backends.automatic(chosen) if backend is None else chosen


def attend(name: str, tensors: Tensors, settings: Settings) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a call that has been checked."""
    if name == "reference":
        return _by_reference(tensors, settings)[:2]
    run = torch.ops.relattn.forward if torch.compiler.is_compiling() else RelativeAttentionFunction.apply
    return run(name, *tensors, *settings)[:2]


def attention_with_weights(query: Tensor, key: Tensor, value: Tensor, **arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and weights after dropout, (B, Hq, Lq, Lk), by the reference: what asks for weights materialises them.

    `arguments` are `relative_attention`'s, which checks them in the same way.
    """
    arguments = _DEFAULTS | arguments
    sharding.refuse("weights (need_weights, output_attentions) are")
    if not torch.compiler.is_compiling() and is_tracing():
        return traced(query, key, value, weights=True, **arguments)
    output, lse, weights = _by_reference(*validated(query, key, value, **arguments))
    assert weights is not None
    return output, lse, weights


def _by_reference(tensors: Tensors, settings: Settings) -> tuple[Tensor, Tensor, Tensor | None]:
    device = tensors.query.device
    dtensors = _dtensors(tensors)
    if dtensors is None:
        check_cu_seqlens(tensors, settings)
    with no_autocast(device.type):
        seed = draw_seed(device) if settings.dropout_p > 0.0 else None
        if dtensors is not None:
            return dtensors.by_reference(tensors, settings, seed)
        return reference.attention(tensors, settings, seed)


def _dtensors(tensors: Tensors):
    """The module `relattn.dtensor` if a tensor is a DTensor. Where it is not imported there are none."""
    if all(tensor is None or type(tensor) in PLAIN for tensor in tensors):
        return None
    module = sys.modules.get("relattn.dtensor")
    return module if module is not None and module.has_shards(tensors) else None


# What an argument is that a call leaves out.
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(relative_attention).parameters.items()
    if parameter.default is not parameter.empty and name not in ("return_lse", "backend")
}
_PACKING = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


class Explanation(NamedTuple):
    """Which backend a call uses, and why not the others."""

    backend: str
    reasons: dict[str, str]  # for each backend that cannot take the call: why

    def __str__(self) -> str:
        lines = [f"backend: {self.backend}"] + [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def explain(query: Tensor, key: Tensor, value: Tensor, rel_k: Tensor | None = None, **arguments) -> Explanation:
    """Which backend `relative_attention` would use for these arguments (the same as it takes), and why not the others.

    With `cu_seqlens_q` they are those of `relative_attention_varlen`.

    Returns:
        `Explanation(backend, reasons)`; print it for a readable answer. Nothing is computed.

    Raises:
        as `relative_attention` does for bad arguments.
    """
    backend = arguments.pop("backend", None)
    arguments.pop("return_lse", None)
    packed, defaults = "cu_seqlens_q" in arguments, dict(_DEFAULTS)
    if packed:
        defaults.pop("attn_mask")
    unknown = arguments.keys() - defaults.keys() - (set(_PACKING) if packed else set())
    if unknown:
        raise TypeError(f"explain() got unexpected arguments: {', '.join(sorted(unknown))}")
    arguments = defaults | arguments | {"rel_k": rel_k}
    if packed:
        from relattn.varlen import packed_call  # it needs what is defined here

        call = packed_call(query, key, value, **arguments)
    else:
        call = validated(query, key, value, **arguments)
    chosen = backends.select(*call, backend)
    return Explanation(chosen, {name: reason for name, reason in backends.reasons(*call).items() if reason is not None})


def validated(
    query, key, value, rel_k, rel_q, rel_v, rel_bias, pos_bias_u, pos_bias_v, max_relative_position, attn_mask, key_mask,
    key_lengths, is_causal, window, chunk, query_offset, dropout_p, scale, enable_gqa, cu_seqlens_q=None, cu_seqlens_k=None,
    max_seqlen_q=None, max_seqlen_k=None,
) -> tuple[Tensors, Settings]:  # fmt: skip
    """Check every argument, cast under autocast, and return what backends work on. A packed call is one as `Tensors` has it."""
    _check_inputs(query, key, value, enable_gqa)
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal: expected a bool, got {type(is_causal).__name__}")
    batch, heads, query_length, head_size = query.shape
    key_length, value_size = value.shape[2:]
    tables = (("rel_k", rel_k, head_size), ("rel_q", rel_q, head_size), ("rel_v", rel_v, value_size))
    left, right = _clip(max_relative_position, _check_tables(tables, rel_bias, heads))
    for name, bias in (("pos_bias_u", pos_bias_u), ("pos_bias_v", pos_bias_v)):
        if bias is not None:
            check_tensor(name, bias)
            if bias.shape != (heads, head_size):
                raise ValueError(f"{name}: expected ({heads}, {head_size}), got {shape_text(bias)}")
    check_masks((batch, heads, query_length, key_length), attn_mask, key_mask)
    sequences = batch if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if key_lengths is not None:
        _check_integers("key_lengths", key_lengths, sequences)
    same = query_length == key_length if cu_seqlens_q is None else cu_seqlens_q is cu_seqlens_k
    query_offset, query_offsets = _offsets(query_offset, sequences)
    chunk_size, chunk_left = chunk_sides(chunk)
    if query_offset is None:
        if (is_causal or chunk is not None) and not same:
            raise ValueError(ambiguous("is_causal" if is_causal else "chunk", query_length, key_length, cu_seqlens_q is not None))
        query_offset = 0
    window_left, window_right = window_sides(window, is_causal)
    _check_numbers(dropout_p, scale)
    tensors = Tensors(
        query, key, value, rel_k, rel_q, rel_v, rel_bias, pos_bias_u, pos_bias_v, attn_mask, key_mask, key_lengths,
        query_offsets, cu_seqlens_q, cu_seqlens_k,
    )  # fmt: skip
    if autocast_enabled(query.device.type):
        tensors = autocast(tensors)
    check_dtypes(tensors)
    if pos_bias_v is not None and rel_k is None:
        raise ValueError("pos_bias_v: it stands in rel_k's product only, and rel_k is None")
    settings = Settings(
        left, right, is_causal, window_left, window_right, query_offset, float(dropout_p),
        head_size**-0.5 if scale is None else float(scale), chunk_size, chunk_left, max_seqlen_q, max_seqlen_k,
        first_head=sharding.first_head if dropout_p > 0.0 else 0,
    )  # fmt: skip
    return tensors, settings


def _check_inputs(query, key, value, enable_gqa) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
        if tensor.dim() != 4:
            expected = "4 dimensions (batch, heads, length, head size)"
            raise ValueError(f"{name}: expected {expected}, got shape {shape_text(tensor)}")
    batch, heads, _, head_size = query.shape
    key_heads, key_length = key.shape[1:3]
    if head_size == 0:
        raise ValueError(f"query: expected a head size of at least 1, got shape {shape_text(query)}")
    if value.shape[3] == 0:
        raise ValueError(f"value: expected a size of at least 1, got {shape_text(value)}")
    if key.shape[0] != batch or key.shape[3] != head_size:
        expected = f"({batch}, heads, length, {head_size}) as query is {shape_text(query)}"
        raise ValueError(f"key: expected {expected}, got {shape_text(key)}")
    if value.shape[:3] != key.shape[:3]:
        expected = f"({batch}, {key_heads}, {key_length}, size) as key is {shape_text(key)}"
        raise ValueError(f"value: expected {expected}, got {shape_text(value)}")
    if heads != key_heads:
        if not enable_gqa:
            raise ValueError(f"key: expected {heads} heads as query has, got {key_heads} (enable_gqa=True allows fewer)")
        if key_heads == 0 or heads % key_heads != 0:
            raise ValueError(f"key: expected a number of heads that divides query's {heads}, got {key_heads}")


def _check_tables(tables, rel_bias, heads) -> int | None:
    """The number of rows that all have; None: there is no table. `tables`: (name, tensor or None, last size)."""
    rows = None
    for name, table, size in tables:
        if table is not None:
            check_tensor(name, table)
            fits = table.dim() in (2, 3) and table.shape[-1] == size and (table.dim() == 2 or table.shape[0] == heads)
            if not fits:
                raise ValueError(f"{name}: expected (R, {size}) or ({heads}, R, {size}), got {shape_text(table)}")
            rows = _check_rows(name, table.shape[-2], rows)
    if rel_bias is not None:
        check_tensor("rel_bias", rel_bias)
        if not (rel_bias.dim() == 1 or (rel_bias.dim() == 2 and rel_bias.shape[0] == heads)):
            raise ValueError(f"rel_bias: expected (R,) or ({heads}, R), got {shape_text(rel_bias)}")
        rows = _check_rows("rel_bias", rel_bias.shape[-1], rows)
    return rows


def check_masks(scores, attn_mask, key_mask) -> None:
    """`scores`: their shape (B, Hq, Lq, Lk)."""
    batch, _, _, key_length = scores
    if attn_mask is not None:
        check_tensor("attn_mask", attn_mask)
        sizes = tuple(attn_mask.shape)
        pairs = zip(sizes[::-1], scores[::-1], strict=False)
        if len(sizes) > 4 or any(size not in (1, full) for size, full in pairs):
            raise ValueError(f"attn_mask: expected a shape broadcastable to {scores}, got {shape_text(attn_mask)}")
    if key_mask is not None:
        check_tensor("key_mask", key_mask)
        if key_mask.dtype != torch.bool:
            raise TypeError(f"key_mask: expected torch.bool, got {key_mask.dtype}")
        if key_mask.shape != (batch, key_length):
            raise ValueError(f"key_mask: expected ({batch}, {key_length}), got {shape_text(key_mask)}")


def ambiguous(name: str, queries, keys, packed: bool) -> str:
    """What is said of a query_offset that is None where it must not be."""
    found = "queries and keys of different cu_seqlens" if packed else f"{queries} queries and {keys} keys"
    given = "cu_seqlens_k.diff() - cu_seqlens_q.diff()" if packed else keys - queries
    return (
        f"query_offset: {name} with {found} needs it; "
        f"give {given} if the last query stands at the last key, 0 if the first stands at the first"
    )


def _offsets(query_offset, batch):
    """The offset of all sequences (None if none was given), and the tensor (B,) that is added to it, if one was given."""
    if query_offset is None:
        return None, None
    if isinstance(query_offset, Tensor):
        if query_offset.dim() == 0:
            query_offset = query_offset.expand(batch)
        _check_integers("query_offset", query_offset, batch)
        return 0, query_offset
    if not is_integer(query_offset):
        raise TypeError(f"query_offset: expected an int or an integer tensor, got {type(query_offset).__name__}")
    query_offset = plain(query_offset)
    if _too_large(query_offset):
        raise ValueError(
            f"query_offset: expected at most 2**62, so that distances fit 64-bit numbers, got {query_offset}"
        )
    return query_offset, None


def _check_numbers(dropout_p, scale) -> None:
    if not _is_number(dropout_p):
        raise TypeError(f"dropout_p: expected a probability in [0, 1], got {dropout_p!r}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1], got {dropout_p}")
    if scale is not None and not _is_number(scale):
        raise TypeError(f"scale: expected None or a number, got {scale!r}")
    # Also false for NaN.
    if isinstance(scale, (int, float)) and not -sys.float_info.max <= scale <= sys.float_info.max:
        raise ValueError(f"scale: expected a finite number, got {scale if isinstance(scale, float) else 'a larger one'}")


def is_integer(value) -> bool:
    """An int, one of torch.compile's, or one of numpy's."""
    if isinstance(value, (int, torch.SymInt)):
        return not isinstance(value, bool)
    return type(value).__module__ == "numpy" and hasattr(value, "__index__")


def plain(integer):
    return integer if isinstance(integer, (int, torch.SymInt)) else operator.index(integer)


def _is_number(value) -> bool:
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def _too_large(value) -> bool:
    return isinstance(value, int) and abs(value) > FARTHEST  # a SymInt is one of a tensor's sizes


def check_tensor(name: str, tensor) -> None:
    if not isinstance(tensor, Tensor):
        remedy = "; torch.fx.wrap('relative_attention') makes it one node of the graph" if isinstance(tensor, torch.fx.Proxy) else ""
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}{remedy}")
    if tensor.is_nested:
        raise TypeError(f"{name}: nested tensors are not supported; pad them and give key_lengths")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a strided tensor, got {tensor.layout}")


def _check_integers(name: str, tensor, batch: int) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected an integer dtype, got {tensor.dtype}")
    if tensor.shape != (batch,):
        raise ValueError(f"{name}: expected ({batch},), got {shape_text(tensor)}")


def _check_rows(name: str, rows: int, others: int | None) -> int:
    if rows == 0:
        raise ValueError(f"{name}: expected at least one row, got 0")
    if others is not None and rows != others:
        raise ValueError(f"{name}: expected {others} rows as the other tables have, got {rows}")
    return rows


def _clip(max_relative_position, rows: int | None) -> tuple[int, int]:
    """(left, right) from the argument and the number of table rows (None: no table)."""
    if max_relative_position is None:
        if rows is None:
            return 0, 0
        if rows % 2 == 0:
            raise ValueError(
                f"max_relative_position: tables of {rows} rows, an even number, need it as (left, right) with left + right + 1 = {rows}"
            )
        return rows // 2, rows // 2
    left, right = clip_sides(max_relative_position)
    if rows is None:
        raise ValueError(f"max_relative_position: given as {max_relative_position!r} but there is no table (rel_k, rel_q, rel_v, rel_bias)")
    if rows != left + right + 1:
        raise ValueError(
            f"max_relative_position: {max_relative_position!r} means tables of {left} + {right} + 1 = {left + right + 1} rows, got {rows}"
        )
    return left, right


def clip_sides(max_relative_position) -> tuple[int, int]:
    """(left, right) of a `max_relative_position`, checked: k means (k, k)."""
    sides = max_relative_position
    if is_integer(sides):
        sides = (sides, sides)
    if not (isinstance(sides, (tuple, list)) and len(sides) == 2 and all(is_integer(side) for side in sides)):
        raise TypeError(f"max_relative_position: expected an int or (left, right), got {max_relative_position!r}")
    sides = (plain(sides[0]), plain(sides[1]))
    if min(sides) < 0:
        raise ValueError(f"max_relative_position: expected numbers of at least 0, got {max_relative_position!r}")
    return sides


def window_sides(window, is_causal: bool) -> tuple[int | None, int | None]:
    """(left, right) of a `window`, checked."""
    if window is None:
        return None, None
    if not (isinstance(window, (tuple, list)) and len(window) == 2):
        raise TypeError(f"window: expected (left, right), each a number or None, got {window!r}")
    for side in window:
        if side is not None and not is_integer(side):
            raise TypeError(f"window: expected (left, right), each a number or None, got {window!r}")
        if side is not None and side < 0:
            raise ValueError(f"window: expected numbers of at least 0, got {window!r}")
        if _too_large(side):
            raise ValueError(f"window: expected at most 2**62 (None is unbounded), so that distances fit 64-bit numbers, got {window!r}")
    left, right = (None if side is None else plain(side) for side in window)
    if is_causal and right is not None and right > 0:
        raise ValueError(f"window: {window!r} looks ahead of the query, which is_causal=True forbids; give (left, 0) or (left, None)")
    return left, right


def chunk_sides(chunk) -> tuple[int | None, int | None]:
    """(size, left_chunks) of a `chunk`, checked."""
    if chunk is None:
        return None, None
    if not (isinstance(chunk, (tuple, list)) and len(chunk) == 2 and is_integer(chunk[0]) and (chunk[1] is None or is_integer(chunk[1]))):
        raise TypeError(f"chunk: expected (size, left_chunks), numbers, the second one or None, got {chunk!r}")
    size, left = plain(chunk[0]), None if chunk[1] is None else plain(chunk[1])
    if size < 1 or (left is not None and left < 0):
        raise ValueError(f"chunk: expected a size of at least 1 and at least 0 chunks to the left (None: all), got {chunk!r}")
    if any(isinstance(side, int) and side > LARGEST_CHUNK for side in (size, left or 0)):
        raise ValueError(f"chunk: expected numbers of at most 2**30, got {chunk!r}")
    return size, left


def autocast(tensors: Tensors) -> Tensors:
    """Cast as torch casts the arguments of scaled_dot_product_attention: all floating tensors but float64."""
    dtype = torch.get_autocast_dtype(tensors.query.device.type)

    def cast(tensor):
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(dtype)

    return Tensors(*(cast(tensor) for tensor in tensors))


def check_dtypes(tensors: Tensors) -> None:
    """One dtype; tables, biases and mask may be float32 beside half precision. One device."""
    query = tensors.query
    if query.dtype not in _FLOATS:
        raise TypeError(f"query: expected one of {', '.join(str(dtype) for dtype in _FLOATS)}, got {query.dtype}")
    for name, tensor in zip(Tensors._fields, tensors, strict=True):
        if tensor is None:
            continue
        if tensor.device != query.device:
            argument = "query_offset" if name == "query_offsets" else name
            raise ValueError(f"{argument}: expected device {query.device} as query, got {tensor.device}")
        if name not in DIFFERENTIABLE or tensor.dtype == query.dtype or (name == "attn_mask" and tensor.dtype == torch.bool):
            continue
        if name in ("key", "value"):
            raise TypeError(f"{name}: expected {query.dtype} as query, got {tensor.dtype}")
        if tensor.dtype != torch.float32 or query.dtype == torch.float64:
            allowed = f"{query.dtype}" + ("" if query.dtype in (torch.float32, torch.float64) else " or torch.float32")
            allowed += " or torch.bool" if name == "attn_mask" else ""
            raise TypeError(f"{name}: expected {allowed} beside a query of {query.dtype}, got {tensor.dtype}")
