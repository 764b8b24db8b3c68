"""What ranks send each other beside the ring's blocks: lengths, seeds, heads for length, gathered keys, sums of gradients.

Tensors travel as bytes, so that every dtype does on every backend. Gradients are summed here, in the order of ranks and in the dtype of
accumulation: a reduction of the backend's own has neither.
"""

from __future__ import annotations

import math
import weakref
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from relattn.arguments import lse_dtype

if TYPE_CHECKING:
    from relattn.distributed.layout import Layout

Group = Any  # a ProcessGroup, or None for the default one
# Groups that made a collective call, before which NCCL has no P2P between some of the ranks.
started: weakref.WeakSet[Any] = weakref.WeakSet()


def group_of(group: Group, mesh: Any) -> Group:
    """The process group of these arguments.

    Raises:
        ValueError: both are given, the mesh has several dimensions, or this process is not of the group.
        RuntimeError: torch.distributed is not initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("relattn.distributed: torch.distributed is not initialised; call init_process_group, or run under torchrun")
    if mesh is not None:
        if group is not None:
            raise ValueError("mesh: expected group or mesh, got both")
        if mesh.ndim != 1:
            raise ValueError(f"mesh: expected one dimension, mesh['name'] of {mesh.mesh_dim_names}, got {mesh.ndim}")
        group = mesh.get_group()
    group = dist.group.WORLD if group is None else group
    if dist.get_rank(group) < 0:
        raise ValueError("group: this process is not of it")
    return group


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _of_bytes(data: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return data.view(dtype).view(*shape) if data.numel() else data.new_empty(tuple(shape), dtype=dtype)


def check_device(device: torch.device, group: Group) -> None:
    """Raises:
    ValueError: the group cannot send tensors of this device.
    """
    capable = [entry.split(":")[0] for entry in dist.get_backend_config(group).split(",")]
    if device.type not in capable:
        raise ValueError(f"group: expected a backend for {device.type} tensors, got {dist.get_backend_config(group)!r}")


def same_on_all(numbers: Sequence[int], settings: object, device: torch.device, group: Group) -> list[list[int]]:
    """Every rank's numbers, in order of ranks: one small exchange.

    Raises:
        ValueError: the settings differ between ranks; on every rank.
    """
    mine = torch.tensor([zlib.crc32(repr(settings).encode()), *numbers], dtype=torch.int64, device=device)
    found = mine.new_empty((dist.get_world_size(group), mine.numel()))
    dist.all_gather(list(found.unbind()), mine, group=group)
    started.add(group)
    rows = found.tolist()
    if any(row[0] != rows[0][0] for row in rows):
        raise ValueError(f"relattn.distributed: expected the same settings on every rank, got others than here: {settings}")
    return [row[1:] for row in rows]


def common_seed(seed: Tensor, group: Group) -> Tensor:
    """The first rank's."""
    dist.broadcast(seed, src=dist.get_global_rank(group, 0), group=group)
    return seed


def exchange(parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], group: Group) -> list[Tensor]:
    """Send the r-th part to rank r; what came from each rank, of these shapes."""
    dtype, itemsize = parts[0].dtype, parts[0].element_size()
    sent = [_bytes(part) for part in parts]
    sizes = [math.prod(shape) * itemsize for shape in shapes]
    received = sent[0].new_empty((sum(sizes),))
    dist.all_to_all_single(received, torch.cat(sent), sizes, [part.numel() for part in sent], group=group)
    return [_of_bytes(part, shape, dtype) for part, shape in zip(received.split(sizes), shapes, strict=True)]


class Transfer:
    """Tensors on their way between ranks of a group: started when made, there after `wait`."""

    def __init__(self, group: Group, sent: list[Tensor], to: int, received: list[Tensor], source: int) -> None:
        self.received, self.sent = received, sent  # what is sent must live as long
        to, source = dist.get_global_rank(group, to), dist.get_global_rank(group, source)
        operations = [dist.P2POp(dist.isend, tensor, to, group) for tensor in sent if tensor.numel()]
        operations += [dist.P2POp(dist.irecv, tensor, source, group) for tensor in received if tensor.numel()]
        self.work = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> list[Tensor]:
        for work in self.work:
            work.wait()
        return self.received


class _Exchange(torch.autograd.Function):
    """`exchange` of parts that are cut from one tensor in one dimension, and joined in another. `cut` and `join` are functions."""

    @staticmethod
    def forward(ctx, tensor: Tensor, there: Any, back: Any):
        ctx.there, ctx.back = there, back
        return there(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return ctx.back(gradient), None, None


def heads_for_length(tensor: Tensor, layout: Layout, group: Group) -> Tensor:
    """From (B, H, local length, ...) to (B, H / P, L, ...): this rank's heads, of all tokens. Differentiable."""
    return _Exchange.apply(tensor, lambda x: _to_heads(x, layout, group), lambda x: _to_length(x, layout, group))


def length_for_heads(tensor: Tensor, layout: Layout, group: Group) -> Tensor:
    """The inverse of `heads_for_length`."""
    return _Exchange.apply(tensor, lambda x: _to_length(x, layout, group), lambda x: _to_heads(x, layout, group))


def _to_heads(tensor: Tensor, layout: Layout, group: Group) -> Tensor:
    ranks = layout.ranks
    batch, heads, _, *rest = tensor.shape
    shapes = [(batch, heads // ranks, layout.local_length(rank), *rest) for rank in range(ranks)]
    return layout.joined(exchange(tensor.chunk(ranks, dim=1), shapes, group), 2)


def _to_length(tensor: Tensor, layout: Layout, group: Group) -> Tensor:
    ranks = layout.ranks
    batch, heads, _, *rest = tensor.shape
    parts = [layout.part(tensor, 2, rank) for rank in range(ranks)]
    shape = (batch, heads, layout.local_length(dist.get_rank(group)), *rest)
    return torch.cat(exchange(parts, [shape] * ranks, group), dim=1)


def send_everywhere(tensor: Tensor, dim: int, layout: Layout, group: Group) -> Tensor:
    """The whole tensor from the ranks' parts. Differentiable: what all ranks owe to a part is summed where it is from."""
    return _Exchange.apply(tensor, lambda x: _gather(x, dim, layout, group), lambda x: _scatter(x, dim, layout, group))


def _gather(tensor: Tensor, dim: int, layout: Layout, group: Group) -> Tensor:
    """By an all-gather of parts that are padded to the longest."""
    dim %= tensor.dim()
    lengths = [layout.local_length(rank) for rank in range(layout.ranks)]

    def shape(length: int) -> list[int]:
        return [*tensor.shape[:dim], length, *tensor.shape[dim + 1 :]]

    sent, longest = _bytes(tensor), math.prod(shape(max(lengths))) * tensor.element_size()
    padded = sent if sent.numel() == longest else torch.cat((sent, sent.new_zeros((longest - sent.numel(),))))
    found = padded.new_empty((layout.ranks, longest))
    dist.all_gather(list(found.unbind()), padded, group=group)
    parts = []
    for rank, length in enumerate(lengths):
        count = math.prod(shape(length)) * tensor.element_size()
        parts.append(_of_bytes(found[rank, :count], shape(length), tensor.dtype))
    return layout.joined(parts, dim)


def _scatter(gradient: Tensor, dim: int, layout: Layout, group: Group) -> Tensor:
    """The sum over the ranks of this rank's part."""
    parts = [layout.part(gradient, dim, rank) for rank in range(layout.ranks)]
    own = parts[dist.get_rank(group)]
    total = torch.zeros(own.shape, dtype=lse_dtype(own.dtype), device=own.device)
    for part in exchange(parts, [own.shape] * layout.ranks, group):
        total += part
    return total.to(own.dtype)


class Replicated(torch.autograd.Function):
    """`apply(group or None, *tensors)`: tensors that every rank has, in the dtype of accumulation. In the backward pass their gradients are
    summed over the group's ranks, all in one all-reduce; with None they stay this rank's."""

    @staticmethod
    def forward(ctx, group: Group, *tensors: Tensor):
        ctx.group, ctx.dtypes = group, [tensor.dtype for tensor in tensors]
        return tuple(tensor.to(lse_dtype(tensor.dtype)).view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        needs = ctx.needs_input_grad[1:]
        if ctx.group is not None:
            wanted = [gradient for gradient, need in zip(gradients, needs, strict=True) if need]
            total = torch.cat([gradient.reshape(-1) for gradient in wanted])
            dist.all_reduce(total, group=ctx.group)
            parts = iter(total.split([gradient.numel() for gradient in wanted]))
            gradients = tuple(next(parts).view(of.shape) if need else of for of, need in zip(gradients, needs, strict=True))
        found = [gradient.to(dtype) if need else None for gradient, dtype, need in zip(gradients, ctx.dtypes, needs, strict=True)]
        return None, *found
