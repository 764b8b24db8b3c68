"""What Triton's compiler sees of a call, without a GPU: whether every kernel compiles, and how often it has to."""

from __future__ import annotations

import collections
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import relattn
from relattn.arguments import Settings, Tensors
from relattn.backends import triton as gpu
from tests import fuzz
from tests.edges import edges

pytest.importorskip("triton")
if gpu.INTERPRETED:
    pytest.skip("with the interpreter on, nothing compiles", allow_module_level=True)

from tests.kernels.stand_in import stand_in

# Of tests/fuzz.py: between them every argument, both kinds of masks, offsets and lengths by batch element, dropout, the three dtypes.
SEEDS = (0, 2, 3, 4, 7, 9, 10, 12, 16, 23, 28)
PACKED = (8, 9, 15, 29)  # of these those that fuzz.packed_call makes
EDGES = ("causal with an offset of 1 * 2^62", "window of 2^62", "window of one key", "grouped queries, tables by head")


def launched(call: fuzz.Call, dtype=torch.bfloat16, **options) -> list:
    with stand_in(**options) as found:
        fuzz.run(call, "triton", dtype)
    return found


@pytest.mark.parametrize("seed", sorted({*SEEDS, *PACKED}))
def test_random_calls_compile(seed):
    """Triton's interpreter has no types: a name that an `if` binds anew to another one passes there, and compiles nowhere."""
    call = fuzz.packed_call(seed) if seed in PACKED else fuzz.random_call(seed)
    found = launched(call, (torch.float32, torch.bfloat16, torch.float16)[seed % 3])
    assert all(f"tt.func public @{launch.name}" in launch.module for launch in found)
    forward = "decode_kernel" if seed not in PACKED and call.tensors["query"].shape[2] == 1 else "forward_kernel"
    assert {forward, "prepare_kernel", "query_gradient_kernel", "key_gradient_kernel"} <= {launch.name for launch in found}


@pytest.mark.parametrize("name", EDGES)
def test_edges_compile(name):
    assert len(launched(edges(3)[name])) >= 4


LENGTHS = (1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 100, 127, 128, 129, 160, 255, 256, 257, 300, 400, 500, 511,
           512, 513, 640, 777, 1000, 1024, 1025, 1536, 2048, 2049, 3000, 3333, 4095, 4096)  # fmt: skip
KINDS = {
    "plain": {},
    "clipped": {"clip": 16},
    "causal": {"is_causal": True},
    "one query": {"is_causal": True, "queries": 1},
    "masks": {"mask": True},
    "float mask": {"float_mask": True},
    "key mask": {"key_mask": True},
    "odd head size": {"size": 33},
    "large head": {"size": 128},
}


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_make_few_compilations(kind):
    """Sizes are not specialised; what remains is whether strides are 1 or multiples of 16, and where tables are clipped."""
    compiled = collections.defaultdict(set)
    with stand_in(compiles=False) as found:
        for length in LENGTHS:
            backward(length, **KINDS[kind])
    for launch in found:
        compiled[launch.name].add(launch.key)
    table = "table_gradient_kernel" if kind == "clipped" else "product_kernel"
    keys = "product_kernel" if kind == "large head" else "key_gradient_kernel"
    forward = "decode_kernel" if kind == "one query" else "forward_kernel"
    assert {forward, "prepare_kernel", "query_gradient_kernel", keys, table} <= compiled.keys()
    assert max(map(len, compiled.values())) <= 4, {name: len(keys) for name, keys in compiled.items()}


def backward(length, queries=None, size=64, clip=None, mask=False, float_mask=False, key_mask=False, **arguments):
    queries, clip = queries or length, length - 1 if clip is None else clip
    shapes = ((2, 2, queries, size), (2, 2, length, size), (2, 2, length, size), (2, 2 * clip + 1, size))
    tensors = [torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    if mask or float_mask:
        arguments["attn_mask"] = torch.zeros(2, 1 + float_mask, queries, length, dtype=torch.bfloat16 if float_mask else torch.bool)
    if key_mask:
        arguments["key_mask"] = torch.ones(2, length, dtype=torch.bool)
    if queries == 1:
        arguments["query_offset"] = length - 1
    output = relattn.relative_attention(*tensors, max_relative_position=clip, backend="triton", **arguments)
    torch.autograd.grad(output, tensors, torch.empty_like(output))


def test_packed_lengths_make_no_compilations_and_are_not_looked_at():
    """Whatever they are, the same kernels; and nothing that waits for the GPU, or that a CUDA graph could not hold."""
    compiled = collections.defaultdict(set)
    needs = [True] * 4 + [False] * 6
    with stand_in(compiles=False) as found:
        for lengths in ((5,), (70, 0, 33), (1, 1), (500, 20, 300, 1000), (64, 128)):
            ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            shape = (1, 2, sum(lengths), 64)
            call = Tensors(*(torch.zeros(shape, dtype=torch.bfloat16) for _ in range(3)), torch.zeros(33, 64, dtype=torch.bfloat16))
            call = call._replace(cu_seqlens_q=ends, cu_seqlens_k=ends)
            settings = Settings(16, 16, True, None, None, 0, 0.0, 0.125)
            with Kernels() as others:
                output, lse = gpu.forward(call, settings, torch.empty((0,), dtype=torch.int64))
                gpu.backward(output, None, call, settings, output, lse, torch.empty((0,), dtype=torch.int64), needs)
            assert not others.names
    for launch in found:
        compiled[launch.name].add(launch.key)
    assert max(map(len, compiled.values())) <= 3, {name: len(keys) for name, keys in compiled.items()}  # whether clipped, in some blocks


class Kernels(TorchDispatchMode):
    """What torch computes by itself: each takes a launch on a GPU, views and new tensors take none."""

    free = ("empty", "view", "detach", "transpose", "slice", "alias", "expand", "as_strided")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not any(part in name for part in self.free):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("size", "clip"), [(64, 127), (64, 8), (128, 127), (128, 8)])
@pytest.mark.parametrize("again", [False, True])
def test_at_most_six_launches_with_backward(size, clip, again):
    call = Tensors(*(torch.zeros(shape, dtype=torch.bfloat16) for shape in ((2, 2, 128, size),) * 3 + ((2 * clip + 1, size),)))
    settings, needs = Settings(clip, clip, False, None, None, 0, 0.0, 0.125), [True] * 4 + [False] * 6
    seed = torch.empty((0,), dtype=torch.int64)
    with stand_in(compiles=False) as found:
        for _ in range(1 + again):
            found.clear()
            with Kernels() as others:
                output, lse = gpu.forward(call, settings, seed)
                gpu.backward(output, None, call, settings, output, lse, seed, needs)
    if clip < 127:
        expected = {"key_gradient_kernel", "table_gradient_kernel"}
    else:
        expected = {"product_kernel"} if size > 64 else {"key_gradient_kernel", "product_kernel"}
    names = [launch.name for launch in found]
    assert set(names) == {"forward_kernel", "prepare_kernel", "query_gradient_kernel", "table_sum_kernel", *expected}
    assert len(names) == len(set(names)) <= 6
    assert not others.names


def test_a_kernel_that_does_not_compile_costs_no_run(recwarn):
    """With the automatic choice: blocked, one warning, and the reason afterwards. By name it is an error."""
    tensors = [torch.randn(shape, requires_grad=True) for shape in ((1, 2, 20, 8),) * 3 + ((39, 8),)]
    expected = torch.autograd.grad(relattn.relative_attention(*tensors, backend="blocked").square().sum(), tensors)
    with stand_in(error=RuntimeError("PTXAS error: Internal compiler error\nand more")) as found:
        assert relattn.explain(*tensors).backend == "triton"
        output = relattn.relative_attention(*tensors)
        gradients = torch.autograd.grad(output.square().sum(), tensors)
        reasons = relattn.explain(*tensors).reasons
        relattn.relative_attention(*tensors)
        with pytest.raises(ValueError, match="backend: 'triton' cannot take this call: its forward kernel does not compile"):
            relattn.relative_attention(*tensors, backend="triton")
        with pytest.raises(gpu.KernelError, match="its forward kernel does not compile or launch on sm_90: RuntimeError: PTXAS"):
            relattn.relative_attention(*(tensor.bfloat16() for tensor in tensors), backend="triton")
    torch.testing.assert_close(gradients, expected)
    assert "its forward kernel does not compile or launch on sm_90: RuntimeError: PTXAS error" in reasons["triton"]
    assert not found
    messages = [str(warning.message) for warning in recwarn if warning.category is RuntimeWarning]
    assert len(messages) == 1
    assert "such calls now take backend 'blocked'" in messages[0]


@pytest.mark.parametrize(
    ("switch", "expected"),
    [("", False), ("allow_tf32 = True", True), ("fp32_precision = 'tf32'", True), ("fp32_precision = 'ieee'", False)],
)
def test_both_of_torchs_switches_for_tf32(switch, expected):
    """In a process of its own: once the new switch was used, torch raises where the old one is read."""
    lines = ["import torch", "from relattn.backends import triton", switch and f"torch.backends.cuda.matmul.{switch}"]
    lines.append("print(triton._tf32())")
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(expected)
