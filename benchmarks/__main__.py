"""Memory and throughput of relative attention against the length: relattn, its peers, and torch's attention without a relative term.

Every peer runs at every length in a process of its own: it is checked against the reference, then its peak memory and its time are
measured. One that runs out of memory, crashes or is wrong is a row of the result. Interrupted, the same command goes on where it was.
Writes results.json, report.md and pictures to --out; `python -m benchmarks.render DIR` makes the last two anew from the first.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import relattn
from benchmarks.measure import Watch, attempt
from benchmarks.peers import PASSES, PEERS, Problem
from benchmarks.trial import flops, matrix_ceiling, trial
from examples.chorales.storage import read_json, write_json

_LENGTHS = {"cpu": (256, 512, 1024, 2048, 4096, 8192), "cuda": (512, 1024, 2048, 4096, 8192, 16384, 32768)}
_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
_QUICK = (512, 2048)
_QUIET = 0.2  # cores that other processes may take while a row is measured
# Beyond these a peer is not tried at longer lengths either: they only need more.
_FINAL = ("out of memory", "timeout")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--lengths", type=_integers, metavar="L,L,...", help="sequence lengths (default: 256 to 8192; GPU: 512 to 32768)")
    parser.add_argument("--peers", default="all", metavar="all|NAME,...", help=f"of {', '.join(PEERS)}")
    parser.add_argument(
        "--pass", dest="passes", metavar="forward|train|decode", help="one or several (default: forward,train; quick: forward)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32; GPU: bfloat16")
    parser.add_argument("--head-dim", type=_positive, default=64)
    parser.add_argument("--heads", type=_positive, default=8)
    parser.add_argument("--batch", type=_positive, default=1)
    parser.add_argument("--causal", action="store_true", help="each query sees the keys up to its own position (decode always does)")
    parser.add_argument("--clip", type=_positive, metavar="K", help="distances beyond K share its row (default: a row for every distance)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/benchmarks-<settings>")
    parser.add_argument("--quick", action="store_true", help="forward at two lengths, few rounds: under two minutes")
    parser.add_argument("--seconds", type=float, help="of timing per row, at least three rounds (default: 2; quick: 0.3)")
    parser.add_argument("--timeout", type=float, help="seconds for one row, its start and checks included (default: 300; quick: 60)")
    parser.add_argument("--memory-limit", type=float, metavar="GIB", help="CPU: that a row may take (default: 85 %% of what is free)")
    parser.add_argument("--threads", type=_positive, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--tries", type=_positive, default=1, help="a row's, while other processes take over a fifth of a core; the least disturbed counts"
    )
    parser.add_argument("--overwrite", action="store_true", help="measure anew what --out already holds")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = options.dtype or _DTYPE[options.device]
    options.lengths = sorted(set(options.lengths or (_QUICK if options.quick else _LENGTHS[options.device])))
    options.peers = list(PEERS) if options.peers == "all" else _names(parser, "--peers", options.peers, list(PEERS))
    options.passes = _names(parser, "--pass", options.passes or ("forward" if options.quick else "forward,train"), list(PASSES))
    options.seconds = options.seconds if options.seconds is not None else 0.3 if options.quick else 2.0
    options.timeout = options.timeout if options.timeout is not None else 60.0 if options.quick else 300.0
    options.out = options.out or Path("runs") / f"benchmarks-{_slug(options)}"
    return options


def _integers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _positive(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of 1 or more, got {text!r}")
    return value


def _names(parser: argparse.ArgumentParser, flag: str, text: str, known: list[str]) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in known:
            parser.error(f"{flag}: expected some of {', '.join(known)}, got {name!r}")
    return names


def _slug(options: argparse.Namespace) -> str:
    parts = [options.device, options.dtype, f"h{options.heads}", f"d{options.head_dim}"]
    parts += [f"b{options.batch}"] * (options.batch != 1) + ["causal"] * options.causal
    parts += [f"clip{options.clip}"] * (options.clip is not None) + ["quick"] * options.quick
    return "-".join(parts)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What a row's figures depend on, its length, peer and pass aside."""
    names = ("device", "dtype", "head_dim", "heads", "batch", "causal", "clip", "seconds", "threads")
    return {name: getattr(options, name) for name in names}


def environment(device: str, threads: int | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "processor": _processor(), "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(_memory() / 2**30, 1), "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(), "torch": torch.__version__, "relattn": relattn.__version__,
    }  # fmt: skip
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda}
        found |= {"gpu_processors": properties.multi_processor_count}
    else:
        reason = relattn.cpu.unavailable()
        found |= {"threads": threads or torch.get_num_threads(), "native": relattn.cpu.variant() if reason is None else f"none: {reason}"}
    for package in ("transformers", "triton"):
        with contextlib.suppress(ImportError):
            found[package] = importlib.metadata.version(package)
    return found


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout.strip()
    return None


def free_memory() -> int:
    """Bytes that new allocations may take: what the system has free, or what its control group leaves, if that is less."""
    import psutil

    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(free, 2**28)


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
            row = {"pass": problem.passed, "length": problem.length, "peer": peer} | _row(options, rows, problem, peer)
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
        if (row["pass"], row["peer"]) == (problem.passed, peer) and row["length"] < problem.length and row["status"] in _FINAL:
            return {"status": row["status"], "detail": f"not tried: {row['status']} at L = {row['length']}"}
    limit = None
    if problem.device == "cpu":
        limit = int(options.memory_limit * 2**30 if options.memory_limit else 0.85 * free_memory())
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


def begin(options: argparse.Namespace) -> dict[str, Any]:
    """results.json as it is so far, or a new one.

    Raises:
        ValueError: --out holds results of other settings or of another machine or version.
    """
    new = {"settings": settings(options), "environment": environment(options.device, options.threads)}
    path, commit = options.out / "results.json", _commit()
    if options.overwrite or not path.is_file():
        return new | {"date": time.strftime("%Y-%m-%d"), "commits": [commit], "rows": []}
    old = read_json(path)
    for part in ("settings", "environment"):
        changed = [f"{key} {old[part].get(key)!r} -> {value!r}" for key, value in new[part].items() if old[part].get(key) != value]
        if changed:
            raise ValueError(f"--out {options.out} holds rows of other {part} ({'; '.join(changed)}): --overwrite measures them anew")
    if commit not in old["commits"]:
        print(f"{path}: its rows so far are of commit {', '.join(map(str, old['commits']))}, this is {commit}", file=sys.stderr)
        old["commits"].append(commit)
    return old


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        measure(options, begin(options), options.out / "results.json")
        from benchmarks.render import render

        written = render(options.out)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with the next row", file=sys.stderr)
        return 130
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{(options.out / 'report.md').read_text()}\nWritten: {', '.join(str(name) for name in written)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
