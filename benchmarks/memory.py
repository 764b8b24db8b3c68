"""Cases that measure memory, and how time and memory grow with the length. Every memory is that of a process's first call."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch

from benchmarks.cases import FORWARD, OWN, STEPS, make_inputs, relative
from benchmarks.measure import extra_memory, interleave
from benchmarks.processes import in_fresh_process
from benchmarks.report import Table, judged

_MIB = 2**20


def one_call(kind: str, length: int, heads: int, size: int) -> tuple[int, int]:
    """Bytes at the peak beyond inputs and results, and bytes of the results (output, gradients)."""
    # What any first use loads and starts; by another backend, for this one's may keep memory for the next call.
    STEPS[kind](relative("blocked"), make_inputs(64, size, 127))()
    return extra_memory(STEPS[kind](relative("cpu"), make_inputs(length, size, 2 * length - 1, heads)))


def memory(length: int, heads: int, size: int = 64) -> list[Table]:
    """Peak memory beyond inputs, outputs and gradients, in multiples of the query's size.

    The goal is 4 of them, a float32 table for each thread and 8 MB.
    """
    query, table = 4 * heads * length * size, 4 * (2 * length - 1) * size
    allowed = 4 * query + torch.get_num_threads() * table + 8e6
    rows = []
    for kind in STEPS:
        extra, _ = in_fresh_process(one_call, dict(kind=kind, length=length, heads=heads, size=size))
        rows.append({"name": kind, "value": round(extra / _MIB, 2), "unit": "MiB"} | judged(extra / query, allowed / query, at_most=True))
    title = f"extra memory, L = {length}, D = {size}, B * H = {heads} (query: {query / _MIB:.1f} MiB)"
    return [{"title": title, "figure": "times the query's size", "rows": rows}]


def growth(longest: int, seconds: float, size: int = 64) -> list[Table]:
    """Time and memory of the forward pass of one head, lengths doubling; memory beyond the inputs, with the output."""
    lengths = [2**power for power in range(9, longest.bit_length())]
    rows: list[dict[str, Any]] = []
    for length in lengths:
        step = STEPS[FORWARD](relative("cpu"), make_inputs(length, size, 2 * length - 1, heads=1))
        timing = interleave({OWN: step}, seconds)[OWN]
        extra, output = in_fresh_process(one_call, dict(kind=FORWARD, length=length, heads=1, size=size))
        rows.append({"name": f"L = {length}", "value": timing["median_ms"], "unit": "ms", "quartiles": timing["quartiles_ms"]})
        rows[-1] |= {"rounds": timing["rounds"], "figure": round((extra + output) / _MIB, 3)}
    exponents = {}
    for name, field in (("time", "value"), ("memory", "figure")):
        points = [(math.log(length), math.log(max(row[field], 1e-3))) for length, row in zip(lengths, rows, strict=True)]
        exponents[name] = [_slope(points), _slope(points[len(points) // 2 :])]
    notes = [
        f"{name} grows as L^{whole:.2f}; over the longer half of the lengths, L^{half:.2f}" for name, (whole, half) in exponents.items()
    ]
    title = f"growth, forward, D = {size}, B * H = 1"
    return [{"title": title, "figure": "MiB, output included", "rows": rows, "exponents": exponents, "notes": notes}]


def _slope(points: list[tuple[float, float]]) -> float:
    return round(statistics.linear_regression(*zip(*points, strict=True)).slope, 3)
