"""Running cells: resuming after a kill, sharing a folder, what is refused."""

# ruff: noqa: E402 (what cannot be imported is skipped first)

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chorales.helpers import REPOSITORY, kill_after_first_checkpoint, require
from tests.chorales.study.helpers import command, results_of

require("transformers", "accelerate", "matplotlib", "tqdm")

from examples.chorales.study import training, work
from examples.chorales.study.__main__ import main
from examples.chorales.study.cells import CHOICES, PRESETS, SCHEDULES, preset_cells
from examples.chorales.study.results import read_result
from examples.chorales.study.work import claim, lock_path

pytestmark = pytest.mark.xdist_group("chorales_study")  # the runs share a costly fixture


def test_two_processes_run_every_cell_once(finished):
    out, printed = finished
    names = [made.name for made in preset_cells("tiny", 1) if made.positions == "relative"]
    assert len(names) == 2
    results = results_of(out)
    assert sorted(results) == sorted(names)
    assert all(printed.count(f"{name}: test loss") == 1 for name in names)
    assert not list((out / "unfinished").iterdir())  # neither checkpoints nor locks
    losses = set()
    for result in results.values():
        assert result["steps"] == 42
        assert result["test"]["masked_tokens"] > result["test"]["change_tokens"] > 10
        assert result["longer"]["window"] == 32
        losses.add(result["test"]["loss"])
    assert len(losses) == len(names)


def test_killed_cell_continues_to_the_same_result(small_json, finished, tmp_path, run_command):
    name = "w016-step-any-relative-tiny-s0"
    line = command(small_json, tmp_path, f"--only={name}")
    kill_after_first_checkpoint(line)
    scratch = tmp_path / "unfinished" / name
    assert any(scratch.glob("checkpoints/checkpoint-*/trainer_state.json"))
    assert not results_of(tmp_path)
    assert Path(f"{scratch}.lock").exists()  # stale now
    begun = (scratch / "cell.json").read_text()
    (scratch / "cell.json").write_text(re.sub(r'("data_fingerprint": )"\w+"', r'\1"another"', begun))
    refused = run_command(*line)
    assert refused.returncode == 2
    assert "was made with other settings (data another -> " in refused.stderr
    (scratch / "cell.json").write_text(begun)
    done = run_command(*line)
    assert done.returncode == 0, done.stderr
    assert f"{name}: continuing from checkpoint-21" in done.stdout
    assert not list((tmp_path / "unfinished").iterdir())
    found, expected = results_of(tmp_path)[name], results_of(finished[0])[name]
    assert found["steps"] == expected["steps"]
    assert found["test"]["loss"] == pytest.approx(expected["test"]["loss"], rel=1e-4)
    assert found["validation"][0] == expected["validation"][0]


def test_killed_after_the_last_checkpoint(small_json, finished, tmp_path, monkeypatch, capsys):
    """Nothing is trained again, not even a step."""
    name = "w016-step-any-relative-tiny-s0"
    line = command(small_json, tmp_path, f"--only={name}")[3:]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "score", killed)
        assert main(line) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert main(line) == 0
    found, expected = results_of(tmp_path)[name], results_of(finished[0])[name]
    assert {key: found[key] for key in ("steps", "best_step")} == {key: expected[key] for key in ("steps", "best_step")}
    assert len(found["validation"]) == len(expected["validation"])
    assert found["test"]["loss"] == pytest.approx(expected["test"]["loss"], rel=1e-4)


def test_finished_cells_stay_and_other_settings_are_refused(finished, small_json, monkeypatch, capsys):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert main(command(small_json, out, "--only=*-relative*")[3:]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.json")} == before
    path = next(iter(before))
    made = next(c for c in preset_cells("tiny") if c.name == path.stem)
    assert read_result(path, made)["steps"] == 42
    with pytest.raises(ValueError, match=r"data .* -> other"):
        read_result(path, made, "other")
    monkeypatch.setitem(SCHEDULES, "tiny", dataclasses.replace(SCHEDULES["tiny"], warmup=6))
    assert main(command(small_json, out, "--only=*-relative*")[3:]) == 2
    assert "made with other settings (schedule" in capsys.readouterr().err


def test_list_tells_what_is_done(finished, small_json, capsys):
    assert main([*command(small_json, finished[0])[3:], "--seeds=2", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("done") for line in lines) == 2
    assert lines[-1].startswith("8 cells, 2 finished")


def test_locks_of_the_dead_are_free(tmp_path):
    """A lock holds while its process lives, not while its file does."""
    lock = tmp_path / "cell.lock"
    holder = "import sys, time; from pathlib import Path; from examples.chorales.study.work import claim\n"
    holder += "with claim(Path(sys.argv[1])) as mine: print(mine, flush=True); time.sleep(3600)"
    holding = [sys.executable, "-c", holder, str(lock)]
    process = subprocess.Popen(holding, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "True\n"
        with claim(lock) as mine:
            assert not mine
        assert lock.exists()
    finally:
        process.kill()
        process.wait()
    assert lock.exists()
    with claim(lock) as mine:
        assert mine
    assert not lock.exists()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_cell_has_a_lock_of_its_own(preset, tmp_path):
    cells = preset_cells(preset, seeds=3, chosen=dict.fromkeys(CHOICES, "1e-3"))
    assert len({lock_path(tmp_path, cell) for cell in cells}) == len(cells) > 1


@pytest.mark.parametrize("options", [["--list"], ["--jobs=1"], ["--jobs=2"]])
def test_what_cannot_be_selected_is_told_in_one_line(options, small_json, tmp_path, capfd):
    line = [f"--data={small_json}", f"--out={tmp_path}", *options]
    assert main([*line, "--only=w017-*"]) == 2
    assert capfd.readouterr().err == "error: --only: no cell of preset grid matches 'w017-*'; --list shows their names\n"
    (tmp_path / "w128-step-any-relative-trial@1e-3-s0.json").write_text("{}")
    assert main([*line, "--preset=rates"]) == 2
    told = capfd.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1


def test_no_cell_starts_after_the_hours(small_json, tmp_path, monkeypatch, capsys):
    clock = iter([0.0, 3601.0])
    monkeypatch.setattr(work.time, "monotonic", lambda: next(clock, 9e9))
    assert main([*command(small_json, tmp_path)[3:], "--hours=1"]) == 0
    assert "--hours 1 are over" in capsys.readouterr().out
    assert not results_of(tmp_path)


def test_a_chosen_rate_brings_its_cells(small_json, tmp_path, monkeypatch, capsys):
    """One command runs the trials and what they lead to; a restart finds it from the files. Only the training is left out."""
    ran = []

    def run_cell(made, *_, **__):
        ran.append(made.name)
        return {"test": {"loss": 1.0, "accuracy": 0.5}, "cpu_seconds": 1.0, "validation": [[1, made.settings.learning_rate]]}

    monkeypatch.setattr(training, "run_cell", run_cell)
    line = ["--preset=rates", "--seeds=1", f"--data={small_json}", f"--out={tmp_path}", "--only=w128-*-relative*"]
    assert main(line) == 0
    trials = [f"w128-step-any-relative-trial@{rate}-s0" for rate in ("1e-3", "2e-3", "4e-3")]
    assert ran == [*trials, "w128-step-any-relative-short@1e-3-s0"]
    (tmp_path / f"{ran[-1]}.json").unlink()
    assert main(line) == 0
    assert ran[4:] == ran[3:4]
    capsys.readouterr()
    assert main([*line, "--list"]) == 0
    printed = capsys.readouterr().out
    assert "4 cells, 4 finished" in printed
    assert "absolute at window 128" in printed
    assert "relative at window 128 (short)" not in printed


def test_missing_data_is_told(tmp_path, capsys):
    assert main(command(tmp_path / "none.json", tmp_path)[3:]) == 2
    assert "none.json: no such file" in capsys.readouterr().err
