"""Instructions to Python: each basic block becomes a function of numpy operations over the threads of a program.

In a translated block R is the list of registers: arrays of the threads' bits (uint8, ... uint64; predicates bool), never changed in place,
so that a move only shares one. M is the program (machine.py), m which threads take part (in a block's masked form).
"""

from __future__ import annotations

import numpy as np

from . import arithmetic
from .memory import SHARED_BASE
from .parser import Address, Immediate, Instruction, Kernel, Operand, Register, Symbol, Vector

_DTYPES = {"pred": "?", "f16": "f2", "bf16": "u2", "f16x2": "u4", "bf16x2": "u4"}
for _bits in (8, 16, 32, 64):
    for _kind, _dtype in (("b", "u"), ("u", "u"), ("s", "i"), ("f", "f")):
        _DTYPES.setdefault(f"{_kind}{_bits}", f"{_dtype}{_bits // 8}")
_BITS = {"pred": 1, "f16": 16, "bf16": 16, "f16x2": 32, "bf16x2": 32}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_IGNORED = {"prefetch", "prefetchu", "createpolicy", "griddepcontrol", "membar", "nanosleep", "pragma"}


def bits(kind: str) -> int:
    return _BITS.get(kind) or int(kind[1:])


def is_type(part: str) -> bool:
    return part in _DTYPES


class Translator:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scope = {name: getattr(arithmetic, name) for name in dir(arithmetic) if not name.startswith("__")}
        self.constants: dict[tuple[str, bytes], str] = {}
        self._blocks: dict[tuple[int, bool], tuple] = {}

    def block(self, number: int, masked: bool):
        """(function of (M, R, m), PTX line of each line of its source)."""
        key = number, masked
        if key not in self._blocks:
            source, places = ["def translated(M, R, m):", "  P, S = M.parameters, M.special"], [0, 0]
            for instruction in self.kernel.blocks[number].instructions:
                try:
                    lines = self._instruction(instruction, masked)
                except (NotImplementedError, KeyError, ValueError, AttributeError, TypeError) as error:
                    raise NotImplementedError(f"{self.kernel.place(instruction.line)}: {type(error).__name__}: {error}") from error
                source += ["  " + line for line in lines]
                places += [instruction.line] * len(lines)
            name = f"<block {number}{' masked' if masked else ''} of {self.kernel.name}>"
            scope = dict(self.scope)
            exec(compile("\n".join(source) + "\n", name, "exec"), scope)
            self._blocks[key] = scope["translated"], places, name
        return self._blocks[key]

    # Operands

    def constant(self, value: int | float, kind: str) -> str:
        dtype = np.dtype(_DTYPES[kind])
        if dtype.kind in "iu":
            if isinstance(value, float):  # its bits
                value = int.from_bytes(np.array(value, f"f{dtype.itemsize}").tobytes(), "little")
            value = int(value) & ((1 << 8 * dtype.itemsize) - 1)
            array = np.full(self.kernel.threads, value, f"u{dtype.itemsize}").view(dtype)
        else:
            array = np.full(self.kernel.threads, value, dtype)
        key = dtype.str, array[:1].tobytes()
        if key not in self.constants:
            array.setflags(write=False)
            self.constants[key] = f"C{len(self.constants)}"
            self.scope[self.constants[key]] = array
        return self.constants[key]

    def read(self, operand: Operand, kind: str) -> str:
        """An operand as an array of a type; of bf16 and packed types the bits."""
        dtype = _DTYPES[kind]
        if isinstance(operand, Register):
            text = f"R[{operand.number}]"
            if operand.bits > bits(kind) > 1:
                text = f"{text}.astype(u{bits(kind) // 8})"
            elif operand.bits < bits(kind):
                raise ValueError(f"a register of {operand.bits} bits where {kind} is read")
            return text if dtype[0] in "u?" else f"{text}.view({dtype})"
        if isinstance(operand, Immediate):
            return self.constant(operand.value, kind)
        if isinstance(operand, Symbol):
            return self.symbol(operand, kind)
        raise ValueError(f"operand {operand}")

    def symbol(self, symbol: Symbol, kind: str) -> str:
        if symbol.name.startswith("%"):
            return f"S[{symbol.name!r}]"
        if any(symbol.name == name for _, name in self.kernel.parameters):
            return f"P[{symbol.name!r}]"
        return self.constant(SHARED_BASE, kind)  # the one array in shared memory

    def address(self, operand: Operand, kind: str) -> str:
        assert isinstance(operand, Address)
        base = self.read(operand.base, kind) if not isinstance(operand.base, Register) else f"R[{operand.base.number}]"
        if isinstance(operand.base, Register) and operand.base.bits != bits(kind):
            base = f"{base}.astype({_DTYPES[kind]})"
        return f"({base} + {self.constant(operand.offset, kind)})" if operand.offset else base

    def write(self, register: Register | None, text: str, kind: str, mask: str | None) -> list[str]:
        """text: an array of type `kind`."""
        if register is None:
            return []
        dtype = _DTYPES[kind]
        if register.bits > bits(kind) > 1:
            wide = f"{'i' if dtype[0] == 'i' else 'u'}{register.bits // 8}"
            text = f"({text}).view(u{bits(kind) // 8})" if dtype[0] == "f" else f"({text})"
            text = f"{text}.astype({wide})" + (f".view(u{register.bits // 8})" if wide[0] == "i" else "")
        elif register.bits < bits(kind):
            raise ValueError(f"{kind} into a register of {register.bits} bits")
        elif dtype[0] not in "u?":
            text = f"({text}).view(u{bits(kind) // 8})"
        if mask is None:
            return [f"R[{register.number}] = {text}"]
        return [f"R[{register.number}] = where({mask}, {text}, R[{register.number}])"]

    # Instructions

    def _instruction(self, instruction: Instruction, masked: bool) -> list[str]:
        mask = "m" if masked else None
        if instruction.guard is not None:
            mask = f"{'~' if instruction.negated else ''}R[{instruction.guard.number}]"
            mask = f"(m & {mask})" if masked else mask
        name = instruction.name
        if name in ("bra", "ret", "exit", "bar", "barrier") or name in _IGNORED:
            return []  # the machine ends a block itself
        special = getattr(self, f"_{name}", None)
        if special is not None:
            return special(instruction, mask)
        destination, *sources = instruction.operands
        if name == "setp" and instruction.type in ("f16x2", "bf16x2"):  # a predicate of each half, the low one's first
            both = [self.read(source, "b32") for source in sources[:2]]
            halves = [[f"({operand} >> u4({shift})).astype(u2)" for operand in both] for shift in (0, 16)]
            pair = zip(destination.items, halves, strict=True)
            return [line for place, half in pair for line in self.write(place, self._compared(instruction, sources, *half), "pred", mask)]
        text, kind = self._arithmetic(instruction, sources)
        if name == "setp" and isinstance(destination, Vector):
            first, second = destination.items
            return self.write(first, text, kind, mask) + self.write(second, f"~({text})", kind, mask)
        return self.write(destination, text, kind, mask)

    def _arithmetic(self, instruction: Instruction, sources: list[Operand]) -> tuple[str, str]:
        """(expression, its type)."""
        name, parts, kind = instruction.name, instruction.parts, instruction.type
        if "sat" in parts or "cc" in parts:
            raise NotImplementedError(instruction.opcode)
        floating = kind in ("f32", "f64")
        if name in ("add", "sub", "mul", "fma", "max", "min", "neg", "abs") and kind in ("f16", "bf16", "f16x2", "bf16x2"):
            operation = {
                "add": "lambda a, b: a + b", "sub": "lambda a, b: a - b", "mul": "lambda a, b: a * b", "fma": "fma", "neg": "lambda a: -a",
                "max": "maximum" if "NaN" in parts else "fmax", "min": "minimum" if "NaN" in parts else "fmin", "abs": "lambda a: abs(a)",
            }[name]  # fmt: skip
            operands = ", ".join(self.read(source, "b16" if kind in ("f16", "bf16") else "b32") for source in sources)
            packed = kind.endswith("x2")
            return f"halves({operation}, {kind.removesuffix('x2')!r}, {packed}, {operands})", "b32" if packed else "b16"
        if name in ("mul", "mad") and "wide" in parts:
            wide = f"{kind[0]}{2 * bits(kind)}"
            dtype = _DTYPES[wide]
            text = f"{self.read(sources[0], kind)}.astype({dtype}) * {self.read(sources[1], kind)}.astype({dtype})"
            return (f"({text}) + {self.read(sources[2], wide)}" if name == "mad" else text), wide
        if name in ("mul", "mad") and "hi" in parts:
            text = f"mul_hi({self.read(sources[0], kind)}, {self.read(sources[1], kind)})"
            return (f"{text} + {self.read(sources[2], kind)}" if name == "mad" else text), kind
        if name == "selp":
            raw = f"b{bits(kind)}"
            first, second = (self._raw(source, kind) for source in sources[:2])
            return f"where(R[{sources[2].number}], {first}, {second})", raw
        if name == "setp":
            return self._comparison(instruction, sources), "pred"
        if name == "cvt":
            return self._conversion(parts, sources)
        if name in ("shl", "shr"):
            a, count = sources
            if isinstance(count, Immediate) and count.value < bits(kind):
                return f"{self.read(a, kind)} {'<<' if name == 'shl' else '>>'} {self.constant(count.value, kind)}", kind
            return f"shift_{'left' if name == 'shl' else 'right'}({self.read(a, kind)}, {self.read(count, 'u32')})", kind
        if name == "shf":
            a, b, c = (self.read(source, "b32") for source in sources)
            return f"funnel_{'left' if parts[1] == 'l' else 'right'}({a}, {b}, {c}, {parts[2] == 'wrap'})", "b32"
        if name == "bfe":
            raw = f"b{bits(kind)}"
            a, position, length = self.read(sources[0], raw), self.read(sources[1], "u32"), self.read(sources[2], "u32")
            return f"bit_field({a}, {position}, {length}, {kind[0] == 's'})", raw
        if name == "bfi":
            a, b = self.read(sources[0], kind), self.read(sources[1], kind)
            return f"bit_insert({a}, {b}, {self.read(sources[2], 'u32')}, {self.read(sources[3], 'u32')})", kind
        if name == "prmt":
            return f"permute_bytes({', '.join(self.read(source, 'b32') for source in sources)})", "b32"
        if name == "lop3":
            return f"logic3({', '.join(self.read(source, 'b32') for source in sources[:3])}, {sources[3].value})", "b32"
        if name in ("popc", "clz"):
            return f"{'count_bits' if name == 'popc' else 'leading_zeros'}({self.read(sources[0], kind)})", "u32"
        values = [self.read(source, kind) for source in sources]
        if name in ("max", "min") and len(values) != 2:
            raise NotImplementedError(instruction.opcode)
        simple = {
            "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "mad": "{0} * {1} + {2}", "fma": "fma({0}, {1}, {2})",
            "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "not": "~{0}", "neg": "-{0}", "abs": "abs({0})",
            "div": "{0} / {1}" if floating else "divide({0}, {1})", "rem": "remainder({0}, {1})",
            "max": ("maximum" if not floating or "NaN" in parts else "fmax") + "({0}, {1})",
            "min": ("minimum" if not floating or "NaN" in parts else "fmin") + "({0}, {1})",
            "ex2": "exp2({0})", "lg2": "log2({0})", "rcp": "f4(1) / {0}", "rsqrt": "f4(1) / sqrt({0})", "sqrt": "sqrt({0})",
            "brev": "reverse_bits({0})", "copysign": "copysign({1}, {0})",
        }  # fmt: skip
        text = simple[name].format(*values)
        if floating and "ftz" in parts and name not in ("ex2", "lg2"):
            text = f"flush({text})"
        return text, kind

    def _raw(self, operand: Operand, kind: str) -> str:
        """The bits of an operand."""
        return self.read(operand, "pred" if kind == "pred" else f"b{bits(kind)}")

    def _comparison(self, instruction: Instruction, sources: list[Operand]) -> str:
        return self._compared(instruction, sources, *(self.read(source, instruction.type) for source in sources[:2]))

    def _compared(self, instruction: Instruction, sources: list[Operand], a: str, b: str) -> str:
        comparison, kind = instruction.parts[1], instruction.type
        if kind == "f16x2":
            a, b, kind = f"{a}.view(f2)", f"{b}.view(f2)", "f16"
        if kind in ("bf16", "bf16x2"):
            a, b, kind = f"from_bf16({a})", f"from_bf16({b})", "f32"
        if kind[0] in "fb" and kind in ("f16", "bf16", "f32", "f64"):
            if comparison in ("num", "nan"):
                text = f"(({a} == {a}) & ({b} == {b}))"
                text = text if comparison == "num" else f"~{text}"
            elif comparison == "ne":
                text = f"not_equal({a}, {b})"
            elif len(comparison) == 3:  # unordered: also where one is not a number
                opposite = {"equ": None, "neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}[comparison]
                text = f"~({a} {opposite} {b})" if opposite else f"~not_equal({a}, {b})"
            else:
                text = f"({a} {_COMPARISONS[comparison]} {b})"
        else:
            text = f"({a} {_COMPARISONS[comparison]} {b})"
        if len(sources) == 3:
            joined = {"and": "&", "or": "|", "xor": "^"}[instruction.parts[2]]
            text = f"({text} {joined} {self.read(sources[2], 'pred')})"
        return text

    def _conversion(self, parts: list[str], sources: list[Operand]) -> tuple[str, str]:
        to, of = [part for part in parts[1:] if is_type(part)]
        rounding = next((part for part in parts[1:] if part in ("rzi", "rni", "rmi", "rpi")), None)
        if any(part in ("rz", "rm", "rp", "relu", "satfinite") for part in parts):
            raise NotImplementedError(".".join(parts))
        if to in ("bf16x2", "f16x2"):
            write = f"to_{to.removesuffix('x2')}"
            high, low = (f"{write}({self.read(source, of)})" for source in sources)
            return f"pack({low}, {high})", "b32"
        value = self.read(sources[0], of)
        if to == "bf16":
            return f"to_bf16({value})", "b16"
        if of == "bf16":
            value, of = f"from_bf16({value})", "f32"
        if of == "f16":
            value, of = f"{value}.astype(f4)", "f32"
        if to in ("f16", "f32", "f64"):
            if rounding and of[0] == "f":
                function = {"rzi": "trunc", "rni": "rint", "rmi": "floor", "rpi": "ceil"}[rounding]
                return f"{function}({value})", to
            return (value if of == to else f"{value}.astype({_DTYPES[to]})"), to
        if of[0] == "f":
            return f"to_integer({value}, {_DTYPES[to]}, {rounding!r})", to
        return f"{value}.astype({_DTYPES[to]})", to

    # Instructions of their own: methods named after them.

    def _mov(self, instruction: Instruction, mask: str | None) -> list[str]:
        to, of = instruction.operands
        width = bits(instruction.type) if instruction.type != "pred" else 1
        if isinstance(of, Vector):  # pack
            part = width // len(of.items)
            wide, items = f"u{width // 8}", enumerate(of.items)
            pieces = [f"({self.read(item, f'b{part}')}.astype({wide}) << {wide}({index * part}))" for index, item in items]
            return self.write(to, " | ".join(pieces), f"b{width}", mask)
        if isinstance(to, Vector):
            part = width // len(to.items)
            value, lines = self.read(of, f"b{width}"), []
            for index, item in enumerate(to.items):
                text = f"({value} >> u{width // 8}({index * part})).astype(u{part // 8})"
                lines += self.write(item, text, f"b{part}", mask)
            return lines
        return self.write(to, self._raw(of, instruction.type), "pred" if width == 1 else f"b{width}", mask)

    def _cvta(self, instruction: Instruction, mask: str | None) -> list[str]:
        to, of = instruction.operands
        return self.write(to, self.read(of, "b64"), "b64", mask)

    def _access(self, instruction: Instruction) -> tuple[str, int, int]:
        """(space, bytes of an element, elements)."""
        parts = instruction.parts
        space = next((part.partition("::")[0] for part in parts[1:] if part.startswith(("shared", "global", "param"))), "")
        if not space:
            raise NotImplementedError("a generic address")
        count = next((int(part[1:]) for part in parts if part in ("v2", "v4", "v8")), 1)
        return space, bits(instruction.type) // 8, count

    def _ld(self, instruction: Instruction, mask: str | None) -> list[str]:
        space, width, count = self._access(instruction)
        to, address = instruction.operands[:2]
        registers = to.items if isinstance(to, Vector) else (to,)
        if space == "param":
            if address.offset or count != 1:
                raise NotImplementedError("a part of a parameter")
            if instruction.type[0] == "s":  # into a wider register the sign goes along
                return self.write(to, f"P[{address.base.name!r}].view(i{width})", f"s{8 * width}", mask)
            return self.write(to, f"P[{address.base.name!r}]", f"b{8 * width}", mask)
        place = self.address(address, "b32" if space == "shared" else "b64")
        lines = [f"t = M.load_{space}({place}, {width}, {count}, {mask}, {instruction.line})"]
        signed = instruction.type[0] == "s"
        for index, register in enumerate(registers):
            text = f"t[{index}].view(i{width})" if signed else f"t[{index}]"
            lines += self.write(register, text, f"{'s' if signed else 'b'}{8 * width}", mask)
        return lines

    def _st(self, instruction: Instruction, mask: str | None) -> list[str]:
        space, width, _ = self._access(instruction)
        address, of = instruction.operands[:2]
        values = of.items if isinstance(of, Vector) else (of,)
        listed = ", ".join(self._raw(value, f"{'f' if instruction.type[0] == 'f' else 'b'}{8 * width}") for value in values)
        place = self.address(address, "b32" if space == "shared" else "b64")
        return [f"M.store_{space}({place}, [{listed}], {width}, {mask}, {instruction.line})"]

    def _cp(self, instruction: Instruction, mask: str | None) -> list[str]:
        parts, operands = instruction.parts, instruction.operands
        if parts[1] != "async" or "bulk" in parts:
            raise NotImplementedError(instruction.opcode)
        if "commit_group" in parts:
            return [f"M.commit_copies({mask})"]
        if "wait_group" in parts or "wait_all" in parts:
            return [f"M.wait_copies({operands[0].value if operands else 0}, {mask}, {instruction.line})"]
        if "mbarrier" in parts:
            raise NotImplementedError(instruction.opcode)
        width = operands[2].value
        size = self.read(operands[3], "u32") if len(operands) > 3 and not isinstance(operands[3], Symbol) else "None"
        to, of = self.address(operands[0], "b32"), self.address(operands[1], "b64")
        return [f"M.copy_async({to}, {of}, {width}, {size}, {mask}, {instruction.line})"]

    def _ldmatrix(self, instruction: Instruction, mask: str | None) -> list[str]:
        to, address = instruction.operands
        registers = to.items if isinstance(to, Vector) else (to,)
        transposed, place = "trans" in instruction.parts, self.address(address, "b32")
        lines = [f"t = M.load_matrix({place}, {len(registers)}, {transposed}, {mask}, {instruction.line})"]
        for index, register in enumerate(registers):
            lines += self.write(register, f"t[{index}]", "b32", mask)
        return lines

    def _stmatrix(self, instruction: Instruction, mask: str | None) -> list[str]:
        address, of = instruction.operands
        values = ", ".join(self.read(item, "b32") for item in (of.items if isinstance(of, Vector) else (of,)))
        return [f"M.store_matrix({self.address(address, 'b32')}, [{values}], {'trans' in instruction.parts}, {mask}, {instruction.line})"]

    def _mma(self, instruction: Instruction, mask: str | None) -> list[str]:
        kinds = [part for part in instruction.parts if part in ("bf16", "f16", "tf32", "f32")]
        if kinds[0] != "f32" or kinds[1] != kinds[2]:
            raise NotImplementedError(instruction.opcode)
        d, a, b, c = instruction.operands
        fragments = [", ".join(self._raw(item, "f32" if operand is c else "b32") for item in operand.items) for operand in (a, b, c)]
        lines = [f"t = M.multiply([{fragments[0]}], [{fragments[1]}], [{fragments[2]}], {kinds[1]!r}, {mask})"]
        for index, register in enumerate(d.items):
            lines += self.write(register, f"t[{index}]", "b32", mask)
        return lines

    def _wgmma(self, instruction: Instruction, mask: str | None) -> list[str]:
        parts, operands, line = instruction.parts, instruction.operands, instruction.line
        if mask is not None:
            raise NotImplementedError("wgmma of some of the threads")
        if "fence" in parts:
            return ["M.wgmma_fence(R)"]
        if "commit_group" in parts:
            return ["M.wgmma_commit()"]
        if "wait_group" in parts:
            return [f"M.wgmma_wait(R, {operands[0].value}, {line})"]
        shape = next(part for part in parts if part.startswith("m64n"))
        kinds = [part for part in parts if part in ("bf16", "f16", "tf32", "f32")]
        columns, k = (int(number) for number in shape[3:].split("n")[-1].split("k"))
        if kinds[0] != "f32" or kinds[1] != kinds[2]:
            raise NotImplementedError(instruction.opcode)
        d, a, b, scale, sign_a, sign_b, *transposed = operands
        if sign_a.value != 1 or sign_b.value != 1:
            raise NotImplementedError("a negated operand")
        transposed = [item.value for item in transposed]
        if isinstance(a, Vector):
            first, a_transposed = f"[{', '.join(f'R[{item.number}]' for item in a.items)}]", False
            a_numbers = [item.number for item in a.items]
            b_transposed = bool(transposed[-1]) if transposed else False
        else:
            first, a_numbers = self.read(a, "b64"), []
            a_transposed, b_transposed = (bool(item) for item in transposed) if transposed else (False, False)
        add = f"{bool(scale.value)}" if isinstance(scale, Immediate) else self.read(scale, "pred")
        numbers = [item.number for item in d.items]
        return [
            f"M.wgmma(R, {numbers}, {first}, {a_numbers}, {self.read(b, 'b64')}, {add}, {kinds[1]!r}, {columns}, {k}, "
            f"{a_transposed}, {b_transposed}, {line})"
        ]

    def _fence(self, instruction: Instruction, mask: str | None) -> list[str]:
        return [f"M.fence_proxy({mask})"] if "proxy" in instruction.parts else []

    def _shfl(self, instruction: Instruction, mask: str | None) -> list[str]:
        to, of, lane, clamp, *_ = instruction.operands
        to, predicate = to.items if isinstance(to, Vector) else (to, None)
        mode = next(part for part in instruction.parts if part in ("bfly", "idx", "up", "down"))
        lines = [f"t = M.shuffle({mode!r}, {self.read(of, 'b32')}, {self.read(lane, 'u32')}, {self.read(clamp, 'u32')}, {mask})"]
        return lines + self.write(to, "t[0]", "b32", mask) + self.write(predicate, "t[1]", "pred", mask)

    def _vote(self, instruction: Instruction, mask: str | None) -> list[str]:
        to, of, *_ = instruction.operands
        mode = next(part for part in instruction.parts if part in ("any", "all", "uni", "ballot"))
        kind = "b32" if mode == "ballot" else "pred"
        return self.write(to, f"M.vote({mode!r}, {self.read(of, 'pred')}, {mask})", kind, mask)

    def _elect(self, instruction: Instruction, mask: str | None) -> list[str]:
        to = instruction.operands[0]
        leader, predicate = to.items if isinstance(to, Vector) else (to, None)
        lines = self.write(leader, self.constant(0, "b32"), "b32", mask)
        return lines + self.write(predicate, f"S['%laneid'] == {self.constant(0, 'u32')}", "pred", mask)

    def _redux(self, instruction: Instruction, mask: str | None) -> list[str]:
        to, of, *_ = instruction.operands
        mode = next(part for part in instruction.parts if part in ("add", "min", "max", "and", "or", "xor"))
        return self.write(to, f"M.reduce({mode!r}, {self.read(of, instruction.type)}, {mask})", instruction.type, mask)
