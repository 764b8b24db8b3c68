"""Block sizes, warps and pipeline stages of the kernels, by architecture, head size and dtype.

Chosen offline, by what compiling them shows (`python -m kernels.gpu.resources`, which also searches: --search): of CANDIDATES, ordered
by the speed expected of them, the first that neither spills registers nor takes more shared memory than the chip has. None of them has
been timed yet; RELATTN_AUTOTUNE=1 times the candidates on the machine at hand.
"""

from __future__ import annotations

from typing import NamedTuple


class Configuration(NamedTuple):
    block: int  # queries and keys of a tile
    num_warps: int
    num_stages: int


# Larger tiles move fewer bytes, and Hopper's matrix instructions take 64 rows, of 4 warps: 8 warps share them badly. Two stages overlap
# the loads of the next tile with the work on this one. A smaller block always is a divisor of a larger one.
CANDIDATES = [
    Configuration(*candidate)
    for candidate in (
        (64, 4, 2), (64, 4, 1), (64, 8, 2), (32, 4, 2), (32, 8, 2), (32, 4, 1), (32, 8, 1),
        (16, 4, 2), (16, 8, 2), (16, 4, 1), (16, 8, 1),
    )
]  # fmt: skip

# Bytes of shared memory that one program may use.
SHARED_MEMORY = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}


def family(target: str) -> str:
    """The architecture whose table serves a GPU: "sm_86" has the shared memory of sm_89, a newer one is taken for the last."""
    if target in SHARED_MEMORY:
        return target
    if target.startswith("sm_"):
        number = int(target.removeprefix("sm_"))
        for known, last in (("sm_80", 80), ("sm_89", 89), ("sm_90", 99), ("sm_100", 119)):
            if number <= last:
                return known
        return "sm_120"
    return "gfx942"


def size_class(size: int) -> int:
    """Head sizes are compiled one by one, but share configurations: up to 64, up to 128, up to 256."""
    return 64 if size <= 64 else 128 if size <= 128 else 256


def variant(clipped: bool, extra: bool) -> str:
    """`extra`: rel_q or rel_v are there; `clipped`: the loop has a branch for tiles far from the tables."""
    return "extra" if extra else "clipped" if clipped else "plain"


def configurations(kernel: str, target: str, size: int, itemsize: int, clipped: bool, extra: bool) -> list[Configuration]:
    """For a kernel, the one to use first; those after it need less of the chip. size: the larger of D and Dv; itemsize: of the inputs."""
    if target == "interpreter":  # not all alike: kernels must get on with each other's
        return [Configuration(16 if kernel == "table_gradient" else 32, 4, 1)]
    key = (family(target), kernel, size_class(size), itemsize, variant(clipped, extra))
    first = TABLE.get(key, CANDIDATES[-1])
    return [first, *(candidate for candidate in CANDIDATES[CANDIDATES.index(first) + 1 :] if candidate.block <= first.block)]


TABLE: dict[tuple[str, str, int, int, str], Configuration] = {}
