"""Block sizes, warps and pipeline stages of the kernels, by architecture, head size and dtype.

Measured: those of sm_90 for 16-bit inputs, heads up to 128 and rel_k alone, by timing them on an H200 (Triton 3.6). Two programs on an SM
are worth more than registers that do not spill. Most others are modelled and not measured: by the clocks that their loops should take
(`python -m relattn.kernels.gpu.resources --clocks`, clocks.py; Triton 3.9), programs on an SM at once included; of those within five per
cent of the best the one that spills least. Not all candidates were tried everywhere. Neither measured nor modelled: sm_120, sm_100 and
gfx942 (see below), float32 with heads of 256, sm_89 with all tables at once and heads of 256, and its key_gradient with heads of 256, where
16 is the largest tile that fits. RELATTN_AUTOTUNE=1 times the candidates on the machine at hand.
"""

from __future__ import annotations

from typing import NamedTuple


class Configuration(NamedTuple):
    block: int  # queries and keys of a tile
    num_warps: int
    num_stages: int
    registers: int | None = None  # of a thread at most; None: as many as the compiler wants

    def __str__(self) -> str:
        return str(tuple(self[:3] if self.registers is None else self))


# Larger tiles move fewer bytes, and Hopper's matrix instructions take 64 rows, of 4 warps: 8 warps share them badly. Two stages overlap
# the loads of the next tile with the work on this one. A smaller block always is a divisor of a larger one.
CANDIDATES = [
    Configuration(*candidate)
    for candidate in (
        (64, 4, 3), (64, 4, 2), (64, 4, 1), (64, 8, 2), (64, 8, 1), (32, 4, 2), (32, 8, 2), (32, 4, 1), (32, 8, 1),
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


# 16-bit inputs: heads up to 64, 128 and 256; of each the plain kernel and the clipped one. Modelled, not measured, but for the first four
# columns of sm_90; there table_gradient was measured with clipped tables only. The products' stages are modelled too. sm_120: as sm_89.
# sm_100: what has two programs on an SM and few spills, as on sm_90, if its tensor memory holds it. gfx942: what spills least.
_TABLE = {
    "sm_80": {
        "forward": ((64, 4, 3), (64, 4, 2), (64, 4, 1), (64, 4, 1), (32, 4, 2), (32, 4, 1)),
        "prepare": ((64, 4, 2), (64, 4, 2), (64, 4, 2), (64, 4, 2), (64, 4, 2), (64, 4, 2)),
        "query_gradient": ((64, 4, 1), (64, 4, 1), (32, 4, 2), (32, 4, 2), (32, 4, 1), (32, 4, 2)),
        "key_gradient": ((64, 4, 1), (64, 4, 1), (32, 4, 2), (32, 4, 2), (32, 4, 2), (32, 4, 2)),
        "table_gradient": ((64, 4, 1), (64, 4, 1), (32, 4, 1), (32, 4, 1), (32, 4, 1), (32, 4, 1)),
    },
    "sm_89": {
        "forward": ((64, 4, 2), (64, 4, 2), (64, 8, 2), (64, 4, 1), (32, 4, 1), (32, 4, 1)),
        "prepare": ((64, 4, 2), (64, 4, 2), (64, 4, 2), (64, 4, 2), (64, 4, 2), (64, 4, 2)),
        "query_gradient": ((64, 4, 1), (64, 4, 1), (64, 4, 2), (32, 4, 1), (32, 4, 1), (32, 4, 1)),
        "key_gradient": ((32, 4, 2), (32, 4, 2), (32, 4, 2), (32, 4, 2), (16, 4, 2), (16, 4, 2)),
        "table_gradient": ((32, 4, 2), (32, 4, 2), (32, 4, 1), (32, 4, 1), (32, 4, 1), (32, 4, 1)),
    },
    "sm_90": {
        "forward": ((64, 4, 3), (64, 4, 3), (64, 4, 2), (64, 4, 1), (64, 8, 1), (64, 8, 1)),
        "prepare": ((64, 4, 2), (64, 4, 2), (64, 4, 2), (64, 4, 2), (64, 4, 2), (64, 4, 2)),
        "query_gradient": ((64, 4, 2), (64, 4, 2), (64, 4, 1), (64, 4, 1), (64, 4, 1), (64, 4, 1)),
        "key_gradient": ((64, 4, 2), (64, 4, 1), (64, 4, 1), (64, 4, 1), (64, 4, 1), (64, 8, 1)),
        "table_gradient": ((64, 4, 1), (64, 4, 1), (64, 4, 1), (64, 4, 1), (64, 4, 1), (64, 4, 1)),
    },
    "sm_100": {
        "forward": ((64, 4, 2), (64, 4, 2), (64, 4, 1), (64, 4, 1), (64, 4, 1), (64, 4, 1)),
        "prepare": ((64, 4, 2), (64, 4, 2), (64, 4, 2), (64, 4, 2), (64, 4, 2), (64, 4, 2)),
        "query_gradient": ((64, 4, 1), (64, 4, 1), (64, 4, 1), (64, 4, 1), (64, 4, 1), (32, 4, 1)),
        "key_gradient": ((64, 4, 1), (64, 4, 1), (64, 4, 1), (64, 4, 1), (64, 4, 1), (32, 4, 1)),
        "table_gradient": ((64, 4, 1), (64, 4, 1), (64, 4, 1), (64, 4, 1), (64, 4, 1), (64, 4, 1)),
    },
    "sm_120": {
        "forward": ((64, 4, 2), (64, 4, 2), (64, 8, 2), (64, 4, 1), (32, 4, 1), (32, 4, 1)),
        "prepare": ((64, 4, 2), (64, 4, 2), (64, 4, 2), (64, 4, 2), (64, 4, 2), (64, 4, 2)),
        "query_gradient": ((64, 4, 1), (64, 4, 1), (64, 4, 2), (32, 4, 1), (32, 4, 1), (32, 4, 1)),
        "key_gradient": ((32, 4, 2), (32, 4, 2), (32, 4, 2), (32, 4, 2), (16, 4, 2), (16, 4, 2)),
        "table_gradient": ((32, 4, 2), (32, 4, 2), (32, 4, 1), (32, 4, 1), (32, 4, 1), (32, 4, 1)),
    },
    "gfx942": {
        "forward": ((64, 4, 2), (64, 4, 2), (64, 4, 1), (64, 4, 2), (64, 4, 1), (64, 4, 1)),
        "prepare": ((64, 4, 2), (64, 4, 2), (64, 4, 2), (64, 4, 2), (64, 4, 2), (64, 4, 2)),
        "query_gradient": ((64, 4, 2), (64, 4, 2), (64, 4, 1), (64, 4, 1), (32, 4, 1), (32, 4, 1)),
        "key_gradient": ((64, 4, 2), (64, 4, 2), (64, 4, 1), (64, 4, 1), (16, 4, 2), (16, 4, 2)),
        "table_gradient": ((64, 4, 1), (64, 4, 1), (64, 4, 1), (64, 4, 1), (16, 4, 2), (16, 4, 2)),
    },
}  # fmt: skip
# With rel_q or rel_v, by head size: by the model of sm_90, and of sm_89, which has less than half the shared memory.
_EXTRA = {
    "sm_90": {
        "forward": ((64, 4, 1), (64, 4, 1), (32, 4, 1)),
        "prepare": ((64, 4, 2), (64, 4, 2), (64, 4, 2)),
        "query_gradient": ((64, 4, 1), (64, 4, 1), (16, 4, 2)),
        "key_gradient": ((64, 4, 1), (32, 4, 2), (16, 4, 2)),
        "table_gradient": ((64, 4, 1), (32, 4, 1), (32, 4, 1)),
    },
    "sm_89": {
        "forward": ((32, 4, 2), (32, 4, 1), (32, 4, 1)),
        "prepare": ((64, 4, 2), (64, 4, 2), (64, 4, 2)),
        "query_gradient": ((32, 4, 2), (32, 4, 1), (16, 4, 2)),
        "key_gradient": ((32, 4, 2), (32, 4, 2), (16, 4, 2)),
        "table_gradient": ((32, 4, 2), (32, 4, 1), (16, 4, 1)),
    },
}
# float32, by head size. Exact float32 products run outside the matrix units, in registers, and their code is long: where the model has
# loops of more than 5000 instructions ahead by little, a smaller tile stands here.
_SINGLE = {
    "sm_90": {
        "forward": ((64, 8, 1), (32, 8, 1), (16, 8, 1)),
        "prepare": ((64, 4, 2), (64, 4, 2), (64, 4, 2)),
        "query_gradient": ((32, 4, 1), (32, 8, 1), (16, 8, 1)),
        "key_gradient": ((32, 4, 1), (32, 8, 1), (16, 8, 1)),
        "table_gradient": ((32, 4, 1), (32, 8, 1), (16, 8, 1)),
    },
    "sm_89": {
        "forward": ((64, 8, 1), (32, 8, 1), (16, 8, 1)),
        "prepare": ((64, 4, 2), (64, 4, 2), (64, 4, 2)),
        "query_gradient": ((32, 4, 1), (32, 8, 1), (16, 8, 1)),
        "key_gradient": ((32, 4, 1), (16, 4, 1), (16, 8, 1)),
        "table_gradient": ((32, 4, 1), (16, 4, 1), (16, 8, 1)),
    },
}
# Of keys, by head size. Chosen offline: 16-bit ones spill nothing, and all fit everywhere.
_DECODE = ((64, 4, 3), (64, 4, 2), (32, 4, 2))
_DECODE_SINGLE = ((32, 4, 2), (32, 8, 2), (16, 8, 2))


def alternatives(first: list[Configuration]) -> list[Configuration]:
    """Those of `configurations`, and after them all other candidates: what is worth timing."""
    return [*first, *(candidate for candidate in CANDIDATES if candidate not in first)]


def configurations(kernel: str, target: str, size: int, itemsize: int, clipped: bool, extra: bool) -> list[Configuration]:
    """For a kernel, the one to use first; those after it need less of the chip.

    size: the larger of D and Dv; itemsize: of the inputs; clipped: tiles may lie far from the tables; extra: rel_q or rel_v are there.
    """
    if kernel in ("product", "product_by_key", "join"):
        # With the block of the kernel that made the tiles. Loads are what takes time: up to three stages, where that leaves room for a
        # second program; two in any case, if there is room.
        stage = (8192 + 128 * size) * (2 if kernel == "product" and size > 64 else 1)  # queries have two products in a step
        # On an H200 four programs on an SM without a pipeline beat two with one.
        if target == "sm_90" and 64 < size <= 128 and itemsize == 2 and kernel != "join":
            return [Configuration(block, 4, 1, 128) for block in (64, 32)]
        room = SHARED_MEMORY[family(target)] // stage if target != "interpreter" else 1
        most, warps = min(3, max(room // 2, min(room, 2), 1)), 4 if size <= 128 else 8
        return [Configuration(block, warps, stages) for block in (64, 32) for stages in range(most, 0, -1)]
    if target == "interpreter":  # not all alike: kernels must get on with each other's
        return [Configuration(16 if kernel == "table_gradient" else 32, 4, 1)]
    place = 0 if size <= 64 else 1 if size <= 128 else 2
    if kernel == "decode":  # memory is what takes time: keys, values and table rows on their way, for two programs on an SM
        first = Configuration(*(_DECODE_SINGLE if itemsize == 4 else _DECODE)[place])
        return [first, *(candidate for candidate in CANDIDATES[CANDIDATES.index(first) + 1 :] if candidate.block <= first.block)]
    if itemsize == 4 or extra:
        table = (_SINGLE if itemsize == 4 else _EXTRA)["sm_90" if family(target) in ("sm_90", "sm_100") else "sm_89"]
        first = Configuration(*table[kernel][place])
        if itemsize == 4 and extra:
            first = Configuration(16, 8, 1)
    else:
        first = Configuration(*_TABLE[family(target)][kernel][2 * place + clipped])
    smaller = [candidate for candidate in CANDIDATES[CANDIDATES.index(first) + 1 :] if candidate.block <= first.block]
    return [first, *smaller]
