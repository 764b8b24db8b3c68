"""Who has which tokens of a sequence, and sharding and unsharding by it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from relattn.distributed.collectives import Group, group_of, send_everywhere
from relattn.functional import is_integer, plain

LAYOUTS = ("contiguous", "zigzag")


class Layout:
    """L tokens over P ranks: consecutive pieces of equal size, a multiple of 4, the last ones shorter or empty.

    "contiguous": P pieces, rank r has piece r. "zigzag": 2 P pieces, rank r has the pieces r and 2 P - 1 - r: of a causal call every rank
    then has the same work (Grattafiori et al. 2024, "The Llama 3 herd of models"; to the same end Brandon et al. 2023, "Striped attention",
    deal single tokens, which would leave no distances of whole blocks).
    """

    def __init__(self, name: str, length: int, ranks: int) -> None:
        if name not in LAYOUTS:
            raise ValueError(f"layout: expected one of {', '.join(map(repr, LAYOUTS))}, got {name!r}")
        self.name, self.length, self.ranks = name, length, ranks
        self.count = ranks if name == "contiguous" else 2 * ranks
        size = -(-length // self.count)
        self.size = -(-size // 4) * 4  # dropout draws for four keys at once

    def piece(self, number: int) -> range:
        """The tokens of a piece."""
        return range(min(number * self.size, self.length), min((number + 1) * self.size, self.length))

    def pieces(self, rank: int) -> list[range]:
        """Those of a rank, in the order in which they lie there; some may be empty."""
        numbers = (rank,) if self.name == "contiguous" else (rank, self.count - 1 - rank)
        return [self.piece(number) for number in numbers]

    def local_length(self, rank: int) -> int:
        return sum(map(len, self.pieces(rank)))

    def local(self, rank: int) -> list[tuple[range, slice]]:
        """A rank's pieces, and where each lies in its tensors."""
        found, start = [], 0
        for piece in self.pieces(rank):
            found.append((piece, slice(start, start + len(piece))))
            start += len(piece)
        return found

    def joined(self, parts: Iterable[Tensor], dim: int) -> Tensor:
        """The whole from the ranks' parts, in order of ranks."""
        found = {}
        for rank, part in enumerate(parts):
            for piece, where in self.local(rank):
                found[piece.start, piece.stop] = part.narrow(dim, where.start, len(piece))
        return torch.cat([found[ends] for ends in sorted(found)], dim)

    def part(self, tensor: Tensor, dim: int, rank: int) -> Tensor:
        """A rank's tokens of a whole tensor."""
        parts = [tensor.narrow(dim, piece.start, len(piece)) for piece in self.pieces(rank)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def describe(self) -> str:
        lengths = [self.local_length(rank) for rank in range(self.ranks)]
        return f"layout {self.name!r} of {self.length} tokens over {self.ranks} ranks: {lengths}"


def fitting(name: str, lengths: list[int], layout: str) -> Layout:
    """The layout that ranks of these local lengths have of an argument's sequence.

    Raises:
        ValueError: it is another; the message names it.
    """
    found = Layout(layout, sum(lengths), len(lengths))
    if lengths != [found.local_length(rank) for rank in range(len(lengths))]:
        raise ValueError(f"{name}: expected the lengths of {found.describe()}, got {lengths}; relattn.distributed.shard cuts so")
    return found


def shard(tensor: Tensor, dim: int, *, group: Group = None, mesh: Any = None, layout: str = "contiguous") -> Tensor:
    """This rank's part of a tensor that every rank has whole: of a sequence, a mask, a position index.

    Args:
        tensor: any dtype; its size in `dim` is the number L of tokens.
        dim: the dimension of tokens. A mask (B, 1, Lq, Lk) is cut in that of the queries, -2: every rank's rows see all keys.
        group: a process group of torch.distributed; None = the default one. mesh: a DeviceMesh of one dimension, in its place.
        layout: "contiguous": ceil(L / P), rounded up to a multiple of 4, tokens a rank, the last ones have less or none. "zigzag": 2 P such
            pieces, rank r has the pieces r and 2 P - 1 - r (balanced where `is_causal`).

    Returns:
        A part of the tensor (a view, or two pieces joined), differentiable.

    Raises:
        ValueError: an unknown layout, or group and mesh both.
    """
    group = group_of(group, mesh)
    return Layout(layout, tensor.shape[dim], dist.get_world_size(group)).part(tensor, dim, dist.get_rank(group))


def unshard(
    tensor: Tensor, dim: int, length: int, *, group: Group = None, mesh: Any = None, layout: str = "contiguous"
) -> Tensor:  # fmt: skip
    """The whole tensor from the ranks' parts: the inverse of `shard`, of `length` tokens.

    Differentiable: a part's gradient is the sum of what all ranks owe to it (so that losses of which every rank computes the same whole
    one count as often as there are ranks).

    Raises:
        ValueError: this rank's part is not of the layout's length. (Other ranks wait for it until the group's time-out.)
    """
    group = group_of(group, mesh)
    if not is_integer(length) or length < 0:
        raise ValueError(f"length: expected a number of tokens, got {length!r}")
    found = Layout(layout, plain(length), dist.get_world_size(group))
    expected = found.local_length(dist.get_rank(group))
    if tensor.shape[dim] != expected:
        raise ValueError(f"tensor: expected {expected} of the {found.describe()}, got {tensor.shape[dim]}")
    return send_everywhere(tensor, dim, found, group)
