"""The heads of each layer over several processes, and as much of the feed-forward layers (Shoeybi et al. 2019, "Megatron-LM").

relattn.distributed.HeadsParallel does this to relattn's layer, with DTensors. The decoder's attention is its own, with one projection for
queries, keys and values, and parameters stay plain tensors, a process's parts: accelerate refuses DTensors under DistributedDataParallel,
and optimizers take no lists of both kinds.
"""

import functools

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn import functional as F

from relattn.distributed import heads_from

from .model import Layer, MusicTransformer

# Which dimension of a parameter is cut, and of how many equal blocks, each cut by itself, it consists there: of queries, keys and values.
_CUTS = {
    "attention.project_in.weight": (0, 3),
    "attention.project_in.bias": (0, 3),
    "attention.rel_k": (0, 1),
    "attention.project_out.weight": (1, 1),
    "widen.weight": (0, 1),
    "widen.bias": (0, 1),
    "narrow.weight": (1, 1),
}


def cut_of(name: str) -> tuple[int, int] | None:
    """Of the model's parameter of this name; None: every process has it whole."""
    return next((cut for ending, cut in _CUTS.items() if name.endswith(f".{ending}")), None)


def part(name: str, whole: Tensor, mesh: DeviceMesh) -> Tensor:
    """This process's of a parameter, or of what is kept for one."""
    cut = cut_of(name)
    if cut is None or whole.dim() == 0:  # a number of steps
        return whole
    dim, blocks = cut
    blocked = whole.unflatten(dim, (blocks, -1))
    return blocked.chunk(mesh.size(), dim + 1)[mesh.get_local_rank()].flatten(dim, dim + 1).contiguous()


def joined(name: str, tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """The inverse of `part`. All processes of the mesh call it."""
    cut = cut_of(name)
    if cut is None or tensor.dim() == 0:
        return tensor
    dim, blocks = cut
    parts = [torch.empty_like(tensor) for _ in range(mesh.size())]
    dist.all_gather(parts, tensor.contiguous(), group=mesh.get_group())
    return torch.cat([one.unflatten(dim, (blocks, -1)) for one in parts], dim + 1).flatten(dim, dim + 1)


def spread_heads(model: MusicTransformer, mesh: DeviceMesh) -> None:
    """Leave this process its heads of a whole model, the same on all processes of the mesh. It still loads state dicts of whole models.

    Raises:
        ValueError: the processes do not divide the heads, or the width of the feed-forward layers.
    """
    config, count = model.config, mesh.size()
    for name, size in (("heads", config.num_attention_heads), ("feed-forward", config.intermediate_size)):
        if size % count:
            raise ValueError(f"--tensor-parallel: expected a divisor of --{name} {size}, got {count}")
    for name, parameter in model.named_parameters():
        parameter.data = part(name, parameter.data, mesh)

    def take_parts(module, state, prefix, *_) -> None:
        state.update({name: part(name, tensor, mesh) for name, tensor in state.items()})

    model.register_load_state_dict_pre_hook(take_parts)
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.attention.heads //= count
        _count_heads_from(layer.attention, mesh.get_local_rank() * layer.attention.heads)
        for first, last in ((layer.attention.project_in, layer.attention.project_out), (layer.widen, layer.narrow)):
            first.register_forward_pre_hook(lambda _, inputs: (_for_parts(inputs[0], mesh),))
            vars(last)["forward"] = functools.partial(_sum_of_parts, last, mesh)


def _count_heads_from(attention: nn.Module, first: int) -> None:
    """Dropout's masks of these heads are those that one process has."""
    attend = attention.forward

    def forward(*inputs):
        with heads_from(first):
            return attend(*inputs)

    vars(attention)["forward"] = forward


def _for_parts(hidden: Tensor, mesh: DeviceMesh) -> Tensor:
    """The same; its gradient is the sum of what all processes owe."""
    return DTensor.from_local(hidden, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def _sum_of_parts(linear: nn.Linear, mesh: DeviceMesh, hidden: Tensor) -> Tensor:
    """In the place of `linear`'s forward: the sum over the processes, whose gradient is the same for all."""
    summand = DTensor.from_local(F.linear(hidden, linear.weight), mesh, [Partial()], run_check=False)
    return summand.redistribute(placements=[Replicate()]).to_local() + linear.bias
