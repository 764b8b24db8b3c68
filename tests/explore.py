"""New examples, for as long as asked: the hypothesis tests and both fuzzes of every backend that runs here, in turns.

    python -m tests.explore --minutes 10

`make test` draws the same examples everywhere; this looks beyond them. A failure is printed with the line that reproduces
it, and kept: a test of hypothesis gets an explicit example in its file (tests/draws.py), a call of the fuzz a line in
tests/found.txt. `make test` runs both ever after, so what was kept is committed together with what mends it. Without a
GPU the Triton kernels run in its interpreter. The exit status is 1 if anything was found.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz import FOUND, native_variants
from tests.oracles import USABLE

ROOT = Path(__file__).resolve().parents[1]
TURN = 20  # seconds of fuzz at a time
DTYPES = ("float32", "bfloat16", "float16")
ANY_DTYPE = ("blocked", "reference")  # the kernels have no float64


def run(*arguments: str, **variables: str) -> tuple[int, str]:
    """Python with these arguments in the clone: its exit status and what it printed."""
    environment = os.environ | variables
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout


def fuzz(backend: str, module: str = "fuzz", **variables: str) -> list[str]:
    """One turn of calls nobody chose, of tests/fuzz.py or tests/hidden.py; the lines that reproduce those that failed."""
    chance = random.SystemRandom()
    dtype, seed = chance.choice((*DTYPES, "float64") if backend in ANY_DTYPE else DTYPES), chance.randrange(10**6, 2**31)
    command = ["-m", f"tests.{module}", "--backend", backend, "--dtype", dtype]
    status, printed = run(*command, "--seed", str(seed), "--count", "100000", "--seconds", str(TURN), "--trace", **variables)
    failed = re.findall(r"^seed (\d+): ", printed, re.MULTILINE)
    if status not in (0, 1):  # the process died: in the call named last
        failed += re.findall(r"^seed (\d+) \.\.\.$", printed, re.MULTILINE)[-1:]
    lines = printed.splitlines()
    report = [line for line in lines if not line.endswith(" ...")] if failed or status else lines[-1:]
    print(*(f"{name}={value}" for name, value in variables.items()), *report, sep="\n" if failed or status else " ", flush=True)
    with FOUND.open("a", encoding="utf-8") as kept:
        kept.writelines(f"{'' if module == 'fuzz' else f'{module}:'}{backend} {dtype} {one}\n" for one in failed)
    assigned = "".join(f"{name}={value} " for name, value in variables.items())
    reproducing = [f"{assigned}python {' '.join(command)} --seed {one} --count 1" for one in failed]
    return reproducing or ([f"{assigned}python {' '.join(command)} --seed {seed}"] if status else [])


def hypothesis(skipped: set[str]) -> list[str]:
    """One run of the hypothesis tests, but for those that failed before; the names of those that fail."""
    deselected = [f"--deselect={name}" for name in sorted(skipped)]
    profile = ["--hypothesis-profile=explore", "-p", "no:cacheprovider"]
    status, printed = run("-m", "pytest", "-q", "-m", "hypothesis", *profile, *deselected)
    print(printed if status not in (0, 5) else printed.splitlines()[-1], flush=True)  # 5: none is left
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", printed, re.MULTILINE)
    skipped.update(failed)
    return [f"python -m pytest {name}" for name in failed] or (["python -m pytest -m hypothesis"] if status not in (0, 5) else [])


def turns() -> Iterator[list[str]]:
    """Every backend in turn, one run of the hypothesis tests after each round of them, without end."""
    targets: list[tuple[str, dict[str, str]]] = [(name, {}) for name in USABLE if name != "cpu"]
    targets += [("cpu", {"RELATTN_CPU_VARIANT": variant}) for variant in native_variants()]
    if "triton" not in USABLE and importlib.util.find_spec("triton"):
        targets.append(("triton", {"TRITON_INTERPRET": "1"}))
    skipped: set[str] = set()
    while True:
        for backend, variables in targets:
            yield fuzz(backend, **variables)
            yield fuzz(backend, "hidden", **variables)
        yield hypothesis(skipped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="a turn that was begun is finished")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    found: list[str] = []
    for lines in turns():
        found += lines
        if time.monotonic() > end:
            break
    if found:
        print(f"\nFound {len(found)}. What reproduces them (and see `git diff` for what was kept):", *found, sep="\n  ")
    else:
        print("Nothing was found.")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
