"""Performances as tokens and back."""

# ruff: noqa: E402 (what cannot be imported is skipped first)

import numpy as np

from examples.chorales.decoder.languages import END, START, MidiLanguage, read_performance
from tests.chorales.decoder.helpers import by_pitch, performance, played
from tests.chorales.helpers import require

require("miditok", "pretty_midi")

import pretty_midi


def test_performance_to_tokens_and_back(tmp_path):
    """Times to 10 ms whatever the file's tempo, velocities to one of 32 steps; drums are left out."""
    expected = by_pitch(performance(tmp_path / "one.mid", tempo=73.0, drums=True))
    language = MidiLanguage()
    assert language.size == 3 + 128 + 128 + 32 + 100  # Music Transformer's 388 events and PAD, START, END
    ids = language.encode(tmp_path / "one.mid")
    (tmp_path / "two.mid").write_bytes(language.decode([START, *ids, END]).dumps_midi())
    found = by_pitch(played(pretty_midi.PrettyMIDI(str(tmp_path / "two.mid"))))
    np.testing.assert_array_equal(found[:, 0], expected[:, 0])
    np.testing.assert_allclose(found[:, 1:3], expected[:, 1:3], atol=0.0151)
    np.testing.assert_allclose(found[:, 3], expected[:, 3], atol=4)
    (tmp_path / "up.mid").write_bytes(language.decode(language.transposition(3)[ids]).dumps_midi())
    up = by_pitch(played(pretty_midi.PrettyMIDI(str(tmp_path / "up.mid"))))
    np.testing.assert_allclose(up, found + [3, 0, 0, 0])  # with the ends that belong to them


def test_pedal_holds_notes_until_it_lifts_or_the_key_is_struck_again(tmp_path):
    midi = pretty_midi.PrettyMIDI()
    piano = pretty_midi.Instrument(0)
    for pitch, start, end in ((60, 0.0, 0.5), (60, 2.0, 2.2), (64, 0.2, 0.6), (67, 3.5, 3.8)):
        piano.notes.append(pretty_midi.Note(80, pitch, start, end))
    piano.control_changes += [pretty_midi.ControlChange(64, value, at) for at, value in ((0.3, 127), (3.0, 0))]
    midi.instruments.append(piano)
    midi.write(str(tmp_path / "pedal.mid"))
    (track,) = read_performance(tmp_path / "pedal.mid").tracks
    found = sorted((note.pitch, round(note.start / 960, 2), round(note.end / 960, 2)) for note in track.notes)
    assert found == [(60, 0.0, 2.0), (60, 2.0, 3.0), (64, 0.2, 3.0), (67, 3.5, 3.8)]
