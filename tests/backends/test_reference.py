"""The reference backend, on which every other one is tested, against oracles that share nothing with it.

The definition in loops, torch's own attention, differences for gradients.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from torch.autograd import gradcheck, gradgradcheck

from relattn import relative_attention
from tests import draws
from tests.oracles import (
    FLOATS,
    attend,
    calls,
    close,
    definition,
    every_backend,
    everything,
    inputs,
    precision,
    random,
)


@settings(max_examples=300)
@draws.given
def test_equals_the_definition_in_loops(draw) -> None:
    call = calls(draw)
    output, lse = relative_attention(**call, return_lse=True, backend="reference")
    expected, expected_lse = definition(**call)
    close(output, expected, 1e-12)
    close(lse, expected_lse, 1e-12)


@pytest.mark.parametrize("term", ["rel_k", "rel_q", "rel_v", "rel_bias", "pos_bias_u", "pos_bias_v"])
def test_every_term_reaches_the_definition(term: str) -> None:
    """Guards the oracle: without a term the definition in loops gives another result, so the comparison above can see
    it.
    """
    call = everything()
    whole, without = (
        definition(**call)[0],
        definition(**{name: value for name, value in call.items() if name != term})[0],
    )
    assert (whole - without).abs().max() > 0.01
    close(relative_attention(**call, backend="reference"), whole, 1e-12)


def test_by_hand() -> None:
    """One query, two keys, numbers small enough for paper: d = -1, 0 at offset 1; scores 0.5 * (2 * 1 + 2 * 3) + 0.25
    and 0.5 * 2 * 2.
    """
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    key, value = (
        torch.tensor([1.0, 2.0]).double().view(1, 1, 2, 1),
        torch.tensor([10.0, 20.0]).double().view(1, 1, 2, 1),
    )
    output, lse = relative_attention(
        2 * one, key, value, torch.tensor([[3.0], [0.0]]).double(), rel_bias=torch.tensor([0.25, 0.0]).double(),
        max_relative_position=(1, 0), query_offset=1, scale=0.5, return_lse=True, backend="reference",
    )  # fmt: skip
    first, second = math.exp(4.25), math.exp(2.0)
    assert output.item() == pytest.approx((10 * first + 20 * second) / (first + second), abs=1e-13)
    assert lse.item() == pytest.approx(math.log(first + second), abs=1e-13)


# torch's attention. 5 x 9 and 9 x 5: either length the longer one; 4 heads of 2 key heads.


@every_backend
@pytest.mark.parametrize("lengths", [(7, 7), (5, 9), (9, 5)], ids=str)
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_without_relative_terms_it_is_sdpa(backend: str, lengths, mask: str, key_heads: int) -> None:
    query, key, value = inputs(2, 4, *lengths, 6, key_heads)
    options = {}
    if mask == "causal":
        options = dict(is_causal=True)
    elif mask == "bool":
        options = dict(attn_mask=(random(2, 1, *lengths) > 0) | torch.eye(*lengths, dtype=torch.bool).cumsum(-1).bool())
        options["attn_mask"][..., 0] = True  # SDPA gives NaN or 0 by version where nothing is seen
    elif mask == "float":
        options = dict(attn_mask=random(4, *lengths, seed=5))
    expected = F.scaled_dot_product_attention(query, key, value, scale=0.3, enable_gqa=True, **options)
    if mask == "causal":
        options["query_offset"] = 0  # SDPA's is_causal aligns the first query with the first key
    close(
        attend(backend, query=query, key=key, value=value, scale=0.3, enable_gqa=True, **options),
        expected,
        precision(backend),
    )


@every_backend
def test_the_default_scale_is_sdpas(backend: str) -> None:
    query, key, value = inputs(1, 2, 4, 4, 5)  # 5: no power of two, so that 1 / sqrt(D) is told from 1 / D and 1
    close(
        attend(backend, query=query, key=key, value=value),
        F.scaled_dot_product_attention(query, key, value),
        precision(backend),
    )


@every_backend
@pytest.mark.parametrize("lengths", [(6, 6), (4, 9), (9, 4), (1, 7)], ids=str)
@pytest.mark.parametrize("clip", [(2, 2), (0, 3), (3, 0), (12, 12)], ids=str)
@pytest.mark.parametrize("offset", [0, 3, -2])
def test_relative_terms_as_a_dense_mask_of_sdpa(backend: str, lengths, clip, offset: int) -> None:
    """rel_k, rel_q and rel_bias looked up entry by entry and handed to SDPA. (12, 12) is wider than any distance."""
    query, key, value = inputs(2, 3, *lengths, 4)
    rows = sum(clip) + 1
    rel_k, rel_q, rel_bias = random(3, rows, 4, seed=5), random(rows, 4, seed=6), random(3, rows, seed=7)
    dense = torch.empty(2, 3, *lengths, dtype=torch.float64)
    for i in range(lengths[0]):
        for j in range(lengths[1]):
            row = min(max(j - i - offset, -clip[0]), clip[1]) + clip[0]
            products = (query[:, :, i] * rel_k[:, row]).sum(-1) + (key[:, :, j] * rel_q[row]).sum(-1)
            dense[:, :, i, j] = products / 2 + rel_bias[:, row]  # 2 = sqrt(D); the bias is not scaled
    call = dict(query=query, key=key, value=value, rel_k=rel_k, rel_q=rel_q, rel_bias=rel_bias)
    result = attend(backend, **call, max_relative_position=clip, query_offset=offset)
    close(result, F.scaled_dot_product_attention(query, key, value, attn_mask=dense), precision(backend))


def test_the_log_sum_exp_joins_two_halves_of_the_keys() -> None:
    """What lse is for: attention over all keys from that over each half. float32 for float32 and below, float64 for
    float64.
    """
    call = everything(key_length=8)
    key, value = call.pop("key"), call.pop("value")
    whole, whole_lse = relative_attention(key=key, value=value, **call, return_lse=True, backend="reference")
    parts = []
    for start in (0, 4):  # key 4 of the whole is key 0 of the second half: the queries stand 4 earlier there
        half = dict(key=key[:, :, start : start + 4], value=value[:, :, start : start + 4])
        parts.append(relative_attention(**half, **call, query_offset=-start, return_lse=True, backend="reference"))
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    close(lse, whole_lse, 1e-12)
    close(sum(output * (part - lse).exp()[..., None] for output, part in parts), whole, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    """Output of query's dtype, lse float32, float32 tables beside half precision with float32 gradients; errors of
    rounding's size.
    """
    call = everything(dtype=dtype, grad=True)
    call["rel_k"], call["rel_bias"] = (call[name].detach().float().requires_grad_() for name in ("rel_k", "rel_bias"))
    output, lse = relative_attention(**call, return_lse=True, backend="reference")
    assert (output.dtype, lse.dtype) == (dtype, torch.float32)
    (output.float().sum() + lse.sum()).backward()
    assert {call[name].grad.dtype for name in ("rel_k", "rel_bias")} == {torch.float32}
    expected, expected_lse = definition(**call)
    tolerance = 40 * torch.finfo(dtype).eps  # sums of a dozen products, each a few times 1
    close(output.double(), expected, tolerance)
    close(lse.double(), expected_lse, tolerance)


# Derivatives

SETTINGS = {
    "plain": dict(),
    "causal": dict(is_causal=True, query_offset=1),
    "window": dict(window=(1, 1), query_offset=torch.tensor([2, -4])),  # the second sequence's last queries see nothing
    "masked": dict(key_mask=torch.tensor([[True, False, True, True], [False] * 4]), key_lengths=torch.tensor([3, 2])),
    "dropout": dict(dropout_p=0.4),
    "scale": dict(scale=0.3),
}


def differentiate(check, names, options) -> bool:
    call = everything(2, 2, 3, 4, 2, 2, clip=1, grad=True)
    if "attn_mask" in names:
        call["attn_mask"] = random(2, 1, 3, 4, seed=9).requires_grad_()

    def function(*tensors):
        torch.manual_seed(0)  # the same dropout at every evaluation
        changed = call | dict(zip(names, tensors, strict=True))
        output, lse = relative_attention(**changed, **options, return_lse=True, backend="reference")
        return output, lse.masked_fill(lse == -math.inf, 0.0)

    return check(function, tuple(call[name] for name in names))


@pytest.mark.parametrize("term", [*FLOATS, "attn_mask"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_gradients_by_differences(term: str, setting: str) -> None:
    assert differentiate(gradcheck, [term], SETTINGS[setting])


@pytest.mark.parametrize("term", [*FLOATS, "attn_mask"])
def test_second_derivatives_by_differences(term: str) -> None:
    """Each term against the query, so that mixed derivatives count too."""
    names = ["query"] if term == "query" else ["query", term]
    assert differentiate(gradgradcheck, names, SETTINGS["causal"])


def test_second_derivatives_where_rows_see_nothing() -> None:
    assert differentiate(gradgradcheck, ["query", "key", "rel_k"], SETTINGS["window"])


def test_gradients_of_grouped_queries() -> None:
    """4 query heads, 2 key heads: a key head's gradient is the sum over its two query heads."""
    query, key, value = (tensor.requires_grad_() for tensor in inputs(1, 4, 3, 3, 2, 2))
    rel_k = random(4, 3, 2, seed=4).requires_grad_()
    assert gradcheck(
        lambda *tensors: relative_attention(*tensors, enable_gqa=True, backend="reference"), (query, key, value, rel_k)
    )


# Nothing to compute. Every term is there: reductions over nothing are where shapes go wrong.


@every_backend
@pytest.mark.parametrize(
    "sizes",
    [dict(query_length=0), dict(key_length=0), dict(batch=0), dict(heads=0), dict(query_length=0, key_length=0)],
    ids=lambda sizes: ", ".join(sizes),
)
def test_empty(backend: str, sizes) -> None:
    call = everything(**sizes, grad=True)
    output, lse = attend(backend, **call, return_lse=True)
    assert output.shape == (*call["query"].shape[:3], call["value"].shape[3])
    assert lse.shape == call["query"].shape[:3]
    assert torch.equal(output, torch.zeros_like(output))
    assert torch.equal(lse, torch.full_like(lse, -math.inf))
    (output.sum() + lse.sum()).backward()
    for name, value in call.items():
        assert value.grad is not None, name
        assert torch.equal(value.grad, torch.zeros_like(value)), name
