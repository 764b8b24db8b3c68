"""The study's costly fixture."""

import pytest

from tests.chorales.study.helpers import command


@pytest.fixture(scope="session")
def finished(small_json, tmp_path_factory, run_command):
    """Two cells of the tiny preset, made by two processes that share the folder; and what they printed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = run_command(*command(small_json, out, "--jobs=2", "--only=*-relative*"))
    assert done.returncode == 0, done.stderr
    return out, done.stdout
