"""Runs a parsed kernel: programs one after the other, the threads of each side by side.

Control flow: while all threads are at the same place, a block runs for all of them. Where a branch divides them, each has its own place,
the block that comes first in the text runs for those at it, and they are one again where they meet (a barrier holds those that reach it).
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import tensor_core
from .bank_conflicts import BankConflicts
from .memory import SHARED_BASE, UNSIGNED, EmulatedFault, Findings, GlobalMemory, SharedMemory
from .parser import Block, Instruction, Kernel
from .translate import Translator

Grid = tuple[int, int, int]


class UndefinedRead(RuntimeError):
    """A program computes with a register that nothing has written."""


class _Guarded(np.ndarray):
    """A register that must not be computed with. A move passes it on."""

    error: Exception

    def _touched(self, *_, **__):
        raise self.error

    __array_ufunc__ = __array_function__ = astype = _touched


class InFlight(_Guarded):
    """What a wgmma will write: nobody may see it before wgmma.wait_group."""

    error = EmulatedFault("wgmma in flight: a result is read before its wait")


class Undefined(_Guarded):
    error = UndefinedRead("a register is read that nothing has written")


class Copy(NamedTuple):
    """A cp.async of the program's threads: elements of shared memory and what they will hold."""

    index: np.ndarray
    values: np.ndarray
    warp: np.ndarray
    line: int


class Product(NamedTuple):
    """A wgmma of the program's warps."""

    rows_read: list[tuple[np.ndarray, range]]  # of shared memory, and by which warps
    operands: dict[int, np.ndarray]  # registers that it reads, by number
    written: set[int]  # ids of the registers in flight
    line: int


class Program:
    """One program (CTA) while it runs. fill: a byte that registers hold at the start; None: reading them raises UndefinedRead."""

    def __init__(self, machine: Machine, place: Grid, grid: Grid, fill: int | None) -> None:
        self.machine, self.place, self.fill = machine, place, fill
        self.threads, self.memory, self.parameters = machine.kernel.threads, machine.memory, machine.parameters
        self.warps = self.threads // 32
        self.warp = np.repeat(np.arange(self.warps, dtype=np.int64), 32)
        self.shared = SharedMemory(machine.shared, self.warps, machine.findings, machine.conflicts)
        thread = np.arange(self.threads, dtype=np.uint32)
        zero = np.zeros(self.threads, np.uint32)
        self.special = {"%laneid": thread % 32, "%warpid": thread // 32, "%tid.x": thread, "%tid.y": zero, "%tid.z": zero}
        self.special |= {"%ntid.x": zero + np.uint32(self.threads), "%ntid.y": zero + np.uint32(1), "%ntid.z": zero + np.uint32(1)}
        for axis, index, size in zip("xyz", place, grid, strict=True):
            self.special |= {f"%ctaid.{axis}": zero + np.uint32(index), f"%nctaid.{axis}": zero + np.uint32(size)}
        self.copies: list[Copy] = []  # not committed
        self.copy_groups: list[list[Copy]] = []
        self.products: list[Product] = []
        self.product_groups: list[list[Product]] = []
        self.results: dict[int, tuple[InFlight, np.ndarray]] = {}  # by id: what a register in flight will hold
        self.fenced: list | None = None  # registers at the last wgmma.fence
        # Of each thread the number of the block where it is, or -1, if they are not all at one; and which wait at a barrier.
        self.places: np.ndarray | None = None
        self.waiting = np.zeros(self.threads, bool)

    # Control

    def run(self) -> None:
        blocks, registers = self.machine.kernel.blocks, self._undefined()
        number: int | None = 0
        while number is not None:
            mask = None
            if self.places is not None:
                ready = (self.places >= 0) & ~self.waiting
                number = int(self.places[ready].min())
                mask = ready & (self.places == number)
            self._block(number, registers, mask)
            number = self._next(blocks[number], number, registers, mask)
        if any(self.copies) or any(self.copy_groups):
            self.machine.findings.add("the program ends with cp.async in flight", 0)
        if self.products or self.product_groups:
            self.machine.findings.add("the program ends with wgmma in flight", 0)

    def _undefined(self) -> list[np.ndarray]:
        """The registers at the start, one array for all of a width."""
        kinds = {1: np.dtype(bool)} | {8 * width: np.dtype(unsigned) for width, unsigned in UNSIGNED.items()} | {128: np.dtype("V16")}
        arrays = {bits: np.zeros(self.threads, kind) for bits, kind in kinds.items()}
        if self.fill is None:
            arrays = {bits: array.view(Undefined) for bits, array in arrays.items()}
        else:
            for bits, array in arrays.items():
                array.view(np.uint8)[:] = self.fill & (1 if bits == 1 else 255)
        return [arrays[bits] for bits in self.machine.kernel.widths]

    def _block(self, number: int, registers: list, mask: np.ndarray | None) -> None:
        function, lines, name = self.machine.translator.block(number, mask is not None)
        try:
            function(self, registers, mask)
        except Exception as error:
            raise self._located(error, lines, name) from error

    def _next(self, block: Block, number: int, registers: list, mask: np.ndarray | None) -> int | None:
        """The block after this one for those that were there; None at the program's end."""
        last = block.instructions[-1] if block.instructions else None
        kind = "" if last is None else last.name
        following: int | np.ndarray = number + 1
        if kind in ("ret", "exit"):
            following = -1
        elif kind == "bra":
            following = block.target
            if last.guard is not None:
                following = np.where(registers[last.guard.number] ^ last.negated, block.target, number + 1)
        elif kind in ("bar", "barrier"):
            self._barrier(last, mask)
        if mask is None:
            self.places = np.broadcast_to(following, self.threads).copy()
        else:
            self.places[mask] = np.broadcast_to(following, self.threads)[mask]
        alive = self.places >= 0
        if (self.waiting | ~alive).all():
            self.shared.barrier()
            self.waiting[:] = False
        if (self.places == self.places[0]).all() and not self.waiting.any():
            number, self.places = int(self.places[0]), None
            return None if number < 0 else number
        return number

    def _barrier(self, last: Instruction, mask: np.ndarray | None) -> None:
        if last.opcode not in ("bar.sync", "barrier.sync", "barrier.sync.aligned", "bar.warp.sync"):
            raise NotImplementedError(last.opcode)
        if last.opcode == "bar.warp.sync":
            return
        if last.operands[0].value != 0 or (len(last.operands) > 1 and last.operands[1].value != self.threads):
            raise NotImplementedError(f"{last.opcode} of some of the threads")
        self.waiting |= True if mask is None else mask

    def _located(self, error: Exception, lines: list[int], name: str) -> Exception:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
        if not frames or isinstance(error, NotImplementedError):
            return error
        line = lines[frames[-1].lineno - 1]
        message = f"{self.machine.kernel.name}, program {self.place}, line {self.machine.kernel.place(line)}: {error}"
        return type(error)(message) if isinstance(error, (EmulatedFault, UndefinedRead)) else RuntimeError(message)

    def _active(self, mask) -> np.ndarray | slice:
        return slice(None) if mask is None else np.nonzero(mask)[0]

    def _whole_warps(self, mask, what: str) -> None:
        if mask is not None:
            by_warp = mask.reshape(-1, 32)
            if (by_warp.any(1) != by_warp.all(1)).any():
                raise EmulatedFault(f"{what} by a part of a warp")

    # Memory

    def load_shared(self, addresses, width, count, mask, line) -> list[np.ndarray]:
        active = self._active(mask)
        places, warp = addresses[active], self.warp[active]
        result = np.zeros((self.threads, count), UNSIGNED[width])
        if len(places):
            result[active] = self.shared.load(places, width * count, warp, line).view(UNSIGNED[width])
        return list(np.ascontiguousarray(result.T))

    def store_shared(self, addresses, values, width, mask, line) -> None:
        active = self._active(mask)
        places, warp = addresses[active], self.warp[active]
        if len(places):
            rows = np.ascontiguousarray(np.stack(values, 1)[active])
            self.shared.store(places, rows.view(np.uint8).reshape(len(rows), -1), warp, line)

    def load_global(self, addresses, width, count, mask, line) -> list[np.ndarray]:
        active = self._active(mask)
        places = addresses[active]
        result = np.zeros((self.threads, count), UNSIGNED[width])
        if len(places):
            result[active] = self.memory.load(places, width, count, "load", line, self.machine.findings)
        return list(np.ascontiguousarray(result.T))

    def store_global(self, addresses, values, width, mask, line) -> None:
        active = self._active(mask)
        places = addresses[active]
        if len(places):
            self.memory.store(places, np.stack(values, 1)[active], "store", line, self.machine.findings)

    def copy_async(self, to, of, width, size, mask, line) -> None:
        active = self._active(mask)
        places, sources, warp = to[active], of[active], self.warp[active]
        if not len(places):
            return
        values = np.zeros((len(places), width), np.uint8)
        wanted = np.full(len(places), width) if size is None else size[active].astype(np.int64)
        if ((wanted != 0) & (wanted != width)).any():
            raise NotImplementedError("cp.async of a part of its bytes")
        real = np.nonzero(wanted)[0]
        if len(real):
            element = min(width, 8)
            loaded = self.memory.load(sources[real], element, width // element, "cp.async", line, self.machine.findings)
            values[real] = np.ascontiguousarray(loaded).view(np.uint8).reshape(len(real), -1)
        index = self.shared.begin_copy(places, width, warp, line)
        self.copies.append(Copy(index, values, warp, line))

    def commit_copies(self, mask) -> None:
        self._whole(mask, "cp.async.commit_group")
        self.copy_groups.append(self.copies)
        self.copies = []

    def wait_copies(self, count, mask, line) -> None:
        self._whole(mask, "cp.async.wait_group")
        while len(self.copy_groups) > count:
            for copy in self.copy_groups.pop(0):
                self.shared.finish_copy(*copy)

    def _whole(self, mask, what: str) -> None:
        if mask is not None and not mask.all():
            raise NotImplementedError(f"{what} by a part of the program")

    def load_matrix(self, addresses, count, transposed, mask, line) -> list[np.ndarray]:
        self._whole_warps(mask, "ldmatrix")
        which = np.nonzero((np.arange(self.threads) % 32 < 8 * count) & (True if mask is None else mask))[0]
        rows = np.zeros((self.threads, 16), np.uint8)
        rows[which] = self.shared.load(addresses[which], 16, self.warp[which], line)
        return tensor_core.matrices_to_registers(rows, count, transposed)

    def store_matrix(self, addresses, values, transposed, mask, line) -> None:
        self._whole_warps(mask, "stmatrix")
        which = np.nonzero((np.arange(self.threads) % 32 < 8 * len(values)) & (True if mask is None else mask))[0]
        matrices = tensor_core.registers_to_matrices(values, transposed)
        rows = np.zeros((self.warps, 32, 16), np.uint8)
        rows[:, : 8 * len(values)] = matrices.reshape(self.warps, -1, 16)
        self.shared.store(addresses[which], rows.reshape(-1, 16)[which], self.warp[which], line)

    # Matrices

    def multiply(self, a, b, c, kind, mask) -> list[np.ndarray]:
        self._whole_warps(mask, "mma")
        return tensor_core.mma(a, b, c, kind)

    def wgmma_fence(self, registers: list) -> None:
        self.fenced = list(registers)

    def wgmma(self, registers, numbers, a, a_numbers, b, add, kind, columns, k, a_transposed, b_transposed, line) -> None:
        self._check_fence(registers, numbers, a_numbers, line)
        total = np.zeros((self.warps, 16, columns), np.float32)
        rows_read: list[tuple[np.ndarray, range]] = []
        for group in range(self.warps // 4):
            warps, threads = range(4 * group, 4 * group + 4), slice(128 * group, 128 * group + 128)
            if isinstance(a, list):
                left = tensor_core.a_fragment([register[threads] for register in a], kind).reshape(64, k)
            else:
                left = self._matrix(self._descriptor(a, threads), 64, k, kind, a_transposed, warps, line, rows_read)
            right = self._matrix(self._descriptor(b, threads), columns, k, kind, b_transposed, warps, line, rows_read)
            total[4 * group : 4 * group + 4] = (left @ right.T).reshape(4, 16, columns)
        if self._same_in_all(add):
            before = [registers[number] for number in numbers]
            total += tensor_core.c_matrix([self.results.get(id(register), (None, register))[1] for register in before])
        for number, value in zip(numbers, tensor_core.c_registers(total), strict=True):
            registers[number] = np.zeros(self.threads, np.uint32).view(InFlight)
            self.results[id(registers[number])] = registers[number], np.ascontiguousarray(value)
        operands = {number: registers[number] for number in a_numbers}
        self.products.append(Product(rows_read, operands, {id(registers[number]) for number in numbers}, line))

    def _check_fence(self, registers, numbers, a_numbers, line) -> None:
        if self.fenced is None:
            self.machine.findings.add("wgmma without wgmma.fence before it", line)
            return
        summed = {number for number in numbers if id(registers[number]) in self.results}  # by another wgmma, which needs no fence
        if any(registers[number] is not self.fenced[number] for number in {*numbers, *a_numbers} - summed):
            self.machine.findings.add("wgmma: a register was written after the last wgmma.fence", line)

    def _same_in_all(self, add: bool | np.ndarray) -> bool:
        if isinstance(add, bool):
            return add
        if add.any() != add.all():
            raise EmulatedFault("wgmma: scale-d differs between threads")
        return bool(add.all())

    def _descriptor(self, value: np.ndarray, threads: slice) -> int:
        if (value[threads] != value[threads][0]).any():
            raise EmulatedFault("wgmma: a matrix descriptor differs between threads of a group")
        return int(value[threads][0])

    def _matrix(self, descriptor, outer, k, kind, transposed, warps, line, rows_read) -> np.ndarray:
        size = tensor_core.element_bytes(kind)
        index = tensor_core.descriptor_places(descriptor, outer, k, size, transposed) - SHARED_BASE
        if index.min() < 0 or index.max() + size > self.shared.given:
            raise EmulatedFault(f"wgmma reads shared memory {index.min()} to {index.max() + size} of {self.shared.given} bytes")
        rows = np.unique(index // 16)
        self.shared.begin_multiply(rows, warps, line)
        rows_read.append((rows, warps))
        return tensor_core.to_float(self.shared.bytes.view(UNSIGNED[size])[index // size], kind)

    def wgmma_commit(self) -> None:
        self.product_groups.append(self.products)
        self.products = []

    def wgmma_wait(self, registers: list, count: int, line: int) -> None:
        ready: set[int] = set()
        while len(self.product_groups) > count:
            for product in self.product_groups.pop(0):
                ready |= product.written
                for rows, warps in product.rows_read:
                    self.shared.finish_multiply(rows, warps, product.line)
                if any(registers[number] is not value for number, value in product.operands.items()):
                    self.machine.findings.add("wgmma in flight: a register of its operand A is written before the wait", line, product.line)
        for number, register in enumerate(registers):
            if id(register) in ready:
                registers[number] = self.results[id(register)][1]
                if self.fenced is not None:
                    self.fenced[number] = registers[number]
        for result in ready:
            del self.results[result]

    def fence_proxy(self, mask) -> None:
        self._whole(mask, "fence.proxy.async")
        self.shared.fence_proxy()

    # Warps

    def shuffle(self, mode, value, lane, clamp, mask) -> tuple[np.ndarray, np.ndarray]:
        self._whole_warps(mask, "shfl")
        own = np.arange(self.threads, dtype=np.int64) % 32
        lane, clamp = lane.astype(np.int64) & 31, clamp.astype(np.int64)
        segment, limit = (clamp >> 8) & 31, clamp & 31
        highest, lowest = (own & segment) | (limit & ~segment), own & segment
        if mode == "bfly":
            source = own ^ lane
            valid = source <= highest
        elif mode == "up":
            source = own - lane
            valid = source >= highest
        elif mode == "down":
            source = own + lane
            valid = source <= highest
        else:
            source = lowest | (lane & ~segment)
            valid = source <= highest
        source = np.where(valid, source, own)
        return value[source + 32 * self.warp], valid

    def vote(self, mode, value, mask) -> np.ndarray:
        self._whole_warps(mask, "vote")
        by_warp = value.reshape(-1, 32)
        if mode == "ballot":
            return np.repeat((by_warp.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32), 32)
        result = by_warp.any(1) if mode == "any" else by_warp.all(1) if mode == "all" else by_warp.all(1) | ~by_warp.any(1)
        return np.repeat(result, 32)

    def reduce(self, mode, value, mask) -> np.ndarray:
        self._whole_warps(mask, "redux")
        bitwise = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
        operation = ({"add": np.add, "min": np.minimum, "max": np.maximum} | bitwise)[mode]
        return np.repeat(operation.reduce(value.reshape(-1, 32), axis=1, dtype=value.dtype), 32)


class Machine:
    """A kernel ready to be launched: `launch(grid, arguments, memory)`. What it finds adds up over launches.

    shared: bytes of dynamic shared memory; conflicts: what counts them, if wanted.
    """

    def __init__(self, kernel: Kernel, shared: int, conflicts: BankConflicts | None = None) -> None:
        self.kernel, self.shared, self.conflicts = kernel, shared, conflicts
        self.translator, self.findings = Translator(kernel), Findings()
        self.undefined = ""  # where it reads a register that nothing has written

    def launch(self, grid: Grid, arguments: list, memory: GlobalMemory, choose: Callable[[Grid], bool] | None = None) -> None:
        """arguments: numbers, in the order of the parameters. choose(program): whether to run it; None = all.

        Reading a register that nothing has written is no mistake where nothing comes of it: two runs that found other things there must
        agree on every byte. Ones are no number in every floating type, and zeros are one.
        """
        if len(arguments) != len(self.kernel.parameters):
            raise ValueError(f"{self.kernel.name} takes {len(self.kernel.parameters)} arguments, not {len(arguments)}")
        self.memory, self.parameters = memory, {}
        for (kind, name), value in zip(self.kernel.parameters, arguments, strict=True):
            self.parameters[name] = self._parameter(kind, value)
        before = memory.contents()
        if not self.undefined:
            try:
                self._run(grid, choose, None)
                return
            except UndefinedRead as error:
                self.undefined = str(error)
                memory.put_back(before)
        self._run(grid, choose, 0)
        with_zeros = memory.contents()
        memory.put_back(before)
        self._run(grid, choose, 255)
        if any((one != other).any() for one, other in zip(with_zeros, memory.contents(), strict=True)):
            self.findings.add("what a register holds that nothing has written reaches memory", 0, 0, self.undefined)

    def _parameter(self, kind: str, value: int | float) -> np.ndarray:
        size = int(kind[1:]) // 8
        if kind[0] == "f":
            bits = np.array([value], f"f{size}").view(f"u{size}")
        else:
            bits = np.array([int(value) & ((1 << 8 * size) - 1)], f"u{size}")
        return np.broadcast_to(bits, self.kernel.threads).copy()

    def _run(self, grid: Grid, choose: Callable[[Grid], bool] | None, fill: int | None) -> None:
        with np.errstate(all="ignore"):
            for z, y, x in itertools.product(*(range(size) for size in reversed(grid))):
                self.memory.program += 1
                if choose is None or choose((x, y, z)):
                    Program(self, (x, y, z), grid, fill).run()
                    if self.conflicts is not None:
                        self.conflicts.programs += 1
