"""What the benchmark commands share: arguments, the machine, results.json that a run goes on with."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import relattn
from examples.chorales.storage import read_json
from relattn.backends import cpu

# Of a case that ended so, longer ones are not tried: they only need more.
FINAL = ("out of memory", "timeout")
GOES_ON = "the same command goes on with the next row"  # what an interrupted run says


def integers(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def positive(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of 1 or more, got {text!r}")
    return value


def names(parser: argparse.ArgumentParser, flag: str, text: str, known: list[str]) -> list[str]:
    """The names of a comma-separated list, each once; ends the command where one is not `known`."""
    found = list(dict.fromkeys(text.split(",")))
    for name in found:
        if name not in known:
            parser.error(f"{flag}: expected some of {', '.join(known)}, got {name!r}")
    return found


def chosen_device(parser: argparse.ArgumentParser, device: str | None) -> str:
    """`device`, by default the GPU where there is one; ends the command where torch sees none."""
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def environment(device: str, threads: int | None) -> dict[str, Any]:
    """The machine and the versions that figures depend on."""
    found: dict[str, Any] = {
        "processor": _processor(), "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(_memory() / 2**30, 1), "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(), "torch": torch.__version__, "relattn": relattn.__version__,
    }  # fmt: skip
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda}
        found |= {"gpu_processors": properties.multi_processor_count}
    else:
        reason = cpu.unavailable()
        found |= {"threads": threads or torch.get_num_threads(), "native": cpu.variant() if reason is None else f"none: {reason}"}
    for package in ("transformers", "triton"):
        with contextlib.suppress(ImportError):
            found[package] = importlib.metadata.version(package)
    return found


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout.strip()
    return None


def allowed_memory(gibibytes: float | None) -> int:
    """Bytes that a case on the CPU may take: those asked for, or 85 % of what new allocations may take.

    That is what the system has free, or what its control group leaves, if that is less.
    """
    if gibibytes:
        return int(gibibytes * 2**30)
    import psutil

    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return int(0.85 * max(free, 2**28))


def begin(options: argparse.Namespace, settings: Mapping[str, Any]) -> dict[str, Any]:
    """results.json of `options.out` as it is so far, or a new one.

    Raises:
        ValueError: it holds results of other settings or of another machine or version.
    """
    new = {"settings": dict(settings), "environment": environment(options.device, options.threads)}
    path, commit = options.out / "results.json", _commit()
    if options.overwrite or not path.is_file():
        return new | {"date": time.strftime("%Y-%m-%d"), "commits": [commit], "rows": []}
    old = read_json(path)
    for part in ("settings", "environment"):
        changed = [f"{key} {old[part].get(key)!r} -> {value!r}" for key, value in new[part].items() if old[part].get(key) != value]
        if changed:
            raise ValueError(f"--out {options.out} holds rows of other {part} ({'; '.join(changed)}): --overwrite measures them anew")
    if commit not in old["commits"]:
        print(f"{path}: its rows so far are of commit {', '.join(map(str, old['commits']))}, this is {commit}", file=sys.stderr)
        old["commits"].append(commit)
    return old
