"""DTensor: the operators on tensors that are sharded over a mesh by batch or by heads.

Importing this registers `relattn::forward` and `relattn::backward` with DTensor; `relattn.operators` imports it once somebody has imported
`torch.distributed.tensor`, not before. A rule brings the tensors into place, runs the operator on this rank's parts and says how its
results lie. Nothing is communicated where query, key, value and what belongs to them are sharded alike.

Dropout: the seed is each rank's own draw, so that ranks of the same heads and batch elements must be seeded alike, as DTensor asks for its
own random operators; masks of other heads are those of one process, and shards of the batch have different ones.

The rules are registered with `torch.library.register_torch_dispatch`. `torch.distributed.tensor.experimental.register_sharding`, which is
for operators of fixed results, gives all tensors of a list (the gradients) one placement, and hands the same settings to every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Placement, Replicate, Shard

from relattn.arguments import DIFFERENTIABLE, Settings, Tensors, shape_text
from relattn.backends import reference
from relattn.operators import library

_BATCH, _HEADS = "batch", "heads"
_RESULT = {_BATCH: 0, _HEADS: 1}  # of output and log-sum-exp, and of their gradients: which dimension it is


def _dimensions(tensors: Tensors) -> list[Mapping[str, int]]:
    """Of each tensor: which of its dimensions are the batch and the heads, where it has them and they are not broadcast."""
    query = tensors.query
    found: dict[str, dict[str, int]] = {name: {} for name in Tensors._fields}
    for name in ("query", "key", "value"):
        found[name] = {_BATCH: 0, _HEADS: 1}
    if tensors.key.shape[1] == 1 < query.shape[1]:  # one key head for all query heads
        del found["key"][_HEADS], found["value"][_HEADS]
    for name, shared in (("rel_k", 2), ("rel_q", 2), ("rel_v", 2), ("rel_bias", 1), ("pos_bias_u", 1), ("pos_bias_v", 1)):
        tensor = getattr(tensors, name)
        if tensor is not None and tensor.dim() > shared:
            found[name] = {_HEADS: 0}
    mask = tensors.attn_mask
    if mask is not None:
        places = {kind: mask.dim() - behind for kind, behind in ((_BATCH, 4), (_HEADS, 3))}
        found["attn_mask"] = {kind: place for kind, place in places.items() if place >= 0 and mask.shape[place] > 1}
    for name in ("key_mask", "key_lengths", "query_offsets"):
        found[name] = {_BATCH: 0}
    if tensors.cu_seqlens_q is not None:  # packed sequences have a batch of 1, and what is said of them is said of all
        for dimensions in found.values():
            dimensions.pop(_BATCH, None)
    return list(found.values())


class Layout(NamedTuple):
    """How a call lies on a mesh."""

    mesh: DeviceMesh
    kinds: tuple[str | None, ...]  # what each dimension of the mesh shards: the batch, the heads, or nothing
    dimensions: list[Mapping[str, int]]  # see `_dimensions`

    @classmethod
    def of(cls, tensors: Tensors) -> Layout:
        """The one that the tensors have, in their order: the query's, and where it is whole the key's, and so on.

        Raises:
            TypeError: a tensor that gets a gradient is no DTensor, so that nobody could say whose sum it is.
            ValueError: two tensors lie on different meshes.
        """
        mesh: DeviceMesh = next(tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor))
        for name, tensor in zip(Tensors._fields, tensors, strict=True):
            if isinstance(tensor, DTensor):
                if tensor.device_mesh != mesh:
                    raise ValueError(f"{name}: expected the mesh of the others, {mesh}, got {tensor.device_mesh}")
            elif tensor is not None and (tensor.requires_grad or name in DIFFERENTIABLE[:-1]):
                raise TypeError(f"{name}: expected a DTensor as others are, got a {type(tensor).__name__} {shape_text(tensor)}")
        dimensions = _dimensions(tensors)
        kinds = [_kind(tensors, dimensions, place) for place in range(mesh.ndim)]
        parts = _count(mesh, kinds, _HEADS)
        heads, key_heads = tensors.query.shape[1], tensors.key.shape[1]
        if heads % parts or (key_heads > 1 and key_heads % parts):
            kinds = [None if kind == _HEADS else kind for kind in kinds]
        return cls(mesh, tuple(kinds), dimensions)

    def placements(self, dimensions: Mapping[str, int]) -> list[Placement]:
        """Of a tensor with these dimensions."""
        return [Shard(dimensions[kind]) if kind is not None and kind in dimensions else Replicate() for kind in self.kinds]

    def gradients(self, dimensions: Mapping[str, int]) -> list[Placement]:
        """Of its gradient: what all ranks have whole gets a part of the sum from each."""
        placed = zip(self.placements(dimensions), self.kinds, strict=True)
        return [Partial() if kind is not None and placement.is_replicate() else placement for placement, kind in placed]

    def whole(self, local: Tensor, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
        """The DTensor of this shape of which each rank has the part `local`."""
        strides, size = [0] * len(shape), 1
        for place in sorted(range(len(shape)), key=lambda place: (local.stride(place), -place)):
            strides[place] = size
            size *= max(shape[place], 1)
        return DTensor.from_local(local, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides))

    def local(self, tensor: Tensor | None, dimensions: Mapping[str, int], differentiable: bool = False) -> Any:
        """This rank's part. A plain tensor is the same on all ranks."""
        if tensor is None:
            return None
        if not isinstance(tensor, DTensor):
            tensor = DTensor.from_local(tensor, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        placements = self.placements(dimensions)
        if list(tensor.placements) != placements:
            tensor = tensor.redistribute(placements=placements)
        return tensor.to_local(grad_placements=self.gradients(dimensions)) if differentiable else tensor.to_local()

    def locals(self, tensors: Tensors, differentiable: bool = False) -> Tensors:
        return Tensors(*(self.local(*of, differentiable) for of in zip(tensors, self.dimensions, strict=True)))

    def settings(self, settings: Settings, heads: int) -> Settings:
        """This rank's: dropout's mask is a function of the head's number among all of them.

        There is no such number for the batch: a shard of it counts as further heads, so that no two shards have one mask.
        """
        if settings.dropout_p == 0.0:
            return settings
        index = {_BATCH: 0, _HEADS: 0}
        for place, kind in enumerate(self.kinds):
            if kind is not None:
                index[kind] = index[kind] * self.mesh.size(place) + self.mesh.get_local_rank(place)
        first = index[_BATCH] * heads + index[_HEADS] * (heads // _count(self.mesh, self.kinds, _HEADS))
        return settings._replace(first_head=settings.first_head + first)


def _kind(tensors: Tensors, dimensions: Sequence[Mapping[str, int]], place: int) -> str | None:
    """What dimension `place` of the mesh shards."""
    for tensor, of_tensor in zip(tensors, dimensions, strict=True):
        if isinstance(tensor, DTensor):
            placement = tensor.placements[place]
            for kind, dimension in of_tensor.items():
                if type(placement) is Shard and placement.dim == dimension:
                    return kind
    return None


def _count(mesh: DeviceMesh, kinds: Sequence[str | None], wanted: str) -> int:
    """Into how many parts the mesh cuts batch or heads."""
    parts = 1
    for place, kind in enumerate(kinds):
        if kind == wanted:
            parts *= mesh.size(place)
    return parts


def _call(operator, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> list[Any]:
    return [*args, *((kwargs or {})[argument.name] for argument in operator._schema.arguments[len(args) :])]


def _forward(_class, operator, types, args=(), kwargs=None) -> tuple[Tensor, Tensor, Tensor]:
    """Output and log-sum-exp are sharded as the query. The seed is each rank's own affair, called whole for want of a better word."""
    backend, *call = _call(operator, args, kwargs)
    tensors, settings = Tensors(*call[: len(Tensors._fields)]), Settings(*call[len(Tensors._fields) :])
    layout = Layout.of(tensors)
    output, lse, seed = operator(backend, *layout.locals(tensors), *layout.settings(settings, tensors.query.shape[1]))
    placements = layout.placements(_RESULT)
    shape = tensors.query.shape[:3]
    return (
        layout.whole(output, placements, (*shape, tensors.value.shape[3])),
        layout.whole(lse, placements, shape),
        layout.whole(seed, layout.placements({}), seed.shape),
    )


def _backward(_class, operator, types, args=(), kwargs=None) -> list[Tensor]:
    """Gradients are sharded as what they belong to; those of what ranks share are partial sums."""
    backend, *call, grad_output, grad_lse, output, lse, seed, needs = _call(operator, args, kwargs)
    tensors, settings = Tensors(*call[: len(Tensors._fields)]), Settings(*call[len(Tensors._fields) :])
    layout = Layout.of(tensors)
    results = (layout.local(result, _RESULT) for result in (grad_output, grad_lse, output, lse))
    settings = layout.settings(settings, tensors.query.shape[1])
    gradients = operator(backend, *layout.locals(tensors), *settings, *results, layout.local(seed, {}), needs)
    needed = [(tensor, layout.gradients(of)) for tensor, of, need in zip(tensors, layout.dimensions, needs, strict=False) if need]
    return [
        layout.whole(gradient, of, tensor.shape) for gradient, (tensor, of) in zip(gradients, needed, strict=True) if tensor is not None
    ]


def has_shards(tensors: Tensors) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def by_reference(tensors: Tensors, settings: Settings, seed: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """`reference.attention` of sharded tensors: output, log-sum-exp and weights, (B, Hq, Lq, Lk)."""
    layout = Layout.of(tensors)
    settings = layout.settings(settings, tensors.query.shape[1])
    output, lse, weights = reference.attention(layout.locals(tensors, differentiable=True), settings, seed)
    placements = layout.placements(_RESULT)
    shape = tensors.query.shape[:3]
    return (
        layout.whole(output, placements, (*shape, tensors.value.shape[3])),
        layout.whole(lse, placements, shape),
        None if weights is None else layout.whole(weights, placements, (*shape, tensors.key.shape[2])),
    )


torch.library.register_torch_dispatch("relattn::forward", DTensor, _forward, lib=library)
torch.library.register_torch_dispatch("relattn::backward", DTensor, _backward, lib=library)
