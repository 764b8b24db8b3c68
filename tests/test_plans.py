"""Calls that share a plan: the same results as those that make one, and no check is lost between them."""

from __future__ import annotations

import functools
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import relattn
from relattn import plans, relative_attention
from tests.fuzz import WITHOUT_MASK_GRADIENT, random_call
from tests.oracles import USABLE

BACKENDS = [name for name in USABLE if name not in ("reference", "triton")]


def inputs(length: int = 9, **options) -> list[Tensor]:
    return [torch.randn(2, 3, length, 8, **options) for _ in range(3)] + [torch.randn(2 * length - 1, 8, **options)]


def results(tensors: dict[str, Tensor], arguments: dict, backend: str | None) -> list[Tensor]:
    torch.manual_seed(1)
    given = tensors | arguments
    output, lse = relative_attention(**given, return_lse=True, backend=backend)
    generator = torch.Generator().manual_seed(2)
    slopes = [torch.randn(result.shape, generator=generator).to(result.dtype) for result in (output, lse)]
    wanted = [tensor for tensor in tensors.values() if tensor.requires_grad]
    return [output, lse, *torch.autograd.grad((output, lse), wanted, slopes, materialize_grads=True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(12))
def test_a_second_call_gives_what_the_first_did(backend: str, seed: int) -> None:
    """Also on other tensors of the same signature, whose results are those of a call without a plan."""
    call = random_call(seed)
    dtype = (torch.float32, torch.bfloat16)[seed % 2]
    first, other = call.cast(dtype), call.cast(dtype)
    for tensors, _ in (first, other):
        if "attn_mask" in tensors and backend in WITHOUT_MASK_GRADIENT:
            tensors["attn_mask"].requires_grad_(False)
    with torch.no_grad():
        for tensor in other[0].values():
            tensor.mul_(0.5)
    expected = [results(*first, backend)]
    plans.forget()
    expected.append(results(*other, backend))
    again = [results(*first, backend), results(*other, backend)]
    assert len(plans._PLANS) == 1
    for found, wanted in zip(again, expected, strict=True):
        for one, two in zip(found, wanted, strict=True):
            assert torch.equal(one.nan_to_num(), two.nan_to_num())


@pytest.mark.parametrize(
    ("valid", "invalid", "error"),
    [
        ({"is_causal": True}, {"is_causal": 1}, TypeError),
        ({"dropout_p": 0.0}, {"dropout_p": False}, TypeError),
        ({"scale": 1}, {"scale": True}, TypeError),
        ({"window": (1, 0)}, {"window": (True, 0)}, (TypeError, ValueError)),
        ({"window": (1, 2)}, {"window": [1, 2.0]}, (TypeError, ValueError)),
        ({"max_relative_position": 8}, {"max_relative_position": True}, (TypeError, ValueError)),
        ({"query_offset": 1}, {"query_offset": True}, (TypeError, ValueError)),
        ({"enable_gqa": True}, {"rel_q": torch.zeros(16, 8)}, ValueError),
        ({"backend": "blocked"}, {"backend": "triton" if "triton" not in USABLE else "nobody"}, ValueError),
        ({"key_mask": torch.ones(2, 9, dtype=torch.bool)}, {"key_mask": torch.ones(2, 9, dtype=torch.uint8)}, TypeError),
        ({"key_lengths": torch.tensor([3, 4])}, {"key_lengths": torch.tensor([3.0, 4.0])}, TypeError),
    ],
)
def test_what_is_wrong_stays_an_error(valid: dict, invalid: dict, error: type[Exception]) -> None:
    """Although Python takes True for 1 in a key."""
    tensors = inputs()
    relative_attention(*tensors, **valid)
    with pytest.raises(error):
        relative_attention(*tensors, **invalid)


def test_settings_have_plans_of_their_own() -> None:
    """Also pairs of them whose numbers, one after the other, are the same."""
    query, key, value, _ = inputs()
    tables = dict(rel_k=torch.randn(5, 8))
    for arguments in (
        dict(max_relative_position=(3, 1), window=(2, 2)), dict(max_relative_position=(1, 3), window=(2, 2)),
        dict(max_relative_position=2, window=(2, 1)), dict(max_relative_position=(2, 2), window=(1, 2)), dict(window=(2, 1)),
        dict(window=(2, None)), dict(window=(None, 2)), dict(query_offset=2), dict(query_offset=torch.tensor([0, 2])), dict(scale=0.5),
        dict(dropout_p=0.5),
    ):  # fmt: skip
        for _ in range(2):
            torch.manual_seed(0)
            found = relative_attention(query, key, value, **tables, **arguments)
            torch.manual_seed(0)
            expected = relative_attention(query, key, value, **tables, **arguments, backend="reference")
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def test_decoding_takes_one_plan() -> None:
    """The number of keys, how they lie, and the offset are no part of a signature; and the gradients are right."""
    rel_k = torch.randn(41, 8, requires_grad=True)
    cache = torch.randn(2, 3, 64, 8)
    for length in range(1, 40):
        query = torch.randn(2, 3, 1, 8, requires_grad=True)
        keys = cache[:, :, :length] if length % 2 else torch.randn(2, length, 3, 8).transpose(1, 2)
        keys = keys.detach().requires_grad_()
        mask = torch.rand(2, length + 1)[:, 1:] > 0.3 if length % 3 else torch.rand(length, 2).T > 0.3
        arguments = dict(max_relative_position=20, is_causal=True, query_offset=length - 1, key_mask=mask)
        wanted = (query, keys, rel_k)
        found, expected = (
            torch.autograd.grad(relative_attention(query, keys, keys * 2, rel_k, **arguments, backend=backend).square().sum(), wanted)
            for backend in (None, "reference")
        )
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, atol=2e-5, rtol=2e-5)
    assert len(plans._PLANS) == 1


@pytest.mark.parametrize(
    ("valid", "invalid"),
    [
        ({"key_mask": torch.ones(2, 9, dtype=torch.bool)}, {"key_mask": torch.ones(2, 8, dtype=torch.bool)}),
        ({"attn_mask": torch.ones(9, 9, dtype=torch.bool)}, {"attn_mask": torch.ones(9, 8, dtype=torch.bool)}),
        ({"query_offset": 3}, {"query_offset": 2**62 + 1}),
        ({}, {"value": torch.zeros(2, 3, 8, 8)}),
        ({"is_causal": True}, {"is_causal": True, "key": torch.zeros(2, 3, 12, 8), "value": torch.zeros(2, 3, 12, 8)}),
        ({}, {"key": torch.zeros(2, 3, 12, 7), "value": torch.zeros(2, 3, 12, 8)}),
    ],
)
def test_numbers_of_keys_are_checked(valid: dict, invalid: dict) -> None:
    query, key, value, rel_k = inputs()
    tensors = dict(query=query, key=key, value=value, rel_k=rel_k)
    relative_attention(**(tensors | valid))
    with pytest.raises(ValueError):
        relative_attention(**(tensors | invalid))


def test_no_tensor_is_kept() -> None:
    tensors = inputs(requires_grad=True)
    relative_attention(*tensors).sum().backward()
    kept = [weakref.ref(tensor.untyped_storage()) for tensor in tensors]
    del tensors
    gc.collect()
    assert plans._PLANS
    assert not any(reference() for reference in kept)


def test_the_oldest_plan_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_MOST", 3)
    for length in range(1, 8):
        relative_attention(*inputs(length))
    assert [signature[2][2] for signature in plans._PLANS] == [5, 6, 7]


def test_saved_tensors_that_come_back_otherwise() -> None:
    """A hook may pack what is saved for the backward pass, and unpack it with other strides."""
    tensors = [tensor.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for tensor in inputs()[:3]]
    expected = torch.autograd.grad(relative_attention(*tensors).square().sum(), tensors)
    pack = functools.partial(torch.clone, memory_format=torch.contiguous_format)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        output = relative_attention(*tensors)
    found = torch.autograd.grad(output.square().sum(), tensors)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two)


def test_who_listens_is_heard() -> None:
    """A plan passes by torch's dispatcher: not where something there would have a say."""
    tensors = inputs()
    expected = relative_attention(*tensors)
    with pytest.raises(RuntimeError, match="reference"), forward_ad.dual_level():
        relative_attention(forward_ad.make_dual(tensors[0], torch.ones_like(tensors[0])), *tensors[1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_attention(*tensors).dtype == torch.bfloat16
    negated = torch._neg_view(tensors[0])
    torch.testing.assert_close(relative_attention(negated, *tensors[1:]), relative_attention(-tensors[0], *tensors[1:]))
    mapped = torch.func.vmap(lambda query: relative_attention(query, *tensors[1:]))(tensors[0][None])
    torch.testing.assert_close(mapped[0], expected)


def test_gradients_in_every_way() -> None:
    """Only the log-sum-exp's; none for some inputs; second derivatives are refused."""
    tensors = inputs(requires_grad=True)
    tensors[1].requires_grad_(False)
    for _ in range(2):
        output, lse = relative_attention(*tensors, return_lse=True)
        reference = relative_attention(*tensors, return_lse=True, backend="reference")
        wanted = (tensors[0], tensors[3])
        for mine, other in zip((output, lse), reference, strict=True):
            found = torch.autograd.grad(mine.sum(), wanted, retain_graph=True)
            for one, two in zip(found, torch.autograd.grad(other.sum(), wanted, retain_graph=True), strict=True):
                torch.testing.assert_close(one, two, atol=2e-5, rtol=2e-5)
    gradient = torch.autograd.grad(output.square().sum(), tensors[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()


def test_memory_that_is_gone() -> None:
    tensors = inputs()
    relative_attention(*tensors)
    tensors[1].untyped_storage().resize_(0)
    if "cpu" in BACKENDS:
        with pytest.raises(ValueError, match="has none"):
            relative_attention(*tensors)


def test_explain_makes_no_plan() -> None:
    relattn.explain(*inputs())
    assert not plans._PLANS


def test_threads_make_plans_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than are kept, so that they also drop each other's."""
    monkeypatch.setattr(plans, "_MOST", 5)
    calls = [inputs(length) for length in range(1, 30)]
    expected = [relative_attention(*tensors) for tensors in calls]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda index: relative_attention(*calls[index % len(calls)]), range(600)))
    assert all(torch.equal(result, expected[index % len(calls)]) for index, result in enumerate(found))
