"""Looks through the machine code of Triton's kernels before they are launched, where NVIDIA's compiler is one that makes wrong code.

That is ptxas before 12.9, for Hopper (relattn.kernels.gpu.descriptors says what it does). What was found of a kernel is kept by its hash in
the folder of `autotune.cache_folder`, so that only the first process that compiles it looks, for half a second beside ten of compiling.
"""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path
from typing import Any

from relattn.backends.autotune import cache_folder, write_whole

_END = "looked through"  # the last line of what is kept
_RIGHT: set[str] = set()  # hashes of kernels, in this process


class MiscompiledError(RuntimeError):
    """A kernel whose machine code does not do what its source says."""


@functools.cache
def suspected(target: str) -> bool:
    """Whether kernels for a GPU are to be looked through before they are launched."""
    return target == "sm_90" and _compiler() < (12, 9)


def _compiler() -> tuple[int, int]:
    """The version of the ptxas that Triton calls; (0, 0) if it does not say."""
    try:
        told = importlib.import_module("triton.backends.nvidia.compiler").get_ptxas_version(90)
        found = re.search(r"release (\d+)\.(\d+)", told)
    except Exception:  # no part of Triton's interface
        found = None
    return (int(found[1]), int(found[2])) if found else (0, 0)


def check(compiled: Any) -> None:
    """
    Raises:
        MiscompiledError: one of the kernel's matrix descriptors is overwritten.
    """
    if compiled.hash in _RIGHT or "wgmma" not in compiled.asm["ptx"]:
        return
    place = cache_folder() / "descriptors" / str(compiled.hash)
    found = _read(place)
    if found is None:
        found = _look(compiled.asm["cubin"])
        write_whole(place, "\n".join([*found, _END]))
    if found:
        raise MiscompiledError(f"ptxas before 12.9 overwrites a matrix descriptor in it ({found[0]})")
    _RIGHT.add(compiled.hash)


def _look(cubin: bytes) -> list[str]:
    return list(importlib.import_module("relattn.kernels.gpu.descriptors").overwritten_in(cubin))


def _read(place: Path) -> list[str] | None:
    """What was found before; None if nobody looked, or the file is not one that was written to its end."""
    try:
        *lines, last = place.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return lines if last == _END else None
