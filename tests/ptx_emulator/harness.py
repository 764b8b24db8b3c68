"""relattn's Triton kernels, as Triton compiles them for an NVIDIA GPU, in the emulator: on CPU tensors, by relattn's own launches.

    with emulated("sm_90") as session:
        output = relattn.relative_attention(query, key, value, rel_k, backend="triton")
    session.findings()
    session.machines["forward_kernel 6dc552bf"].kernel.lines        # its PTX
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton
from packaging.version import Version
from triton.backends.compiler import GPUTarget
from triton.runtime.errors import OutOfResources

from relattn.kernels.gpu import configs
from tests.kernels.stand_in import Grid, Run, without_gpu

from .bank_conflicts import BankConflicts
from .machine import Machine
from .memory import GlobalMemory
from .parser import parse

# Between cp.async and wgmma, Triton 3.6 puts no fence.proxy.async; 3.7.1 and 3.8, which have its pull request 9610, leave some out; in 3.9
# they all are there. CUTLASS has none there on Hopper; the PTX ISA asks for them.
_FENCES_COPIES = Version(triton.__version__) >= Version("3.9")
_OF_TRITON = set[str]() if _FENCES_COPIES else {"async proxy: wgmma reads what cp.async wrote, without fence.proxy.async"}


class Session:
    """What ran: a Machine for each compiled kernel, by its name and the beginning of its hash.

    edit(kernel, ptx): its PTX as it is to run; choose(kernel, program, grid): whether a program runs (where not all do, results are
    incomplete); count: wavefronts of shared memory.
    """

    def __init__(
        self,
        edit: Callable[[str, str], str] = lambda name, ptx: ptx,
        choose: Callable[[str, Grid, Grid], bool] = lambda name, program, grid: True,
        count: bool = False,
    ) -> None:
        self.edit, self.choose, self.count = edit, choose, count
        self.machines: dict[str, Machine] = {}
        self.launches: list[tuple[str, Grid]] = []

    def make(self, source: Any, target: GPUTarget, options: dict[str, Any]) -> Run:
        """Compile a kernel; what a launch of it does."""
        compiled = triton.compile(source, target=target, options=options)
        metadata, name, kinds = compiled.metadata, compiled.metadata.name, list(source.signature.values())
        room = configs.SHARED_MEMORY[f"sm_{target.arch}"]
        if metadata.shared > room:
            raise OutOfResources(metadata.shared, room, "shared memory")
        key = f"{name} {compiled.hash[:8]}"
        kernel = parse(self.edit(name, compiled.asm["ptx"]))
        machine = self.machines.setdefault(key, Machine(kernel, metadata.shared, BankConflicts() if self.count else None))

        def run(grid: Grid, arguments: tuple[Any, ...]) -> None:
            memory = GlobalMemory()
            values = [value for one, kind in zip(arguments, kinds, strict=True) for value in _values(one, kind, memory)]
            values += [0] * (len(kernel.parameters) - len(values))  # scratch memory that no kernel here asks for
            self.launches.append((key, grid))
            machine.launch(grid, values, memory, lambda program: self.choose(name, program, grid))

        return run

    def findings(self) -> list[str]:
        return [f"{key}: {line}" for key, kind, line in self._found() if kind not in _OF_TRITON]

    def remarks(self) -> list[str]:
        """What is no finding: mistakes of the compiler that are known, reads of undefined registers of which nothing came."""
        known = [f"{key}: known of this version of Triton: {kind}" for key, kind, _ in self._found() if kind in _OF_TRITON]
        return known + [f"of no consequence: {machine.undefined}" for machine in self.machines.values() if machine.undefined]

    def _found(self) -> Iterator[tuple[str, str, str]]:
        for key, machine in self.machines.items():
            for kind, line in machine.findings.report(machine.kernel.place).items():
                yield key, kind, line

    def conflicts(self) -> list[str]:
        machines = ((key, machine) for key, machine in self.machines.items() if machine.conflicts is not None)
        return [f"{key}: {line}" for key, machine in machines for line in machine.conflicts.report(machine.kernel)]


def _values(argument: Any, kind: Any, memory: GlobalMemory) -> Iterator[int | float]:
    """An argument as parameters of the PTX; a tensor's buffer becomes part of the memory."""
    if isinstance(kind, (tuple, list)):
        for one, one_kind in zip(argument, kind, strict=True):
            yield from _values(one, one_kind, memory)
    elif kind == "constexpr":
        return
    elif not kind.startswith("*"):
        yield argument
    elif argument is None:
        yield 0
    else:
        storage = argument.untyped_storage()
        data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy() if storage.nbytes() else np.zeros(0, np.uint8)
        memory.add(storage.data_ptr(), data, f"{kind} {tuple(argument.shape)}")
        yield argument.data_ptr()


@contextlib.contextmanager
def emulated(target: str = "sm_90", processors: int = 2, **options: Any) -> Iterator[Session]:
    """Within it relattn's backend "triton" takes CPU tensors. processors: of the GPU; options: of Session.

    relattn believes that it is interpreted, which changes how it cuts the work, and nothing else.
    """
    session, deterministic = Session(**options), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # empty tensors then hold what is not a number
    try:
        with without_gpu(session.make, target, processors):
            yield session
    finally:
        torch.use_deterministic_algorithms(deterministic)
