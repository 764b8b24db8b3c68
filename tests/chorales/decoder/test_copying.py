"""The check against copying."""

import numpy as np

from examples.chorales.data.files import SILENT
from examples.chorales.decoder.copying import CopyCheck, chord_events, longest_common_passage, note_events
from examples.chorales.decoder.languages import END, ChoraleLanguage
from tests.chorales.decoder.helpers import random_grid


def test_planted_copy_is_found_in_another_key():
    train = [random_grid(80, seed) for seed in range(5)]
    sample = np.concatenate([random_grid(50, 10), train[3][20:61], random_grid(30, 11)])
    copied = sample[50:91]
    copied[copied != SILENT] += 4
    passage = longest_common_passage(chord_events([sample]), chord_events(train))
    assert (passage.events, passage.start, passage.piece, passage.piece_start, passage.semitones) == (41, 50, 3, 20, 4)
    sample[70, 2] += 1  # one note in the middle
    passage = longest_common_passage(chord_events([sample]), chord_events(train))
    assert (passage.events, passage.start) == (20, 50)


def test_copies_do_not_run_from_piece_to_piece():
    first, second = random_grid(30, 1), random_grid(30, 2)
    sample = np.concatenate([first[-12:], second[:17]])
    passage = longest_common_passage(chord_events([sample]), chord_events([first, second]))
    assert (passage.events, passage.start, passage.piece, passage.piece_start) == (17, 12, 1, 0)


def test_longest_common_passage_agrees_with_trying_everything():
    rng = np.random.default_rng(3)
    for _ in range(20):
        pieces = [rng.integers(60, 63, rng.integers(1, 40)) for _ in range(4)]
        sample = rng.integers(60, 63, 30)
        passage = longest_common_passage(note_events([sample]), note_events(pieces))
        longest = 0
        for piece in pieces:
            for start in range(len(sample)):
                for place in range(len(piece)):
                    size = 0
                    while (
                        start + size < len(sample)
                        and place + size < len(piece)
                        and sample[start + size] - sample[start] == piece[place + size] - piece[place]
                    ):
                        size += 1
                    longest = max(longest, size)
        assert passage.events == longest
        piece = pieces[passage.piece][passage.piece_start : passage.piece_start + longest]
        np.testing.assert_array_equal(sample[passage.start : passage.start + longest] - passage.semitones, piece)


def test_copy_check_of_generated_tokens(music):
    check = CopyCheck(music)
    train = music.splits["train"]
    report = check(np.concatenate([ChoraleLanguage().encode(random_grid(20, 5)), train[4][1 + 4 * 8 : 1 + 4 * 32], [END]]))
    passage = report["longest_common_passage"]
    assert report["unit"] == "16ths"
    assert report["generated"] == 44
    assert passage["events"] >= 24
    assert passage["piece"] == "train[4]"
    assert passage["piece_start"] == 8
    assert 0 < passage["changes"] < passage["events"]
    test = check.of_test_pieces(44)
    assert test["pieces"] == len(music.splits["test"])
    assert 1 <= test["median"] <= test["longest"] <= 44
    assert check(np.array([END]))["longest_common_passage"] is None
