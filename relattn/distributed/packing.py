"""Packed sequences on ranks: where each lies among all tokens, and what of it a pair of parts, some queries and some keys, has."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from relattn.arguments import Settings, Tensors, check_cu_seqlens


class Packing(NamedTuple):
    """Of N sequences; int64 on the CPU."""

    queries: Tensor  # (N + 1,): sequence n's are those from queries[n] to queries[n + 1]
    keys: Tensor  # (N + 1,)
    offsets: Tensor  # (N,): the position of its query 0
    lengths: Tensor  # (N,): its keys from there on are not seen

    @classmethod
    def of(cls, tensors: Tensors, settings: Settings, query_length: int, key_length: int) -> Packing:
        """Of a call of so many tokens on all ranks.

        Raises:
            ValueError: cu_seqlens do not fit them.
        """
        assert tensors.cu_seqlens_q is not None
        assert tensors.cu_seqlens_k is not None
        queries, keys = (ends.to("cpu", torch.int64) for ends in (tensors.cu_seqlens_q, tensors.cu_seqlens_k))
        query, key = (torch.empty((1, 1, length, 1), device="meta") for length in (query_length, key_length))
        check_cu_seqlens(Tensors(query, key, key, cu_seqlens_q=queries, cu_seqlens_k=keys), settings)
        offsets = torch.full((len(queries) - 1,), settings.query_offset)
        if tensors.query_offsets is not None:
            offsets += tensors.query_offsets.cpu()
        lengths = keys.diff() if tensors.key_lengths is None else tensors.key_lengths.to("cpu", torch.int64)
        return cls(queries, keys, offsets, lengths)

    def distances(self, queries: range, keys: range, ahead: int | None, behind: int | None) -> tuple[int, int] | None:
        """The least and the greatest between these queries and keys, of sequences that have some of both not farther than so many
        `ahead` and `behind`; None: there is no such sequence."""
        (first_query, rows), (first_key, columns) = _inside(self.queries, queries), _inside(self.keys, keys)
        columns = torch.minimum(columns, self.lengths - first_key)
        position = first_query + self.offsets
        lowest, highest = first_key - (position + rows - 1), first_key + columns - 1 - position
        shared = (rows > 0) & (columns > 0)
        if ahead is not None:
            shared &= lowest <= ahead
        if behind is not None:
            shared &= highest >= -behind
        return (int(lowest[shared].min()), int(highest[shared].max())) if shared.any() else None

    def part(self, tensors: Tensors, queries: range, keys: range) -> dict[str, Tensor]:
        """Arguments of a packed call of these queries and keys alone. All sequences are in it, and keep their numbers; some are empty."""
        (first_query, _), (first_key, _) = _inside(self.queries, queries), _inside(self.keys, keys)
        found = dict(
            cu_seqlens_q=self.queries.clamp(queries.start, queries.stop) - queries.start,
            cu_seqlens_k=self.keys.clamp(keys.start, keys.stop) - keys.start,
            query_offsets=self.offsets + first_query - first_key,
        )
        if tensors.key_lengths is not None:
            found["key_lengths"] = (self.lengths - first_key).clamp(min=0)
        return {name: tensor.to(tensors.query.device) for name, tensor in found.items()}

    def uncut(self, queries: range) -> list[tuple[range, int]]:
        """These queries in at most two parts, and the place of each part's first one in its sequence; other sequences begin in it at 0."""
        if len(queries) == 0:
            return [(queries, 0)]
        number = int(torch.searchsorted(self.queries, queries.start, right=True)) - 1
        begin, end = self.queries[number : number + 2].tolist()
        if begin == queries.start or end >= queries.stop:
            return [(queries, queries.start - begin)]
        return [(range(queries.start, end), queries.start - begin), (range(end, queries.stop), 0)]


def _inside(ends: Tensor, tokens: range) -> tuple[Tensor, Tensor]:
    """Of each sequence: the place in it of the first of these tokens that are its own, and how many are."""
    inside = ends.clamp(tokens.start, tokens.stop)
    return (inside - ends)[:-1].clamp(min=0), inside.diff()
