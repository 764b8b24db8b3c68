"""``python -m relattn [--json]``: versions, devices, and each backend: usable here, or why not."""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from typing import Any

import torch

from relattn._version import TRIED, __version__
from relattn.backends import available_backends, triton
from relattn.backends.cpu import variant

# What a package is imported as -> the distributions that provide it.
OPTIONAL = {
    "triton": ("triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows"),
    "transformers": ("transformers",),
}


def installed_version(distributions: tuple[str, ...]) -> str | None:
    """The version of the first of these distributions that is installed, found without importing it."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return None


def untried(versions: dict[str, str | None]) -> list[str]:
    """What is said of packages that are newer than relattn was tried with: they mostly work."""

    def number(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version)[:2]]

    return [
        f"{name} {version} is newer than what relattn {__version__} was tried with ({oldest} to {newest}): python -m relattn --check"
        for name, (oldest, newest) in TRIED.items()
        if (version := versions.get(name)) is not None and number(version) > number(newest)
    ]


def cpu_name() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    try:
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() == "model name":
                    return value.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int | None:
    """The cores this process may run on, where the system tells; else the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def accelerators() -> list[dict[str, str]]:
    """torch's accelerator devices (CUDA, ROCm, MPS, XPU): device and name."""
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    device_name = getattr(torch.get_device_module(kind), "get_device_name", None)
    return [
        {"device": f"{kind.type}:{index}", "name": device_name(index) if device_name else kind.type}
        for index in range(torch.accelerator.device_count())
    ]


def report() -> dict[str, Any]:
    """What this machine can run, as plain data."""
    return {
        "versions": {
            "relattn": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **{name: installed_version(distributions) for name, distributions in OPTIONAL.items()},
        },
        "cpu": {
            "name": cpu_name(),
            "cores": usable_cores(),
            "threads": torch.get_num_threads(),
            "instruction_set": variant(),
        },
        "accelerators": accelerators(),
        "backends": {
            name: {"usable": reason is None, "reason": reason} for name, reason in available_backends().items()
        },
    }


def _usable(name: str, facts: dict[str, Any]) -> str:
    if name == "cpu":
        return f"usable, with {facts['cpu']['instruction_set']} instructions"
    return triton.confirmed() if name == "triton" and not triton.INTERPRETED else "usable"


def table(facts: dict[str, Any]) -> str:
    """The report as text: a heading per group, one line per fact."""
    cpu = facts["cpu"]
    groups = {
        "versions": {name: version or "not installed" for name, version in facts["versions"].items()},
        "devices": {"cpu": f"{cpu['name']}, {cpu['cores']} cores, torch uses {cpu['threads']} threads"}
        | {one["device"]: one["name"] for one in facts["accelerators"]},
        "backends, fastest first": {
            name: _usable(name, facts) if state["usable"] else f"not here: {state['reason']}"
            for name, state in facts["backends"].items()
        },
    }
    width = max(len(name) for rows in groups.values() for name in rows)
    lines = []
    for heading, rows in groups.items():
        lines += [heading, *(f"  {name:<{width}}  {value}" for name, value in rows.items())]
        if heading == "versions":
            lines += [f"  {line}" for line in untried(facts["versions"])]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m relattn", description="What relattn can run on this machine.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--check", action="store_true", help="also whether what runs here is right, how fast it is, what helps: in seconds")
    parser.add_argument("--matrix", action="store_true", help="call every backend with every feature in every dtype: Markdown, in minutes")
    options = parser.parse_args(arguments)
    if options.matrix:
        from relattn.selfcheck import matrix

        sys.exit(matrix.main())
    facts = report()
    if options.check:
        from relattn.selfcheck import check

        print(table(facts))
        sys.exit(check.main(facts))
    print(json.dumps(facts, indent=2) if options.json else table(facts))


if __name__ == "__main__":
    main()
