import pytest

from tests.distributed.workers import Pool


@pytest.fixture(scope="package")
def pool(tmp_path_factory):
    processes = Pool(str(tmp_path_factory.mktemp("group")))
    yield processes
    processes.close()
