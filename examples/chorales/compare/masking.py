"""Masking for masked language modelling: which tokens to hide, and what the model sees in their place.

A grouping says which tokens are hidden together; 15 % of a window's groups (rounded, at least one) are hidden. Every
hidden token becomes <MASK> (80 %), a random token (10 %) or stays (10 %). All three choices are the seed notebook's.

The mode "voices" is another task, that of harmonising a melody: any share of the three lower voices is hidden, all of
it shows <MASK>, and the soprano is given.

Randomness is a hash of (seed, epoch, window, position), not a stream: a window's mask is the same whatever the batch
size, the number of workers or processes, and the order of windows, and the same for every model that is compared.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..data.tokens import IGNORED, MASK, NOWHERE, PAD, SPECIALS, Batch, Windows

MASKED_SHARE = 0.15
SPAN_STEPS = 8  # a half note on the 16th grid
EVALUATION_SEED = 20_181_209  # validation and test masks do not depend on a run's seed


def _group_tokens(batch: Batch) -> np.ndarray:
    """Every token by itself."""
    return np.where(batch.ids != PAD, np.arange(batch.ids.shape[1]), NOWHERE)


def _group_time(batch: Batch) -> np.ndarray:
    """The notebook's "time": four tokens in a row, counted from the window's start, whatever they are.

    Start tokens, missing notes and windows that start within a step shift the music against these groups, and a model
    that knows absolute positions can read off which tokens belong to a hidden group.
    """
    length = batch.ids.shape[1]
    position = np.arange(length)
    whole = position < length // 4 * 4
    return np.where((batch.ids != PAD) & whole, position // 4, NOWHERE)


def _group_steps(batch: Batch) -> np.ndarray:
    """The notes of one time step, wherever the window starts; start and end tokens are never hidden."""
    new_step = np.diff(batch.step, axis=1, prepend=batch.step[:, :1]) != 0
    return np.where(batch.step != NOWHERE, np.cumsum(new_step, axis=1), NOWHERE)


def _group_spans(batch: Batch) -> np.ndarray:
    """One voice over SPAN_STEPS time steps from the piece's start on: copying its last note helps at most once."""
    note = batch.step != NOWHERE
    key = np.where(note, batch.step // SPAN_STEPS * 4 + batch.voice, NOWHERE)
    first = (key[:, :, None] == key[:, None, :]).argmax(axis=2)  # a span is named after the first place it has
    return np.where(note, first, NOWHERE)


# A grouping maps a batch to (B, L) integers below L: tokens of a row with the same number are hidden together, those
# marked NOWHERE never.
GROUPINGS: dict[str, Callable[[Batch], np.ndarray]] = {
    "token": _group_tokens,
    "time": _group_time,
    "step": _group_steps,
    "span": _group_spans,
}


VOICES_MODE = "voices"
MODES = (*GROUPINGS, VOICES_MODE)
BLOCKS = (1, 2, 4, 8, 16)  # time steps of a voice that "voices" hides together
_FEW_BLOCKS = (1, 2, 4)


def _hidden_voices(batch: Batch, keys: np.ndarray, easy: bool) -> np.ndarray:
    """What "voices" hides, (B, L): alto, tenor and bass in blocks of a voice, each with the same probability.

    Probability and length of the blocks are drawn per window: any probability in three quarters of the windows, such that
    in a tenth of all the soprano stands alone, and 15 to 30 % in short blocks in the others. These are the states that
    Gibbs sampling passes through as Coconet does it (Huang et al. 2017), from nothing but the melody to few notes that are
    drawn anew.

    Args:
        easy: single notes are hidden, 15 % of them, in every window. A model that begins with these finds out soon which
            notes are neighbours; with the others alone it does not for thousands of steps.
    """
    length = batch.ids.shape[1]
    if easy:
        share, block = np.array(MASKED_SHARE), np.array(1)
    else:
        few = _uniform(keys, 7, 1) < 0.25
        share, block = _uniform(keys, 3, 1), _uniform(keys, 4, 1)
        share = np.where(few, MASKED_SHARE + MASKED_SHARE * share, 1.15 * share)
        block = np.where(few, _picked(_FEW_BLOCKS, block), _picked(BLOCKS, block))
    name = (batch.step // block * 4 + batch.voice) % length  # of a token's block: steps of a window are consecutive
    return (batch.voice > 0) & (np.take_along_axis(_uniform(keys, 5, length), name, axis=1) < share)


def _picked(values: tuple[int, ...], where: np.ndarray) -> np.ndarray:
    """One of the values for every number in [0, 1)."""
    return np.array(values)[(where * len(values)).astype(int)]


class Masked(NamedTuple):
    """A masked batch, all (B, L) int64: what the model sees, the labels (IGNORED where nothing is to be predicted), and
    step and voice of each token (for the copy baseline; the models do not see these)."""

    input_ids: np.ndarray
    labels: np.ndarray
    step: np.ndarray
    voice: np.ndarray


def mask_batch(batch: Batch, keys: np.ndarray, mode: str, vocabulary_size: int, easy: bool = False) -> Masked:
    """Mask `batch`; `keys`, (B,) uint64, one per window (see `window_keys`), decides everything random.

    easy: of the mode "voices", that few notes are hidden.
    """
    if mode not in MODES:
        raise ValueError(f"masking: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode == VOICES_MODE:
        hidden = _hidden_voices(batch, keys, easy)
        return Masked(np.where(hidden, MASK, batch.ids), np.where(hidden, batch.ids, IGNORED), batch.step, batch.voice)
    groups = GROUPINGS[mode](batch)
    length = groups.shape[1]
    maskable = groups != NOWHERE
    present = np.zeros(groups.shape, dtype=bool)
    rows, columns = np.nonzero(maskable)
    present[rows, groups[rows, columns]] = True
    # The groups with the smallest random numbers are hidden.
    score = np.where(present, _uniform(keys, 0, length), np.inf)
    available = present.sum(axis=1)
    wanted = np.minimum(np.maximum(np.rint(MASKED_SHARE * available), 1), available)
    rank = np.argsort(np.argsort(score, axis=1, kind="stable"), axis=1)
    hidden_groups = rank < wanted[:, None]
    hidden = maskable & np.take_along_axis(hidden_groups, np.where(maskable, groups, 0), axis=1)

    fate = _uniform(keys, 1, length)
    random_ids = np.floor(_uniform(keys, 2, length) * vocabulary_size).astype(np.int64)
    random_ids[random_ids == PAD] = PAD + 1  # as the notebook: a random token is never padding
    shown = np.where(fate < 0.8, MASK, np.where(fate < 0.9, random_ids, batch.ids))
    return Masked(np.where(hidden, shown, batch.ids), np.where(hidden, batch.ids, IGNORED), batch.step, batch.voice)


def window_keys(seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
    """One 64-bit key per window, (B,) uint64."""
    with np.errstate(over="ignore"):
        run = _mix(_mix(np.asarray([seed], dtype=np.uint64)) + np.uint64(epoch))
        return _mix(run + indices.astype(np.uint64))


def _uniform(keys: np.ndarray, draw: int, length: int) -> np.ndarray:
    """Numbers in [0, 1), (B, L), for the draw-th question asked of every position."""
    with np.errstate(over="ignore"):
        counter = np.arange(length, dtype=np.uint64) + np.uint64(draw << 32)
        return (_mix(keys[:, None] + _mix(counter)[None, :]) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """The SplitMix64 generator's output function (Steele, Lea, Flood 2014), a bijection that scatters every bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _transposed(ids: np.ndarray, keys: np.ndarray, most: int, vocabulary_size: int) -> np.ndarray:
    """Windows of ids, (B, L), each with its notes moved by -most to most places in the vocabulary, as far as that goes."""
    note = ids >= len(SPECIALS)
    down = np.minimum(most, np.where(note, ids, vocabulary_size).min(axis=1) - len(SPECIALS))
    up = np.minimum(most, vocabulary_size - 1 - np.where(note, ids, 0).max(axis=1))
    places = np.floor(_uniform(keys, 6, 1)[:, 0] * (down + up + 1)).astype(np.int64) - down
    return np.where(note, ids + places[:, None], ids)


class MaskingCollator:
    """Turns items (epoch, index) of a `Windows` into a batch of tensors for a masked language model.

    Args:
        windows: where the indices point to.
        mode: a name in GROUPINGS.
        vocabulary_size: random replacements are drawn below it.
        seed: of the masks; a different one for every split and, in training, every run.
        transpose: a window is transposed by up to so many semitones, as far as the vocabulary's pitches go, which must
            have no gaps.
        easy_epochs: in so many of the first epochs the mode "voices" hides few notes.
    """

    def __init__(
        self, windows: Windows, mode: str, vocabulary_size: int, seed: int, transpose: int = 0, easy_epochs: int = 0
    ):
        if mode not in MODES:
            raise ValueError(f"masking: expected one of {', '.join(MODES)}, got {mode!r}")
        self.windows, self.mode, self.vocabulary_size, self.seed = windows, mode, vocabulary_size, seed
        self.transpose, self.easy_epochs = transpose, easy_epochs

    def masked(self, indices: np.ndarray, epoch: int = 0) -> Masked:
        """The masked windows `indices`, (B,), as arrays."""
        keys = window_keys(self.seed, epoch, indices)
        batch = self.windows.gather(indices)
        if self.transpose:
            batch = batch._replace(ids=_transposed(batch.ids, keys, self.transpose, self.vocabulary_size))
        return mask_batch(batch, keys, self.mode, self.vocabulary_size, easy=epoch < self.easy_epochs)

    def __call__(self, items: list[tuple[int, int]]) -> dict:
        import torch

        masked = self.masked(np.array([index for _, index in items]), items[0][0])
        input_ids = torch.from_numpy(masked.input_ids)
        return {
            "input_ids": input_ids,
            "attention_mask": (input_ids != PAD).long(),
            "labels": torch.from_numpy(masked.labels),
        }
