"""The same tests in every run: `make test` draws the same examples everywhere; `make explore` draws new ones."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from tests import draws

# Neither the clock nor the machine's load decides over a test.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
new = (Phase.explicit, Phase.generate, Phase.shrink)  # not again what a database remembers: failures become explicit
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow], phases=new, database=None)
settings.load_profile("same")  # pytest --hypothesis-profile=explore loads the other one

# One draw of twenty would be a constant from the sources of the modules imported by then, and these differ between runs.
with contextlib.suppress(ImportError, AttributeError):  # internal: hypothesis before 6.130 has it not
    from hypothesis.internal.conjecture import providers

    providers.HypothesisProvider._local_constants = providers.Constants()  # type: ignore[assignment]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Which tests ran before in the same process must not matter: not to fixtures of the module or session either."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    if report.failed and call.excinfo is not None and settings.get_current_profile_name() == "explore":
        for line in draws.keep(item.obj, call.excinfo.value):  # type: ignore[attr-defined]
            report.sections.append(("Kept", f"{line}\nis now an explicit example of {item.nodeid}, which reproduces the failure."))
    return report
