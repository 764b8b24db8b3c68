"""Stage `profile`: what do the kernels wait for? Nsight Compute's counters of each kernel of a few training steps."""

from __future__ import annotations

import csv
import re
from typing import Any

import torch

from benchmarks.gpu_check.common import OWN, is_dry, is_own, problem, synchronize, tool
from benchmarks.gpu_check.running import Group, Job
from benchmarks.peers import PEERS, step

# The set "full" has hundreds of metrics, of which these go into the JSON; the log archive has all.
_WANTED = re.compile(
    r"gpu__time_duration\.sum|sm__cycles_active\.avg|sm__(maximum_)?warps|launch__(registers|occupancy_limit|waves)"
    r"|launch__(shared_mem_per_block|grid_size|block_size)|(sm|lts|l1tex|gpu__compute_memory)_*throughput"
    r"|dram__(throughput|bytes_)|lts__t_sectors?_.*hit|l1tex__data_bank_(conflicts|reads|writes)|bank_conflict"
    r"|l1tex__data_pipe_lsu_wavefronts|_shared|_local|pipe_(tensor|shared|xu|alu|fma|lsu)|issue_stalled"
    r"|average_warps?_.*stall|smsp__(inst_executed|issue_active|warps_eligible)"
)


def one_step(length: int, head_dim: int, clip: int | None) -> dict[str, Any]:
    """A training step whose kernels are profiled, the step before it not."""
    given = problem(length, head_dim, clip)
    call = step(PEERS[OWN].make(given), given.inputs(), True)
    call()
    synchronize()
    if not is_dry():
        torch.cuda.profiler.start()
    call()
    synchronize()
    if not is_dry():
        torch.cuda.profiler.stop()
    return {}


def counters(log: str) -> dict[str, dict[str, float | str]]:
    """By kernel of relattn's, from ncu's CSV (`--page raw`: names, units, then a line for each launch)."""
    lines = log.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith('"ID"'))
    names, units, *rows = csv.reader(line for line in lines[start:] if line.startswith('"'))
    found: dict[str, dict[str, float | str]] = {}
    for row in rows:
        values = dict(zip(names, row, strict=False))
        kernel = values["Kernel Name"]
        if not is_own(kernel):
            continue
        place = kernel if kernel not in found else f"{kernel} {len(found)}"
        found[place] = {
            f"{name} [{unit}]" if unit else name: _number(value)
            for name, unit, value in zip(names, units, row, strict=False) if value and _WANTED.search(name)
        }  # fmt: skip
    return found


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def plan(dry: bool) -> list[Group]:
    if dry:
        return [Group([Job("profiled step", one_step, dict(length=9, head_dim=16, clip=3))])]
    program = tool("ncu")
    if program is None:
        raise SystemExit("stage profile: no ncu on the PATH, in /usr/local/cuda/bin or in /opt/nvidia/nsight-compute")
    # The clocks stay as they are found; our step alone is profiled.
    command = (
        program,
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
        "--set",
        "full",
        "--csv",
        "--page",
        "raw",
    )
    settings = [dict(length=2048, head_dim=size, clip=clip) for clip in (None, 64) for size in (64, 128)]

    def name(setting: dict[str, Any]) -> str:
        return f"D {setting['head_dim']}, clip {setting['clip']}"

    warm = [Job(f"compiled, {name(setting)}", one_step, setting, 120.0) for setting in settings]
    profiled = [Job(name(setting), one_step, setting, 150.0, prefix=command, parse=counters) for setting in settings]
    return [Group(warm, len(warm)), Group(profiled)]
