"""Memory and throughput of relative attention against the length: relattn, its peers, and torch's attention without a relative term.

Every peer runs at every length in a process of its own: it is checked against the reference, then its peak memory and its time are
measured. One that runs out of memory, crashes or is wrong is a row of the result. Interrupted, the same command goes on where it was.
Writes results.json, report.md and pictures to --out; `python -m benchmarks.render DIR` makes the last two anew from the first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import matrix_ceiling
from benchmarks.peers import PASSES, PEERS, Problem
from benchmarks.processes import Watch, attempt
from benchmarks.runs import FINAL, GOES_ON, allowed_memory, begin, chosen_device, integers, names, positive
from benchmarks.trial import flops, trial
from examples.chorales.storage import write_json
from examples.chorales.terminal import exit_code

_LENGTHS = {"cpu": (256, 512, 1024, 2048, 4096, 8192), "cuda": (512, 1024, 2048, 4096, 8192, 16384, 32768)}
_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
_QUICK = (512, 2048)
_QUIET = 0.2  # cores that other processes may take while a row is measured


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--lengths", type=integers, metavar="L,L,...", help="sequence lengths (default: 256 to 8192; GPU: 512 to 32768)")
    parser.add_argument("--peers", default="all", metavar="all|NAME,...", help=f"of {', '.join(PEERS)}")
    parser.add_argument(
        "--pass", dest="passes", metavar="forward|train|decode", help="one or several (default: forward,train; quick: forward)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32; GPU: bfloat16")
    parser.add_argument("--head-dim", type=positive, default=64)
    parser.add_argument("--heads", type=positive, default=8)
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--causal", action="store_true", help="each query sees the keys up to its own position (decode always does)")
    parser.add_argument("--clip", type=positive, metavar="K", help="distances beyond K share its row (default: a row for every distance)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/benchmarks-<settings>")
    parser.add_argument("--quick", action="store_true", help="forward at two lengths, few rounds: under two minutes")
    parser.add_argument("--seconds", type=float, help="of timing per row, at least three rounds (default: 2; quick: 0.3)")
    parser.add_argument("--timeout", type=float, help="seconds for one row, its start and checks included (default: 300; quick: 60)")
    parser.add_argument("--memory-limit", type=float, metavar="GIB", help="CPU: that a row may take (default: 85 %% of what is free)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--tries", type=positive, default=1, help="a row's, while other processes take over a fifth of a core; the least disturbed counts"
    )
    parser.add_argument("--overwrite", action="store_true", help="measure anew what --out already holds")
    options = parser.parse_args(arguments)
    options.device = chosen_device(parser, options.device)
    options.dtype = options.dtype or _DTYPE[options.device]
    options.lengths = sorted(set(options.lengths or (_QUICK if options.quick else _LENGTHS[options.device])))
    options.peers = list(PEERS) if options.peers == "all" else names(parser, "--peers", options.peers, list(PEERS))
    options.passes = names(parser, "--pass", options.passes or ("forward" if options.quick else "forward,train"), list(PASSES))
    options.seconds = options.seconds if options.seconds is not None else 0.3 if options.quick else 2.0
    options.timeout = options.timeout if options.timeout is not None else 60.0 if options.quick else 300.0
    options.out = options.out or Path("runs") / f"benchmarks-{_slug(options)}"
    return options


def _slug(options: argparse.Namespace) -> str:
    parts = [options.device, options.dtype, f"h{options.heads}", f"d{options.head_dim}"]
    parts += [f"b{options.batch}"] * (options.batch != 1) + ["causal"] * options.causal
    parts += [f"clip{options.clip}"] * (options.clip is not None) + ["quick"] * options.quick
    return "-".join(parts)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What a row's figures depend on, its length, peer and pass aside."""
    listed = ("device", "dtype", "head_dim", "heads", "batch", "causal", "clip", "seconds", "threads")
    return {name: getattr(options, name) for name in listed}


def problems(options: argparse.Namespace) -> Iterator[tuple[Problem, str]]:
    """(problem, peer) in the order in which they are run: short ones first, so that an interrupted run tells something."""
    for length in options.lengths:
        for passed in options.passes:
            problem = Problem(
                length, passed, options.batch, options.heads, options.head_dim, options.dtype, options.device, options.causal, options.clip
            )
            for peer in options.peers:
                yield problem, peer


def measure(options: argparse.Namespace, results: dict[str, Any], path: Path) -> None:
    """Add the rows that `results` lacks, writing after each."""
    from tqdm import tqdm

    rows = results["rows"]
    known = {(row["pass"], row["length"], row["peer"]) for row in rows}
    waiting = [(problem, peer) for problem, peer in problems(options) if (problem.passed, problem.length, peer) not in known]
    if known:
        print(f"{path}: {len(known)} rows are there, {len(waiting)} to go", flush=True)
    if "matrix_tflops" not in results:
        found = attempt(matrix_ceiling, dict(dtype=options.dtype, device=options.device), options.timeout, options.threads)
        if isinstance(found, dict):
            raise ValueError(f"torch's product of matrices cannot be measured here: {found['status']}, {found['detail']}")
        results["matrix_tflops"] = round(found, 3)
    with tqdm(total=len(waiting), unit="row", disable=None, file=sys.stderr, dynamic_ncols=True) as bar:
        for problem, peer in waiting:
            bar.set_description(f"L = {problem.length}, {problem.passed}, {peer}")
            row: dict[str, Any] = {"pass": problem.passed, "length": problem.length, "peer": peer}
            row |= _row(options, rows, problem, peer)
            if "median_ms" in row:
                count = flops(problem, PEERS[peer].relative)
                tflops = count / row["median_ms"] / 1e9
                row |= {"flops": count, "tflops": round(tflops, 5)}
                row["percent_of_matrix_ceiling"] = round(100 * tflops / results["matrix_tflops"], 2)
            rows.append(row)
            write_json(path, results)
            if row["status"] != "not applicable":
                tqdm.write(_line(row), file=sys.stdout)
            bar.update()


def _row(options: argparse.Namespace, rows: list[dict[str, Any]], problem: Problem, peer: str) -> dict[str, Any]:
    refusal = PEERS[peer].refusal(problem)
    if refusal is not None:
        return {"status": "not applicable", "detail": refusal}
    for row in rows:
        if (row["pass"], row["peer"]) == (problem.passed, peer) and row["length"] < problem.length and row["status"] in FINAL:
            return {"status": row["status"], "detail": f"not tried: {row['status']} at L = {row['length']}"}
    limit = allowed_memory(options.memory_limit) if problem.device == "cpu" else None
    arguments = dict(peer=peer, problem=problem._asdict(), seconds=options.seconds, memory_limit=limit)
    tries: list[dict[str, Any]] = []
    for _ in range(options.tries):
        with Watch() as watch:
            row = attempt(trial, arguments, options.timeout, options.threads)
        tries.append(row | watch.seen)
        if (watch.seen["other_processes_cores"] or 0.0) <= _QUIET or "median_ms" not in row:
            break
    return min(tries, key=lambda row: row["other_processes_cores"] or 0.0)


def _line(row: dict[str, Any]) -> str:
    text = f"L = {row['length']:<6} {row['pass']:8} {PEERS[row['peer']].label:28} "
    if "median_ms" not in row:
        return text + f"{row['status']}: {row['detail']}"
    low, high = row["quartiles_ms"]
    text += f"{row['median_ms']:10.3f} ms ({low:.3f} - {high:.3f}), {row['peak_bytes'] / 2**20:9.1f} MiB"
    return text + ("" if row["status"] == "ok" else f"   {row['status'].upper()}: errors of {row['errors']} roundings")


def run(options: argparse.Namespace) -> None:
    measure(options, begin(options, settings(options)), options.out / "results.json")
    from benchmarks.render import render

    written = render(options.out)
    print(f"\n{(options.out / 'report.md').read_text()}\nWritten: {', '.join(str(name) for name in written)}")


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return exit_code(lambda: run(options), GOES_ON)


if __name__ == "__main__":
    sys.exit(main())
