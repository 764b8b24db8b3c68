"""Stage `first`: are the kernels right on this GPU? With gradients, in three dtypes, sanitized, the same every time."""

from __future__ import annotations

import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import SkipTest

import torch

import relattn
from benchmarks.gpu_check.afresh import is_spoiled
from benchmarks.gpu_check.common import OWN, emit, is_dry, launcher, problem, reason, synchronize, tool, verdict
from benchmarks.gpu_check.running import Group, Job
from benchmarks.peers import PEERS, step
from benchmarks.trial import check as multiples

_DTYPES = ("bfloat16", "float16", "float32")
_LARGEST_HEAD = 256  # that the kernels take
_SANITIZER = "compute-sanitizer"


def environment() -> dict[str, Any]:
    import triton

    found: dict[str, Any] = {
        "torch": torch.__version__, "CUDA": torch.version.cuda, "triton": triton.__version__,
        "python": platform.python_version(), "relattn": relattn.__version__, "cores": os.cpu_count(),
        "unavailable": launcher().unavailable(), "sanitizer": tool(_SANITIZER),
    }  # fmt: skip
    if not is_dry():
        properties = torch.cuda.get_device_properties(0)
        found |= {"GPU": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        found |= {"processors": properties.multi_processor_count, "memory GiB": round(properties.total_memory / 2**30)}
        found |= {"target": launcher()._target(torch.device("cuda", 0))}
        query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        if shutil.which("nvidia-smi"):
            told = subprocess.run(["nvidia-smi", query, "--format=csv"], capture_output=True, text=True)
            found["nvidia-smi"] = told.stdout.splitlines()
    return found


def right(head_dim: int, clip: int | None, lengths: list[int]) -> dict[str, Any]:
    """One bfloat16 call, forward and backward, as close to float64 as random calls must be; its errors in multiples of
    the plain implementation's."""
    from tests.edges import call
    from tests.fuzz import check

    found: dict[str, Any] = {}
    for length in lengths:
        reach = length - 1 if clip is None else clip
        # A seed that leaves the block sizes as they are: see tests.fuzz.cut.
        check(
            call(0, 1, 2, length, length, head_dim, clip=(reach, reach), tables={"rel_k": False}),
            "triton",
            torch.bfloat16,
        )
        given = problem(length, head_dim, clip, batch=1, heads=2)
        found[f"L {length}"] = multiples(given, PEERS[OWN].make(given), given.inputs())
        emit(found)
    return found


def _checked(calls: Iterator[tuple[str, Any]], dtype: str, seconds: float) -> dict[str, Any]:
    from tests.fuzz import check

    began, result, spoiled = time.monotonic(), {}, False
    failures: dict[str, str] = {}
    for count, (name, made) in enumerate(calls, 1):
        try:
            check(made, "triton", getattr(torch, dtype))
        except SkipTest:
            continue
        except Exception as error:
            failures[name] = reason(error)
            spoiled = is_spoiled(error)
        result = {"calls": count, "failed": failures, "seconds": round(time.monotonic() - began, 1)}
        emit(result)
        if spoiled or time.monotonic() - began >= seconds:
            break
    return verdict(result, failures)


def fuzz(dtype: str, first: int, every: int, seconds: float) -> dict[str, Any]:
    """Random calls, seeds first, first + every, ..., as `python -m tests.fuzz --backend triton` makes them; every fifth one is packed."""
    from tests.fuzz import call_of

    return _checked(((f"seed {seed}", call_of(seed, "triton")) for seed in itertools.count(first, every)), dtype, seconds)


def at_the_edges(dtype: str, part: int, parts: int, seconds: float) -> dict[str, Any]:
    """The calls of `python -m tests.edges`, a part of them, that the kernels take."""
    from tests.edges import edges

    calls = list(edges(3).items())[part::parts]
    able = [(name, made) for name, made in calls if made.tensors["query"].shape[3] <= _LARGEST_HEAD]
    return _checked(iter(able), dtype, seconds)


def device_tests(collect_only: bool = False) -> dict[str, Any]:
    """The Triton backend's own tests, those that need no interpreter, with the tensors on the GPU."""
    import pytest

    outcomes: dict[str, list[str]] = {}

    class Listener:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                outcomes.setdefault(report.outcome, []).append(report.nodeid.split("::", 1)[1])
                emit(told())

    def told() -> dict[str, Any]:
        return {name: len(tests) for name, tests in outcomes.items()} | {"failures": outcomes.get("failed", [])}

    files = [str(path) for path in sorted(Path("tests").rglob("test_triton*.py"))]
    # Compiling for every chip needs no GPU, and minutes.
    options = [*files, "-q", "--tb=short", "-p", "no:cacheprovider", "-k", "not configurations_fit"]
    if collect_only:
        options.append("--collect-only")
    elif find_spec("xdist"):  # each compiles for itself
        options += ["-n", "8", "-p", "benchmarks.gpu_check.afresh"]
    status = pytest.main(options, plugins=[Listener()])
    return verdict(told(), [] if status == 0 else [f"pytest's status {int(status)}"])


def same_bits(lengths: list[int], head_dims: list[int], clips: list[int | None]) -> dict[str, Any]:
    """Output and gradients of the same call three times: every bit alike, no value missing."""
    found: dict[str, Any] = {}
    for length, head_dim, clip in itertools.product(lengths, head_dims, clips):
        given = problem(length, head_dim, clip, heads=3)
        call = step(PEERS[OWN].make(given), given.inputs(), True)
        first, *others = (call() for _ in range(3))
        alike = all(torch.equal(one, two) for other in others for one, two in zip(first, other, strict=True))
        found[f"L {length}, D {head_dim}, clip {clip}"] = alike and all(
            bool(tensor.isfinite().all()) for tensor in first
        )
        emit(found)
    return verdict(found, [name for name, alike in found.items() if not alike])


def ranks(processes: int | None = None) -> dict[str, Any]:
    """relattn.distributed by NCCL, a rank for each GPU, or one by itself; on so many CPU processes by gloo."""
    here = ["--cpu"] if processes else []
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes or torch.cuda.device_count())]
    command = [sys.executable, "-m", *launch, "-m", "tests.distributed.ranks", *here]
    ended = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in ended.stdout.splitlines() if ": " in line]
    wrong = [line for line in lines if not line.endswith(": good")]
    found = {"ranks": processes or torch.cuda.device_count(), "calls": len(lines), "wrong": wrong}
    return verdict(found, wrong or ([] if ended.returncode == 0 else [ended.stderr[-1000:]]))


def one_call(
    length: int, head_dim: int, clip: int | None, configuration: tuple[int, int, int] | None
) -> dict[str, Any]:
    """A training step, for the sanitizer: all kernels with tiles of `configuration`."""
    launcher()._CONFIGURATION = None if configuration is None else tuple(configuration)
    given = problem(length, head_dim, clip, batch=1, heads=2)
    results = step(PEERS[OWN].make(given), given.inputs(), True)()
    synchronize()
    return {"finite": all(bool(tensor.isfinite().all()) for tensor in results)}


def summary(log: str) -> dict[str, Any]:
    """The sanitizer's own last words, and its first complaints."""
    lines = [line.strip("= ") for line in log.splitlines() if line.startswith("=========")]
    last = next(line for line in reversed(lines) if "SUMMARY" in line)
    complaints = [line for line in lines if line != last and re.search(r"(?i)error|hazard|invalid|race|warning", line)]
    return {"summary": last, "first": complaints[:6], "wrong": not re.search(r"SUMMARY: 0 ", last)}


def plan(dry: bool) -> list[Group]:
    if dry:
        return _dry()
    pairs = list(itertools.product((64, 128), (None, 64)))
    calls = [
        Job(f"right D {size}, clip {clip}", right, dict(head_dim=size, clip=clip, lengths=[1111, 1024]), 170.0)
        for size, clip in pairs
    ]
    seconds, workers = 160.0, 3
    wide = [
        Job(f"fuzz {dtype} {first}", fuzz, dict(dtype=dtype, first=first, every=workers, seconds=seconds), seconds + 50)
        for first in range(workers) for dtype in _DTYPES
    ]  # fmt: skip
    wide += [
        Job(f"edges {dtype}", at_the_edges, dict(dtype=dtype, part=0, parts=1, seconds=seconds), seconds + 50)
        for dtype in _DTYPES
    ]
    wide.append(Job("device tests", device_tests, {}, seconds + 50))
    wide.append(Job("ranks", ranks, {}, seconds + 50))
    bits = dict(lengths=[1000, 4096], head_dims=[64, 128], clips=[None, 64])
    wide.append(Job("same bits", same_bits, bits, seconds + 50))
    small = [dict(length=256, head_dim=64, clip=clip, configuration=(64, 4, 1)) for clip in (None, 16)]
    wide += [Job(f"compiled for the sanitizer, clip {each['clip']}", one_call, each, 120.0) for each in small]
    groups = [Group([Job("environment", environment)]), Group(calls, 4, essential=True), Group(wide, 16)]
    program = tool(_SANITIZER)
    if program is None:
        print("no compute-sanitizer on the PATH, in /usr/local/cuda or in /opt/nvidia: its checks are left out")
    else:
        checks = [
            Job(
                f"{kind}, clip {each['clip']}", one_call, each, 150.0,
                (program, "--tool", kind, "--error-exitcode", "9"),
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, summary,
            )
            for kind in ("memcheck", "racecheck", "synccheck") for each in small
        ]  # fmt: skip
        groups.append(Group(checks, len(checks)))
    return groups


def _dry() -> list[Group]:
    small = dict(length=9, head_dim=16, clip=3, configuration=(16, 4, 1))
    jobs = [
        Job("environment", environment),
        Job("right", right, dict(head_dim=16, clip=3, lengths=[9])),
        Job("fuzz", fuzz, dict(dtype="bfloat16", first=4, every=1, seconds=0.0)),
        Job("edges", at_the_edges, dict(dtype="float32", part=50, parts=100, seconds=0.0)),
        Job("device tests", device_tests, dict(collect_only=True)),
        Job("ranks", ranks, dict(processes=1)),
        Job("same bits", same_bits, dict(lengths=[9], head_dims=[16], clips=[3])),
        Job("sanitized", one_call, small),
    ]
    return [Group(jobs)]
