"""Melodies from MIDI and MusicXML, and chorales as MusicXML: round trips, quantising, what is refused."""

# ruff: noqa: E402 (what cannot be imported is skipped first)

import numpy as np
import pytest

from tests.chorales.helpers import require

require("mido", "pretty_midi", "music21", "matplotlib")

import pretty_midi

from examples.chorales.data.files import SILENT
from examples.chorales.decoder.scores import read_melody, write_musicxml
from examples.chorales.decoder.sound import chorale_midi, write_midi

GRID = np.repeat([[72, 67, 64, 48], [74, 67, 62, SILENT], [SILENT, SILENT, SILENT, SILENT], [71, 67, 62, 43]], [4, 3, 5, 8], axis=0).astype(
    np.int16
)


def test_musicxml_has_the_music(tmp_path):
    from music21 import converter

    write_musicxml(tmp_path / "score.musicxml", GRID, "a title")
    score = converter.parse(tmp_path / "score.musicxml")
    assert score.metadata.bestTitle == "a title"
    assert [part.partName for part in score.parts] == ["Soprano", "Alto", "Tenor", "Bass"]
    read = np.full_like(GRID, SILENT)
    for voice, part in enumerate(score.parts):
        for note in part.flatten().notes:
            read[int(note.offset * 4) : int((note.offset + note.quarterLength) * 4), voice] = note.pitch.midi
    np.testing.assert_array_equal(read, GRID)
    np.testing.assert_array_equal(read_melody(tmp_path / "score.musicxml"), GRID[:, 0])


def test_a_chorale_in_midi_gives_its_soprano(tmp_path):
    write_midi(tmp_path / "chorale.mid", chorale_midi(GRID, 90))
    np.testing.assert_array_equal(read_melody(tmp_path / "chorale.mid"), GRID[:, 0])


def test_notes_go_to_the_nearest_16th_and_whole_quarters_of_silence_are_cut(tmp_path):
    midi = pretty_midi.PrettyMIDI(initial_tempo=60)  # a quarter is a second
    flute = pretty_midi.Instrument(73)
    # A bar and an eighth of silence; a note that begins late; one that is shorter than a 16th; one below the melody.
    for pitch, start, end in ((60, 4.5, 5.05), (62, 5.11, 6.0), (64, 6.0, 6.05), (50, 5.0, 6.0)):
        flute.notes.append(pretty_midi.Note(90, pitch, start, end))
    midi.instruments.append(flute)
    midi.write(str(tmp_path / "melody.midi"))
    assert read_melody(tmp_path / "melody.midi").tolist() == [SILENT] * 2 + [60] * 2 + [62] * 4 + [64]


def test_what_is_no_melody_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.mid: no such file"):
        read_melody(tmp_path / "missing.mid")
    (tmp_path / "melody.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"melody\.wav: expected a name that ends in .*, got '\.wav'"):
        read_melody(tmp_path / "melody.wav")
    for name, kind in (("broken.mid", "MIDI"), ("broken.musicxml", "MusicXML")):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(ValueError, match=rf"broken\.\w+: cannot be read as {kind}"):
            read_melody(tmp_path / name)
    from music21 import note, stream

    silent = stream.Score([stream.Part([note.Rest(4)])])
    silent.write("musicxml", fp=str(tmp_path / "silent.musicxml"))
    with pytest.raises(ValueError, match=r"silent\.musicxml: holds no notes"):
        read_melody(tmp_path / "silent.musicxml")
