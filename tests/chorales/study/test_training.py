"""What cells are trained and measured on: windows, masks, the score at pitch changes."""

# ruff: noqa: E402 (what cannot be imported is skipped first)

import numpy as np
import pytest

from tests.chorales.helpers import require
from tests.chorales.study.helpers import cell

require("transformers", "accelerate", "tqdm")

import torch
from torch.nn import functional as F

from examples.chorales.compare.masking import SPAN_STEPS, MaskingCollator
from examples.chorales.data.tokens import IGNORED, NOWHERE, PAD, Chorales, Windows
from examples.chorales.study.cells import ABSOLUTE, PHASES
from examples.chorales.study.model import build_cell_model
from examples.chorales.study.training import StudyCollator, pitch_changes, real_tokens, score


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("window", [16, 64, 128, 256, 512])
def test_phase_of_windows(window, phase):
    """Windows start at every place of a beat, of 16 tokens, that their phase allows."""
    if phase == "beats" and window == 16:
        with pytest.raises(ValueError, match="window: expected at least 64 tokens"):
            cell(window=window, phase=phase)
        return
    made = cell(window=window, phase=phase)
    for stride in (made.stride, made.test_stride(window)):
        starts = np.arange(16) * stride % 16
        assert set(starts) == set(range(0, 16, {"any": 1, "steps": 4, "beats": 16}[phase]))
        assert window / 6 <= stride <= window / 2


def test_spans_hide_one_voice_over_half_a_bar(chorales):
    windows = Windows(chorales.tokens["train"], 64, 15)
    batch = windows.gather(np.arange(len(windows)))
    masked = MaskingCollator(windows, "span", len(chorales.vocabulary), 0).masked(np.arange(len(windows)))
    counts = []
    for step, voice, hidden in zip(batch.step, batch.voice, masked.labels != IGNORED, strict=True):
        assert not (hidden & (step == NOWHERE)).any()
        spans = set(zip((step // SPAN_STEPS)[hidden], voice[hidden], strict=True))
        everything = set(zip((step // SPAN_STEPS)[step != NOWHERE], voice[step != NOWHERE], strict=True))
        for block, part in spans:
            assert hidden[(step // SPAN_STEPS == block) & (voice == part) & (step != NOWHERE)].all()
        assert len(spans) == (max(1, round(0.15 * len(everything))) if everything else 0)
        counts.append(hidden.sum() / max(len(spans), 1))
    assert max(counts) == SPAN_STEPS  # fewer at the window's edges
    assert np.mean(counts) > 4


def test_pitch_changes_by_hand(chorales):
    tokens = chorales.tokens["valid"]
    changes = pitch_changes(tokens)
    for piece in range(len(tokens.bounds) - 1):
        last = {}
        for at in range(tokens.bounds[piece], tokens.bounds[piece + 1]):
            voice, pitch = tokens.voice[at], tokens.ids[at]
            assert changes[at] == (voice != NOWHERE and voice in last and last[voice] != pitch)
            last[voice] = pitch


def test_classic_notes_change_in_22_percent(classic_path):
    tokens = Chorales.load(classic_path).tokens["test"]
    notes = tokens.voice != NOWHERE
    assert pitch_changes(tokens)[notes].mean() == pytest.approx(1 - 0.770, abs=0.004)


def test_score_by_hand(chorales):
    """Against one big batch, with the change flags found in another way."""
    made = cell(ABSOLUTE, window=32, voice=True)
    size = len(chorales.vocabulary)
    windows = Windows(chorales.tokens["test"], 32, 7)
    collator = StudyCollator(windows, "step", size, 5, True)
    model = build_cell_model(made, size)
    found = score(model, collator, chorales.tokens["train"])
    batch = collator([(0, i) for i in range(len(windows))])
    original = windows.gather(np.arange(len(windows)))
    assert torch.equal(batch["token_type_ids"], torch.from_numpy(original.voice + 1))
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], token_type_ids=batch["token_type_ids"]).logits
    wanted = batch["labels"] != IGNORED
    target = batch["labels"][wanted]
    assert found["loss"] == pytest.approx(F.cross_entropy(logits[wanted], target).item(), rel=1e-5)
    right = (logits.argmax(-1) == batch["labels"]).numpy()
    assert found["accuracy"] == pytest.approx(right[wanted.numpy()].mean())
    assert found["masked_tokens"] == int(wanted.sum())
    changed = wanted.numpy() & (pitch_changes(chorales.tokens["test"])[window_positions(windows)] & (original.ids != PAD))
    assert found["change_tokens"] == changed.sum() > 50
    assert found["change_accuracy"] == pytest.approx(right[changed].mean())
    assert real_tokens(windows) == (original.ids != PAD).sum()


def window_positions(windows):
    return np.minimum(windows._start[:, None] + np.arange(windows.size), len(windows.tokens.ids) - 1)
