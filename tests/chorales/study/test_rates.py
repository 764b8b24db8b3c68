"""The rule for learning rates, and curves."""

import math

import pytest

from examples.chorales.study.cells import Choice
from examples.chorales.study.rates import chosen_rates, curve, power_law, tokens_to_reach

CHOICE = Choice("short", 128, "absolute")


def results(losses):
    """As of a run: rate -> the validation losses of its trial."""
    made = CHOICE.trials()
    return {made[rate]: {"steps": 10, "validation": [[5, seen[0]], [10, seen[-1]]]} for rate, seen in losses.items()}


@pytest.mark.parametrize(
    ("losses", "rate"),
    [
        ({"1e-3": [0.5], "2e-3": [0.4], "4e-3": [0.6]}, "2e-3"),
        ({"1e-3": [0.5], "2e-3": [0.4], "4e-3": [0.3, 0.6]}, "4e-3"),  # of the weights that are kept, not the last
        ({"1e-3": [0.5], "2e-3": [0.5], "4e-3": [0.5]}, "1e-3"),
        ({"1e-3": [0.5], "2e-3": [0.4]}, None),
        ({}, None),
    ],
)
def test_lowest_validation_loss_chooses(losses, rate):
    chosen = chosen_rates(results(losses))
    assert chosen == ({CHOICE: rate} if rate else {})


def test_power_law_of_a_curve():
    """The law of its second half, whatever the first did."""
    points = [(1.0, 9.0), (2.0, 8.0), *((float(t), 3 * t**-0.5) for t in range(10, 21))]
    start, slope = power_law(points)
    assert (math.exp(start), slope) == pytest.approx((3, -0.5))
    assert tokens_to_reach(points, 0.3) == pytest.approx(100)
    assert tokens_to_reach([(1.0, 1.0), (2.0, 1.0), (3.0, 1.5)], 0.5) == math.inf


def test_curve_counts_tokens():
    (made,) = results({"2e-3": [0.5, 0.4]})
    result = {"configuration": made.configuration(), "steps": 10, "validation": [[5, 0.5], [10, 0.4]]}
    assert curve(result) == [(made.settings.tokens / 2, 0.5), (made.settings.tokens, 0.4)]
