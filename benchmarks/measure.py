"""How things are measured: sides that take turns, memory of a step, cases in fresh processes.

`python -m benchmarks.measure MODULE:FUNCTION JSON` is what `in_fresh_process` and `attempt` run.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

_CLONE = Path(__file__).resolve().parents[1]
Step = Callable[[], object]
TensorStep = Callable[[], tuple[Tensor, ...]]


def interleave(
    steps: Mapping[str, Step],
    seconds: float,
    *,
    least: int = 3,
    most: int = 400,
    limits: Mapping[str, int] | None = None,
    warm: bool = True,
    sample: float = 1e-3,
) -> dict[str, dict[str, Any]]:
    """Milliseconds of each step: median, quartiles, number of rounds.

    In a round every step is timed once, and each round starts with the next of them, so that none always follows the same other. Rounds
    go on for `seconds`, but number at least `least` and at most `most`; a step named in `limits` drops out after so many. With `warm` each
    step runs before, untimed, and one that is shorter than `sample` seconds is timed in batches of that length.
    """
    limits = limits or {}
    batches = {name: _calibrated(step, sample) if warm else 1 for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    start = time.perf_counter()
    for number in range(most):
        if number >= least and time.perf_counter() - start >= seconds:
            break
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if len(times[name]) < limits.get(name, most):
                times[name].append(_timed(steps[name], batches[name]))
    return {name: _summary(values) for name, values in times.items()}


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


def _summary(values: list[float]) -> dict[str, Any]:
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    low, median, high = (round(value * 1e3, 5) for value in quartiles)
    return {"median_ms": median, "quartiles_ms": [low, high], "rounds": len(values)}


def extra_memory(step: TensorStep) -> tuple[int, int]:
    """Bytes that `step` takes at its peak beyond what it returns, and bytes of that; Linux only.

    The difference of the process's high-water resident set and its resident set before. Where the kernel does not let the high-water mark
    be reset it may be an earlier one. What a step keeps for the next time counts the first time only: measure one step a process.
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


def in_fresh_process(function: Callable[..., Any], arguments: Mapping[str, Any], threads: int | None = None) -> Any:
    """What `function(**arguments)` returns in a process of its own: arguments and result go as JSON. `threads`: torch's; None = default."""
    with _started(function, arguments, threads) as process:
        output, errors = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{process.args[-2]} {dict(arguments)} ended with {process.returncode}:\n{errors}")
    return json.loads(output.splitlines()[-1])


def attempt(function: Callable[..., Any], arguments: Mapping[str, Any], timeout: float, threads: int | None = None) -> Any:
    """The same, but whatever becomes of the process is an answer: {"status": timeout, out of memory, crash or error, "detail"}."""
    with _started(function, arguments, threads) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            _kill(process)
            return {"status": "timeout", "detail": f"stopped after {timeout:g} s"}
        except BaseException:
            _kill(process)
            raise
    if process.returncode == 0:
        return json.loads(output.splitlines()[-1])
    if process.returncode == -signal.SIGKILL:
        return {"status": "out of memory", "detail": "killed by the system, as it does when memory runs out"}
    if process.returncode < 0:
        return {"status": "crash", "detail": signal.Signals(-process.returncode).name}
    last = (errors.strip() or "no message").splitlines()[-1]
    return {"status": "error", "detail": last[:300]}


def _started(function: Callable[..., Any], arguments: Mapping[str, Any], threads: int | None) -> subprocess.Popen[str]:
    environment = dict(os.environ) if threads is None else os.environ | {"OMP_NUM_THREADS": str(threads)}
    module = function.__globals__["__spec__"].name if function.__module__ == "__main__" else function.__module__
    command = [sys.executable, "-m", "benchmarks.measure", f"{module}:{function.__qualname__}", json.dumps(arguments)]
    # A session of its own, so that the compilers that it starts can be stopped with it.
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=_CLONE, start_new_session=True
    )


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


class Watch:
    """What else ran while a case did: load averages before and after, and the cores that other processes kept busy in between.

    with Watch() as watch:
        in_fresh_process(...)
    watch.seen
    """

    seen: dict[str, Any]

    def __enter__(self) -> Watch:
        self._start = time.perf_counter(), _busy(), _own(), os.getloadavg()[0]
        return self

    def __exit__(self, *_: object) -> None:
        start, busy, own, load = self._start
        wall = time.perf_counter() - start
        now = _busy()
        others = None if busy is None or now is None else round(max(0.0, now - busy - (_own() - own)) / wall, 2)
        self.seen = {"seconds": round(wall, 1), "load": [load, os.getloadavg()[0]], "other_processes_cores": others}


def _own() -> float:
    """Processor seconds of this process and its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _busy() -> float | None:
    """Processor seconds of the machine, those taken by its host included; None where /proc does not say."""
    try:
        user, nice, system, _idle, _wait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _main() -> None:
    target, arguments = sys.argv[1:]
    module, name = target.split(":")
    result = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    print("\n" + json.dumps(result))  # in a line of its own, whatever was printed before


if __name__ == "__main__":
    _main()
