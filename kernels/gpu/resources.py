"""What the kernels' shipped configurations take of a chip, found by compiling them: no GPU is needed. `python -m kernels.gpu.resources`.

Prints a row per kernel: registers and stack bytes of a thread (stack is where spilled registers go), shared memory of a program, matrix
instructions. Exits with status 1 if one spills a lot or takes more shared memory than the chip has. --search finds the table in configs.py
anew.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what the launches ask for, too

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import MockTensor, create_function_from_signature

from . import KERNELS, configs
from .configs import Configuration
from .operands import LACKING, Inputs, Operand, Saved, Tile, Units
from .operands import SIZES as LOOSE

TARGETS = tuple(configs.SHARED_MEMORY)
NAMES = (
    "forward", "decode", "prepare", "query_gradient", "key_gradient", "table_gradient", "key_product", "query_product", "table_product"
)  # fmt: skip
SIZES = (64, 128, 256)
VARIANTS = ("plain", "clipped", "extra")
# Where a GPU has measured the configurations, what they spill is no objection: of the fastest ones some spill over a thousand bytes a
# thread. Elsewhere more than this is.
MEASURED = ("sm_90",)
MOST_STACK = 512


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
    ok: bool


def cases(targets: Iterable[str] = TARGETS) -> Iterator[Case]:
    """What is checked: 16-bit inputs with rel_k everywhere; float32, and all tables at once, on Hopper with heads up to 64."""
    for target, name, size, itemsize, variant in itertools.product(targets, NAMES, SIZES, (2, 4), VARIANTS):
        on_hopper = target == "sm_90" and size == 64 and (itemsize, variant) in ((2, "extra"), (4, "plain"))
        if name.endswith("_product") and (variant != "plain" or (size == 64 and name != "table_product")):
            continue  # these serve plain tables, two of them large heads only
        if on_hopper or (itemsize == 2 and variant != "extra"):
            yield Case(target, name, size, itemsize, variant)


def _arguments(case: Case, configuration: Configuration) -> dict[str, Any]:
    """What a kernel is launched with for contiguous inputs, addresses and strides multiples of 16, with rel_k (all tables, if extra)."""
    numbers, single = MockTensor({2: tl.bfloat16, 4: tl.float32}[case.itemsize]), MockTensor(tl.float32)
    power, far, extra = triton.next_power_of_2(case.size), case.variant == "clipped", case.variant == "extra"
    operand, table = Operand(numbers, 4096, 1024, 256, 1), Operand(numbers, LACKING, 1024, 256, 1)
    other, parts = table if extra else None, case.variant == "plain"
    products = parts and case.size > 64 and case.itemsize == 2
    return dict(
        inputs=Inputs(operand, None, operand, operand, table, other, other, None, None, None, None, None, None),
        saved=Saved(single, single, None, single if far else None), units=Units(0.125, 0.18, 0.0, 1.0),
        output=operand, grad_output=operand, grad_query=operand, grad_key=operand, grad_value=operand,
        lse=single, grad_lse=None, edge_sums=single if far else None, key_sums=None, partial=single, partial_sums=None,
        edge_owed=single if far else None, kept_tiles=numbers if products else None, grad_tiles=numbers if products else None,
        owed_tiles=numbers if parts else None, running=single if parts else None, ADD=not products,
        content=operand, tiles=numbers, gradient=operand, scale=0.125, SIZE=case.size, COLUMNS=power,
        **dict.fromkeys(LOOSE, 1000), TABLE="rel_k", ABSORB=extra, FAR=far, FAR_BLOCK=configuration.block,
        TILE=Tile(configuration.block, case.size, power, case.size, power, far and case.kernel != "table_gradient", True, False, "ieee"),
    )  # fmt: skip


def _source(case: Case, configuration: Configuration, target: GPUTarget) -> ASTSource:
    """A kernel as a launch would have it compiled."""
    function, backend, arguments = KERNELS[case.kernel], make_backend(target), _arguments(case, configuration)
    bind = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, _ = bind(**{name: arguments[name] for name in function.arg_names})
    _, signature, constants, attributes = function._pack_args(backend, {}, bound, specialization, {})
    return ASTSource(function, signature, constants, attributes)


def measure(case: Case, configuration: Configuration) -> tuple[Resources, dict[str, Any]]:
    """Compile, and what came of it; also the assembly by kind."""
    hip = case.target.startswith("gfx")
    target = GPUTarget("hip", case.target, 64) if hip else GPUTarget("cuda", int(case.target.removeprefix("sm_")), 32)
    options = dict(num_warps=configuration.num_warps, num_stages=configuration.num_stages)
    compiled = triton.compile(_source(case, configuration, target), target=target, options=options)
    assembly, shared = compiled.asm, compiled.metadata.shared
    if hip:
        text = assembly["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count"))
        stack, products = 4 * spilled, len(re.findall(r"\bv_mfma", text))
    else:
        usage = _cuobjdump(assembly["cubin"], "-res-usage")
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        products = len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", assembly["ptx"]))
    fits = (case.target in MEASURED or stack <= MOST_STACK) and shared <= configs.SHARED_MEMORY[case.target]
    return Resources(registers, stack, shared, products, fits), assembly


def _cuobjdump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def _shipped(case: Case) -> tuple[Case, Configuration, Resources]:
    clipped, extra = case.variant == "clipped", case.variant == "extra"
    configuration = configs.configurations(case.kernel, case.target, case.size, case.itemsize, clipped, extra)[0]
    return case, configuration, measure(case, configuration)[0]


def _searched(case: Case) -> tuple[Case, Configuration, Resources]:
    """The first candidate that spills nothing and fits, or else the one that spills least."""
    best = None
    for configuration in configs.CANDIDATES:
        try:
            found = measure(case, configuration)[0]
        except Exception as error:  # a compiler may give up on what cannot fit
            print(f"{case}, {configuration}: {type(error).__name__}", file=sys.stderr)
            continue
        if best is None or found.stack < best[2].stack:
            best = case, configuration, found
        if found.ok and found.stack == 0:
            break
    assert best is not None, case
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--search", action="store_true", help="try the candidates in their order and print the table of configs.py")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    failed = 0
    print(f"Triton {triton.__version__}")
    print("target  kernel           head dtype variant  block, warps, stages registers stack  shared products")
    with ProcessPoolExecutor(options.jobs) as pool:
        for case, configuration, found in pool.map(_searched if options.search else _shipped, list(cases(options.targets))):
            failed += not found.ok
            if options.search:
                print(f"    {tuple(case)}: Configuration{tuple(configuration)},", "" if found.ok else f"# {found}", flush=True)
                continue
            print(
                f"{case.target:8}{case.kernel:16}{case.size:5}{'bf16' if case.itemsize == 2 else 'fp32':>6} {case.variant:8}"
                f"{tuple(configuration)!s:>21}{found.registers:10}{found.stack:6}{found.shared:8}{found.products:9}"
                + ("" if found.ok else "  does not fit"),
                flush=True,
            )  # fmt: skip
    print(f"{failed} do not fit")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
