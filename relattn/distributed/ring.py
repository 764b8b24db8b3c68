"""Ring attention: queries stay, keys and values pass, a block of scores at a time (Liu, Zaharia and Abbeel 2023, "Ring attention with
blockwise transformers for near-infinite context").

In step t rank r attends to the pieces of rank r - t, while those of rank r - t - 1 arrive. Every piece is sent by the rank that owns it,
straight to the one that needs it: as many bytes as by passing them on from neighbour to neighbour, and none where causality, window,
chunks or lengths hide the piece, on whichever side of the queries it lies. (Passed on, keys to the right of a window would go all the way
round.) In the backward pass keys and values come once more, and
gradients go home in the same way. Bytes sent by a rank, with (K + V) those of its keys and values (one more for each key with key_mask):
forward (P - 1) (K + V), backward twice that, less the pieces that are not needed.

A block is a call of a backend, with the tables' rows that its distances reach (one, where all clamp to an edge). Blocks are joined by their
log-sum-exps in the dtype of accumulation, in the order of steps. Of a joined result the backward pass needs nothing else of a block: with
the joined lse a block's own scores give its weights, and sum_j w_ij dw_ij is do_i.o_i of the joined output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from relattn import backends
from relattn.arguments import DIFFERENTIABLE, Settings, Tensors, empty_gradient, empty_with_layout, lse_dtype
from relattn.distributed.collectives import Group, Transfer
from relattn.distributed.layout import Layout
from relattn.distributed.packing import Packing
from relattn.operators import check_gradients, no_autocast

_TABLES = ("rel_k", "rel_q", "rel_v", "rel_bias")
_KEY, _VALUE = map(DIFFERENTIABLE.index, ("key", "value"))


class Piece(NamedTuple):
    """Keys that lie together, of one rank."""

    tokens: range
    key: Tensor
    value: Tensor
    mask: Tensor | None  # bool (B, n)


class Call(NamedTuple):
    """What all blocks share. `settings` are those of the whole call."""

    backend: str
    settings: Settings
    queries: Layout
    keys: Layout
    rank: int
    offsets: tuple[int, int]  # the least and the greatest position of query 0, over the batch
    longest: int  # keys from there on are hidden in every batch element
    packing: Packing | None = None  # of packed sequences, of which those two numbers say nothing

    def distances(self, queries: range, keys: range) -> tuple[int, int] | None:
        """The least and the greatest at which some of these queries may see some of these keys, as far as can be told without the masks;
        None: they see none."""
        settings, behind = self.settings, self.settings.window_left
        ahead = 0 if settings.is_causal else settings.window_right
        if len(queries) == 0 or len(keys) == 0:
            return None
        if self.packing is not None:
            found = self.packing.distances(queries, keys, ahead, behind)
            if found is None:
                return None
            lowest, highest = found
        else:
            first, last = queries.start + self.offsets[0], queries.stop - 1 + self.offsets[1]
            lowest, highest = keys.start - last, keys.stop - 1 - first
            start, stop = settings.chunk_start(first), settings.chunk_stop(last)
            if keys.start >= self.longest or (start is not None and keys.stop <= start) or (stop is not None and keys.start >= stop):
                return None
        lowest = lowest if behind is None else max(lowest, -behind)
        highest = highest if ahead is None else min(highest, ahead)
        return (lowest, highest) if lowest <= highest else None

    def sees(self, queries: range, keys: range) -> bool:
        return self.distances(queries, keys) is not None

    def needed(self, rank: int, source: int) -> list[range]:
        """Those of a rank's pieces that another one's queries see."""
        queries = self.queries.pieces(rank)
        return [keys for keys in self.keys.pieces(source) if any(self.sees(piece, keys) for piece in queries)]

    def block_settings(self, queries: range, keys: range) -> tuple[Settings, slice]:
        """Those of a block, and the rows of the tables that its distances reach."""
        settings, reached = self.settings, self.distances(queries, keys)
        assert reached is not None
        low, high = (min(max(end, -settings.left), settings.right) for end in reached)
        drops = settings.dropout_p > 0.0
        offset = 0 if self.packing is not None else settings.query_offset + queries.start - keys.start  # of sequences: a tensor
        block = settings._replace(
            left=-low, right=high, query_offset=offset, is_part=True,
            first_query=queries.start if drops else 0, first_key=keys.start if drops or settings.chunk_size is not None else 0,
        )  # fmt: skip
        return block, slice(low + settings.left, high + settings.left + 1)


class Block(NamedTuple):
    """One (query piece, key piece) pair."""

    tensors: Tensors
    settings: Settings
    queries: slice  # where its queries lie among the local ones
    rows: slice  # of the tables
    mask: tuple[slice, ...]  # its part of attn_mask


def block_of(call: Call, tensors: Tensors, queries: range, where: slice, piece: Piece) -> Block:
    settings, rows = call.block_settings(queries, piece.tokens)
    parts: dict[str, Any] = dict(query=tensors.query[:, :, where], key=piece.key, value=piece.value, key_mask=piece.mask)
    for name in _TABLES:
        table = getattr(tensors, name)
        if table is not None:
            parts[name] = table[..., rows] if name == "rel_bias" else table[..., rows, :]
    index: tuple[slice, ...] = ()
    if tensors.attn_mask is not None:
        full, mask = slice(None), tensors.attn_mask
        columns = full if mask.shape[-1] == 1 else slice(piece.tokens.start, piece.tokens.stop)
        index = (*(full,) * (mask.dim() - 2), *((full if mask.shape[-2] == 1 else where,) if mask.dim() > 1 else ()), columns)
        parts["attn_mask"] = mask[index]
    if call.packing is not None:
        parts |= call.packing.part(tensors, queries, piece.tokens)
    elif tensors.key_lengths is not None:
        parts["key_lengths"] = (tensors.key_lengths.to(torch.int64) - piece.tokens.start).clamp(min=0)  # small ones would wrap
    return Block(tensors._replace(**parts), settings, where, rows, index)


def blocks_of(call: Call, tensors: Tensors, piece: Piece) -> Iterator[Block]:
    """Those of this rank's queries with a piece."""
    for queries, where in call.queries.local(call.rank):
        if call.sees(queries, piece.tokens):
            yield block_of(call, tensors, queries, where, piece)


def pieces_of(call: Call, tensors: Tensors) -> list[Piece]:
    """This rank's own."""
    found = []
    for tokens, where in call.keys.local(call.rank):
        mask = None if tensors.key_mask is None else tensors.key_mask[:, where]
        found.append(Piece(tokens, tensors.key[:, :, where], tensors.value[:, :, where], mask))
    return found


class Travel:
    """Keys and values of all ranks, step by step, and gradients on their way home. `own`: this rank's pieces."""

    def __init__(self, call: Call, own: list[Piece], group: Group) -> None:
        self.call, self.own, self.group = call, own, group
        self.rank, self.ranks = call.rank, call.keys.ranks
        self.packed: dict[range, list[Tensor]] = {}
        self.home: list[tuple[list[range], Transfer]] = []

    def _pack(self, piece: Piece) -> list[Tensor]:
        """As it is sent: keys and values in one, and the mask."""
        if piece.tokens not in self.packed:
            both = torch.cat((piece.key.reshape(-1), piece.value.reshape(-1)))
            self.packed[piece.tokens] = [both] if piece.mask is None else [both, piece.mask.to(torch.uint8).contiguous()]
        return self.packed[piece.tokens]

    def _shapes(self, tokens: range) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a piece's keys and values."""
        (batch, heads, _, size), value_size = self.own[0].key.shape, self.own[0].value.shape[3]
        return (batch, heads, len(tokens), size), (batch, heads, len(tokens), value_size)

    def _empty(self, tokens: range) -> Tensor:
        """Room for a piece's keys and values."""
        shapes = self._shapes(tokens)
        return self.own[0].key.new_empty((sum(torch.Size(shape).numel() for shape in shapes),))

    def _split(self, both: Tensor, tokens: range) -> tuple[Tensor, Tensor]:
        shapes = self._shapes(tokens)
        key, value = both.split([torch.Size(shape).numel() for shape in shapes])
        return key.view(shapes[0]), value.view(shapes[1])

    def _fetch(self, step: int) -> Transfer:
        """Start what is sent and received for a step."""
        to, source = (self.rank + step) % self.ranks, (self.rank - step) % self.ranks
        wanted = self.call.needed(to, self.rank)
        sent = [tensor for piece in self.own if piece.tokens in wanted for tensor in self._pack(piece)]
        received = []
        for tokens in self.call.needed(self.rank, source):
            received.append(self._empty(tokens))
            if self.own[0].mask is not None:
                received.append(received[-1].new_empty((self.own[0].mask.shape[0], len(tokens)), dtype=torch.uint8))
        return Transfer(self.group, sent, to, received, source)

    def steps(self) -> Iterator[tuple[int, list[Piece]]]:
        """Each step and the pieces that it needs; the next ones are under way meanwhile."""
        arriving = self._fetch(1) if self.ranks > 1 else None
        yield 0, self.own
        for step in range(1, self.ranks):
            assert arriving is not None
            tensors = iter(arriving.wait())
            arriving = self._fetch(step + 1) if step + 1 < self.ranks else None
            pieces = []
            for tokens in self.call.needed(self.rank, (self.rank - step) % self.ranks):
                key, value = self._split(next(tensors), tokens)
                mask = None if self.own[0].mask is None else next(tensors).view(torch.bool)
                pieces.append(Piece(tokens, key, value, mask))
            yield step, pieces

    def send_home(self, step: int, gradients: list[Tensor]) -> None:
        """What this rank owes to the step's pieces, to whom they belong; and receive what another one owes to ours."""
        to, source = (self.rank - step) % self.ranks, (self.rank + step) % self.ranks
        tokens = self.call.needed(source, self.rank)
        received = [self._empty(piece) for piece in tokens]
        self.home.append((tokens, Transfer(self.group, gradients, to, received, source)))

    def arrived(self) -> Iterator[tuple[range, Tensor, Tensor]]:
        """The oldest gradients of keys and values that are under way."""
        tokens, transfer = self.home.pop(0)
        for piece, both in zip(tokens, transfer.wait(), strict=True):
            yield piece, *self._split(both, piece)


def join(output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add a part's output and log-sum-exp, in place; a row that nothing is seen in has output 0 and lse -inf."""
    total = torch.logaddexp(lse, part_lse)
    nothing = total == -torch.inf
    old, new = ((one - total).exp_().masked_fill_(nothing, 0.0)[..., None] for one in (lse, part_lse))
    output.mul_(old).add_(part.to(output.dtype) * new)
    lse.copy_(total)


def forward(call: Call, travel: Travel, tensors: Tensors, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Joined output and log-sum-exp of the local queries, in the dtype of accumulation."""
    query, accumulate = tensors.query, lse_dtype(tensors.query.dtype)
    shape = (*query.shape[:3], tensors.value.shape[3])
    output = empty_with_layout(query, shape, accumulate).zero_()
    lse = output.new_full(shape[:3], -torch.inf)
    attend = backends.implementation(call.backend).forward
    for _, pieces in travel.steps():
        for piece in pieces:
            for block in blocks_of(call, tensors, piece):
                part, part_lse = attend(block.tensors, block.settings, seed)
                join(output[:, :, block.queries], lse[:, :, block.queries], part, part_lse)
    return output, lse


class _Sums:
    """Gradients of the local tensors, in the dtype of accumulation, to which blocks contribute."""

    def __init__(self, tensors: Tensors, needs: list[bool]) -> None:
        accumulate = lse_dtype(tensors.query.dtype)
        self.names = [name for name, need in zip(DIFFERENTIABLE, needs, strict=True) if need]
        self.total = {name: torch.zeros(getattr(tensors, name).shape, dtype=accumulate, device=tensors.query.device) for name in self.names}

    def add(self, block: Block, found: dict[str, Tensor]) -> None:
        """All but those of keys and values, which are the piece's."""
        for name, gradient in found.items():
            total = self.total[name]
            if name == "query":
                total = total[:, :, block.queries]
            elif name in _TABLES:
                total = total[..., block.rows] if name == "rel_bias" else total[..., block.rows, :]
            elif name == "attn_mask":
                total = total[block.mask]
            total += gradient


def backward(
    call: Call, travel: Travel, tensors: Tensors, seed: Tensor, output: Tensor, lse: Tensor, grad_output: Tensor, grad_lse: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the differentiable tensors for which `needs` is True, in their order."""
    sums, accumulate = _Sums(tensors, needs), output.dtype
    run = backends.implementation(call.backend).backward
    owes = needs[_KEY] or needs[_VALUE]
    local = dict(call.keys.local(call.rank))

    def add_home(tokens: range, *gradients: Tensor) -> None:
        for name, gradient in zip(("key", "value"), gradients, strict=True):
            if name in sums.total:
                sums.total[name][:, :, local[tokens]] += gradient

    for step, pieces in travel.steps():
        owed = []
        for piece in pieces:
            own = [torch.zeros(tensor.shape, dtype=accumulate, device=tensor.device) for tensor in (piece.key, piece.value)]
            for block in blocks_of(call, tensors, piece):
                queries = block.queries
                slopes = grad_output[:, :, queries], None if grad_lse is None else grad_lse[:, :, queries]
                saved = output[:, :, queries], lse[:, :, queries], seed
                found = dict(zip(sums.names, run(*slopes, block.tensors, block.settings, *saved, needs), strict=True))
                for total, name in zip(own, ("key", "value"), strict=True):
                    if name in found:
                        total += found.pop(name)
                sums.add(block, found)
            if step == 0:
                add_home(piece.tokens, *own)
            else:
                owed.append(torch.cat([gradient.reshape(-1) for gradient in own]).to(tensors.key.dtype))
        if step > 0 and owes:
            travel.send_home(step, owed)
            if step > 1:  # those of the step before, which arrived meanwhile
                for arrived in travel.arrived():
                    add_home(*arrived)
    while travel.home:
        for arrived in travel.arrived():
            add_home(*arrived)
    return [empty_gradient(getattr(tensors, name)).copy_(total) for name, total in sums.total.items()]


class RingAttention(torch.autograd.Function):
    """`apply(call, group, seed, *tensors) -> (output, lse)`. Nothing is saved but the local tensors, output and log-sum-exp."""

    @staticmethod
    def forward(ctx, call: Call, group: Group, seed: Tensor, *tensors: Tensor | None):
        inputs = Tensors(*tensors)  # type: ignore[arg-type]
        with no_autocast(inputs.query.device.type):
            output, lse = forward(call, Travel(call, pieces_of(call, inputs), group), inputs, seed)
        ctx.call, ctx.group = call, group
        ctx.set_materialize_grads(False)
        result = output.to(inputs.query.dtype)
        ctx.save_for_backward(seed, *tensors, output, lse)
        return result, lse

    @staticmethod
    def backward(ctx, grad_output, grad_lse):
        check_gradients(grad_output, grad_lse)
        seed, *tensors, output, lse = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[3 : 3 + len(DIFFERENTIABLE)])
        nothing = (None,) * len(tensors)
        if grad_output is None and grad_lse is None:
            return None, None, None, *nothing
        inputs = Tensors(*tensors)
        if grad_output is None:
            grad_output = torch.zeros(output.shape, dtype=inputs.query.dtype, device=output.device)
        if grad_lse is not None:
            grad_lse = grad_lse.to(lse.dtype)
        run = _FirstDerivative.apply if torch.is_grad_enabled() else _FirstDerivative.forward
        gradients = iter(run(ctx.call, ctx.group, needs, seed, output, lse, grad_output, grad_lse, *tensors))
        found = [next(gradients) if need else None for need in needs]
        return None, None, None, *found, *nothing[len(found) :]


class _FirstDerivative(torch.autograd.Function):
    """`backward`, refusing to be differentiated: a gradient penalty would silently lack terms."""

    @staticmethod
    def forward(call, group, needs, seed, output, lse, grad_output, grad_lse, *tensors):
        inputs = Tensors(*tensors)
        with no_autocast(output.device.type):
            travel = Travel(call, pieces_of(call, inputs), group)
            return tuple(backward(call, travel, inputs, seed, output, lse, grad_output, grad_lse, needs))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("relattn: a second derivative was asked for, which relattn.distributed does not have")
