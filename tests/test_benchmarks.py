"""The benchmarks' measuring and their list of cases; not what they measure."""

import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as sweep
from benchmarks import measure, peers, processes, render, report, speed, table1, trial
from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import first as gpu_check_first
from benchmarks.gpu_check import profile as gpu_check_profile
from benchmarks.gpu_check import running
from benchmarks.gpu_check import train as gpu_check_train
from benchmarks.peers import PEERS, Problem
from benchmarks.speed import OWN, SKEW, TORCH, attention
from examples.chorales.storage import read_json, write_json
from relattn.backends import cpu

CLONE = Path(__file__).resolve().parents[1]


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
    with processes.Watch() as watch:
        result = processes.in_fresh_process(_double, {"number": 21}, threads=1)
    assert result == [42, 1]
    assert watch.seen["seconds"] > 0
    with pytest.raises(RuntimeError, match="must be a number"):
        processes.in_fresh_process(_double, {"number": "x"})


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


def _ends(how):
    if how == "hang":
        time.sleep(60)
    if how == "fail":
        raise ValueError("bad luck")
    if how == "grow":
        return trial.trial("skew", Problem(2048)._asdict(), 0.0, memory_limit=200 * 2**20)
    os.kill(os.getpid(), getattr(signal, how))


@pytest.mark.parametrize(
    ("how", "status", "detail"),
    [
        ("hang", "timeout", "3 s"),
        ("fail", "error", "ValueError: bad luck"),
        ("SIGSEGV", "crash", "SIGSEGV"),
        ("SIGKILL", "out of memory", "killed"),
        pytest.param("grow", "out of memory", "memory", marks=pytest.mark.skipif(sys.platform != "linux", reason="/proc")),
    ],
)
def test_what_becomes_of_a_process_is_a_row(how, status, detail):
    row = processes.attempt(_ends, {"how": how}, timeout=3 if how == "hang" else 120, threads=1)
    assert row["status"] == status
    assert detail in row["detail"]


SETTINGS = {
    "plain": {}, "clip": {"clip": 5}, "causal": {"causal": True}, "both": {"causal": True, "clip": 5}, "batch": {"batch": 2, "clip": 200}
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("passed", peers.PASSES)
@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if not peer.compiled and peer.devices != ("cuda",)])
def test_peers_are_right(name, passed, setting):
    problem, peer = Problem(37, passed, heads=3, head_dim=16, **SETTINGS[setting]), PEERS[name]
    if peer.refusal(problem):
        pytest.skip(peer.refusal(problem))
    errors = trial.check(problem, peer.make(problem), problem.inputs(), peer.relative)
    assert list(errors) == (["output", "query", "key", "value", "rel_k"] if passed == "train" else ["output"])[: 5 if peer.relative else 4]
    assert max(errors.values()) < trial._ROUNDING


@pytest.mark.parametrize(("name", "passed"), [("skew-compiled", "train"), ("flex", "forward")])
def test_compiled_peers_are_right(name, passed):
    problem = Problem(37, passed, heads=2, head_dim=16, causal=True)
    assert max(trial.check(problem, PEERS[name].make(problem), problem.inputs()).values()) < trial._ROUNDING


@pytest.mark.parametrize("length", [20, 300])  # all queries, and strips of them, are compared
@pytest.mark.parametrize("passed", peers.PASSES)
def test_a_wrong_peer_is_found(monkeypatch, passed, length):
    def shifted(problem):
        right = peers.shaw(problem)
        return lambda query, key, value, rel_k: right(query, key, value, rel_k.roll(1, 0))

    def stale(problem):  # right, but for one gradient
        right = peers.shaw(problem)
        return lambda query, key, value, rel_k: right(query, key, value, rel_k.detach() + 1e-3 * (rel_k - rel_k.detach()))

    problem = Problem(length, passed, heads=2, head_dim=16)._asdict()
    for name, make in (("shifted", shifted), ("stale", stale), ("right", peers.shaw)):
        monkeypatch.setitem(PEERS, name, peers.Peer(name, name, make))
        row = trial.trial(name, problem, 0.0)
        found = name == "shifted" or (name == "stale" and passed == "train")
        assert row["status"] == ("wrong" if found else "ok"), row
        assert row["rounds"] >= 3


def test_operations_are_counted():
    plain = Problem(100, heads=3, head_dim=7, batch=2)
    each = 2 * 2 * 3 * 7 * 100 * 100
    assert trial.flops(plain) == 3 * each
    assert trial.flops(plain, relative=False) == 2 * each
    assert trial.flops(plain._replace(passed="train")) == 11 * each
    assert trial.flops(plain._replace(clip=12)) == 2 * each + each * 25 / 100
    assert trial.flops(plain._replace(causal=True)) == 3 * each * 101 / 200
    assert trial.flops(plain._replace(passed="decode")) == 3 * each / 100


def run_sweep(out, *more):
    arguments = ["--lengths", "64,96", "--peers", "relattn-blocked,sdpa,flash-deberta", "--seconds", "0", "--threads", "1"]
    return sweep.main([*arguments, "--device", "cpu", "--out", str(out), *more])


def test_sweep_from_command_line_to_report(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert run_sweep(out, "--pass", "forward") == 0
    results = read_json(out / "results.json")
    assert results["environment"]["torch"] == torch.__version__
    assert results["matrix_tflops"] > 0
    rows = {(row["length"], row["peer"]): row for row in results["rows"]}
    assert len(rows) == len(results["rows"]) == 6
    for (length, peer), row in rows.items():
        if peer == "flash-deberta":
            assert row["status"] == "not applicable"
            continue
        assert row["status"] == "ok"
        low, high = row["quartiles_ms"]
        assert 0 < low <= row["median_ms"] <= high
        # Of the operations and the times; under 100 it is only on a machine that is left alone.
        tflops = trial.flops(Problem(length), PEERS[peer].relative) / row["median_ms"] / 1e9
        assert row["tflops"] == pytest.approx(tflops, abs=1e-5)
        percent = 100 * tflops / results["matrix_tflops"]
        assert row["percent_of_matrix_ceiling"] == pytest.approx(percent, abs=0.01, rel=0.02)
        assert row["percent_of_matrix_ceiling"] > 0
        assert row["returned_bytes"] == 4 * 8 * 64 * length
        assert row["peak_bytes"] >= row["returned_bytes"]
    text = (out / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert "**relattn (blocked PyTorch)**" in text
    assert "FlashDeBERTa, forward" in text
    for name in ("time", "memory", "speed"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    # Again, with the last rows lost, as by a kill, and one more pass: what is there stays, what is not is measured.
    results["rows"] = results["rows"][:4]
    write_json(out / "results.json", results)
    monkeypatch.setattr(sweep, "trial", _not_measured)
    assert run_sweep(out, "--pass", "forward,decode") == 0
    again = read_json(out / "results.json")["rows"]
    assert again[:4] == results["rows"]
    assert len(again) == 12
    assert {row["median_ms"] for row in again[4:] if row["status"] == "ok"} == {1.25}

    # Other settings do not mix with these rows.
    assert run_sweep(out, "--pass", "forward", "--clip", "8") == 2
    assert "clip None -> 8" in capsys.readouterr().err
    assert read_json(out / "results.json")["rows"] == again
    assert run_sweep(out, "--pass", "forward", "--clip", "8", "--overwrite") == 0
    assert len(read_json(out / "results.json")["rows"]) == 6


def _not_measured(**_):
    return {"status": "ok", "median_ms": 1.25, "quartiles_ms": [1.0, 1.5], "rounds": 3, "peak_bytes": 2**20, "returned_bytes": 2**19}


def test_longer_ones_are_not_tried_after_memory_ran_out():
    rows = [{"pass": "train", "length": 512, "peer": "shaw", "status": "out of memory"}]
    row = sweep._row(None, rows, Problem(1024, "train"), "shaw")
    assert row == {"status": "out of memory", "detail": "not tried: out of memory at L = 512"}


def test_the_least_disturbed_try_counts(monkeypatch):
    times, busy = iter((5.0, 3.0, 4.0, 1.0)), iter((0.9, 0.3, 0.5, 0.0))

    class Disturbed(processes.Watch):
        def __exit__(self, *_):
            self.seen = {"other_processes_cores": next(busy)}

    monkeypatch.setattr(sweep, "Watch", Disturbed)
    monkeypatch.setattr(sweep, "attempt", lambda *_: {"status": "ok", "median_ms": next(times)})
    options = sweep.parse_arguments(["--tries", "3"])
    assert sweep._row(options, [], Problem(64), "sdpa")["median_ms"] == 3.0
    assert sweep._row(options, [], Problem(64), "sdpa")["median_ms"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "skew,skewed"], "--peers: expected some of relattn-triton"),
        (["--pass", "backward"], "--pass: expected some of forward, train, decode"),
        (["--lengths", "512,0"], "expected a number of 1 or more, got '0'"),
        (["--head-dim", "x"], "--head-dim: expected a number"),
        (["--dtype", "float64"], "--dtype"),
        pytest.param(["--device", "cuda"], "torch sees no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        sweep.parse_arguments(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def crafted(folder):
    """Results with every kind of row."""
    rows = []
    for length in (512, 2048, 8192):
        for peer, time_ms in (("relattn-cpu", 2.0), ("relattn-reference", 9.0), ("skew", 20.0), ("sdpa", 1.0)):
            row = {"pass": "forward", "length": length, "peer": peer, "status": "ok", "median_ms": time_ms * length / 512, "rounds": 3}
            row |= {"quartiles_ms": [row["median_ms"]] * 2, "peak_bytes": length * 2**12, "percent_of_matrix_ceiling": 50.0}
            rows.append(row)
    rows[-2] = {"pass": "forward", "length": 8192, "peer": "skew", "status": "out of memory", "detail": "does not fit"}
    rows.append({"pass": "forward", "length": 512, "peer": "shaw", "status": "wrong", "errors": {"output": 99.0}, "median_ms": 0.001})
    rows[-1] |= {"quartiles_ms": [0.001, 0.001], "peak_bytes": 1, "percent_of_matrix_ceiling": 99.0}
    rows.append({"pass": "forward", "length": 512, "peer": "flex", "status": "not applicable", "detail": "is not here"})
    settings = {"batch": 1, "heads": 8, "head_dim": 64, "dtype": "float32", "causal": False, "clip": None}
    environment = {"processor": "A processor", "cores": 2, "threads": 2, "torch": "2.13", "relattn": "0.1"}
    content = {"settings": settings, "environment": environment, "matrix_tflops": 0.2, "date": "2026-01-02", "commits": ["abc"]}
    write_json(folder / "results.json", content | {"rows": rows})


def test_report_of_every_kind_of_row(tmp_path):
    crafted(tmp_path)
    assert render.main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "| skew, eager | 20.0 ms (10.00x) | 80.0 ms (10.00x) | out of memory |" in text
    assert "| Shaw's (L, L, D) | wrong |  |  |" in text
    assert "- skew, eager, forward, L = 8192: out of memory (does not fit)" in text
    assert "errors of {'output': 99.0} roundings" in text
    assert "FlexAttention, gathered, forward: is not here" in text
    first = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert set(first) == {"time.png", "memory.png", "speed.png"}
    render.main([str(tmp_path)])
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == first  # the same rows, the same pictures


def test_part_of_the_readme(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    crafted(tmp_path / "results")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nafter\n")
    assert render.main([str(tmp_path / "results"), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- benchmarks -->\n")
    assert text.endswith("<!-- /benchmarks -->\nafter\n")
    assert "](results/time.png)" in text
    assert "old" not in text
    readme.write_text("no marks")
    assert render.main([str(tmp_path / "results"), "--readme", str(readme)]) == 2
    assert "--readme" in capsys.readouterr().err


def test_manual_shows_the_committed_results():
    page = (CLONE / "docs" / "benchmarks.md").read_text()
    part = page.split("<!-- benchmarks -->")[1].split("<!-- /benchmarks -->")[0]
    folders = [CLONE / "docs" / place for place in dict.fromkeys(re.findall("`(.+?)/report.md`", part))]
    assert folders
    assert part == "\n" + render.readme_part(folders, CLONE / "docs")
    for folder in folders:
        assert (folder / "report.md").read_text() == render.report(render.Results(folder))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_table_1(tmp_path, capsys):
    assert table1.main(["--device", "cpu", "--lengths", "650", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "table1.json").read_text())["rows"]
    assert len(rows) == 3
    for row in rows:
        for field in ("relative_tensors", "relative_logits"):
            assert row[field] == pytest.approx(row[f"{field}_computed"], rel=0.02, abs=2**16)  # a few pages of the allocator
    whole = {(row["method"], row["length"]): row["whole_call"] for row in rows}
    assert whole["shaw", 650] > 108e6
    assert whole["skew", 650] > 3 * 4 * 650**2
    if cpu.unavailable() is None:
        assert whole["relattn", 650] < 4 * 650**2  # less than one L x L
    printed = capsys.readouterr().out
    assert "| - in the paper | 108 |" in printed
    assert "108 + 1.7" in printed
    assert (tmp_path / "table1.md").read_text() in printed


def test_timed_tests_run():
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-disable", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=CLONE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout


# ---- the GPU check ----


def test_stages_of_the_gpu_check_run_dry(tmp_path):
    """Every job's lines, in tiny sizes and with Triton's interpreter: no typo shall cost time on a GPU."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry", "--out", str(tmp_path), *gpu_check.STAGES]
    result = subprocess.run(command, capture_output=True, text=True, cwd=CLONE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{stage}{end}" for stage in gpu_check.STAGES for end in (".json", "_logs.tar.gz")
    )
    parts = {stage: read_json(tmp_path / f"{stage}.json")["parts"] for stage in gpu_check.STAGES}
    assert all(part["status"] == "ok" for stage in parts.values() for part in stage.values())
    assert max(parts["first"]["right"]["result"]["L 9"].values()) < trial._ROUNDING
    assert parts["first"]["fuzz"]["result"]["calls"] == 1
    times = parts["speed"]["sweep"]["result"]["times"]
    assert set(times) == {"forward", "query", "key", "table"}
    assert all(milliseconds > 0 for kernel in times.values() for milliseconds in kernel.values())
    sides = parts["speed"]["peers"]["result"]["train"]
    assert sides["skew"]["relattn's speed"] == pytest.approx(sides["skew"]["ms"] / sides["relattn-triton"]["ms"], rel=0.01)
    assert parts["train"]["decoder"]["result"]["first losses apart"] < 1e-4
    assert parts["train"]["w2v-BERT"]["result"]["first losses apart"] < gpu_check_train._APART
    assert parts["train"]["command"]["result"]["tokens per second"] > 0


@pytest.mark.parametrize("stage", ["first", "speed", "profile", "train"])
def test_jobs_on_a_gpu_can_be_called(stage, monkeypatch):
    """As they are planned there: names are unlike, arguments fit and go through JSON, the parts end in time."""
    pytest.importorskip("triton")
    module = importlib.import_module(f"benchmarks.gpu_check.{stage}")
    if hasattr(module, "tool"):
        monkeypatch.setattr(module, "tool", lambda name: f"/opt/{name}")
    jobs = [job for group in module.plan(dry=False) for job in group.jobs]
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        inspect.signature(job.function).bind(**json.loads(json.dumps(job.arguments)))
        assert 0 < job.limit < 300


def _job(how):
    """What may become of a job. (A process calls it by its name.)"""
    print(json.dumps({"so far": 1}), flush=True)
    if how == "fail":
        raise SystemExit("it was wrong")
    return {"how": how}


def test_jobs_end_in_time_with_what_they_started(tmp_path):
    well = running.Job("well", _job, {"how": "well"}, 100.0)
    shout = well._replace(name="parsed", parse=lambda log: log.upper().splitlines()[-1])
    hangs = well._replace(name="hang", limit=2.0, prefix=("sh", "-c", 'sleep 600 & echo "{\\"child\\": $!}"; wait'))
    groups = [
        running.Group([well, hangs, shout], at_once=3),
        running.Group([well._replace(name="wrong", arguments={"how": "fail"})], essential=True),
        running.Group([well._replace(name="never")]),
    ]
    report = running.run_stage("some", groups, tmp_path, 300.0)
    assert read_json(tmp_path / "some.json") == report
    parts = report["parts"]
    assert parts["well"]["result"] == {"how": "well"}
    assert parts["parsed"]["result"] == '{"HOW": "WELL"}'
    assert parts["hang"]["status"].startswith("stopped after")
    assert not _alive(parts["hang"]["result"]["child"])
    assert parts["wrong"]["status"] == "exit status 1"
    assert parts["wrong"]["result"] == {"so far": 1}
    assert parts["wrong"]["log"][-1] == "it was wrong"
    assert "never" not in parts
    assert "ended" in report
    with tarfile.open(tmp_path / "some_logs.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["hang.log", "parsed.log", "well.log", "wrong.log"]

    late = running.run_stage("late", groups[:1], tmp_path, 0.0)  # the stage's own time is over
    assert {part["status"] for part in late["parts"].values()} == {"no time left"}


def _alive(pid):
    """Whether a process still runs; one that ended and is not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_what_the_tools_print_is_read():
    ncu = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","gpu__time_duration.sum","smsp__average_warps_issue_stalled_wait_per_issue_active.ratio","other"
"","","","us","inst",""
"0","7","forward_kernel","1,234.5","0.25","9"
"1","7","void at::native::fill<4>(int)","3","0.5","9"
"2","7","forward_kernel","8","0.5","n/a"
==PROF== Disconnected
"""
    found = gpu_check_profile.counters(ncu)
    assert list(found) == ["forward_kernel", "forward_kernel 1"]
    stalled = "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio [inst]"
    assert found["forward_kernel"] == {"gpu__time_duration.sum [us]": 1234.5, stalled: 0.25}
    sanitizer = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at forward_kernel+0x10
{"finite": true}
========= ERROR SUMMARY: 1 error
"""
    found = gpu_check_first.summary(sanitizer)
    assert found["summary"] == "ERROR SUMMARY: 1 error"
    assert found["wrong"]
    assert not gpu_check_first.summary("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")["wrong"]
    assert found["first"][0].startswith("Invalid __global__ read")
