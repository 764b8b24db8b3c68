"""Cases in processes of their own: what each returns or how it ended, what it may take, what disturbed it.

`python -m benchmarks.processes MODULE:FUNCTION JSON` is what `in_fresh_process` and `attempt` run.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

_CLONE = Path(__file__).resolve().parents[1]


def in_fresh_process(function: Callable[..., Any], arguments: Mapping[str, Any], threads: int | None = None) -> Any:
    """What `function(**arguments)` returns in a process of its own: both go as JSON. threads: torch's; None = default."""
    with _started(function, arguments, threads) as process:
        output, errors = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{function.__qualname__} {dict(arguments)} ended with {process.returncode}:\n{errors}")
    return json.loads(output.splitlines()[-1])


def attempt(
    function: Callable[..., Any], arguments: Mapping[str, Any], timeout: float, threads: int | None = None
) -> Any:
    """The same, but whatever becomes of the process is an answer: "status" (timeout, out of memory, crash, error) and
    "detail"."""
    with _started(function, arguments, threads) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            stop(process)
            return {"status": "timeout", "detail": f"stopped after {timeout:g} s"}
        except BaseException:
            stop(process)
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
    command = [sys.executable, "-m", "benchmarks.processes", f"{module}:{function.__qualname__}", json.dumps(arguments)]
    # A session of its own, so that the compilers that it starts can be stopped with it.
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=_CLONE,
        start_new_session=True,
    )


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process that began a session of its own, and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def limit_memory(limit: int) -> None:
    """Let this process take `limit` bytes more address space: beyond, an allocation fails instead of the machine."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        status = Path("/proc/self/status").read_text().splitlines()
        used = 1024 * int(next(line for line in status if line.startswith("VmSize")).split()[1])
        resource.setrlimit(resource.RLIMIT_AS, (used + limit, resource.RLIM_INFINITY))


def is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    known = (
        "out of memory",
        "can't allocate memory",
        "cannot allocate memory",
        "not enough memory",
        "bad_alloc",
        "defaultcpuallocator",
    )
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(part in text for part in known)


class Watch:
    """What else ran while a case did: load averages before and after, the cores that other processes kept busy.

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
        user, nice, system, _idle, _wait, irq, softirq, steal = map(
            int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
        )
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
