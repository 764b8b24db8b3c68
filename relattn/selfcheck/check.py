"""`python -m relattn --check`: is what runs here right, how fast is it, and what could be better?"""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import relattn.kernels
from relattn import relative_attention, skew
from relattn.backends import available_backends, cpu, triton
from relattn.selfcheck import calls

_SECONDS = 1.0  # of random calls for a backend
_LENGTHS = {"cuda": 4096, "cpu": 512}  # that are timed
_CPUINFO = Path("/proc/cpuinfo")
_FEWEST = 8  # even where each compiles kernels
_MIXED: tuple[tuple[Callable[[calls.Call], None], float], ...] = (
    (calls.one_sided, 0.3), (calls.rel_k, 0.4), (calls.rel_k_per_head, 0.3), (calls.rel_q, 0.3), (calls.rel_v, 0.3), (calls.rel_bias, 0.3),
    (calls.pos_bias_u, 0.3), (calls.scale, 0.2), (calls.dropout, 0.3), (calls.offset, 0.2), (calls.offsets, 0.2), (calls.causal, 0.4),
    (calls.window, 0.3), (calls.chunk, 0.2), (calls.key_mask, 0.3), (calls.key_lengths, 0.3), (calls.bool_mask, 0.2),
    (calls.float_mask, 0.2), (calls.packed, 0.2),
)  # fmt: skip


def mixture(seed: int) -> calls.Call:
    """A call of a random size with a random choice of features."""
    rng = random.Random(seed)
    key_heads, groups = rng.choice((1, 2)), rng.choice((1, 1, 2))
    size = rng.choice((8, 20, 64))
    queries = rng.choice((1, 5, 17, 64, 130))
    sizes = dict(batch=rng.choice((1, 2, 3)), heads=groups * key_heads, key_heads=key_heads, queries=queries, size=size)
    sizes |= dict(keys=queries if rng.random() < 0.5 else rng.choice((3, 33, 150)), value_size=rng.choice((size, 16)))
    chosen = [feature for feature, chance in _MIXED if rng.random() < chance]
    if calls.bool_mask in chosen and calls.float_mask in chosen:
        chosen.remove(calls.bool_mask)
    return calls.make(torch.Generator().manual_seed(seed), sizes, *chosen)


def wrong_calls(backend: str, device: str, counts: dict[str, int]) -> Iterator[str]:
    """Random calls for a second, in every dtype in turn: what was wrong. `counts` takes how many were right and how many refused."""
    asked, threads = calls.Feature("random call"), torch.get_num_threads()
    end, seed = time.monotonic() + _SECONDS, 0
    while seed < _FEWEST or time.monotonic() < end:
        dtype = list(calls.DTYPES)[seed % len(calls.DTYPES)]
        torch.set_num_threads(threads if seed % 8 < 4 else 1)
        try:
            reason = calls.refused(mixture(seed), backend, calls.DTYPES[dtype], device, asked)
            counts["right" if reason is None else "refused"] += 1
        except Exception as error:  # one more line of the report
            yield f"call {seed} in {dtype}: {type(error).__name__}: {error}"
        seed += 1
    torch.set_num_threads(threads)


# ---- speeds ----


def skewed(query: Tensor, key: Tensor, value: Tensor, rel_k: Tensor) -> Tensor:
    """What relattn replaces: every product with the table, skewed, and all scores in memory."""
    return ((query @ key.mT + skew(query @ rel_k.mT)) * query.shape[-1] ** -0.5).softmax(-1) @ value


def sdpa(query: Tensor, key: Tensor, value: Tensor, rel_k: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def timed(attention: Callable[..., Tensor], tensors: list[Tensor]) -> float:
    """Seconds of one forward and backward pass."""
    gpu = tensors[0].is_cuda
    if gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    output = attention(*tensors)
    torch.autograd.grad(output, tensors, torch.ones_like(output), allow_unused=True)
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def speeds(backends: list[str], device: str, length: int, seconds: float = 2.0) -> dict[str, float]:
    """Median seconds of forward and backward, sides taking turns for so long: what relattn replaces, these backends, torch's own."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = [(1, 8, length, 64)] * 3 + [(2 * length - 1, 64)]
    tensors = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]

    def ours(backend: str) -> Callable[..., Any]:
        return lambda *tensors: relative_attention(*tensors, backend=backend)

    sides = {"materialising skew": skewed, **{name: ours(name) for name in backends}, "torch's SDPA, no relative term": sdpa}
    times: dict[str, list[float]] = {name: [] for name in sides}
    end, rounds = time.monotonic() + seconds, 0
    while rounds < 3 or (time.monotonic() < end and rounds < 20):
        rounds += 1
        for name, attention in sides.items():
            times[name].append(timed(attention, tensors))
    return {name: statistics.median(found[1:]) for name, found in times.items()}  # the first warms up


# ---- advice ----


def advice(facts: dict) -> Iterator[str]:
    """What makes relattn slow here, and what helps. `facts` are those of `python -m relattn --json`."""
    reason = facts["backends"]["cpu"]["reason"]
    if reason is not None:
        yield (
            f"no native CPU kernels ({reason}): install a C++17 compiler (g++ or clang++), then "
            "pip install --force-reinstall --no-deps --no-cache-dir relattn"
        )
    else:
        yield from _instruction_set(facts["cpu"]["instruction_set"])
    threads, cores = facts["cpu"]["threads"], facts["cpu"]["cores"]
    if cores is not None and threads > cores:
        yield f"torch uses {threads} threads on {cores} cores: set OMP_NUM_THREADS={cores}, or torch.set_num_threads"
    if Path("/dev/nvidia0").exists() and not torch.cuda.is_available():
        yield f"this machine has an NVIDIA GPU that torch {torch.__version__} does not see: install torch's build for it"
    if triton.INTERPRETED:
        yield "TRITON_INTERPRET is set: kernels for GPUs run in an interpreter, which is for tests"


def _instruction_set(used: str) -> Iterator[str]:
    """Where the processor has a better one than is used."""
    try:
        flags = set(_CPUINFO.read_text(encoding="utf-8").partition("flags\t")[2].partition("\n")[0].split())
    except OSError:
        return
    best = "amx" if {"amx_bf16", "avx512_bf16"} <= flags else "avx512" if "avx512bw" in flags else "avx2" if "avx2" in flags else "portable"
    order = ("portable", "avx2", "avx512", "amx")
    if "sse2" in flags and order.index(best) > order.index(used):
        if os.environ.get("RELATTN_CPU_VARIANT"):
            yield f"RELATTN_CPU_VARIANT holds the CPU kernels at {used}, this processor has {best}"
        else:
            yield f"the CPU kernels use {used} instructions, this processor has {best}: {_compiler()} did not build them, a newer one does"
    elif "sse2" in flags and best == "portable":
        yield "this processor has no AVX2: the CPU kernels run with portable instructions, several times slower"


def _compiler() -> str:
    try:
        report = json.loads((Path(relattn.kernels.__path__[0]) / "cpu" / "build_report.json").read_text(encoding="utf-8"))
        return report["compiler"] or "the compiler"
    except (OSError, ValueError, KeyError):
        return "the compiler"


def _busy(backend: str, length: int) -> Iterator[str]:
    """Where more threads than one do not help."""
    threads = torch.get_num_threads()
    if threads == 1:
        return
    several = speeds([backend], "cpu", length, 0.5)[backend]
    torch.set_num_threads(1)
    try:
        alone = speeds([backend], "cpu", length, 0.5)[backend]
    finally:
        torch.set_num_threads(threads)
    if several > 0.9 * alone:
        yield (
            f"{threads} threads take {several / alone:.1f} times as long as one: other programs use the cores, or threads are too many; "
            "try OMP_NUM_THREADS=1 or OMP_WAIT_POLICY=PASSIVE"
        )


def main(facts: dict) -> int:
    """Print the report; the exit status is 1 where something is wrong."""
    usable = [name for name, reason in available_backends().items() if reason is None]
    failed = False
    print("against the float64 reference, random calls with gradients")
    for name in usable:
        device = "cuda" if name == "triton" and not triton.INTERPRETED else "cpu"
        counts = {"right": 0, "refused": 0}
        wrong = list(wrong_calls(name, device, counts))
        failed |= bool(wrong)
        refused = f", {counts['refused']} refused" if counts["refused"] else ""
        print(f"  {name:<10} {counts['right']} right{refused}" + (f", {len(wrong)} WRONG" if wrong else ""), flush=True)
        for line in wrong[:5]:
            print(f"    {line}")
    for device, length in _LENGTHS.items():
        timed = [name for name in usable if name not in ("reference", "triton" if device == "cpu" else "cpu")]
        if device == "cuda" and not torch.cuda.is_available():
            continue
        found = speeds(timed, device, length)
        dtype, threads = ("bfloat16", "") if device == "cuda" else ("float32", f", threads: {torch.get_num_threads()}")
        print(f"forward and backward on {device}: (1, 8, {length}, 64), {dtype}{threads}, every distance")
        fastest = found[timed[0]]
        for name, seconds in sorted(found.items(), key=lambda item: item[1]):
            print(f"  {name:<32} {1e3 * seconds:9.2f} ms  {seconds / fastest:5.2f} times {timed[0]}'s")
    tips = [*advice(facts), *(_busy("cpu", 512) if cpu.unavailable() is None else ())]
    print("advice", *(f"  {tip}" for tip in tips or ["nothing to improve was found"]), sep="\n")
    return int(failed)
