"""Skew, unskew and Shaw's form against index arithmetic, their definitions, and the skew that was published."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import relattn
from relattn import relative_attention
from tests.oracles import close, inputs, random


@pytest.mark.parametrize(
    ("queries", "keys", "clip", "offset"), [(6, None, 2, 0), (4, 7, 3, 3), (7, 4, 9, -2), (1, 5, 1, 4)]
)
def test_shaws_form(queries: int, keys: int | None, clip: int, offset: int) -> None:
    query, rel_k = random(2, 3, queries, 4), random(2 * clip + 1, 4, seed=1)
    scores = relattn.shaw_relative_scores(query, rel_k, keys, max_relative_position=clip, query_offset=offset)
    keys = queries if keys is None else keys
    assert scores.shape == (2, 3, queries, keys)
    for i in range(queries):
        for j in range(keys):
            row = max(0, min(2 * clip, j - i - offset + clip))
            close(scores[:, :, i, j], query[:, :, i] @ rel_k[row], 1e-13)


@pytest.mark.parametrize("length", [1, 6, 7])
def test_shaws_form_the_skew_and_the_operator_agree(length: int) -> None:
    """Three ways to one term: Shaw's (L, L, D) tensor, Music Transformer's Q E^T and skew, and the operator's own."""
    query, key, value = inputs(2, 2, length, length, 4)
    rel_k = random(2 * length - 1, 4, seed=4)
    shaw = relattn.shaw_relative_scores(query, rel_k, max_relative_position=length - 1)
    close(relattn.skew(query @ rel_k.T), shaw, 1e-13)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=shaw / 2)
    close(relative_attention(query, key, value, rel_k, backend="reference"), expected, 1e-13)


# Even, odd and single lengths; more keys and fewer keys than queries. A skew that is right for one parity only is a
# known bug.
SKEWS = [(1, 1), (2, 2), (3, 3), (6, 6), (7, 7), (1, 5), (5, 1), (4, 9), (9, 4), (2, 3), (3, 2)]
sizes = pytest.mark.parametrize(("queries", "keys"), SKEWS, ids=str)
causal_sizes = pytest.mark.parametrize(("queries", "keys"), [pair for pair in SKEWS if pair[0] <= pair[1]], ids=str)


def numbered(*shape: int) -> Tensor:
    """1, 2, 3, ...: every entry tells where it came from, and none is a padding's 0."""
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).view(shape)


@sizes
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)], ids=str)
def test_skew_by_index_arithmetic(queries: int, keys: int, leading) -> None:
    scores = numbered(*leading, queries, queries + keys - 1)
    skewed = relattn.skew(scores)
    assert skewed.shape == (*leading, queries, keys)
    for i in range(queries):
        for j in range(keys):
            assert torch.equal(skewed[..., i, j], scores[..., i, j - i + queries - 1])


@causal_sizes
def test_causal_skew_by_index_arithmetic(queries: int, keys: int) -> None:
    """The last column is distance 0 and the last query stands at the last key: query i stands at key i + Lk - Lq."""
    scores = numbered(2, queries, keys)
    skewed = relattn.skew(scores, is_causal=True)
    assert skewed.shape == scores.shape
    for i in range(queries):
        for j in range(keys):
            distance = j - (i + keys - queries)
            expected = scores[:, i, keys - 1 + distance] if distance <= 0 else torch.zeros(2, dtype=torch.float64)
            assert torch.equal(skewed[:, i, j], expected)


@sizes
def test_unskew_is_the_inverse_and_the_transpose_of_skew(queries: int, keys: int) -> None:
    by_key, by_distance = random(2, queries, keys), random(2, queries, queries + keys - 1, seed=1)
    spread = relattn.unskew(by_key)
    assert spread.shape == by_distance.shape
    assert torch.equal(relattn.skew(spread), by_key)
    # <skew(a), b> = <a, unskew(b)>: so the two are each other's gradients, and unskew is zero where no key has the
    # distance.
    close((relattn.skew(by_distance) * by_key).sum(), (by_distance * spread).sum(), 1e-12)
    assert (spread != 0).sum() == by_key.numel()


@causal_sizes
def test_causal_unskew_is_the_inverse_and_the_transpose(queries: int, keys: int) -> None:
    by_key, by_distance = random(2, queries, keys), random(2, queries, keys, seed=1)
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    spread = relattn.unskew(by_key, is_causal=True)
    assert spread.shape == by_distance.shape
    assert torch.equal(relattn.skew(spread, is_causal=True), by_key * seen)
    close((relattn.skew(by_distance, is_causal=True) * by_key).sum(), (by_distance * spread).sum(), 1e-12)


@pytest.mark.parametrize("function", [relattn.skew, relattn.unskew])
@pytest.mark.parametrize(("shape", "is_causal"), [((2, 3, 7), False), ((1, 4), False), ((3, 5), True)])
def test_skew_and_unskew_are_differentiable_twice(function, shape, is_causal: bool) -> None:
    scores = random(*shape).requires_grad_()
    assert gradcheck(lambda x: function(x, is_causal=is_causal), scores)
    assert gradgradcheck(lambda x: function(x, is_causal=is_causal).square(), scores)


def test_skew_takes_any_memory_layout() -> None:
    scores = numbered(9, 2, 5).permute(1, 2, 0)
    assert not scores.is_contiguous()
    assert torch.equal(relattn.skew(scores), relattn.skew(scores.contiguous()))
    by_key = scores[..., :6]
    assert torch.equal(relattn.unskew(by_key), relattn.unskew(by_key.contiguous()))


class OnlyFloats(TorchDispatchMode):
    """Fails on any operation that yields something else than floating point: an index tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        assert result.is_floating_point(), f"{function} made {result.dtype} {tuple(result.shape)}"
        return result


def test_skew_needs_no_index_and_copies_nothing() -> None:
    scores = random(6, 11)
    with OnlyFloats():
        skewed = relattn.skew(scores)
        for result in (
            relattn.skew(scores, is_causal=True),
            relattn.unskew(skewed),
            relattn.unskew(skewed, is_causal=True),
        ):
            assert result.dtype == scores.dtype
    assert skewed.untyped_storage().data_ptr() == scores.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("function", "shape", "is_causal", "message"),
    [
        (relattn.skew, (2, 5, 4), False, r"^scores: expected \(..., 5, 5 \+ Lk - 1\), got \(2, 5, 4\)"),
        (relattn.skew, (5, 4), True, r"^scores: expected \(..., 5, Lk\) with Lk >= 5, got \(5, 4\)"),
        (relattn.unskew, (5, 4), True, r"^scores: expected \(..., 5, Lk\) with Lk >= 5, got \(5, 4\)"),
    ],
)
def test_skew_refuses_too_few_columns(function, shape, is_causal: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(shape), is_causal=is_causal)


@pytest.mark.parametrize("keys", [1, 5])
def test_skew_of_no_queries(keys: int) -> None:
    assert relattn.skew(torch.zeros(2, 0, keys - 1)).shape == (2, 0, keys)
    assert relattn.unskew(torch.zeros(2, 0, keys)).shape == (2, 0, keys - 1)


@pytest.mark.parametrize("function", [relattn.skew, relattn.unskew])
def test_skew_refuses_one_dimension(function) -> None:
    with pytest.raises(ValueError, match=r"^scores: .*\(5,\)"):
        function(torch.zeros(5))


@pytest.mark.parametrize("rows", [4, 7])
def test_shaws_form_refuses_a_table_that_does_not_fit(rows: int) -> None:
    with pytest.raises(ValueError, match=rf"^rel_k: .*5.*{rows}"):
        relattn.shaw_relative_scores(random(1, 1, 3, 2), random(rows, 2), max_relative_position=2)


def published_skew(scores: Tensor) -> Tensor:
    """Huang et al. 2018, section 3.4.1: pad a column on the left, reshape to (L + 1, L), drop the first row."""
    *leading, length, _ = scores.shape
    return F.pad(scores, (1, 0)).reshape(*leading, length + 1, length)[..., 1:, :]


@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_music_transformers_published_skew_agrees_below_the_diagonal(length: int) -> None:
    query, key, value = inputs(2, 2, length, length, 4)
    rel_k = random(length, 4, seed=4)  # distances -(L - 1) ... 0
    published = published_skew(query @ rel_k.T)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    assert torch.equal(relattn.skew(query @ rel_k.T, is_causal=True)[..., seen], published[..., seen])
    expected = F.scaled_dot_product_attention(
        query, key, value, attn_mask=(published / 2).masked_fill(~seen, -math.inf)
    )
    call = dict(max_relative_position=(length - 1, 0), is_causal=True, backend="reference")
    close(relative_attention(query, key, value, rel_k, **call), expected, 1e-13)
