"""The same examples in every run, and that what `make explore` finds can be written down and comes again."""

import math

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from tests import draws, explore, fuzz


def fails_from_60(*decorators):
    @draws.given
    def fails_from_60(draw) -> None:
        number, _ = draw(st.integers(0, 100)), draw(st.sampled_from((-math.inf,)))
        assert number < 60

    for decorator in decorators:
        fails_from_60 = decorator(fails_from_60)
    return fails_from_60


def test_examples_are_drawn_without_chance() -> None:
    assert settings().derandomize != draws.exploring()
    assert settings().deadline is None


def test_each_test_starts_from_the_same_seed() -> None:
    assert torch.initial_seed() == 0


def test_a_failure_says_its_explicit_example_which_fails_again() -> None:
    with pytest.raises(AssertionError) as caught:
        fails_from_60()()
    lines = [note for note in caught.value.__notes__ if note.startswith("@")]
    assert lines == ['@draws.example(60, float("-inf"))']
    with pytest.raises(AssertionError) as caught:
        fails_from_60(draws.example(61, -math.inf))()
    assert '@draws.example(61, float("-inf"))' in caught.value.__notes__


@pytest.mark.parametrize("values", [(1,), (1, -math.inf, 2)])
def test_an_example_that_the_test_has_outgrown_fails(values) -> None:
    with pytest.raises(AssertionError, match="out of date"):
        fails_from_60(draws.example(*values))()


def test_kept_examples_stand_above_their_test(tmp_path, monkeypatch) -> None:
    path = tmp_path / "test_file.py"
    before = "class Tests:\n    @draws.given\n    def fails_from_60(draw): ...\n"
    path.write_text(before)
    monkeypatch.setattr(draws.inspect, "getfile", lambda _: str(path))
    error = AssertionError()
    error.__notes__ = ["Draw 1: 60", '@draws.example(60, float("-inf"))', f"@draws.example({', '.join(['torch.float32'] * 20)})"]
    for _ in range(2):  # once, however often they are found
        assert list(draws.keep(fails_from_60(), ExceptionGroup("", [error]))) == error.__notes__[1:]
    kept = path.read_text()
    assert kept.count("@draws.example") == 2
    assert '    @draws.example(60, float("-inf"))\n    @draws.given\n' in kept
    assert max(map(len, kept.splitlines())) <= draws.WIDTH
    compile(kept, str(path), "exec")


@pytest.mark.parametrize(
    ("status", "printed", "failed"),
    [
        (0, "seed 7 ...\nblocked float32: 1 calls from seed 7, 0 failed\n", []),
        (1, "seed 7 ...\nseed 7: AssertionError: output: error 3\nseed 8 ...\nblocked float32: 2 calls from seed 7, 1 failed\n", [7]),
        (-11, "seed 7 ...\nseed 8 ...\n", [8]),
    ],
)
@pytest.mark.parametrize(("module", "name"), [("fuzz", "cpu"), ("hidden", "hidden:cpu")])
def test_what_fuzz_finds_is_kept(module, name, status, printed, failed, tmp_path, monkeypatch) -> None:
    for kept in (explore, fuzz):
        monkeypatch.setattr(kept, "FOUND", tmp_path / "found.txt")
    monkeypatch.setattr(explore, "run", lambda *_, **__: (status, printed))
    fuzz.FOUND.write_text("# these\nblocked float16 3\n")
    lines = explore.fuzz("cpu", module, RELATTN_CPU_VARIANT="avx2")
    assert [seed for seed, _ in fuzz.failed_once(name)] == failed
    assert fuzz.failed_once("blocked") == [(3, torch.float16)]
    assert len(lines) == len(failed)
    assert all(line.startswith(f"RELATTN_CPU_VARIANT=avx2 python -m tests.{module} --backend cpu --dtype ") for line in lines)
    assert all(line.endswith(f" --seed {seed} --count 1") for line, seed in zip(lines, failed, strict=True))


def test_failed_hypothesis_tests_are_named_once(monkeypatch) -> None:
    printed = "FAILED tests/test_a.py::test_b[1] - AssertionError: x\n1 failed\n"
    commands: list[tuple[str, ...]] = []

    def run(*command: str) -> tuple[int, str]:
        commands.append(command)
        return 1, printed

    monkeypatch.setattr(explore, "run", run)
    skipped: set[str] = set()
    assert explore.hypothesis(skipped) == ["python -m pytest tests/test_a.py::test_b[1]"]
    explore.hypothesis(skipped)
    assert "--deselect=tests/test_a.py::test_b[1]" not in commands[0]
    assert "--deselect=tests/test_a.py::test_b[1]" in commands[1]
