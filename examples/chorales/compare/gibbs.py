"""Lower voices for a melody, by Gibbs sampling from a masked language model that was trained with masks of "voices".

As in Coconet (Huang et al. 2017): all notes to be found begin hidden; again and again some of them, ever fewer, are hidden and
drawn anew, each from what the model says of it given the rest, at once (blocked Gibbs). What is drawn early is drawn
carelessly, and corrected later, when more of its surroundings stands.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..data.files import VOICES
from ..data.tokens import END, MASK, PAD, SPECIALS, START
from .masking import BLOCKS

if TYPE_CHECKING:
    import torch

_BEAT = 16  # tokens: windows start at quarters, as in training


@dataclass(frozen=True)
class Annealing:
    """How many notes are hidden, and how boldly they are drawn, over the steps.

    The share of hidden notes falls from 1 to `least` in a straight line over the first 3/4 of the steps, as Coconet's does, the
    temperature from `hot` to `cold` by equal factors over all of them.
    """

    steps: int = 160
    hot: float = 1.0
    cold: float = 0.2
    least: float = 0.05

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")
        if not 0 < self.cold <= self.hot:
            raise ValueError(f"temperature: expected 0 < cold <= hot, got {self.cold:g} and {self.hot:g}")
        if not 0 < self.least <= 1:
            raise ValueError(f"least: expected more than 0 and at most 1, got {self.least:g}")

    def share(self, step: int) -> float:
        return max(self.least, 1 - (1 - self.least) * step / max(1, 0.75 * self.steps))

    def temperature(self, step: int) -> float:
        return self.hot * (self.cold / self.hot) ** (step / max(1, self.steps - 1))


def windows_of(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping windows over a sequence: starts, (W,), and for each place of it which window reads it, (length,).

    A window starts every half `size`, at a quarter; a place is read by the window in which it is farthest from the edges.
    """
    hop = max(_BEAT, size // 2 // _BEAT * _BEAT)
    starts = np.arange(0, max(1, length - size + hop), hop)
    place = np.arange(length)[None, :] - starts[:, None]
    # At the ends of the sequence there is nothing beyond an edge that could be missed.
    left = np.where(starts[:, None] == 0, size, place)
    right = np.where(starts[:, None] + size >= length, size, size - 1 - place)
    room = np.where((place >= 0) & (place < size), np.minimum(left, right), -1)
    return starts, room.argmax(axis=0)


def _logits(model, tokens: "torch.Tensor", size: int) -> "torch.Tensor":
    """(B, N, vocabulary) of sequences (B, N) that may be longer than the model's windows."""
    import torch

    batch, length = tokens.shape
    starts, reader = windows_of(length, size)
    padded = torch.nn.functional.pad(tokens, (0, int(starts[-1]) + size - length if starts[-1] + size > length else 0), value=PAD)
    cut = torch.stack([padded[:, start : start + size] for start in starts.tolist()], dim=1)
    flat = cut.flatten(0, 1)
    logits = model(input_ids=flat, attention_mask=(flat != PAD).long()).logits.unflatten(0, (batch, len(starts)))
    window = torch.from_numpy(reader)
    return logits[:, window, torch.arange(length) - torch.from_numpy(starts)[window]]


def harmonize(model, melody: np.ndarray, samples: int, annealing: Annealing, seed: int, progress=None) -> np.ndarray:
    """Grids (samples, T, 4) of MIDI pitches whose first voice is `melody`, (T,), without rests.

    Args:
        model: a masked language model whose configuration lists the `pitches` of its vocabulary, and its `training_length`.
        samples: Gibbs chains that run side by side.
        seed: of all that is drawn.
        progress: called after every step.

    Raises:
        ValueError: the melody has pitches that the model does not know, or the model's windows are shorter than a quarter.
    """
    import torch

    size, pitches = model.config.training_length, np.array(model.config.pitches)
    if size < _BEAT:
        raise ValueError(f"model: expected one trained on windows of at least {_BEAT} tokens, a quarter, got {size}")
    unknown = np.setdiff1d(melody, pitches)
    if len(unknown):
        raise ValueError(f"melody: expected MIDI pitches {pitches.min()} to {pitches.max()}, got {unknown.tolist()}")
    given = torch.from_numpy(np.searchsorted(pitches, melody) + len(SPECIALS))
    draw = torch.Generator().manual_seed(seed)
    notes = torch.full((samples, len(melody), len(VOICES)), MASK)
    notes[:, :, 0] = given
    start, end = torch.full((samples, 1), START), torch.full((samples, 1), END)
    with torch.inference_mode():
        for step in range(annealing.steps):
            hidden = _hidden(samples, len(melody), annealing.share(step), draw) | (notes == MASK)
            hidden[:, :, 0] = False
            tokens = torch.cat([start, notes.masked_fill(hidden, MASK).flatten(1), end], dim=1)
            logits = _logits(model, tokens.to(model.device), size).cpu()[:, 1:-1, len(SPECIALS) :]
            probability = torch.softmax(logits.unflatten(1, (-1, len(VOICES)))[hidden] / annealing.temperature(step), dim=-1)
            notes[hidden] = torch.multinomial(probability, 1, generator=draw)[:, 0] + len(SPECIALS)
            if progress is not None:
                progress()
    return pitches[notes.numpy() - len(SPECIALS)].astype(np.int16)


def _hidden(samples: int, steps: int, share: float, draw: "torch.Generator") -> "torch.Tensor":
    """(samples, steps, 4): blocks of voices, each hidden with probability `share`; a length of blocks for each sample."""
    import torch

    rows = []
    for block in torch.randint(len(BLOCKS), (samples,), generator=draw).tolist():
        length = BLOCKS[block]
        chosen = torch.rand((-(-steps // length), len(VOICES)), generator=draw) < share
        rows.append(chosen.repeat_interleave(length, dim=0)[:steps])
    return torch.stack(rows)
