"""Sharding by batch and heads: the operators on DTensors, and the layer's plan; against one process in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

import relattn
from tests.distributed.workers import Workers

pytest.importorskip("torch.distributed.tensor")
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

RANKS = 4
S, R, P = Shard, Replicate(), Partial()


@pytest.fixture(scope="module")
def workers():
    with Workers(RANKS) as started:
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


PER_HEAD = dict(
    rel_k=(4, TABLE, D), rel_q=(4, TABLE, D), rel_v=(4, TABLE, D), rel_bias=(4, TABLE), pos_bias_u=(4, D), pos_bias_v=(4, D)
)  # fmt: skip
SHARED = dict(rel_k=(TABLE, D), rel_q=(TABLE, D), rel_v=(TABLE, D), rel_bias=(TABLE,))
BATCH_AND_HEADS = dict.fromkeys(QKV, [S(0), S(1)])
CALLS = {
    "batch and heads": Call(
        _qkv() | PER_HEAD | dict(attn_mask=(4, 4, L, L), key_mask=(4, L), key_lengths=(4,), query_offset=(4,)),
        dict(is_causal=True),
        BATCH_AND_HEADS | dict.fromkeys(PER_HEAD, [R, S(0)]) | dict(attn_mask=[S(0), S(1)])
        | dict.fromkeys(("key_mask", "key_lengths", "query_offset"), [S(0), R]),
        [S(0), S(1)],
        dict.fromkeys(PER_HEAD, [P, S(0)]),
    ),
    "shared tables and a mask for all": Call(
        _qkv() | SHARED | dict(attn_mask=(L, L)),
        dict(window=(3, 2)),
        BATCH_AND_HEADS | dict.fromkeys((*SHARED, "attn_mask"), [R, R]),
        [S(0), S(1)],
        dict.fromkeys((*SHARED, "attn_mask"), [P, P]),
    ),
    "a mask of a head, plain lengths": Call(
        _qkv() | PER_HEAD | dict(attn_mask=(4, 1, L), key_lengths=(4,), key_mask=(4, L)),
        {},
        BATCH_AND_HEADS | dict.fromkeys(PER_HEAD, [R, R]) | dict(attn_mask=[R, S(0)]),
        [S(0), S(1)],
        dict.fromkeys(PER_HEAD, [P, S(0)]) | dict(attn_mask=[P, S(0)]),
    ),
    "heads over the whole mesh": Call(
        _qkv(batch=1) | PER_HEAD,
        dict(chunk=(2, 1)),
        dict.fromkeys(QKV, [S(1), S(1)]) | dict.fromkeys(PER_HEAD, [S(0), S(0)]),
        [S(1), S(1)],
        {},
    ),
    "a batch that does not divide": Call(
        _qkv(batch=5) | SHARED, {}, dict.fromkeys(QKV, [S(0)]) | dict.fromkeys(SHARED, [R]), [S(0)], dict.fromkeys(SHARED, [P]), mesh=(4,)
    ),
    "grouped queries": Call(
        _qkv(key_heads=2) | SHARED, dict(enable_gqa=True), BATCH_AND_HEADS | dict.fromkeys(SHARED, [R, R]), [S(0), S(1)],
        dict.fromkeys(SHARED, [P, P]),
    ),
    "one key head": Call(
        _qkv(key_heads=1), dict(enable_gqa=True), BATCH_AND_HEADS | dict.fromkeys(("key", "value"), [S(0), R]), [S(0), S(1)],
        dict.fromkeys(("key", "value"), [S(0), P]),
    ),
    "key heads that do not divide": Call(
        _qkv(key_heads=2) | SHARED, dict(enable_gqa=True), dict.fromkeys(QKV, [S(1)]) | dict.fromkeys(SHARED, [R]), [R],
        dict.fromkeys((*QKV, *SHARED), [R]), mesh=(4,),
    ),
    "only the query is sharded": Call(
        _qkv() | SHARED, {}, dict(query=[S(0), S(1)]) | dict.fromkeys(("key", "value", *SHARED), [R, R]), [S(0), S(1)],
        dict.fromkeys(("key", "value"), [S(0), S(1)]) | dict.fromkeys(SHARED, [P, P]),
    ),
    "the length is sharded": Call(
        _qkv() | SHARED, {}, dict.fromkeys(QKV, [S(0), S(2)]) | dict.fromkeys(SHARED, [R, R]), [S(0), R],
        dict.fromkeys(QKV, [S(0), R]) | dict.fromkeys(SHARED, [P, R]),
    ),
    "packed": Call(
        _qkv(batch=1) | SHARED | dict(key_lengths=(2,)), {}, dict.fromkeys(QKV, [R, S(1)]) | dict.fromkeys(SHARED, [R, R]), [R, S(1)],
        dict.fromkeys(SHARED, [R, P]),
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
def test_operators(workers, name, backend):
    for found in workers.run(_sharded, name, backend):
        _compare(CALLS[name], found, placements=backend is None)
