"""The study: its published skew, its cells and masks, resuming and sharing a folder, and the arithmetic of its report."""
# ruff: noqa: E402 (without the packages there is nothing to import)

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

for package in ("transformers", "accelerate", "matplotlib", "tqdm"):
    pytest.importorskip(package)

import torch
from torch.nn import functional as F

from examples.chorales import study_model
from examples.chorales.data import NOWHERE, PAD, Chorales, Windows
from examples.chorales.masking import IGNORED, SPAN_STEPS, MaskingCollator
from examples.chorales.model import parameter_count
from examples.chorales.settings import PRESETS
from examples.chorales.study import claim, parse_arguments, read_result
from examples.chorales.study_cells import (
    ABSOLUTE,
    AS_PUBLISHED,
    BOTH,
    MASKING,
    NONE,
    PHASES,
    POSITIONS,
    RELATIVE,
    SCHEDULES,
    SKEWS,
    TABLES,
    Cell,
    preset_cells,
)
from examples.chorales.study_model import build_cell_model, pitch_changes, published_skew, real_tokens, resize_positions, score
from examples.chorales.study_report import Estimate, Results, difference, readme_part, render, verdicts, write_report

pytestmark = pytest.mark.xdist_group("chorales_study")  # the runs share a costly fixture
REPOSITORY = Path(__file__).resolve().parents[2]


def cell(arm=ABSOLUTE, **changes) -> Cell:
    return Cell(**(arm | dict(window=16, masking="step", phase="any", seed=0) | changes))


# ---- the published skew ----


def notebook_skewing(tensor):
    """The seed notebook's `_skewing`, verbatim."""
    batch_size, num_heads, length, _ = tensor.shape
    padded = F.pad(tensor, (1, 0))
    reshaped = padded.reshape(batch_size, num_heads, 2 * length, length)
    skewed = reshaped[:, :, length:, :]
    return skewed


def right_skew(relative):
    """Logits by distance, (B, H, L, 2 L - 1), as logits by key: entry (i, j) is that of distance j - i."""
    length = relative.shape[-2]
    at = torch.arange(length)[None, :] - torch.arange(length)[:, None] + length - 1
    return relative.gather(-1, at.expand(*relative.shape[:2], -1, -1))


@pytest.mark.parametrize("length", [2, 5, 16])
def test_published_skew_is_the_notebooks_and_not_the_right_one(length):
    relative = torch.randn(2, 3, length, 2 * length - 1)
    assert torch.equal(published_skew(relative), notebook_skewing(relative))
    assert not torch.allclose(published_skew(relative), right_skew(relative))


def test_published_skew_shows_a_row_the_logits_of_other_queries():
    """Row i gets query L / 2 + i // 2, as its docstring says; the first half of the queries never counts."""
    length = 16
    query = torch.arange(length, dtype=torch.float)[None, None, :, None].expand(1, 1, length, 2 * length - 1) + 1
    seen = published_skew(query)[0, 0]
    for i, row in enumerate(seen):
        assert set(row[row > 0].tolist()) == {length // 2 + i // 2 + 1}


def test_published_attention_is_the_notebooks_forward():
    """The whole function against the notebook's arithmetic, inside BERT, with padding."""
    torch.manual_seed(0)
    model = build_cell_model(cell(AS_PUBLISHED), 53).eval()
    ids = torch.randint(7, 53, (3, 16))
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    module, seen = model.bert.encoder.layer[0].attention.self, {}
    hook = lambda m, args, kwargs, out: seen.update(x=args[0] if args else kwargs["hidden_states"], out=out[0])  # noqa: E731
    module.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
        query, key, value = (part(seen["x"]).view(3, 16, 4, 32).permute(0, 2, 1, 3) for part in (module.query, module.key, module.value))
        relative = (query.reshape(12, 16, 32) @ module.published_table.T).reshape(3, 4, 16, 31)
        scores = (query @ key.transpose(-2, -1) + notebook_skewing(relative)) / 32**0.5
        scores = scores + (1.0 - mask[:, None, None].float()) * torch.finfo(torch.float32).min
        expected = (scores.softmax(-1) @ value).permute(0, 2, 1, 3).reshape(3, 16, 128)
    torch.testing.assert_close(seen["out"], expected, atol=1e-6, rtol=1e-5)


def test_the_skew_is_all_that_separates_the_published_arm(monkeypatch):
    """With the right skew in its place, the study's function and relattn give equal models, tables beyond the clip included."""
    torch.manual_seed(0)
    ids = torch.randint(7, 53, (2, 24))
    for length in (16, 24):  # 24 tokens reach beyond the tables of a window of 16
        models = [build_cell_model(cell(AS_PUBLISHED | dict(skew=skew)), 53).eval() for skew in ("published", "correct")]
        resize_positions(models[0], length)
        with torch.no_grad():
            logits = [model(input_ids=ids[:, :length]).logits for model in models]
            assert (logits[0] - logits[1]).abs().max() > 2e-3
            with monkeypatch.context() as patch:
                patch.setattr(study_model, "published_skew", right_skew)
                repaired = models[0](input_ids=ids[:, :length]).logits
        torch.testing.assert_close(repaired, logits[1], atol=2e-6, rtol=1e-5)


# ---- models ----


@pytest.mark.parametrize("window", [16, 128, 512])
def test_parameters_match(window):
    count = {
        name: parameter_count(build_cell_model(cell(arm, window=window), 53))
        for name, arm in (("absolute", ABSOLUTE), ("relative", RELATIVE), ("published", AS_PUBLISHED), ("none", NONE), ("both", BOTH))
    }
    assert count["absolute"] == count["none"] + 128 * window
    assert count["relative"] == count["published"] == count["absolute"] - 64
    assert count["both"] == count["relative"] + 128 * window
    assert parameter_count(build_cell_model(cell(RELATIVE, window=window, voice=True), 53)) == count["relative"] + 3 * 128


def test_arms_start_alike():
    """Equal seeds: the shared weights are equal, and so are tables of equal scale, whichever the skew."""
    arms = (ABSOLUTE, NONE, RELATIVE, AS_PUBLISHED, RELATIVE | dict(skew="published"), RELATIVE | dict(tables="normal"))
    for voice in (True, False):
        models = [dict(build_cell_model(cell(arm, seed=3, voice=voice), 53).named_parameters()) for arm in arms]
        shared = set.intersection(*map(set, models))
        assert len(shared) > 30
        assert all(models[0][name].equal(model[name]) for model in models for name in shared)
    own, published = "bert.encoder.layer.1.attention.self.relative_tables.rel_k", "bert.encoder.layer.1.attention.self.published_table"
    assert models[2][own].equal(models[4][published])
    assert models[5][own].equal(models[3][published])
    assert models[3][published].std().item() == pytest.approx(1, rel=0.1)
    assert models[4][published].std().item() == pytest.approx(0.02, rel=0.1)


def test_no_positions_means_none():
    """Shuffled tokens give shuffled logits, but only without positions; training leaves it so."""
    ids, order = torch.arange(7, 23)[None], torch.randperm(16, generator=torch.Generator().manual_seed(0))
    for arm, equivariant in ((NONE, True), (ABSOLUTE, False), (RELATIVE, False), (AS_PUBLISHED, False)):
        model = build_cell_model(cell(arm | ({"tables": "normal"} if arm is RELATIVE else {})), 53)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            gap = (model(input_ids=ids).logits[:, order] - model(input_ids=ids[:, order]).logits).abs().max()
        assert (gap < 1e-4) == equivariant, arm


def test_more_positions_change_nothing_within_the_old_ones():
    ids = torch.randint(7, 53, (2, 16), generator=torch.Generator().manual_seed(0))
    for arm in (ABSOLUTE, BOTH, NONE):
        model = build_cell_model(cell(arm), 53).eval()
        with torch.no_grad():
            before = model(input_ids=ids).logits
            resize_positions(model, 40)
            torch.testing.assert_close(model(input_ids=ids).logits, before)
            assert model(input_ids=ids.repeat(1, 2)).logits.shape == (2, 32, 53)
        fresh = model.bert.embeddings.position_embeddings.weight[16:]
        assert fresh.std().item() == pytest.approx(0.0 if arm is NONE else 0.02, rel=0.1)


# ---- data and masks ----


@pytest.fixture(scope="module")
def chorales(small_json):
    return Chorales.load(small_json)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("window", [16, 64, 128, 256, 512])
def test_phase_of_windows(chorales, window, phase):
    made = cell(window=window, phase=phase)
    for stride in (made.stride, made.test_stride(window)):
        starts = np.arange(8) * stride % 4
        assert set(starts) == ({0} if phase == "four" else {0, 1, 2, 3})
        assert window / 6 <= stride <= window / 2


def test_spans_hide_one_voice_over_half_a_bar(chorales):
    windows = Windows(chorales.tokens["train"], 64, 15)
    batch = windows.gather(np.arange(len(windows)))
    masked = MaskingCollator(windows, "span", len(chorales.vocabulary), 0).masked(np.arange(len(windows)))
    counts = []
    for step, voice, hidden in zip(batch.step, batch.voice, masked.labels != IGNORED, strict=True):
        assert not (hidden & (step == NOWHERE)).any()
        spans = set(zip((step // SPAN_STEPS)[hidden], voice[hidden], strict=True))
        everything = set(zip((step // SPAN_STEPS)[step != NOWHERE], voice[step != NOWHERE], strict=True))
        for block, part in spans:
            assert hidden[(step // SPAN_STEPS == block) & (voice == part) & (step != NOWHERE)].all()
        assert len(spans) == (max(1, round(0.15 * len(everything))) if everything else 0)
        counts.append(hidden.sum() / max(len(spans), 1))
    assert max(counts) == SPAN_STEPS  # fewer at the window's edges
    assert np.mean(counts) > 4


def test_pitch_changes_by_hand(chorales):
    tokens = chorales.tokens["valid"]
    changes = pitch_changes(tokens)
    for piece in range(len(tokens.bounds) - 1):
        last = {}
        for at in range(tokens.bounds[piece], tokens.bounds[piece + 1]):
            voice, pitch = tokens.voice[at], tokens.ids[at]
            assert changes[at] == (voice != NOWHERE and voice in last and last[voice] != pitch)
            last[voice] = pitch


def test_classic_notes_change_in_22_percent(classic_path):
    tokens = Chorales.load(classic_path).tokens["test"]
    notes = tokens.voice != NOWHERE
    assert pitch_changes(tokens)[notes].mean() == pytest.approx(1 - 0.770, abs=0.004)


def test_score_by_hand(chorales):
    """Against one big batch, with the change flags found in another way."""
    made = cell(ABSOLUTE, window=32, voice=True)
    size = len(chorales.vocabulary)
    windows = Windows(chorales.tokens["test"], 32, 7)
    collator = study_model.StudyCollator(windows, "step", size, 5, True)
    model = build_cell_model(made, size)
    found = score(model, collator, chorales.tokens["train"])
    batch = collator([(0, i) for i in range(len(windows))])
    original = windows.gather(np.arange(len(windows)))
    assert torch.equal(batch["token_type_ids"], torch.from_numpy(original.voice + 1))
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], token_type_ids=batch["token_type_ids"]).logits
    wanted = batch["labels"] != IGNORED
    target = batch["labels"][wanted]
    assert found["loss"] == pytest.approx(F.cross_entropy(logits[wanted], target).item(), rel=1e-5)
    right = (logits.argmax(-1) == batch["labels"]).numpy()
    assert found["accuracy"] == pytest.approx(right[wanted.numpy()].mean())
    assert found["masked_tokens"] == int(wanted.sum())
    changed = wanted.numpy() & (pitch_changes(chorales.tokens["test"])[window_positions(windows)] & (original.ids != PAD))
    assert found["change_tokens"] == changed.sum() > 50
    assert found["change_accuracy"] == pytest.approx(right[changed].mean())
    assert real_tokens(windows) == (original.ids != PAD).sum()


def window_positions(windows):
    return np.minimum(windows._start[:, None] + np.arange(windows.size), len(windows.tokens.ids) - 1)


# ---- cells ----


def test_cells_of_presets():
    grid = preset_cells("grid")
    assert len({made.name for made in grid}) == len(grid)
    for name, levels in (("positions", POSITIONS), ("skew", SKEWS), ("tables", TABLES), ("masking", MASKING), ("phase", PHASES)):
        assert {getattr(made, name) for made in grid} - {None} == set(levels)
    assert {made.window for made in grid} == {16, 64, 128, 256, 512}
    assert {made.voice for made in grid} == {True, False}
    seeds = {}
    for made in grid:
        seeds.setdefault(made.group, []).append(made.seed)
    assert all(found == [0, 1, 2] for found in seeds.values())
    assert [made.name for made in grid[:2]] == ["w016-time-any-absolute-s0", "w016-time-any-relative.published.normal-s0"]
    assert all(made.group.startswith(tuple(f"w{made.window:03d}")) for made in preset_cells("tiny"))


def test_seed_preset_is_the_notebooks_schedule():
    made = preset_cells("seed", 1)
    assert [found.arm for found in made] == ["absolute", "relative.published.normal", "relative", "both"]
    for found in made:
        settings = found.settings.as_settings(found, 220_959 * 16)
        notebook = PRESETS["seed"]
        one_batch = dict(batch=notebook.batch * notebook.accumulation, accumulation=1)  # of as many windows a step
        assert settings == dataclasses.replace(notebook, seed=found.seed, **one_batch)


def test_budget_is_in_real_tokens():
    made = cell(window=64, schedule="short")
    settings = made.settings.as_settings(made, 500_000)
    assert settings.epochs == 4
    assert settings.batch * 64 == SCHEDULES["short"].batch_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(positions="some"), "positions: expected one of none, absolute"),
        (dict(skew="correct"), "skew: expected one of None"),
        (RELATIVE | dict(skew="wrong"), "skew: expected one of correct, published, got 'wrong'"),
        (RELATIVE | dict(tables=None), "tables: expected one of small, normal, got None"),
        (dict(masking="bars"), "masking: expected one of time, step, token, span, got 'bars'"),
        (dict(phase="odd"), "phase: expected"),
        (dict(schedule="forever"), "schedule: expected"),
        (dict(window=18), "window: expected a multiple of 4"),
        (dict(seed=-1), "seed: expected 0 or more"),
    ],
)
def test_impossible_cells_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        cell(ABSOLUTE, **changes)


@pytest.mark.parametrize(
    "options", [["--jobs", "0"], ["--seeds", "0"], ["--hours", "0"], ["--only", "w017-*"], ["--preset", "huge"], ["walk"]]
)
def test_impossible_options_are_refused(options, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(options)
    assert stop.value.code == 2
    assert (options[0].strip("-") if options[0] != "walk" else "action") in capsys.readouterr().err


# ---- runs ----


def command(data, out, *options):
    return [sys.executable, "-m", "examples.chorales.study", "--preset=tiny", "--seeds=1", f"--data={data}", f"--out={out}", *options]


def results_of(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.fixture(scope="module")
def finished(small_json, tmp_path_factory, run_command):
    """Two cells of the tiny preset, made by two processes that share the folder; and what they printed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = run_command(*command(small_json, out, "--jobs=2", "--only=*-relative*"))
    assert done.returncode == 0, done.stderr
    return out, done.stdout


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
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = command(small_json, tmp_path, f"--only={name}")
    process = subprocess.Popen(line, cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    scratch, deadline = tmp_path / "unfinished" / name, time.monotonic() + 120
    while not any(scratch.glob("checkpoints/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not results_of(tmp_path)
    assert scratch.with_suffix(".lock").exists()  # stale now
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
    from examples.chorales.study import main

    name = "w016-step-any-relative-tiny-s0"
    line = command(small_json, tmp_path, f"--only={name}")[3:]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study_model, "score", killed)
        assert main(line) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert main(line) == 0
    found, expected = results_of(tmp_path)[name], results_of(finished[0])[name]
    assert {key: found[key] for key in ("steps", "best_step")} == {key: expected[key] for key in ("steps", "best_step")}
    assert len(found["validation"]) == len(expected["validation"])
    assert found["test"]["loss"] == pytest.approx(expected["test"]["loss"], rel=1e-4)


def test_finished_cells_stay_and_other_settings_are_refused(finished, small_json, monkeypatch, capsys):
    from examples.chorales.study import main

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
    from examples.chorales.study import main

    assert main([*command(small_json, finished[0])[3:], "--seeds=2", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("done") for line in lines) == 2
    assert lines[-1].startswith("8 cells, 2 finished")


def test_locks_of_the_dead_are_free(tmp_path):
    """A lock holds while its process lives, not while its file does."""
    lock = tmp_path / "cell.lock"
    holder = "import sys, time; from pathlib import Path; from examples.chorales.study import claim\n"
    holder += "with claim(Path(sys.argv[1])) as mine: print(mine, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", holder, str(lock)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    with claim(lock) as mine:
        assert not mine
    assert lock.exists()
    process.kill()
    process.wait()
    assert lock.exists()
    with claim(lock) as mine:
        assert mine
    assert not lock.exists()


def test_no_cell_starts_after_the_hours(small_json, tmp_path, monkeypatch, capsys):
    from examples.chorales import study

    clock = iter([0.0, 3601.0])
    monkeypatch.setattr(study.time, "monotonic", lambda: next(clock, 9e9))
    assert study.main([*command(small_json, tmp_path)[3:], "--hours=1"]) == 0
    assert "--hours 1 are over" in capsys.readouterr().out
    assert not results_of(tmp_path)


def test_missing_data_is_told(tmp_path, capsys):
    from examples.chorales.study import main

    assert main(command(tmp_path / "none.json", tmp_path)[3:]) == 2
    assert "none.json: no such file" in capsys.readouterr().err


# ---- the report ----


def test_intervals():
    """Student's t: 4.3027 for three values, 2.7764 for five."""
    three = Estimate.of([1.0, 2.0, 3.0])
    assert (three.mean, three.n) == (2.0, 3)
    assert three.half == pytest.approx(4.3027 / 3**0.5)
    assert Estimate.of([0.0, 0.0, 0.0, 0.0, 5.0]).half == pytest.approx(2.7764 * 5**0.5 / 5**0.5)
    assert Estimate.of([7.0]).half is None
    assert three.text(".2f") == "2.00 ± 2.48 (3)"
    assert Estimate.of([0.5]).text("+.1%") == "+50.0% (1)"
    assert Estimate.of([-1.0, -1.1, -0.9]).sign == -1
    assert Estimate.of([1.0, 2.0, -3.0]).sign == Estimate.of([5.0]).sign == 0
    with pytest.raises(ValueError, match="values"):
        Estimate.of([])


def test_intervals_cover_95_percent():
    """Of 4000 samples of three normal numbers; three standard errors are 1 %."""
    samples = np.random.default_rng(0).normal(1.0, 2.0, (4000, 3))
    covered = [abs(e.mean - 1.0) <= e.half for e in (Estimate.of(list(map(float, sample))) for sample in samples)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.01)


def test_differences_are_paired_by_seed():
    one, other = {0: 1.0, 1: 5.0, 2: 9.0, 7: 100.0}, {0: 0.9, 1: 4.9, 2: 8.9, 5: 0.0}
    gap = difference(one, other)
    assert gap.n == 3
    assert gap.mean == pytest.approx(0.1)
    assert gap.half == pytest.approx(0, abs=1e-9)  # unpaired it would be about 14
    assert difference({0: 1.0}, {1: 1.0}) is None


def write_cell(folder, made, loss, change=0.5, longer=None, longer_window=512, fingerprint="f"):
    score = dict(loss=loss, accuracy=0.8, copy_accuracy=0.78, change_loss=1.0, change_accuracy=change, change_copy_accuracy=0.1)
    score |= dict(masked_tokens=100, change_tokens=20)
    result = {
        "configuration": made.configuration(),
        "data_fingerprint": fingerprint,
        "environment": {"python": "3"},
        "parameters": 437_045,
        "test": score,
    }
    if longer:
        result["longer"] = {"window": longer_window, **score, "loss": longer}
    (folder / f"{made.name}.json").write_text(json.dumps(result))


def test_report_from_files_alone(tmp_path):
    for seed in range(3):
        jitter = 0.01 * seed
        notebook = dict(masking="time", seed=seed)
        write_cell(tmp_path, cell(ABSOLUTE, **notebook), 0.5 + jitter)
        write_cell(tmp_path, cell(AS_PUBLISHED, **notebook), 0.7 + jitter)
        write_cell(tmp_path, cell(RELATIVE, **notebook), 0.55 + jitter)
        write_cell(tmp_path, cell(ABSOLUTE, window=128, seed=seed), 0.4 + jitter, longer=2.0 + jitter)
        write_cell(tmp_path, cell(RELATIVE, window=128, seed=seed), 0.3 + jitter, longer=0.25)
        write_cell(tmp_path, cell(BOTH, window=128, seed=seed), 0.3 + jitter * (-1) ** seed)
        write_cell(tmp_path, cell(ABSOLUTE, window=128, seed=seed, voice=True), 0.1 + jitter)
        write_cell(tmp_path, cell(RELATIVE, window=128, seed=seed, voice=True), 0.2 + jitter)
    write_cell(tmp_path, cell(BOTH, masking="time"), 0.45)
    write_cell(tmp_path, cell(ABSOLUTE, schedule="tiny"), 3.0, longer=3.5, longer_window=32)
    write_cell(tmp_path, cell(RELATIVE | dict(skew="published"), masking="time"), 0.75)
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- study -->\nold\n<!-- /study -->\nb\n")
    write_report(tmp_path, readme)
    assert readme.read_text().startswith("a\n<!-- study -->\n27 cells of up to 3 seeds")
    assert readme.read_text().endswith("\n<!-- /study -->\nb\n")
    text = (tmp_path / "report.md").read_text()
    for name in ("repairs.png", "differences.png", "windows.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert name in text
    assert "| absolute | 0.510 ± 0.025 (3) | 80.0% ± 0.0% (3)" in text  # 4.3027 * 0.01 / sqrt(3)
    assert "the relative arm's loss is +0.200 ± 0.000 (3)" in text
    assert "Both repairs change it by: -0.150 ± 0.000 (3), which closes 75% of the gap." in text
    assert "Small tables alone change it by: +0.050 (1), which widens the gap by 25%." in text
    assert "| both against absolute | -0.050 (1) |" in text
    # From window 16 to 128 with other masks is no change of one factor; a voice label is.
    assert "window 16 → window 128" not in text
    assert "voice not given → voice given; window 128, step masks, any start | -0.300 ± 0.000 (3) | -0.100 ± 0.000 (3) | +0.200" in text
    assert "512: 2.010 ± 0.025 (3) | +1.600 ± 0.000 (3) |" in text
    assert "32: 3.500 (1) | +0.500 (1) |" in text
    results = Results(tmp_path)
    found = verdicts(results, "relative", "absolute")
    assert [len(found[kind]) for kind in ("wins", "loses", "not told apart", "one seed")] == [1, 2, 0, 0]
    assert "window 128" in found["wins"][0]
    assert "window 16" in found["loses"][0]
    assert "voice given" in found["loses"][1]
    assert len(verdicts(results, "both", "relative")["not told apart"]) == 1
    assert len(verdicts(results, "both", "absolute")["one seed"]) == 1


def test_committed_report_is_of_the_committed_cells():
    from examples.chorales.study import COMMITTED

    results = Results(COMMITTED)
    assert (COMMITTED / "report.md").read_text() == render(results)
    part = (COMMITTED.parent / "README.md").read_text().split("<!-- study -->\n")[1].split("<!-- /study -->")[0]
    assert part == readme_part(results)


def test_one_finished_cell_makes_a_report(tmp_path):
    write_cell(tmp_path, cell(ABSOLUTE, masking="time"), 0.5)
    assert "0.500 (1)" in render(Results(tmp_path))
    write_report(tmp_path)
    assert (tmp_path / "repairs.png").is_file()
    assert not (tmp_path / "differences.png").exists()


def test_report_on_a_run(finished):
    out, _ = finished
    text = render(Results(out))
    for result in results_of(out).values():
        assert f"{result['longer']['loss']:.3f} (1)" in text


def test_report_refuses_what_does_not_compare(tmp_path, capsys):
    from examples.chorales.study import main

    assert main(["report", f"--results={tmp_path}"]) == 2
    assert "no JSON files of finished cells" in capsys.readouterr().err
    write_cell(tmp_path, cell(), 0.5)
    write_cell(tmp_path, cell(seed=1), 0.5, fingerprint="g")
    with pytest.raises(ValueError, match="2 different data sets"):
        Results(tmp_path)
    (tmp_path / f"{cell(seed=1).name}.json").unlink()
    path = tmp_path / f"{cell().name}.json"
    path.write_text(path.read_text().replace('"learning_rate": 0.002', '"learning_rate": 9.0'))
    assert main(["report", f"--results={tmp_path}"]) == 2
    assert "was made with other settings (schedule" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", f"--out={tmp_path}"])
    assert "--out: of a run" in capsys.readouterr().err
    (tmp_path / "other.json").write_text('{"loss": 1}')
    with pytest.raises(ValueError, match=r"other\.json is not the result of a cell"):
        Results(tmp_path)
