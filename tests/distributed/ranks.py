"""`relattn.distributed` on the ranks that torchrun starts, against one call in float64: on GPUs by NCCL, else by gloo.

    torchrun --nproc-per-node gpu -m tests.distributed.ranks
    torchrun --nproc-per-node 3 -m tests.distributed.ranks --cpu
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.cases import Case, exact, joined, replace, sharded, whole
from tests.distributed.parts import CASES, error

METHODS = ("ring", "gather", "all_to_all")


def check(case: Case, method: str, layout: str, device: torch.device) -> str:
    """What is wrong; on every rank the same."""
    mine = sharded(dist.group.WORLD, case, dict(method=method, layout=layout), device)
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, {name: tensor.cpu() for name, tensor in mine.items()})
    found: dict[str, Tensor] = joined(case, results, layout)
    return error(case, found, whole(replace(case, backend="blocked")), exact(case))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true")
    cpu = parser.parse_args().cpu
    device = torch.device("cpu" if cpu else f"cuda:{os.environ['LOCAL_RANK']}")
    if not cpu:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if cpu else "nccl")
    failed = False
    for name, case in CASES.items():
        if not cpu and dict(case.settings).get("dropout_p"):
            continue  # its seed is drawn from the device's generator, which is another
        for dtype in (torch.float32, torch.bfloat16):
            for method in METHODS:
                if method == "all_to_all" and case.key_heads % dist.get_world_size() != 0:
                    continue
                wrong = check(replace(case, dtype=dtype, size=16, value_size=16), method, "zigzag", device)
                failed |= bool(wrong)
                if dist.get_rank() == 0:
                    print(f"{name}, {dtype}, {method}: {wrong or 'good'}", flush=True)
    dist.destroy_process_group()
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
