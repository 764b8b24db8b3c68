"""Chorales as tokens, windows of them, and batches to predict the next token from."""

import numpy as np
import pytest

from examples.chorales.data.files import SILENT
from examples.chorales.data.tokens import IGNORED
from examples.chorales.decoder.languages import END, PAD, START, ChoraleLanguage
from examples.chorales.decoder.passages import ScoredCollator, ScoredWindows, TrainingCollator, TrainingWindows
from tests.chorales.decoder.helpers import random_grid
from tests.chorales.helpers import require

require("torch", "tqdm")


def test_chorale_tokens_and_back():
    language, grid = ChoraleLanguage(), random_grid(40)
    ids = language.encode(grid)
    assert ids.shape == (160,)
    assert ids[:4].tolist() == [3 if pitch == SILENT else pitch + 4 for pitch in grid[0].tolist()]
    np.testing.assert_array_equal(language.decode(ids), grid)
    framed = np.concatenate([[START], ids, [70, 60, END, PAD]])  # an unfinished step, which is dropped
    np.testing.assert_array_equal(language.decode(framed), grid)
    up = language.transposition(5)[ids]
    np.testing.assert_array_equal(language.decode(up), np.where(grid == SILENT, SILENT, grid + 5))
    assert (language.transposition(5) == -1).sum() == 5
    np.testing.assert_array_equal(language.transposition(0), np.arange(language.size))


@pytest.mark.parametrize("size", [32, 100, 4096])
def test_every_note_is_scored_once_from_enough_context(music, size):
    """All windows' labels together are the pieces' notes, and those of later windows have half a window before them."""
    windows = ScoredWindows(music.splits["test"], size, music.language.unit)
    collator = ScoredCollator(windows)
    found = []
    for index in range(len(windows)):
        batch = {name: tensor[0].numpy() for name, tensor in collator([(0, index)]).items()}
        scored = np.flatnonzero(batch["labels"] != IGNORED)
        found.append(batch["labels"][scored])
        assert batch["input_ids"][0] == START or len(scored) == 0 or scored[0] + 1 >= size // 2
        following = batch["input_ids"][1:]
        overlap = (batch["labels"][:-1] != IGNORED) & (following != PAD)
        np.testing.assert_array_equal(batch["labels"][:-1][overlap], following[overlap])  # the label is the next token
    ids = music.splits["test"].ids
    np.testing.assert_array_equal(np.concatenate(found), ids[ids > END])


def test_training_windows_cover_everything_and_keep_the_voices_phase(music):
    pieces = music.splits["train"]
    windows = TrainingWindows(pieces, 64, music.language.unit, seed=0)
    marked = type(pieces)(np.arange(len(pieces.ids)), pieces.bounds, pieces.names)  # ids that say where they come from
    windows.pieces = marked
    seen = np.zeros(len(pieces.ids), dtype=int)
    for epoch in range(30):
        for index in range(len(windows)):
            ids, _ = windows.cut(epoch, index)
            first, end = pieces.bounds[windows.piece[index] : windows.piece[index] + 2]
            assert first <= ids[0]
            assert ids[-1] < end
            assert (ids[0] - first) % 4 == 0
            assert len(ids) <= 65
            seen[ids] += 1
    assert seen.min() > 0
    again = windows.cut(7, 3)[0]
    np.testing.assert_array_equal(again, windows.cut(7, 3)[0])
    assert len({windows.cut(epoch, 3)[0][0] for epoch in range(30)}) > 5


def test_transpositions_move_all_voices_and_stay_within_the_training_set(music):
    windows = TrainingWindows(music.splits["train"], 64, music.language.unit, seed=0)
    collator = TrainingCollator(windows, music.language, transpose=6)
    shifts = set()
    known = set(music.splits["train"].ids.tolist())
    for epoch in range(20):
        for index in range(len(windows)):
            batch = collator([(epoch, index)])
            inputs, labels = batch["input_ids"][0].numpy(), batch["labels"][0].numpy()
            ids, _ = windows.cut(epoch, index)
            drawn = np.append(inputs[:1], labels)
            drawn = drawn[: len(ids)]
            notes = ids > 3
            moved = np.unique(drawn[notes] - ids[notes])
            assert len(moved) == 1
            np.testing.assert_array_equal(drawn[~notes], ids[~notes])
            assert set(drawn.tolist()) <= known
            shifts.add(int(moved[0]))
    assert shifts == set(range(-6, 7))
    plain = TrainingCollator(windows, music.language, transpose=0)([(0, 0)])
    np.testing.assert_array_equal(plain["input_ids"][0].numpy()[:20], windows.cut(0, 0)[0][:20])
