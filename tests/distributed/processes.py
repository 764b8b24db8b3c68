"""Processes that compute together: as many as asked, kept for the tests of a module, with a process group of gloo among them."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

# What tests need, imported once and not in each process.
_IMPORTED = ["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torch._dynamo", "relattn.distributed"]
WAIT = 60  # seconds after which a collective gives up: what hangs ends as a failure


def _serve(rank: int, count: int, meeting: str, patience: float, calls) -> None:
    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a machine's own name need not resolve
    torch.set_num_threads(1)  # they share the machine's cores
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=count, timeout=datetime.timedelta(seconds=patience)
    )
    while (call := calls.recv()) is not None:
        function, args = call
        torch.manual_seed(0)
        try:
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        calls.send_bytes(pickle.dumps(answer))  # by value: shared memory would go with the process
    dist.destroy_process_group()


class Processes:
    """`run(function, *args)` calls it in every process at once; the function is one of a module, named so that they find it."""

    def __init__(self, count: int, wait: float = WAIT) -> None:
        self.count, self.wait = count, wait
        self.calls: list[Connection] = []
        self.processes: list[Any] = []

    def start(self, function: Callable, *args: Any) -> None:
        if not self.processes:
            self._start()
        for calls in self.calls:
            calls.send((function, args))

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTED)
        self.folder = tempfile.TemporaryDirectory()
        pipes = [context.Pipe() for _ in range(self.count)]
        self.calls = [mine for mine, _ in pipes]
        for rank, (_, theirs) in enumerate(pipes):
            process = context.Process(target=_serve, args=(rank, self.count, f"{self.folder.name}/meeting", self.wait, theirs), daemon=True)
            process.start()
            self.processes.append(process)
            theirs.close()  # theirs alone now: where a process dies, its pipe ends

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
        """What it returned, rank by rank. The first that fails ends them all, for others may wait for it; the next call starts anew."""
        self.start(function, *args)
        answers: dict[int, Any] = {}
        try:
            while len(answers) < self.count:
                for ready in wait([calls for rank, calls in enumerate(self.calls) if rank not in answers]):
                    rank = self.calls.index(ready)  # type: ignore[arg-type]
                    answers[rank] = self.answer(rank)
        except RuntimeError:
            self.kill()
            raise
        return [answers[rank] for rank in range(self.count)]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self._forget()

    def _forget(self) -> None:
        for calls in self.calls:
            calls.close()
        if self.processes:
            self.folder.cleanup()
        self.calls, self.processes = [], []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_) -> None:
        for calls in self.calls:
            with contextlib.suppress(OSError):  # it is gone
                calls.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()
        self._forget()
