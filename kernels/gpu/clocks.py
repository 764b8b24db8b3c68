"""Clocks that the inner loops of a compiled kernel take on one SM, from its machine code (SASS). No GPU is needed: it ranks configurations.

The instructions of a loop run through a model of the SM: four schedulers that issue one instruction a clock each, warps that issue in order
and wait for the registers they read, pipes that are busy, barriers that hold a program's warps together, wgmma that runs behind a warp's
back. `python -m relattn.kernels.gpu.resources --clocks` prints what comes of it.

Spilled registers cost four times as much where an SM's do not fit into the L1 cache, that is what programs leave of the memory they share
with it.

Not modelled, and all of it makes kernels slower than this says: bank conflicts of shared memory; what spilled registers displace in the L1
cache, and how long they take from the L2 cache; the bandwidth of memory and of the L2 cache (bytes are counted, no more); stores that wait
for it; the instruction cache; a program's beginning and end, and the last programs of a grid. Differences under ten per cent mean nothing.
A chip's numbers are its data sheet's, latencies and the rate of mma.sync on sm_90 those that others measured; kernels/README.md has
measurements beside the model. sm_100's matrix instructions (tcgen05) and AMD's chips are not modelled: of these only `programs` is known.
"""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import triton

SCHEDULERS = 4
REGISTERS = 65536  # of an SM
WAVEFRONT = 128  # bytes of shared memory a clock, of the SM
SHARED_QUEUE = 48  # accesses that may stand in line before a warp has to wait to issue one
GLOBAL_LATENCY = 300  # loads hit the L2 cache
WGMMA_FMA = 2048  # a clock, of the SM
WGMMA_LATENCY, SHARED_OF_WGMMA = 25, 8
BARRIER_LATENCY, FENCE_LATENCY, PREDICATE_LATENCY, BRANCH_CLOCKS = 22, 15, 6, 8
LONG_MASKING = 60  # instructions
MISS = 4  # what a spilled register costs that misses the L1 cache: the L2 cache gives an SM about 32 bytes a clock


class Kind(Enum):
    """What happens to an instruction when it issues."""

    FREE = "free"  # takes an issue slot, and nothing else that is modelled
    FMA = "fma"
    ALU = "alu"
    MUFU = "mufu"
    TENSOR = "tensor"  # mma.sync
    SHARED = "shared"  # shared memory and the load/store unit
    GLOBAL_LOAD = "global load"
    WGMMA = "wgmma"
    WGMMA_WAIT = "wgmma wait"
    BARRIER = "barrier"
    FENCE = "fence"


class Chip(NamedTuple):
    memory: int  # bytes of an SM for shared memory and the L1 cache
    shared: int  # of these at most for shared memory; a program takes 1024 more than it asks for
    warps: int  # that an SM holds
    programs: int
    fma: float = 1  # clocks that a warp's instruction keeps its scheduler's pipe busy
    alu: float = 2
    mma: float = 16  # of an mma.sync of 16 x 8 x 16, float32 sums

    @property
    def pipes(self) -> dict[Kind, tuple[float, float]]:
        """Clocks of an instruction, and how many before its turn it may issue."""
        return {Kind.FMA: (self.fma, 0), Kind.ALU: (self.alu, 0), Kind.MUFU: (8, 8), Kind.TENSOR: (self.mma, 8)}


# sm_80: an A100. sm_89, sm_120: the professional cards; GeForce's take twice the clocks for an mma.sync. sm_90: mma.sync reaches 62 % of
# what wgmma does.
CHIPS = {
    "sm_80": Chip(196608, 167936, 64, 32, fma=2, mma=8),
    "sm_89": Chip(131072, 102400, 48, 24),
    "sm_90": Chip(262144, 233472, 64, 32, mma=6.4),
    "sm_100": Chip(262144, 233472, 64, 32),
    "sm_120": Chip(131072, 102400, 48, 24, alu=1),
}


def modelled(target: str) -> bool:
    return target in CHIPS and target != "sm_100"


def programs(target: str, registers: int, shared: int, warps: int) -> int:
    """How many programs an SM (a CU) has at once; registers of a thread, bytes of shared memory of a program."""
    if target not in CHIPS:  # gfx942: four SIMDs with 512 registers a lane
        return min(4 * min(8, 512 // max(registers, 1)) // warps, 65536 // max(shared, 1))
    chip = CHIPS[target]
    of_warp = -(-registers // 8) * 8 * 32
    return min(REGISTERS // (of_warp * warps), chip.shared // (shared + 1024), chip.warps // warps, chip.programs)


def spills_miss(target: str, stack: int, shared: int, warps: int, count: int) -> bool:
    """Whether the spilled registers of `count` programs, stack bytes a thread, are more than the L1 cache holds."""
    return count * 32 * warps * stack > CHIPS[target].memory - count * (shared + 1024)


# ---- machine code ----

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;", re.MULTILINE)
_MATRIX = ("HGMMA", "HMMA")
_MEMORY = ("LDS", "LDSM", "STS", "STSM", "LDGSTS", "LDG", "STG", "LDL", "STL", "SHFL")
_HEAVY = frozenset((*_MATRIX, *_MEMORY, "BAR", "MUFU")) - {"LDL", "STL", "SHFL"}  # what a branch over mere masking does not hold
_FREE = frozenset((
    "S2UR", "BRA", "BSSY", "BSYNC", "CALL", "RET", "BREAK", "EXIT", "WARPSYNC", "WARPGROUP", "LDGDEPBAR", "DEPBAR", "FENCE", "NOP", "YIELD",
    "ERRBAR", "CCTL", "ELECT", "VOTE", "VOTEU", "NANOSLEEP",
))  # fmt: skip


class Instruction(NamedTuple):
    address: int
    guard: str  # the predicate it depends on, "" if none
    opcode: str
    operands: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def goes_to(self) -> int | None:
        """The address that it may or does go on at."""
        return int(self.operands[-1], 16) if self.name == "BRA" and self.operands[-1].startswith("0x") else None


def cuobjdump(cubin: bytes, option: str) -> str:
    """What the CUDA toolkit's program, which Triton brings, prints of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def parse(sass: str) -> list[Instruction]:
    """What `cuobjdump -sass` prints."""
    return [
        Instruction(int(address, 16), guard, opcode, tuple(operand.strip() for operand in rest.split(",")) if rest else ())
        for address, guard, opcode, rest in _LINE.findall(sass)
    ]


def product_loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The innermost of the loops that multiply matrices, in the order of the code: with matrix instructions, or, where the code has none
    (exact float32), with hundreds of multiply-adds."""
    places = {instruction.address: place for place, instruction in enumerate(code)}
    matrix, least = (_MATRIX, 1) if any(instruction.name in _MATRIX for instruction in code) else (("FFMA",), 200)
    spans = []
    for last, instruction in enumerate(code):
        target = instruction.goes_to
        if target is not None and target < instruction.address and target in places:
            first = places[target]
            if sum(inner.name in matrix for inner in code[first : last + 1]) >= least:
                spans.append((first, last))
    innermost = [span for span in spans if not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in spans)]
    return [list(code[first : last + 1]) for first, last in sorted(innermost)]


def usual_path(loop: Sequence[Instruction]) -> list[Instruction]:
    """The instructions of an iteration over a whole tile. Branches are taken where they are unconditional, or leave out many instructions
    of which none touches memory or a matrix: the masking of an edge."""
    places = {instruction.address: place for place, instruction in enumerate(loop)}
    path, place = [], 0
    while place < len(loop):
        instruction = loop[place]
        path.append(instruction)
        following, target = place + 1, places.get(-1 if instruction.goes_to is None else instruction.goes_to, 0)
        if target > following:
            left_out = loop[following:target]
            masking = len(left_out) > LONG_MASKING and not any(inner.name in _HEAVY for inner in left_out)
            always = not instruction.guard and len(instruction.operands) == 1
            if always or masking:
                following = target
        place = following
    return path


# ---- what an instruction asks of the SM ----

_REGISTER, _PREDICATE = re.compile(r"\bR(\d+)"), re.compile(r"\bP\d\b")


@dataclass
class Operation:
    kind: Kind
    latency: float = 4
    writes: list[str | int] = field(default_factory=list)  # registers by number, predicates by name
    reads: list[str | int] = field(default_factory=list)
    wavefronts: float = 0.0  # of shared memory, for the warp
    clocks: float = 0.0  # of a wgmma


def _span(operand: str, count: int) -> list[str | int]:
    match = _REGISTER.search(operand)
    return list(range(int(match[1]), int(match[1]) + count)) if match else []


def _named(*operands: str) -> list[str | int]:
    """Registers and predicates that operands name."""
    found: list[str | int] = []
    for operand in operands:
        found += _span(operand, 2 if ".64" in operand else 1) + _PREDICATE.findall(operand)
        found += [int(number) for number in _REGISTER.findall(operand)[1:]]
    return found


def _memory(name: str, opcode: str, operands: Sequence[str]) -> Operation:
    """Loads, stores, shuffles: a wavefront per 4 bytes of a lane."""
    words = 4 if ".128" in opcode else 2 if ".64" in opcode else 1
    if name in ("LDSM", "STSM"):
        words = int(opcode[-1]) if opcode[-2] == "." else 1
    if name in ("STS", "STSM", "STG", "STL"):
        data = [register for operand in operands[1:] for register in _span(operand, words)]
        return Operation(Kind.SHARED, 0, [], _named(operands[0]) + data, words)
    if name == "LDGSTS":
        return Operation(Kind.SHARED, 0, [], _named(*operands), words)
    if name == "SHFL":  # the first operand says whether the lane was there
        return Operation(Kind.SHARED, 24, _span(operands[1], 1), _named(*operands[2:]), 1)
    latency = {"LDS": 30, "LDSM": 33, "LDL": 35, "LDG": GLOBAL_LATENCY}[name]
    kind, wavefronts = (Kind.GLOBAL_LOAD, 0) if name == "LDG" else (Kind.SHARED, words)
    return Operation(kind, latency, _span(operands[0], words), _named(*operands[1:]), wavefronts)


def _wgmma(opcode: str, operands: Sequence[str]) -> Operation:
    """Of one warp's part: its 16 rows of the first operand, and a quarter of the second, which the warpgroup reads once."""
    columns = int(re.search(r"\.\d+x(\d+)x\d+", opcode)[1])  # type: ignore[index]
    first = 0 if all(re.match(r"R\d+", operand) for operand in operands[:2]) else 16 * 16 * 2
    return Operation(Kind.WGMMA, wavefronts=(columns * 16 * 2 / 4 + first) / WAVEFRONT, clocks=64 * columns * 16 / WGMMA_FMA)


def _arithmetic(opcode: str, operands: Sequence[str]) -> Operation:
    first = operands[0] if operands else ""
    operation = Operation(Kind.ALU, 4, _span(first, 2 if "WIDE" in opcode or ".64" in opcode else 1) + _PREDICATE.findall(first))
    sources = 1
    if opcode.startswith(("ISETP", "FSETP", "PLOP3")):
        operation.writes, sources = [name for operand in operands[:2] for name in _PREDICATE.findall(operand)], 2
    operation.reads = _named(*operands[sources:])
    if opcode.startswith(("FADD", "FMUL", "FFMA", "IMAD", "HFMA2", "HADD2", "HMUL2")):
        operation.kind, operation.latency = Kind.FMA, 5 if "WIDE" in opcode else 4
    if any(isinstance(name, str) for name in operation.writes):
        operation.latency += PREDICATE_LATENCY + 2 * (operation.kind is Kind.ALU)
    return operation


def decode(instruction: Instruction) -> Operation:
    name, opcode, operands = instruction.name, instruction.opcode, instruction.operands
    if name == "HGMMA":
        operation = _wgmma(opcode, operands)
    elif name == "HMMA":
        reads = _span(operands[1], 4) + _span(operands[2], 2) + _span(operands[3], 4)
        operation = Operation(Kind.TENSOR, 33, _span(operands[0], 4), reads)
    elif name in _MEMORY:  # an LDS of nothing is a wait
        operation = Operation(Kind.FREE) if operands == ("RZ", "[RZ]") else _memory(name, opcode, operands)
    elif name == "MUFU":
        operation = Operation(Kind.MUFU, 20, _span(operands[0], 1), _named(*operands[1:]))
    elif name == "BAR":
        operation = Operation(Kind.BARRIER)
    elif name == "MEMBAR":
        operation = Operation(Kind.FENCE)
    elif name == "WARPGROUP" and "DEPBAR" in opcode:
        operation = Operation(Kind.WGMMA_WAIT)
    elif name in ("S2R", "LDC"):
        operation = Operation(Kind.FREE, 25 if name == "S2R" else 30, _span(operands[0], 1))
    elif name == "R2UR":
        operation = Operation(Kind.FREE, reads=_named(*operands[1:]))
    elif name in _FREE or name.startswith("U"):
        operation = Operation(Kind.FREE)
    else:
        operation = _arithmetic(opcode, operands)
    operation.reads += _PREDICATE.findall(instruction.guard)
    return operation


# ---- the SM ----


def busy(path: Sequence[Operation], warps: int, chip: Chip) -> dict[str, float]:
    """Clocks that an iteration of one program keeps each pipe of the SM busy: the largest is a lower bound of its time."""
    share = warps / SCHEDULERS
    found = {kind.value: clocks * share * sum(operation.kind is kind for operation in path) for kind, (clocks, _) in chip.pipes.items()}
    found["tensor"] += share * sum(operation.clocks for operation in path)
    return found | {"issue": share * len(path), "shared": warps * sum(operation.wavefronts for operation in path)}


@dataclass
class _Warp:
    number: int
    place: int = 0
    known: dict[str | int, float] = field(default_factory=dict)  # when registers and predicates are there
    last_access: float = 0.0  # to shared memory
    products: deque[Operation] = field(default_factory=deque)  # wgmma not begun yet
    multiplying: bool = False
    product_end: float = 0.0
    parked: float | None = None  # since when it waits for its products
    finished: list[float] = field(default_factory=list)  # when its iterations ended


class _Sm:
    """`count` programs of some warps each that run `path` as often as `iterations` says."""

    def __init__(self, path: Sequence[Operation], warps: int, count: int, iterations: int, chip: Chip) -> None:
        self.path, self.warps, self.iterations, self.pipes = path, warps, iterations, chip.pipes
        self.all = [_Warp(number) for number in range(warps * count)]
        self.issue = [0.0] * SCHEDULERS
        self.free = {kind: [0.0] * SCHEDULERS for kind in self.pipes}
        self.shared = 0.0
        self.waiting: list[list[tuple[float, _Warp]]] = [[] for _ in range(count)]  # at a barrier
        # (clock, number): a warp that may issue, or, its number plus that of all warps, one whose next wgmma may begin
        self.events = [(number // warps * 211.0 + number % warps * 3, number) for number in range(len(self.all))]

    def run(self) -> None:
        heapq.heapify(self.events)
        while self.events:
            clock, number = heapq.heappop(self.events)
            if number >= len(self.all):
                self._begin_product(clock, self.all[number - len(self.all)])
            else:
                self._step(clock, self.all[number])

    def _at(self, clock: float, warp: _Warp, product: bool = False) -> None:
        heapq.heappush(self.events, (clock, warp.number + (len(self.all) if product else 0)))

    def _begin_product(self, clock: float, warp: _Warp) -> None:
        tensor, scheduler = self.free[Kind.TENSOR], warp.number % SCHEDULERS
        if tensor[scheduler] > clock + 1e-9:
            self._at(tensor[scheduler], warp, product=True)
            return
        operation = warp.products.popleft()
        self.shared = max(self.shared, clock) + operation.wavefronts
        warp.product_end = tensor[scheduler] = max(clock + operation.clocks, self.shared + SHARED_OF_WGMMA)
        if warp.products:
            self._at(warp.product_end, warp, product=True)
            return
        warp.multiplying = False
        if warp.parked is not None:
            self._at(max(warp.parked, warp.product_end + WGMMA_LATENCY), warp)
            warp.parked = None

    def _step(self, clock: float, warp: _Warp) -> None:
        operation, scheduler = self.path[warp.place], warp.number % SCHEDULERS
        kind = operation.kind
        if kind is Kind.WGMMA_WAIT and warp.multiplying:
            warp.parked = clock
            return
        ready = max(clock, self.issue[scheduler])
        for name in operation.reads:
            ready = max(ready, warp.known.get(name, 0.0))
        if kind in self.pipes:
            ready = max(ready, self.free[kind][scheduler] - self.pipes[kind][1])
        elif kind is Kind.SHARED:
            ready = max(ready, self.shared - SHARED_QUEUE)
        elif kind is Kind.WGMMA_WAIT:
            ready = max(ready, warp.product_end + WGMMA_LATENCY)
        if ready > clock + 1e-9:
            self._at(ready, warp)
            return
        following, done = self._issue(clock, warp, operation, scheduler)
        for name in operation.writes:
            warp.known[name] = done
        warp.place += 1
        if warp.place == len(self.path):
            warp.place = 0
            warp.finished.append(clock)
            following += BRANCH_CLOCKS
        if kind is Kind.BARRIER:
            self._arrive(clock, warp)
        elif warp.place or len(warp.finished) < self.iterations + warp.number // self.warps:
            self._at(following, warp)

    def _issue(self, clock: float, warp: _Warp, operation: Operation, scheduler: int) -> tuple[float, float]:
        """When the warp can go on, and when the result is there."""
        kind = operation.kind
        self.issue[scheduler] = following = clock + 1
        done = clock + operation.latency
        if kind in self.pipes:
            start = max(clock, self.free[kind][scheduler])
            self.free[kind][scheduler], done = start + self.pipes[kind][0], start + operation.latency
        elif kind is Kind.SHARED:
            self.shared = warp.last_access = max(self.shared, clock) + operation.wavefronts
            done = self.shared + operation.latency
        elif kind is Kind.WGMMA:
            warp.products.append(operation)
            if not warp.multiplying:
                warp.multiplying = True
                self._at(max(clock, self.free[Kind.TENSOR][scheduler], warp.product_end), warp, product=True)
        elif kind is Kind.FENCE:
            following = max(clock + 1, warp.last_access) + FENCE_LATENCY
        return following, done

    def _arrive(self, clock: float, warp: _Warp) -> None:
        here = self.waiting[warp.number // self.warps]
        here.append((clock, warp))
        if len(here) == self.warps:
            leave = max(max(arrival, member.last_access) for arrival, member in here) + BARRIER_LATENCY
            for _, member in here:
                self._at(leave, member)
            here.clear()


class Loop(NamedTuple):
    clocks: float  # of the SM, for one iteration of one program
    instructions: int  # of a warp, an iteration
    spills: int  # of these, loads and stores of spilled registers
    bytes: float  # that a program's iteration loads from global memory and stores there, mostly the L2 cache
    bound: str  # the busiest pipe and how busy it is; below 70 % it is rather waiting that takes the time


def estimate(loop: Sequence[Instruction], warps: int, count: int, chip: Chip, misses: bool = False) -> Loop:
    """Of a loop, with `count` programs on the SM at once. misses: see `spills_miss`."""
    instructions = usual_path(loop)
    path = [decode(instruction) for instruction in instructions]
    for operation, instruction in zip(path, instructions, strict=True):
        if misses and instruction.name in ("LDL", "STL"):
            operation.wavefronts *= MISS
    sm = _Sm(path, warps, count, 26 if len(path) < 5000 else 10, chip)
    sm.run()
    begin, end = max(warp.finished[2] for warp in sm.all), min(warp.finished[-1] for warp in sm.all)
    if end <= begin:  # a short loop, of which one program kept the other from starting
        begin, end = 0.0, max(warp.finished[-1] for warp in sm.all)
    done = sum(begin < clock <= end for warp in sm.all for clock in warp.finished) / warps
    clocks, pipes = (end - begin) / done, busy(path, warps, chip)
    pipe = max(pipes, key=pipes.__getitem__)
    share = f"{pipe} {pipes[pipe] / clocks:.0%}"
    spills = sum(instruction.name in ("LDL", "STL") for instruction in instructions)
    moved = 32 * warps * sum(_width(instruction.opcode) for instruction in instructions if instruction.name in ("LDG", "LDGSTS", "STG"))
    return Loop(clocks, len(path), spills, moved, share if pipes[pipe] >= 0.7 * clocks else f"waiting ({share})")


def _width(opcode: str) -> int:
    """Bytes of a lane."""
    return 16 if ".128" in opcode else 8 if ".64" in opcode else 2 if "16" in opcode else 1 if "8" in opcode else 4


def estimates(sass: str, target: str, warps: int, count: int, misses: bool = False) -> list[Loop]:
    """One per innermost loop with products, in the order of the code."""
    return [estimate(loop, warps, count, CHIPS[target], misses) for loop in product_loops(parse(sass))]
