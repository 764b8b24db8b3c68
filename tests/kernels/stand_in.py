"""A driver that stands in for a GPU's: relattn's own launches, on CPU tensors, as far as Triton's compiler, without a GPU.

    with stand_in("sm_90") as launched:
        relattn.relative_attention(query, key, value, rel_k, backend="triton")
    launched[0].name, launched[0].module      # the kernels in their order, and each one's Triton IR

Arguments, their specialisation and the choice of a configuration are those of a real launch; nothing runs, so results are arbitrary.
Triton's interpreter has no types: that a kernel compiles only shows here, or on a GPU. `without_gpu` lets others do more with a launch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend
from triton.runtime.driver import driver as driver_config

from relattn import backends
from relattn.backends import triton as gpu

Grid = tuple[int, int, int]
Run = Callable[[Grid, tuple[Any, ...]], None]  # of a kernel: (grid, arguments)


class Launch(NamedTuple):
    name: str
    module: str | None  # Triton's IR; None where nothing is compiled
    grid: Grid
    key: int  # the same for all launches of one compiled kernel


class _Driver:
    """What Triton asks of a driver before it compiles and launches."""

    def __init__(self, target: str) -> None:
        self.target = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Kernel(CompiledKernel):
    """One that is on no GPU: what would launch it calls `launch`."""

    packed_metadata = function = module = None

    def __init__(self, name: str, launch: Run) -> None:
        self.name, self.launch = name, launch

    def _init_handles(self) -> None:  # it would load the binary
        pass

    def launch_metadata(self, *_: object) -> None:
        return None

    def _run(self, x: int, y: int, z: int, stream: int, function: None, packed: None, metadata: None, *rest: Any) -> None:
        _, _, *arguments = rest  # hooks before and after the launch
        self.launch((x, y, z), tuple(arguments))


def _triton_ir(source: Any, target: GPUTarget, options: dict[str, Any]) -> str:
    """The first step of triton.compile, which finds what is wrong with a kernel's types, in a second instead of ten."""
    context, backend = ir.context(), make_backend(target)
    ir.load_dialects(context)
    backend.load_dialects(context)
    parsed = backend.parse_options(options)
    functions = backend.get_codegen_implementation(parsed)
    return str(source.make_ir(target, parsed, functions, backend.get_module_map(), context))


@contextlib.contextmanager
def without_gpu(make: Callable[[Any, GPUTarget, dict[str, Any]], Run], target: str = "sm_90", processors: int = 132) -> Iterator[None]:
    """Within it relattn's backend "triton" takes CPU tensors. make(source, target, options), in place of triton.compile: what a launch of
    that kernel does. processors: how many the GPU has, which decides how work is cut."""
    constants = gpu.Call._constants

    def compile(source, target, options, **_):
        return _Kernel(source.fn.__name__, make(source, target, options))

    def as_on_a_gpu(self, configuration):
        with mock.patch.object(gpu, "INTERPRETED", False):
            return constants(self, configuration)

    def forget() -> None:
        gpu.forget()
        for function in gpu._kernels().KERNELS.values():
            function.device_caches.clear()

    kept = driver_config._active
    driver_config.set_active(_Driver(target))
    try:
        with (
            mock.patch.object(triton.compiler, "compile", compile),
            mock.patch.object(gpu, "INTERPRETED", True),
            mock.patch.object(gpu, "_target", return_value=target),
            mock.patch.object(gpu, "_processors", return_value=processors),
            mock.patch.object(gpu.Call, "_constants", as_on_a_gpu),
            mock.patch.dict(backends.BACKENDS, {"triton": backends.BACKENDS["triton"]._replace(unavailable=lambda: None)}),
        ):
            forget()
            yield
    finally:
        forget()
        driver_config._active = kept


@contextlib.contextmanager
def stand_in(
    target: str = "sm_90", compiles: bool = True, processors: int = 132, error: Exception | None = None
) -> Iterator[list[Launch]]:  # fmt: skip
    """Within it relattn's backend "triton" takes CPU tensors and runs nothing. Not `compiles`: launches are only told apart. error: what
    the compiler raises."""
    launched: list[Launch] = []

    def make(source: Any, target: GPUTarget, options: dict[str, Any]) -> Run:
        if error is not None:
            raise error
        module = _triton_ir(source, target, options) if compiles else None

        def note(grid: Grid, arguments: tuple[Any, ...]) -> None:
            launched.append(Launch(source.fn.__name__, module, grid, id(note)))

        return note

    with without_gpu(make, target, processors):
        yield launched
