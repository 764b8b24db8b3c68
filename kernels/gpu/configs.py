"""Block sizes, warps and pipeline stages by architecture, as compiled offline (`python -m kernels.gpu.resources` prints what each takes)."""

from __future__ import annotations

from typing import NamedTuple


class Configuration(NamedTuple):
    block: int  # queries and keys of a tile
    num_warps: int
    num_stages: int


def configurations(kernel: str, target: str, size: int, itemsize: int, extra: bool) -> list[Configuration]:
    """For a kernel, best first; the later ones need less of the chip."""
    if target == "interpreter":
        return [Configuration(16 if kernel == "table_gradient" else 32, 4, 1)]
    return [Configuration(64, 4, 2), Configuration(32, 4, 1), Configuration(16, 4, 1)]

