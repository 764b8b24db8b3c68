"""Gibbs sampling of lower voices: windows over long melodies, what is given, what is drawn."""

# ruff: noqa: E402 (what cannot be imported is skipped first)

import copy

import numpy as np
import pytest

from tests.chorales.helpers import require

require("transformers")

import torch

from examples.chorales.compare.gibbs import Annealing, _logits, harmonize, windows_of
from examples.chorales.compare.model import build_model
from examples.chorales.data.tokens import PAD, SPECIALS

PITCHES = list(range(40, 80))
SIZE = 64


@pytest.fixture(scope="module")
def model():
    """With random weights."""
    model = build_model("both", len(SPECIALS) + len(PITCHES), SIZE, SIZE - 1, seed=0)
    model.config.pitches, model.config.training_length = PITCHES, SIZE
    return model.eval()


@pytest.mark.parametrize("length", [6, 63, 64, 65, 96, 97, 300])
def test_every_place_is_read_by_a_window_that_holds_it_far_from_its_edges(length):
    starts, reader = windows_of(length, SIZE)
    place = np.arange(length) - starts[reader]
    assert (starts % 16 == 0).all()
    assert ((place >= 0) & (place < SIZE)).all()
    assert (starts < length).all()
    # An edge is far, or it is the end of the sequence.
    assert ((place >= SIZE // 4) | (starts[reader] == 0)).all()
    assert ((SIZE - 1 - place >= SIZE // 4 - 1) | (starts[reader] + SIZE >= length)).all()


def test_logits_of_a_long_sequence_are_those_of_its_windows(model):
    tokens = torch.randint(len(SPECIALS), len(SPECIALS) + len(PITCHES), (2, 130), generator=torch.Generator().manual_seed(1))
    starts, reader = windows_of(130, SIZE)
    with torch.inference_mode():
        logits = _logits(model, tokens, SIZE)
        for place in (0, 40, 70, 129):
            start = int(starts[reader[place]])
            window = tokens[:, start : start + SIZE]
            missing = SIZE - window.shape[1]
            window = torch.cat([window, torch.full((2, missing), PAD)], dim=1)
            want = model(input_ids=window, attention_mask=(window != PAD).long()).logits[:, place - start]
            torch.testing.assert_close(logits[:, place], want, rtol=1e-4, atol=1e-5)


def test_the_melody_stays_and_equal_seeds_draw_equal_voices(model):
    melody = np.repeat([72, 74, 71, 72, 67], 8)
    annealing = Annealing(steps=5)
    one, two, other = (harmonize(model, melody, 2, annealing, seed) for seed in (3, 3, 4))
    assert one.shape == (2, 40, 4)
    np.testing.assert_array_equal(one[:, :, 0], np.stack([melody, melody]))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()
    assert (one[0] != one[1]).any()
    assert np.isin(one, PITCHES).all()


def test_what_is_not_hidden_is_not_drawn_anew(model):
    """With a model that wants one pitch everywhere, at nearly no temperature, all lower voices sing it."""
    with torch.no_grad():
        bias = model.cls.predictions.bias
        before = bias.clone()
        bias[len(SPECIALS) + 5] += 1e4
        try:
            grid = harmonize(model, np.full(12, 60), 1, Annealing(steps=1), 0)
        finally:
            bias.copy_(before)
    assert (grid[:, :, 1:] == PITCHES[5]).all()


def test_annealing_goes_from_all_to_few_and_from_hot_to_cold():
    annealing = Annealing(steps=100, hot=1.0, cold=0.1, least=0.05)
    shares = [annealing.share(step) for step in range(100)]
    assert shares[0] == 1
    assert shares[75:] == pytest.approx([0.05] * 25)
    assert shares[37] == pytest.approx(1 - 0.95 * 37 / 75)
    assert annealing.temperature(0) == 1
    assert annealing.temperature(99) == pytest.approx(0.1)
    assert annealing.temperature(49) / annealing.temperature(50) == pytest.approx(10 ** (1 / 99))
    for wrong in (dict(steps=0), dict(cold=2.0), dict(cold=0.0), dict(least=0.0)):
        with pytest.raises(ValueError, match=r"^(steps|temperature|least): "):
            Annealing(**wrong)


def test_unknown_pitches_are_named(model):
    with pytest.raises(ValueError, match=r"melody: expected MIDI pitches 40 to 79, got \[90\]"):
        harmonize(model, np.array([60, 90, 60]), 1, Annealing(steps=1), 0)


def test_a_model_of_windows_shorter_than_a_quarter_is_refused(model):
    short = copy.copy(model)
    short.config = copy.copy(model.config)
    short.config.training_length = 15
    with pytest.raises(ValueError, match="model: expected one trained on windows of at least 16 tokens, a quarter, got 15"):
        harmonize(short, np.array([60] * 8), 1, Annealing(steps=1), seed=0)
