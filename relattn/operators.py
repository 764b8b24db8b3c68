"""The operators `relattn::forward` and `relattn::backward` and the autograd Function over them.

The operators are the boundary that torch.compile, torch.export, the FLOP counter and vmap see; a backend's code runs behind it.
Eager calls enter through `RelativeAttentionFunction.apply`, which is cheapest; a compiled or exported graph holds the bare operator, whose
autograd kernel is the same Function.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from relattn import backends
from relattn.arguments import (
    DIFFERENTIABLE,
    Settings,
    Tensors,
    autocast_enabled,
    check_cu_seqlens,
    empty_gradient,
    empty_with_layout,
    lse_dtype,
)
from relattn.philox import draw_seed

_CALL = (
    "str backend, Tensor query, Tensor key, Tensor value, Tensor? rel_k, Tensor? rel_q, Tensor? rel_v, Tensor? rel_bias, "
    "Tensor? pos_bias_u, Tensor? pos_bias_v, Tensor? attn_mask, Tensor? key_mask, Tensor? key_lengths, Tensor? query_offsets, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt left, SymInt right, bool is_causal, SymInt? window_left, SymInt? window_right, SymInt query_offset, "
    "float dropout_p, float scale, SymInt? chunk_size, SymInt? chunk_left, SymInt? max_seqlen_q, SymInt? max_seqlen_k, "
    "SymInt first_head, SymInt first_query, SymInt first_key, bool is_part"
)
_TENSORS = len(Tensors._fields)

# The forward draws dropout's seed itself and returns it: the draw is then part of the operator, whoever runs or replays it.
library = torch.library.Library("relattn", "DEF")
library.define(
    f"forward({_CALL}) -> (Tensor output, Tensor lse, Tensor seed)", tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag)
)
# Gradients of those of the ten differentiable tensors for which needs is True, in the order of `DIFFERENTIABLE`.
library.define(
    f"backward({_CALL}, Tensor? grad_output, Tensor? grad_lse, Tensor output, Tensor lse, Tensor seed, bool[] needs) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _split(call: tuple) -> tuple[Tensors, Settings]:
    return Tensors(*call[:_TENSORS]), Settings(*call[_TENSORS:])


def no_autocast(device_type: str):
    """Backends decide their own precision: autocast must not recast what they multiply."""
    if autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def run_forward(backend: str, *call) -> tuple[Tensor, Tensor, Tensor]:
    tensors, settings = _split(call)
    device = tensors.query.device
    check_cu_seqlens(tensors, settings)
    with no_autocast(device.type):
        # Without dropout it is empty, which takes no kernel.
        seed = draw_seed(device) if settings.dropout_p > 0.0 else torch.empty((0,), dtype=torch.int64, device=device)
        return *backends.implementation(backend).forward(tensors, settings, seed), seed


def _backward(backend: str, *call) -> list[Tensor]:
    *inputs, grad_output, grad_lse, output, lse, seed, needs = call
    tensors, settings = _split(tuple(inputs))
    with no_autocast(tensors.query.device.type):
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        return backends.implementation(backend).backward(grad_output, grad_lse, tensors, settings, output, lse, seed, needs)


library.impl("forward", run_forward, "CompositeExplicitAutograd")
library.impl("backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("relattn::forward", lib=library)
def _forward_fake(backend: str, *call) -> tuple[Tensor, Tensor, Tensor]:
    (query, _, value, *_), settings = _split(call)
    batch, heads, length, _ = query.shape
    output = empty_with_layout(query, (batch, heads, length, value.shape[3]), settings.output_dtype(query.dtype))
    lse = query.new_empty((batch, heads, length), dtype=lse_dtype(query.dtype))
    return output, lse, query.new_empty(() if settings.dropout_p > 0.0 else (0,), dtype=torch.int64)


@torch.library.register_fake("relattn::backward", lib=library)
def _backward_fake(backend: str, *call) -> list[Tensor]:
    needs = call[-1]
    return [empty_gradient(tensor) for tensor, needed in zip(call[: len(DIFFERENTIABLE)], needs, strict=True) if needed]


_FORWARD_MODE = (
    "relattn: a forward-mode derivative (jvp, jacfwd, hessian, dual numbers) was asked for, which only the reference backend has; "
    'call relative_attention(..., backend="reference"), or make the layer with backend="reference"'
)
PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_plain(tensors) -> bool:
    """Whether the operator's code can be called at once: nobody listens (mode, transform, tracing, subclass), and tensors are what
    their memory holds (the dispatcher resolves negated views and zeros without memory).

    The way through torch's dispatcher takes 40 microseconds, as long as all the rest of a call with short sequences.
    """
    if _len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active():
        return False
    return all(tensor is None or (type(tensor) in PLAIN and not tensor.is_neg() and not tensor._is_zerotensor()) for tensor in tensors)


class RelativeAttentionFunction(torch.autograd.Function):
    """`apply(backend, *tensors, *settings) -> (output, lse, seed)`, with a backward pass; see `Tensors` and `Settings` for the order."""

    generate_vmap_rule = True

    @classmethod
    def apply(cls, *call):
        if torch._C._are_functorch_transforms_active():
            return super().apply(*call)
        return _WithoutTransforms.apply(*call)

    @staticmethod
    def forward(*call):
        if is_plain(call[1 : 1 + _TENSORS]):
            return run_forward(*call)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.relattn.forward.default(*call)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.backend, *call = inputs
        tensors, ctx.settings = call[:_TENSORS], call[_TENSORS:]
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def jvp(ctx, *_):
        raise RuntimeError(_FORWARD_MODE)

    @staticmethod
    def backward(ctx, grad_output, grad_lse, _):
        needs = list(ctx.needs_input_grad[1 : 1 + len(DIFFERENTIABLE)])
        nothing = (None,) * (1 + _TENSORS + len(ctx.settings))
        check_gradients(grad_output, grad_lse)
        if not any(needs) or (grad_output is None and grad_lse is None):
            return nothing
        saved = ctx.saved_tensors
        call = (ctx.backend, *saved[:_TENSORS], *ctx.settings, grad_output, grad_lse, *saved[_TENSORS:], needs)
        remaining = iter(first_derivative(*call))
        found = tuple(next(remaining) if needed else None for needed in needs)
        return None, *found, *nothing[1 + len(found) :]


def check_gradients(*gradients: Tensor | None) -> None:
    for gradient in gradients:
        if gradient is not None and torch._C._functorch.is_legacy_batchedtensor(gradient):
            raise RuntimeError(
                'relattn: batched gradients (is_grads_batched, vectorize) need torch.func.jacrev or vmap, or backend="reference"'
            )


def first_derivative(*call) -> tuple[Tensor, ...]:
    """`relattn::backward`, which is not to be differentiated where that is asked for (create_graph)."""
    return _FirstDerivative.apply(*call) if torch.is_grad_enabled() else _FirstDerivative.forward(*call)


class _WithoutTransforms(torch.autograd.Function):
    """`RelativeAttentionFunction` without what torch.func asks of a Function: 0.1 ms less a call, which short sequences notice."""

    @staticmethod
    def forward(ctx, *call):
        results = RelativeAttentionFunction.forward(*call)
        RelativeAttentionFunction.setup_context(ctx, call, results)
        return results

    jvp = staticmethod(RelativeAttentionFunction.jvp)
    backward = staticmethod(RelativeAttentionFunction.backward)


class _FirstDerivative(torch.autograd.Function):
    """The backward operator, refusing to be differentiated: without this a gradient penalty would silently lack terms."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*call):
        if is_plain(call[1 : 1 + _TENSORS]) and is_plain(call[-6:-1]):
            return tuple(_backward(*call))
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(torch.ops.relattn.backward.default(*call))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def jvp(ctx, *_):
        raise RuntimeError(_FORWARD_MODE)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "relattn: a second derivative was asked for, which only the reference backend has; "
            'call relative_attention(..., backend="reference")'
        )


library.impl("forward", RelativeAttentionFunction.apply, "Autograd")
library.impl("backward", lambda *call: list(_FirstDerivative.apply(*call)), "Autograd")


@torch.library.register_vmap("relattn::forward", lib=library)
def _forward_vmap(info, in_dims, *call):
    return _vmap(torch.ops.relattn.forward, info, in_dims, call, dropout_p=_split(call[1:])[1].dropout_p)


@torch.library.register_vmap("relattn::backward", lib=library)
def _backward_vmap(info, in_dims, *call):
    return _vmap(torch.ops.relattn.backward, info, in_dims, call)


def _vmap(operator, info, in_dims, call, dropout_p: float = 0.0):
    """Map by a loop: the terms differ in which dimensions they share, and none of them is worth a second set of rules."""
    if dropout_p > 0.0 and info.randomness != "different":
        raise RuntimeError(
            f"relattn: dropout_p > 0 under vmap needs randomness='different', got {info.randomness!r} (each element draws its own seed)"
        )
    results = [
        operator(*(arg.select(dim, index) if isinstance(dim, int) else arg for arg, dim in zip(call, in_dims, strict=True)))
        for index in range(info.batch_size)
    ]
    stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
    if isinstance(results[0], tuple):
        return tuple(stacked), (0,) * len(stacked)
    return stacked, [0] * len(stacked)


def _forward_flops(backend, *call, out_val=None, **__) -> int:
    """Products of the definition; masked ones count, as in torch's formulas. A table term takes min(Lk, R) products a row."""
    return _products(Tensors(*call[:_TENSORS]), 1, 1)


def _backward_flops(backend, *call, out_val=None, **__) -> int:
    """The scores once more, then two products for each of the forward's."""
    return _products(Tensors(*call[:_TENSORS]), 3, 2)


def _products(tensors: Tensors, score_products: int, value_products: int) -> int:
    heads, head_size, value_size = tensors.query.shape[1], tensors.query.shape[3], tensors.value.shape[3]

    def term(table: Tensor | None, rows: int, others: int, size: int) -> int:
        return 0 if table is None else rows * min(others, table.shape[-2]) * size

    total = 0
    for queries, keys, count in _lengths(tensors):
        scores = queries * keys * head_size
        scores += term(tensors.rel_k, queries, keys, head_size) + term(tensors.rel_q, keys, queries, head_size)
        values = queries * keys * value_size + term(tensors.rel_v, queries, keys, value_size)
        total += 2 * count * heads * (score_products * scores + value_products * values)
    return total


def _lengths(tensors: Tensors) -> Iterator[tuple[int, int, int]]:
    """Numbers of queries and keys, and how many sequences have them; of a packed call that holds no numbers, as if all were as long."""
    queries, keys = tensors.query.shape[2], tensors.key.shape[2]
    ends, key_ends = tensors.cu_seqlens_q, tensors.cu_seqlens_k
    if ends is None or key_ends is None:
        yield queries, keys, tensors.query.shape[0]
    elif ends.is_meta or isinstance(ends, FakeTensor):
        count = ends.shape[0] - 1
        yield queries // max(count, 1), keys // max(count, 1), count
    else:
        yield from zip(ends.diff().tolist(), key_ends.diff().tolist(), itertools.repeat(1))


def _register_flops() -> None:
    from torch.utils import flop_counter

    flop_counter.register_flop_formula(torch.ops.relattn.forward, get_raw=True)(_forward_flops)
    flop_counter.register_flop_formula(torch.ops.relattn.backward, get_raw=True)(_backward_flops)


def _register_dtensor() -> None:
    try:
        importlib.import_module("relattn.dtensor")
    except (ImportError, AttributeError) as error:  # a torch that has it elsewhere: whoever imports DTensor may want nothing of relattn
        warnings.warn(f"relattn: this torch ({torch.__version__}) cannot register operators with DTensor: {error}", stacklevel=2)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers what is for a module of torch when that is imported, not before: they import what `import relattn` must not."""

    searching = False

    def __init__(self, module: str, register: Callable[[], None]) -> None:
        self.module, self.register = module, register

    def find_spec(self, name, path=None, target=None):
        if name != self.module or self.searching:
            return None
        self.searching = True
        try:
            spec: Any = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module) -> None:
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            execute(module)
            self.register()

        spec.loader.exec_module = execute_and_register
        return spec


for _module, _register in (
    ("torch.utils.flop_counter", _register_flops),  # imports triton
    ("torch.distributed.tensor", _register_dtensor),
):
    if _module in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WhenImported(_module, _register))
