"""Cells, schedules and presets, and the options that choose among them."""

import dataclasses

import pytest

from examples.chorales.compare.settings import PRESETS
from examples.chorales.study.__main__ import parse_arguments
from examples.chorales.study.cells import (
    ABSOLUTE,
    MASKING,
    PHASES,
    POSITIONS,
    RELATIVE,
    SCHEDULES,
    SKEWS,
    TABLES,
    Choice,
    preset_cells,
)
from tests.chorales.study.helpers import cell


def test_cells_of_presets():
    grid = preset_cells("grid")
    assert len({made.name for made in grid}) == len(grid)
    for name, levels in (("positions", POSITIONS), ("skew", SKEWS), ("tables", TABLES), ("masking", MASKING), ("phase", PHASES)):
        assert {getattr(made, name) for made in grid} - {None} == set(levels)
    assert {made.window for made in grid} == {16, 64, 128, 256, 512}
    assert {made.voice for made in grid} == {True, False}
    seeds = {}
    for made in grid:
        seeds.setdefault(made.group, []).append(made.seed)
    assert all(found == [0, 1, 2] for found in seeds.values())
    assert [made.name for made in grid[:2]] == ["w016-time-any-absolute-s0", "w016-time-any-relative.published.normal-s0"]
    assert all(made.group.startswith(tuple(f"w{made.window:03d}")) for made in preset_cells("tiny"))


def test_seed_preset_is_the_notebooks_schedule():
    made = preset_cells("seed", 1)
    assert [found.arm for found in made] == ["absolute", "relative.published.normal", "relative", "both"]
    for found in made:
        settings = found.settings.as_settings(found, 220_959 * 16)
        notebook = PRESETS["seed"]
        one_batch = dict(batch=notebook.batch * notebook.accumulation, accumulation=1)  # of as many windows a step
        assert settings == dataclasses.replace(notebook, seed=found.seed, **one_batch)


def test_rates_wait_for_their_trials():
    trials = preset_cells("rates")
    assert len({made.name for made in trials}) == len(trials) == (2 * 3 + 2) * 3
    for made in trials:
        budget = SCHEDULES["short"].tokens * (8 if made.schedule.startswith("curve") else 1)
        assert made.settings.tokens == budget // 3
    assert {made.settings.learning_rate for made in trials} == {1e-3, 2e-3, 4e-3}
    chosen = {Choice("short", 512, "absolute"): "4e-3", Choice("short", 512, "relative"): "2e-3", Choice("curve", 512, "relative"): "1e-3"}
    cells = preset_cells("rates", 2, chosen)
    more = [made for made in cells if made not in trials]
    assert [made.name for made in more] == [
        "w512-step-any-absolute-short@4e-3-s0",
        "w512-step-any-relative-s0",  # at the usual rate the grid's own run serves
        "w512-step-any-absolute-short@4e-3-s1",
        "w512-step-any-relative-s1",
        "w512-step-any-relative-curve@1e-3-s0",
        "w512-step-any-relative-curve@1e-3-s1",
    ]
    assert more[1] in preset_cells("grid")
    assert [made.settings.learning_rate for made in more] == [4e-3, 2e-3, 4e-3, 2e-3, 1e-3, 1e-3]
    assert cells.index(more[3]) < cells.index(trials[-1]) < cells.index(more[4])  # the long ones and their trials last


def test_budget_is_in_real_tokens():
    made = cell(window=64, schedule="short")
    settings = made.settings.as_settings(made, 500_000)
    assert settings.epochs == 4
    assert settings.batch * 64 == SCHEDULES["short"].batch_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(positions="some"), "positions: expected one of none, absolute"),
        (dict(skew="correct"), "skew: expected one of None"),
        (RELATIVE | dict(skew="wrong"), "skew: expected one of correct, published, got 'wrong'"),
        (RELATIVE | dict(tables=None), "tables: expected one of small, normal, got None"),
        (dict(masking="bars"), "masking: expected one of time, step, token, span, got 'bars'"),
        (dict(phase="odd"), "phase: expected"),
        (dict(schedule="forever"), "schedule: expected"),
        (dict(window=18), "window: expected a multiple of 4"),
        (dict(seed=-1), "seed: expected 0 or more"),
    ],
)
def test_impossible_cells_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        cell(ABSOLUTE, **changes)


@pytest.mark.parametrize(
    "options",
    [["--jobs", "0"], ["--seeds", "0"], ["--hours", "0"], ["--preset", "huge"], ["walk"], ["--results", "runs"], ["--readme", "x"]]
    + [["--jobs", "2", "report"], ["--only", "w016-*", "report"], ["--out", "runs", "report"], ["--list", "report"]],
)
def test_impossible_options_are_refused(options, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(options)
    assert stop.value.code == 2
    assert (options[0].strip("-") if options[0] != "walk" else "action") in capsys.readouterr().err
