"""A core of the tests on other releases of Python, torch and transformers, each in an environment of its own:

    python -m tests.versions                                   # those of DEFAULT whose Python is here
    python -m tests.versions python3.13=2.14.1 python3.11=2.13.0+5.17.0 --markdown

A name is PYTHON=TORCH, or PYTHON=TORCH+TRANSFORMERS for the tests of relattn.huggingface. Environments are made in .venv-versions and kept.
The standard library only: it runs in any Python.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".venv-versions"
TORCH = ("2.14.1", "2.13.0", "2.12.1", "2.11.0")
DEFAULT = [
    *(f"python3.11={torch}" for torch in TORCH),
    *(f"python{python}={TORCH[0]}" for python in ("3.12", "3.13", "3.14")),
    "python3.11=2.13.0+5.17.0",
]
# What the core needs beside torch; versions are those of requirements-dev.txt.
NEEDED = ("hypothesis", "ninja", "numpy", "packaging", "pytest", "setuptools")
CORE = (
    "tests/test_errors.py", "tests/test_main.py", "tests/test_module.py", "tests/test_operators.py", "tests/test_packed.py",
    "tests/test_philox.py", "tests/test_selfcheck.py", "tests/test_streaming.py", "tests/backends/test_backends.py",
    "tests/backends/test_reference.py",
)  # fmt: skip
HUGGINGFACE = ("tests/huggingface/test_attention.py", "tests/huggingface/test_families.py")


class Target(NamedTuple):
    python: str
    torch: str
    transformers: str | None

    @classmethod
    def named(cls, name: str) -> Target:
        found = re.fullmatch(r"(python[\d.]+)=([^+]+)(?:\+(.+))?", name)
        if found is None:
            raise SystemExit(f"{name}: expected PYTHON=TORCH or PYTHON=TORCH+TRANSFORMERS, such as python3.13=2.14.1")
        return cls(*found.groups())

    def __str__(self) -> str:
        return f"{self.python}={self.torch}" + (f"+{self.transformers}" if self.transformers else "")


def environment(target: Target) -> Path:
    """Its interpreter, with relattn as an editable install. Made once; its stamp is written last."""
    folder = HOME / str(target)
    python, stamp = folder / "bin" / "python", folder / ".ready"
    if not stamp.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([target.python, "-m", "venv", str(folder)], check=True)
        pins = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
        needed = [pin for pin in pins if pin.partition("==")[0] in NEEDED]
        others = [f"transformers=={target.transformers}"] if target.transformers else []
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"torch=={target.torch}", *needed, *others], check=True)
        install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
        subprocess.run([python, "-m", "pip", *install], check=True)
        stamp.touch()
    return python


def run(target: Target, arguments: list[str]) -> tuple[str, float]:
    """pytest's last line, and seconds."""
    environ = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    command = [str(environment(target)), "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    command += HUGGINGFACE if target.transformers else CORE
    done = subprocess.run(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.splitlines() or [""]
    if done.returncode:
        print("\n".join(lines[-60:]), file=sys.stderr)
    return re.sub(r" in [\d.]+s.*|=+ ?", "", lines[-1]), time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="PYTHON=TORCH", help="default: " + " ".join(DEFAULT))
    parser.add_argument("--pytest", default="", help="arguments for pytest")
    options = parser.parse_args()
    print("| Python | torch | transformers | |\n| --- | --- | --- | --- |")
    failed = False
    for target in map(Target.named, options.targets or DEFAULT):
        if shutil.which(target.python) is None and not (HOME / str(target) / ".ready").exists():
            result = f"not run: no {target.python} here"
        else:
            result, seconds = run(target, options.pytest.split())
            failed |= "failed" in result or "error" in result or "passed" not in result
            print(f"{target}: {seconds:.0f} s", file=sys.stderr)
        print(f"| {target.python.removeprefix('python')} | {target.torch} | {target.transformers or ''} | {result} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
