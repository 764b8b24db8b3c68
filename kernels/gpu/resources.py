"""What the kernels' configurations take of a chip, found by compiling them: no GPU is needed. `python -m relattn.kernels.gpu.resources`.

Prints a row per kernel as it is shipped: registers and stack bytes of a thread (stack is where spilled registers go), shared memory of a
program, matrix instructions. Exits with status 1 if one takes more shared memory than the chip has, or does not compile, nor any of the
smaller ones that a launch would fall to.

With --clocks, a row per candidate: programs that an SM has at once, and what the model of clocks.py says of the inner loops, in clocks of
the SM for 64 x 64 pairs of a query and a key, best first. Of clipped tables the tiles near them and the far ones have a loop each; they
are ranked by an eighth of the former and seven of the latter. Chips that are not modelled are ranked by stack.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what the launches ask for, too

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import MockTensor, create_function_from_signature

from . import KERNELS, clocks, configs, descriptors
from .configs import Configuration
from .operands import LACKING, Inputs, Operand, Saved, Tile, Units
from .operands import SIZES as LOOSE

TARGETS = tuple(configs.SHARED_MEMORY)
NAMES = (
    "forward", "decode", "prepare", "query_gradient", "key_gradient", "table_gradient", "product_by_key", "product"
)  # fmt: skip
SIZES = (64, 128, 256)
VARIANTS = ("plain", "clipped", "extra", "hides", "bare")  # rel_k; clipped; all tables; rel_k, causal; no table, to compare with
DTYPES = {2: "bf16", 4: "fp32"}
TENSOR_MEMORY = 512  # columns of an SM, sm_100
FAR_PART = 7 / 8  # of the tiles, where tables are clipped to 64 and sequences are 1536 long


class Case(NamedTuple):
    target: str
    kernel: str
    size: int
    itemsize: int  # 2: bfloat16, 4: float32
    variant: str


class Resources(NamedTuple):
    registers: int
    stack: int
    shared: int
    products: int  # matrix instructions in the code: wgmma, mma or mfma
    fits: bool


def cases(targets: Iterable[str] = TARGETS) -> Iterator[Case]:
    """What is checked: 16-bit inputs with rel_k everywhere; float32, and all tables at once, on Hopper with heads up to 64."""
    for case in all_cases(targets):
        on_hopper = case.target == "sm_90" and case.size == 64 and (case.itemsize, case.variant) in ((2, "extra"), (4, "plain"))
        if on_hopper or (case.itemsize == 2 and case.variant in ("plain", "clipped")):
            yield case


def all_cases(targets: Iterable[str], sizes: Iterable[int] = SIZES) -> Iterator[Case]:
    for case in itertools.starmap(Case, itertools.product(targets, NAMES, sizes, DTYPES, VARIANTS)):
        products = case.kernel.startswith("product")  # these serve plain tables, by key those of large heads of 16-bit inputs only
        large = case.size > 64 and case.itemsize == 2
        if products and (case.variant not in ("plain", "hides") or not (large or case.kernel == "product")):
            continue
        if not (case.variant == "bare" and case.kernel == "table_gradient"):
            yield case


def _arguments(case: Case, configuration: Configuration) -> dict[str, Any]:
    """What a kernel is launched with for contiguous inputs, addresses and strides multiples of 16."""
    numbers, single = MockTensor({2: tl.bfloat16, 4: tl.float32}[case.itemsize]), MockTensor(tl.float32)
    power, far, extra = triton.next_power_of_2(case.size), case.variant == "clipped", case.variant == "extra"
    operand, table = Operand(numbers, 4096, 1024, 256, 1), Operand(numbers, LACKING, 1024, 256, 1)
    rel_k, other = None if case.variant == "bare" else table, table if extra else None
    parts = case.variant in ("plain", "hides") and configuration.block >= 32  # tiles go to memory
    products = parts and case.size > 64 and case.itemsize == 2
    return dict(
        inputs=Inputs(operand, None, operand, operand, rel_k, other, other, None, None, None, None, None, None),
        saved=Saved(single, single, None, single if far else None, MockTensor(tl.uint8) if case.variant == "hides" else None),
        units=Units(0.125, 0.18, 0.0, 1.0),
        output=operand, grad_output=operand, grad_query=operand, grad_key=operand, grad_value=operand, key_partial=None, value_partial=None,
        lse=single, grad_lse=None, edge_sums=single if far else None, key_sums=None, partial=single, partial_sums=None,
        edge_owed=single if far else None, kept_tiles=numbers if products else None, grad_tiles=numbers if products else None,
        owed_tiles=numbers if parts else None, running=single if parts else None, ADD=not products,
        **dict.fromkeys(("VALUES", "KEYS"), case.kernel == "product_by_key"), DISTANCES=case.kernel == "product",
        QUERIES=products and case.kernel == "product", TABLE="rel_k", ABSORB=extra, FAR=far, FAR_BLOCK=configuration.block,
        HIDES=case.variant == "hides", **dict.fromkeys(LOOSE, 1000),
        TILE=Tile(configuration.block, case.size, power, case.size, power, far and case.kernel != "table_gradient", True, False, "ieee"),
    )  # fmt: skip


def _kernel(case: Case) -> str:
    return case.kernel.removesuffix("_by_key")  # of large parts the products by key have a launch of their own


def _source(case: Case, configuration: Configuration, target: GPUTarget) -> ASTSource:
    """A kernel as a launch would have it compiled."""
    function, backend, arguments = KERNELS[_kernel(case)], make_backend(target), _arguments(case, configuration)
    bind = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, _ = bind(**{name: arguments[name] for name in function.arg_names})
    _, signature, constants, attributes = function._pack_args(backend, {}, bound, specialization, {})
    return ASTSource(function, signature, constants, attributes)


def measure(case: Case, configuration: Configuration) -> tuple[Resources, dict[str, Any]]:
    """Compile, and what came of it; also the assembly by kind."""
    hip = case.target.startswith("gfx")
    target = GPUTarget("hip", case.target, 64) if hip else GPUTarget("cuda", int(case.target.removeprefix("sm_")), 32)
    options = dict(num_warps=configuration.num_warps, num_stages=configuration.num_stages)
    if configuration.registers is not None:
        options["maxnreg"] = configuration.registers
    compiled = triton.compile(_source(case, configuration, target), target=target, options=options)
    assembly, shared = compiled.asm, compiled.metadata.shared
    if hip:
        text = assembly["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count"))
        stack, products = 4 * spilled, len(re.findall(r"\bv_mfma", text))
    else:
        usage = clocks.cuobjdump(assembly["cubin"], "-res-usage")
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        products = len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", assembly["ptx"]))
    fits = shared <= configs.SHARED_MEMORY[case.target] and getattr(compiled.metadata, "tmem_size", 0) <= TENSOR_MEMORY
    return Resources(registers, stack, shared, products, fits), assembly


def _attempt(case: Case, configuration: Configuration) -> tuple[Resources, dict[str, Any]] | str:
    """`measure`, or why it does not compile."""
    try:
        return measure(case, configuration)
    except Exception as error:  # compilers give up in many ways
        return f"{type(error).__name__}: {' '.join(str(error).split())[:60]}"


def _configurations(case: Case) -> list[Configuration]:
    """What a launch would try, in its order."""
    return configs.configurations(case.kernel, case.target, case.size, case.itemsize, case.variant == "clipped", case.variant == "extra")


# ---- what is shipped ----


def _shipped(case: Case) -> tuple[str, bool]:
    """A row, and whether it is as it should be."""
    refused = []
    for configuration in _configurations(case):
        found = _attempt(case, configuration)
        if isinstance(found, str):
            refused.append(f"{configuration} does not compile ({found})")
            if "PassManager" not in found:  # a launch would not go on
                break
            continue
        what, assembly = found
        wrong = descriptors.overwritten_in(assembly["cubin"]) if case.target == "sm_90" else []
        row = f"{configuration!s:>21}{what.registers:10}{what.stack:6}{what.shared:8}{what.products:9}"
        remarks = [] if what.fits else ["does not fit"]
        remarks += [f"overwrites matrix descriptors: {len(wrong)}"] if wrong else []
        return "  ".join([_name(case) + row, *remarks, *refused]), what.fits and not wrong
    return f"{_name(case)}  {'; '.join(refused)}", False


def _name(case: Case) -> str:
    return f"{case.target:8}{case.kernel:16}{case.size:5}{DTYPES[case.itemsize]:>6} {case.variant:8}"


# ---- all candidates, by clocks ----


class Candidate(NamedTuple):
    case: Case
    configuration: Configuration
    resources: Resources | None
    programs: int  # of an SM at once
    near: clocks.Loop | None  # the loop over tiles near the tables, or over all; clocks and bytes for 64 x 64 pairs
    far: clocks.Loop | None
    problem: str

    @property
    def clocks(self) -> float:
        """What it is ranked by."""
        if self.near is None:
            return math.inf
        return self.near.clocks if self.far is None else (1 - FAR_PART) * self.near.clocks + FAR_PART * self.far.clocks

    @property
    def order(self) -> tuple[Any, ...]:
        stack = self.resources.stack if self.resources else 0
        return self.problem != "", self.clocks, stack, -self.configuration.block

    def row(self) -> str:
        if self.problem or self.resources is None:
            return f"{self.configuration!s:13}{self.problem}"
        found = self.resources
        row = f"{self.configuration!s:13}{self.programs:8}{found.registers:10}{found.stack:6}{found.shared:8}"
        loops = [loop for loop in (self.near, self.far) if loop is not None]
        return row + "".join(
            f"{loop.clocks:8.0f}{loop.instructions:7}{loop.spills:7}{loop.bytes / 1024:6.0f}  {loop.bound:21}" for loop in loops
        )


def candidate(case: Case, configuration: Configuration) -> Candidate:
    """What the model says of one. What does not compile, or does not fit, is one with a `problem`."""
    attempt = _attempt(case, configuration)
    if isinstance(attempt, str):
        return Candidate(case, configuration, None, 0, None, None, attempt)
    found, assembly = attempt
    count = clocks.programs(case.target, found.registers, found.shared, configuration.num_warps)
    if not found.fits or count == 0:
        return Candidate(case, configuration, found, count, None, None, f"does not fit, with {found.shared} bytes of shared memory")
    loops: list[clocks.Loop] = []
    if clocks.modelled(case.target):
        misses = clocks.spills_miss(case.target, found.stack, found.shared, configuration.num_warps, count)
        loops = clocks.estimates(clocks.cuobjdump(assembly["cubin"], "-sass"), case.target, configuration.num_warps, count, misses)
    scale = 64 * 64 / configuration.block**2
    loops = sorted((loop._replace(clocks=scale * loop.clocks, bytes=scale * loop.bytes) for loop in loops), key=lambda loop: -loop.clocks)
    if case.variant == "hides":  # a loop is there twice, and the careful one is not what is run
        loops = loops[len(loops) // 2 :]
    far = loops[-1] if case.variant == "clipped" and len(loops) > 1 else None
    return Candidate(case, configuration, found, count, loops[0] if loops else None, far, "")


def _ranked(cases: list[Case], pool: ProcessPoolExecutor) -> Iterator[str]:
    """Of each case its candidates, best first."""
    wanted = [(case, one) for case in cases for one in dict.fromkeys((*_configurations(case), *_candidates(case)))]
    found = pool.map(candidate, *zip(*wanted, strict=True))
    yield "        block, warps, stages  programs registers stack  shared  clocks instr. spills   KiB  bound by; clipped: near, then far"
    for case, group in itertools.groupby(found, key=lambda one: one.case):
        yield _name(case)
        first = _configurations(case)[0]
        for one in sorted(group, key=lambda one: one.order):
            yield f"{'shipped' if one.configuration == first else '':8}{one.row()}".rstrip()


def _candidates(case: Case) -> Iterable[Configuration]:
    return () if case.kernel.startswith("product") else configs.CANDIDATES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--kernels", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="of heads; default: 64 128 256")
    parser.add_argument("--variants", nargs="+", default=VARIANTS[:-1], choices=VARIANTS, help="tables: rel_k, clipped, all three, none")
    parser.add_argument("--dtypes", nargs="+", default=tuple(DTYPES.values()), choices=DTYPES.values())
    parser.add_argument("--clocks", action="store_true", help="rank all candidates by the clocks that their loops take")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    wanted = [
        case
        for case in (all_cases(options.targets, options.sizes) if options.clocks else cases(options.targets))
        if case.kernel in options.kernels and case.size in options.sizes and case.variant in options.variants
        and DTYPES[case.itemsize] in options.dtypes
    ]  # fmt: skip
    print(f"Triton {triton.__version__}")
    failed = 0
    with ProcessPoolExecutor(options.jobs) as pool:
        if options.clocks:
            for line in _ranked(wanted, pool):
                print(line, flush=True)
            return
        print("target  kernel           head dtype variant  block, warps, stages registers stack  shared products")
        for row, good in pool.map(_shipped, wanted):
            failed += not good
            print(row, flush=True)
    print(f"{failed} do not fit or compile")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
