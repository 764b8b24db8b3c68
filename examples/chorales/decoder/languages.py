"""What the decoder's tokens mean: chorales on a 16th grid, or piano performances as MIDI events.

A language has `size` token ids, among them PAD, START and END, and a `unit`: windows begin at a multiple of so many
tokens, so that absolute positions can tell the voices of a chorale apart.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from ..data.files import SILENT, VOICES
from ..terminal import printable

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
            ValueError: the file is no MIDI file, or holds no notes but drums'; the message names it.
        """
        score = read_performance(path)
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
    """A MIDI file as a symusic Score of one piano track at tempo 120, times as they were, pedalled notes held."""
    import symusic

    try:
        score: Any = symusic.Score.from_midi(Path(path).read_bytes())  # its type lacks most of its methods
        score = score.to("second")
    except Exception as error:  # symusic raises whatever its parser met
        raise ValueError(f"{printable(path)}: cannot be read as MIDI ({error})") from error
    tracks = [track for track in score.tracks if not track.is_drum and len(track.notes)]
    if not tracks:
        raise ValueError(f"{printable(path)}: holds no notes (drums do not count)")
    notes = [note for track in tracks for note in _pedalled(track)]
    performance: Any = symusic.Score(_TICKS_PER_SECOND // 2)
    performance.tempos.append(symusic.Tempo(0, 120))
    piano: Any = symusic.Track("piano", program=0)
    for start, end, pitch, velocity in sorted(notes):
        tick = round(start * _TICKS_PER_SECOND)
        piano.notes.append(symusic.Note(tick, max(1, round(end * _TICKS_PER_SECOND) - tick), pitch, velocity))
    performance.tracks.append(piano)
    return performance


def _pedalled(track) -> list[tuple[float, float, int, int]]:
    """Notes (start, end, pitch, velocity) in seconds: held while the pedal is down, until their key is struck again."""
    notes = sorted((note.start, note.end, note.pitch, note.velocity) for note in track.notes)
    changes = sorted((control.time, control.value >= 64) for control in track.controls if control.number == 64)
    if not changes:
        return notes
    times = np.array([time for time, _ in changes])
    # For each change, when the pedal next comes up: the change itself where it is one that lifts.
    last = max(end for _, end, _, _ in notes)
    lifted, following = [0.0] * len(changes), max(last, times[-1])
    for index in range(len(changes) - 1, -1, -1):
        if not changes[index][1]:
            following = changes[index][0]
        lifted[index] = following
    struck: dict[int, float] = {}  # when each key is next struck
    held = []
    for start, end, pitch, velocity in reversed(notes):
        latest = int(np.searchsorted(times, end, side="right")) - 1
        if latest >= 0 and changes[latest][1]:
            end = max(end, min(lifted[latest], struck.get(pitch, np.inf)))
        struck[pitch] = start
        held.append((start, end, pitch, velocity))
    return held[::-1]
