"""Masks: their statistics, their groups, and that they depend on nothing but seed, epoch and window."""

import numpy as np
import pytest

from examples.chorales.compare.masking import GROUPINGS, MaskingCollator, mask_batch, window_keys
from examples.chorales.data.tokens import END, IGNORED, MASK, NOWHERE, PAD, SPECIALS, Batch, Chorales


def masked_windows(chorales, mode, size=32, stride=3, seed=1, epoch=0, indices=None):
    windows = chorales.windows(size, stride)["train"]
    indices = np.arange(len(windows)) if indices is None else indices
    collator = MaskingCollator(windows, mode, len(chorales.vocabulary), seed)
    return windows.gather(indices), collator.masked(indices, epoch)


@pytest.mark.parametrize("mode", GROUPINGS)
def test_what_is_hidden_is_labelled_and_nothing_else_changes(chorales, mode):
    batch, masked = masked_windows(chorales, mode)
    hidden = masked.labels != IGNORED
    np.testing.assert_array_equal(masked.labels[hidden], batch.ids[hidden])
    np.testing.assert_array_equal(masked.input_ids[~hidden], batch.ids[~hidden])
    assert not hidden[batch.ids == PAD].any()
    np.testing.assert_array_equal(masked.input_ids == PAD, batch.ids == PAD)  # PAD is never a replacement either


@pytest.mark.parametrize("mode", GROUPINGS)
def test_eighty_ten_ten(chorales, mode):
    fates = []
    for epoch in range(30):
        batch, masked = masked_windows(chorales, mode, epoch=epoch)
        hidden = masked.labels != IGNORED
        shown, original = masked.input_ids[hidden], batch.ids[hidden]
        fates.append(np.stack([shown == MASK, shown == original, (shown != MASK) & (shown != original)]))
    fates = np.concatenate(fates, axis=1)
    size = len(chorales.vocabulary)
    # A random token is <MASK> itself twice in `size` (drawn, or in place of PAD) and the original once.
    expected = [0.8 + 0.1 * 2 / size, 0.1 + 0.1 / size, 0.1 - 0.1 * 3 / size]
    tolerance = 4 * 0.4 / np.sqrt(fates.shape[1])
    assert fates.shape[1] > 10_000
    np.testing.assert_allclose(fates.mean(axis=1), expected, atol=tolerance)


def test_token_mode_hides_15_percent_exactly(chorales):
    batch, masked = masked_windows(chorales, "token", size=40)
    count = (batch.ids != PAD).sum(axis=1)
    np.testing.assert_array_equal((masked.labels != IGNORED).sum(axis=1), np.maximum(1, np.rint(0.15 * count)))


@pytest.mark.parametrize(("size", "groups"), [(16, 1), (64, 2), (128, 5), (67, 2)])
def test_time_mode_hides_groups_of_four_tied_to_the_window(chorales, size, groups):
    """16 tokens are four groups, of which at least one is hidden; 64 are 16 groups, and 15 % of those round to 2."""
    batch, masked = masked_windows(chorales, "time", size=size)
    full = (batch.ids != PAD).all(axis=1)
    hidden = (masked.labels != IGNORED)[full][:, : size // 4 * 4].reshape(full.sum(), -1, 4)
    assert (hidden.all(axis=2) == hidden.any(axis=2)).all()
    assert (hidden.any(axis=2).sum(axis=1) == groups).all()
    assert not (masked.labels != IGNORED)[:, size // 4 * 4 :].any()


def test_step_mode_hides_whole_time_steps_wherever_the_window_starts(chorales):
    batch, masked = masked_windows(chorales, "step", size=32, stride=1)
    hidden = masked.labels != IGNORED
    assert not hidden[batch.step == NOWHERE].any()
    starts_within_step = 0
    for steps, row in zip(batch.step, hidden, strict=True):
        present = np.unique(steps[steps != NOWHERE])
        chosen = [step for step in present if row[steps == step].any()]
        assert all(row[steps == step].all() for step in chosen)
        wanted = min(len(present), max(1, round(0.15 * len(present))))
        assert len(chosen) == wanted
        starts_within_step += bool(len(chosen) and (steps == steps[0]).sum() < 4 and chosen[0] == steps[0])
    assert starts_within_step > 10  # incomplete steps at the window's edge are hidden too


def test_every_group_is_hidden_equally_often(chorales):
    """A bias towards some place in the window would teach the models that place."""
    windows = chorales.windows(32, 1)["train"]
    collator = MaskingCollator(windows, "time", len(chorales.vocabulary), seed=3)
    indices = np.nonzero((windows.gather(np.arange(len(windows))).ids != PAD).all(axis=1))[0]
    hidden = np.mean([(collator.masked(indices, e).labels != IGNORED).mean(axis=0) for e in range(10)], axis=0)
    np.testing.assert_allclose(hidden, 1 / 8, atol=4 * np.sqrt(1 / 8 / (10 * len(indices))))


@pytest.mark.parametrize("mode", GROUPINGS)
def test_masks_do_not_depend_on_the_batch(chorales, mode):
    """One window at a time, all at once, in any order: the same masks, so for any batch size, worker and process."""
    _, together = masked_windows(chorales, mode)
    order = np.random.default_rng(0).permutation(len(together.labels))
    _, shuffled = masked_windows(chorales, mode, indices=order)
    for index in (0, 1, len(order) // 2, len(order) - 1):
        _, alone = masked_windows(chorales, mode, indices=np.array([index]))
        at = int(np.nonzero(order == index)[0][0])
        for one, many, moved in zip(alone, together, shuffled, strict=True):
            np.testing.assert_array_equal(one[0], many[index])
            np.testing.assert_array_equal(one[0], moved[at])


def test_masks_change_with_seed_and_epoch(chorales):
    labels = [
        masked_windows(chorales, "step", seed=seed, epoch=epoch)[1].labels for seed, epoch in ((1, 0), (2, 0), (1, 1))
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (labels[one] != labels[other]).any(axis=1).mean() > 0.7


def test_window_keys_are_distinct():
    keys = np.concatenate([window_keys(s, e, np.arange(1000)) for s in range(10) for e in range(10)])
    assert len(np.unique(keys)) == len(keys)


def test_collator_gives_tensors_and_uses_the_epoch(chorales):
    torch = pytest.importorskip("torch")
    windows = chorales.windows(32, 3)["train"]
    collator = MaskingCollator(windows, "step", len(chorales.vocabulary), seed=0)
    windows.set_epoch(2)
    batch = collator([windows[i] for i in (4, 9)])
    expected = collator.masked(np.array([4, 9]), epoch=2)
    np.testing.assert_array_equal(batch["input_ids"].numpy(), expected.input_ids)
    np.testing.assert_array_equal(batch["labels"].numpy(), expected.labels)
    np.testing.assert_array_equal(batch["attention_mask"].numpy(), windows.gather(np.array([4, 9])).ids != PAD)
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_window_of_one_end_token_has_nothing_to_predict():
    batch = Batch(np.array([[END, PAD]]), np.full((1, 2), NOWHERE), np.full((1, 2), NOWHERE))
    assert (mask_batch(batch, window_keys(0, 0, np.array([0])), "step", 53).labels == IGNORED).all()


def test_unknown_mode_is_refused(chorales):
    with pytest.raises(ValueError, match="masking: expected one of token, time, step, span, voices, got 'bars'"):
        masked_windows(chorales, "bars")


def test_voices_mode_hides_any_share_of_the_lower_voices_and_shows_only_masks(chorales):
    batch, masked = masked_windows(chorales, "voices", size=64)
    hidden = masked.labels != IGNORED
    assert (masked.input_ids[hidden] == MASK).all()
    np.testing.assert_array_equal(masked.labels[hidden], batch.ids[hidden])
    np.testing.assert_array_equal(masked.input_ids[~hidden], batch.ids[~hidden])
    assert not hidden[batch.voice <= 0].any()  # the soprano, and what is no note
    share = hidden.sum(axis=1) / np.maximum(1, (batch.voice > 0).sum(axis=1))
    assert 0.05 < (share == 1).mean() < 0.2  # a tenth by design
    assert (share < 0.35).mean() > 0.35  # few of them in a quarter by design, and where chance has it
    assert ((share > 0.35) & (share < 1)).mean() > 0.3
    # Hidden together: where blocks are long, a voice's neighbours mostly share their fate; else as often as chance has it.
    note = (batch.voice[:, 4:] == batch.voice[:, :-4]) & (batch.voice[:, 4:] > 0)
    middle = (share > 0.3) & (share < 0.7)
    same = (hidden[:, 4:] == hidden[:, :-4]) & note
    together = same[middle].sum(axis=1) / np.maximum(1, note[middle].sum(axis=1))
    assert together.max() > 0.85
    assert together.min() < 0.65


def test_voices_mode_begins_with_easy_masks(chorales):
    windows = chorales.windows(64, 4)["train"]
    collator = MaskingCollator(windows, "voices", len(chorales.vocabulary), 1, easy_epochs=2)
    indices = np.arange(len(windows))
    lower = windows.gather(indices).voice > 0
    shares = [(collator.masked(indices, epoch).labels != IGNORED)[lower].mean() for epoch in range(3)]
    assert shares[0] == pytest.approx(0.15, abs=0.02)
    assert shares[1] == pytest.approx(0.15, abs=0.02)
    assert shares[2] > 0.3


def test_windows_are_transposed_as_a_whole_within_the_vocabulary(chorales):
    windows, size = chorales.windows(16, 5)["train"], len(chorales.vocabulary)
    indices = np.arange(len(windows))
    plain = windows.gather(indices).ids
    moved = MaskingCollator(windows, "step", size, 1, transpose=6).masked(indices)
    shown = np.where(moved.labels == IGNORED, moved.input_ids, moved.labels)  # what was hidden is the transposed note, too
    note = plain >= len(SPECIALS)
    np.testing.assert_array_equal(shown[~note], plain[~note])
    shifts = []
    for before, after, is_note in zip(plain, shown, note, strict=True):
        shift = np.unique((after - before)[is_note])
        assert len(shift) <= 1
        shifts += shift.tolist()
    assert shown.max() < size
    assert shown[note].min() >= len(SPECIALS)
    assert set(shifts) == set(range(-6, 7))


def test_whole_steps_tell_every_tokens_voice(small_json):
    plain, whole = Chorales.load(small_json), Chorales.load(small_json, whole_steps=True)
    tokens = whole.tokens["train"]
    assert 0 < len(tokens.ids) < len(plain.tokens["train"].ids)
    for first, end in zip(tokens.bounds[:-1], tokens.bounds[1:], strict=True):
        voice = tokens.voice[first + 1 : end - 1]
        np.testing.assert_array_equal(voice, np.arange(len(voice)) % 4)
