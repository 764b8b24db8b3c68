"""Whether calls are those of a sharded sequence: what `relattn.distributed.context_parallel` sets and `relative_attention` looks up.

It is the process's, not a thread's: autograd computes checkpointed layers again in threads of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

active = False  # a flag beside the function, since torch.compile watches a flag, and of a function not whether it is there
attend: Callable[..., Any] | None = None  # takes the arguments of `relative_attention`, in its place
first_head = 0  # the number of head 0 of calls: others are elsewhere


def use(function: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """From now on, and what was used before; None: calls are whole."""
    global active, attend
    before, attend, active = attend, function, function is not None
    return before


def sharded(*arguments: Any, **others: Any) -> Any:
    """The call, by `attend`."""
    assert attend is not None
    return attend(*arguments, **others)


def refuse(what: str) -> None:
    """Raises where `what` would look at one shard only."""
    if active:
        raise ValueError(f"{what} not supported under relattn.distributed.context_parallel, where a sequence lies on several ranks")


@contextlib.contextmanager
def heads_from(number: int) -> Iterator[None]:
    """Within it, calls are of the heads from this number on of a layer whose other heads other devices compute.

    It is for dropout, whose mask is a function of seed and head: from the same seed, which devices draw that are seeded alike, each head
    has the mask that it has where one device computes all.
    """
    global first_head
    before, first_head = first_head, number
    try:
        yield
    finally:
        first_head = before
