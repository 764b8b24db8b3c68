"""Processes that compute together: as many as asked, kept for the tests of a module, with a process group of gloo among them."""

from __future__ import annotations

import datetime
import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

WAIT = 60  # seconds after which a collective gives up: what hangs ends as a failure


def _serve(rank: int, count: int, meeting: str, wait: float, calls) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)  # they share the machine's cores
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count, timeout=datetime.timedelta(seconds=wait))
    while (call := calls.recv()) is not None:
        function, args = call
        torch.manual_seed(0)
        try:
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        calls.send_bytes(pickle.dumps(answer))  # by value: shared memory would go with the process
    dist.destroy_process_group()


class Workers:
    """`run(function, *args)` calls it in every process at once; the function is one of a module, named so that they find it."""

    def __init__(self, count: int, wait: float = WAIT) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.tensor.parallel", "relattn"])  # imported once, not in each
        self.folder = tempfile.TemporaryDirectory()
        pipes = [context.Pipe() for _ in range(count)]
        self.calls = [mine for mine, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, count, f"{self.folder.name}/meeting", wait, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()  # theirs alone now: where a process dies, its pipe ends

    def start(self, function: Callable, *args: Any) -> None:
        for calls in self.calls:
            calls.send((function, args))

    def answer(self, rank: int) -> Any:
        """What the function returned there.

        Raises:
            RuntimeError: it raised, with its traceback, or its process is gone.
        """
        try:
            done, result = pickle.loads(self.calls[rank].recv_bytes())
        except (EOFError, ConnectionResetError) as error:
            raise RuntimeError(f"process {rank} is gone") from error
        if not done:
            raise RuntimeError(f"process {rank}:\n{result}")
        return result

    def run(self, function: Callable, *args: Any) -> list[Any]:
        """What it returned, rank by rank."""
        self.start(function, *args)
        return [self.answer(rank) for rank in range(len(self.processes))]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_) -> None:
        for calls in self.calls:
            try:
                calls.send(None)
            except OSError:  # it is gone
                continue
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self.folder.cleanup()
