"""Dropout's generator: known answers of Philox, the contract between backends, and what is dropped."""

import math

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from relattn import philox, relative_attention
from tests import draws
from tests.oracles import attend, close, every_backend, everything, precision

PI = ((0xA4093822, 0x299F31D0), (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344))
ONES = 0xFFFFFFFF
# Random123's kat_vectors for philox4x32, of 7 rounds (dropout's) and 10.
KNOWN_ANSWERS = [
    (7, (0, 0), (0, 0, 0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (ONES, ONES), (ONES,) * 4, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, *PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, (0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (ONES, ONES), (ONES,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, *PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("rounds", "key", "counter", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(rounds, key, counter, answer) -> None:
    counter = tuple(torch.tensor(word) for word in counter)
    assert tuple(map(int, philox.philox_4x32(key, counter, rounds))) == answer
    assert tuple(map(int, philox.philox_4x32(tuple(map(torch.tensor, key)), counter, rounds))) == answer


def plain_philox(key: list[int], counter: list[int]) -> list[int]:
    """Salmon et al. 2011 in Python integers, which do not wrap."""
    for _ in range(7):
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def keep(seed: int, dropout_p: float, batch: int, heads: int, queries: int, start: int, stop: int) -> Tensor:
    """(batch, heads, queries, stop - start)"""
    index = torch.arange(batch)[:, None, None], torch.arange(heads)[:, None], torch.arange(queries)
    return philox.dropout_keep(torch.tensor(seed), dropout_p, *index, start, stop)


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 + 5, 2**63 - 2], ids=hex)
def test_a_weight_survives_by_its_seed_and_place(seed: int) -> None:
    """The contract between backends: key = the seed's halves, low first; counter = (b, h, i, j // 4), word j % 4; kept
    if >= p * 2^32.
    """
    kept = keep(seed, 0.4, 2, 3, 5, 0, 11)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, kept.shape)).tolist():
        word = plain_philox([seed % 2**32, seed >> 32], [b, h, i, j // 4])[j % 4]
        assert kept[b, h, i, j] == (word >= round(0.4 * 2**32))


@settings(max_examples=150)
@draws.given
def test_dropout_does_not_depend_on_how_keys_are_cut(draw) -> None:
    """Ranges that start and end anywhere in a group of four."""
    start, stop = sorted(draw(st.integers(0, 37)) for _ in range(2))
    seed, dropout_p = draw(st.integers(0, 2**63 - 2)), draw(st.sampled_from((0.1, 0.5)))
    assert torch.equal(
        keep(seed, dropout_p, 2, 2, 3, start, stop), keep(seed, dropout_p, 2, 2, 3, 0, 37)[..., start:stop]
    )


@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.5, 0.9])
def test_dropout_keeps_the_right_share_independently(dropout_p: float) -> None:
    """2 * 4 * 128 * 512 = 2^19 draws of a fixed seed, within five standard deviations; and no two neighbours in any
    direction move
    together (a word used twice, or a counter that misses an index, gives a correlation of 1)."""
    kept = keep(1234567890123456789, dropout_p, 2, 4, 128, 0, 512).double()
    deviation = math.sqrt(dropout_p * (1 - dropout_p))
    assert abs(kept.mean() - (1 - dropout_p)) < 5 * deviation / math.sqrt(kept.numel())
    centred = (kept - (1 - dropout_p)) / deviation
    for dim in range(4):
        for step in {1, 2, 3, 4} if dim == 3 else {1}:
            product = centred.narrow(dim, step, kept.shape[dim] - step) * centred.narrow(dim, 0, kept.shape[dim] - step)
            assert abs(product.mean()) < 5 / math.sqrt(product.numel())
    for other in (1234567890123456789 + 1, 1234567890123456789 + 2**32):  # the low and the high half of the seed
        product = centred * (keep(other, dropout_p, 2, 4, 128, 0, 512).double() - (1 - dropout_p)) / deviation
        assert abs(product.mean()) < 5 / math.sqrt(product.numel())


def test_dropout_of_nothing_and_of_everything() -> None:
    assert keep(7, 0.0, 2, 2, 8, 0, 64).all()
    assert not keep(7, 1.0, 2, 2, 8, 0, 64).any()


@every_backend
def test_dropout_of_nothing_and_of_everything_in_attention(backend: str) -> None:
    call = everything()
    plain, lse = attend(backend, **call, return_lse=True)
    assert torch.equal(attend(backend, **call, dropout_p=0.0), plain)
    for value in call.values():
        value.requires_grad_()
    nothing, nothing_lse = attend(backend, **call, dropout_p=1.0, return_lse=True)
    assert torch.equal(nothing, torch.zeros_like(plain))  # and no NaN from 0 / (1 - p)
    close(nothing_lse, lse, precision(backend))  # before dropout
    nothing.sum().backward()
    assert all(not value.grad.any() for value in call.values())


@every_backend
def test_dropout_scales_the_weights_that_survive(backend: str) -> None:
    """Weights read off with an identity for values: each is 0 or the plain one / (1 - p), as Philox says for the seed
    drawn.
    """
    call = everything(key_length=6, value_size=6)
    call["value"] = torch.eye(6, dtype=torch.float64).expand(2, 2, 6, 6)
    del call["rel_v"]
    plain = attend(backend, **call)
    torch.manual_seed(3)
    dropped = attend(backend, **call, dropout_p=0.4)
    if backend != "triton":  # CUDA draws from a generator of its own
        torch.manual_seed(3)
        kept = keep(int(philox.draw_seed(torch.device("cpu"))), 0.4, 2, 2, 5, 0, 6)
        close(dropped, plain * kept / 0.6, precision(backend))
    assert 0 < (dropped == 0).sum() < dropped.numel()
    assert not torch.equal(attend(backend, **call, dropout_p=0.4), dropped)  # a new call draws a new seed


def test_dropout_drops_value_and_rel_v_alike() -> None:
    """w_ij multiplies v_j + rel_v: with rel_v = -v (all equal) nothing is left, whatever is dropped."""
    call = everything()
    call["value"], call["rel_v"] = torch.ones_like(call["value"]), -torch.ones_like(call["rel_v"])
    close(
        relative_attention(**call, dropout_p=0.5, backend="reference"),
        torch.zeros(2, 2, 5, 3, dtype=torch.float64),
        1e-14,
    )


def test_dropout_keeps_the_mean() -> None:
    """Over 400 seeds, within five of the mean's own standard deviations: without the 1 / (1 - p) half the entries are
    more than 10 off.
    """
    call = everything()
    torch.manual_seed(0)
    samples = torch.stack([relative_attention(**call, dropout_p=0.3, backend="reference") for _ in range(400)])
    deviations = (samples.mean(0) - relative_attention(**call, backend="reference")) / (samples.std(0) / 20)
    assert deviations.abs().max() < 5
