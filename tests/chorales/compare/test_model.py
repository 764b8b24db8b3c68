"""The compared models: their sizes, their weights, what takes part in training."""

# ruff: noqa: E402 (what cannot be imported is skipped first)

import pytest

from tests.chorales.helpers import require

require("transformers")

from examples.chorales.compare.masking import MaskingCollator
from examples.chorales.compare.model import ARMS, build_model, dead_parameters
from examples.chorales.trainer import parameter_count


def test_absolute_arm_has_the_notebooks_size():
    assert parameter_count(build_model("absolute", 53, 16, 15, seed=0)) == 437_045
    longer = build_model("absolute", 53, 160, 15, seed=0)
    assert parameter_count(longer) == 437_045 + 32 * 128  # 32 more positions


def test_relative_positions_beyond_the_window_are_refused():
    with pytest.raises(ValueError, match="max-relative-position: expected 1 to window - 1 = 15"):
        build_model("relative", 53, 16, 16, seed=0)
    with pytest.raises(ValueError, match="arms: expected"):
        build_model("absurd", 53, 16, 15, seed=0)


@pytest.mark.parametrize("arm", ARMS)
def test_no_arm_has_dead_parameters(arm, chorales):
    """Every parameter, and every row of a relative table, takes part in a training step."""
    windows = chorales.windows(24, 5)["train"]
    batch = MaskingCollator(windows, "step", len(chorales.vocabulary), 0)([windows[i] for i in range(64)])
    model = build_model(arm, len(chorales.vocabulary), 24, 23, seed=0)
    assert dead_parameters(model, batch) == []
    names = {name for name, _ in model.named_parameters()}
    absolute = {
        name for name, _ in build_model("absolute", len(chorales.vocabulary), 24, 23, seed=0).named_parameters()
    }
    assert any("position_embeddings" in name for name in names) == (arm != "relative")
    tables = names - absolute
    assert bool(tables) == (arm != "absolute")
    model(**batch).loss.backward()
    for name, table in model.named_parameters():
        if name in tables and 2 * 23 + 1 in table.shape:
            rows = table.grad.abs().movedim(table.shape.index(2 * 23 + 1), 0).flatten(1).amax(1)
            assert (rows > 0).all(), name


def test_arms_start_from_the_same_weights():
    models = [dict(build_model(arm, 53, 16, 15, seed=4).named_parameters()) for arm in ARMS]
    shared = set.intersection(*map(set, models))
    assert len(shared) > 30
    for name in shared:
        assert models[0][name].equal(models[1][name]), name
        assert models[0][name].equal(models[2][name]), name
