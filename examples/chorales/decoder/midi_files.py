"""MIDI files as notes, from mido's events: what pedals hold, what ends notes, and which files are not to be believed.

symusic, which reads faster, knows pedals by track instead of by channel, drops notes that controllers end, and lets times
overflow.
"""

import contextlib
import io
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np

from ..terminal import printable

LONGEST_PAUSE = 60  # seconds in which no note begins or ends; beats of a chorale
_SHORTEST_BEAT = 0.01  # seconds, the step of our tokens
_DRUMS = 9  # their channel
_DEFAULT_TEMPO = 500_000  # microseconds per beat
_PORT, _END_OF_TRACK, _TEMPO = 0x21, 0x2F, 0x51  # kinds of meta messages
_PEDAL, _SOUND_OFF, _RESET, _NOTES_OFF = 64, 120, 121, range(123, 128)  # controllers; all modes after 123 end notes, too
_FRAMES = {24: 24.0, 25: 25.0, 29: 30_000 / 1001, 30: 30.0}  # per second, in SMPTE's time


class Note(NamedTuple):
    """Times in ticks."""

    start: int
    end: int
    pitch: int
    velocity: int
    track: int
    channel: int


@dataclass
class MidiNotes:
    """Notes of a file in the order of their starts; tempos, microseconds per beat from a tick on."""

    notes: list[Note]
    tempos: list[tuple[int, int]]
    division: int

    def beats(self) -> np.ndarray:
        """Starts and ends of the notes, (N, 2)."""
        if self.division <= 0:
            raise ValueError("it counts frames, not beats" if self.division else "a division of 0 ticks per beat")
        return _without_pauses(self._ticks() / self.division, "beats")

    def seconds(self) -> np.ndarray:
        """Starts and ends of the notes, (N, 2)."""
        ticks = self._ticks()
        if self.division < 0:
            frames, parts = -(self.division >> 8), self.division & 0xFF
            if frames not in _FRAMES or not parts:
                raise ValueError(f"a division of {frames} frames per second and {parts} ticks per frame")
            return _without_pauses(ticks / (_FRAMES[frames] * parts), "seconds")
        if not self.division:
            raise ValueError("a division of 0 ticks per beat")
        changes, tempos = np.array([(0, _DEFAULT_TEMPO), *self.tempos], dtype=np.int64).T
        beat = tempos / 1e6
        length = np.diff(changes, append=max(changes[-1], ticks.max(initial=0)))
        wrong = np.flatnonzero((beat < _SHORTEST_BEAT) & (length > 0) & (changes < ticks.max(initial=0)))
        if len(wrong):
            raise ValueError(f"a tempo of {tempos[wrong[0]]} microseconds per beat, from tick {changes[wrong[0]]} on")
        begin = np.append(0, np.cumsum(length[:-1] * beat[:-1])) / self.division
        tempo = np.searchsorted(changes, ticks, side="right") - 1
        return _without_pauses(begin[tempo] + (ticks - changes[tempo]) * beat[tempo] / self.division, "seconds")

    def _ticks(self) -> np.ndarray:
        return np.array([(note.start, note.end) for note in self.notes], dtype=np.int64).reshape(-1, 2)


def _without_pauses(times: np.ndarray, unit: str) -> np.ndarray:
    """The times, if no pause among them is so long that it must come from a damaged one."""
    moments = np.unique(np.append(times, 0))
    pauses = np.diff(moments)
    if pauses.max(initial=0) > LONGEST_PAUSE:
        raise ValueError(
            f"no note begins or ends for {pauses.max():,.0f} {unit} from {moments[pauses.argmax()]:,.0f} on; "
            f"more than {LONGEST_PAUSE} count as damage"
        )
    return times


@contextlib.contextmanager
def named(path: str | os.PathLike) -> Iterator[None]:
    """Whatever is raised about a file's content becomes a ValueError that names it."""
    try:
        yield
    except EOFError as error:
        raise ValueError(f"{printable(path)}: cannot be read as MIDI (it ends too early)") from error
    except Exception as error:  # parsers raise whatever they met
        raise ValueError(f"{printable(path)}: cannot be read as MIDI ({error or type(error).__name__})") from error


def read_notes(path: str | os.PathLike, pedal: bool) -> MidiNotes:
    """The notes of a MIDI file, but those of drums.

    Args:
        pedal: whether the sustain pedal holds them.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it cannot be read faithfully, or holds no notes; the message names it.
    """
    content = Path(path).read_bytes()
    with named(path):
        file = _parse(content)
        tempos, events = _events(file.tracks)
        notes = _play(events, pedal)
    if not notes:
        raise ValueError(f"{printable(path)}: holds no notes (drums do not count)")
    return MidiNotes(notes, tempos, file.ticks_per_beat)


def _parse(content: bytes) -> Any:
    """A mido.MidiFile whose meta messages are all of mido's unknown kind: most mean nothing to us, and need not make sense."""
    from mido import MidiFile, UnknownMetaMessage
    from mido.midifiles import midifiles

    stream = io.BytesIO(content)
    with patch.object(midifiles, "build_meta_message", UnknownMetaMessage):
        file = MidiFile(file=stream)
    if stream.read(4) == b"MTrk":
        raise ValueError(f"more tracks than the {len(file.tracks)} of its header")
    if file.type not in (0, 1) and not (file.type == 2 and len(file.tracks) == 1):
        raise ValueError(f"{len(file.tracks)} tracks of format {file.type}, which are not played together")
    return file


def _events(tracks: list) -> tuple[list[tuple[int, int]], list[tuple[int, int, int, Any]]]:
    """Tempos (tick, microseconds per beat), and what notes depend on (tick, track, port, message), in order of time."""
    tempos, events = [], []
    for index, track in enumerate(tracks):
        tick = port = 0
        for message in track:
            tick += message.time
            if message.type == "unknown_meta":
                if message.type_byte == _END_OF_TRACK:
                    break
                if message.type_byte == _TEMPO:  # of another length than 3 bytes it is none
                    tempos.append((tick, int.from_bytes(bytes(message.data), "big") if len(message.data) == 3 else 0))
                elif message.type_byte == _PORT and message.data:
                    port = message.data[0]
            elif message.type in ("note_on", "note_off", "control_change") and message.channel != _DRUMS:
                events.append((tick, index, port, message))
    # Stable: what happens at one tick keeps the order of the file, a pedal pressed and lifted for instance.
    return sorted(tempos, key=itemgetter(0)), sorted(events, key=itemgetter(0))


class _Key(NamedTuple):
    pitch: int
    start: int
    velocity: int
    track: int


@dataclass
class _Channel:
    """Keys that are down, those that sound on because of the pedal, and the pedal: of all tracks together."""

    pressed: list[_Key] = field(default_factory=list)
    held: list[_Key] = field(default_factory=list)
    pedal: bool = False

    def strike(self, key: _Key) -> list[_Key]:
        """Press a key; what stops to sound."""
        ended = [other for other in self.held if other.pitch == key.pitch]
        self.held = [other for other in self.held if other.pitch != key.pitch]
        self.pressed.append(key)
        return ended

    def release(self, pitch: int, track: int) -> list[_Key]:
        """Lift a key, of those of one pitch the first of its track; what stops to sound."""
        same = [key for key in self.pressed if key.pitch == pitch]
        if not same:
            return []
        key = next((key for key in same if key.track == track), same[0])
        self.pressed.remove(key)
        if self.pedal and len(same) == 1:  # else the string is struck anew already
            self.held.append(key)
            return []
        return [key]

    def control(self, number: int, value: int, pedal: bool) -> list[_Key]:
        """Change a controller; what stops to sound."""
        if number in (_PEDAL, _RESET):
            self.pedal = pedal and number == _PEDAL and value >= 64
            return [] if self.pedal else self._clear(self.held)
        if number == _SOUND_OFF:
            return self._clear(self.pressed) + self._clear(self.held)
        if number in _NOTES_OFF:
            return [ended for key in list(self.pressed) for ended in self.release(key.pitch, key.track)]
        return []

    @staticmethod
    def _clear(keys: list[_Key]) -> list[_Key]:
        ended = list(keys)
        keys.clear()
        return ended


def _play(events: Iterable[tuple[int, int, int, Any]], pedal: bool) -> list[Note]:
    """What sounds. Notes that nothing ends last until the last event."""
    channels: dict[tuple[int, int], _Channel] = defaultdict(_Channel)
    notes: list[Note] = []
    tick = 0

    def end(keys: list[_Key], channel: int) -> None:
        notes.extend(Note(key.start, tick, key.pitch, key.velocity, key.track, channel) for key in keys)

    for tick, track, port, message in events:
        channel = channels[port, message.channel]
        if message.type == "control_change":
            ended = channel.control(message.control, message.value, pedal)
        elif message.type == "note_on" and message.velocity:
            ended = channel.strike(_Key(message.note, tick, message.velocity, track))
        else:
            ended = channel.release(message.note, track)
        end(ended, message.channel)
    for (_, number), channel in channels.items():
        end(channel.control(_SOUND_OFF, 0, pedal), number)
    return sorted(notes)
