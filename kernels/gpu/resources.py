"""What the kernels' shipped configurations take of a chip, found by compiling them: no GPU is needed. `python -m kernels.gpu.resources`.

Prints a row per kernel: registers and stack bytes of a thread (stack is where spilled registers go), shared memory of a program, matrix
instructions. Exits with status 1 if one spills or takes more shared memory than the chip has. --search finds the table in configs.py anew.
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
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import KERNELS, configs
from .configs import Configuration

TARGETS = tuple(configs.SHARED_MEMORY)
NAMES = ("forward", "prepare", "query_gradient", "key_gradient", "table_gradient")
SIZES = (64, 128, 256)
VARIANTS = ("plain", "clipped", "extra")
# (kernel, head size, itemsize): bytes a thread. Nothing smaller is left to try: two sums of 16 x 256 and four tiles of inputs.
KNOWN_SPILLS = {("table_gradient", 256, 2): 80}
_FLOATS = ("scale", "log2_scale", "hidden_from", "keep_scale")
_TILES = ("query_u", "key", "value", "rel_k", "rel_q", "rel_v", "output", "grad_output", "grad_query", "grad_key", "grad_value")
_FLOAT_POINTERS = ("lse", "delta", "base", "edges", "edge_sums", "partial", "partial_lse")


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
        if on_hopper or (itemsize == 2 and variant != "extra"):
            yield Case(target, name, size, itemsize, variant)


def _source(case: Case, configuration: Configuration) -> ASTSource:
    """A kernel as launched for contiguous inputs, addresses and strides multiples of 16, with rel_k (all tables, if extra)."""
    function, dtype = KERNELS[case.kernel], {2: "*bf16", 4: "*fp32"}[case.itemsize]
    power, block = triton.next_power_of_2(case.size), configuration.block
    far = case.variant == "clipped"
    constants: dict[str, Any] = dict(
        CLIPPED=far, LATE=True, DROPOUT=False, SIZE=case.size, VALUE_SIZE=case.size, BLOCK=block, BLOCK_SIZE=power, BLOCK_VALUE_SIZE=power,
        PRECISION="ieee", TABLE="rel_k", ABSORB=case.variant == "extra", FAR=far, FAR_BLOCK=block,
    )  # fmt: skip
    present = {*_TILES, *_FLOAT_POINTERS}
    if case.variant != "extra":
        present -= {"rel_q", "rel_v"}
    if not far:
        present -= {"edges", "edge_sums"}
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(function.arg_names):
        if name.endswith("_strides"):
            length = 5 if name == "output_strides" and case.kernel == "forward" else {"key_mask": 2, "rel_bias": 2}.get(name[:-8], 4)
            length = 3 if name in ("rel_k_strides", "rel_q_strides", "rel_v_strides", "grad_lse_strides") else length
            signature[name] = ("i32",) * (length - 1) + ("constexpr",)
            constexprs[index, length - 1] = 1
            attributes |= {(index, place): [["tt.divisibility", 16]] for place in range(length - 1)}
        elif name in present:
            signature[name] = dtype if name in _TILES else "*fp32"
            attributes[index,] = [["tt.divisibility", 16]]
        elif name in constants or name not in (*_FLOATS, *_INTEGERS):
            signature[name] = "constexpr"
            constexprs[index,] = constants.get(name)
        else:
            signature[name] = "fp32" if name in _FLOATS else "i32"
    return ASTSource(function, signature, constexprs, attributes)


_INTEGERS = (
    "heads", "group", "queries", "keys", "batch", "query_blocks", "key_blocks", "split_keys", "table_rows", "query_offset",
    "first", "last", "left", "threshold", "diagonals", "first_diagonal", "shared_heads", "batches", "chunk",
)  # fmt: skip


def measure(case: Case, configuration: Configuration) -> tuple[Resources, dict[str, Any]]:
    """Compile, and what came of it; also the assembly by kind."""
    hip = case.target.startswith("gfx")
    target = GPUTarget("hip", case.target, 64) if hip else GPUTarget("cuda", int(case.target.removeprefix("sm_")), 32)
    options = dict(num_warps=configuration.num_warps, num_stages=configuration.num_stages)
    compiled = triton.compile(_source(case, configuration), target=target, options=options)
    assembly, shared = compiled.asm, compiled.metadata.shared
    if hip:
        text = assembly["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count"))
        stack, products = 4 * spilled, len(re.findall(r"\bv_mfma", text))
    else:
        usage = _cuobjdump(assembly["cubin"], "-res-usage")
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        products = len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", assembly["ptx"]))
    fits = stack <= KNOWN_SPILLS.get(case[1:4], 0) and shared <= configs.SHARED_MEMORY[case.target]
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
    """The first candidate that fits, or else the one that spills least."""
    best = None
    for configuration in configs.CANDIDATES:
        try:
            found = measure(case, configuration)[0]
        except Exception as error:  # a compiler may give up on what cannot fit
            print(f"{case}, {configuration}: {type(error).__name__}", file=sys.stderr)
            continue
        if best is None or found.ok or found.stack < best[2].stack:
            best = case, configuration, found
        if found.ok:
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
