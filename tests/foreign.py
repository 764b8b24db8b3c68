"""Random calls by the native CPU kernels of another architecture: cross-compiled, and run in an emulator of its processor.

    python -m tests.foreign --dtype bfloat16 --count 300      # AArch64, where the portable kernels become NEON

Python and torch stay those of this machine: what the library would be handed is sent to a program that has it loaded (foreign.cpp), and
what it wrote is fetched. On Debian: apt-get install g++-aarch64-linux-gnu qemu-user.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from relattn.backends import cpu
from relattn.kernels.cpu import build
from tests import fuzz

ROOT = Path(__file__).resolve().parents[1]
TARGET = "aarch64-linux-gnu"
COMPILER, EMULATOR = f"{TARGET}-g++", "qemu-aarch64"


def missing() -> str | None:
    """What this machine lacks."""
    lacking = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
    return f"no {', '.join(lacking)}" if lacking else cpu.unavailable()


def compiled() -> tuple[Path, Path]:
    """The driver and the library; what has not changed is not compiled again."""
    out = ROOT / "build" / TARGET
    with mock.patch.dict(os.environ, {"CXX": COMPILER, "RELATTN_BUILD_DIR": str(out / "objects")}):
        report = build.build(out)
    assert report["variants"] == ["portable"], report
    source, driver = Path(__file__).with_suffix(".cpp"), out / "driver"
    if not driver.exists() or driver.stat().st_mtime < source.stat().st_mtime:
        subprocess.run([COMPILER, "-std=c++17", "-O1", str(source), "-o", str(driver)], check=True)
    return driver, out / build.LIBRARY


class Foreign:
    """Stands for the library: the same two functions."""

    def __init__(self, driver: Path, library: Path) -> None:
        command = [EMULATOR, "-L", f"/usr/{TARGET}", str(driver), str(library)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.tensors: list[Tensor] = []
        self.calls = 0

    def relattn_forward(self, call: bytes, numbers: bytes) -> int:
        return self._ask(0, call, numbers)

    def relattn_backward(self, call: bytes, numbers: bytes) -> int:
        return self._ask(1, call, numbers)

    def _ask(self, function: int, call: bytes, numbers: bytes) -> int:
        """With the memory of `tensors`, all that the addresses point to."""
        memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in self.tensors}
        regions = list(memory)
        places = []
        for tensor in self.tensors:
            start = tensor.untyped_storage().data_ptr()
            places += [regions.index(start), tensor.data_ptr() - start]
        plain = len(numbers) // 8 - len(self.tensors)
        assert struct.unpack(f"{len(self.tensors)}q", numbers[8 * plain :]) == tuple(tensor.data_ptr() for tensor in self.tensors)
        assert self.process.stdin is not None
        head = struct.pack("5q", function, len(call), plain, len(self.tensors), len(regions))
        self.process.stdin.write(head + call + numbers[: 8 * plain])
        self.process.stdin.write(struct.pack(f"{len(places)}q", *places))
        for start, size in memory.items():
            self.process.stdin.write(struct.pack("q", size) + ctypes.string_at(start, size))
        self.process.stdin.flush()
        (status,) = struct.unpack("q", self._read(8))
        for start, size in memory.items():
            ctypes.memmove(start, self._read(size), size)
        self.calls += 1
        return status

    def _read(self, size: int) -> bytes:
        assert self.process.stdout is not None
        found = self.process.stdout.read(size)
        if len(found) < size:
            raise RuntimeError(f"the program in the emulator ended, with status {self.process.wait()}")
        return found


@contextlib.contextmanager
def foreign() -> Iterator[Foreign]:
    """Within it, backend "cpu" runs there."""
    library, run = Foreign(*compiled()), cpu.Plan._run

    def recorded(self, function, call, tensors, *others) -> None:
        library.tensors = [tensor.clone() if tensor._is_zerotensor() else tensor for tensor in self._convert(tensors)]
        run(self, function, call, library.tensors, *others)

    try:
        with mock.patch.object(cpu, "_library", library), mock.patch.object(cpu.Plan, "_run", recorded):
            yield library
    finally:
        library.process.kill()
        library.process.wait()


def check(call: fuzz.Call, backend: str, dtype: torch.dtype) -> None:
    assert backend == "cpu", "only the native kernels are compiled for elsewhere"
    fuzz.check(call, backend, dtype)


if __name__ == "__main__":
    if reason := missing():
        raise SystemExit(f"{reason}: see tests/foreign.py")
    with foreign():
        fuzz.command(__doc__, lambda seed, _: fuzz.call_of(seed, "cpu"), f"in {EMULATOR} ", check, count=100, backend="cpu")
