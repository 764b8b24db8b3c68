"""How time and memory are measured, on CPUs and GPUs: steps that take turns, peaks of a step, the machine's ceiling."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], object]
TensorStep = Callable[[], tuple[Tensor, ...]]


def interleave(
    steps: Mapping[str, Step],
    seconds: float,
    *,
    device: str = "cpu",
    least: int = 3,
    most: int = 400,
    limits: Mapping[str, int] | None = None,
    warm: bool = True,
    sample: float = 1e-3,
) -> dict[str, dict[str, Any]]:
    """Milliseconds of each step: median, quartiles, number of rounds.

    In a round every step is timed once, and each round starts with the next of them, so that none always follows the
    same other. Rounds go on for `seconds`, but number at least `least` and at most `most`; a step named in `limits`
    drops out after so many. With `warm` each step runs before, untimed. On a CPU, one that is then shorter than
    `sample` seconds is timed in batches of that length; on a GPU, each is timed between two events, with the L2 cache
    emptied before.
    """
    limits = limits or {}
    if device == "cpu":
        batches = {name: _calibrated(step, sample) if warm else 1 for name, step in steps.items()}
    elif warm:
        for step in steps.values():
            step()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    start = time.perf_counter()
    for number in range(most):
        if number >= least and time.perf_counter() - start >= seconds:
            break
        turn = names[number % len(names) :] + names[: number % len(names)]
        turn = [name for name in turn if len(times[name]) < limits.get(name, most)]
        if device == "cpu":
            found = [_timed(steps[name], batches[name]) for name in turn]
        else:
            found = _timed_on_gpu([steps[name] for name in turn])
        for name, value in zip(turn, found, strict=True):
            times[name].append(value)
    return {name: _summary(values) for name, values in times.items()}


def time_step(step: Step, device: str, seconds: float, warm: bool = True) -> dict[str, Any]:
    """The same of one step."""
    return interleave({"": step}, seconds, device=device, warm=warm)[""]


def _timed(step: Step, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def _calibrated(step: Step, sample: float) -> int:
    """How many calls take `sample` seconds, after warming up."""
    if _timed(step, 1) >= 0.1:
        return 1  # the first call says enough
    return max(1, math.ceil(sample / _timed(step, 3)))


def _timed_on_gpu(steps: Sequence[Step]) -> list[float]:
    """Seconds of each step. All are queued before any is waited for, and emptying the cache gives the host a start."""
    events = []
    for step in steps:
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        _larger_than_cache().zero_()
        pair[0].record()
        step()
        pair[1].record()
        events.append(pair)
    torch.cuda.synchronize()
    return [first.elapsed_time(second) / 1e3 for first, second in events]


@functools.cache
def _larger_than_cache() -> Tensor:
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")


def _summary(values: list[float]) -> dict[str, Any]:
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    low, median, high = (round(value * 1e3, 5) for value in quartiles)
    return {"median_ms": median, "quartiles_ms": [low, high], "rounds": len(values)}


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


def extra_memory(step: TensorStep) -> tuple[int, int]:
    """Bytes that `step` takes at its peak beyond what it returns, and bytes of that; Linux only.

    The difference of the process's high-water resident set and its resident set before. Where the kernel does not let
    the high-water mark be reset it may be an earlier one. What a step keeps for the next time counts the first time
    only: measure one step a process.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    returned = step()
    peak = resident("VmHWM") - before
    size = sum(tensor.untyped_storage().nbytes() for tensor in returned)
    return peak - size, size


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def matrix_ceiling(dtype: str, device: str, seconds: float = 1.0) -> float:
    """TFLOP/s of the best of torch's own products of square matrices: the machine's "speed of light" for this dtype."""
    best = 0.0
    for size in (512, 1024, 2048) if device == "cpu" else (4096, 8192):
        left, right = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        timing = time_step(functools.partial(torch.mm, left, right), device, seconds / 3)
        best = max(best, 2 * size**3 / timing["median_ms"] / 1e9)
    return best
