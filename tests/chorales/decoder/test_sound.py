"""Chorales as MIDI files and back."""

# ruff: noqa: E402 (what cannot be imported is skipped first)

import numpy as np

from tests.chorales.helpers import require

require("matplotlib", "pretty_midi")

import pretty_midi

from examples.chorales.data.files import SILENT, load_file
from examples.chorales.decoder.sound import chorale_midi, read_chorale, write_midi


def test_chorales_to_midi_and_back(small_json, tmp_path):
    grid = load_file(small_json)["train"][0]
    grid = grid[np.flatnonzero((grid != SILENT).any(axis=1))[0] :]
    grid[10:14, [1, 2]] = [55, 60]  # the tenor above the alto
    midi = chorale_midi(grid, 100)
    write_midi(tmp_path / "four.mid", midi)
    np.testing.assert_array_equal(read_chorale(tmp_path / "four.mid"), grid[: np.flatnonzero((grid != SILENT).any(axis=1))[-1] + 1])
    pitches = [note.pitch for note in midi.instruments[0].notes]
    starts = np.flatnonzero(np.diff(grid[:, 0], prepend=SILENT - 1))
    assert pitches == [pitch for pitch in grid[starts, 0].tolist() if pitch != SILENT]  # repeated pitches are one note
    # One track with everything: voices are dealt out by height.
    full = grid[(grid != SILENT).all(axis=1)]
    full = full[(np.diff(full, axis=1) < 0).all(axis=1)]
    piano = pretty_midi.Instrument(0)
    piano.notes = [note for part in chorale_midi(full, 100).instruments for note in part.notes]
    midi.instruments = [piano]
    write_midi(tmp_path / "one.mid", midi)
    np.testing.assert_array_equal(read_chorale(tmp_path / "one.mid"), full)
