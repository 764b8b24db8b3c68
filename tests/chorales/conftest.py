"""Shared by the chorale tests: a small made-up data set, and the classic file where RELATTN_JSB points to it."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from examples.chorales.data.tokens import Chorales
from tests.chorales.helpers import REPOSITORY


@pytest.fixture(scope="session")
def classic_path() -> Path:
    path = os.environ.get("RELATTN_JSB")
    if not path:
        pytest.skip("RELATTN_JSB is not set: it names jsb-chorales-16th.json of the JSB Chorales dataset")
    return Path(path)


def made_up_piece(length: int, rng: np.random.Generator) -> list[list[int]]:
    """Four voices that hold their notes for a while, some steps lacking voices."""
    voices = np.array([72, 65, 58, 48]) + np.cumsum(rng.integers(-2, 3, (length // 4 + 1, 4)), axis=0)
    steps = np.repeat(voices, 4, axis=0)[:length].tolist()
    for time in rng.choice(length, size=length // 20, replace=False):
        steps[time] = steps[time][: rng.integers(0, 4)]
    return steps


@pytest.fixture(scope="session")
def small_json(tmp_path_factory) -> Path:
    """A JSON file of the classic layout with a few short made-up pieces."""
    rng = np.random.default_rng(0)
    counts = {"train": 12, "valid": 4, "test": 4}
    splits = {name: [made_up_piece(int(rng.integers(40, 120)), rng) for _ in range(n)] for name, n in counts.items()}
    path = tmp_path_factory.mktemp("data") / "small.json"
    path.write_text(json.dumps(splits), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def chorales(small_json) -> Chorales:
    return Chorales.load(small_json)


@pytest.fixture(scope="session")
def run_command():
    """Run a command in the repository root with one thread and no spinning; returns the finished process."""

    def run(*command: str, timeout: float = 900, **variables: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | variables
        return subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    return run
