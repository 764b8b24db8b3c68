"""The learning rate of an arm at a window, by one rule for all of them.

The rule: the arm is trained with seed 0 at each of RATES for a third of the budget, with a schedule of that length, and
the rate with the lowest validation loss is its own; of equal ones the smaller. The test set has no say.
"""

from collections.abc import Mapping
from pathlib import Path

from .cells import Cell, Choice, trials
from .results import read_result


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
