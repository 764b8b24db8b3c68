"""Eager calls of one signature are checked once, and share a plan: the backend, and all that it has to be told but for addresses.

A signature is everything about a call but what its tensors hold and where they lie. Who has the same one passes the same checks, and gets
the same backend. With short sequences the checks are most of a call's time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from relattn import backends, operators
from relattn.arguments import DIFFERENTIABLE, FARTHEST, Settings, Tensors, autocast_enabled
from relattn.philox import draw_seed

_ORDINARY_NUMBERS = frozenset((type(None), int, float, bool, str))
_MOST = 1024  # plans of a few kilobytes; the oldest goes
_KEY, _VALUE, _ATTN_MASK, _KEY_MASK = map(Tensors._fields.index, ("key", "value", "attn_mask", "key_mask"))
_OF_KEYS = (_KEY, _VALUE, _KEY_MASK)


def signature_of(tensors: Sequence[Any], offset: Any, pairs: Sequence[Any], numbers: Sequence[Any]) -> tuple | None:
    """The call's signature; None where somebody listens (a trace, mode, transform, autocast) or something is not what it usually is.

    The number of keys and an offset that is a number are no part of it, nor where keys lie: decoding changes them with every call. But
    where other checks depend on the number, it is.

    tensors: in the order of `Tensors`. offset: `query_offset`, unless it is a tensor. pairs: arguments that may be of two numbers;
    numbers: all others.
    """
    if (
        torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active() or _len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
    ):  # fmt: skip
        return None
    found: list[Any] = []
    device: Any = None
    keys = -1
    for place, tensor in enumerate(tensors):
        if tensor is None:
            found.append(None)
            continue
        if type(tensor) not in operators.PLAIN or tensor.layout is not torch.strided or tensor.is_nested or tensor.is_neg():
            return None
        shape, device = tensor.shape, tensor.device
        found += (tensor.dtype, device)
        if place in (_KEY, _VALUE):
            if len(shape) != 4 or (keys >= 0 and shape[2] != keys):
                return None
            keys = shape[2]
            found += (shape[0], shape[1], shape[3])
        elif place == _KEY_MASK:
            if len(shape) != 2 or shape[1] != keys:
                return None
            found.append(shape[0])
        else:
            found += (shape, tensor.stride())
    if device is None or autocast_enabled(device.type):
        return None
    mask = tensors[_ATTN_MASK]
    if mask is not None:
        found.append(mask.requires_grad)  # not every backend takes it
    if offset is not None and (type(offset) is not int or not -FARTHEST <= offset <= FARTHEST):
        return None
    found += (offset is None, keys if mask is not None or offset is None else keys == 0)
    parts = [*numbers]
    for pair in pairs:
        found.append(type(pair))
        parts += pair if type(pair) is tuple else (pair,)
    kinds = tuple(map(type, parts))  # True is not 1
    if not _ORDINARY_NUMBERS.issuperset(kinds):
        return None
    return *found, *parts, kinds


def _layout(tensor: Tensor) -> tuple:
    return tensor.stride(), tensor.dtype


class Plan:
    """A checked call without its tensors. Below, `inputs` are the tensors of a call of this signature, in the order of `Tensors`."""

    def __init__(self, backend: str, tensors: Tensors, settings: Settings) -> None:
        self.backend, self.settings = backend, settings
        self.places = [place for place, tensor in enumerate(tensors) if tensor is not None]
        prepare = backends.implementation(backend).plan
        self.prepared = None if prepare is None else prepare(tensors, settings)
        self.layouts: list[tuple] = []  # of what is saved, but for the keys, of which each call says how they lie
        if self.prepared is not None:
            self.layouts = [_layout(tensor) for place, tensor in enumerate(tensors) if tensor is not None and place not in _OF_KEYS]
            self.layouts += ((self.prepared.output[1], tensors.query.dtype), (self.prepared.lse[1], torch.float32))

    def call(self, inputs: Sequence[Tensor], offset: int) -> tuple:
        """What the operators take first."""
        tensors: list[Tensor | None] = [None] * len(Tensors._fields)
        for place, tensor in zip(self.places, inputs, strict=True):
            tensors[place] = tensor
        return self.backend, *tensors, *self.settings._replace(query_offset=offset)

    def attend(self, inputs: Sequence[Tensor], offset: int) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp."""
        if torch.is_grad_enabled():
            for tensor in inputs:
                if tensor.requires_grad:
                    return _PlannedAttention.apply(self, offset, *inputs)
        output, lse, _ = self.forward(inputs, offset)
        return output, lse

    def forward(self, inputs: Sequence[Tensor], offset: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output, log-sum-exp and dropout's seed."""
        if self.prepared is None:
            return operators.run_forward(*self.call(inputs, offset))
        seed = draw_seed(inputs[0].device) if self.settings.dropout_p > 0.0 else None
        return *self.prepared.forward(inputs, offset, seed), seed

    def backward(
        self, saved: Sequence[Any], offset: int, grad_output: Tensor | None, grad_lse: Tensor | None, needs: Sequence[bool]
    ) -> Sequence[Tensor]:
        """Gradients of those inputs that `needs` names. saved: the inputs, and what `forward` returned."""
        *inputs, output, lse, seed = saved
        if self.prepared is not None and self._as_planned(saved) and operators.is_plain((grad_output, grad_lse)):
            if grad_output is None:
                grad_output = torch.zeros_like(output)
            return self.prepared.backward(grad_output, grad_lse, inputs, offset, output, lse, seed, needs)
        needed = [False] * len(DIFFERENTIABLE)
        for place, need in zip(self.places, needs, strict=True):
            if need:
                needed[place] = True
        if seed is None:
            seed = torch.empty((0,), dtype=torch.int64, device=output.device)
        return operators.first_derivative(*self.call(inputs, offset), grad_output, grad_lse, output, lse, seed, needed)

    def _as_planned(self, saved: Sequence[Any]) -> bool:
        """Hooks on saved tensors may bring them back with other strides; create_graph asks for the operator."""
        layouts = [_layout(tensor) for place, tensor in zip((*self.places, -1, -1), saved, strict=False) if place not in _OF_KEYS]
        return layouts == self.layouts and not torch.is_grad_enabled()


class _PlannedAttention(torch.autograd.Function):
    """`apply(plan, offset, *inputs) -> (output, lse)`: `RelativeAttentionFunction` without what is absent or known."""

    @staticmethod
    def forward(ctx, plan: Plan, offset: int, *inputs: Tensor):
        output, lse, seed = plan.forward(inputs, offset)
        ctx.plan, ctx.offset = plan, offset
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, output, lse, seed)
        return output, lse

    @staticmethod
    def backward(ctx, grad_output, grad_lse):
        needs = ctx.needs_input_grad[2:]
        operators.check_gradients(grad_output, grad_lse)
        if grad_output is None and grad_lse is None:
            return (None,) * len(ctx.needs_input_grad)
        gradients = iter(ctx.plan.backward(ctx.saved_tensors, ctx.offset, grad_output, grad_lse, needs))
        return None, None, *[next(gradients) if need else None for need in needs]


def keep(signature: tuple, backend: str, tensors: Tensors, settings: Settings) -> Plan:
    """A new plan, for calls of this signature."""
    if len(_PLANS) >= _MOST:
        for oldest in list(_PLANS)[: -_MOST + 1 or None]:  # a list, made at once: other threads add plans
            _PLANS.pop(oldest, None)
    plan = _PLANS[signature] = Plan(backend, tensors, settings)
    return plan


_PLANS: dict[tuple, Plan] = {}
find = _PLANS.get
forget = _PLANS.clear  # for tests that change what plans hold
