"""Bach chorales from music21's corpus on a 16th grid, in the classic split, parsed once and cached.

No score is shipped: `split.csv` holds facts only, namely which file of music21's corpus is which piece of the classic
JSB Chorales (229 / 76 / 77 pieces) and whether the classic version plays its repeats. Six classic pieces have no
counterpart (train 25, 68, 113, 170 and valid 35, 56), so the default corpus has 225 / 74 / 77 pieces. `train[224]` is
probably bwv253; the others are certain.

How the classic files were made was found by comparison, and is followed here: one step per 16th, a note repeated for as
long as it sounds, voices from soprano to bass, silent voices left out, the last chord held to the end of its bar.
Against the classic JSON, piece by piece, the median agreement of (step, voice) pitches is 99 %, its mean 93 %, and 90 %
of the pieces have the same length; some 30 pieces come from another edition (other metre, a few in another key).
"""

import csv
import hashlib
import io
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import IO

import numpy as np

from ..command import available_cores, require_packages
from ..storage import cached
from ..terminal import progress_bar
from .files import SILENT, SPLITS, VOICES, Splits

SPLIT_FILE = Path(__file__).parents[1] / "split.csv"
STEPS_PER_QUARTER = 4
CACHE_FORMAT = 1  # raise it whenever parsing changes: caches of another format are rebuilt
_GRID_TOLERANCE = 1e-3


def read_split() -> list[tuple[str, int, str, bool]]:
    """Rows (split, index in the classic files, file of music21's Bach corpus, play repeats) of the matched pieces."""
    with open(SPLIT_FILE, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    matched = [row for row in rows if row["music21_file"]]
    return [(row["split"], int(row["index"]), row["music21_file"], row["repeats"] == "1") for row in matched]


def parse_chorale(name: str, repeats: bool) -> np.ndarray:
    """Parse one file of music21's Bach corpus to int16 (T, 4) MIDI pitches, `SILENT` where a voice rests."""
    from music21 import corpus

    parts = _voice_parts(corpus.parse(f"bach/{name}").parts)
    if repeats:
        parts = [part.expandRepeats() for part in parts]
    last_bar = parts[0].getElementsByClass("Measure")[-1]
    end_of_bar = float(last_bar.offset) + float(last_bar.barDuration.quarterLength)
    end_of_notes = max(float(part.highestTime) for part in parts)
    length = round(end_of_notes * STEPS_PER_QUARTER)
    grid = np.full((length, len(VOICES)), SILENT, dtype=np.int16)
    for voice, part in enumerate(parts):
        for note in part.flatten().notes:
            # A note sounds at every grid point within [start, end).
            bounds = np.array([note.offset, note.offset + note.quarterLength], dtype=float) * STEPS_PER_QUARTER
            start, stop = np.ceil(bounds - _GRID_TOLERANCE).astype(int)
            grid[start:stop, voice] = max(pitch.midi for pitch in note.pitches)
    # With an upbeat the last bar is written short; the classic files hold its chord to the full bar.
    missing = round(end_of_bar * STEPS_PER_QUARTER) - length
    return np.concatenate([grid, np.repeat(grid[-1:], max(missing, 0), axis=0)])


def _voice_parts(parts: list) -> list:
    """The four singing parts, soprano to bass: by name where instruments double them, else the first four."""
    names = [(part.partName or str(part.id)).lower() for part in parts]
    chosen = [next((p for p, n in zip(parts, names, strict=True) if n.startswith(v)), None) for v in VOICES]
    return list(parts)[: len(VOICES)] if any(part is None for part in chosen) else chosen


def cache_path() -> Path:
    """The cache file: under RELATTN_CACHE, else XDG_CACHE_HOME/relattn, else ~/.cache/relattn."""
    folder = os.environ.get("RELATTN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "relattn")
    return Path(folder).expanduser() / "chorales-16th.bin"


def load_corpus(workers: int | None = None) -> Splits:
    """The default data: from the cache, or parsed with `workers` processes (None: one per core) and cached."""
    recipe = _recipe()
    return cached(
        cache_path(),
        "chorales",
        lambda path: read_cache(path, recipe),
        lambda: _parse_all(workers),
        lambda file, splits: write_cache(file, recipe, splits),
    )


def _recipe() -> str:
    """What a cache depends on: its format and the split."""
    return f"{CACHE_FORMAT}:{hashlib.sha256(json.dumps(read_split()).encode()).hexdigest()}"


def _parse_all(workers: int | None) -> Splits:
    require_packages(
        "the default chorales need", "chorales", "music21", "tqdm", instead="or give the classic file: --data PATH"
    )
    rows = read_split()
    # Processes are spawned, not forked: a fork after torch has started its threads can hang.
    with ProcessPoolExecutor(workers or available_cores(), mp_context=get_context("spawn")) as pool:
        names, repeats = zip(*[(name, repeats) for _, _, name, repeats in rows], strict=True)
        parsed = pool.map(parse_chorale, names, repeats, chunksize=4)
        grids = list(progress_bar(parsed, desc="parsing chorales", total=len(rows)))
    splits: Splits = {name: [] for name in SPLITS}
    for (split, *_), grid in zip(rows, grids, strict=True):
        splits[split].append(grid)
    return splits


def write_cache(file: IO[bytes], recipe: str, splits: Splits) -> None:
    """One JSON header line (recipe, checksum, lengths of pieces), then the pitches as int8, piece after piece."""
    body = io.BytesIO()
    for name in SPLITS:
        for grid in splits[name]:
            body.write(grid.astype(np.int8).tobytes())
    header = {
        "recipe": recipe,
        "sha256": hashlib.sha256(body.getvalue()).hexdigest(),
        "lengths": {name: [len(grid) for grid in splits[name]] for name in SPLITS},
    }
    file.write(json.dumps(header).encode() + b"\n" + body.getvalue())


def read_cache(path: Path, recipe: str) -> Splits:
    """Read what `write_cache` wrote; anything else is a ValueError that says what is wrong with it."""
    head, _, body = path.read_bytes().partition(b"\n")
    try:
        header = json.loads(head)
        found, checksum, lengths = header["recipe"], header["sha256"], header["lengths"]
        lengths = {name: [int(length) for length in lengths[name]] for name in SPLITS}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("its header is unreadable") from None
    if found != recipe:
        raise ValueError("it was written by another version")
    if hashlib.sha256(body).hexdigest() != checksum:
        raise ValueError("it is truncated or corrupt")
    flat = np.frombuffer(body, dtype=np.int8).astype(np.int16).reshape(-1, len(VOICES))
    ends = np.cumsum([length for name in SPLITS for length in lengths[name]])
    pieces = iter(np.split(flat, ends[:-1]))
    return {name: [next(pieces) for _ in lengths[name]] for name in SPLITS}
