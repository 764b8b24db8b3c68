"""The public function on sharded sequences: checks, lengths, the seed, and the three methods."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from relattn import backends, functional, operators, varlen
from relattn.arguments import DIFFERENTIABLE, Settings, Tensors, autocast_enabled, with_layout
from relattn.backends import reference
from relattn.distributed import ring
from relattn.distributed.collectives import (
    Group,
    Replicated,
    check_device,
    common_seed,
    group_of,
    heads_for_length,
    length_for_heads,
    same_on_all,
    send_everywhere,
    started,
)
from relattn.distributed.layout import LAYOUTS, Layout, fitting
from relattn.distributed.packing import Packing
from relattn.philox import draw_seed

METHODS = ("ring", "all_to_all", "gather")
TABLE_GRADIENTS = ("sum", "local")
_REPLICATED = ("rel_k", "rel_q", "rel_v", "rel_bias", "pos_bias_u", "pos_bias_v")
_SHARDED = dict(query=2, key=2, value=2, key_mask=1)  # in which dimension
_DIMS_PER_HEAD = dict(rel_k=3, rel_q=3, rel_v=3, rel_bias=2, pos_bias_u=2, pos_bias_v=2)


def relative_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_k: Tensor | None = None,
    *,
    group: Group = None,
    mesh: Any = None,
    method: str = "ring",
    layout: str = "contiguous",
    table_gradients: str = "sum",
    query_length: int | None = None,
    key_length: int | None = None,
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
    """`relattn.relative_attention` of sequences whose tokens lie on the ranks of a process group: context parallelism.

    The result is that of one call on the whole sequences, of which every rank gets its own queries' rows. All ranks call it, with the same
    settings. Below P is the number of ranks, l and m the numbers of queries and keys that this rank has, Lq and Lk of all.

    Args:
        query: (B, Hq, l, D), key: (B, Hkv, m, D), value: (B, Hkv, m, Dv): this rank's part, as `shard` cuts it. Ranks may have no tokens.
        rel_k, rel_q, rel_v, rel_bias, pos_bias_u, pos_bias_v: whole and the same on every rank.
        group: a process group of torch.distributed (gloo for CPU tensors, NCCL for GPUs); None = the default one.
        mesh: a DeviceMesh of one dimension, in place of a group.
        method: "ring": keys and values pass, a shard at a time, while the one before is computed; sent and computed is only what causality,
            window, chunks and lengths let the rank see, and memory is O(l). "all_to_all": heads for length (Jacobs et al. 2023,
            "DeepSpeed Ulysses"), Hq and Hkv being multiples of P: the least bytes where nothing is hidden, and memory O(L / P) too.
            "gather": every rank gets all keys and values, O(L) memory; few large messages.
        layout: "contiguous" or "zigzag", see `shard`. Causal calls are balanced with "zigzag" (of "all_to_all" with both).
        table_gradients: gradients of the tables and biases. "sum": those of the whole sequences on every rank, in one all-reduce. "local":
            this rank's part of them, whose sum over the ranks they are: for parameters whose gradients DDP or FSDP reduces over these same
            ranks, as they do those of all other parameters. (With a loss that is the mean of the ranks' means DDP averages: take "local".
            "sum" under DDP would count tables P times.)
        query_length, key_length: Lq and Lk. None: found by an exchange of a few numbers, which also sees whether the settings are the same
            on every rank; on GPUs it synchronises.
        attn_mask: broadcastable to (B, Hq, l, Lk): the rows of this rank's queries, with all keys in order. Its gradient is this rank's.
        key_mask: bool (B, m): of this rank's keys.
        key_lengths, query_offset: of the whole sequences, and the same on every rank. Tensors among them are read, which on GPUs
            synchronises.
        dropout_p: the mask is that of one call on the whole sequences with the same seed: for any method and number of ranks. Every rank
            draws a seed from torch's generator, and all take that of the group's first: as long as that rank's generator is restored a
            checkpointed layer sees its mask again.
        return_lse: also return the log-sum-exp, (B, Hq, l).
        backend: as in `relattn.relative_attention`; "reference" is not for method "ring".

        All others are those of `relattn.relative_attention`.

    Returns:
        (B, Hq, l, Dv) of the query's dtype and in its memory order, and the log-sum-exp as there. Results depend on P by rounding only
        (partial results are joined and gradients summed in float32, or float64, in a fixed order); two runs give the same bits. In method
        "ring" rows of which all scores share a large constant (a mask of -1e9 over all that they see) lose as much precision.

    Raises:
        ValueError, TypeError: as `relattn.relative_attention` does; an unknown method, layout or table_gradients; local lengths that are
            not the layout's (on every rank; with query_length and key_length on those that have them); settings that differ between
            ranks; heads that the ranks do not divide ("all_to_all"); a group whose backend does not take tensors of this device.
        RuntimeError: torch.distributed is not initialised; a second derivative.

    If a rank fails the others wait for it until the group's time-out. Backward passes communicate too: every rank has to make them, also
    one without tokens. Under torch.compile the function is not part of the graph. Packed sequences: `relative_attention_varlen`.
    """
    given = dict(
        rel_k=rel_k, rel_q=rel_q, rel_v=rel_v, rel_bias=rel_bias, pos_bias_u=pos_bias_u, pos_bias_v=pos_bias_v,
        max_relative_position=max_relative_position, key_mask=key_mask, key_lengths=key_lengths, is_causal=is_causal, window=window,
        chunk=chunk, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa,
    )  # fmt: skip
    sharding = Sharding(group_of(group, mesh), method, layout, table_gradients)
    return attend(sharding, query, key, value, given, attn_mask, query_offset, (query_length, key_length), return_lse, backend)


def relative_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_k: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    group: Group = None,
    mesh: Any = None,
    method: str = "ring",
    layout: str = "contiguous",
    table_gradients: str = "sum",
    return_lse: bool = False,
    backend: str | None = None,
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`relattn.relative_attention_varlen` of packed sequences whose tokens lie on the ranks of a group: a sequence may lie on several
    ranks, and a rank may have many.

    The result is that of one call on all tokens, of which every rank gets its own queries' rows. What ranks send and compute in method
    "ring" are the pairs of parts that share a sequence, with some keys that causality and window let its queries see.

    Args:
        query: (t, Hq, D), key: (s, Hkv, D), value: (s, Hkv, Dv): this rank's tokens of all, as `shard` cuts them in dimension 0.
        cu_seqlens_q, cu_seqlens_k: of all tokens, whole and the same on every rank, as key_lengths and query_offset are. They are read,
            which on GPUs synchronises.
        group, mesh, method, layout, table_gradients: as in `relative_attention`. "zigzag" balances long causal sequences; where they are
            much shorter than a rank's part, "contiguous" is balanced too and has less to send.
        others: the arguments of `relattn.relative_attention_varlen`; key_mask is that of this rank's keys, bool (s,).

    Returns:
        (t, Hq, Dv) of the query's dtype; with `return_lse` also the log-sum-exp, (Hq, t).

    Raises:
        ValueError, TypeError, RuntimeError: as `relattn.relative_attention_varlen` and `relative_attention` here; dropout_p or chunk in
            method "ring", whose blocks may begin anywhere in a sequence: take "gather" or "all_to_all".
    """
    sharding = Sharding(group_of(group, mesh), method, layout, table_gradients)
    sharding.check()
    given = _whole(others) | dict(rel_k=rel_k, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    tensors, settings = varlen.packed_call(query, key, value, **given)
    check_device(query.device, sharding.group)
    if method == "ring":
        for name, asked in (("dropout_p", settings.dropout_p > 0.0), ("chunk", settings.chunk_size is not None)):
            if asked:
                raise ValueError(f"{name}: packed sequences have none in method 'ring'; take method='gather' or 'all_to_all'")
    queries, keys, _ = _lengths(sharding, tensors, settings, (None, None), None)
    packing = Packing.of(tensors, settings, queries.length, keys.length)
    output, lse = _compute(sharding, tensors, settings, queries, keys, False, backend, packing)
    output = output[0].transpose(0, 1)
    return (output, lse[0]) if return_lse else output


_VARLEN = {
    name: parameter.default
    for name, parameter in inspect.signature(varlen.relative_attention_varlen).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and not name.startswith("cu_seqlens") and name not in ("return_lse", "backend")
}


def _whole(others: dict[str, Any]) -> dict[str, Any]:
    """With what a call leaves out.

    Raises:
        TypeError: there is no such argument.
    """
    for name in others:
        if name not in _VARLEN:
            raise TypeError(f"relative_attention_varlen: got an unexpected argument {name!r}")
    return _VARLEN | others


class Sharding(NamedTuple):
    """How sequences lie on ranks, and what is done about it."""

    group: Group
    method: str
    layout: str
    table_gradients: str

    def check(self) -> None:
        """Raises:
        ValueError: one of the names is not known.
        """
        for name, names in (("method", METHODS), ("layout", LAYOUTS), ("table_gradients", TABLE_GRADIENTS)):
            value = getattr(self, name)
            if value not in names:
                raise ValueError(f"{name}: expected one of {', '.join(map(repr, names))}, got {value!r}")


class _Shard(NamedTuple):
    """A checked call of one rank. `tensors` are local; of the settings query_offset is the whole call's."""

    sharding: Sharding
    tensors: Tensors
    settings: Settings
    queries: Layout
    keys: Layout
    seed: Tensor
    mask_has_rows: bool  # attn_mask has one for each query, on some rank
    packing: Packing | None = None

    @property
    def rank(self) -> int:
        return dist.get_rank(self.sharding.group)

    @property
    def group(self) -> Group:
        return self.sharding.group


def attend(
    sharding: Sharding, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any], attn_mask: Tensor | None, query_offset: Any,
    lengths: tuple[int | None, int | None], return_lse: bool, backend: str | None, must_cover: bool = False,
) -> Any:  # fmt: skip
    """See `relative_attention`. must_cover: tables that are not said to be clipped are refused where distances lie beyond them."""
    sharding.check()
    # What is local may differ in length, which without an offset would be an error of its own.
    tensors, settings = functional.validated(
        query, key, value, attn_mask=None, query_offset=0 if query_offset is None else query_offset, **given
    )
    check_device(query.device, sharding.group)
    rows = None
    if attn_mask is not None:
        functional.check_tensor("attn_mask", attn_mask)
        rows = attn_mask.shape[-2] if attn_mask.dim() > 1 else 1
    queries, keys, mask_has_rows = _lengths(sharding, tensors, settings, lengths, rows)
    if query_offset is None and (settings.is_causal or settings.chunk_size is not None) and queries.length != keys.length:
        name = "is_causal" if settings.is_causal else "chunk"
        raise ValueError(functional.ambiguous(name, queries.length, keys.length, False))
    if attn_mask is not None:
        tensors = _with_mask(tensors, attn_mask, keys.length)
    if must_cover and given["max_relative_position"] is None:
        _check_cover(tensors, settings, queries, keys)
    output, lse = _compute(sharding, tensors, settings, queries, keys, mask_has_rows, backend)
    return (output, lse) if return_lse else output


def _compute(
    sharding: Sharding, tensors: Tensors, settings: Settings, queries: Layout, keys: Layout, mask_has_rows: bool, backend: str | None,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp of a checked call."""
    seed = torch.empty((0,), dtype=torch.int64, device=tensors.query.device)
    if settings.dropout_p > 0.0:
        seed = common_seed(draw_seed(seed.device), sharding.group)
    tensors = _replicated(sharding, tensors)
    shard = _Shard(sharding, tensors, settings, queries, keys, seed, mask_has_rows, packing)
    method = dict(ring=_ring, all_to_all=_all_to_all, gather=_gather)[sharding.method]
    output, lse = method(shard, backend)
    return with_layout(tensors.query, output), lse


def _lengths(
    sharding: Sharding, tensors: Tensors, settings: Settings, lengths: tuple[int | None, int | None], mask_rows: int | None
) -> tuple[Layout, Layout, bool]:
    """Layouts of queries and keys, and whether attn_mask (of that many rows here) has rows of its own for each query."""
    group, local = sharding.group, (tensors.query.shape[2], tensors.key.shape[2])
    known = all(length is not None for length in lengths) and group in started
    has_rows = mask_rows not in (None, 1)
    if not known or (sharding.method == "all_to_all" and mask_rows is not None):  # a rank with one query cannot tell
        small = (tensors.key_lengths, tensors.query_offsets, tensors.cu_seqlens_q, tensors.cu_seqlens_k)
        host = tuple(None if tensor is None else tensor.tolist() for tensor in small)
        same = (*sharding[1:], settings, *host, lengths, *map(_described, Tensors._fields, tensors))
        of_ranks = same_on_all((*local, 1 if mask_rows is None else mask_rows), same, tensors.query.device, group)
        of_queries, of_keys, of_rows = ([rank[number] for rank in of_ranks] for number in range(3))
        found = fitting("query", of_queries, sharding.layout), fitting("key", of_keys, sharding.layout)
        has_rows = any(rows != 1 for rows in of_rows)
    else:
        found = (_fixed(sharding, lengths[0]), _fixed(sharding, lengths[1]))
    for name, layout, have, given in zip(("query", "key"), found, local, lengths, strict=True):
        if given is not None and layout.length != given:
            raise ValueError(f"{name}_length: expected {layout.length}, the sum of the ranks' lengths, got {given}")
        if have != layout.local_length(dist.get_rank(group)):
            raise ValueError(f"{name}: expected {layout.local_length(dist.get_rank(group))} of the {layout.describe()}, got {have}")
    return *found, has_rows


def _described(name: str, tensor: Tensor | None) -> str:
    """What ranks must agree on: all but lengths, and whether a gradient will be sent."""
    if tensor is None:
        return f"no {name}"
    sizes = tuple(size for dim, size in enumerate(tensor.shape) if not (name in _SHARDED and dim == _SHARDED[name]))
    return f"{name} {sizes} {tensor.dtype}" + (" with gradient" if tensor.requires_grad and torch.is_grad_enabled() else "")


def _fixed(sharding: Sharding, length: Any) -> Layout:
    return Layout(sharding.layout, length, dist.get_world_size(sharding.group))


def _with_mask(tensors: Tensors, mask: Tensor, keys: int) -> Tensors:
    """With a checked attn_mask of local queries and `keys` keys."""
    batch, heads, length, _ = tensors.query.shape
    functional.check_masks((batch, heads, length, keys), mask, None)
    tensors = tensors._replace(attn_mask=mask)
    if autocast_enabled(mask.device.type):
        tensors = functional.autocast(tensors)
    functional.check_dtypes(tensors)
    return tensors


def _check_cover(tensors: Tensors, settings: Settings, queries: Layout, keys: Layout) -> None:
    """Raises where the whole sequences have distances beyond tables that nobody said were clipped."""
    table = next((name for name in _REPLICATED[:4] if getattr(tensors, name) is not None), None)
    if table is None or queries.length == 0 or keys.length == 0:
        return
    lowest, highest = _reach(tensors, settings)
    left, right = queries.length - 1 + highest, keys.length - 1 - lowest
    ahead = 0 if settings.is_causal else settings.window_right
    right = right if ahead is None else min(right, ahead)
    left = left if settings.window_left is None else min(left, settings.window_left)
    if left > settings.left or right > settings.right:
        raise ValueError(
            f"{table}: its rows reach the distances -{settings.left} ... {settings.right}, and under context_parallel the whole sequences "
            f"have -{left} ... {right}: a table made for a shard's length; give max_relative_position if it is to be clipped"
        )


def _reach(tensors: Tensors, settings: Settings) -> tuple[int, int]:
    """The least and the greatest position of query 0."""
    if tensors.query_offsets is None or tensors.query_offsets.numel() == 0:
        return settings.query_offset, settings.query_offset
    offsets = tensors.query_offsets.tolist()
    return settings.query_offset + min(offsets), settings.query_offset + max(offsets)


def _replicated(sharding: Sharding, tensors: Tensors) -> Tensors:
    """With tables and biases in the dtype of accumulation, and what becomes of their gradients."""
    given = {name: tensor for name in _REPLICATED if (tensor := getattr(tensors, name)) is not None}
    if not given:
        return tensors
    group = sharding.group if sharding.table_gradients == "sum" else None
    return tensors._replace(**dict(zip(given, Replicated.apply(group, *given.values()), strict=True)))


def _ring(shard: _Shard, backend: str | None) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        raise ValueError("backend: 'reference' does not compute blocks of a ring; take method='gather' or 'all_to_all'")
    tensors, settings = shard.tensors, shard.settings
    # One for all blocks: a rank that found one of its own that does not go would leave the others waiting.
    drops = settings.dropout_p > 0.0
    block = settings._replace(is_part=True, first_query=4 if drops else 0, first_key=4 if drops else 0)
    name = functional.implementation(tensors, block, backend)
    longest = shard.keys.length
    if tensors.key_lengths is not None:
        longest = max([0, *tensors.key_lengths.tolist()])
    call = ring.Call(name, settings, shard.queries, shard.keys, shard.rank, _reach(tensors, settings), longest, shard.packing)
    return ring.RingAttention.apply(call, shard.group, shard.seed, *tensors)


def _all_to_all(shard: _Shard, backend: str | None) -> tuple[Tensor, Tensor]:
    tensors, ranks, group = shard.tensors, shard.queries.ranks, shard.group
    for name, tensor in (("query", tensors.query), ("key", tensors.key)):
        if tensor.shape[1] % ranks != 0:
            raise ValueError(f"{name}: method='all_to_all' needs heads that {ranks} ranks divide, got {tensor.shape[1]}")
    count = tensors.query.shape[1] // ranks
    heads = slice(shard.rank * count, (shard.rank + 1) * count)
    parts: dict[str, Any] = {}
    for name, dims in _DIMS_PER_HEAD.items():
        table = getattr(tensors, name)
        parts[name] = table[heads] if table is not None and table.dim() == dims else table
    if tensors.key_mask is not None:
        parts["key_mask"] = send_everywhere(tensors.key_mask, 1, shard.keys, group)
    if tensors.attn_mask is not None:
        parts["attn_mask"] = _mask_of_heads(shard, tensors.attn_mask, heads)
    parts |= dict(
        query=heads_for_length(tensors.query, shard.queries, group),
        key=heads_for_length(tensors.key, shard.keys, group),
        value=heads_for_length(tensors.value, shard.keys, group),
    )
    whole, settings = tensors._replace(**parts), shard.settings
    if settings.dropout_p > 0.0:
        settings = settings._replace(first_head=settings.first_head + heads.start)
    output, lse = _attend(whole, settings, shard.seed, backend)
    return length_for_heads(output, shard.queries, group), length_for_heads(lse, shard.queries, group)


def _mask_of_heads(shard: _Shard, mask: Tensor, heads: slice) -> Tensor:
    """This rank's heads of attn_mask, with the rows of all queries."""
    mask = mask[(None,) * (4 - mask.dim())]
    if not shard.mask_has_rows:
        return mask[:, heads] if mask.shape[1] > 1 else mask
    local = shard.tensors.query.shape[2]
    mask = mask.expand(-1, -1, local, -1)  # of a rank with one query or none
    if mask.shape[1] > 1:
        return heads_for_length(mask, shard.queries, shard.group)
    return send_everywhere(mask, 2, shard.queries, shard.group)


def _gather(shard: _Shard, backend: str | None) -> tuple[Tensor, Tensor]:
    tensors, settings, group = shard.tensors, shard.settings, shard.group
    key, value = (send_everywhere(tensor, 2, shard.keys, group) for tensor in (tensors.key, tensors.value))
    key_mask = None if tensors.key_mask is None else send_everywhere(tensors.key_mask, 1, shard.keys, group)
    done = []
    for tokens, where, first in _query_parts(shard):  # also of an empty piece, so that keys and values are part of every graph
        mask = tensors.attn_mask
        if mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
            mask = mask[..., where, :]
        part = tensors._replace(query=tensors.query[:, :, where], key=key, value=value, attn_mask=mask, key_mask=key_mask)
        block = settings._replace(query_offset=settings.query_offset + tokens.start)
        if shard.packing is not None:
            part = part._replace(**shard.packing.part(tensors, tokens, range(shard.keys.length)))
            block = block._replace(query_offset=0)
        if settings.dropout_p > 0.0:
            block = block._replace(first_query=first)
        done.append(_attend(part, block, shard.seed, backend))
    if len(done) == 1:
        return done[0]
    outputs, sums = zip(*done, strict=True)
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)


def _query_parts(shard: _Shard) -> Iterator[tuple[range, slice, int]]:
    """This rank's queries, a piece at a time: their tokens, where they lie here, and from where dropout counts them in their sequence."""
    for tokens, where in shard.queries.local(shard.rank):
        packing = shard.packing
        for part, first in [(tokens, tokens.start)] if packing is None else packing.uncut(tokens):
            start = where.start + part.start - tokens.start
            yield part, slice(start, start + len(part)), first


def _attend(tensors: Tensors, settings: Settings, seed: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a call with whole rows of scores."""
    name = functional.implementation(tensors, settings, backend)
    if settings.dropout_p == 0.0:
        return functional.attend(name, tensors, settings)
    if name == "reference":
        with operators.no_autocast(tensors.query.device.type):
            return reference.attention(tensors, settings, seed)[:2]
    return _WithSeed.apply(name, settings, seed, *tensors)


class _WithSeed(torch.autograd.Function):
    """`relattn.operators.RelativeAttentionFunction` with a seed that is given, not drawn."""

    @staticmethod
    def forward(ctx, name: str, settings: Settings, seed: Tensor, *tensors: Tensor | None):
        with operators.no_autocast(seed.device.type):
            output, lse = backends.implementation(name).forward(Tensors(*tensors), settings, seed)  # type: ignore[arg-type]
        ctx.name, ctx.settings = name, settings
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output, lse, seed)
        return output, lse

    @staticmethod
    def backward(ctx, grad_output, grad_lse):
        operators.check_gradients(grad_output, grad_lse)
        *tensors, output, lse, seed = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[3 : 3 + len(DIFFERENTIABLE)])
        if grad_output is None and grad_lse is None:
            return (None,) * (3 + len(tensors))
        gradients = iter(operators.first_derivative(ctx.name, *tensors, *ctx.settings, grad_output, grad_lse, output, lse, seed, needs))
        found = [next(gradients) if need else None for need in needs]
        return None, None, None, *found, *(None,) * (len(tensors) - len(found))
