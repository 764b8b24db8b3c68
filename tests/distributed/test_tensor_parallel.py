"""Sharding by batch and heads: the operators on DTensors, and the layer's plan; against one process in float64."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

import relattn
from tests.distributed.processes import Processes

pytest.importorskip("torch.distributed.tensor")
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from relattn.distributed import HeadsParallel, tensor_parallel_plan

pytestmark = pytest.mark.xdist_group("tensor_parallel")  # whose processes they share

RANKS = 4
S, R, P = Shard, Replicate(), Partial()


@pytest.fixture(scope="module")
def processes():
    with Processes(RANKS) as started:
        yield started


class Call(NamedTuple):
    """A call on a mesh: how its tensors are placed (others are plain, the same on all ranks), and what is to come out."""

    tensors: dict[str, tuple[int, ...]]  # shapes
    settings: dict[str, Any]
    placements: dict[str, list[Placement]]
    output: list[Placement]
    gradients: dict[str, list[Placement]]  # those that are not placed as their tensors
    mesh: tuple[int, ...] = (2, 2)


L, D, TABLE = 6, 8, 5
QKV = ("query", "key", "value")


def _qkv(batch=4, heads=4, key_heads=None, length=L):
    return {"query": (batch, heads, length, D), **dict.fromkeys(("key", "value"), (batch, key_heads or heads, length, D))}


def _all(names, *placements):
    return {name: list(placements) for name in names}


PER_HEAD = dict(
    rel_k=(4, TABLE, D), rel_q=(4, TABLE, D), rel_v=(4, TABLE, D), rel_bias=(4, TABLE), pos_bias_u=(4, D), pos_bias_v=(4, D)
)  # fmt: skip
SHARED = dict(rel_k=(TABLE, D), rel_q=(TABLE, D), rel_v=(TABLE, D), rel_bias=(TABLE,))
BATCH_AND_HEADS = _all(QKV, S(0), S(1))
CALLS = {
    "batch and heads": Call(
        _qkv() | PER_HEAD | dict(attn_mask=(4, 4, L, L), key_mask=(4, L), key_lengths=(4,), query_offset=(4,)),
        dict(is_causal=True),
        BATCH_AND_HEADS | _all(PER_HEAD, R, S(0)) | dict(attn_mask=[S(0), S(1)])
        | _all(("key_mask", "key_lengths", "query_offset"), S(0), R),
        [S(0), S(1)],
        _all(PER_HEAD, P, S(0)),
    ),
    "shared tables and a mask for all": Call(
        _qkv() | SHARED | dict(attn_mask=(L, L)),
        dict(window=(3, 2)),
        BATCH_AND_HEADS | _all((*SHARED, "attn_mask"), R, R),
        [S(0), S(1)],
        _all((*SHARED, "attn_mask"), P, P),
    ),
    "a mask of a head, plain lengths": Call(
        _qkv() | PER_HEAD | dict(attn_mask=(4, 1, L), key_lengths=(4,), key_mask=(4, L)),
        {},
        BATCH_AND_HEADS | _all(PER_HEAD, R, R) | dict(attn_mask=[R, S(0)]),
        [S(0), S(1)],
        _all(PER_HEAD, P, S(0)) | dict(attn_mask=[P, S(0)]),
    ),
    "heads over the whole mesh": Call(
        _qkv(batch=1) | PER_HEAD,
        dict(chunk=(2, 1)),
        _all(QKV, S(1), S(1)) | _all(PER_HEAD, S(0), S(0)),
        [S(1), S(1)],
        {},
    ),
    "a batch that does not divide": Call(
        _qkv(batch=5) | SHARED, {}, _all(QKV, S(0)) | _all(SHARED, R), [S(0)], _all(SHARED, P), mesh=(4,)
    ),
    "grouped queries": Call(
        _qkv(key_heads=2) | SHARED, dict(enable_gqa=True), BATCH_AND_HEADS | _all(SHARED, R, R), [S(0), S(1)],
        _all(SHARED, P, P),
    ),
    "one key head": Call(
        _qkv(key_heads=1), dict(enable_gqa=True), BATCH_AND_HEADS | _all(("key", "value"), S(0), R), [S(0), S(1)],
        _all(("key", "value"), S(0), P),
    ),
    "key heads that do not divide": Call(
        _qkv(key_heads=2) | SHARED, dict(enable_gqa=True), _all(QKV, S(1)) | _all(SHARED, R), [R],
        _all((*QKV, *SHARED), R), mesh=(4,),
    ),
    "only the query is sharded": Call(
        _qkv() | SHARED, {}, dict(query=[S(0), S(1)]) | _all(("key", "value", *SHARED), R, R), [S(0), S(1)],
        _all(("key", "value"), S(0), S(1)) | _all(SHARED, P, P),
    ),
    "the length is sharded": Call(
        _qkv() | SHARED, {}, _all(QKV, S(0), S(2)) | _all(SHARED, R, R), [S(0), R],
        _all(QKV, S(0), R) | _all(SHARED, P, R),
    ),
    "packed": Call(
        _qkv(batch=1) | SHARED | dict(key_lengths=(2,)), {}, _all(QKV, R, S(1)) | _all(SHARED, R, R), [R, S(1)],
        _all(SHARED, R, P),
    ),
}  # fmt: skip


def _tensors(call: Call) -> dict[str, torch.Tensor]:
    """The same in every process."""
    generator = torch.Generator().manual_seed(1)
    made = {}
    for name, shape in call.tensors.items():
        if name == "key_mask":
            made[name] = torch.rand(shape, generator=generator) < 0.8
        elif name in ("key_lengths", "query_offset"):
            made[name] = torch.randint(0, 3, shape, generator=generator) + (1 if name == "key_lengths" else -1)
        else:
            made[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return made


def _attend(call: Call, tensors: dict[str, torch.Tensor], **others) -> tuple[torch.Tensor, torch.Tensor]:
    arguments: dict[str, Any] = tensors | call.settings | others
    if call is CALLS["packed"]:
        query, key, value = (arguments.pop(name)[0].transpose(0, 1) for name in QKV)
        ends = torch.tensor([0, 2, L], dtype=torch.int32)
        output, lse = relattn.relative_attention_varlen(query, key, value, cu_seqlens_q=ends, **arguments, return_lse=True)
        return output.transpose(0, 1)[None], lse[None]
    return relattn.relative_attention(**arguments, return_lse=True)


def _loss(output: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    weights = torch.arange(output.numel(), dtype=torch.float64).cos().view(output.shape)
    seen = torch.where(lse.isfinite(), lse, 0.0)
    return (output * weights).sum() + (seen * weights[..., 0]).sum()


def _one_process(call: Call) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    tensors = {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in _tensors(call).items()}
    output, lse = _attend(call, tensors, backend="reference")
    _loss(output, lse).backward()
    return output.detach(), lse.detach(), {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}


def _sharded(name: str, backend: str | None, compiled: bool = False):
    """Output, log-sum-exp and gradients as every rank sees the whole of them, with the placements they had."""
    call = CALLS[name]
    mesh = init_device_mesh("cpu", call.mesh)
    tensors = _tensors(call)
    for of, placements in call.placements.items():
        tensors[of] = distribute_tensor(tensors[of], mesh, placements).requires_grad_(tensors[of].is_floating_point())
    attend = torch.compile(_attend, backend="aot_eager", fullgraph=True) if compiled else _attend
    output, lse = attend(call, tensors, backend=backend)
    assert isinstance(output, DTensor)
    assert isinstance(lse, DTensor)
    _loss(output.full_tensor(), lse.full_tensor()).backward()
    gradients = {of: tensor.grad for of, tensor in tensors.items() if tensor.grad is not None}
    placed = {of: list(gradient.placements) for of, gradient in gradients.items()}
    whole = {of: gradient.full_tensor() for of, gradient in gradients.items()}
    return output.full_tensor().detach(), lse.full_tensor().detach(), whole, list(output.placements), placed


def _compare(call: Call, found, placements: bool = True) -> None:
    output, lse, gradients = _one_process(call)
    torch.testing.assert_close(found[0], output)
    torch.testing.assert_close(found[1], lse)
    assert found[2].keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[2][name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    if placements:
        assert found[3] == call.output
        assert found[4] == {name: call.gradients.get(name, call.placements[name]) for name in gradients}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_operators(processes, name, backend):
    for found in processes.run(_sharded, name, backend):
        _compare(CALLS[name], found, placements=backend is None)


@pytest.mark.parametrize("name", ["batch and heads"])
def test_compiled(processes, name):
    for found in processes.run(_sharded, name, None, True):
        _compare(CALLS[name], found)


def _refused(placed: dict[str, Any]) -> str:
    mesh = init_device_mesh("cpu", (RANKS,))
    query, table = torch.randn(1, 4, L, D), torch.randn(TABLE, D)
    query = distribute_tensor(query, mesh, [S(1)])
    if placed.get("mesh"):
        table = distribute_tensor(table, init_device_mesh("cpu", placed["mesh"]), [R, R])
    mask = torch.zeros(L, L, requires_grad=True) if placed.get("mask") else None
    table = table if placed.get("table", True) else None
    try:
        relattn.relative_attention(query, query, query, table, attn_mask=mask)
    except (TypeError, ValueError) as error:
        return str(error)
    return "taken"


@pytest.mark.parametrize(
    ("placed", "message"),
    [
        (dict(), r"rel_k: expected a DTensor as others are, got a Tensor \(5, 8\)"),
        (dict(table=False, mask=True), r"attn_mask: expected a DTensor as others are, got a Tensor \(6, 6\)"),
        (dict(mesh=(2, 2)), r"rel_k: expected the mesh of the others"),
    ],
)
def test_what_does_not_fit_is_named(processes, placed, message):
    for found in processes.run(_refused, placed):
        assert re.match(message, found), found


def _alike(mesh_shape: tuple[int, ...] | None) -> torch.Tensor:
    """Output and query gradient, under dropout, of batch elements and heads that are all alike."""
    torch.manual_seed(4)
    query = torch.randn(L, D, dtype=torch.float64).expand(4, 4, L, D).contiguous()
    if mesh_shape is not None:
        query = distribute_tensor(query, init_device_mesh("cpu", mesh_shape), [S(0), S(1)])
    query.requires_grad_()
    output = relattn.relative_attention(query, query, query, dropout_p=0.5)
    output.square().sum().backward()
    found = torch.stack((output.detach(), query.grad))
    return found.full_tensor() if isinstance(found, DTensor) else found


def test_dropout(processes):
    """Heads have their own masks, those of one process; batches of another rank have others."""
    expected = _alike(None)
    for found in processes.run(_alike, (2, 2)):
        torch.testing.assert_close(found[:, :2], expected[:, :2])
        masks = found.flatten(1, 2).unbind(1)
        for place, one in enumerate(masks):
            assert not any(torch.equal(one, other) for other in masks[:place])


# ---- the layer ----


class Layer(NamedTuple):
    """A layer and a call of it: the constructor's options, the call's arguments, shapes of its inputs."""

    options: Mapping[str, Any]
    call: Mapping[str, Any] = MappingProxyType(dict(need_weights=False))
    inputs: tuple[tuple[int, ...], ...] = ((2, L, 16),)
    layouts: Mapping[str, Any] = MappingProxyType({})


ALL_TERMS = ("rel_k", "rel_q", "rel_v", "rel_bias", "pos_bias")
LAYERS = {
    "shared tables": Layer(dict(terms=ALL_TERMS)),
    "tables of each head": Layer(dict(terms=ALL_TERMS, per_head=True, is_causal=True)),
    "weights, extra keys": Layer(dict(terms=ALL_TERMS, add_bias_kv=True, add_zero_attn=True), dict(need_weights=True)),
    "weights of each head": Layer({}, dict(need_weights=True, average_attn_weights=False)),
    "without bias": Layer(dict(bias=False)),
    "other keys": Layer(dict(kdim=8, vdim=12), dict(need_weights=False), ((2, L, 16), (2, 7, 8), (2, 7, 12))),
    "key and value alike": Layer({}, dict(need_weights=False), ((2, L, 16), (2, 7, 16))),
    "masks": Layer({}, dict(need_weights=False, attn_mask="each", key_padding_mask="lengths")),
    "masks that are added": Layer({}, dict(need_weights=False, attn_mask="added", key_padding_mask="added lengths")),
    "unbatched": Layer({}, dict(need_weights=False), ((L, 16),)),
    "length first": Layer(dict(batch_first=False), dict(need_weights=False), ((L, 2, 16),)),
    "packed": Layer({}, dict(cu_seqlens=torch.tensor([0, 2, L])), ((L, 16),)),
    "sharded length": Layer({}, dict(need_weights=False), ((2, 8, 16),), dict(input_layouts=S(1), output_layouts=S(1))),
    "reference": Layer(dict(backend="reference", window=(2, 2))),
}


def _layer(case: Layer) -> tuple[relattn.RelativeMultiheadAttention, list[torch.Tensor], dict[str, Any]]:
    """The layer, its inputs and its call, the same in every process."""
    torch.manual_seed(2)
    options = dict(batch_first=True) | case.options
    layer = relattn.RelativeMultiheadAttention(16, 4, dtype=torch.float64, max_relative_position=2, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in case.inputs]
    masks = {
        "each": torch.rand(8, L, L) < 0.2,
        "lengths": torch.arange(L) >= torch.tensor([[4], [L]]),
        "added": torch.randn(8, L, L, dtype=torch.float64, requires_grad=True),
        "added lengths": torch.randn(2, L, dtype=torch.float64, requires_grad=True),
    }
    call = {name: masks[given] if isinstance(given, str) else given for name, given in case.call.items()}
    return layer, inputs, call


def _train(layer, inputs, call, mesh=None, shard: int | None = None) -> dict[str, Any]:
    """Results and all gradients; where `shard` is a dimension the inputs and output are this rank's parts of it."""
    here = inputs if shard is None else [given.chunk(RANKS, shard)[mesh.get_local_rank()] for given in inputs]
    output, weights = layer(*here, **call)
    if shard is not None:
        output = DTensor.from_local(output, mesh, [S(shard)], run_check=False).full_tensor()
    loss = _loss(output, output[..., 0] * 0.0)
    if weights is not None:
        loss = loss + _loss(weights, weights[..., 0] * 0.0)
    loss.backward()
    if shard is not None:
        for given in inputs:
            torch.distributed.all_reduce(given.grad)
    found = {"output": output.detach(), "weights": None if weights is None else weights.detach()}
    found |= {f"input {place}": given.grad for place, given in enumerate(inputs)}
    found |= {name: given.grad for name, given in call.items() if isinstance(given, torch.Tensor) and given.requires_grad}
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    if layer.in_proj_weight is not None:
        parts = gradients.pop("in_proj_weight").chunk(3)
        gradients |= dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), parts, strict=True))
    return found | gradients


def _parallel(name: str) -> dict[str, Any]:
    layer, inputs, call = _layer(LAYERS[name])
    mesh = init_device_mesh("cpu", (RANKS,))
    plan = tensor_parallel_plan(layer, **LAYERS[name].layouts)
    parallelize_module(layer, mesh, plan)
    for parameter in layer.parameters():
        assert isinstance(parameter, DTensor)
    shard = 1 if "input_layouts" in LAYERS[name].layouts else None
    found = _train(layer, inputs, call, mesh, shard)
    sharded = {of for of, parameter in layer.named_parameters() if parameter.placements[0].is_shard()}
    for of, tensor in found.items():
        if isinstance(tensor, DTensor):
            assert tensor.placements == layer.get_parameter(of).placements, of
            found[of] = tensor.full_tensor()
    return found | {"sharded": sharded}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(processes, name):
    expected = _train(*_layer(LAYERS[name]))
    for found in processes.run(_parallel, name):
        sharded = found.pop("sharded")
        assert found.keys() == expected.keys()
        for of, tensor in expected.items():
            torch.testing.assert_close(found[of], tensor, msg=lambda text, of=of: f"{of}: {text}")
        whole = {"in_proj_bias", "out_proj.bias"}
        if not LAYERS[name].options.get("per_head"):
            whole |= {"rel_k", "rel_q", "rel_v", "rel_bias"}
        assert sharded == {of for of in expected if "input" not in of} - whole - {"output", "weights", "attn_mask", "key_padding_mask"}


def _decode() -> tuple[torch.Tensor, torch.Tensor]:
    layer, (inputs,), _ = _layer(Layer(dict(is_causal=True)))
    parallelize_module(layer, init_device_mesh("cpu", (RANKS,)), tensor_parallel_plan(layer))
    cache = relattn.KeyValueCache()
    with torch.no_grad():
        whole = layer(inputs, need_weights=False)[0]
        steps = [layer(step, need_weights=False, cache=cache)[0] for step in inputs.split(1, dim=1)]
    assert cache.key.shape == (2, 1, L, 4)
    return whole, torch.cat(steps, dim=1)


def test_layer_decodes(processes):
    for whole, steps in processes.run(_decode):
        torch.testing.assert_close(steps, whole)


def _compiled_layer() -> tuple[dict[str, Any], dict[str, Any]]:
    found = []
    for compiled in (False, True):
        layer, inputs, call = _layer(DROPS)
        parallelize_module(layer, init_device_mesh("cpu", (RANKS,)), tensor_parallel_plan(layer))
        if compiled:
            layer.compile(backend="aot_eager", fullgraph=True)
        found.append({name: getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)() if tensor is not None else None
                      for name, tensor in _train(layer, inputs, call).items()})  # fmt: skip
    return found[0], found[1]


def test_layer_compiled(processes):
    for eager, compiled in processes.run(_compiled_layer):
        torch.testing.assert_close(compiled, eager)


DROPS = Layer(dict(terms=ALL_TERMS, per_head=True, dropout=0.5))


def _dropout() -> tuple[dict[str, Any], torch.Tensor]:
    layer, inputs, call = _layer(DROPS)
    parallelize_module(layer, init_device_mesh("cpu", (RANKS,)), tensor_parallel_plan(layer))
    found = _train(layer, inputs, call)
    return {name: found[name] for name in ("output", "input 0")}, torch.get_rng_state()


def test_dropout_is_that_of_one_device(processes):
    layer, inputs, call = _layer(DROPS)
    expected = _train(layer, inputs, call)
    for found, generator in processes.run(_dropout):
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name])
        assert torch.equal(generator, torch.get_rng_state())


def _without_plan() -> dict[str, Any]:
    """A layer that is whole on every rank, and a batch that is sharded: what DTensor makes of it."""
    layer, (inputs,), _ = _layer(Layer(dict(terms=ALL_TERMS), inputs=((RANKS, L, 16),)))
    mesh = init_device_mesh("cpu", (RANKS,))
    distribute_module(layer, mesh)
    batch = distribute_tensor(inputs, mesh, [S(0)])
    output, _ = layer(batch, need_weights=False)
    _loss(output.full_tensor(), output.full_tensor()[..., 0] * 0.0).backward()
    return {name: parameter.grad.full_tensor() for name, parameter in layer.named_parameters()}


def test_sharded_batch_of_a_whole_layer(processes):
    layer, inputs, call = _layer(Layer(dict(terms=ALL_TERMS), inputs=((RANKS, L, 16),)))
    _train(layer, inputs, call)
    for found in processes.run(_without_plan):
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, msg=lambda text, name=name: f"{name}: {text}")


def _batch_and_heads() -> dict[str, Any]:
    """FSDP2 over the batch, the plan over the heads."""
    layer, (inputs,), _ = _layer(Layer(dict(terms=ALL_TERMS), inputs=((RANKS, L, 16),)))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(layer, mesh["tp"], tensor_parallel_plan(layer))
    fully_shard(layer, mesh=mesh["dp"])
    part = inputs.chunk(2)[mesh["dp"].get_local_rank()]
    layer(part, need_weights=False)[0].square().sum().backward()
    return {name: parameter.grad.full_tensor() * 2 for name, parameter in layer.named_parameters()}  # FSDP averages


def test_heads_and_fsdp(processes):
    layer, (inputs,), _ = _layer(Layer(dict(terms=ALL_TERMS), inputs=((RANKS, L, 16),)))
    layer(inputs, need_weights=False)[0].square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    parts = gradients.pop("in_proj_weight").chunk(3)
    gradients |= dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), parts, strict=True))
    for found in processes.run(_batch_and_heads):
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def _refused_layers() -> list[str]:
    mesh = init_device_mesh("cpu", (RANKS,))

    def layer(heads):
        return relattn.RelativeMultiheadAttention(24, heads, max_relative_position=2)

    parallel = parallelize_module(layer(4), mesh, HeadsParallel())
    messages = []
    for module, on in ((layer(6), mesh), (parallel, mesh), (torch.nn.Linear(2, 2), mesh), (layer(4), init_device_mesh("cpu", (2, 2)))):
        try:
            parallelize_module(module, on, HeadsParallel())
        except (TypeError, ValueError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def test_layers_that_do_not_fit_are_named(processes):
    for found in processes.run(_refused_layers):
        assert found == [
            "ValueError: num_heads: expected a multiple of the mesh's 4 devices, got 6",
            "ValueError: module: expected a layer that is not parallel already",
            "TypeError: module: expected a RelativeMultiheadAttention, got Linear",
            'ValueError: device_mesh: expected one dimension (of a larger mesh: mesh["tp"]), got 2',
        ]


def test_plan():
    model = torch.nn.ModuleDict({"a": relattn.RelativeMultiheadAttention(8, 2, max_relative_position=1), "b": torch.nn.Linear(2, 2)})
    plan = tensor_parallel_plan(model, output_layouts=S(1))
    assert str(plan) == "{'a': HeadsParallel(input_layouts=R, output_layouts=S(1), use_local_output=True)}"
    assert list(tensor_parallel_plan(model["a"])) == [""]
    with pytest.raises(ValueError, match="module: expected one with a RelativeMultiheadAttention in it, got Linear without"):
        tensor_parallel_plan(model["b"])


_REGISTERED = """
import sys, warnings
import torch
{before}
import relattn
assert "torch.distributed.tensor" not in sys.modules
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch.distributed.tensor
print([str(warning.message) for warning in caught if "relattn" in str(warning.message)], "relattn.dtensor" in sys.modules)
"""


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("", r"\[\] True"),
        (
            "del torch.library.register_torch_dispatch",
            r"\[.relattn: this torch \(.*\) cannot register operators with DTensor: .*register_torch_dispatch.*\] False",
        ),
    ],
)
def test_registered_when_dtensor_is_imported(before, expected):
    """Not before, and a torch without what that takes says so and goes on."""
    run = subprocess.run([sys.executable, "-c", _REGISTERED.format(before=before)], capture_output=True, text=True, check=True)
    assert re.fullmatch(expected, run.stdout.strip()), run.stdout
