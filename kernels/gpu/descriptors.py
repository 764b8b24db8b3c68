"""Finds matrix descriptors that a compiled kernel overwrites before wgmma reads them, from its machine code (SASS).

ptxas 12.8, which Triton 3.6 and 3.7 bring, runs out of uniform registers in large kernels for Hopper, and then gives those of a descriptor
(where in shared memory an operand lies, and how) to something else: the product reads another part of shared memory, or none, and what
comes of it is wrong or faults. No warning, and nothing of it in the PTX, so neither Triton's interpreter nor the emulator sees it. 12.9 and
13.0 compile the same PTX rightly.

A descriptor is computed from an address in shared memory and constants. So where one of its halves can be a number that is loaded from the
kernel's parameters or from memory as it is, along any path of the code, it was overwritten. That is what is looked for: reaching
definitions, followed through copies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from .clocks import Instruction, cuobjdump, parse

_REGISTER = re.compile(r"\b(U?R)(\d+)\b")
_COPIES = ("UMOV", "MOV", "IMAD.MOV.U32", "IMAD.U32")
_LOADS = ("ULDC", "LDC", "S2R", "S2UR", "LDG", "LDS")
_WITHOUT_RESULT = (
    "ST", "BAR", "BRA", "BSSY", "BSYNC", "EXIT", "NOP", "RED", "MEMBAR", "FENCE", "WARP", "LDGSTS", "LDGDEPBAR", "DEPBAR", "CCTL", "ERRBAR",
    "UISETP", "ISETP", "FSETP", "UPLOP3", "PLOP3", "R2P", "UP2UR",
)  # fmt: skip

_State = dict[str, frozenset[int]]  # by register: the places of the instructions that may have written it last


def overwritten(sass: str) -> list[str]:
    """What `cuobjdump -sass` prints of a kernel -> a line for each descriptor that does not hold one. Empty: none was found."""
    return list(_overwritten(parse(sass)))


def overwritten_in(cubin: bytes) -> list[str]:
    """The same of a compiled kernel."""
    return overwritten(cuobjdump(cubin, "-sass"))


def _overwritten(code: Sequence[Instruction]) -> Iterator[str]:
    products = [place for place, instruction in enumerate(code) if instruction.name == "HGMMA"]
    if not products:
        return
    watched = _watched(code)
    writes = [[register for register in _written(instruction) if register in watched] for instruction in code]
    states = _reaching(code, writes)
    for place in products:
        for register in _descriptor(code[place]):
            for origin in sorted(_origins(code, states, place, register, 12)):
                loaded = code[origin]
                if loaded.name in _LOADS:
                    what = f"{loaded.opcode} {', '.join(loaded.operands)}"
                    yield f"{code[place].opcode} at {code[place].address:#x}: {register} holds {what} of {loaded.address:#x}"


def _descriptor(product: Instruction) -> list[str]:
    """The uniform registers that a product takes its operands' places from: the second operand's, and the first one's if that lies in
    shared memory too."""
    for operand in product.operands:
        if found := re.match(r"gdesc\[UR(\d+)\]", operand):
            first, in_registers = int(found[1]), product.operands.index(operand) > 1
            return [f"UR{first + half}" for half in range(2 if in_registers else 0, 4)]
    return []


def _written(instruction: Instruction) -> list[str]:
    opcode = instruction.opcode
    if opcode.startswith(_WITHOUT_RESULT):
        return []
    to = next((operand for operand in instruction.operands if not re.fullmatch(r"U?P[\dT]+", operand)), "")
    if not (found := _REGISTER.match(to)):
        return []
    kind, number = found[1], int(found[2])
    count = 4 if ".128" in opcode else 2 if ".64" in opcode or "WIDE" in opcode else 1
    if instruction.name == "HGMMA":
        count = int(re.search(r"64x(\d+)x", opcode)[1]) // 2  # type: ignore[index]
    elif instruction.name == "LDSM":
        count = int(opcode[-1]) if opcode[-2:] in (".2", ".4") else 1
    return [f"{kind}{number + index}" for index in range(count)]


def _source(instruction: Instruction) -> str | None:
    """What a copy copies."""
    if instruction.opcode in _COPIES or instruction.name == "R2UR":  # of that there are variants
        found = _REGISTER.match(instruction.operands[-1])
        return found[0] if found else None
    return None


def _watched(code: Sequence[Instruction]) -> set[str]:
    """Uniform registers, and others that are copied to them."""
    copies = [(_written(instruction), source) for instruction in code if (source := _source(instruction)) is not None]
    watched = {register for instruction in code for register in _written(instruction) if register.startswith("U")}
    count = -1
    while count < len(watched):
        count = len(watched)
        watched |= {source for written, source in copies if written and written[0] in watched}
    return watched


def _reaching(code: Sequence[Instruction], writes: Sequence[Sequence[str]]) -> dict[int, _State]:
    """What may have written each register when a product or a copy is reached."""
    places = {instruction.address: place for place, instruction in enumerate(code)}
    leaders = {0}
    for place, instruction in enumerate(code):
        if instruction.name in ("BRA", "EXIT"):
            leaders |= {place + 1, places.get(instruction.goes_to or -1, 0)}
    starts = sorted(leader for leader in leaders if leader < len(code))
    ends = dict(zip(starts, [*starts[1:], len(code)], strict=True))
    wanted = {place for place, one in enumerate(code) if one.name == "HGMMA" or _source(one) is not None}
    entry: dict[int, _State] = {0: {}}
    states: dict[int, _State] = {}
    waiting = [0]
    while waiting:
        start = waiting.pop()
        state = dict(entry[start])
        for place in range(start, ends[start]):
            if place in wanted:
                states[place] = dict(state)
            for register in writes[place]:
                before = state.get(register, frozenset()) if code[place].guard else frozenset()
                state[register] = before | {place}
        for after in _successors(code, places, ends[start] - 1):
            known = entry.get(after)
            joined = state if known is None else known | {name: known.get(name, frozenset()) | found for name, found in state.items()}
            if joined != known:
                entry[after] = dict(joined)
                waiting.append(after)
    return states


def _successors(code: Sequence[Instruction], places: dict[int, int], place: int) -> list[int]:
    instruction, following = code[place], [place + 1] if place + 1 < len(code) else []
    if instruction.name == "EXIT":
        return following if instruction.guard else []
    if instruction.name != "BRA":
        return following
    condition = instruction.guard or any(re.fullmatch(r"!?U?P\d", operand) for operand in instruction.operands)
    target = places.get(instruction.goes_to or -1)
    return ([] if target is None else [target]) + (following if condition else [])


def _origins(code: Sequence[Instruction], states: dict[int, _State], place: int, register: str, depth: int) -> set[int]:
    """The instructions that may have computed what a register holds, through at most `depth` copies."""
    found: set[int] = set()
    for writer in states.get(place, {}).get(register, frozenset()):
        source = _source(code[writer])
        if source is None or depth == 0:
            found.add(writer)
        else:
            found |= _origins(code, states, writer, source, depth - 1)
    return found
