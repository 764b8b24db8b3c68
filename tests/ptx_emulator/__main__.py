"""Calls of relattn, forward and backward, in the emulator: against the float64 reference, with what the emulator looks for.

    python -m tests.ptx_emulator [names or seeds] --target sm_80 sm_90 --dtype bfloat16

A line of each call ends in the number of findings; they follow it, each with the PTX line, the line of the kernel's source and, where two
accesses meet, the other one's. The exit status is 1 if anything was found, or a result was wrong.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings

import torch
import triton

from .calls import cases, outcome

SEEDS = (4, 20, 22, 26, 35, 41)  # of tests/fuzz.py, for a run that names no call: small ones, cut in several ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of calls, or seeds of tests.fuzz; none: all calls and a few seeds")
    parser.add_argument("--target", nargs="+", default=["sm_80", "sm_90"])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--count", action="store_true", help="wavefronts of shared memory too, and where banks conflict")
    parser.add_argument("--list", action="store_true", help="only the calls' names")
    options = parser.parse_args()
    names = options.names or [*cases(), *map(str, SEEDS)]
    if options.list:
        raise SystemExit("\n".join(names))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"Triton {triton.__version__}")
    failed = sum(not run(*each, options.count) for each in itertools.product(names, options.target, options.dtype))
    print(f"{failed} failed")
    raise SystemExit(failed > 0)


def run(name: str, target: str, dtype: str, count: bool) -> bool:
    """Whether all is right with a call. Prints what came of it."""
    title, began = f"{name:16} {target} {dtype:8}", time.monotonic()
    try:
        found = outcome(name, target, getattr(torch, dtype), count=count)
    except Exception as error:  # report it and go on
        print(f"{title} {type(error).__name__}: {str(error)[:1500]}", flush=True)
        return False
    session, (worst, share), seconds = found.session, found.worst, time.monotonic() - began
    findings = session.findings()
    verdict = f"{'ok' if found.right else 'WRONG'}: {share:.2f} of the bound ({worst})"
    print(f"{title} {verdict}, {len(session.launches)} launches, {seconds:.1f} s, {len(findings)} findings", flush=True)
    for line in (*findings, *session.remarks(), *session.conflicts()):
        print("   ", line, flush=True)
    return found.right and not findings


if __name__ == "__main__":
    main()
