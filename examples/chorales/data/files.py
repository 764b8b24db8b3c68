"""Readers of the classic JSB Chorales files: JSON, npz and pickle, none of which may run code.

Every reader returns `Splits`: {"train", "valid", "test"} -> list of pieces, a piece being an int16 array (T, 4) of MIDI
pitches, columns soprano, alto, tenor, bass, with `SILENT` where a voice has no note.
"""

import itertools
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .safe_pickle import load_pickle

SPLITS = ("train", "valid", "test")
VOICES = ("soprano", "alto", "tenor", "bass")
SILENT = -1

Splits = dict[str, list[np.ndarray]]


def _read_json(path: Path) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _read_npz(path: Path) -> dict[str, Any]:
    """The members of an npz archive; object arrays, which numpy stores as pickles, pass the restricted unpickler."""
    members = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as file:
                version = np.lib.format.read_magic(file)
                read_header = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }.get(version)
                if read_header is None:
                    raise ValueError(f"member {name} has the unsupported npy version {version}")
                _, _, dtype = read_header(file)
                key = name.removesuffix(".npy")
                if dtype.hasobject:
                    members[key] = load_pickle(file.read())
                else:
                    with archive.open(name) as plain:
                        members[key] = np.lib.format.read_array(plain, allow_pickle=False)
    return members


def _read_pickle(path: Path) -> Any:
    return load_pickle(path.read_bytes())


_READERS = {".json": _read_json, ".npz": _read_npz, ".pkl": _read_pickle, ".pickle": _read_pickle}


def load_file(path: str | os.PathLike) -> Splits:
    """Read one of the classic files, chosen by its suffix (.json, .npz, .pkl, .pickle).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the suffix is unknown, the file is garbled, or it holds something else; the message names the path.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--data {path}: no such file")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"--data {path}: unknown suffix {path.suffix!r}, accepted: {', '.join(_READERS)}")
    try:
        return _normalise(reader(path))
    # A garbled pickle or archive can raise nearly anything from inside the parser; all of it means the same here.
    except Exception as error:
        detail = str(error) or type(error).__name__
        raise ValueError(f"--data {path}: cannot be read as JSB chorales ({detail})") from error


def _normalise(raw: Any) -> Splits:
    """Turn {"train": pieces, ...} with steps of zero to four pitches (or a scalar), rests among them, into `Splits`."""
    if not isinstance(raw, dict):
        raise ValueError(f"expected a mapping with the keys {', '.join(SPLITS)}, got {type(raw).__name__}")
    missing = [name for name in SPLITS if name not in raw]
    if missing:
        raise ValueError(f"missing splits: {', '.join(missing)}; found: {', '.join(map(str, raw)) or 'none'}")
    return {
        name: [_piece_to_grid(piece, f"{name}[{index}]") for index, piece in enumerate(raw[name])] for name in SPLITS
    }


def _pitches(step: Any, where: str) -> list[int]:
    """One time step as four voices (SILENT where one rests) or as the list of its sounding pitches, in the file's order.

    Rests are NaN, 0 or -1, as arrays are padded: no voice sings pitch 0, which is five octaves below middle C.
    """
    values = [float(value) for value in np.atleast_1d(np.asarray(step, dtype=float)).ravel()]
    if len(values) > len(VOICES):
        raise ValueError(f"{where}: expected at most {len(VOICES)} pitches, got {len(values)}")
    pitches = [SILENT if value != value or value in (0, -1) else int(value) for value in values]
    for pitch, value in zip(pitches, values, strict=True):
        if pitch != SILENT and not (0 < pitch <= 127 and pitch == value):
            raise ValueError(f"{where}: {value} is not a MIDI pitch")
    return pitches if len(pitches) == len(VOICES) else [pitch for pitch in pitches if pitch != SILENT]


def _piece_to_grid(piece: Any, where: str) -> np.ndarray:
    """Array (T, 4) of one piece."""
    if isinstance(piece, (str, bytes)) or not (isinstance(piece, (Sequence, np.ndarray)) and len(piece)):
        raise ValueError(f"{where}: expected a non-empty list of time steps, got {type(piece).__name__}")
    return fit_voices([_pitches(step, f"{where}[{time}]") for time, step in enumerate(piece)])


def fit_voices(steps: list[list[int]]) -> np.ndarray:
    """Array (T, 4) of steps of up to four pitches each, from high to low; where some lack, the nearest voices sing."""
    grid = np.full((len(steps), len(VOICES)), SILENT, dtype=np.int16)
    full = [time for time, step in enumerate(steps) if len(step) == len(VOICES)]
    grid[full] = [steps[time] for time in full] if full else grid[full]
    # Where each voice last was; before the first full step, where it first will be.
    last = next((grid[time].copy() for time in full if (grid[time] != SILENT).all()), np.array([71, 66, 60, 51]))
    for time, step in enumerate(steps):
        if len(step) < len(VOICES):
            grid[time, _nearest_voices(step, last)] = step
        sounding = grid[time] != SILENT
        last[sounding] = grid[time, sounding]
    return grid


def _nearest_voices(pitches: list[int], last: np.ndarray) -> list[int]:
    """Which voices sing `pitches` (fewer than four, in voice order): the choice that moves them least from `last`."""
    choices = itertools.combinations(range(len(VOICES)), len(pitches))
    return list(min(choices, key=lambda voices: np.abs(last[list(voices)] - pitches).sum()))
