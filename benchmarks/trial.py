"""One peer on one problem: checked against the reference, then its peak memory and its time measured. For a process of its own."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import relattn
from benchmarks.measure import Step, TensorStep, extra_memory, interleave
from benchmarks.peers import PEERS, Attention, Problem

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


def _step(attention: Attention, inputs: Sequence[Tensor], train: bool, grad_output: Tensor | None = None) -> TensorStep:
    """A call, its output and gradients; those of unused inputs left out."""
    if not train:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attention(*inputs),)

        return forward
    if grad_output is None:
        grad_output = torch.randn_like(inputs[0])

    def training() -> tuple[Tensor, ...]:
        output = attention(*inputs)
        gradients = torch.autograd.grad(output, list(inputs), grad_output, allow_unused=True)
        return (output.detach(), *(gradient for gradient in gradients if gradient is not None))

    return training


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
    found = list(_step(attention, inputs, train, grad_output)())
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
    outputs = [
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


def peak_memory(step: TensorStep, device: str) -> tuple[int, int]:
    """Bytes at the peak beyond the inputs, results included, and bytes of the results."""
    if device == "cpu":
        extra, returned = extra_memory(step)
        return extra + returned, returned
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, sum(tensor.untyped_storage().nbytes() for tensor in results)


def time_step(step: Step, device: str, seconds: float, warm: bool = True) -> dict[str, Any]:
    """Median, quartiles and number of rounds; on a GPU each round between two events, with its L2 cache emptied before."""
    if device == "cpu":
        return interleave({"": step}, seconds, warm=warm)[""]
    emptying = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    while len(events) < 3 or (time.perf_counter() - start < seconds and len(events) < 400):
        for _ in range(10 if events else 3):
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            emptying.zero_()
            pair[0].record()
            step()
            pair[1].record()
            events.append(pair)
        torch.cuda.synchronize()
    times = [first.elapsed_time(second) for first, second in events]
    low, median, high = (round(value, 5) for value in statistics.quantiles(times, n=4, method="inclusive"))
    return {"median_ms": median, "quartiles_ms": [low, high], "rounds": len(times)}


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
            _step(side.make(small), small.inputs(), train)()
        attention = side.make(case)
        step = _step(attention, inputs, train)
        if side.compiled:  # the compiler's memory is not the kernel's
            step()
        start = time.perf_counter()
        result["peak_bytes"], result["returned_bytes"] = peak_memory(step, device)
        first = time.perf_counter() - start
        result["errors"] = check(case, attention, inputs, side.relative)
        if max(result["errors"].values()) > _ROUNDING:
            result["status"] = "wrong"
        gc.collect()
        result |= time_step(step, device, seconds, warm=first < 1.0)  # a second call has been made anyway
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        result = {"status": "out of memory", "detail": str(error).splitlines()[0][:200]}
    return result


def limit_memory(limit: int) -> None:
    """Let this process take `limit` bytes more address space: beyond, an allocation fails instead of the machine."""
    import resource

    with contextlib.suppress(OSError, ValueError, StopIteration):
        status = Path("/proc/self/status").read_text().splitlines()
        used = 1024 * int(next(line for line in status if line.startswith("VmSize")).split()[1])
        resource.setrlimit(resource.RLIMIT_AS, (used + limit, resource.RLIM_INFINITY))


def is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    known = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc", "defaultcpuallocator")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(part in text for part in known)


def matrix_ceiling(dtype: str, device: str, seconds: float = 1.0) -> float:
    """TFLOP/s of the best of torch's own products of square matrices: the machine's "speed of light" for this dtype."""
    best = 0.0
    for size in (512, 1024, 2048) if device == "cpu" else (4096, 8192):
        left, right = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        timing = time_step(lambda left=left, right=right: left @ right, device, seconds / 3)
        best = max(best, 2 * size**3 / timing["median_ms"] / 1e9)
    return best
