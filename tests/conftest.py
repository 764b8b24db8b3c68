"""The same tests in every run, whatever ran before in the same process; and what `make explore` finds is kept."""

from __future__ import annotations

import random
import sys
from collections.abc import Generator

import pytest
import torch

from relattn import plans

try:
    from tests import draws
except ModuleNotFoundError:  # without hypothesis, as on GPU machines with torch and pytest alone: they run what needs no more
    draws = None  # type: ignore[assignment]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A hook, not a fixture: fixtures of a module or a session come before those of a test, and draw numbers too."""
    torch.manual_seed(0)
    plans.forget()  # a test may have changed what they hold
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function, call: pytest.CallInfo
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and call.excinfo is not None and draws is not None and draws.exploring():
        for line in draws.keep(item.obj, call.excinfo.value):
            report.sections.append(("Kept", f"{line}\nis now an explicit example of {item.nodeid}."))
    return report
