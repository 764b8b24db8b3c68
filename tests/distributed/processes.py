"""Processes that compute together: as many as asked, kept for the tests of a module, with a process group of gloo among them."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Sequence
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
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in range(1, count + 1)}
    while (call := calls.recv()) is not None:
        ranks, function, args = call
        torch.manual_seed(0)
        try:
            answer = function(*args) if ranks is None else function(groups[ranks], *args)
        except BaseException as error:
            answer = Failure(error)
        calls.send_bytes(pickle.dumps(answer))  # by value: shared memory would go with the process
    if dist.is_initialized():
        dist.destroy_process_group()


class Failure:
    """An exception of a process."""

    def __init__(self, error: BaseException) -> None:
        self.kind, self.message = type(error).__name__, str(error)
        self.text = "".join(traceback.format_exception(error))


class Processes:
    """`run(function, *args)` calls it in every process at once; the function is one of a module, named so that they find it.

    `values` and `outcomes` call it in the first of them only, with their process group as its first argument.
    """

    def __init__(self, count: int, wait: float = WAIT, imported: Sequence[str] = ()) -> None:
        self.count, self.wait, self.imported = count, wait, [*_IMPORTED, *imported]
        self.calls: list[Connection] = []
        self.processes: list[Any] = []

    def start(self, function: Callable, *args: Any) -> None:
        self._send(None, function, args)

    def _send(self, ranks: int | None, function: Callable, args: tuple) -> None:
        if not self.processes:
            self._start()
        for calls in self.calls[:ranks]:
            calls.send((ranks, function, args))

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(self.imported)
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
        result = self._outcome(rank)
        if isinstance(result, Failure):
            raise RuntimeError(f"process {rank}:\n{result.text}")
        return result

    def _outcome(self, rank: int) -> Any:
        try:
            return pickle.loads(self.calls[rank].recv_bytes())
        except (EOFError, ConnectionResetError) as error:
            raise RuntimeError(f"process {rank} is gone") from error

    def outcomes(self, ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(group, *args)` returns on each of the first ranks; an exception is a value too, a Failure."""
        self._send(ranks, function, args)
        return [self._outcome(rank) for rank in range(ranks)]

    def values(self, ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The same, where an exception is a failure."""
        found = self.outcomes(ranks, function, *args)
        for rank, result in enumerate(found):
            assert not isinstance(result, Failure), f"rank {rank} of {ranks}: {result.text}"
        return found

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
