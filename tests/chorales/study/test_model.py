"""The models of cells: sizes, equal starts, positions."""

# ruff: noqa: E402 (what cannot be imported is skipped first)

import pytest

from tests.chorales.helpers import require
from tests.chorales.study.helpers import cell

require("transformers", "accelerate")

import torch

from examples.chorales.study.cells import ABSOLUTE, AS_PUBLISHED, BOTH, NONE, RELATIVE
from examples.chorales.study.model import build_cell_model, resize_positions
from examples.chorales.trainer import parameter_count


@pytest.mark.parametrize("window", [16, 128, 512])
def test_parameters_match(window):
    count = {
        name: parameter_count(build_cell_model(cell(arm, window=window), 53))
        for name, arm in (("absolute", ABSOLUTE), ("relative", RELATIVE), ("published", AS_PUBLISHED), ("none", NONE), ("both", BOTH))
    }
    assert count["absolute"] == count["none"] + 128 * window
    assert count["relative"] == count["published"] == count["absolute"] - 64
    assert count["both"] == count["relative"] + 128 * window
    assert parameter_count(build_cell_model(cell(RELATIVE, window=window, voice=True), 53)) == count["relative"] + 3 * 128


def test_arms_start_alike():
    """Equal seeds: the shared weights are equal, and so are tables of equal scale, whichever the skew."""
    arms = (ABSOLUTE, NONE, RELATIVE, AS_PUBLISHED, RELATIVE | dict(skew="published"), RELATIVE | dict(tables="normal"))
    for voice in (True, False):
        models = [dict(build_cell_model(cell(arm, seed=3, voice=voice), 53).named_parameters()) for arm in arms]
        shared = set.intersection(*map(set, models))
        assert len(shared) > 30
        assert all(models[0][name].equal(model[name]) for model in models for name in shared)
    own, published = "bert.encoder.layer.1.attention.self.relative_tables.rel_k", "bert.encoder.layer.1.attention.self.published_table"
    assert models[2][own].equal(models[4][published])
    assert models[5][own].equal(models[3][published])
    assert models[3][published].std().item() == pytest.approx(1, rel=0.1)
    assert models[4][published].std().item() == pytest.approx(0.02, rel=0.1)


def test_no_positions_means_none():
    """Shuffled tokens give shuffled logits, but only without positions; training leaves it so."""
    ids, order = torch.arange(7, 23)[None], torch.randperm(16, generator=torch.Generator().manual_seed(0))
    for arm, equivariant in ((NONE, True), (ABSOLUTE, False), (RELATIVE, False), (AS_PUBLISHED, False)):
        model = build_cell_model(cell(arm | ({"tables": "normal"} if arm is RELATIVE else {})), 53)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            gap = (model(input_ids=ids).logits[:, order] - model(input_ids=ids[:, order]).logits).abs().max()
        assert (gap < 1e-4) == equivariant, arm


def test_more_positions_change_nothing_within_the_old_ones():
    ids = torch.randint(7, 53, (2, 16), generator=torch.Generator().manual_seed(0))
    for arm in (ABSOLUTE, BOTH, NONE):
        model = build_cell_model(cell(arm), 53).eval()
        with torch.no_grad():
            before = model(input_ids=ids).logits
            resize_positions(model, 40)
            torch.testing.assert_close(model(input_ids=ids).logits, before)
            assert model(input_ids=ids.repeat(1, 2)).logits.shape == (2, 32, 53)
        fresh = model.bert.embeddings.position_embeddings.weight[16:]
        assert fresh.std().item() == pytest.approx(0.0 if arm is NONE else 0.02, rel=0.1)
