"""What the Triton backend costs the host in a call: `python -m benchmarks.launches [--json FILE]`. No GPU is needed.

Kernels are compiled for an H100 and go through Triton's own launcher, to a stand-in for CUDA's driver library that says yes to everything.
So the figures are those of Python, of the launcher and of torch's allocator on a CPU, in microseconds of one thread's CPU time; what the
driver and the GPU take comes on top. Needs a C compiler (cc), as Triton does.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Of the driver's functions that Triton's launchers call, those that give something back; the others only succeed.
_GIVE_BACK = """
#include <stdint.h>
int launches;
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int number) { *device = 0; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 10 ? 32 : attribute == 16 ? 132 : 232448; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)16; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)16; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)16; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)16; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
int cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) { *(uint64_t *)value = pointer; return 0; }
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "none"; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) { launches++; return 0; }
"""
_SUCCEED = (
    "Init", "CtxSetCurrent", "CtxSetLimit", "CtxGetLimit", "ModuleUnload", "FuncSetAttribute", "FuncSetCacheConfig",
    "OccupancyMaxActiveClusters", "TensorMapEncodeTiled", "TensorMapEncodeIm2col", "LaunchKernel", "LaunchCooperativeKernel",
)  # fmt: skip
_SHAPES = ((64, None), (128, None), (64, 64))  # head size, clip
_HEADS, _LENGTH = (2, 12), 512  # (B, H)


def build(folder: Path) -> Path:
    """The driver library that stands in."""
    source = folder / "driver.c"
    source.write_text(_GIVE_BACK + "".join(f"int cu{name}(void) {{ return 0; }}\n" for name in _SUCCEED), encoding="utf-8")
    library = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", f"-Wl,-soname,{library.name}", "-o", library, source], check=True)
    (folder / "libcuda.so").symlink_to(library.name)
    return library


def microseconds(function: Callable[[], object]) -> float:
    """CPU time of a call, the least of several rounds: others on the machine do not count."""
    for _ in range(10):
        function()
    rounds = []
    for _ in range(7):
        began = time.thread_time()
        for _ in range(100):
            function()
        rounds.append((time.thread_time() - began) * 1e4)
    return min(rounds)


def measure(library: Path) -> dict[str, dict[str, float]]:
    """By head size and clip: microseconds of the backend's forward and backward, first and repeated calls, and launches."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.driver import driver

    from relattn.arguments import Settings, Tensors
    from relattn.backends import triton as backend_module

    backend: Any = backend_module  # parts of it are replaced

    class Driver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_current_device, self.get_current_stream = (lambda: 0), (lambda device: 0)
            self.get_device_capability, self.set_current_device = (lambda device=0: (9, 0)), (lambda device: None)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    driver.set_active(Driver())
    backend._target, backend._processors = (lambda device: "sm_90"), (lambda device: 132)
    backend._tile_bytes = lambda device: 2**29
    counter = ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "launches")
    torch.set_num_threads(1)
    results = {}
    for size, given in _SHAPES:
        clip = _LENGTH - 1 if given is None else given
        shapes = ((*_HEADS, _LENGTH, size),) * 3 + ((2 * clip + 1, size),)
        tensors = Tensors(*(torch.randn(shape, dtype=torch.bfloat16) for shape in shapes))
        settings = Settings(clip, clip, False, None, None, 0, 0.0, size**-0.5)
        seed, needs = torch.empty((0,), dtype=torch.int64), [True] * 4 + [False] * 6
        call = tensors, settings
        output, lse = backend.forward(*call, seed)

        def forward(call=call, seed=seed):
            return backend.forward(*call, seed)

        def gradients(call=call, seed=seed, output=output, lse=lse, needs=needs):
            return backend.backward(output, None, *call, output, lse, seed, needs)

        gradients()
        started = counter.value
        forward(), gradients()
        launches = counter.value - started
        for tape in backend._TAPES.values():
            tape.by_address = True
        times = {"forward": microseconds(forward), "backward": microseconds(gradients)}
        kept = backend._TAPES.copy()

        def first(function, kept=kept):
            backend._TAPES.clear()
            function()
            backend._TAPES.update(kept)

        times |= {"first forward": microseconds(lambda: first(forward)), "first backward": microseconds(lambda: first(gradients))}
        results[f"D {size}, clip {given}"] = {name: round(value, 1) for name, value in times.items()} | {"launches": launches}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the figures go, too")
    parser.add_argument("--library", type=Path, help=argparse.SUPPRESS)  # the process that measures
    options = parser.parse_args()
    if options.library is None:  # the loader reads its path when a process starts
        with tempfile.TemporaryDirectory() as folder:
            library = build(Path(folder))
            paths = {"LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}", "TRITON_LIBCUDA_PATH": folder}
            command = [sys.executable, "-m", "benchmarks.launches", "--library", str(library), *sys.argv[1:]]
            raise SystemExit(subprocess.run(command, env=os.environ | paths, check=False).returncode)
    import triton

    results = measure(options.library)
    print(f"Triton {triton.__version__}, L = {_LENGTH}, bfloat16, B and H {_HEADS}: microseconds of CPU time")
    print(f"{'':18}{'forward':>10}{'backward':>10}{'first':>10}{'first':>10}{'launches':>10}")
    for name, row in results.items():
        columns = ("forward", "backward", "first forward", "first backward", "launches")
        print(f"{name:18}" + "".join(f"{row[column]:10}" for column in columns))
    if options.json is not None:
        options.json.write_text(json.dumps({"triton": triton.__version__, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
