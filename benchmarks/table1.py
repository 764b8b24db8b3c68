"""Music Transformer's Table 1, measured, with relattn's row: `python -m benchmarks.table1 [--device cpu|cuda] [--out DIR]`.

Memory of the relative term, of one layer and head, causal, D_h = 64, float32: the relative tensors (Shaw et al. 2018: an embedding for
every pair, (L, L, D); Huang et al. 2018: the table E^r, (L, D)) and, beside them, the relative logits (L, L). Each figure is measured in a
process of its own: what stays allocated once the tensor is made (resident memory on a CPU, allocator statistics on a GPU), and the peak of
one whole forward call beyond its inputs. MB are 10^6 bytes, as in the paper (Huang et al. 2018, arXiv 1809.04281).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import peak_memory
from benchmarks.peers import PEERS, Problem, own_fastest
from benchmarks.processes import in_fresh_process
from examples.chorales.storage import atomic_write, write_json

LENGTHS = (650, 2048, 3500)
# MB of relative tensors by row and length: the paper's Table 1, with the digits that its formulas give (it prints 108, 1100, 3100).
PAPER: dict[str, dict[int, float]] = {"shaw": {650: 108, 2048: 1074, 3500: 3136}, "skew": {650: 0.17, 2048: 0.52, 3500: 0.90}}
_MB = 1e6
_METHODS = {"shaw": "Shaw et al., embeddings (L, L, D)", "skew": "Huang et al., skew", "relattn": "relattn"}


def _table(problem: Problem) -> Tensor:
    """E^r, (L, D): a row for every distance to the left."""
    return torch.randn(problem.length, problem.head_dim, device=problem.device) / 8


def _logits(problem: Problem) -> Tensor:
    return torch.randn(problem.length, problem.length, device=problem.device)


_TENSORS: dict[str, Callable[[Problem], Tensor]] = {
    "shaw": lambda problem: _table(problem)[problem.rows()],
    "skew": _table,
    "relattn": _table,
    "logits": _logits,
}


def held(name: str, length: int, device: str) -> int:
    """Bytes that stay allocated when the tensor has been made."""
    problem = _problem(length, device)
    for _ in range(3):  # what a first use loads
        _TENSORS[name](problem._replace(length=8))
    before = _allocated(device)
    tensor = _TENSORS[name](problem)
    taken = _allocated(device) - before
    del tensor
    return taken


def _allocated(device: str) -> int:
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    # Exact, where VmRSS lags by up to 64 pages a thread, and without the pages of program files.
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("Anonymous:")).split()[1])


def whole_call(method: str, length: int, device: str) -> int:
    """Bytes at the peak of one forward call, beyond its inputs."""
    peer = PEERS[own_fastest(device) if method == "relattn" else method]
    problem = _problem(length, device)

    def step(problem: Problem) -> Callable[[], tuple[Tensor, ...]]:
        attention, inputs = peer.make(problem), problem.inputs()

        def call() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attention(*inputs),)

        return call

    step(problem._replace(length=64))()
    return peak_memory(step(problem), device)[0]


def _problem(length: int, device: str) -> Problem:
    return Problem(length, heads=1, head_dim=64, device=device, causal=True)


def measure(lengths: tuple[int, ...], device: str) -> list[dict[str, Any]]:
    """A row for every method and length, bytes."""
    logits = {length: _in_process(held, name="logits", length=length, device=device) for length in lengths}
    rows = []
    for method in _METHODS:
        for length in lengths:
            tensors = _in_process(held, name=method, length=length, device=device)
            call = _in_process(whole_call, method=method, length=length, device=device)
            rows.append({"method": method, "length": length, "relative_tensors": tensors, "whole_call": call})
            rows[-1]["relative_logits"] = 0 if method == "relattn" else logits[length]
            rows[-1]["relative_tensors_computed"] = 4 * length * 64 * (length if method == "shaw" else 1)
            rows[-1]["relative_logits_computed"] = 0 if method == "relattn" else 4 * length**2
    return rows


def _in_process(function: Callable[..., int], **arguments: Any) -> int:
    return in_fresh_process(function, arguments)


def text(rows: Sequence[Mapping[str, Any]], device: str) -> str:
    """The table in Markdown, MB."""
    lengths = sorted({row["length"] for row in rows})
    lines = ["| relative tensors + logits, MB | " + " | ".join(f"L = {length}" for length in lengths) + " |"]
    lines.append("| --- |" + " ---: |" * len(lengths))
    found = {(row["method"], row["length"]): row for row in rows}
    for method, label in _METHODS.items():
        pairs = [(found[method, length]["relative_tensors"], found[method, length]["relative_logits"]) for length in lengths]
        cells = [f"{_number(tensors)} + {_number(logits)}" for tensors, logits in pairs]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
        if method in PAPER and any(length in PAPER[method] for length in lengths):
            cells = [f"{PAPER[method][length]:,}" if length in PAPER[method] else "" for length in lengths]
            lines.append("| - in the paper | " + " | ".join(cells) + " |")
    lines += ["", "| peak of one forward call beyond its inputs, MB | " + " | ".join(f"L = {length}" for length in lengths) + " |"]
    lines.append("| --- |" + " ---: |" * len(lengths))
    for method, label in _METHODS.items():
        lines.append(f"| {label} | " + " | ".join(_number(found[method, length]["whole_call"]) for length in lengths) + " |")
    what = "allocator statistics" if device == "cuda" else "the resident memory of a process each"
    lines += ["", f"One layer and head, causal, D_h = 64, float32, measured by {what}; MB = 10^6 bytes."]
    return "\n".join(lines)


def _number(value: float) -> str:
    megabytes = value / _MB
    return f"{megabytes:,.0f}" if megabytes >= 100 else f"{megabytes:.1f}" if megabytes >= 1 else f"{megabytes:.2f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.table1", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", type=lambda value: tuple(int(part) for part in value.split(",")), default=LENGTHS, metavar="L,L,...")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for table1.json and table1.md")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if options.device == "cpu" and sys.platform != "linux":
        parser.error("--device cpu: resident memory is read from /proc, which Linux alone has")
    rows = measure(options.lengths, options.device)
    table = text(rows, options.device)
    print(table)
    if options.out:
        write_json(options.out / "table1.json", {"device": options.device, "torch": torch.__version__, "rows": rows})
        with atomic_write(options.out / "table1.md") as file:
            file.write(table + "\n")
        print(f"\nWritten: {options.out}/table1.json, table1.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
