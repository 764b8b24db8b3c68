"""Shared by the chorale tests: packages that may be missing, JSON files, and runs that are killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def require(*packages: str) -> None:
    """Skip the calling module where one of the packages is missing."""
    for package in packages:
        pytest.importorskip(package)


def read(path):
    return json.loads(Path(path).read_text())


_KILLED = """
import runpy, sys, time
from examples.chorales.trainer import Clock

def wait_to_be_killed(*_, **__):
    print("checkpoint written", flush=True)
    time.sleep(3600)

Clock.on_save = wait_to_be_killed
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def kill_after_first_checkpoint(command: list[str]) -> None:
    """Run `command`, python -m MODULE ..., until it has written its first checkpoint, and kill it there.

    It waits for the kill, which therefore comes at the same place however busy the machine is.
    """
    python, _, *module_and_arguments = command
    process = subprocess.Popen(
        [python, "-c", _KILLED, *module_and_arguments],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    written = any(line == "checkpoint written\n" for line in process.stdout)
    process.kill()  # SIGKILL: no chance to tidy up
    process.wait()
    process.stdout.close()
    assert written, "the run ended before it could be killed"


def module_command(name: str, *arguments) -> list[str]:
    """The command line of `python -m examples.chorales.<name>`."""
    return [sys.executable, "-m", f"examples.chorales.{name}", *map(str, arguments)]
