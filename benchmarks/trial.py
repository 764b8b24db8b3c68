"""One peer on one problem: checked against the reference, then its peak memory and its time measured. For a process of its own."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import relattn
from benchmarks.measure import peak_memory, time_step
from benchmarks.peers import PEERS, Attention, Problem, step
from benchmarks.processes import is_out_of_memory, limit_memory

_STRIP = 16  # queries of each strip that the reference is asked for
# Largest deviation from the float64 reference, in multiples of the plain implementation's in the same dtype, that counts as rounding.
_ROUNDING = 16.0
_TENSORS = ("output", "query", "key", "value", "rel_k")


def flops(problem: Problem, relative: bool = True) -> float:
    """Floating-point operations that the mathematics asks for, whoever computes it.

    Products of one (query, key) pair and head: 2 (QK, PV) forward, 7 with the backward pass (QK again, dP, dV, dQ, dK): the count that
    FlashAttention reports. The relative term adds one (QE) forward and 4 (QE, QE again, dQ E, dE), each with as many rows as the table
    has, if that is fewer than keys. 2 D operations each.
    """
    train = problem.passed == "train"
    rows = min(sum(problem.reach) + 1, problem.length)
    relative_pairs = min(problem.pairs, problem.queries * rows)
    products = (7 if train else 2) * problem.pairs + (4 if train else 1) * relative_pairs * relative
    return 2.0 * problem.batch * problem.heads * problem.head_dim * products


def strips(problem: Problem) -> list[range]:
    """Queries to look at: all if they are few; else some from the start, behind the middle and at the end. They do not overlap."""
    if problem.queries <= 8 * _STRIP:
        return [range(problem.queries)]
    return [range(start, start + _STRIP) for start in (0, problem.queries * 5 // 8, problem.queries - _STRIP)]


def check(problem: Problem, attention: Attention, inputs: Sequence[Tensor], relative: bool = True) -> dict[str, float]:
    """Each tensor's largest deviation from the float64 reference, in multiples of the plain implementation's in the same dtype.

    Only strips of queries are looked at, since the reference materialises: outside them the output's gradient is zero, so that the other
    gradients are the strips' too.
    """
    train = problem.passed == "train"
    parts = strips(problem)
    grad_output = torch.zeros_like(inputs[0])
    for part in parts:
        grad_output[:, :, part.start : part.stop] = torch.randn_like(grad_output[:, :, part.start : part.stop])
    found = list(step(attention, inputs, train, grad_output)())
    exact, plain = (_reference(problem, inputs, parts, grad_output, dtype, relative) for dtype in (torch.float64, inputs[0].dtype))
    found[0] = torch.cat([found[0][:, :, part.start : part.stop] for part in parts], 2)
    errors = {}
    for name, ours, right, usual in zip(_TENSORS, found, exact, plain, strict=False):
        # Where the plain implementation happens to be exact, half a unit in the last place of the largest value stands for its error.
        rounding = max((usual.double() - right).abs().max().item(), right.abs().max().item() * torch.finfo(ours.dtype).eps / 2)
        error = (ours.double() - right).abs().max().item()
        errors[name] = round(error / max(rounding, 1e-300), 2) if error == error else float("inf")
    return errors


def _reference(
    problem: Problem, inputs: Sequence[Tensor], parts: Sequence[range], grad_output: Tensor, dtype: torch.dtype, relative: bool
) -> list[Tensor]:
    query, key, value, rel_k = (tensor.detach().to(dtype).requires_grad_() for tensor in inputs)
    outputs: list[Any] = [
        relattn.relative_attention(
            query[:, :, part.start : part.stop],
            key,
            value,
            rel_k if relative else None,
            max_relative_position=problem.reach if relative else None,
            query_offset=problem.offset + part.start,
            is_causal=problem.sees_left_only,
            backend="reference",
        )
        for part in parts
    ]
    output = torch.cat(outputs, 2)
    if problem.passed != "train":
        return [output.detach()]
    grad = torch.cat([grad_output[:, :, part.start : part.stop] for part in parts], 2).to(dtype)
    wanted = [query, key, value, rel_k] if relative else [query, key, value]
    return [output.detach(), *torch.autograd.grad(output, wanted, grad)]


def trial(peer: str, problem: Mapping[str, Any], seconds: float, memory_limit: int | None = None) -> dict[str, Any]:
    """The result of one peer on one problem: status, errors, memory in bytes, milliseconds."""
    case, side = Problem(**problem), PEERS[peer]
    device, train = case.device, case.passed == "train"
    if device == "cpu" and memory_limit:
        limit_memory(memory_limit)
    result: dict[str, Any] = {"status": "ok"}
    try:
        inputs = case.inputs()
        if not side.compiled:  # what any first use loads and starts
            small = case._replace(length=64)
            step(side.make(small), small.inputs(), train)()
        attention = side.make(case)
        call = step(attention, inputs, train)
        if side.compiled:  # the compiler's memory is not the kernel's
            call()
        start = time.perf_counter()
        result["peak_bytes"], result["returned_bytes"] = peak_memory(call, device)
        first = time.perf_counter() - start
        result["errors"] = check(case, attention, inputs, side.relative)
        if max(result["errors"].values()) > _ROUNDING:
            result["status"] = "wrong"
        gc.collect()
        result |= time_step(call, device, seconds, warm=first < 1.0)  # a second call has been made anyway
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        result = {"status": "out of memory", "detail": str(error).splitlines()[0][:200]}
    return result
