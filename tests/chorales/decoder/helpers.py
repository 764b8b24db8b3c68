"""Shared by the decoder's tests: made-up music, and small trainings."""

import numpy as np

from examples.chorales.data.files import SILENT
from tests.chorales.helpers import module_command

SMALL = [
    "--preset=tiny", "--layers=1", "--width=16", "--window=64", "--max-relative-position=32", "--batch=8",
    "--learning-rate=1e-2", "--saved-precision=bf16",
]  # fmt: skip
LONGER = ["--positions=relative", "--epochs=12", "--evaluations=6"]


def command(data, out, *options):
    return module_command("train_decoder", "--data", data, "--out", out, *SMALL, *options)


def random_grid(length, seed=0):
    rng = np.random.default_rng(seed)
    grid = (np.array([72, 65, 58, 48]) + rng.integers(-4, 5, (length, 4))).astype(np.int16)
    grid[rng.random(grid.shape) < 0.05] = SILENT
    return grid


def performance(path, seed=0, notes=60, tempo=90.0, pedal=(), drums=False):
    """Write a MIDI file of made-up piano playing; returns its notes as (start, end, pitch, velocity) in seconds."""
    import pretty_midi

    rng = np.random.default_rng(seed)
    midi = pretty_midi.PrettyMIDI(initial_tempo=tempo)
    piano = pretty_midi.Instrument(0)
    free = np.zeros(128)  # when each key is up again
    start = 0.0
    for _ in range(notes):
        start += float(rng.uniform(0, 0.4))
        pitch = int(rng.integers(40, 80))
        if start > free[pitch]:
            free[pitch] = start + float(rng.uniform(0.1, 1.5))
            piano.notes.append(pretty_midi.Note(int(rng.integers(20, 120)), pitch, start, free[pitch]))
    piano.control_changes += [pretty_midi.ControlChange(64, value, at) for at, value in pedal]
    midi.instruments.append(piano)
    if drums:
        kit = pretty_midi.Instrument(0, is_drum=True)
        kit.notes.append(pretty_midi.Note(100, 36, 0.0, 0.1))
        midi.instruments.append(kit)
    midi.write(str(path))
    return sorted((note.start, note.end, note.pitch, note.velocity) for note in piano.notes)


def played(midi):
    return sorted((note.start, note.end, note.pitch, note.velocity) for part in midi.instruments for note in part.notes)


def by_pitch(notes):
    return np.array(sorted((pitch, start, end, velocity) for start, end, pitch, velocity in notes))
