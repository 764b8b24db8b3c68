"""PTX text, as Triton's compiler writes it, to basic blocks of instructions.

Only what such files contain is read: one entry per file, registers declared as `.reg .b32 %r<9>`, scopes `{ ... }` of inline assembly, no
functions, no calls. A register is a number and a width; a name declared in a scope is another register than the same name outside.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from typing import NamedTuple


class Register(NamedTuple):
    number: int
    bits: int  # 1: a predicate


class Immediate(NamedTuple):
    value: int | float


class Symbol(NamedTuple):
    """A special register (%tid.x), a parameter, a shared-memory array, a label."""

    name: str


class Address(NamedTuple):
    base: Register | Symbol | Immediate
    offset: int


class Vector(NamedTuple):
    """{a, b}, or the pair a|b; None: the sink _."""

    items: tuple[Operand | None, ...]


Operand = Register | Immediate | Symbol | Address | Vector


@dataclass
class Instruction:
    opcode: str
    operands: list[Operand]
    guard: Register | None
    negated: bool  # the guard
    line: int  # of the PTX
    source: str  # "tile.py:30", the innermost one
    parts: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.parts = self.opcode.split(".")

    @property
    def name(self) -> str:
        return self.parts[0]

    @property
    def type(self) -> str:
        return self.parts[-1]


@dataclass
class Block:
    label: str
    instructions: list[Instruction] = field(default_factory=list)
    target: int | None = None  # of the branch that ends it


@dataclass
class Kernel:
    name: str
    parameters: list[tuple[str, str]]  # (type, name)
    threads: int  # of a program
    widths: list[int]  # bits of each register
    blocks: list[Block]
    lines: list[str]  # of the PTX

    def place(self, line: int) -> str:
        """A line of the PTX, and the kernel's line that it comes from."""
        return f"{line} ({self.instruction(line).source}) {' '.join(self.lines[line - 1].split())[:100]}"

    def instruction(self, line: int) -> Instruction:
        return next(one for block in self.blocks for one in block.instructions if one.line == line)


_WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "b128": 128}
for _letter in "usf":
    for _bits in (8, 16, 32, 64):
        _WIDTHS[f"{_letter}{_bits}"] = _bits
_WIDTHS |= {"f16x2": 32, "bf16": 16, "bf16x2": 32}
_NUMBER = re.compile(r"[-+]?(0[xX][0-9a-fA-F]+|\d+)U?$")
_FLOAT = re.compile(r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?$")


class _Scopes:
    """Names to registers, innermost scope first; families %r<9> make theirs when first named."""

    def __init__(self) -> None:
        self.names: list[dict[str, Register]] = [{}]
        self.families: dict[str, int] = {}
        self.widths: list[int] = []

    def new(self, bits: int) -> Register:
        self.widths.append(bits)
        return Register(len(self.widths) - 1, bits)

    def declare(self, statement: str) -> None:
        _, kind, names = statement.split(None, 2)
        bits = _WIDTHS[kind.removeprefix(".")]
        for name in names.split(","):
            name = name.strip()
            if match := re.fullmatch(r"([%\w$]+)<(\d+)>", name):
                if len(self.names) == 1:
                    self.families[match[1]] = bits
                else:
                    self.names[-1] |= {f"{match[1]}{index}": self.new(bits) for index in range(int(match[2]))}
            else:
                self.names[-1][name] = self.new(bits)

    def find(self, name: str) -> Register | None:
        for scope in reversed(self.names):
            if name in scope:
                return scope[name]
        match = re.fullmatch(r"(%[a-zA-Z_]+)(\d+)", name)
        if match and match[1] in self.families:
            return self.names[0].setdefault(name, self.new(self.families[match[1]]))
        return None


def _operand(text: str, scopes: _Scopes) -> Operand | None:
    text = text.strip()
    if text.startswith("{"):
        return Vector(tuple(_operand(item, scopes) for item in _split(text[1:-1])))
    if text.startswith("["):
        inside = text[1:-1].strip()
        match = re.fullmatch(r"([^+\s]+?)\s*(?:\+\s*(-?\w+)\s*)?", inside)
        if match is None:
            raise ValueError(f"address {text!r}")
        base = _operand(match[1], scopes)
        return Address(base, int(match[2] or "0", 0))
    if text == "_":
        return None
    if "|" in text:
        return Vector(tuple(_operand(item, scopes) for item in text.split("|")))
    if _NUMBER.match(text):
        return Immediate(int(text.rstrip("U"), 0))
    if text[:2] in ("0f", "0F"):
        return Immediate(struct.unpack(">f", bytes.fromhex(text[2:]))[0])
    if text[:2] in ("0d", "0D"):
        return Immediate(struct.unpack(">d", bytes.fromhex(text[2:]))[0])
    if _FLOAT.match(text):
        return Immediate(float(text))
    return scopes.find(text) or Symbol(text)


def _split(text: str) -> list[str]:
    """At commas outside brackets."""
    parts, depth, last = [], 0, 0
    for index, character in enumerate(text):
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append(text[last:index])
            last = index + 1
    parts.append(text[last:])
    return [part for part in parts if part.strip()]


def _statements(lines: list[str], first: int):
    """(statement, line, source) of a body; "{" and "}" by themselves; ends with the body."""
    pending, depth, source, start = "", 0, "", 0
    for number, line in enumerate(lines[first:], first + 1):
        code, _, comment = line.partition("//")
        stripped = code.strip()
        if stripped.startswith(".loc"):
            place = re.search(r"([\w.]+:\d+)(:\d+)?", comment)
            source = place[1] if place else ""
            continue
        if stripped.startswith((".file", ".section", ".pragma")):
            continue
        if match := re.fullmatch(r"([$\w%.]+):(?!:)\s*(.*)", stripped):
            yield match[1] + ":", number, source
            stripped = match[2]
        for character in stripped + " ":
            if not pending.strip():
                start = number
                if character in "{}":
                    depth += 1 if character == "{" else -1
                    yield character, number, source
                    if depth == 0:
                        return
                    continue
            if character == ";":
                yield " ".join(pending.split()), start, source
                pending = ""
            else:
                pending += character


def parse(text: str) -> Kernel:
    lines = text.splitlines()
    code = "\n".join(line.partition("//")[0] for line in lines)
    entry = re.search(r"\.entry\s+(\w+)\s*\(", code)
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", code)
    if entry is None or threads is None:
        raise ValueError("no .entry, or none with a number of threads")
    end = code.index(")", entry.end())
    parameters = re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+)\s*(?:,|$)", code[entry.end() : end].strip())
    scopes = _Scopes()
    blocks = _blocks(lines, code.count("\n", 0, code.index("{", end)), scopes)
    return Kernel(entry[1], parameters, int(threads[1]), scopes.widths, blocks, lines)


def _blocks(lines: list[str], first: int, scopes: _Scopes) -> list[Block]:
    blocks, labels = [Block("entry")], {}
    branches: list[tuple[Block, str]] = []
    closed = False  # the last block takes no more instructions
    for statement, line, source in _statements(lines, first):
        if statement == "{":
            scopes.names.append({})
        elif statement == "}":
            scopes.names.pop()
        elif statement.endswith(":"):
            name = statement[:-1]
            if name.startswith(("$L__tmp", "$L__func", "$L__sec")):
                continue
            if blocks[-1].instructions or closed:
                blocks.append(Block(name))
            else:
                blocks[-1].label = name
            labels[name], closed = len(blocks) - 1, False
        elif statement.startswith(".reg"):
            scopes.declare(statement)
        elif statement.startswith("."):
            raise ValueError(f"line {line}: {statement!r} is not known")
        else:
            if closed:  # $L__BB0_2, then $L__BB0_2.1, $L__BB0_2.2 behind its barriers and branches
                label, _, count = blocks[-1].label.partition(".")
                blocks.append(Block(f"{label}.{int(count or 0) + 1}"))
            instruction = _instruction(statement, line, source, scopes)
            blocks[-1].instructions.append(instruction)
            if instruction.name == "bra":
                branches.append((blocks[-1], instruction.operands[0].name))
            # A barrier ends its block: threads of other paths may have to come first.
            closed = instruction.name in ("bra", "ret", "exit", "bar", "barrier")
    for block, name in branches:
        block.target = labels[name]
    return blocks


def _instruction(statement: str, line: int, source: str, scopes: _Scopes) -> Instruction:
    guard, negated = None, False
    if match := re.match(r"@(!?)\s*([%\w]+)\s+", statement):
        guard, negated, statement = scopes.find(match[2]), bool(match[1]), statement[match.end() :]
    opcode, _, rest = statement.partition(" ")
    instruction = Instruction(opcode, [_operand(part, scopes) for part in _split(rest)], guard, negated, line, source)
    if instruction.name in ("ret", "exit") and guard is not None:
        raise NotImplementedError(f"line {line}: a guarded {opcode}")
    return instruction
