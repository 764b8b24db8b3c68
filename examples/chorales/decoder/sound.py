"""Generated music as files: MIDI, a picture of its piano roll, and sound. And MIDI files as chorales."""

import io
import itertools
import os
import shutil
import subprocess
import tempfile
import wave
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..data.corpus import STEPS_PER_QUARTER
from ..data.files import SILENT, VOICES, fit_voices
from ..reporting import save_figure
from ..storage import atomic_write
from ..terminal import printable
from .midi_files import named, read_notes

_CHURCH_ORGAN = 19
_RATE = 44_100  # samples of sound per second
_GRID_TOLERANCE = 1e-3
_COLOURS = ("#d62728", "#ff7f0e", "#2ca02c", "#1f77b4")


def chorale_midi(grid: np.ndarray, beats_per_minute: float):
    """A PrettyMIDI with one organ per voice of a grid (T, 4); repeated pitches become one held note."""
    import pretty_midi

    midi = pretty_midi.PrettyMIDI(initial_tempo=beats_per_minute)
    seconds = 60 / beats_per_minute / STEPS_PER_QUARTER
    for voice, name in enumerate(VOICES):
        instrument = pretty_midi.Instrument(_CHURCH_ORGAN, name=name)
        line = grid[:, voice].astype(int)
        bounds = np.append(np.flatnonzero(np.diff(line, prepend=SILENT - 1)), len(line))
        for start, stop in itertools.pairwise(bounds):
            if line[start] != SILENT:
                instrument.notes.append(pretty_midi.Note(90, int(line[start]), start * seconds, stop * seconds))
        midi.instruments.append(instrument)
    return midi


def read_chorale(path: str | os.PathLike) -> np.ndarray:
    """The grid (T, 4) of a MIDI file: four tracks are the voices, soprano to bass; else notes are dealt out by height.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read faithfully, or holds no notes; the message names it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--prime {printable(path)}: no such file")
    try:
        midi = read_notes(path, pedal=False)
        with named(path):
            steps = np.ceil(midi.beats() * STEPS_PER_QUARTER - _GRID_TOLERANCE).astype(int).tolist()
    except ValueError as error:
        raise ValueError(f"--prime {error}") from error
    length = max(stop for _, stop in steps)
    # Neither tempo nor programs matter, nor other meta data: a voice is a channel of a track.
    parts = sorted({(note.track, note.channel) for note in midi.notes})
    if len(parts) == len(VOICES):
        grid = np.full((length, len(VOICES)), SILENT, dtype=np.int16)
        for note, (start, stop) in zip(midi.notes, steps, strict=True):
            grid[start:stop, parts.index((note.track, note.channel))] = note.pitch
    else:
        sounding: list[set[int]] = [set() for _ in range(length)]
        for note, (start, stop) in zip(midi.notes, steps, strict=True):
            for step in range(start, stop):
                sounding[step].add(note.pitch)
        grid = fit_voices([_four(pitches) for pitches in sounding])
    sounds = np.flatnonzero((grid != SILENT).any(axis=1))
    if not len(sounds):
        raise ValueError(f"--prime {printable(path)}: every note is shorter than a 16th and falls between two")
    return grid[sounds[0] :]


def _four(pitches: set[int]) -> list[int]:
    """From high to low, of more than four the three highest and the lowest."""
    ordered = sorted(pitches, reverse=True)
    return ordered if len(ordered) <= len(VOICES) else [*ordered[: len(VOICES) - 1], ordered[-1]]


def write_midi(path: Path, midi) -> None:
    """Write a PrettyMIDI."""
    with atomic_write(path, "wb") as file:
        midi.write(file)


def open_midi(data: bytes):
    """A PrettyMIDI of the content of a MIDI file."""
    import pretty_midi

    return pretty_midi.PrettyMIDI(io.BytesIO(data))


def draw_piano_roll(path: Path, midi, title: str, prime: float = 0.0, trained: float | None = None) -> None:
    """A picture of notes over time, a colour per instrument.

    Args:
        prime: seconds at the beginning that were given, not generated.
        trained: seconds after which the music is longer than the training windows were.
    """
    from matplotlib.figure import Figure

    end = max(midi.get_end_time(), 1.0)
    figure = Figure(figsize=(min(24, max(8, end / 4)), 4.5), layout="constrained")
    axes = figure.subplots()
    _draw_notes(axes, midi, end)
    if prime:
        axes.axvspan(0, prime, color="black", alpha=0.08, label="prime, given")
    if trained is not None and trained < end:
        axes.axvline(trained, color="black", linestyle=":", linewidth=1.2, label="end of the training length")
    axes.set(xlabel="seconds", title=title)
    axes.legend(
        fontsize="small",
        ncols=len(midi.instruments) + 2,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.12),
        frameon=False,
    )
    save_figure(figure, path, dpi=110)


def draw_piano_rolls(path: Path, midis: dict[str, Any], seconds: float, title: str) -> None:
    """The beginnings of several pieces on one picture, two in a row, with their names."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.6 * -(-len(midis) // 2) + 0.5), layout="constrained")
    for axes, (name, midi) in zip(figure.subplots(-(-len(midis) // 2), 2, squeeze=False).flat, midis.items(), strict=False):
        _draw_notes(axes, midi, seconds)
        axes.set_title(name, fontsize="small", loc="left")
        axes.tick_params(labelsize="small")
    figure.suptitle(title)
    save_figure(figure, path, dpi=80)


def _draw_notes(axes, midi, end: float) -> None:
    """Notes over time up to second `end`, a colour per instrument."""
    for index, instrument in enumerate(midi.instruments):
        bars = [(note.start, note.end - note.start) for note in instrument.notes]
        pitches = [note.pitch for note in instrument.notes]
        starts, widths = zip(*bars, strict=True) if bars else ((), ())
        gap = 0.02 * min(1.0, 8 / end)  # so that repeated notes are told apart
        axes.barh(
            pitches, [max(width - gap, gap) for width in widths], left=starts, height=0.8,
            color=_COLOURS[index % len(_COLOURS)], label=instrument.name or f"track {index + 1}",
        )  # fmt: skip
    octaves = range(0, 128, 12)
    axes.set_yticks(octaves, [f"C{pitch // 12 - 1}" for pitch in octaves])
    heights = [note.pitch for instrument in midi.instruments for note in instrument.notes] or [60]
    axes.set(xlim=(0, end), ylim=(min(heights) - 2, max(heights) + 2))
    axes.grid(axis="y", alpha=0.4)


def write_sound(path: Path, midi, midi_path: Path, soundfont: str | None = None) -> str:
    """Write a .wav and return what played it: fluidsynth, if it is installed and there is a soundfont, else sines.

    Args:
        midi, midi_path: the music, as a PrettyMIDI and as the file that fluidsynth reads.
        soundfont: a .sf2 file; default: the system's first, else the one that comes with pretty_midi.

    Raises:
        FileNotFoundError: `soundfont` is not there.
    """
    if soundfont is not None and not Path(soundfont).is_file():
        raise FileNotFoundError(f"--soundfont {soundfont}: no such file")
    program, font = shutil.which("fluidsynth"), soundfont or _find_soundfont()
    if program and font:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".sound-") as folder:
            output = Path(folder) / "sound.wav"
            command = [program, "-ni", "-q", "-g", "0.6", "-F", str(output), "-r", str(_RATE), font, str(midi_path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0 and output.is_file() and output.stat().st_size > 44:
                os.replace(output, path)
                return f"fluidsynth with {Path(font).name}"
    sound = midi.synthesize(fs=_RATE, wave=_organ)
    samples = (np.clip(0.9 * sound, -1, 1) * np.iinfo(np.int16).max).astype("<i2")
    with atomic_write(path, "wb") as file, wave.open(file, "wb") as recording:
        recording.setnchannels(1)
        recording.setsampwidth(2)
        recording.setframerate(_RATE)
        recording.writeframes(samples.tobytes())
    return "pretty_midi's sines"


def write_recording(path: Path, wav: Path, seconds: float) -> None:
    """Write the beginning of a .wav as a small .mp3: one channel, half the rate, faded out over its last two seconds."""
    import soundfile

    sound, rate = soundfile.read(wav, always_2d=True)
    mono = sound[: round(seconds * rate)].mean(axis=1)
    if len(mono) < len(sound):
        mono[-2 * rate :] *= np.linspace(1, 0, len(mono[-2 * rate :]))
    halved = mono[: len(mono) // 2 * 2].reshape(-1, 2).mean(axis=1)
    buffer = io.BytesIO()
    soundfile.write(buffer, halved, rate // 2, format="MP3", bitrate_mode="VARIABLE", compression_level=0.9)
    with atomic_write(path, "wb") as file:
        file.write(buffer.getvalue())


def _organ(phase: np.ndarray) -> np.ndarray:
    """A sine with some of its harmonics: a plain one is hard to listen to."""
    return np.sin(phase) + 0.5 * np.sin(2 * phase) + 0.25 * np.sin(3 * phase) + 0.12 * np.sin(4 * phase)


def _find_soundfont() -> str | None:
    folders = [Path("/usr/share/sounds/sf2"), Path("/usr/share/soundfonts")]
    spec = find_spec("pretty_midi")
    if spec is not None and spec.origin:
        folders.append(Path(spec.origin).parent)
    return next((str(font) for folder in folders if folder.is_dir() for font in sorted(folder.glob("*.sf2"))), None)
