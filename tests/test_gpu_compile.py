"""What Triton's compiler sees of a call, without a GPU: whether every kernel compiles, and how often it has to."""

from __future__ import annotations

import pytest
import torch

from relattn import gpu
from tests import fuzz
from tests.edges import edges

pytest.importorskip("triton")
if gpu.INTERPRETED:
    pytest.skip("with the interpreter on, nothing compiles", allow_module_level=True)

from tests.stand_in import stand_in

# Of tests/fuzz.py: between them every argument, both kinds of masks, offsets and lengths by batch element, dropout, the three dtypes.
SEEDS = (0, 2, 3, 4, 7, 9, 10, 12, 16, 23, 28)
EDGES = ("causal with an offset of 1 * 2^62", "window of 2^62", "window of one key", "grouped queries, tables by head")


def launched(call: fuzz.Call, dtype=torch.bfloat16, **options) -> list:
    with stand_in(**options) as found:
        fuzz.run(call, "triton", dtype)
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_random_calls_compile(seed):
    """Triton's interpreter has no types: a name that an `if` binds anew to another one passes there, and compiles nowhere."""
    found = launched(fuzz.random_call(seed), (torch.float32, torch.bfloat16, torch.float16)[seed % 3])
    assert all(f"tt.func public @{launch.name}" in launch.module for launch in found)
    assert {"forward_kernel", "prepare_kernel", "query_gradient_kernel", "key_gradient_kernel"} <= {launch.name for launch in found}


@pytest.mark.parametrize("name", EDGES)
def test_edges_compile(name):
    assert len(launched(edges(3)[name])) >= 4
