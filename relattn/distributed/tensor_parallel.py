"""Tensor parallelism of the layer: each device computes some of its heads (Shoeybi et al. 2019, "Megatron-LM")."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel

from relattn.module import RelativeMultiheadAttention

_PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_EXTRA_KEY = ("bias_k", "bias_v")  # (1, 1, E)
_TABLES = {"rel_k": 2, "rel_q": 2, "rel_v": 2, "rel_bias": 1, "pos_bias_u": 1, "pos_bias_v": 1}  # dimensions where heads share it


def tensor_parallel_plan(module: nn.Module, **options: Any) -> dict[str, ParallelStyle]:
    """The plan of `torch.distributed.tensor.parallel.parallelize_module` for every `RelativeMultiheadAttention` in `module`::

        parallelize_module(model, mesh["tp"], tensor_parallel_plan(model) | {"layers.*.linear1": ColwiseParallel(), ...})

    Args:
        module: a layer, or a model that has some.
        options: those of `HeadsParallel`.

    Raises:
        ValueError: there is no such layer in `module`.
    """
    layers = [name for name, layer in module.named_modules() if isinstance(layer, RelativeMultiheadAttention)]
    if not layers:
        raise ValueError(f"module: expected one with a RelativeMultiheadAttention in it, got {type(module).__name__} without")
    return {name: HeadsParallel(**options) for name in layers}


class HeadsParallel(ParallelStyle):
    """The heads of a `RelativeMultiheadAttention` over a mesh of one dimension of P devices; P divides them.

    The projections of queries, keys and values are split by heads as `ColwiseParallel` splits a linear layer, `out_proj` as
    `RowwiseParallel`; tables of each head, `pos_bias_u`, `pos_bias_v`, `bias_k` and `bias_v` go with their heads. What the heads share
    (tables without ``per_head``) every device has whole, with the sum of all devices' gradients. The parameters become DTensors, with
    the names of before but one: `in_proj_weight` (3 E, E), whose contiguous thirds no shard by heads could keep together, becomes
    `q_proj_weight`, `k_proj_weight` and `v_proj_weight` (E, E), as they are in a layer with `kdim` or `vdim`. A state dict of the whole
    layer is loaded before; those of afterwards serve any P.

    Everything the layer takes is taken, and means the same: masks, lengths and offsets are plain tensors, the same on all devices, of
    all heads; weights come back for all heads. A cache holds this device's heads.

    Dropout: each device has its own mask, from a seed that all draw alike: they must be seeded alike, as is needed for all dropout outside
    of what is sharded. The masks are others than those of one device. torch.compile leaves its graph where it draws.

    Args:
        input_layouts: how query, key and value lie if they are plain tensors: Replicate(), or Shard of the length for sequence
            parallelism, as long on every device. DTensors are taken as they lie.
        output_layouts: how the output is to lie, Replicate() or Shard of the length.
        use_local_output: return a plain tensor, else a DTensor.

    Raises:
        TypeError: the module is no `RelativeMultiheadAttention`.
        ValueError: the mesh has more than one dimension, the number of heads is no multiple of its devices, or the layer is parallel
            already.
    """

    def __init__(
        self, *, input_layouts: Placement | None = None, output_layouts: Placement | None = None, use_local_output: bool = True
    ) -> None:
        super().__init__()
        self.input_layouts = input_layouts or Replicate()
        self.output_layouts = output_layouts or Replicate()
        self.use_local_output = use_local_output

    def __repr__(self) -> str:
        layouts = f"input_layouts={self.input_layouts}, output_layouts={self.output_layouts}"
        return f"{type(self).__name__}({layouts}, use_local_output={self.use_local_output})"

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, RelativeMultiheadAttention):
            raise TypeError(f"module: expected a RelativeMultiheadAttention, got {type(module).__name__}")
        if isinstance(module, ParallelAttention):
            raise ValueError("module: expected a layer that is not parallel already")
        if device_mesh.ndim != 1:
            raise ValueError(f'device_mesh: expected one dimension (of a larger mesh: mesh["tp"]), got {device_mesh.ndim}')
        if module.num_heads % device_mesh.size():
            raise ValueError(f"num_heads: expected a multiple of the mesh's {device_mesh.size()} devices, got {module.num_heads}")
        if module.in_proj_weight is not None:
            trained = module.in_proj_weight.requires_grad
            for name, weight in zip(_PROJECTIONS, module.in_proj_weight.detach().chunk(3), strict=True):
                setattr(module, name, nn.Parameter(weight, trained))
            module.register_parameter("in_proj_weight", None)
            module._qkv_same_embed_dim = False
        for name, parameter in module.named_parameters(recurse=False):
            placement = _placement(name, parameter)
            placed = distribute_tensor(parameter.detach(), device_mesh, [placement], src_data_rank=self.src_data_rank)
            module.register_parameter(name, nn.Parameter(placed, parameter.requires_grad))
        # After the parameters: it reads them where they are.
        module.__class__ = ParallelAttention
        module.parallel = device_mesh, self.input_layouts  # type: ignore[assignment]
        out = RowwiseParallel(output_layouts=self.output_layouts, use_local_output=self.use_local_output)
        out.src_data_rank = self.src_data_rank
        out._apply(module.out_proj, device_mesh)
        return module


def _placement(name: str, parameter: Tensor) -> Placement:
    if name in _PROJECTIONS:
        return Shard(0)
    if name in _EXTRA_KEY:
        return Shard(2)
    if name in _TABLES and (parameter.dim() > _TABLES[name]):
        return Shard(0)
    return Replicate()


class ParallelAttention(RelativeMultiheadAttention):
    """The layer on one of the devices: a layer of its heads, whose parameters and output are parts of DTensors."""

    parallel: tuple[DeviceMesh, Placement]  # and how plain inputs lie

    def _heads_here(self) -> slice:
        mesh, _ = self.parallel
        count = self.num_heads // mesh.size()
        first = mesh.get_local_rank() * count
        return slice(first, first + count)

    def _part(self, name: str) -> Any:
        parameter = super()._part(name)
        if not isinstance(parameter, DTensor):
            return parameter
        if not parameter.placements[0].is_replicate():
            return parameter.to_local()
        # Of no effect but on the gradient, which each device has a part of: it is summed here, not in each of an optimizer's products.
        whole = parameter.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        if name != "in_proj_bias":  # one vector for the three projections
            return whole
        return whole.view(3, self.num_heads, self.head_dim)[:, self._heads_here()].flatten()

    def _forward(self, query, key, value, **call) -> tuple[Tensor, Tensor | None]:
        query_here = self._whole(query)
        key_here = query_here if key is query else self._whole(key)
        value_here = query_here if value is query else key_here if value is key else self._whole(value)
        return super()._forward(query_here, key_here, value_here, **call)

    def _whole(self, tensor: Tensor, layout: Placement | None = None) -> Tensor:
        """A tensor as all devices have it; its gradient is the sum of theirs. `layout`: how it lies; None: as inputs do."""
        mesh, of_inputs = self.parallel
        if not isinstance(tensor, DTensor):
            tensor = DTensor.from_local(tensor, mesh, [layout or of_inputs], run_check=False)
        if not tensor.placements[0].is_replicate():
            tensor = tensor.redistribute(placements=[Replicate()])
        return tensor.to_local(grad_placements=[Partial()])

    def _masks(self, attn_mask, key_padding_mask, query, batch, length, keys) -> tuple[Tensor | None, Tensor | None]:
        if attn_mask is not None and attn_mask.requires_grad:
            attn_mask = self._whole(attn_mask, Replicate())
        if key_padding_mask is not None and key_padding_mask.requires_grad:
            key_padding_mask = self._whole(key_padding_mask, Replicate())
        mask, key_mask = super()._masks(attn_mask, key_padding_mask, query, batch, length, keys)
        if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
            mask = mask[:, self._heads_here()]
        return mask, key_mask

    def _attend(self, q, k, v, masks, need_weights, packing) -> tuple[Tensor, Tensor | None]:
        mesh, _ = self.parallel
        own = _own_seeds(q.device, mesh.get_local_rank()) if self.training and self.dropout > 0.0 else contextlib.nullcontext()
        with own:
            output, weights = super()._attend(q, k, v, masks, need_weights, packing)
        if weights is not None:
            weights = DTensor.from_local(weights, mesh, [Shard(1)], run_check=False).full_tensor()
        return output, weights


@contextlib.contextmanager
def _own_seeds(device: torch.device, rank: int) -> Iterator[None]:
    """Random numbers of this rank's own. Generators go on as if one number had been drawn, so that ranks stay in step elsewhere."""
    seed = (int(torch.randint(2**62, ())) + rank * 0x9E3779B97F4A7C15) % 2**63  # golden ratio: far from its neighbours'
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.get_device_module(device).manual_seed(seed)
        yield
