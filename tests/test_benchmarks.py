"""The benchmarks' measuring and their list of cases; not what they measure."""

import inspect
import json
import sys

import pytest
import torch

from benchmarks import measure, report, speed
from benchmarks.cases import OWN, SKEW, TORCH, attention
from relattn import cpu


def test_sides_take_turns_and_slow_ones_drop_out():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = measure.interleave(steps, 0.0, least=4, limits={"c": 2}, warm=False)
    assert "".join(calls) == "abc" + "bca" + "ab" + "ab"  # each round starts with the next side
    assert {name: timing["rounds"] for name, timing in timings.items()} == {"a": 4, "b": 4, "c": 2}
    low, high = timings["a"]["quartiles_ms"]
    assert low <= timings["a"]["median_ms"] <= high


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_extra_memory_is_what_a_step_frees():
    def step():
        passing = torch.ones(8, 2**20)  # 32 MiB
        return (passing[:2].clone(),)

    extra, returned = measure.extra_memory(step)
    assert returned == 8 * 2**20
    assert abs(extra - 32 * 2**20) < 4 * 2**20


def test_fresh_process():
    with measure.Watch() as watch:
        result = measure.in_fresh_process(_double, {"number": 21}, threads=1)
    assert result == [42, 1]
    assert watch.seen["seconds"] > 0
    with pytest.raises(RuntimeError, match="must be a number"):
        measure.in_fresh_process(_double, {"number": "x"})


def _double(number):
    if isinstance(number, str):
        raise TypeError("must be a number")
    return 2 * number, torch.get_num_threads()


def test_goals():
    timings = {"own": {"median_ms": 10.0, "quartiles_ms": [9.0, 11.0], "rounds": 5}}
    timings["other"] = timings["own"] | {"median_ms": 8.0}
    fast = report.speeds("case", "own", timings, {"other": 0.8})
    slow = report.costs("case", "other", timings, {"own": 1.2})
    missed, count = report.goals([fast, slow])
    assert count == 2
    assert missed == ["case: own 1.25, goal <= 1.2"]
    assert "0.80   >= 0.8   met" in report.text(fast)
    assert "MISSED" in report.text(slow)


@pytest.mark.parametrize("quick", [True, False])
def test_cases_can_be_called(quick):
    cases = speed.cases(quick)
    assert {case.name for case in cases} == set(speed.NAMES)
    for case in cases:
        inspect.signature(case.function).bind(**json.loads(json.dumps(case.arguments)))


@pytest.mark.skipif(cpu.unavailable() is not None, reason="no native CPU library")
@pytest.mark.parametrize("setting", [{"sides": [OWN, TORCH, SKEW]}, {"clip": 4}, {"causal": True}, {"dtype": "bfloat16"}])
def test_attention_case(setting):
    forward, both = attention(32, 16, 0.0, **{"sides": [OWN, TORCH]} | setting)
    assert forward["title"].startswith("forward, L = 32, D = 16")
    assert [row["name"] for row in both["rows"]] == setting.get("sides", [OWN, TORCH])
    if SKEW in setting.get("sides", []):
        assert 0 < forward["largest_difference"] < 1e-4
    json.dumps([forward, both])
