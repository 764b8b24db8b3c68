"""Random calls, those at the edges and those whose hidden places hold anything, by the native CPU kernels under two sanitizers, for
addresses and for undefined behaviour.

    python -m tests.sanitize --count 300

Every instruction set of this processor and every dtype runs in a process of its own, which the first finding ends. Only the library is
instrumented, not Python and torch; their memory is watched all the same, since the sanitizer's malloc serves the whole process. Leaks are
not looked for: Python keeps memory until it exits, by design. CXX=clang++ takes Clang's sanitizers in place of GCC's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from relattn.kernels.cpu import build

ROOT = Path(__file__).resolve().parents[1]
SANITIZERS = "address,undefined"


def is_clang() -> bool:
    return "clang" in subprocess.run([*build.compiler(), "--version"], capture_output=True, text=True, check=True).stdout


def runtime() -> list[str]:
    """What must be in the process before Python: the sanitizers, and the C++ library, whose __cxa_throw they look up at their start."""
    found = []
    sanitizers = (f"libclang_rt.asan-{platform.machine()}.so",) if is_clang() else ("libasan.so", "libubsan.so")
    for name in (*sanitizers, "libstdc++.so"):
        asked = subprocess.run([*build.compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        path = Path(asked.stdout.strip())
        if not path.is_absolute():  # the compiler repeats the name of what it does not have
            raise FileNotFoundError(f"{build.compiler()[0]} has no {name}: the sanitized run needs GCC or Clang with their sanitizers")
        found.append(str(path.resolve()))
    return found


def run(library: Path, *arguments: str, variant: str = "", **options) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments on a sanitized library. A finding is an exit status other than 0."""
    environ = os.environ | {
        "RELATTN_CPU_VARIANT": variant,
        "RELATTN_CPU_LIBRARY": str(library.resolve()),
        "LD_PRELOAD": ":".join(runtime()),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    return subprocess.run([sys.executable, *arguments], env=environ, text=True, **options)


def usable(library: Path) -> list[str]:
    """The library's instruction sets that this processor has, fastest first."""
    script = "import json; from tests.fuzz import native_variants; print(json.dumps(native_variants()))"
    done = run(library, "-c", script, cwd=ROOT, stdout=subprocess.PIPE)
    done.check_returncode()
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="random calls of the first variant in float32, half of it elsewhere")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first call")
    options = parser.parse_args()
    out = ROOT / "build" / "sanitize"
    if is_clang():  # its sanitizers are linked statically unless told otherwise, and it does not say by a macro that they are there
        os.environ["LDFLAGS"] = f"-shared-libasan {os.environ.get('LDFLAGS', '')}"
        os.environ["CXXFLAGS"] = f"-D__SANITIZE_ADDRESS__=1 {os.environ.get('CXXFLAGS', '')}"
    report = build.build(out, sanitize=SANITIZERS)
    if not report["library"]:
        raise SystemExit(f"no sanitized library: {report['reason']}")
    library = out / build.LIBRARY
    failed = False
    for place, variant in enumerate(usable(library)):
        for number, dtype in enumerate(("float32", "bfloat16", "float16")):
            count = options.count if place == 0 and dtype == "float32" else options.count // 2
            how = ["--backend", "cpu", "--dtype", dtype]
            at_edges = ["-m", "tests.edges", *how, "--seed", str(options.seed + place + number)]  # seeds decide over tiles and threads
            seeds = ["--count", str(count), "--seed", str(options.seed)]
            for command in (at_edges, ["-m", "tests.fuzz", *how, *seeds], ["-m", "tests.hidden", *how, *seeds]):
                print(f"{variant}: ", end="", flush=True)
                done = run(library, *command, cwd=ROOT, variant=variant)
                if done.returncode:
                    print(f"{variant} {dtype} under {SANITIZERS}: {' '.join(command)} failed with status {done.returncode}", flush=True)
                failed |= done.returncode != 0
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
