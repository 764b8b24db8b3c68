"""Whether calls are those of a sharded sequence: what `relattn.distributed.context_parallel` sets and `relative_attention` looks up.

It is the process's, not a thread's: autograd computes checkpointed layers again in threads of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Takes the arguments of `relative_attention`, and its place; None: calls are whole.
attend: Callable[..., Any] | None = None


def refuse(what: str) -> None:
    """Raises where `what` would look at one shard only."""
    if attend is not None:
        raise ValueError(f"{what} not supported under relattn.distributed.context_parallel, where a sequence lies on several ranks")
