"""Music as sequences for a decoder: pieces, windows of them, batches to predict the next token from."""

import csv
import hashlib
import json
import os
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..data.corpus import cache_path, load_corpus, read_split
from ..data.files import SPLITS, load_file
from ..data.tokens import IGNORED, EpochItems
from ..storage import cached
from ..terminal import printable, progress_bar
from .languages import END, PAD, START, ChoraleLanguage, Language, MidiLanguage

_MAESTRO_SPLITS = {"train": "train", "validation": "valid", "test": "test"}
_SPLIT_FOLDERS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "dev": "valid", "test": "test"}
_MIDI_CACHE_FORMAT = 2  # raise it whenever MIDI files become other tokens


@dataclass
class Pieces:
    """All pieces of a split, one after the other: ids (N,), piece p being ids bounds[p] to bounds[p + 1] with START and
    END; names, where each comes from."""

    ids: np.ndarray
    bounds: np.ndarray
    names: list[str]

    @classmethod
    def join(cls, pieces: list[np.ndarray], names: list[str]) -> "Pieces":
        framed = [np.concatenate([[START], piece, [END]]) for piece in pieces]
        bounds = np.cumsum([0] + [len(piece) for piece in framed])
        return cls(np.concatenate([*framed, np.zeros(0, np.int16)]).astype(np.int16), bounds, names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> np.ndarray:
        """Ids of one piece, START and END among them."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.ids[self.bounds[index] : self.bounds[index + 1]]


@dataclass
class Music:
    """Pieces of the three splits in one language; left_out, files that could not be read faithfully, and why."""

    language: Language
    splits: dict[str, Pieces]
    left_out: dict[str, str] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """Short hash of all tokens: two runs with the same one heard the same music."""
        digest = hashlib.sha256()
        for name in SPLITS:
            for array in (self.splits[name].ids, self.splits[name].bounds):
                digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return digest.hexdigest()[:16]


def load_music(data: str | os.PathLike | None = None, midi: str | os.PathLike | None = None) -> Music:
    """Chorales from music21's corpus, or from the classic file `data`; or the MIDI files in the folder `midi`."""
    if data is not None and midi is not None:
        raise ValueError(f"--midi {midi}: expected nothing beside --data {data}")
    music = load_midi_folder(Path(midi)) if midi is not None else load_chorales(data)
    for name, pieces in music.splits.items():
        if not len(pieces):
            given = f"--midi {midi}" if midi is not None else f"--data {data}"
            raise ValueError(f"{given}: no pieces in {name}")
    return music


def load_chorales(path: str | os.PathLike | None = None) -> Music:
    """The chorales as the decoder reads them."""
    language = ChoraleLanguage()
    splits = load_corpus() if path is None else load_file(path)
    names: dict[str, list[str]] = {name: [f"{name}[{index}]" for index in range(len(splits[name]))] for name in SPLITS}
    if path is None:
        rows = read_split()
        names = {name: [file.removesuffix(".mxl") for split, _, file, _ in rows if split == name] for name in SPLITS}
    pieces = {name: [language.encode(grid) for grid in splits[name]] for name in SPLITS}
    return Music(language, {name: Pieces.join(pieces[name], names[name]) for name in SPLITS})


# ---- folders of MIDI files ----


def midi_splits(folder: Path) -> dict[str, list[Path]]:
    """The MIDI files below `folder`, by split: as a MAESTRO table (maestro-*.csv) in it says; else as its subfolders
    train, valid (or val, validation, dev) and test do; else a tenth for validation and a tenth for the test, by a hash
    of the names. A line says which it was.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the table cannot be read, or there are fewer than three files.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--midi {folder}: no such folder")
    tables = sorted(folder.glob("maestro-*.csv"))
    if tables:
        return _maestro_splits(tables[-1])
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".mid", ".midi") and path.is_file())
    if len(found) < 3:
        raise ValueError(f"--midi {folder}: expected at least three .mid or .midi files, found {len(found)}")
    by_folder: dict[str, list[Path]] = {name: [] for name in SPLITS}
    for path in found:
        split = _SPLIT_FOLDERS.get(path.relative_to(folder).parts[0].lower())
        if split is not None:
            by_folder[split].append(path)
    if all(by_folder.values()):
        beside = len(found) - sum(map(len, by_folder.values()))
        _say_split("its subfolders train, valid and test", by_folder, f"; {beside} files beside them are left out" if beside else "")
        return by_folder
    order = sorted(found, key=lambda path: hashlib.sha256(os.fsencode(path.relative_to(folder).as_posix())).digest())
    tenth = max(1, len(found) // 10)
    splits = {
        "train": sorted(order[2 * tenth :]),
        "valid": sorted(order[:tenth]),
        "test": sorted(order[tenth : 2 * tenth]),
    }
    there = [name for name in SPLITS if by_folder[name]]
    lacking = [name for name in SPLITS if not by_folder[name]]
    ignored = f"; NOT by subfolders: there is one for {', '.join(there)}, but none for {', '.join(lacking)}" if there else ""
    _say_split("a hash of the files' names", splits, ignored)
    return splits


def _say_split(rule: str, splits: dict[str, list[Path]], more: str = "") -> None:
    counts = ", ".join(f"{len(splits[name])} {name}" for name in SPLITS)
    print(f"music: split by {rule}: {counts}{more}", file=sys.stderr)


def _maestro_splits(table: Path) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {name: [] for name in SPLITS}
    missing: list[Path] = []
    with open(table, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            split = _MAESTRO_SPLITS.get(row.get("split", ""))
            if split is None or not row.get("midi_filename"):
                raise ValueError(
                    f"--midi {table}: expected columns split (train, validation, test) and midi_filename, got {row}"
                )
            path = table.parent / row["midi_filename"]
            (splits[split] if path.is_file() else missing).append(path)
    if missing:
        print(f"music: {len(missing)} files of {table.name} are not there, the first is {printable(missing[0])}", file=sys.stderr)
    _say_split(table.name, splits)
    return splits


def load_midi_folder(folder: Path) -> Music:
    """The MIDI files of a folder as the decoder reads them; their tokens are cached beside the chorales."""
    language = MidiLanguage()
    splits = midi_splits(folder)
    digest = hashlib.sha256(f"{_MIDI_CACHE_FORMAT} {language.size}".encode())
    for name in SPLITS:
        for path in splits[name]:
            stat = path.stat()
            digest.update(os.fsencode(f"{name} {path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n"))
    cache = cache_path().with_name(f"midi-{digest.hexdigest()[:16]}.npz")
    music = cached(
        cache, "music", lambda path: _read_cache(path, language), lambda: _tokenize(language, splits, folder), _write_cache
    )
    for reason in music.left_out.values():
        print(f"music: left out: {reason}", file=sys.stderr)
    return music


def _write_cache(file: IO[bytes], music: Music) -> None:
    arrays: dict[str, Any] = {"left_out": np.array(json.dumps(music.left_out))}
    for name, pieces in music.splits.items():
        arrays |= {f"{name}_ids": pieces.ids, f"{name}_bounds": pieces.bounds, f"{name}_names": np.array(pieces.names, dtype=str)}
    np.savez_compressed(file, **arrays)


def _read_cache(path: Path, language: MidiLanguage) -> Music:
    """What `_write_cache` wrote; anything else raises an error of whatever kind."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # numpy reads no further than its arrays, and may miss their checksums
    if damaged is not None:
        raise ValueError(f"its part {damaged} is damaged")
    with np.load(path, allow_pickle=False) as stored:
        splits = {
            name: Pieces(stored[f"{name}_ids"], stored[f"{name}_bounds"], stored[f"{name}_names"].tolist()) for name in SPLITS
        }
        return Music(language, splits, json.loads(stored["left_out"].item()))


def _tokenize(language: MidiLanguage, splits: dict[str, list[Path]], folder: Path) -> Music:
    total = sum(map(len, splits.values()))
    joined: dict[str, Pieces] = {}
    left_out: dict[str, str] = {}
    with progress_bar(total=total, desc="reading MIDI") as bar:
        for name in SPLITS:
            pieces, names = [], []
            for path in splits[name]:
                piece = printable(Path(os.path.relpath(path, folder)).as_posix())
                try:
                    pieces.append(language.encode(path))
                    names.append(piece)
                except (OSError, ValueError) as error:
                    left_out[piece] = str(error)
                bar.update()
            joined[name] = Pieces.join(pieces, names)
    return Music(language, joined, left_out)


# ---- windows and batches ----


class TrainingWindows(EpochItems):
    """Windows to train on.

    Every piece has one window for each `size` tokens begun. A window's place moves by up to half a window from epoch to
    epoch, in multiples of the language's unit, but never past the ends of its piece.
    """

    def __init__(self, pieces: Pieces, size: int, unit: int, seed: int):
        self.pieces, self.size, self.unit, self.seed = pieces, size, unit, seed
        counts = -(-np.diff(pieces.bounds) // size)
        self.piece = np.repeat(np.arange(len(counts)), counts)
        first = np.cumsum(counts) - counts
        self.place = size * (np.arange(counts.sum()) - first[self.piece])

    def __len__(self) -> int:
        return len(self.piece)

    def cut(self, epoch: int, index: int) -> tuple[np.ndarray, np.random.Generator]:
        """Up to size + 1 ids (inputs and the token behind them), and the window's random numbers.

        They depend on seed, epoch and index alone: not on batches, processes, or where a run was interrupted.
        """
        rng = np.random.default_rng([self.seed, epoch, index])
        first, end = self.pieces.bounds[self.piece[index] : self.piece[index] + 2]
        latest = -(-max(0, end - first - self.size - 1) // self.unit)
        place = (self.place[index] + rng.integers(-self.size // 2, self.size // 2 + 1)) // self.unit
        start = first + self.unit * min(max(place, 0), latest)
        return self.pieces.ids[start : min(end, start + self.size + 1)], rng


class ScoredWindows(EpochItems):
    """Windows that together predict every token of every piece once, from at least half a window before it."""

    def __init__(self, pieces: Pieces, size: int, unit: int):
        self.pieces, self.size = pieces, size
        stride = max(unit, size // 2 // unit * unit)
        self.windows = []  # (start, tokens at its beginning that an earlier window has predicted)
        for first, end in zip(pieces.bounds[:-1], pieces.bounds[1:], strict=True):
            predicted = first + 1
            for start in range(first, end, stride):
                if predicted >= end:
                    break
                self.windows.append((start, end, predicted))
                predicted = min(end, start + size + 1)

    def __len__(self) -> int:
        return len(self.windows)

    def cut(self, index: int) -> tuple[np.ndarray, int]:
        """Up to size + 1 ids, and how many of them (beside the first) an earlier window has predicted."""
        start, end, predicted = self.windows[index]
        return self.pieces.ids[start : min(end, start + self.size + 1)], predicted - start - 1


def _batch(rows: list[np.ndarray], already: list[int], size: int, scored_only: bool) -> dict:
    """Inputs (B, size) and, for each, the token to be predicted behind it."""
    import torch

    ids = np.full((len(rows), size + 1), PAD, dtype=np.int64)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    inputs, labels = ids[:, :-1], ids[:, 1:].copy()
    unscored = labels == PAD
    if scored_only:
        unscored |= labels <= END
        unscored |= np.arange(size) < np.array(already)[:, None]
    labels[unscored] = IGNORED
    input_ids = torch.from_numpy(inputs.copy())
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long(), "labels": torch.from_numpy(labels)}


class TrainingCollator:
    """Turns items of `TrainingWindows` into a batch, each window transposed by up to `transpose` semitones.

    A window keeps to the tokens of the training set: transpositions that leave them are not drawn.
    """

    def __init__(self, windows: TrainingWindows, language: Language, transpose: int):
        self.windows = windows
        tables = np.stack([language.transposition(shift) for shift in range(-transpose, transpose + 1)])
        seen = np.zeros(language.size + 1, dtype=bool)  # the last stands for -1
        seen[np.unique(windows.pieces.ids)] = True
        self.tables = np.where(seen[tables], tables, -1)

    def __call__(self, items: list[tuple[int, int]]) -> dict:
        rows = []
        for epoch, index in items:
            ids, rng = self.windows.cut(epoch, index)
            moved = self.tables[:, ids]
            possible = np.flatnonzero((moved >= 0).all(axis=1))  # no transposition always is
            rows.append(moved[possible[rng.integers(len(possible))]])
        return _batch(rows, [0] * len(rows), self.windows.size, scored_only=False)


class ScoredCollator:
    """Turns items (0, index) of `ScoredWindows` into a batch whose labels are the notes to be scored."""

    def __init__(self, windows: ScoredWindows):
        self.windows = windows

    def __call__(self, items: list[tuple[int, int]]) -> dict:
        rows, already = zip(*(self.windows.cut(index) for _, index in items), strict=True)
        return _batch(list(rows), list(already), self.windows.size, scored_only=True)
