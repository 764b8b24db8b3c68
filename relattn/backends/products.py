"""The products and the softmax of the reference, in which what is hidden makes no difference, whatever it holds.

In floating point 0 * NaN is NaN: a weight of 0 does not keep a hidden value out of the sum, nor a hidden key out of the query's gradient.
Here 0 takes nothing of what is not finite; anything else makes NaN of it. The derivatives of the two products are such products again, so
this holds for second derivatives as well. A row whose gradient is 0 (its output is not asked for) owes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def scores(rows: Tensor, columns: Tensor) -> Tensor:
    """rows (..., I, D) times columns (..., J, D): (..., I, J), each pair for itself."""
    return _apply(_Scores, rows, columns)


def weighted(weights: Tensor, rows: Tensor) -> Tensor:
    """Sums (..., I, D) of rows (..., J, D) by weights (..., I, J)."""
    return _apply(_Weighted, weights, rows)


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and log-sum-exp of the last dimension; -inf has weight 0, also where there is nothing else."""
    return _apply(_Softmax, scores)


def _apply(function: type[torch.autograd.Function], *tensors: Tensor) -> Any:
    """In forward mode the plain operations, of which torch has derivatives of any order (a Function's `jvp` cannot be nested). And while
    torch.onnx traces, which knows no Function of ours."""
    plain = forward_ad._current_level >= 0 or torch.jit.is_tracing()
    return function.forward(*tensors) if plain else function.apply(*tensors)


class _Scores(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(rows, columns):
        return rows @ columns.transpose(-2, -1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        rows, columns = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return weighted(gradient, columns) if needed[0] else None, weighted(gradient.transpose(-2, -1), rows) if needed[1] else None


class _Weighted(torch.autograd.Function):
    generate_vmap_rule = True
    setup_context = _Scores.setup_context

    @staticmethod
    def forward(weights, rows):
        spoilt = ~rows.isfinite().all(-1, keepdim=True)
        return torch.where(spoilt.transpose(-2, -1) & (weights != 0.0), torch.nan, weights) @ torch.where(spoilt, 0.0, rows)

    @staticmethod
    def backward(ctx, gradient):
        weights, rows = ctx.saved_tensors
        needed = ctx.needs_input_grad
        idle = (gradient == 0.0).all(-1, keepdim=True)
        return (
            _without(idle, scores(gradient, rows)) if needed[0] else None,
            weighted(_without(idle, weights).transpose(-2, -1), gradient) if needed[1] else None,
        )


class _Softmax(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(scores):
        # Rows that see nothing are computed as if they saw everything with score 0, then overwritten: no NaN, no gradient.
        seen = scores != -torch.inf  # NaN is seen
        sees_any = seen.any(-1, keepdim=True)
        scores = torch.where(sees_any, scores, 0.0)
        return torch.where(seen, scores.softmax(-1), 0.0), torch.where(sees_any.squeeze(-1), scores.logsumexp(-1), -torch.inf)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[0])

    @staticmethod
    def backward(ctx, gradient, lse_gradient):
        (weights,) = ctx.saved_tensors
        lse_gradient, seen = lse_gradient[..., None], weights != 0.0
        gradient = torch.where(seen, gradient, 0.0)
        weights = _without((gradient == 0.0).all(-1, keepdim=True) & (lse_gradient == 0.0), weights)
        return torch.where(seen, weights * (gradient - (weights * gradient).sum(-1, keepdim=True) + lse_gradient), 0.0)


def _without(idle: Tensor, tensor: Tensor) -> Tensor:
    """0 for what is not finite in idle rows. (What is finite may be part of a second derivative.)"""
    return torch.where(idle & ~tensor.isfinite(), 0.0, tensor)
