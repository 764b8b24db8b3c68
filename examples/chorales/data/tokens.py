"""Chorales as tokens and windows, as in the seed notebook, in flat arrays.

A piece is the sequence [start, notes step by step, end]; a window is `size` tokens of one piece from every `stride`-th
token on, padded at the end. Nothing is copied per window: a window is an index, and `Windows.gather` cuts a batch.
"""

import hashlib
import os
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .files import SILENT, SPLITS, Splits, load_file

# The notebook's vocabulary: five specials, its start and end markers, then the pitches of the training set.
SPECIALS = ("<PAD>", "<MASK>", "<CLS>", "<SEP>", "<UNK>", "<start>", "<end>")
PAD, MASK, CLS, SEP, UNK, START, END = range(len(SPECIALS))
NOWHERE = -1  # step and voice of a token that is no note
IGNORED = -100  # label of a token that is not to be predicted


class Vocabulary:
    """Token ids of MIDI pitches: those of the training set have one each, any other pitch is UNK."""

    def __init__(self, pieces: list[np.ndarray]):
        pitches = np.unique(np.concatenate([piece.ravel() for piece in pieces]))
        self.pitches = pitches[pitches != SILENT].astype(int)
        self._id_of_pitch = np.full(128, UNK, dtype=np.int64)
        self._id_of_pitch[self.pitches] = np.arange(len(self.pitches)) + len(SPECIALS)

    def __len__(self) -> int:
        return len(SPECIALS) + len(self.pitches)

    def encode(self, pitches: np.ndarray) -> np.ndarray:
        """Ids of MIDI pitches, any shape."""
        return self._id_of_pitch[pitches]


class Batch(NamedTuple):
    """Windows cut from the pieces, all arrays (B, L) int64: ids, PAD behind the end; step and voice of each token
    (NOWHERE for start, end and padding)."""

    ids: np.ndarray
    step: np.ndarray
    voice: np.ndarray


@dataclass
class Tokens:
    """All pieces of a split, one after the other.

    ids, step, voice: (N,); `step` is the time step within the piece and `voice` 0 (soprano) to 3 (bass), both NOWHERE
    for start and end tokens. bounds: (pieces + 1,), piece p being tokens bounds[p] to bounds[p + 1].
    """

    ids: np.ndarray
    step: np.ndarray
    voice: np.ndarray
    bounds: np.ndarray

    @classmethod
    def from_pieces(cls, pieces: list[np.ndarray], vocabulary: Vocabulary) -> "Tokens":
        ids, steps, voices = [], [], []
        for piece in pieces:
            step, voice = np.nonzero(piece != SILENT)  # row-major: step by step, soprano first
            ids.append(np.concatenate([[START], vocabulary.encode(piece[step, voice]), [END]]))
            steps.append(np.pad(step, 1, constant_values=NOWHERE))
            voices.append(np.pad(voice, 1, constant_values=NOWHERE))
        bounds = np.cumsum([0] + [len(piece) for piece in ids])
        return cls(
            np.concatenate(ids).astype(np.int16),
            np.concatenate(steps).astype(np.int32),
            np.concatenate(voices).astype(np.int8),
            bounds,
        )


class EpochItems:
    """A torch-style dataset whose item is (epoch, index): what it stands for is cut by the collator.

    The epoch travels with the item so that masks and places can change every epoch in any worker process.
    """

    size: int  # tokens of an item, padding among them
    epoch = 0

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.epoch, index

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Windows(EpochItems):
    """Windows of the same size, which a collator turns into masked batches."""

    def __init__(self, tokens: Tokens, size: int, stride: int):
        if size < 1 or stride < 1:
            raise ValueError(f"window and stride: expected positive numbers of tokens, got {size} and {stride}")
        self.tokens, self.size, self.stride = tokens, size, stride
        lengths = np.diff(tokens.bounds)
        counts = -(-lengths // stride)  # a window starts at every stride-th token of a piece, up to its last
        self._piece = np.repeat(np.arange(len(lengths)), counts)
        first = np.cumsum(counts) - counts
        self._start = tokens.bounds[self._piece] + stride * (np.arange(counts.sum()) - first[self._piece])

    def __len__(self) -> int:
        return len(self._start)

    def gather(self, indices: np.ndarray) -> Batch:
        """Cut the windows `indices`, (B,)."""
        position = self._start[indices][:, None] + np.arange(self.size)
        inside = position < self.tokens.bounds[self._piece[indices] + 1][:, None]
        position = np.minimum(position, len(self.tokens.ids) - 1)
        return Batch(
            np.where(inside, self.tokens.ids[position], PAD).astype(np.int64),
            np.where(inside, self.tokens.step[position], NOWHERE).astype(np.int64),
            np.where(inside, self.tokens.voice[position], NOWHERE).astype(np.int64),
        )

    def subset(self, count: int | None) -> "Windows":
        """At most `count` windows, evenly spread; None keeps all."""
        if count is not None and count < len(self):
            keep = np.linspace(0, len(self) - 1, count).round().astype(np.int64)
            clone = object.__new__(Windows)
            clone.__dict__.update(self.__dict__, _piece=self._piece[keep], _start=self._start[keep])
            return clone
        return self


@dataclass
class Chorales:
    """The three splits as tokens over one vocabulary (that of the training set)."""

    vocabulary: Vocabulary
    tokens: dict[str, Tokens]

    @classmethod
    def from_splits(cls, splits: Splits, whole_steps: bool = False) -> "Chorales":
        """Of pieces, or of those of their steps in which all four voices sound: the n-th note's voice is then n mod 4."""
        if whole_steps:
            whole = {name: [piece[(piece != SILENT).all(axis=1)] for piece in splits[name]] for name in SPLITS}
            splits = {name: [piece for piece in pieces if len(piece)] for name, pieces in whole.items()}
        vocabulary = Vocabulary(splits["train"])
        return cls(vocabulary, {name: Tokens.from_pieces(splits[name], vocabulary) for name in SPLITS})

    @classmethod
    def load(cls, path: str | os.PathLike | None = None, whole_steps: bool = False) -> "Chorales":
        """From a classic file, or from music21's corpus where `path` is None; `whole_steps` as in `from_splits`."""
        if path is not None:
            splits = load_file(path)
        else:
            from .corpus import load_corpus

            splits = load_corpus()
        empty = [name for name in SPLITS if not splits[name]]
        if empty:
            raise ValueError(f"--data {path}: no pieces in {', '.join(empty)}")
        return cls.from_splits(splits, whole_steps)

    def windows(self, size: int, stride: int) -> dict[str, Windows]:
        return {name: Windows(tokens, size, stride) for name, tokens in self.tokens.items()}

    def fingerprint(self) -> str:
        """Short hash of all tokens: two runs with the same one saw the same music."""
        digest = hashlib.sha256()
        for name in SPLITS:
            for array in (self.tokens[name].ids, self.tokens[name].bounds):
                digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return digest.hexdigest()[:16]

    def summary(self, size: int, stride: int) -> dict:
        windows = self.windows(size, stride)
        return {
            "windows": {name: len(windows[name]) for name in SPLITS},
            "vocab": len(self.vocabulary),
            "window": size,
            "stride": stride,
            "pieces": {name: len(self.tokens[name].bounds) - 1 for name in SPLITS},
            "tokens": {name: len(self.tokens[name].ids) for name in SPLITS},
            "pitches": [int(self.vocabulary.pitches.min()), int(self.vocabulary.pitches.max())],
            "fingerprint": self.fingerprint(),
        }
