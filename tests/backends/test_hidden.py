"""What a query may not see makes no difference, bit for bit, whatever it holds; nor does a query whose output nobody asked for.

And what it does see shows: nothing that is not finite may vanish on the way. (tests/hidden.py has the random calls.)
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import relattn
from relattn.backends import blocked
from tests.fuzz import check, failed_once, random_call
from tests.hidden import check_hidden, hidden_call
from tests.oracles import USABLE, device_of, everything, takes_float64

BACKENDS = [name for name in USABLE if name != "triton"]  # test_triton.py has its turn, test_cpu.py that of every instruction set
every_backend = pytest.mark.parametrize("backend", BACKENDS)
JUNK = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "largest": torch.finfo(torch.float32).max}
junk = pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
lengths = pytest.mark.parametrize("length", [12, 150])  # of one block, and of more
SEEDS = {torch.float32: range(24), torch.bfloat16: range(20, 34), torch.float64: range(30, 40)}


def check_calls(backend: str, dtype: torch.dtype) -> None:
    for seed in SEEDS[dtype]:
        check_hidden(hidden_call(seed, backend), backend, dtype)


def check_calls_that_failed_once(backend: str) -> None:
    for seed, dtype in failed_once(f"hidden:{backend}"):
        check_hidden(hidden_call(seed, backend), backend, dtype)


@pytest.mark.parametrize("dtype", SEEDS, ids=str)
@every_backend
def test_random_calls(backend: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and not takes_float64(backend):
        pytest.skip(f"{backend} has no float64")
    check_calls(backend, dtype)


@every_backend
def test_calls_that_failed_once(backend: str) -> None:
    check_calls_that_failed_once(backend)


@pytest.mark.parametrize("dtype", SEEDS, ids=str)
def test_careful_passes_alone(dtype: torch.dtype, monkeypatch) -> None:
    """As `blocked` works on devices other than CPUs: right for finite input too."""
    monkeypatch.setattr(blocked, "_carefully", lambda compute, device: compute(True))
    for seed in SEEDS[dtype][::4]:
        check_hidden(hidden_call(seed, "blocked"), "blocked", dtype)
        check(random_call(seed), "blocked", dtype)


def test_random_calls_are_of_every_kind() -> None:
    calls = [hidden_call(seed, "blocked") for seed in SEEDS[torch.float32]]
    names = {name for call in calls for name in call.tensors}
    names |= {name for call in calls for name, value in call.arguments.items() if isinstance(value, Tensor) or value}
    assert names >= {"rel_k", "rel_q", "rel_v", "rel_bias", "pos_bias_u", "pos_bias_v", "attn_mask"}
    assert names >= {"is_causal", "window", "key_mask", "key_lengths", "dropout_p", "enable_gqa", "query_offset"}
    assert any("attn_mask" in call.tensors for call in calls)  # floating
    assert any("attn_mask" in call.arguments for call in calls)


# One way of hiding at a time: what is given, and which keys of sequence 0 hold junk (the other sequence's hold none).


def _key_mask_at_the_end(length: int):
    key = torch.arange(length)
    return dict(key_mask=torch.stack((key < length - 3, key < length))), key >= length - 3


def _key_mask_with_holes(length: int):
    key = torch.arange(length)
    return dict(key_mask=torch.stack((key % 4 != 2, key >= 0))), key % 4 == 2


def _key_lengths(length: int):
    return dict(key_lengths=torch.tensor([length - 5, length])), torch.arange(length) >= length - 5


def _bool_mask(length: int):
    key = torch.arange(length)
    return dict(attn_mask=(key % 3 != 1).expand(length, length)), key % 3 == 1


def _float_mask(length: int):
    hidden = torch.arange(length) % 3 == 1
    return dict(attn_mask=torch.zeros(length, length).masked_fill(hidden, torch.finfo(torch.float32).min)), hidden


def _causal(length: int):
    """The last keys are seen by the last queries, which are ignored then."""
    return dict(is_causal=True), torch.arange(length) >= length - 2


def _window(length: int):
    """The first keys are seen by the first queries, which are ignored then."""
    return dict(window=(2, 1)), torch.arange(length) < 2


HIDING = (_key_mask_at_the_end, _key_mask_with_holes, _key_lengths, _bool_mask, _float_mask, _causal, _window)


def _run(backend: str, tensors: dict[str, Tensor], slope: Tensor, **arguments) -> dict[str, Tensor]:
    """Output, log-sum-exp and gradients."""
    device = device_of(backend)
    given = {name: tensor.detach().clone().to(device).requires_grad_() for name, tensor in tensors.items()}
    others = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    output, lse = relattn.relative_attention(**given, **others, return_lse=True, backend=backend)
    gradients = torch.autograd.grad(output, list(given.values()), slope.to(device))
    results = {"output": output.detach(), "lse": lse.detach()} | dict(zip(given, gradients, strict=True))
    return {name: result.cpu() for name, result in results.items()}


@junk
@lengths
@pytest.mark.parametrize("hiding", HIDING, ids=lambda hiding: hiding.__name__[1:])
@every_backend
def test_what_is_hidden_may_hold_anything(backend: str, hiding, length: int, junk: float) -> None:
    arguments, filled = hiding(length)
    tensors = everything(2, 2, length, length, 16, 16, 4, dtype=torch.float32)
    distance = torch.arange(length) - torch.arange(length)[:, None]
    sees = torch.zeros(length, dtype=torch.bool)  # which queries see something that is filled
    if hiding is _causal:
        sees = (filled & (distance <= 0)).any(-1)
    elif hiding is _window:
        sees = (filled & (distance >= -2) & (distance <= 1)).any(-1)
    slope = torch.randn(2, 2, length, 16)
    slope[0, :, sees] = 0.0
    results = []
    for number in (0.0, junk):
        for name in ("key", "value"):
            tensors[name][0, :, filled] = number
        results.append(_run(backend, tensors, slope, **arguments))
    clean, found = results
    for result in results:
        for name in ("output", "lse"):
            result[name][0, :, sees] = 0.0
    for name, expected in clean.items():
        assert expected.isfinite().all(), name
        assert torch.equal(found[name], expected), name
    for name in ("key", "value"):
        if not sees.any():
            assert not found[name][0, :, filled].any(), name
    assert not found["query"][0, :, sees].any()


@lengths
@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
@every_backend
def test_what_is_seen_shows(backend: str, number: float, name: str, length: int) -> None:
    """In the output and the gradient of the one query that sees it, and of none other."""
    tensors = {part: torch.randn(1, 2, length, 16) for part in ("query", "key", "value")}
    tensors["query"].abs_()  # so that a key of +inf has the score +inf, and not -inf, which hides it
    tensors[name][0, :, -1, 3] = number
    found = _run(backend, tensors, torch.ones(1, 2, length, 16), is_causal=True)
    for result in ("output", "query"):
        finite = found[result].isfinite().all(-1)
        assert finite[..., :-1].all(), result
        assert not finite[..., -1].any(), result
    assert not any(found[result].isfinite().all() for result in ("key", "value" if name == "key" else "query"))


@lengths
@every_backend
def test_a_gradient_that_is_not_finite_shows(backend: str, length: int) -> None:
    tensors = {part: torch.randn(1, 2, length, 16) for part in ("query", "key", "value")}
    slope = torch.ones(1, 2, length, 16)
    slope[0, :, 4, 3] = math.nan
    found = _run(backend, tensors, slope, is_causal=True)
    for name in ("query", "key", "value"):
        finite = found[name].isfinite().all(-1)
        reached = torch.arange(length) == 4 if name == "query" else torch.arange(length) <= 4
        assert torch.equal(finite, ~reached.expand(1, 2, -1)), name


@junk
@lengths
@pytest.mark.parametrize("hides", [True, False])
@every_backend
def test_padded_queries_may_hold_anything(backend: str, hides: bool, length: int, junk: float) -> None:
    """Their output is ignored, so that they owe nothing to any gradient."""
    tensors = everything(2, 2, length, length, 16, 16, 4, dtype=torch.float32)
    padding = torch.arange(length) >= length - 3
    slope = torch.randn(2, 2, length, 16)
    slope[0, :, padding] = 0.0
    arguments = dict(key_mask=torch.stack((~padding, padding | ~padding))) if hides else {}
    results = []
    for number in (0.0, junk):
        tensors["query"][0, :, padding] = number
        results.append(_run(backend, tensors, slope, **arguments))
    clean, found = results
    for name, expected in clean.items():
        if name in ("output", "lse"):
            expected, found[name] = (result.clone() for result in (expected, found[name]))
            expected[0, :, padding] = found[name][0, :, padding] = 0.0
        assert torch.equal(found[name], expected), name
    assert not found["query"][0, :, padding].any()


@junk
@lengths
@every_backend
def test_queries_that_see_nothing(backend: str, length: int, junk: float) -> None:
    """Whatever they hold, and whatever gradient comes back to them."""
    tensors = everything(2, 2, length, length, 16, 16, 4, dtype=torch.float32)
    slope = torch.randn(2, 2, length, 16)
    results = []
    for number in (0.0, junk):
        tensors["query"][0, :, :3] = slope[0, :, :3] = number
        results.append(_run(backend, tensors, slope, is_causal=True, query_offset=-3))
    clean, found = results
    for name, expected in clean.items():
        assert torch.equal(found[name], expected), name
    assert not found["output"][:, :, :3].any()
    assert not found["query"][:, :, :3].any()
