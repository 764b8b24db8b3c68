"""Processes that stay: the ranks of gloo groups of 1 to 4, of which each test asks something."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

RANKS = 4
_TIME_OUT = 120.0  # for what hangs


class Pool:
    def __init__(self, folder: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, f"{folder}/store"), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(group, *arguments)` returns on each of the first ranks; an exception is a value too."""
        for pipe in self.pipes[:ranks]:
            pipe.send((ranks, function, arguments))
        results = []
        for rank, pipe in enumerate(self.pipes[:ranks]):
            assert pipe.poll(_TIME_OUT), f"rank {rank} of {ranks} does not answer"
            results.append(pipe.recv())
        return results

    def values(self, ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The same, where an exception is a failure."""
        results = self.run(ranks, function, *arguments)
        for rank, result in enumerate(results):
            assert not isinstance(result, Failure), f"rank {rank} of {ranks}: {result.text}"
        return results

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


class Failure:
    """An exception of a rank."""

    def __init__(self, error: Exception) -> None:
        self.kind, self.message = type(error).__name__, str(error)
        self.text = "".join(traceback.format_exception(error))


def _serve(pipe: Any, rank: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=_TIME_OUT / 2)
    )
    groups = {count: dist.new_group(list(range(count))) for count in range(1, RANKS + 1)}
    while True:
        ranks, function, arguments = pipe.recv()
        try:
            result = function(groups[ranks], *arguments)
        except Exception as error:
            result = Failure(error)
        pipe.send(result)
