"""Calls of `relattn.distributed.relative_attention`, and the same calls in one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import relattn
from relattn.distributed.layout import Layout

SEED = 7  # of the generator that dropout's seed is drawn from


@dataclass(frozen=True)
class Case:
    """Whole sizes and settings; `terms` are the relative terms there are."""

    queries: int = 29
    keys: int | None = None  # None: as many as queries, of self-attention
    batch: int = 2
    heads: int = 4
    key_heads: int = 4
    size: int = 8
    value_size: int = 8
    terms: tuple[str, ...] = ("rel_k",)
    per_head: bool = False
    clip: tuple[int, int] = (40, 40)
    mask: str = ""  # "rows", "heads", "keys", "float"
    key_mask: bool = False
    key_lengths: tuple[int, ...] | None = None
    offset: int | tuple[int, ...] | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    dtype: torch.dtype = torch.float64
    backend: str | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Whole ones, the same in every process."""
        draw = torch.Generator().manual_seed(11)
        keys = self.queries if self.keys is None else self.keys
        rows = sum(self.clip) + 1

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64).to(self.dtype)

        found = dict(
            query=normal(self.batch, self.heads, self.queries, self.size),
            key=normal(self.batch, self.key_heads, keys, self.size),
            value=normal(self.batch, self.key_heads, keys, self.value_size),
        )
        heads = (self.heads,) if self.per_head else ()
        shapes = dict(
            rel_k=(*heads, rows, self.size), rel_q=(*heads, rows, self.size), rel_v=(*heads, rows, self.value_size),
            rel_bias=(*heads, rows), pos_bias_u=(self.heads, self.size), pos_bias_v=(self.heads, self.size),
        )  # fmt: skip
        found |= {name: normal(*shapes[name]) for name in self.terms}
        if self.mask == "rows":
            found["attn_mask"] = torch.rand((self.queries, keys), generator=draw) < 0.6
        elif self.mask == "heads":
            found["attn_mask"] = torch.rand((1, self.heads, self.queries, keys), generator=draw) < 0.6
        elif self.mask == "keys":
            found["attn_mask"] = torch.rand((self.batch, 1, 1, keys), generator=draw) < 0.6
        elif self.mask == "float":
            found["attn_mask"] = normal(self.batch, 1, self.queries, keys)
        if self.key_mask:
            found["key_mask"] = torch.rand((self.batch, keys), generator=draw) < 0.6
        return found

    def arguments(self) -> dict[str, Any]:
        given: dict[str, Any] = dict(self.settings, enable_gqa=self.heads != self.key_heads, backend=self.backend, return_lse=True)
        if any(name in self.terms for name in ("rel_k", "rel_q", "rel_v", "rel_bias")):
            given["max_relative_position"] = self.clip
        if self.key_lengths is not None:
            given["key_lengths"] = torch.tensor(self.key_lengths)
        given["query_offset"] = torch.tensor(self.offset) if isinstance(self.offset, tuple) else self.offset
        return given

    def slopes(self) -> tuple[Tensor, Tensor]:
        """Gradients of the output and of the log-sum-exp, whole."""
        draw = torch.Generator().manual_seed(12)
        output = torch.randn((self.batch, self.heads, self.queries, self.value_size), generator=draw, dtype=torch.float64)
        lse = torch.randn((self.batch, self.heads, self.queries), generator=draw, dtype=torch.float64)
        return output.to(self.dtype), lse.to(torch.float64 if self.dtype == torch.float64 else torch.float32)


def _gradients(output: Tensor, lse: Tensor, slopes: tuple[Tensor, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    found = torch.autograd.grad((output, lse), list(wanted.values()), slopes)
    return {f"grad_{name}": gradient for name, gradient in zip(wanted, found, strict=True)}


def _leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for name, tensor in tensors.items()}


def whole(case: Case) -> dict[str, Tensor]:
    """Results and gradients of one call in this process."""
    tensors = _leaves(case.tensors())
    torch.manual_seed(SEED)
    output, lse = relattn.relative_attention(**tensors, **case.arguments())
    return dict(output=output.detach(), lse=lse.detach()) | _gradients(output, lse, case.slopes(), tensors)


def exact(case: Case) -> dict[str, Tensor]:
    """Of the same numbers by the reference in float64."""
    tensors = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in case.tensors().items()}
    tensors, slopes = _leaves(tensors), case.slopes()
    torch.manual_seed(SEED)
    output, lse = relattn.relative_attention(**tensors, **case.arguments() | dict(backend="reference"))
    results = dict(output=output.detach(), lse=lse.detach())
    return results | _gradients(output, lse, (slopes[0].double(), slopes[1].double()), tensors)


def sharded(group: Any, case: Case, options: dict[str, Any], device: torch.device | None = None) -> dict[str, Tensor]:
    """This rank's results and gradients: what a worker runs."""
    import relattn.distributed as parallel

    layout = options.get("layout", "contiguous")
    tensors = {}
    for name, tensor in case.tensors().items():
        tensor = tensor.to(device)
        if name in ("query", "key", "value"):
            tensor = parallel.shard(tensor, 2, group=group, layout=layout)
        elif name == "key_mask":
            tensor = parallel.shard(tensor, 1, group=group, layout=layout)
        elif name == "attn_mask" and tensor.shape[-2] > 1:
            tensor = parallel.shard(tensor, -2, group=group, layout=layout)
        tensors[name] = tensor
    tensors = _leaves(tensors)
    slopes = tuple(parallel.shard(slope.to(device), 2, group=group, layout=layout) for slope in case.slopes())
    torch.manual_seed(SEED + dist.get_rank(group))  # dropout's seed is the first rank's, whatever the others' generators
    arguments = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in case.arguments().items()}
    output, lse = parallel.relative_attention(**tensors, **arguments, group=group, **options)
    return dict(output=output.detach(), lse=lse.detach()) | _gradients(output, lse, slopes, tensors)  # type: ignore[arg-type]


def joined(case: Case, results: list[dict[str, Tensor]], layout: str) -> dict[str, Tensor]:
    """Whole tensors from the ranks' results."""
    keys = case.queries if case.keys is None else case.keys
    of_queries, of_keys = Layout(layout, case.queries, len(results)), Layout(layout, keys, len(results))
    found = {}
    for name in results[0]:
        parts = [result[name] for result in results]
        if name in ("output", "lse", "grad_query"):
            found[name] = of_queries.joined(parts, 2)
        elif name in ("grad_key", "grad_value"):
            found[name] = of_keys.joined(parts, 2)
        elif name == "grad_attn_mask":
            found[name] = of_queries.joined(parts, parts[0].dim() - 2)
        else:  # of a table: the same on every rank
            assert all(torch.equal(part, parts[0]) for part in parts), name
            found[name] = parts[0]
    return found


__all__ = ["Case", "exact", "joined", "replace", "sharded", "whole"]
