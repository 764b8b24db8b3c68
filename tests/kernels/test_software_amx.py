"""The native kernels' code for AMX, on processors without: compiled with the tile instructions in software, slow and otherwise the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from relattn.backends import cpu
from relattn.kernels.cpu import build
from tests.backends.test_cpu import extra_memory, memory_bound
from tests.fuzz import native_variants

ROOT = Path(__file__).resolve().parents[2]
HEADER = Path(__file__).with_name("software_amx.h")


def missing() -> str:
    """Why there is nothing to test here, or nothing to test it with."""
    if cpu.unavailable() is not None:
        return f"no native library: {cpu.unavailable()}"
    if "amx" in native_variants():
        return "this processor has AMX, and every test of the native kernels uses it"
    features = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return "" if "avx512_bf16" in features else "this processor lacks AVX-512's bfloat16"


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("software_amx")
    flags = {"CXXFLAGS": f"-include {HEADER} -DRELATTN_SOFTWARE_AMX", "RELATTN_BUILD_DIR": str(folder / "objects")}
    with pytest.MonkeyPatch.context() as patched:
        for name, value in flags.items():
            patched.setenv(name, value)
        patched.setattr(build, "VARIANTS", {name: build.VARIANTS[name] for name in ("portable", "amx")})
        report = build.build(folder)
    assert report["variants"] == ["portable", "amx"], report["reason"]
    return folder / build.LIBRARY


@pytest.mark.parametrize("calls", ["tests.fuzz", "tests.edges", "tests.hidden", "tests.distributed.parts"])
def test_calls(library: Path, calls: str) -> None:
    """Random ones, those at the edges, those whose hidden places hold anything, and parts of a call that are joined."""
    count = ["--count", "20"] if calls in ("tests.fuzz", "tests.hidden") else []
    done = subprocess.run(
        [sys.executable, "-m", calls, "--backend", "cpu", "--dtype", "bfloat16", *count],
        env=os.environ | {"RELATTN_CPU_LIBRARY": str(library), "RELATTN_CPU_VARIANT": "amx"},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of resident memory cannot be reset")
def test_memory_of_training_with_few_heads(library: Path) -> None:
    """Sums of the table's gradient are what it is made of: they are held once for each thread."""
    environment = {"RELATTN_CPU_LIBRARY": str(library), "RELATTN_CPU_VARIANT": "amx"}
    extra = extra_memory(1, 8192, "bfloat16", False, True, 2, window="(64, 64)", **environment)
    assert extra < memory_bound(1, 8192, "bfloat16", 2), f"{extra / 2**20:.1f} MiB"
