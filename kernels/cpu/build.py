"""Compiles the native CPU library, which needs no torch: for setup.py, or by hand, `python -m kernels.cpu.build --out DIR`.

variant.cpp is compiled once for each instruction set, library.cpp once for any processor; it picks among the variants at run time.
Standard library only: setup.py loads this file by its path, before anything is installed.

Environment: CXX, CXXFLAGS and LDFLAGS as usual. RELATTN_BUILD_DIR is where object files are kept (default: build/cpu of the source tree).
RELATTN_PURE=1 builds nothing: for the wheel of those platforms that have no other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
LIBRARY = "librelattn_cpu.so"
REPORT = "build_report.json"

# Never -ffast-math (infinities and NaN mean something here) and never -march=native (wheels move between machines).
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast", "-Wall", "-Wextra", "-pthread"]
OPTIMIZED = ["-O3"]
SANITIZED = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = AVX2 + ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
VARIANTS = {
    "portable": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "amx": AVX512 + ["-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}


class BuildError(Exception):
    """Why there is no library."""


class Step(NamedTuple):
    """One command of the build. Paths are relative to the object folder."""

    output: str
    inputs: list[str]
    command: list[str]


def build(out: Path, *, sources: Path = HERE, sanitize: str = "", verbose: bool = False) -> dict[str, object]:
    """Build the library into the folder `out`, and return the report that is written beside it.

    Without a compiler there is no library, and none from an older build either: it would not be what the sources say.
    """
    report: dict[str, object] = {"library": False, "variants": [], "compiler": None, "reason": None}
    out.mkdir(parents=True, exist_ok=True)
    try:
        if os.environ.get("RELATTN_PURE", "0") not in ("", "0"):
            raise BuildError("this wheel is for any platform; where there is a C++ compiler: pip install --no-binary relattn relattn")
        if sys.platform == "win32":
            raise BuildError("the native CPU kernels are not built on Windows")
        program = compiler()
        report["compiler"] = described = _described(program)
        flags = [*COMMON, *([f"-fsanitize={sanitize}", *SANITIZED] if sanitize else OPTIMIZED)]
        flags += shlex.split(os.environ.get("CXXFLAGS", ""))  # after ours: the last one counts, and the user has the last word
        variants = _accepted([*program, *flags])
        with _object_folder(sources, sanitize) as folder:
            _mirror(sources, folder / "kernels" / "cpu")
            _write(folder / "compiler.txt", f"{described}\n".encode())
            _carry_out(_steps([*program, *flags], variants), folder, verbose)
            _put(out / LIBRARY, (folder / LIBRARY).read_bytes())
        report |= {"library": True, "variants": variants}
    except (BuildError, OSError) as error:
        (out / LIBRARY).unlink(missing_ok=True)
        report["reason"] = str(error)
    _put(out / REPORT, (json.dumps(report, indent=2) + "\n").encode())
    return report


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX, or what the system has."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise BuildError("no C++ compiler: neither $CXX nor c++, g++ or clang++ on the PATH")


def _described(program: list[str]) -> str:
    """The compiler's path and version; it is asked before all else, so that a missing one is told from a failed compilation."""
    path = shutil.which(program[0])
    if path is None:
        raise BuildError(f"no C++ compiler: {shlex.join(program)} was not found")
    done = subprocess.run([*program, "--version"], capture_output=True, text=True, errors="replace")
    if done.returncode or not done.stdout.strip():
        raise BuildError(f"{shlex.join(program)} --version failed, with status {done.returncode}\n{done.stderr}".strip())
    return f"{shlex.join([path, *program[1:]])}: {done.stdout.splitlines()[0]}"


def _accepted(command: list[str]) -> list[str]:
    """The variants whose flags the compiler takes, portable first. All but that one are for x86-64."""
    taken = []
    for name, flags in VARIANTS.items():
        probe = "#ifndef __x86_64__\n#error not x86-64\n#endif\n" if flags else ""  # some compilers only warn of foreign flags
        check = [*command, *flags, "-fsyntax-only", "-x", "c++", "-"]
        done = subprocess.run(check, input=probe, capture_output=True, text=True, errors="replace")
        if done.returncode == 0:
            taken.append(name)
        elif name == "portable":
            raise BuildError(_first_errors(done.stderr))
    return taken


@contextlib.contextmanager
def _object_folder(sources: Path, sanitize: str) -> Iterator[Path]:
    """A folder that outlives the build, so that the next one compiles only what changed; one build at a time uses it."""
    import fcntl  # not on Windows, where nothing is built

    parent = Path(os.environ.get("RELATTN_BUILD_DIR") or sources.parents[1] / "build" / "cpu")
    folder = parent.resolve() / "-".join([sysconfig.get_platform(), *sanitize.split(",")]).rstrip("-")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def _mirror(sources: Path, copies: Path) -> None:
    """Copy the sources into the object folder, and rewrite only what differs.

    What is compiled again then follows from contents: a fresh checkout, or an sdist unpacked elsewhere, has new times and the same
    contents. The path is the one in the repository, so that the compiler's messages name the right file.
    """
    wanted = {file.name: file.read_bytes() for file in sources.iterdir() if file.suffix in (".cpp", ".h")}
    if missing := {"library.cpp", "variant.cpp"} - set(wanted):
        raise BuildError(f"no {', '.join(sorted(missing))} in {sources}")
    copies.mkdir(parents=True, exist_ok=True)
    for file in copies.iterdir():
        if file.name not in wanted:
            file.unlink()
    for name, content in wanted.items():
        _write(copies / name, content)


def _write(file: Path, content: bytes) -> None:
    if not file.exists() or file.read_bytes() != content:
        file.write_bytes(content)


def _steps(command: list[str], variants: list[str]) -> list[Step]:
    """The compilations and, last, the link."""

    def compilation(source: str, name: str, *flags: str) -> Step:
        path, output = f"kernels/cpu/{source}", f"{name}.o"
        return Step(output, [path], [*command, *flags, "-MMD", "-MF", f"{output}.d", "-c", path, "-o", output])

    # In this order they are linked. An inline function of a header that several objects hold is taken from the first of them: from
    # the one that asks least of the processor, or else a processor without AVX-512 would meet the AVX-512 copy.
    steps = [compilation("library.cpp", "library", *(f"-DRELATTN_HAVE_{name.upper()}" for name in variants))]
    steps += [compilation("variant.cpp", name, *VARIANTS[name], f"-DRELATTN_VARIANT={name}") for name in variants]
    objects = [step.output for step in steps]
    linker_flags = shlex.split(os.environ.get("LDFLAGS", ""))
    return [*steps, Step(LIBRARY, objects, [*command, "-shared", *objects, *linker_flags, "-o", LIBRARY])]


def _carry_out(steps: list[Step], folder: Path, verbose: bool) -> None:
    """By ninja: in parallel, and only what changed. Without it, all steps one after another."""
    ninja = _ninja()
    if ninja:
        _write(folder / "build.ninja", _ninja_file(steps).encode())
        _run([ninja, *(["-v"] if verbose else [])], folder)
    else:
        for step in steps:
            print(shlex.join(step.command) if verbose else step.output, flush=True)
            _run(step.command, folder)


def _ninja() -> str | None:
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    program = Path(ninja.BIN_DIR, "ninja")  # not on the PATH where the environment is not activated
    return str(program) if program.is_file() else shutil.which("ninja")


def _ninja_file(steps: list[Step]) -> str:
    """Every object also depends on the compiler's version, every compilation on the headers that it read."""
    lines = ["rule compile", "  command = $command", "  description = compile $out", "  depfile = $out.d", "  deps = gcc"]
    lines += ["rule link", "  command = $command", "  description = link $out"]
    for step in steps:
        rule = "link" if step.output == LIBRARY else "compile"
        lines.append(f"build {step.output}: {rule} {' '.join(step.inputs)} | compiler.txt")
        lines.append(f"  command = {shlex.join(step.command).replace('$', '$$')}")
    return "\n".join(lines) + "\n"


def _run(command: list[str], folder: Path) -> None:
    """Run a command of the build and show what it prints while it does."""
    lines = []
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise BuildError(_first_errors("".join(lines)))


def _first_errors(output: str) -> str:
    """A few lines from the first that says error: what a reader needs of a compiler's output."""
    lines = output.splitlines()
    first = next((number for number, line in enumerate(lines) if re.search(r"\berror\b", line, re.IGNORECASE)), 0)
    return "the compiler failed:\n" + "\n".join(line[:300] for line in lines[first : first + 5])


def _put(place: Path, content: bytes) -> None:
    """Write a file in one step: no process, and no killed build, ever sees half of it or changes one that is in use."""
    whole = place.with_name(f"new-{place.name}")
    whole.write_bytes(content)
    os.replace(whole, place)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the native CPU library.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the library and its report")
    parser.add_argument("--sanitize", default="", help="sanitizers to build with, such as address,undefined")
    parser.add_argument("--verbose", action="store_true", help="show the commands")
    options = parser.parse_args()
    report = build(options.out, sanitize=options.sanitize, verbose=options.verbose)
    print(json.dumps(report, indent=2))
    raise SystemExit(not report["library"])


if __name__ == "__main__":
    main()
