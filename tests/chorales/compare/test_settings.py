"""Settings of the comparison: the presets, what overrides them, what is refused."""

import math
import os

import pytest

from examples.chorales.compare.__main__ import parse_arguments
from examples.chorales.compare.settings import PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_last_step_is_evaluated(preset):
    settings = PRESETS[preset]
    for windows in (1, 100, 7123, 220959):
        steps, interval = settings.update_steps(windows)
        needed = math.ceil(math.ceil(windows / settings.batch) / settings.accumulation) * settings.epochs
        assert steps % interval == 0
        assert needed <= steps < needed + settings.evaluations


def test_seed_preset_is_the_notebooks_schedule():
    seed = PRESETS["seed"]
    assert (seed.window, seed.stride, seed.masking) == (16, 1, "time")
    assert (seed.epochs, seed.batch, seed.accumulation, seed.learning_rate, seed.warmup) == (10, 8, 4, 5e-4, 100)
    assert seed.weight_decay == 0.01
    assert seed.update_steps(220959) == (69050, 6905)


@pytest.mark.parametrize(
    "options",
    [["--arms", "relative,absurd"], ["--window", "1"], ["--stride", "0"], ["--epochs", "0"], ["--masking", "bars"]]
    + [[f"--{split}-windows", count] for split in ("train", "valid", "test") for count in ("0", "-3")],
)
def test_impossible_settings_are_refused(options, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(options)
    assert stop.value.code == 2
    assert options[0].strip("-") in capsys.readouterr().err.replace("_", "-")


def test_options_override_the_preset():
    options = parse_arguments(["--preset", "seed", "--window", "32", "--epochs", "2", "--arms", "both,absolute,both"])
    assert options.settings.window == 32
    assert options.settings.epochs == 2
    assert options.settings.max_relative_position == 31
    assert options.settings.masking == "time"
    assert options.arms == ["both", "absolute"]
    assert str(options.out) == os.path.join("runs", "chorales-seed")
