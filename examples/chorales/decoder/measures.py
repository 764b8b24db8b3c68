"""Measures of four-part writing that musicians accept, on grids (T, 4) of MIDI pitches, 16th by 16th, soprano to bass.

They count what is forbidden or usual in the style; Bach's own pieces are the measure of the measures.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np

from ..data.files import SILENT, VOICES
from ..reporting import aligned

# The usual ranges of choral writing, as textbooks of harmony have them: C4-G5, G3-C5, C3-G4, E2-C4.
RANGES = ((60, 79), (55, 72), (48, 67), (40, 60))
LONG_CHORD = 8  # 16ths: a half note

_TRIADS = ((0, 4, 7), (0, 3, 7), (0, 4), (0, 3))  # major and minor, complete and without the fifth
# Dominant, major, minor, half diminished and diminished; without the fifth; the diminished triad, a dominant without its root.
_SEVENTHS = ((0, 4, 7, 10), (0, 4, 7, 11), (0, 3, 7, 10), (0, 3, 6, 10), (0, 3, 6, 9), (0, 4, 10), (0, 4, 11), (0, 3, 10), (0, 3, 6))


def _chord_table(chords: Sequence[Sequence[int]]) -> np.ndarray:
    """(4096,): whether the pitch classes whose bits are set are one of the chords, on any root."""
    table = np.zeros(1 << 12, dtype=bool)
    table[[sum(1 << (root + tone) % 12 for tone in chord) for chord in chords for root in range(12)]] = True
    return table


_IS_TRIAD, _IS_SEVENTH = _chord_table(_TRIADS), _chord_table(_SEVENTHS)


def parallels(grid: np.ndarray, semitones: int) -> np.ndarray:
    """(T - 1, 6): whether two voices (pairs in the order of `itertools.combinations`) both move from one step to the next and
    are an interval of `semitones`, whatever the octave, before and after: 7 for fifths, 0 for octaves and unisons.

    Contrary motion between such intervals counts too, as in music21's `parallelFifth`.
    """
    grid = grid.astype(int)
    sounds = grid != SILENT
    moves = (np.diff(grid, axis=0) != 0) & sounds[:-1] & sounds[1:]
    columns = []
    for upper, lower in combinations(range(len(VOICES)), 2):
        interval = np.abs(grid[:, upper] - grid[:, lower]) % 12 == semitones
        columns.append(interval[:-1] & interval[1:] & moves[:, upper] & moves[:, lower])
    return np.stack(columns, axis=1)


def crossings(grid: np.ndarray) -> np.ndarray:
    """(T,): whether some voice sings below the next lower one."""
    high, low = grid[:, :-1], grid[:, 1:]
    return ((high < low) & (high != SILENT) & (low != SILENT)).any(axis=1)


def pitch_classes(grid: np.ndarray) -> np.ndarray:
    """(T,): a bit for each pitch class that sounds, C's the lowest."""
    return np.bitwise_or.reduce(np.where(grid == SILENT, 0, 1 << (grid.astype(int) % 12)), axis=1)


def long_chords(grid: np.ndarray) -> np.ndarray:
    """(N,): first steps of the chords at fermata-like places: all four voices sound and none moves for `LONG_CHORD` steps or
    more, or, however short, in the piece's last chord."""
    if not len(grid):
        return np.zeros(0, dtype=int)
    bounds = np.concatenate([[0], np.flatnonzero((np.diff(grid, axis=0) != 0).any(axis=1)) + 1, [len(grid)]])
    held = np.diff(bounds) >= LONG_CHORD
    held[-1] = True
    first = bounds[:-1][held]
    return first[(grid[first] != SILENT).all(axis=1)]


def authentic(grid: np.ndarray, chords: np.ndarray) -> np.ndarray:
    """(N,): whether the chords that begin at steps `chords` are major or minor triads whose root the bass reaches by a falling
    fifth or a rising fourth."""
    before, now = grid[np.maximum(chords - 1, 0), -1].astype(int), grid[chords, -1].astype(int)
    falls = (chords > 0) & (before != SILENT) & np.isin(now - before, (-7, 5))
    classes = pitch_classes(grid[chords])
    fifth_or_third = [(classes >> (now + tone) % 12) & 1 for tone in (3, 4)]
    return falls & _IS_TRIAD[classes] & (np.maximum(*fifth_or_third) == 1)


# What is counted, of which total, and how it is shown: name, total, factor, format.
_SHOWN = (
    ("parallel fifths per 100 steps", "parallel_fifths", "transitions", 100, ".2f"),
    ("parallel octaves per 100 steps", "parallel_octaves", "transitions", 100, ".2f"),
    ("steps with crossed voices", "crossed", "steps", 100, ".1f%"),
    ("notes outside their voice's range", "out_of_range", "notes", 100, ".1f%"),
    ("steps that are triads", "triads", "steps", 100, ".1f%"),
    ("steps that are sevenths", "sevenths", "steps", 100, ".1f%"),
    ("moves per voice and 100 steps", "moves", "voice_transitions", 100, ".1f"),
    ("long chords per 100 steps", "long_chords", "steps", 100, ".2f"),
    ("of them triads", "long_triads", "long_chords", 100, ".0f%"),
    ("of them by an authentic cadence", "authentic_cadences", "long_chords", 100, ".0f%"),
)


def count(grid: np.ndarray) -> dict[str, int]:
    """The counts behind the measures of one piece; those of several pieces add up.

    steps: those in which any voice sounds. The rest is explained by the functions above and by `_SHOWN`; `lowest_<voice>` and
    `highest_<voice>` do not add up, `total` knows.
    """
    grid = np.asarray(grid)
    sounds = grid != SILENT
    classes, chords = pitch_classes(grid), long_chords(grid)
    inside = [(grid[:, voice] >= low) & (grid[:, voice] <= high) for voice, (low, high) in enumerate(RANGES)]
    return {
        "steps": int(sounds.any(axis=1).sum()),
        "transitions": max(0, len(grid) - 1),
        "voice_transitions": int((sounds[:-1] & sounds[1:]).sum()),
        "notes": int(sounds.sum()),
        "parallel_fifths": int(parallels(grid, 7).sum()),
        "parallel_octaves": int(parallels(grid, 0).sum()),
        "crossed": int(crossings(grid).sum()),
        "out_of_range": int((sounds & ~np.stack(inside, axis=1)).sum()),
        "triads": int(_IS_TRIAD[classes].sum()),
        "sevenths": int(_IS_SEVENTH[classes].sum()),
        "moves": int(((np.diff(grid, axis=0) != 0) & sounds[:-1] & sounds[1:]).sum()),
        "long_chords": len(chords),
        "long_triads": int(_IS_TRIAD[classes[chords]].sum()),
        "authentic_cadences": int(authentic(grid, chords).sum()),
        **{f"lowest_{name}": int(grid[:, voice][sounds[:, voice]].min(initial=127)) for voice, name in enumerate(VOICES)},
        **{f"highest_{name}": int(grid[:, voice].max(initial=SILENT)) for voice, name in enumerate(VOICES)},
    }


def total(grids: Iterable[np.ndarray]) -> dict[str, int]:
    """The counts of several pieces together."""
    counts = [count(grid) for grid in grids]
    if not counts:
        raise ValueError("grids: expected at least one piece, got none")

    def together(name: str) -> int:
        merge = min if name.startswith("lowest_") else max if name.startswith("highest_") else sum
        return merge(one[name] for one in counts)

    return {name: together(name) for name in counts[0]}


def rows(columns: dict[str, dict[str, int]]) -> list[tuple[str, ...]]:
    """A table of measures, head first: a column per source, whose counts are those of `total`."""
    table = [("", *columns)]
    for title, name, of, factor, form in _SHOWN:
        unit = "%" if form.endswith("%") else ""
        cells = [
            f"{factor * counts[name] / counts[of]:{form.removesuffix('%')}}{unit}" if counts[of] else "-"
            for counts in columns.values()
        ]
        table.append((title, *cells))
    for voice in VOICES:
        ends = [(counts[f"lowest_{voice}"], counts[f"highest_{voice}"]) for counts in columns.values()]
        table.append((f"range of the {voice}", *(f"{low}-{high}" if low <= high else "-" for low, high in ends)))
    return table


def markdown(columns: dict[str, dict[str, int]]) -> str:
    """The table for a page."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows(columns)]
    return "\n".join([head, "| --- |" + " ---: |" * len(columns), *body]) + "\n"


def describe(columns: dict[str, dict[str, int]]) -> str:
    """The table for a terminal."""
    return "\n".join(aligned(rows(columns)))
