"""Convolutions over time on sharded sequences: each rank takes the frames that it lacks from its neighbours."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from relattn.distributed.collectives import Group, Transfer, check_device, group_of, same_on_all, started
from relattn.distributed.layout import Layout

# Modules that put a causal convolution's zeros before its input themselves.
_PADS_CAUSALLY = ("Wav2Vec2BertConvolutionModule", "SeamlessM4Tv2ConformerConvolutionModule")


def halo(
    tensor: Tensor, dim: int, left: int, right: int, *, group: Group = None, mesh: Any = None, length: int | None = None
) -> Tensor:  # fmt: skip
    """A rank's part of a contiguous sequence with the `left` frames before it and the `right` ones behind it; zeros beyond the ends.

    Args:
        tensor: any shape and floating dtype, the same on all ranks but in `dim`, the dimension of frames.
        group, mesh: as in `relative_attention`.
        length: frames of all ranks together, of layout "contiguous". None: they tell each other, which on GPUs synchronises.

    Returns:
        `left` + local length + `right` frames, differentiable: what is owed to a neighbour's frames goes back there. It allocates those
        frames and a copy of the tensor.

    Raises:
        ValueError: a rank that others need frames of has fewer (on every rank); it has others than those of the `length`.
    """
    group = group_of(group, mesh)
    check_device(tensor.device, group)
    held = _held(tensor.shape[dim], length, (left, right), tensor.device, group)
    used = [rank for rank, length in enumerate(held) if length]
    short = [rank for rank in used[:-1] if held[rank] < left] + [rank for rank in used[1:] if held[rank] < right]
    if short:
        needed = f"{left} frames before and {right} behind"
        raise ValueError(f"tensor: rank {short[0]} has {held[short[0]]} frames, too few for the {needed} that a convolution reads")
    return _Halo.apply(tensor, dim, left, right, group, used)


def _held(own: int, length: int | None, sides: tuple[int, int], device: torch.device, group: Group) -> list[int]:
    """How many frames each rank has."""
    if length is None or group not in started:
        return [frames for (frames,) in same_on_all((own,), (sides, length), device, group)]
    layout = Layout("contiguous", length, dist.get_world_size(group))
    held = [layout.local_length(rank) for rank in range(layout.ranks)]
    if own != held[dist.get_rank(group)]:
        raise ValueError(f"tensor: expected {held[dist.get_rank(group)]} frames of the {layout.describe()}, got {own}")
    return held


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, left: int, right: int, group: Group, used: list[int]) -> Tensor:
        rank, length = dist.get_rank(group), tensor.shape[dim]
        ctx.sizes, ctx.group, ctx.used = (dim, left, right, length), group, used
        if rank not in used:
            return tensor.new_zeros([left + right if one == dim % tensor.dim() else size for one, size in enumerate(tensor.shape)])
        to_right, to_left = tensor.narrow(dim, length - min(left, length), min(left, length)), tensor.narrow(dim, 0, min(right, length))
        before, behind = _exchange(to_left, to_right, tensor, dim, right, left, group, used)
        return torch.cat((before, tensor, behind), dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        dim, left, right, length = ctx.sizes
        own = gradient.narrow(dim, left, length).clone()
        if dist.get_rank(ctx.group) in ctx.used:
            before, behind = gradient.narrow(dim, 0, left), gradient.narrow(dim, left + length, right)
            from_left, from_right = _exchange(before, behind, gradient, dim, left, right, ctx.group, ctx.used)
            own.narrow(dim, 0, from_left.shape[dim]).add_(from_left)
            own.narrow(dim, length - from_right.shape[dim], from_right.shape[dim]).add_(from_right)
        return own, None, None, None, None, None


def _exchange(
    to_left: Tensor, to_right: Tensor, like: Tensor, dim: int, left: int, right: int, group: Group, used: list[int]
) -> tuple[Tensor, Tensor]:
    """(what the left neighbour sends to its right, what the right one sends to its left), zeros where there is none; `left` and `right`
    frames go in these directions."""
    place = used.index(dist.get_rank(group))

    def buffer(frames: int) -> Tensor:
        return like.new_zeros([frames if one == dim % like.dim() else size for one, size in enumerate(like.shape)])

    before, behind, travel = buffer(right), buffer(left), []
    for neighbour, sent, received in ((place - 1, to_left, before), (place + 1, to_right, behind)):
        if 0 <= neighbour < len(used):
            travel.append(Transfer(group, [sent.contiguous()], used[neighbour], [received], used[neighbour]))
    for transfer in travel:
        transfer.wait()
    return before, behind


def convolutions(model: nn.Module) -> Iterator[tuple[nn.Conv1d, int, int, bool]]:
    """Those of a model that reach over time: (convolution, frames that it reads before, and behind, whether its input is padded already).

    Raises:
        ValueError: one that changes the number of frames, or pads otherwise than by zeros.
    """
    for name, parent in model.named_modules():
        for child_name, child in parent.named_children():
            if not isinstance(child, nn.Conv1d) or child.kernel_size[0] == 1:
                continue
            reach = child.dilation[0] * (child.kernel_size[0] - 1)
            padding = child.padding if isinstance(child.padding, str) else child.padding[0]
            here = f"{name}.{child_name}".lstrip(".")
            if "forward" in vars(child):
                raise ValueError(f"model: the forward of {here} was replaced already (by a hook, or an enclosing context)")
            if child.stride[0] != 1 or child.padding_mode != "zeros":
                raise ValueError(f"model: {here} has a stride of {child.stride[0]} and pads by {child.padding_mode}: shard behind it")
            if type(parent).__name__ in _PADS_CAUSALLY and padding == 0:
                yield child, reach, 0, True
            elif padding == "same" or padding == reach / 2:
                yield child, reach // 2, reach - reach // 2, False
            else:
                raise ValueError(f"model: {here} pads by {padding!r}, which does not keep the number of frames: shard behind it")


def with_neighbours(convolution: nn.Conv1d, left: int, right: int, is_padded: bool, group: Group, length: int | None) -> Any:
    """In the place of a convolution's forward."""

    def forward(frames: Tensor) -> Tensor:
        frames = frames.narrow(2, left, frames.shape[2] - left) if is_padded else frames
        frames = halo(frames, 2, left, right, group=group, length=length)
        weight, bias = convolution.weight, convolution.bias
        if frames.shape[2] == left + right:  # this rank has none
            return frames.new_empty(frames.shape[0], weight.shape[0], 0)
        return nn.functional.conv1d(frames, weight, bias, dilation=convolution.dilation, groups=convolution.groups)

    return functools.wraps(type(convolution).forward)(forward)
