import pytest

from tests.distributed.processes import Processes


@pytest.fixture(scope="package")
def pool():
    """Ranks of gloo groups of 1 to 4."""
    with Processes(4) as started:
        yield started
