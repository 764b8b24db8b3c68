"""Measures of four-part writing: by hand, and against music21's own voice leading and chords."""

from itertools import combinations

import numpy as np
import pytest

from examples.chorales.data.files import SILENT
from examples.chorales.decoder import measures
from tests.chorales.helpers import require

require("matplotlib")
C_MAJOR, G_MAJOR, D_MAJOR = [76, 67, 60, 48], [74, 67, 59, 55], [74, 69, 66, 50]


def grid(*chords, steps=4):
    return np.repeat(np.array(chords, dtype=np.int16), steps, axis=0)


def test_a_parallel_fifth_and_a_parallel_octave_are_counted_where_they_are():
    # Tenor and bass C3-G3 to D3-A3: fifths. Soprano and bass C5-C3 to D5-D3: octaves. Alto stays.
    music = grid([72, 64, 55, 48], [74, 64, 57, 50])
    fifths, octaves = measures.parallels(music, 7), measures.parallels(music, 0)
    pairs = list(combinations(range(4), 2))
    assert np.argwhere(fifths).tolist() == [[3, pairs.index((2, 3))]]
    assert np.argwhere(octaves).tolist() == [[3, pairs.index((0, 3))]]


def test_held_repeated_and_silent_voices_make_no_parallels():
    assert not measures.parallels(grid([72, 64, 55, 48], [72, 64, 55, 48]), 7).any()
    assert not measures.parallels(grid([72, 64, 55, 48], [72, 64, 57, 48]), 7).any()
    assert not measures.parallels(grid([72, 64, 55, 48], [72, 64, 57, SILENT], [72, 64, 57, 50]), 7).any()
    # -1 and 6 are seven semitones apart, and so are -1 and 18.
    assert not measures.parallels(grid([6, 64, 50, SILENT], [18, 64, 50, SILENT]), 7).any()


def test_parallels_are_those_of_music21():
    """All six pairs of voices of every step asked of music21 one by one. White keys: music21 goes by spelling."""
    require("music21")
    from music21 import note, voiceLeading

    rng = np.random.default_rng(0)
    white = np.array([pitch for pitch in range(36, 84) if pitch % 12 in (0, 2, 4, 5, 7, 9, 11)])
    degrees = rng.integers(0, len(white) - 4, (30, 4))
    degrees[::2, 3] = np.maximum(degrees[::2, 0] - rng.choice([4, 7, 11], 15), 0)
    degrees[1::2] = degrees[::2] + rng.integers(-2, 3, (15, 1))  # many that move in parallel
    music = white[np.clip(degrees, 0, len(white) - 1)]
    want = np.zeros((2, len(music) - 1, 6), dtype=bool)
    for step in range(len(music) - 1):
        for pair, (high, low) in enumerate(combinations(range(4), 2)):
            notes = [note.Note(int(music[step + later, voice])) for voice in (high, low) for later in (0, 1)]
            quartet = voiceLeading.VoiceLeadingQuartet(*notes)
            want[0, step, pair] = quartet.parallelFifth()
            want[1, step, pair] = quartet.parallelOctave() or quartet.parallelUnison()
    np.testing.assert_array_equal(measures.parallels(music, 7), want[0])
    # It tells unisons from octaves, which we do not: one after the other counts for us alone.
    interval = [np.abs(music[:, high] - music[:, low]) for high, low in combinations(range(4), 2)]
    unison = np.stack([(column[:-1] == 0) != (column[1:] == 0) for column in interval], axis=1)
    np.testing.assert_array_equal(measures.parallels(music, 0) & ~unison, want[1] & ~unison)
    assert want.sum(axis=(1, 2)).min() >= 3


def test_crossings_by_hand():
    music = np.array([[72, 64, 55, 48], [72, 54, 55, 48], [72, SILENT, 75, 48], [72, 72, 55, 55]])
    assert measures.crossings(music).tolist() == [False, True, False, False]


def test_chords_are_those_of_music21():
    """All sets of three and of four pitch classes, by their names in Forte's list, which music21 knows."""
    require("music21")
    from music21 import chord

    triads = {"3-11A": "minor", "3-11B": "major"}
    sevenths = {
        "4-27B": "dominant", "4-20": "major", "4-26": "minor", "4-27A": "half diminished", "4-28": "diminished",
        "3-8A": "dominant without its fifth", "3-4A": "major without", "3-7A": "minor without", "3-10": "diminished triad",
    }  # fmt: skip
    for size in (3, 4):
        for classes in combinations(range(12), size):
            bits = sum(1 << pitch for pitch in classes)
            name = chord.Chord([60 + pitch for pitch in classes]).forteClassTn
            assert measures._IS_TRIAD[bits] == (name in triads), (classes, name)
            assert measures._IS_SEVENTH[bits] == (name in sevenths), (classes, name)
    # C E is a triad without its fifth, C G is none.
    assert [bool(measures._IS_TRIAD[bits]) for bits in (0b10001, 0b10000001)] == [True, False]


def test_counts_of_a_cadence_by_hand():
    """Quarter C major, quarter G major, half C major: a long chord reached by V-I; then D major, held for the last quarter."""
    music = np.concatenate([grid(C_MAJOR, G_MAJOR), grid(C_MAJOR, steps=8), grid(D_MAJOR)])
    counts = measures.count(music)
    assert measures.long_chords(music).tolist() == [8, 16]
    # G3 to C3 falls a fifth; C3 to D3 is a second.
    assert measures.authentic(music, np.array([8, 16])).tolist() == [True, False]
    assert counts["steps"] == counts["triads"] == 20
    assert counts["sevenths"] == counts["crossed"] == counts["out_of_range"] == 0
    assert (counts["long_chords"], counts["long_triads"], counts["authentic_cadences"]) == (2, 2, 1)
    assert (counts["lowest_bass"], counts["highest_soprano"]) == (48, 76)
    # From chord to chord 3, 3 and 4 voices move.
    assert counts["moves"] == 3 + 3 + 4


def test_counts_add_up_and_ranges_widen():
    one, other = grid(C_MAJOR, G_MAJOR), grid([79, 69, 66, 38])
    both = measures.total([one, other])
    assert both["steps"] == 12
    assert both["transitions"] == 7 + 3  # none from the one to the other
    assert both["out_of_range"] == 4  # the low D, for four steps
    assert (both["lowest_bass"], both["highest_soprano"]) == (38, 79)
    table = {row[0]: row[1] for row in measures.rows({"x": both})}
    assert table["notes outside their voice's range"] == "8.3%"
    assert table["range of the bass"] == "38-55"


def test_an_empty_and_a_silent_piece():
    for music in (np.zeros((0, 4), int), np.full((3, 4), SILENT)):
        assert measures.count(music)["steps"] == 0
        assert "-" in measures.describe({"nothing": measures.count(music)})
    with pytest.raises(ValueError, match="at least one piece"):
        measures.total([])
