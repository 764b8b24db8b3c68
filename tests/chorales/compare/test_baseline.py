"""The copy baseline, by hand and on the classic data."""

import numpy as np

from examples.chorales.compare.baseline import copy_neighbour, score_baseline
from examples.chorales.compare.masking import Masked, MaskingCollator
from examples.chorales.data.tokens import IGNORED, MASK, NOWHERE, START, Chorales, Tokens, Vocabulary, Windows


def test_copy_baseline_by_hand():
    """Two voices: copy the previous shown note, else the next, else the fallback; never what is hidden."""
    s, a = 0, 1
    voice = np.array([[NOWHERE, s, a, s, a, s, a, s, a]])
    ids = np.array([[START, 10, 20, 11, 21, 12, 22, 13, 23]])
    shown = np.array([[START, MASK, 20, MASK, 30, 12, MASK, MASK, MASK]])
    labels = np.where(shown != ids, ids, IGNORED)
    prediction = copy_neighbour(Masked(shown, labels, voice, voice), np.array([7, 8, 9, 10]))
    # position 1: no earlier soprano, next shown is 12; 3: likewise; 4 shows a random 30, predicted from 20 before it;
    # 6: the random 30 is taken at face value; 7: from 12; 8: from 30, nearest shown alto.
    wanted = labels != IGNORED
    np.testing.assert_array_equal(prediction[wanted], [12, 12, 20, 30, 12, 30])
    nothing = copy_neighbour(Masked(np.full((1, 9), MASK), ids, voice, voice), np.array([7, 8, 9, 10]))
    np.testing.assert_array_equal(nothing[0], [START, 7, 8, 7, 8, 7, 8, 7, 8])


def test_copy_baseline_on_held_notes_is_perfect_but_for_random_replacements():
    piece = np.tile([72, 65, 58, 48], (200, 1))
    vocabulary = Vocabulary([piece, piece + 1])
    tokens = Tokens.from_pieces([piece], vocabulary)
    collator = MaskingCollator(Windows(tokens, 64, 5), "step", len(vocabulary), seed=0)
    score = score_baseline(collator, tokens, vocabulary, batch_size=7)
    assert 0.97 < score["accuracy"] < 1
    assert score == score_baseline(collator, tokens, vocabulary, batch_size=1000)
    assert 0 < score["loss"] < 0.3


def test_copy_baseline_on_classic_data_is_about_78_percent(classic_path):
    chorales = Chorales.load(classic_path)
    collator = MaskingCollator(chorales.windows(64, 64)["test"], "step", len(chorales.vocabulary), seed=0)
    score = score_baseline(collator, chorales.tokens["train"], chorales.vocabulary)
    assert 0.72 < score["accuracy"] < 0.78
