"""Tokens and windows against the seed notebook's own code, and the facts of the classic files."""

import json
import os
import sys

import numpy as np
import pytest

from examples.chorales.data.files import load_file
from examples.chorales.data.tokens import END, NOWHERE, PAD, SPECIALS, START, UNK, Chorales, Vocabulary, Windows


def notebook_windowize(ids_1d, seq_len, pad_id, stride):
    """The notebook's `windowize`, verbatim but for its names' defaults."""
    out = []
    n = len(ids_1d)
    i = 0
    while i < n:
        w = ids_1d[i : i + seq_len]
        if len(w) < seq_len:
            pad = np.full(seq_len - len(w), pad_id, dtype=np.int64)
            w = np.concatenate([w, pad])
        out.append(w)
        i += stride
    return np.array(out)


def notebook_tokens(raw, split, vocabulary):
    """[start, notes..., end] of every piece, straight from the file's lists."""
    return [
        np.array([START, *[int(vocabulary.encode(np.array(p))) for step in piece for p in step], END])
        for piece in raw[split]
    ]


@pytest.mark.parametrize(("size", "stride"), [(16, 1), (16, 16), (64, 31), (1024, 7), (5, 9)])
def test_windows_are_the_notebooks(small_json, size, stride):
    chorales = Chorales.load(small_json)
    raw = json.loads(small_json.read_text())
    for split, windows in chorales.windows(size, stride).items():
        pieces = notebook_tokens(raw, split, chorales.vocabulary)
        expected = np.concatenate([notebook_windowize(piece, size, PAD, stride) for piece in pieces])
        assert len(windows) == len(expected)
        np.testing.assert_array_equal(windows.gather(np.arange(len(windows))).ids, expected)


def test_vocabulary_is_that_of_the_training_set():
    vocabulary = Vocabulary([np.array([[60, 55, 52, 48]]), np.array([[62, 55, -1, 48]])])
    assert len(vocabulary) == 7 + 5
    np.testing.assert_array_equal(vocabulary.encode(np.array([48, 52, 55, 60, 62, 61])), [7, 8, 9, 10, 11, UNK])


def test_tokens_know_their_step_and_voice(small_json):
    chorales = Chorales.load(small_json)
    grids = load_file(small_json)["valid"]
    tokens = chorales.tokens["valid"]
    for piece, grid in enumerate(grids):
        part = slice(tokens.bounds[piece], tokens.bounds[piece + 1])
        ids, step, voice = tokens.ids[part], tokens.step[part], tokens.voice[part]
        assert (ids[0], ids[-1]) == (START, END)
        assert step[0] == step[-1] == voice[0] == voice[-1] == NOWHERE
        np.testing.assert_array_equal(ids[1:-1], chorales.vocabulary.encode(grid[step[1:-1], voice[1:-1]]))
        assert (np.diff(step[1:-1]) >= 0).all()


def test_steps_with_fewer_notes_get_the_nearest_voices(tmp_path):
    piece = [[72, 65, 60, 48], [72, 60, 48], [64], [], [71, 64, 59, 47]]
    path = tmp_path / "piece.json"
    path.write_text(json.dumps({"train": [piece], "valid": [piece], "test": [piece]}))
    expected = [[72, 65, 60, 48], [72, -1, 60, 48], [-1, 64, -1, -1], [-1] * 4, [71, 64, 59, 47]]
    np.testing.assert_array_equal(load_file(path)["train"][0], expected)


@pytest.mark.parametrize(("size", "stride"), [(0, 1), (16, 0), (-1, 1)])
def test_impossible_windows_are_refused(small_json, size, stride):
    with pytest.raises(ValueError, match="window and stride"):
        Windows(Chorales.load(small_json).tokens["train"], size, stride)


def test_subset_is_spread_evenly(small_json):
    windows = Chorales.load(small_json).windows(16, 3)["train"]
    few = windows.subset(5)
    assert len(few) == 5
    assert len(windows) > 100
    np.testing.assert_array_equal(few.gather(np.array([4])).ids, windows.gather(np.array([len(windows) - 1])).ids)
    assert windows.subset(None) is windows


def test_summary_command_on_classic_data(classic_path, run_command):
    done = run_command(
        sys.executable, "-m", "examples.chorales.data",
        "--data", str(classic_path), "--window", "16", "--stride", "1", "--summary",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["windows"] == {"train": 220959, "valid": 73195, "test": 75470}
    assert summary["vocab"] == 53
    assert summary["pieces"] == {"train": 229, "valid": 76, "test": 77}


def test_classic_npz_holds_the_same_music(classic_path):
    archive = classic_path.with_name("Jsb16thSeparated.npz")
    if not archive.is_file():
        pytest.skip(f"no {archive.name} beside the file named by RELATTN_JSB")
    one, other = Chorales.load(classic_path), Chorales.load(archive)
    assert one.summary(16, 1)["windows"] == other.summary(16, 1)["windows"]

    def pieces(chorales, split):  # the two files list the pieces in different orders
        tokens = chorales.tokens[split]
        return sorted(tokens.ids[a:b].tobytes() for a, b in zip(tokens.bounds, tokens.bounds[1:], strict=False))

    # Some pieces differ by a few notes between the files; most must be equal, note for note.
    same = [a == b for split in one.tokens for a, b in zip(pieces(one, split), pieces(other, split), strict=True)]
    assert np.mean(same) > 0.9


def test_copying_is_right_for_78_percent_of_classic_notes(classic_path):
    """The README's facts on the same voice's previous 16th; a wrong voice order would give about 5 %."""
    for split, expected in (("train", 0.780), ("valid", 0.786), ("test", 0.770)):
        pieces = load_file(classic_path)[split]
        before = np.concatenate([piece[:-1] for piece in pieces])
        after = np.concatenate([piece[1:] for piece in pieces])
        both = (before >= 0) & (after >= 0)
        assert (before == after)[both].mean() == pytest.approx(expected, abs=0.004)


def test_special_tokens_are_the_notebooks():
    assert SPECIALS[:5] == ("<PAD>", "<MASK>", "<CLS>", "<SEP>", "<UNK>")


def test_summary_command_without_data_file_fails_clearly(run_command, tmp_path):
    missing = os.fspath(tmp_path / "no.json")
    done = run_command(sys.executable, "-m", "examples.chorales.data", "--data", missing, "--summary")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip() == f"error: --data {missing}: no such file"
