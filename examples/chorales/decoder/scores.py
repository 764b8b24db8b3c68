"""Melodies read from MIDI and MusicXML, and chorales written as MusicXML."""

import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..data.corpus import STEPS_PER_QUARTER
from ..data.files import SILENT, VOICES
from ..storage import atomic_write
from ..terminal import printable
from .midi_files import named, read_notes

MIDI, MUSICXML = (".mid", ".midi"), (".xml", ".musicxml", ".mxl")


def read_melody(path: str | os.PathLike) -> np.ndarray:
    """Pitches (T,), one per 16th, `SILENT` where the melody rests: the highest notes of a MIDI file, or of the first part of a
    score in MusicXML, whose repeats are not played.

    Notes begin and end at the nearest 16th and last one at least. Silence before the first note is cut to less than a quarter,
    so that quarters remain quarters.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its name ends otherwise, it cannot be read, or holds no notes; the message names it.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in MIDI + MUSICXML:
        raise ValueError(f"{printable(path)}: expected a name that ends in {', '.join(MIDI + MUSICXML)}, got {path.suffix!r}")
    if not path.is_file():
        raise FileNotFoundError(f"{printable(path)}: no such file")
    notes = _midi_notes(path) if kind in MIDI else _musicxml_notes(path)
    # In the order of their starts: where two notes overlap at one pitch's end, the higher one is the melody anyway.
    steps = [(round(start * STEPS_PER_QUARTER), round(end * STEPS_PER_QUARTER), pitch) for start, end, pitch in notes]
    melody = np.full(max(max(end, start + 1) for start, end, _ in steps), SILENT, dtype=np.int16)
    for start, end, pitch in steps:
        span = melody[start : max(end, start + 1)]
        np.maximum(span, pitch, out=span)
    return melody[np.flatnonzero(melody != SILENT)[0] // STEPS_PER_QUARTER * STEPS_PER_QUARTER :]


def _midi_notes(path: Path) -> list[tuple[float, float, int]]:
    """(start, end, pitch) in quarters."""
    midi = read_notes(path, pedal=False)
    with named(path):
        beats = midi.beats().tolist()
    return [(start, end, note.pitch) for (start, end), note in zip(beats, midi.notes, strict=True)]


def _musicxml_notes(path: Path) -> list[tuple[float, float, int]]:
    """(start, end, pitch) in quarters."""
    from music21 import converter, harmony

    try:
        score: Any = converter.parse(str(path), forceSource=True)
        part = score.parts[0] if score.hasPartLikeStreams() else score
        sounding = [note for note in part.flatten().notes if not isinstance(note, harmony.ChordSymbol)]
        notes = [
            (float(note.offset), float(note.offset + note.quarterLength), max(pitch.midi for pitch in note.pitches))
            for note in sounding
            if note.pitches and note.quarterLength > 0  # grace notes last no time, drums have no pitch
        ]
    except Exception as error:  # parsers raise whatever they met
        raise ValueError(f"{printable(path)}: cannot be read as MusicXML ({error or type(error).__name__})") from error
    if not notes:
        raise ValueError(f"{printable(path)}: holds no notes")
    return notes


def write_musicxml(path: Path, grid: np.ndarray, title: str) -> None:
    """Write a grid (T, 4) as a score of four parts in 4/4; as everywhere here, repeated notes are one held note."""
    from music21 import clef, layout, metadata, note, stream

    score: Any = stream.Score()
    score.metadata = metadata.Metadata()
    score.metadata.title = score.metadata.movementName = title
    for voice, name in enumerate(VOICES):
        part = stream.Part(id=name)
        part.partName = name.capitalize()
        part.append((clef.BassClef if name == "bass" else clef.Treble8vbClef if name == "tenor" else clef.TrebleClef)())
        line = grid[:, voice].astype(int)
        bounds = np.append(np.flatnonzero(np.diff(line, prepend=SILENT - 1)), len(line))
        for start, stop in itertools.pairwise(bounds.tolist()):
            element = note.Rest() if line[start] == SILENT else note.Note(int(line[start]))
            element.quarterLength = (stop - start) / STEPS_PER_QUARTER
            part.append(element)
        score.append(part)
    score.insert(0, layout.StaffGroup(list(score.parts), symbol="bracket"))
    with tempfile.TemporaryDirectory() as folder:  # music21 writes to names, not to files
        written = Path(score.write("musicxml", fp=str(Path(folder) / "score.musicxml")))
        with atomic_write(path, "wb") as file:
            file.write(written.read_bytes())
