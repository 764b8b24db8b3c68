"""The learning rate of an arm at a window, by one rule for all of them.

The rule: an arm is trained with seed 0 at each of RATES for a third of the budget, on a schedule of that length, and the
rate with the lowest validation loss is its own; of equal ones the smaller. The test set has no say.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .cells import CHOICES, CURVE_WINDOW, RATES, Cell, Choice
from .results import Results, read_result

Points = list[tuple[float, float]]  # (tokens seen, validation loss)


def validation_loss(result: dict) -> float:
    """Of the weights that were kept: the lowest that was seen."""
    return min(loss for _, loss in result["validation"])


def trial_losses(results: Mapping[Cell, dict], choice: Choice) -> dict[str, float]:
    """rate -> the validation loss of its trial, of those that have run."""
    return {rate: validation_loss(results[cell]) for rate, cell in choice.trials().items() if cell in results}


def chosen_rates(results: Mapping[Cell, dict]) -> dict[Choice, str]:
    """The rates that the rule chooses, where all trials have run."""
    found = {choice: trial_losses(results, choice) for choice in CHOICES}
    return {choice: min(RATES, key=losses.__getitem__) for choice, losses in found.items() if len(losses) == len(RATES)}


def chosen_in(folder: Path) -> dict[Choice, str]:
    """As `chosen_rates`, from the JSON files in a folder."""
    paths = {cell: folder / f"{cell.name}.json" for choice in CHOICES for cell in choice.trials().values()}
    return chosen_rates({cell: read_result(path, cell) for cell, path in paths.items() if path.is_file()})


def waiting(chosen: Mapping[Choice, str]) -> list[str]:
    """In words: what has no rate yet."""
    return [f"{choice.positions} at window {choice.window} ({choice.schedule})" for choice in CHOICES if choice not in chosen]


def at_rate_of(results: Results, choice: Choice, rate: str | None) -> dict[int, dict]:
    """seed -> result, of what is chosen for, at a rate; empty for None."""
    if rate is None:
        return {}
    one = choice.cell(choice.schedule, rate)
    return {cell.seed: result for cell, result in results.cells.items() if cell.group == one.group}


def at_own_rate(results: Results, choice: Choice) -> dict[int, dict]:
    """seed -> result, at the rate that the rule chooses; empty before that."""
    return at_rate_of(results, choice, chosen_rates(results.cells).get(choice))


def curve(result: dict) -> Points:
    """The validation loss against the tokens seen, of a cell with a budget in tokens: those are spread evenly over the steps."""
    tokens = result["configuration"]["schedule"]["tokens"]
    return [(tokens * step / result["steps"], loss) for step, loss in result["validation"]]


CURVE_KINDS = ("2 M tokens, 2e-3", "2 M tokens, own rate", "5.3 M tokens, each rate", "16 M tokens, own rate")


def curves(results: Results) -> dict[tuple[str, str], list[Points]]:
    """(positions, one of CURVE_KINDS) -> the curves of its runs at CURVE_WINDOW; only of those that have run."""
    found = {}
    for positions in ("absolute", "relative"):
        short, long = (Choice(schedule, CURVE_WINDOW, positions) for schedule in ("short", "curve"))
        tried = [results.cells[cell] for cell in long.trials().values() if cell in results.cells]
        usual, own, longest = at_rate_of(results, short, "2e-3"), at_own_rate(results, short), at_own_rate(results, long)
        for kind, runs in zip(CURVE_KINDS, (usual.values(), own.values(), tried, longest.values()), strict=True):
            if runs and not (kind == CURVE_KINDS[1] and own == usual):
                found[positions, kind] = [curve(result) for result in runs]
    return found


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
