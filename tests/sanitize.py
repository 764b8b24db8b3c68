"""The fuzz of the native CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: `python -m tests.sanitize --count 300`.

Each dtype runs in a process of its own, which the first finding ends. Only the library is instrumented, not Python and torch; their
memory is watched all the same, since the sanitizer's malloc serves the whole process. Leaks are not looked for: Python keeps memory
until it exits, by design.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from relattn.kernels.cpu import build

ROOT = Path(__file__).resolve().parents[1]
SANITIZERS = "address,undefined"


def runtime() -> list[str]:
    """What must be in the process before Python: the sanitizers, and the C++ library, whose __cxa_throw they look up at their start."""
    found = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        asked = subprocess.run([*build.compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        path = Path(asked.stdout.strip())
        if not path.is_absolute():  # the compiler repeats the name of what it does not have
            raise FileNotFoundError(f"{build.compiler()[0]} has no {name}: the sanitized run needs GCC (CXX=g++) with its sanitizers")
        found.append(str(path.resolve()))
    return found


def run(library: Path, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments on a sanitized library. A finding is an exit status other than 0."""
    environ = os.environ | {
        "RELATTN_CPU_LIBRARY": str(library.resolve()),
        "LD_PRELOAD": ":".join(runtime()),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    return subprocess.run([sys.executable, *arguments], env=environ, text=True, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="calls in each dtype")
    options = parser.parse_args()
    out = ROOT / "build" / "sanitize"
    report = build.build(out, sanitize=SANITIZERS)
    if not report["library"]:
        raise SystemExit(f"no sanitized library: {report['reason']}")
    failed = False
    for dtype in ("float32", "bfloat16"):
        fuzz = ["-m", "tests.fuzz", "--backend", "cpu", "--dtype", dtype, "--count", str(options.count)]
        done = run(out / build.LIBRARY, *fuzz, cwd=ROOT)
        if done.returncode:
            print(f"{dtype} under {SANITIZERS}: failed with status {done.returncode}")
        failed |= done.returncode != 0
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
