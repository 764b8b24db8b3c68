"""The Triton backend. Most of this needs a GPU or Triton's interpreter, which `make test` runs in a process of its own (TRITON_INTERPRET=1
is read when triton is imported); the comparisons that every backend passes are in test_backends.py and its like."""

import dataclasses
import gc
import json
import math
import os
import subprocess
import sys
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import relattn
from relattn.arguments import Settings, Tensors
from relattn.backends import triton as gpu
from relattn.backends.tape import Slot
from tests.distributed.parts import CASES
from tests.distributed.parts import check as check_parts
from tests.edges import edges
from tests.fuzz import call_of, check, failed_once, packed_call, random_call
from tests.hidden import check_hidden, hidden_call

DEVICE = "cpu" if gpu.INTERPRETED else "cuda"
needs_kernels = pytest.mark.skipif(gpu.unavailable() is not None, reason=str(gpu.unavailable()))
needs_interpreter = pytest.mark.skipif(not gpu.INTERPRETED, reason="it has its own way to run on a GPU (benchmarks/gpu_check.sh)")


@pytest.fixture(autouse=True)
def fresh():
    """Tapes of one test's configurations are not another's."""
    gpu.forget()
    yield
    gpu.forget()


def inputs(batch=1, heads=2, queries=40, keys=40, size=16, rows=None, per_head=False, dtype=torch.float32) -> list[Tensor]:
    """query, key, value and rel_k."""
    generator = torch.Generator().manual_seed(0)
    rows = queries + keys - 1 if rows is None else rows
    shapes = [(batch, heads, queries, size), (batch, heads, keys, size), (batch, heads, keys, size)]
    shapes.append((heads, rows, size) if per_head else (rows, size))
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def gradients(tensors: list[Tensor], backend: str, **arguments) -> list[Tensor]:
    output, lse = relattn.relative_attention(*tensors, backend=backend, return_lse=True, **arguments)
    loss = (output * torch.linspace(-1, 1, output.numel(), device=output.device, dtype=output.dtype).view(output.shape)).sum()
    return [output, lse, *torch.autograd.grad(loss, tensors)]


def close(found: list[Tensor], expected: list[Tensor], tolerance=2e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance * (1 + other.abs().max().item()), rtol=0.0)


@needs_interpreter
@pytest.mark.parametrize("seed", [1, 5, 6, 13, 21, 26, 27, 50])
def test_random_calls(seed):
    """A few; `TRITON_INTERPRET=1 python -m tests.fuzz --backend triton` runs as many as wanted."""
    check(random_call(seed), "triton", (torch.float32, torch.bfloat16, torch.float16)[seed % 3])


@needs_kernels
@pytest.mark.parametrize("seed", [3, 7, 22, 26, 32] if gpu.INTERPRETED else range(60))
def test_random_packed_calls(seed):
    check(packed_call(seed), "triton", (torch.float32, torch.bfloat16, torch.float16)[seed % 3])


@needs_kernels
@pytest.mark.parametrize("clip", [5, 69])
def test_one_packed_sequence_is_the_call_that_is_not_packed(clip):
    """To the last bit, but for the tables' gradients, which other kernels may sum."""
    tensors = inputs(queries=70, keys=70, rows=2 * clip + 1)
    arguments = dict(max_relative_position=clip, chunk=(20, 1), dropout_p=0.2)
    torch.manual_seed(3)
    alone = gradients(tensors, "triton", **arguments)
    packed = [tensor[0].transpose(0, 1).detach().requires_grad_() for tensor in tensors[:3]] + tensors[3:]
    ends = torch.tensor([0, 70], dtype=torch.int32, device=DEVICE)
    torch.manual_seed(3)
    output, lse = relattn.relative_attention_varlen(*packed, cu_seqlens_q=ends, return_lse=True, backend="triton", **arguments)
    loss = (output.transpose(0, 1)[None] * torch.linspace(-1, 1, output.numel(), device=DEVICE).view(alone[0].shape)).sum()
    *by_token, table = torch.autograd.grad(loss, packed)
    found = [tensor.transpose(0, 1)[None] for tensor in (output, *by_token)]
    for one, other in zip((*found, lse[None]), (alone[0], *alone[2:5], alone[1]), strict=True):
        assert torch.equal(one, other)
    close([table], alone[5:])


@needs_kernels
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("seed", [1, 2, 9] if gpu.INTERPRETED else range(40))
def test_what_is_hidden_may_hold_anything(seed):
    """A few; `TRITON_INTERPRET=1 python -m tests.hidden --backend triton` runs as many as wanted."""
    check_hidden(hidden_call(seed, "triton"), "triton", (torch.float32, torch.bfloat16, torch.float16)[seed % 3])


@needs_kernels
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("name", ["dropout", "chunks", "large scores"] if gpu.INTERPRETED else CASES)
def test_parts_join(name):
    """`TRITON_INTERPRET=1 python -m tests.distributed.parts --backend triton` runs all."""
    small = dict(queries=12, batch=1, heads=1, key_heads=1) if gpu.INTERPRETED else {}
    assert check_parts(dataclasses.replace(CASES[name], **small), "triton", torch.float32) == ""


@needs_kernels
@pytest.mark.parametrize("seed", [1, 35, 61, 77] if gpu.INTERPRETED else range(60))
def test_calls_of_one_signature_share_a_tape(seed):
    """The second one launches what the first one left, on its own tensors."""
    call, dtype = random_call(seed), (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    check(call, "triton", dtype)
    tapes = dict(gpu._TAPES)
    other = {}
    for name, tensor in call.tensors.items():  # the same places in memory
        whole = tensor.detach().new_empty(0).set_(tensor.untyped_storage()) * 0.5
        other[name] = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    check(dataclasses.replace(call, tensors=other), "triton", dtype)
    assert len(tapes) == 2
    assert tapes == gpu._TAPES


@needs_kernels
def test_a_tape_holds_no_tensor():
    tensors = inputs(rows=11)
    found = gradients(tensors, "triton", max_relative_position=5)
    kept = [weakref.ref(tensor.untyped_storage()) for tensor in (*tensors, *found)]
    del tensors, found
    gc.collect()
    assert len(gpu._TAPES) == 2
    assert not any(reference() for reference in kept)
    assert all(not tape.live for tape in gpu._TAPES.values())


@needs_kernels
def test_the_oldest_tapes_go(monkeypatch):
    monkeypatch.setattr(gpu, "_MOST_STEPS", 4)
    for length in (3, 4, 5):
        relattn.relative_attention(*(tensor.detach() for tensor in inputs(queries=length, keys=length)), backend="triton")
    assert [key[0][0][2] for key in gpu._TAPES] == [4, 5]  # two steps each


@needs_kernels
def test_table_gradients_stay_within_the_bytes_that_are_stated(monkeypatch):
    """Of many heads with tables of their own, as many at once as there is room for."""
    tensors = inputs(heads=4, queries=70, keys=70, rows=41, per_head=True)
    arguments = dict(max_relative_position=20, rel_v=torch.randn(4, 41, 16, device=DEVICE, requires_grad=True))
    found = {}
    for budget in (20_000, 0):
        gpu.forget()
        monkeypatch.setattr(gpu, "_TILE_BYTES", budget)
        output = relattn.relative_attention(*tensors, backend="triton", **arguments)
        found[budget] = torch.autograd.grad(output.square().sum(), (*tensors, arguments["rel_v"]))
        rooms = {name: room for tape in gpu._TAPES.values() for name, room in tape._workspace.items() if "diagonals" in name}
        assert rooms
        assert not budget or max(math.prod(shape) * 4 for _, shape, _ in rooms.values()) <= budget
    close(found[20_000], found[0], 1e-6)


@needs_kernels
def test_calls_that_failed_once():
    for seed, dtype in failed_once("triton"):
        check(call_of(seed, "triton"), "triton", dtype)


@needs_interpreter
@pytest.mark.parametrize("part", range(3))
def test_edges(part):
    for call in list(edges(3).values())[part::18]:  # a sixth of them; `python -m tests.edges --backend triton` runs all
        if call.tensors["query"].shape[3] <= 256:
            check(call, "triton", torch.float32)


@needs_kernels
@pytest.mark.parametrize("clip", [None, 9])
@pytest.mark.parametrize("per_head", [False, True])
def test_same_bits_every_time(clip, per_head):
    """No atomics: table gradients too are summed in a fixed order."""
    tensors = inputs(queries=40, keys=40, rows=None if clip is None else 2 * clip + 1, per_head=per_head, batch=2)
    arguments = {} if clip is None else {"max_relative_position": clip}
    first, second = (gradients(tensors, "triton", **arguments) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@needs_kernels
@pytest.mark.parametrize("splits", [2, 3, 7])
def test_split_keys_change_nothing(monkeypatch, splits):
    """Decoding cuts the keys into parts whose results are joined: also where a part has no key that a query sees."""
    tensors = inputs(batch=2, queries=3, keys=150, rows=21, size=24)
    arguments = dict(max_relative_position=10, query_offset=60, is_causal=True, key_lengths=torch.tensor([150, 17], device=DEVICE))
    expected = gradients(tensors, "blocked", **arguments)
    monkeypatch.setattr(gpu, "_SPLITS", splits)
    close(gradients(tensors, "triton", **arguments), expected)


def decoding(group=3, keys=150, clip: int | None = 6, dtype=torch.float32, **arguments):
    """query, key, value and rel_k of a step of two sequences with two key heads, and the call's arguments."""
    rows = keys if clip is None else clip + 1
    query, *others = inputs(2, 2 * group, 1, keys, rows=rows, dtype=dtype)
    key, value = (tensor.detach()[:, :2].clone().requires_grad_() for tensor in others[:2])
    arguments = dict(query_offset=keys - 1, max_relative_position=(rows - 1, 0), enable_gqa=True) | arguments
    return [query, key, value, others[2]], arguments


@pytest.fixture
def names(monkeypatch):
    """Kernels that were launched."""
    found, launch = [], gpu.Call._launch

    def noted(self, kernel, *others, **arguments):
        found.append(kernel)
        launch(self, kernel, *others, **arguments)

    monkeypatch.setattr(gpu.Call, "_launch", noted)
    return found


def decodes(tensors, arguments, monkeypatch, tolerance=1e-5, splits=(0, 3)) -> None:
    """As blocked does, to infinities."""
    expected = relattn.relative_attention(*tensors, backend="blocked", return_lse=True, **arguments)
    for parts in splits:
        monkeypatch.setattr(gpu, "_SPLITS", parts)
        found = relattn.relative_attention(*tensors, backend="triton", return_lse=True, **arguments)
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@needs_kernels
@pytest.mark.parametrize("keys", [1, 5, 150])
@pytest.mark.parametrize("group", [1, 3, 8, 20])
def test_decoding(monkeypatch, names, group, keys):
    """Groups that fill a tile, do not, and take two."""
    for clip, dtype, tolerance in ((None, torch.float32, 1e-5), (6, torch.float32, 1e-5), (6, torch.bfloat16, 2e-2)):
        decodes(*decoding(group, keys, clip, dtype, is_causal=True), monkeypatch, tolerance)
    assert set(names) <= {"decode", "combine"}
    assert ("combine" in names) == (keys == 150)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


DECODING = {
    "causal, in the middle": lambda: dict(query_offset=70, is_causal=True),
    "both ways": lambda: dict(query_offset=70, max_relative_position=(4, 2)),
    "tables of the middle only": lambda: dict(query_offset=75, max_relative_position=(3, 3)),
    "before the first key": lambda: dict(query_offset=-3, is_causal=True),  # nothing is seen
    "far beyond the last key": lambda: dict(query_offset=10**12),
    "window": lambda: dict(query_offset=100, window=(40, 10)),
    "window of one key": lambda: dict(window=(0, 0)),
    "lengths": lambda: dict(key_lengths=torch.tensor([0, 77], device=DEVICE)),
    "offsets": lambda: dict(query_offset=torch.tensor([20, 130], device=DEVICE), is_causal=True),
    "offsets and lengths": lambda: dict(
        query_offset=torch.tensor([149, 40], device=DEVICE), window=(60, 0), key_lengths=torch.tensor([150, 41], device=DEVICE)
    ),
    "key mask": lambda: dict(key_mask=normal(2, 150) > 0),
    "mask": lambda: dict(attn_mask=normal(2, 6, 1, 150) > 0, window=(90, 0)),
    "mask of one head that hides all": lambda: dict(attn_mask=torch.arange(6, device=DEVICE).view(6, 1, 1) != 4),
    "float mask": lambda: dict(attn_mask=normal(6, 1, 150)),
    "float mask for all heads": lambda: dict(attn_mask=torch.where(normal(1, 150) > 1, -torch.inf, normal(1, 150))),
    "bias": lambda: dict(rel_bias=normal(7)),
    "biases by head": lambda: dict(rel_bias=normal(6, 7), query_offset=torch.tensor([149, 3], device=DEVICE)),
    "positional biases": lambda: dict(pos_bias_u=normal(6, 16), pos_bias_v=normal(6, 16)),
    "all tables": lambda: dict(rel_q=normal(7, 16), rel_v=normal(7, 16), rel_bias=normal(6, 7), query_offset=75),
    "negative scale": lambda: dict(scale=-0.5),
}


@needs_kernels
@pytest.mark.parametrize("name", DECODING)
def test_terms_of_decoding(monkeypatch, names, name):
    decodes(*decoding(**DECODING[name]()), monkeypatch)
    assert set(names) == {"decode", "combine"}


@needs_kernels
def test_decoding_with_a_bias_alone(monkeypatch, names):
    tensors, arguments = decoding(rel_bias=normal(6, 7))
    decodes(tensors[:3], arguments, monkeypatch)
    tensors, arguments = decoding()
    decodes(tensors[:3], {name: arguments[name] for name in ("query_offset", "enable_gqa")}, monkeypatch)
    assert set(names) == {"decode", "combine"}


@needs_kernels
def test_gradients_of_decoding(names):
    tensors, arguments = decoding(rel_bias=normal(6, 7), is_causal=True)
    close(gradients(tensors, "triton", **arguments), gradients(tensors, "blocked", **arguments))
    assert names[0] == "decode"
    assert "forward" not in names


@needs_kernels
def test_what_is_not_packed_into_a_tile(monkeypatch, names):
    """Heads of one tile share its table: not those of a group with tables of their own. And one query each."""
    (query, key, value, _), arguments = decoding()
    decodes([query, key, value, normal(6, 7, 16)], arguments, monkeypatch, splits=(0,))
    (query, key, value, rel_k), _ = decoding()
    decodes([torch.cat([query, query], 2), key, value, rel_k], arguments, monkeypatch, splits=(0,))
    assert set(names) == {"forward"}
    names.clear()
    (query, key, value, _), arguments = decoding(group=1)
    decodes([query, key, value, normal(2, 7, 16)], arguments, monkeypatch, splits=(0,))
    assert set(names) == {"decode"}


@needs_kernels
@pytest.mark.parametrize("programs", [1, 5, 64])
def test_table_gradients_do_not_depend_on_how_work_is_divided(monkeypatch, programs):
    tensors = inputs(batch=2, heads=2, queries=50, keys=40, rows=13, size=16)
    expected = gradients(tensors, "blocked", max_relative_position=6)
    monkeypatch.setattr(gpu, "_TABLE_PROGRAMS", programs)
    close(gradients(tensors, "triton", max_relative_position=6), expected)


@needs_kernels
@pytest.mark.parametrize("kernel_blocks", [(16, 16), (32, 16), (32, 32), (64, 16), (64, 32)])
@pytest.mark.parametrize("clip", [(0, 0), (3, 20), (69, 61)])  # the last: tiles that only just lie beyond the edges, on both sides
def test_far_tiles_are_counted_once(monkeypatch, kernel_blocks, clip):
    """What tiles far from the tables owe to the edge rows comes from one kernel, the rest from another with smaller tiles."""
    large, small = kernel_blocks
    configuration = gpu._kernels().configs.Configuration

    def configurations(kernel, *_):
        return [configuration(small if kernel == "table_gradient" else large, 4, 1)]

    monkeypatch.setattr(gpu._kernels().configs, "configurations", configurations)
    tensors = inputs(queries=140, keys=150, rows=sum(clip) + 1, size=16, heads=1)
    arguments = dict(max_relative_position=clip, query_offset=4)
    close(gradients(tensors, "triton", **arguments), gradients(tensors, "blocked", **arguments))


@needs_kernels
@pytest.mark.parametrize(("clip", "per_head"), [(7, False), (None, True)])
def test_matrices_of_a_table_are_added_up_first(monkeypatch, clip, per_head):
    """As where there are many: the kernel that folds distances has a program for some rows of a table only."""
    from relattn.backends import triton_backward

    launched, launch = [], gpu.Call._launch

    def noted(self, kernel, *given, **arguments):
        launched.append(kernel)
        launch(self, kernel, *given, **arguments)

    monkeypatch.setattr(gpu.Call, "_launch", noted)
    length = 40
    rows = 2 * (length - 1 if clip is None else clip) + 1
    tensors = inputs(batch=2, heads=3, queries=length, keys=length, rows=rows, per_head=per_head)
    bias = torch.randn(3, rows, requires_grad=True, device=DEVICE)
    options = dict(max_relative_position=rows // 2, is_causal=True, query_offset=0)

    def both(backend):
        output = relattn.relative_attention(*tensors, rel_bias=bias, backend=backend, **options)
        return [output, *torch.autograd.grad(output, [*tensors, bias], torch.ones_like(output))]

    monkeypatch.setattr(triton_backward, "_MATRICES", 0)
    added = both("triton")
    assert "matrix_sum" in launched
    gpu.forget()
    launched.clear()
    monkeypatch.setattr(triton_backward, "_MATRICES", 1000)
    close(both("triton"), added)
    assert "table_sum" in launched
    assert "matrix_sum" not in launched
    close(added, both("blocked"))


@needs_kernels
def test_a_chip_without_room_gets_a_smaller_configuration(monkeypatch):
    kernels = gpu._kernels()
    launch, tried = gpu.Call._launch, []

    def refuse_large(self, kernel, grid, configuration, *clipped, **arguments):
        tried.append((kernel, configuration.block))
        if configuration.block > 16 and kernel not in ("prepare", "matrix_sum", "table_sum"):
            raise kernels.OutOfResources(300000, 232448, "shared memory")
        launch(self, kernel, grid, configuration, *clipped, **arguments)

    candidates = [kernels.configs.Configuration(block, 4, 1) for block in (64, 32, 16)]
    monkeypatch.setattr(kernels.configs, "configurations", lambda *_: candidates)
    monkeypatch.setattr(gpu.Call, "_launch", refuse_large)
    tensors = inputs(rows=11)
    with pytest.warns(RuntimeWarning, match=r"forward kernel falls from \(64.* to \(32.*shared memory"):
        found = gradients(tensors, "triton", max_relative_position=5)
    assert tried.count(("forward", 64)) == 1
    assert ("forward", 16) in tried
    close(found, gradients(tensors, "blocked", max_relative_position=5))
    gradients(inputs(rows=11, queries=50), "triton", max_relative_position=5)
    assert tried.count(("forward", 64)) == 1  # other lengths do not try what found no room
    gpu.forget()
    monkeypatch.setattr(kernels.configs, "configurations", lambda *_: candidates[:2])
    refused = pytest.raises(gpu.KernelError, match=r"forward kernel does not .* on .*: OutOfResources: .*shared memory")
    with refused, pytest.warns(RuntimeWarning, match="falls from"):
        gradients(tensors, "triton", max_relative_position=5)


@needs_kernels
def test_autotuning_is_asked_for_and_remembered(monkeypatch, tmp_path):
    configuration = gpu._kernels().configs.Configuration
    configurations = [configuration(32, 4, 1), configuration(16, 4, 1)]
    monkeypatch.setattr(gpu._kernels().configs, "configurations", lambda *_: configurations[:1])
    monkeypatch.setattr(gpu._kernels().configs, "CANDIDATES", [configuration(64, 4, 1), *configurations])
    launch = gpu.Call._launch

    def broken(self, kernel, grid, configuration, *clipped, **arguments):  # Triton's compiler gives up on some
        if configuration.block == 64:
            raise RuntimeError("PassManager::run failed")
        launch(self, kernel, grid, configuration, *clipped, **arguments)

    monkeypatch.setattr(gpu.Call, "_launch", broken)
    monkeypatch.setenv("RELATTN_CACHE", str(tmp_path / "new"))
    monkeypatch.setattr("relattn.backends.autotune._REPEATS", 1)
    tensors = inputs(rows=11, heads=1)  # clipped: every kernel of one gradient has a configuration of its own
    expected = gradients(tensors, "triton", max_relative_position=5)
    assert not (tmp_path / "new").exists()
    monkeypatch.setenv("RELATTN_AUTOTUNE", "1")
    close(gradients(tensors, "triton", max_relative_position=5), expected)
    found = json.loads((tmp_path / "new" / "autotune.json").read_text())
    kernels = {key.split(" | ")[1] for key in found}
    # The table's has tiles no larger than the queries' gradient: a choice only if that took the larger ones.
    assert kernels - {"table_gradient"} == {"forward", "prepare", "query_gradient", "key_gradient"}
    assert all(set(times) == {"(32, 4, 1)", "(16, 4, 1)"} and min(times.values()) > 0 for times in found.values())
    gpu.forget()
    (tmp_path / "new" / "autotune.json").write_text("{ half a fi")  # killed while an older version wrote it
    close(gradients(tensors, "triton", max_relative_position=5), expected)
    gpu.forget()
    monkeypatch.setattr("relattn.backends.autotune._measure", lambda *_: pytest.fail("timed again"))
    close(gradients(tensors, "triton", max_relative_position=5), expected)


class Allocations(TorchDispatchMode):
    """The largest tensor of each operation's results that has memory of its own."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.sizes.append((tensor.untyped_storage().nbytes(), str(function)))
        return result


def tensors_in(argument, live) -> list[Tensor]:
    """Operands are tuples of a tensor's name and strides."""
    if isinstance(argument, Slot):
        argument = live[argument]
    if isinstance(argument, tuple):
        return [tensor for part in argument for tensor in tensors_in(part, live)]
    return [argument] if isinstance(argument, Tensor) else []


@needs_kernels
@pytest.mark.parametrize(("rows", "size"), [(None, 16), (None, 80), (33, 16)])
def test_nothing_of_length_by_length_is_ever_written(monkeypatch, rows, size):
    """Kernels write to tensors that they are handed, and these are listed here, with all that PyTorch makes around them. Only a fixed
    number of bytes holds tiles of scores, whatever the length."""
    length, budget = 384, 150_000
    tensors = inputs(heads=1, queries=length, keys=length, size=size, rows=rows, dtype=torch.bfloat16)
    handed, launch = [], gpu.Call._launch

    def listed(self, kernel, grid, configuration, *clipped, **arguments):
        for name, value in (self.arguments | arguments).items():
            handed.extend((tensor.untyped_storage().nbytes(), name) for tensor in tensors_in(value, self.tape.live))
        launch(self, kernel, grid, configuration, *clipped, **arguments)

    monkeypatch.setattr(gpu.Call, "_launch", listed)
    monkeypatch.setattr(gpu, "_TABLE_PROGRAMS", 8)
    monkeypatch.setattr(gpu, "_TILE_BYTES", budget)
    monkeypatch.setattr(gpu, "_CONFIGURATION", (32, 4, 1))
    clip = length - 1 if rows is None else rows // 2
    call = Tensors(*(tensor.detach() for tensor in tensors)), Settings(clip, clip, False, None, None, 0, 0.0, 0.25)
    seed = torch.zeros((), dtype=torch.int64, device=DEVICE)
    with Allocations() as allocations:
        output, lse = gpu.forward(*call, seed)
        found = gpu.backward(torch.ones_like(output), None, *call, output, lse, seed, [True] * 4 + [False] * 6)
    tiles = {name: bytes_ for bytes_, name in handed if name in ("kept_tiles", "grad_tiles", "owed_tiles")}
    others = [entry for entry in handed if not entry[1].endswith("tiles")]
    linear = 4 * 4 * length * size  # bytes: twice a float32 gradient of the table's 2 L rows
    assert len(found) == 4
    assert len(handed) > 20
    assert len(allocations.sizes) > 20
    assert len(tiles) == (0 if rows else 1 if size == 16 else 3)
    assert sum(tiles.values()) <= budget
    assert max(others)[0] <= linear, max(others)
    assert max(allocations.sizes)[0] <= max(linear, budget), max(allocations.sizes)
    assert size > 16 or max(linear, budget) < length * length * 2  # L x L in 16 bits


@needs_kernels
def test_reasons(monkeypatch):
    def reason(size=16, dtype=torch.float32, device=DEVICE, **arguments):
        tensor = torch.zeros(1, 1, 4, size, dtype=dtype, device=device)
        return relattn.explain(tensor, tensor, tensor, **arguments).reasons.get("triton")

    assert reason() is None
    assert "256" in reason(size=257)
    assert "float32" in reason(dtype=torch.float64)
    assert "gradient" in reason(attn_mask=torch.zeros(4, 4, device=DEVICE, requires_grad=True))
    if not gpu.INTERPRETED:
        assert "GPU tensors" in reason(device="cpu")


@needs_interpreter
def test_interpreter_is_never_the_automatic_choice():
    tensor = torch.zeros(1, 1, 4, 16)
    assert relattn.explain(tensor, tensor, tensor).backend != "triton"
    assert list(relattn.available_backends())[-1] == "triton"


@needs_kernels
def test_half_precision_tables_and_strides():
    """float32 tables beside half-precision inputs get float32 gradients; inputs are read where they lie."""
    query, key, value, rel_k = inputs(rows=11, dtype=torch.bfloat16)
    rel_k = rel_k.detach().float().requires_grad_()
    swapped = [tensor.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for tensor in (query, key, value)]
    plain = gradients([query, key, value, rel_k], "triton", max_relative_position=5)
    moved = gradients([*swapped, rel_k], "triton", max_relative_position=5)
    assert plain[-1].dtype == torch.float32
    assert plain[0].dtype == torch.bfloat16
    assert moved[0].stride() == swapped[0].stride()
    # The loss weighs by place in memory: forward results only.
    assert torch.equal(plain[0], moved[0])
    assert torch.equal(plain[1], moved[1])


if gpu.unavailable() is None:
    import triton
    import triton.language as tl

    from relattn.kernels.gpu import tile

    @triton.jit
    def rotate_kernel(
        order, result, halves, CONTENT: tl.constexpr, OTHER: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
    ):  # fmt: skip
        line, place = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
        numbers = line * BLOCK + place
        tl.store(order + tl.arange(0, BLOCK * BLOCK), tile._flatten(numbers, BLOCK, ROWS))
        tl.store(result + numbers, tile._rotate(numbers, 0, CONTENT, OTHER, START, BLOCK, ROWS))
        if ROWS:
            tl.store(halves + numbers, tile._rotate_halves(numbers.to(tl.int16), 0, CONTENT, OTHER, START, BLOCK))

    @triton.jit
    def words_kernel(order, BLOCK: tl.constexpr):
        numbers = tl.arange(0, BLOCK)[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        tl.store(order + tl.arange(0, BLOCK * BLOCK // 2), tile._flatten_words(numbers, BLOCK))


@needs_interpreter
def test_no_bank_conflicts_and_the_rotation_is_what_it_says():
    """In the layout of matrix units' results (tile.py) every store of a tile and every load of the rotated one meets 32 banks."""
    block = 64
    lanes = [(lane // 4, 2 * (lane % 4)) for lane in range(32)]

    def by_number(order):
        address = torch.empty_like(order).long()
        address[order.long()] = torch.arange(len(order))
        return address

    words = torch.zeros(block * block // 2, dtype=torch.int32)
    words_kernel[(1,)](words, block)
    word_address = by_number(words)
    for rows in (True, False):
        for content_sign, other_sign, start in ((-1, 1, block - 1), (1, -1, block - 1), (1, 1, 1)):
            order = torch.zeros(block * block, dtype=torch.int32)
            result, halves = torch.zeros(block, block, dtype=torch.int32), torch.zeros(block, block, dtype=torch.int16)
            rotate_kernel[(1,)](order, result, halves, content_sign, other_sign, start, block, rows)
            content, other = torch.meshgrid(torch.arange(block), torch.arange(block), indexing="ij")
            place = (start + content_sign * content + other_sign * other) % block
            expected = content * block + place if rows else (place * block + content).T
            assert torch.equal(result.long(), expected)
            assert not rows or torch.equal(halves.long(), expected)
            address = by_number(order)
            for row, column, element in ((r, c, e) for r in range(0, block, 8) for c in range(0, block, 8) for e in (0, 1)):
                places = [(row + r, column + c + element) for r, c in lanes]
                assert len({int(address[a * block + b]) % 32 for a, b in places}) == 32
                assert len({int(address[result[a, b]]) % 32 for a, b in places}) == 32
                if rows and column < block // 2:  # words: columns c and c + BLOCK / 2
                    assert len({int(word_address[a * (block // 2) + b]) % 32 for a, b in places}) == 32
                    loaded = [a * (block // 2) + int(place[a, b]) % (block // 2) for a, b in places]
                    assert len({int(word_address[word]) % 32 for word in loaded}) == 32


def test_importing_relattn_imports_no_triton():
    code = "import sys, relattn; relattn.available_backends(); sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(gpu.INTERPRETED, reason="with the interpreter on, nothing compiles")
def test_shipped_configurations_fit_their_chips():
    """Compiles the kernels for every architecture, as `make resources` does (which has larger heads too): each compiles, and shared memory
    suffices."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "relattn.kernels.gpu.resources", "--sizes", "64", "--jobs", str(min(8, os.cpu_count() or 1))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("sm_", "gfx"))]
    assert len(rows) > 75
    assert {row[0] for row in rows} == {"sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"}
