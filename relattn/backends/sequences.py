"""A packed call one sequence at a time, for backends that loop over them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from relattn.arguments import Tensors


class Sequence(NamedTuple):
    """One sequence of a packed call as a call of its own, or a whole call that is not packed."""

    tensors: Tensors
    number: int  # of its first batch element, as dropout counts them
    queries: slice  # where they lie in the packed call
    keys: slice

    def of_queries(self, tensor):
        """Its part of a (B, H, Lq, ...) tensor of the packed call."""
        return tensor[:, :, self.queries]

    def of(self, name: str, tensor):
        """Its part of the tensor, or gradient, of this name: a view."""
        match name:
            case "query":
                return self.of_queries(tensor)
            case "key" | "value":
                return tensor[:, :, self.keys]
            case "key_mask":
                return tensor[:, self.keys]
            case "key_lengths" | "query_offsets":
                return tensor[self.number : self.number + 1]
        return tensor


def sequences(tensors: Tensors) -> Iterator[Sequence]:
    """Those of a packed call, also empty ones; of another call itself. Looks at lengths, which synchronises on a GPU."""
    if tensors.cu_seqlens_q is None or tensors.cu_seqlens_k is None:
        yield Sequence(tensors, 0, slice(None), slice(None))
        return
    queries, keys = tensors.cu_seqlens_q.tolist(), tensors.cu_seqlens_k.tolist()
    for index in range(len(queries) - 1):
        whole = Sequence(tensors, index, slice(queries[index], queries[index + 1]), slice(keys[index], keys[index + 1]))
        parts = {name: whole.of(name, tensor) for name, tensor in tensors._asdict().items() if tensor is not None}
        yield whole._replace(tensors=Tensors(**(parts | {"cu_seqlens_q": None, "cu_seqlens_k": None})))
