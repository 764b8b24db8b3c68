"""The products and the softmax of the reference, in which what is hidden makes no difference, whatever it holds.

In floating point 0 * NaN is NaN: a weight of 0 does not keep a hidden value out of the sum, nor a hidden key out of the query's gradient.
Here 0 takes nothing of what is not finite; anything else makes NaN of it. The derivatives of the two products are such products again, so
all this holds for derivatives of every order, in both modes. A row whose gradient is 0 (its output is not asked for) owes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scores(rows: Tensor, columns: Tensor) -> Tensor:
    """rows (..., I, D) times columns (..., J, D): (..., I, J), for which nothing has to be done, since each pair is alone."""
    return _Scores.apply(rows, columns)


def weighted(weights: Tensor, rows: Tensor) -> Tensor:
    """Sums (..., I, D) of rows (..., J, D) by weights (..., I, J)."""
    return _Weighted.apply(weights, rows)


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and log-sum-exp of the last dimension; weight 0 for -inf, also where there is nothing else."""
    return _Softmax.apply(scores)


class _Function(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)


class _Scores(_Function):
    @staticmethod
    def forward(rows, columns):
        return rows @ columns.mT

    @staticmethod
    def backward(ctx, gradient):
        rows, columns = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return weighted(gradient, columns) if needed[0] else None, weighted(gradient.mT, rows) if needed[1] else None

    @staticmethod
    def jvp(ctx, rows_slope, columns_slope):
        rows, columns = ctx.saved_tensors
        return scores(rows_slope, columns) + scores(rows, columns_slope)


class _Weighted(_Function):
    @staticmethod
    def forward(weights, rows):
        spoilt = ~rows.isfinite().all(-1, keepdim=True)
        return torch.where(spoilt.mT & (weights != 0.0), torch.nan, weights) @ torch.where(spoilt, 0.0, rows)

    @staticmethod
    def backward(ctx, gradient):
        weights, rows = ctx.saved_tensors
        needed = ctx.needs_input_grad
        idle = (gradient == 0.0).all(-1, keepdim=True)
        return (
            _without(idle, scores(gradient, rows)) if needed[0] else None,
            weighted(_without(idle, weights).mT, gradient) if needed[1] else None,
        )

    @staticmethod
    def jvp(ctx, weights_slope, rows_slope):
        weights, rows = ctx.saved_tensors
        return weighted(weights_slope, rows) + weighted(weights, rows_slope)


class _Softmax(_Function):
    @staticmethod
    def forward(scores):
        return torch.where(scores == -torch.inf, 0.0, scores.softmax(-1)), scores.logsumexp(-1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[0])
        ctx.save_for_forward(output[0])

    @staticmethod
    def backward(ctx, gradient, lse_gradient):
        (weights,) = ctx.saved_tensors
        lse_gradient, seen = lse_gradient[..., None], weights != 0.0
        gradient = torch.where(seen, gradient, 0.0)
        weights = _without((gradient == 0.0).all(-1, keepdim=True) & (lse_gradient == 0.0), weights)
        return torch.where(seen, weights * (gradient - (weights * gradient).sum(-1, keepdim=True) + lse_gradient), 0.0)

    @staticmethod
    def jvp(ctx, slope):
        (weights,) = ctx.saved_tensors
        slope = torch.where(weights != 0.0, slope, 0.0)
        mean = (weights * slope).sum(-1, keepdim=True)
        return weights * (slope - mean), mean.squeeze(-1)


def _without(idle: Tensor, tensor: Tensor) -> Tensor:
    """0 for what is not finite in idle rows. (What is finite may be part of a second derivative.)"""
    return torch.where(idle & ~tensor.isfinite(), 0.0, tensor)
