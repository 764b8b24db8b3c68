"""What the stages share: where their calls run, how they reach the kernels, how they report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import relattn
from benchmarks.measure import Step, interleave
from benchmarks.peers import Problem
from benchmarks.processes import is_out_of_memory

OWN = "relattn-triton"


def launcher() -> Any:
    """The module that launches the Triton kernels; what it keeps to itself is looked at, too."""
    return relattn.backends.triton


def is_dry() -> bool:
    """Whether Triton's interpreter stands for a GPU."""
    return launcher().INTERPRETED


def device() -> str:
    return "cpu" if is_dry() else "cuda"


def problem(
    length: int, head_dim: int, clip: int | None = None, batch: int = 2, heads: int = 12, causal: bool = False
) -> Problem:
    """Of one head in a dry run, where every program takes a second."""
    batch, heads = (1, 1) if is_dry() else (batch, heads)
    return Problem(length, "train", batch, heads, head_dim, "bfloat16", device(), causal, clip)


def emit(result: Any) -> None:
    """Print what is known so far: the last line counts, also of a job that is stopped."""
    print("\n" + json.dumps(result), flush=True)


def verdict(result: dict[str, Any], failures: Sequence[str] | dict[str, Any]) -> dict[str, Any]:
    """The result, if there are no failures; else it is printed and the process ends with status 1."""
    if failures:
        emit(result)
        raise SystemExit(f"failed: {failures}")
    return result


def timed(steps: dict[str, Step], seconds: float = 1.0) -> dict[str, float | str]:
    """Milliseconds (median) of steps that take turns, or why there are none of one."""
    found: dict[str, float | str] = {}
    able: dict[str, Step] = {}
    for name, step in steps.items():
        try:
            step()
            synchronize()
            able[name] = step
        except Exception as error:  # out of memory, or a library that refuses: a row, not the end
            found[name] = reason(error)
            if is_out_of_memory(error) and not is_dry():
                torch.cuda.empty_cache()
    if able:
        times = interleave(able, seconds * len(able), device=device(), least=1 if is_dry() else 3, warm=False)
        found |= {name: timing["median_ms"] for name, timing in times.items()}
    return found


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def synchronize() -> None:
    if not is_dry():
        torch.cuda.synchronize()


def by_kernel(call: Step, rounds: int = 5) -> dict[str, float]:
    """Milliseconds that each kernel of a call takes on the GPU; in a dry run, of the whole call on the host."""
    if is_dry():
        start = time.perf_counter()
        call()
        return {"whole call": 1e3 * (time.perf_counter() - start)}
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(rounds):
            call()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in profile.key_averages():
        milliseconds = getattr(event, "self_device_time_total", 0.0) / 1e3 / rounds
        if event.device_type == torch.autograd.DeviceType.CUDA and milliseconds:
            name = event.key if is_own(event.key) else "PyTorch's own"
            found[name] = round(found.get(name, 0.0) + milliseconds, 5)
    return found


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, which may lie beside the PATH; the newest of several."""
    found = shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")
    beside = [
        str(path) for depth in ("*", "*/*") for path in Path("/opt/nvidia").glob(f"{depth}/{name}") if path.is_file()
    ]
    return found or max(beside, default=None)


def is_own(kernel: str) -> bool:
    """Whether a kernel's name is one of relattn's: those of libraries are C++ signatures."""
    return kernel.endswith("_kernel") and "::" not in kernel and " " not in kernel
