"""How much of a piece was copied: its longest passage that is also in the training set, in whatever key.

A chorale is compared step by step (all four voices of every 16th), a performance note by note (the pitches in the order
in which they are struck). Transposed passages count as equal.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..data.files import SILENT
from .languages import ChoraleLanguage, Language
from .passages import Music, Pieces


@dataclass
class Events:
    """Pieces as sequences of events, all (N,): `alone`, what an event is, and `after`, what it is and how it follows
    from the one before, both numbers that transposition does not change; `pitch`, some pitch to tell transpositions by;
    piece p being events bounds[p] to bounds[p + 1]."""

    alone: np.ndarray
    after: np.ndarray
    pitch: np.ndarray
    bounds: np.ndarray


class Passage(NamedTuple):
    """A passage that two pieces share: events, where it begins in the sample, which piece of the other music has it and
    where it begins there, by how many semitones the sample is higher, and at how many of its events anything
    changes."""

    events: int
    start: int
    piece: int
    piece_start: int
    semitones: int
    changes: int


def chord_events(grids: list[np.ndarray]) -> Events:
    """Events of grids (T, 4): one per 16th."""
    alone, after, pitch = [], [], []
    for grid in grids:
        grid = grid.astype(np.int64)
        sounding = grid != SILENT
        # The highest sounding pitch; while all are silent, the last one.
        top = np.where(
            sounding.any(axis=1), np.take_along_axis(grid, sounding.argmax(axis=1)[:, None], axis=1)[:, 0], SILENT
        )
        known = np.maximum.accumulate(np.where(top != SILENT, np.arange(len(top)), 0))
        top = top[known]
        chord = np.where(sounding, grid - top[:, None] + 128, 0) @ (256 ** np.arange(grid.shape[1]))
        alone.append(chord)
        after.append(chord * 256 + np.diff(top, prepend=top[:1]) + 128)
        pitch.append(top)
    return _joined(alone, after, pitch)


def note_events(pitches: list[np.ndarray]) -> Events:
    """Events of sequences of pitches: one per note."""
    pitches = [pitch.astype(np.int64) for pitch in pitches]
    return _joined(
        [np.zeros_like(pitch) for pitch in pitches], [np.diff(p, prepend=p[:1]) + 128 for p in pitches], pitches
    )


def _joined(alone: list[np.ndarray], after: list[np.ndarray], pitch: list[np.ndarray]) -> Events:
    bounds = np.cumsum([0] + [len(part) for part in alone])
    return Events(_concatenated(alone), _concatenated(after), _concatenated(pitch), bounds)


def _concatenated(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([*parts, np.zeros(0, np.int64)])


def events_of(language: Language, pieces: list[np.ndarray]) -> Events:
    """Events of token sequences."""
    if isinstance(language, ChoraleLanguage):
        return chord_events([language.decode(ids) for ids in pieces])
    table = language.pitches()
    return note_events([table[ids][table[ids] >= 0] for ids in pieces])


def longest_common_passage(sample: Events, music: Events) -> Passage | None:
    """The longest passage of `sample`, one piece, that is also in a piece of `music`; None if they share nothing.

    Passages of growing length are compared by 64-bit hashes, each length among the places where the one before agreed.
    """
    ends = np.repeat(music.bounds[1:], np.diff(music.bounds))  # of each event's piece
    here, there = np.arange(len(sample.alone)), np.arange(len(music.alone))
    hash_here, hash_there = _hash(sample.alone), _hash(music.alone)
    length, found = 0, None
    while True:
        common = np.intersect1d(hash_here, hash_there)
        keep_here, keep_there = np.isin(hash_here, common), np.isin(hash_there, common)
        here, hash_here, there, hash_there = (
            here[keep_here],
            hash_here[keep_here],
            there[keep_there],
            hash_there[keep_there],
        )
        if not len(here):
            break
        length += 1
        found = (here[0], there[np.flatnonzero(hash_there == hash_here[0])[0]])
        more_here, more_there = here + length < len(sample.alone), there + length < ends[there]
        here, hash_here, there, hash_there = (
            here[more_here],
            hash_here[more_here],
            there[more_there],
            hash_there[more_there],
        )
        hash_here = hash_here * _FACTOR + _hash(sample.after[here + length])
        hash_there = hash_there * _FACTOR + _hash(music.after[there + length])
    if found is None:
        return None
    start, place = map(int, found)
    piece = int(np.searchsorted(music.bounds, place, side="right")) - 1
    changed = (np.diff(sample.alone) != 0) | (np.diff(sample.pitch) != 0)
    return Passage(
        events=length,
        start=start,
        piece=piece,
        piece_start=place - int(music.bounds[piece]),
        semitones=int(sample.pitch[start] - music.pitch[place]),
        changes=int(changed[start : start + length - 1].sum()),
    )


_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def _hash(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer: (N,) uint64."""
    x = numbers.astype(np.uint64) + _FACTOR
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class CopyCheck:
    """Compares generated pieces with a training set, and the test set's too: what pieces share without copying."""

    def __init__(self, music: Music):
        self.language, self.pieces = music.language, music.splits["train"]
        self.events = events_of(music.language, _all(self.pieces))
        self.test = _all(music.splits["test"])
        self.unit = "16ths" if music.language.name == "chorale" else "notes"

    def __call__(self, ids: np.ndarray) -> dict:
        """What `ids`, tokens of one generated piece (without its prime), share with the training set, for the JSON."""
        sample = events_of(self.language, [ids])
        passage = longest_common_passage(sample, self.events)
        return {
            "unit": self.unit,
            "generated": len(sample.alone),
            "longest_common_passage": passage._asdict() | {"piece": self.pieces.names[passage.piece]}
            if passage
            else None,
        }

    def of_test_pieces(self, length: int) -> dict:
        """The same for pieces of the test set, cut to `length` events: median and longest."""
        count = 80 if self.language.name == "chorale" else 10  # a performance takes a second or two
        longest = []
        for index in np.linspace(0, len(self.test) - 1, min(count, len(self.test))).round().astype(int):
            events = events_of(self.language, [self.test[index]])
            cut = Events(events.alone[:length], events.after[:length], events.pitch[:length], np.array([0, length]))
            passage = longest_common_passage(cut, self.events)
            longest.append(passage.events if passage else 0)
        return {"pieces": len(longest), "cut_to": length, "median": float(np.median(longest)), "longest": max(longest)}


def _all(pieces: Pieces) -> list[np.ndarray]:
    return [pieces[index] for index in range(len(pieces))]


def describe(report: dict, test: dict) -> str:
    """One sentence for people."""
    passage, unit = report["longest_common_passage"], report["unit"]
    if passage is None:
        return "nothing in common with the training set"
    return (
        f"longest passage shared with the training set: {passage['events']} of {report['generated']} {unit} "
        f"({passage['changes']} changes), from {passage['start']} on = {passage['piece']} from "
        f"{passage['piece_start']} on, transposed by {passage['semitones']:+d}; "
        f"in test pieces of this length: median {test['median']:g}, longest {test['longest']}"
    )
