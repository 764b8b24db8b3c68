"""What the decoder's tokens mean: chorales on a 16th grid, or piano performances as MIDI events.

A language has `size` token ids, among them PAD, START and END, and a `unit`: windows begin at a multiple of so many
tokens, so that absolute positions can tell the voices of a chorale apart.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from ..data.files import SILENT, VOICES
from .midi_files import named, read_notes

PAD, START, END = range(3)
TOKENIZER_FILE = "tokenizer.json"


class ChoraleLanguage:
    """Four tokens per 16th, soprano, alto, tenor, bass: a MIDI pitch or a rest, as in Music Transformer's chorales.

    A note is repeated for as long as it sounds; a repeated note and a held one are the same.
    """

    name = "chorale"
    unit = len(VOICES)
    rest = 3
    first_pitch = 4
    size = first_pitch + 128

    def encode(self, grid: np.ndarray) -> np.ndarray:
        """Ids (4 T,) of a grid (T, 4) of MIDI pitches, `SILENT` where a voice rests; without START and END."""
        return np.where(grid == SILENT, self.rest, grid + self.first_pitch).ravel().astype(np.int16)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """The grid (T, 4) of ids; START, END and padding are dropped, and so are notes of an unfinished last step."""
        ids = np.asarray(ids)
        ids = ids[ids >= self.rest]
        ids = ids[: len(ids) // self.unit * self.unit].reshape(-1, self.unit)
        return np.where(ids == self.rest, SILENT, ids - self.first_pitch).astype(np.int16)

    def transposition(self, semitones: int) -> np.ndarray:
        """(size,): the id that each token becomes, -1 where that is no MIDI pitch."""
        table = np.arange(self.size)
        moved = table + semitones
        table[self.first_pitch :] = np.where((moved >= self.first_pitch) & (moved < self.size), moved, -1)[
            self.first_pitch :
        ]
        return table

    def save(self, folder: Path) -> None:
        """Nothing: this class is the whole language."""


class MidiLanguage:
    """Piano performances as events in time, as in Music Transformer: note on, note off, velocity, time shift.

    By miditok's MIDILike tokenizer, time shifts from 10 ms to 1 s. All instruments but drums are played by one piano,
    the sustain pedal by holding notes longer; tempo is in the time shifts.
    """

    name = "midi"
    unit = 1

    def __init__(self, tokenizer_file: str | os.PathLike | None = None):
        try:
            import miditok
        except ModuleNotFoundError:
            raise ModuleNotFoundError('MIDI folders need miditok: pip install "relattn[music]"') from None
        if tokenizer_file is None:
            config = miditok.TokenizerConfig(
                pitch_range=(0, 127),
                beat_res={(0, 2): 50},  # the tempo is set to 120: a beat is half a second
                num_velocities=32,
                special_tokens=["PAD", "BOS", "EOS"],  # ids PAD, START, END
                use_time_signatures=False,
                use_pitchdrum_tokens=False,
            )
            self.tokenizer = miditok.MIDILike(config)
        else:
            self.tokenizer = miditok.MIDILike(params=Path(tokenizer_file))
        self.size = len(self.tokenizer)

    def encode(self, path: str | os.PathLike) -> np.ndarray:
        """Ids (N,) of a MIDI file, without START and END.

        Raises:
            OSError: the file cannot be opened.
            ValueError: it cannot be read faithfully, or holds no notes but drums'; the message names it.
        """
        score = read_performance(path)
        with named(path):
            (track,) = self.tokenizer(score)
        return np.array(track.ids, dtype=np.int16)

    def decode(self, ids: np.ndarray):
        """A symusic Score of ids; START, END and padding are dropped."""
        ids = np.asarray(ids)
        return self.tokenizer.decode([ids[ids > END].tolist()])

    def transposition(self, semitones: int) -> np.ndarray:
        """(size,): the id that each token becomes, -1 where that is no MIDI pitch."""
        table = np.arange(self.size)
        for name, index in self.tokenizer.vocab.items():
            kind, _, value = name.partition("_")
            if kind in ("NoteOn", "NoteOff"):
                table[index] = self.tokenizer.vocab.get(f"{kind}_{int(value) + semitones}", -1)
        return table

    def pitches(self) -> np.ndarray:
        """(size,): the MIDI pitch of each token that starts a note, else -1."""
        pitch = np.full(self.size, -1)
        for name, index in self.tokenizer.vocab.items():
            if name.startswith("NoteOn_"):
                pitch[index] = int(name.removeprefix("NoteOn_"))
        return pitch

    def save(self, folder: Path) -> None:
        """Write what `load_language` reads."""
        self.tokenizer.save(Path(folder) / TOKENIZER_FILE)


Language = ChoraleLanguage | MidiLanguage


def load_language(name: str, folder: str | os.PathLike) -> Language:
    """The language of a model that was saved in `folder`."""
    if name == ChoraleLanguage.name:
        return ChoraleLanguage()
    if name == MidiLanguage.name:
        return MidiLanguage(Path(folder) / TOKENIZER_FILE)
    raise ValueError(f"{folder}: its config.json names the language {name!r}, expected chorale or midi")


_TICKS_PER_SECOND = 960  # 480 per beat at tempo 120


def read_performance(path: str | os.PathLike) -> Any:
    """A MIDI file as a symusic Score of one piano track at tempo 120, times as they were, pedalled notes held.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it cannot be read faithfully, or holds no notes but drums'; the message names it.
    """
    import symusic

    midi = read_notes(path, pedal=True)
    performance: Any = symusic.Score(_TICKS_PER_SECOND // 2)
    performance.tempos.append(symusic.Tempo(0, 120))
    piano: Any = symusic.Track("piano", program=0)
    with named(path):
        ticks = np.round(midi.seconds() * _TICKS_PER_SECOND).astype(np.int64).tolist()
        for (start, end), note in zip(ticks, midi.notes, strict=True):
            piano.notes.append(symusic.Note(start, max(1, end - start), note.pitch, note.velocity))
    performance.tracks.append(piano)
    return performance
