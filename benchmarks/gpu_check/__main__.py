"""Checks and measures the Triton kernels on a GPU, one stage a call: `bash benchmarks/gpu_check.sh OUT STAGE`.

  first    are they right? float64, random calls, edges, the sanitizer, the same bits; ends with status 1 if not
  speed    how fast, kernel by kernel, by configuration and length; peers, memory, CUDA graphs, torch.compile
  profile  what do they wait for? Nsight Compute's counters of each kernel
  train    whole models beside what they replace

Each takes under nine minutes and is useful alone. OUT gets STAGE.json, written anew after every part, and
STAGE_logs.tar.gz. --dry runs tiny sizes in this process with Triton's interpreter: no GPU, no figure that means anything.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STAGES = ("first", "speed", "profile", "train")
_SECONDS = 510.0  # of a stage, its processes' ends included under nine minutes


def lines(report: dict[str, Any]) -> Iterator[str]:
    """A line for each part, as the last that the command prints."""
    for name, part in report["parts"].items():
        text = json.dumps(part["result"]) if "result" in part else " / ".join(part.get("log", [])[-3:])
        yield f"{name:36} {part['status']:12} {text[:700]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "stage", nargs="*", metavar="STAGE", default=["first"], help="first (default), speed, profile, train"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), metavar="DIR", help="default: gpu_check")
    parser.add_argument(
        "--seconds", type=float, default=_SECONDS, help=f"that a stage may take (default: {_SECONDS:.0f})"
    )
    parser.add_argument("--dry", action="store_true", help="tiny sizes without a GPU, to see that every line runs")
    options = parser.parse_args(arguments)
    unknown = [stage for stage in options.stage if stage not in STAGES]
    if unknown:
        parser.error(f"STAGE: expected some of {', '.join(STAGES)}, got {unknown[0]!r}")
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    from benchmarks.gpu_check.common import launcher
    from benchmarks.gpu_check.running import run_stage

    missing = launcher().unavailable()
    if missing is not None:
        raise SystemExit(f"no GPU check: {missing}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped too
    failed = False
    for stage in options.stage:
        groups = importlib.import_module(f"benchmarks.gpu_check.{stage}").plan(options.dry)
        report = run_stage(stage, groups, options.out, options.seconds, inline=options.dry)
        print("\n".join(lines(report)), flush=True)
        failed |= any(part["status"] != "ok" for part in report["parts"].values())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
