"""The learning rate of an arm at a window, by one rule for all of them.

The rule: the arm is trained with seed 0 at each of RATES for a third of the budget, with a schedule of that length, and
the rate with the lowest validation loss is its own; of equal ones the smaller. The test set has no say.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .cells import Cell, Choice, at_rate, trials
from .results import Results, read_result
from .wording import LONGER

Points = list[tuple[float, float]]  # (tokens seen, validation loss)


def trial_losses(results: Mapping[Cell, dict]) -> dict[Choice, dict[str, float]]:
    """(window, positions) -> rate -> the validation loss of its trial, of those that have run."""
    return {
        choice: {rate: validation_loss(results[cell]) for rate, cell in by_rate.items() if cell in results}
        for choice, by_rate in trials().items()
    }


def validation_loss(result: dict) -> float:
    """Of the weights that were kept: the lowest that was seen."""
    return min(loss for _, loss in result["validation"])


def chosen_rates(results: Mapping[Cell, dict]) -> dict[Choice, str]:
    """The rates that the rule chooses, for every choice whose trials have all run."""
    found = trial_losses(results)
    complete = {choice: losses for choice, losses in found.items() if len(losses) == len(trials()[choice])}
    return {choice: min(losses, key=lambda rate: losses[rate]) for choice, losses in complete.items()}


def chosen_in(folder: Path) -> dict[Choice, str]:
    """As `chosen_rates`, from the JSON files in a folder."""
    cells = [cell for by_rate in trials().values() for cell in by_rate.values()]
    paths = {cell: folder / f"{cell.name}.json" for cell in cells}
    return chosen_rates({cell: read_result(path, cell) for cell, path in paths.items() if path.is_file()})


def waiting_for(folder: Path) -> list[str]:
    """In words: what has no rate yet."""
    chosen = chosen_in(folder)
    return [f"{positions} at window {window}" for window, positions in trials() if (window, positions) not in chosen]


def at_own_rate(results: Results, schedule: str, choice: Choice) -> dict[Cell, dict]:
    """The cells of a schedule ("short", "curve") at the rate of a window's arm; none before that is chosen."""
    rate = chosen_rates(results.cells).get(choice)
    if rate is None:
        return {}
    window, positions = choice
    setting = LONGER | {"window": window, "schedule": at_rate(schedule, rate)}
    return results.having(arm=positions, **setting)


def curve(cell: Cell, result: dict) -> Points:
    """The validation loss against the tokens that were seen; those of a budget are spread evenly over the steps."""
    tokens = cell.settings.tokens
    assert tokens is not None  # such are the schedules at rates
    return [(tokens * step / result["steps"], loss) for step, loss in result["validation"]]


def power_law(points: Points) -> tuple[float, float]:
    """(a, b) of loss = exp(a) tokens^b, least squares in logarithms over the second half of the tokens."""
    half = points[-1][0] / 2
    tokens, losses = np.log([point for point in points if point[0] >= half]).T
    slope, start = np.polyfit(tokens, losses, 1)
    return float(start), float(slope)


def tokens_to_reach(points: Points, loss: float) -> float:
    """Tokens at which the power law through the curve's second half comes down to a loss: an extrapolation."""
    start, slope = power_law(points)
    return math.exp((math.log(loss) - start) / slope) if slope < 0 else math.inf
