"""The comparison end to end: models, settings, files, resuming after a kill, two processes."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.chorales.compare import parse_arguments, prepare_folder
from examples.chorales.model import ARMS
from examples.chorales.settings import PRESETS, Settings

for package in ("transformers", "accelerate", "matplotlib", "tqdm"):
    pytest.importorskip(package)

# The runs share costly fixtures and both cores.
pytestmark = pytest.mark.xdist_group("chorales_compare")

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = [
    "--window=16",
    "--stride=4",
    "--batch=16",
    "--warmup=10",
    "--valid-windows=101",
    "--test-windows=101",
    "--learning-rate=2e-3",
]


def command(data, out, *options):
    return [sys.executable, "-m", "examples.chorales.compare", "--data", str(data), "--out", str(out), *SMALL, *options]


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("preset", PRESETS)
def test_last_step_is_evaluated(preset):
    settings = PRESETS[preset]
    for windows in (1, 100, 7123, 220959):
        steps, interval = settings.update_steps(windows)
        needed = math.ceil(math.ceil(windows / settings.batch) / settings.accumulation) * settings.epochs
        assert steps % interval == 0
        assert needed <= steps < needed + settings.evaluations


def test_seed_preset_is_the_notebooks_schedule():
    seed = PRESETS["seed"]
    assert (seed.window, seed.stride, seed.masking) == (16, 1, "time")
    assert (seed.epochs, seed.batch, seed.accumulation, seed.learning_rate, seed.warmup) == (10, 8, 4, 5e-4, 100)
    assert seed.weight_decay == 0.01
    assert seed.update_steps(220959) == (69050, 6905)


@pytest.mark.parametrize(
    "options",
    [["--arms", "relative,absurd"], ["--window", "1"], ["--stride", "0"], ["--epochs", "0"], ["--masking", "bars"]],
)
def test_impossible_settings_are_refused(options, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(options)
    assert stop.value.code == 2
    assert options[0].strip("-") in capsys.readouterr().err


def test_options_override_the_preset():
    options = parse_arguments(["--preset", "seed", "--window", "32", "--epochs", "2", "--arms", "both,absolute,both"])
    assert options.settings.window == 32
    assert options.settings.epochs == 2
    assert options.settings.max_relative_position == 31
    assert options.settings.masking == "time"
    assert options.arms == ["both", "absolute"]
    assert str(options.out) == os.path.join("runs", "chorales-seed")


def test_absolute_arm_has_the_notebooks_size():
    from examples.chorales.model import build_model, parameter_count

    assert parameter_count(build_model("absolute", 53, 16, 15, seed=0)) == 437_045
    longer = build_model("absolute", 53, 160, 15, seed=0)
    assert parameter_count(longer) == 437_045 + 32 * 128  # 32 more positions


def test_relative_positions_beyond_the_window_are_refused():
    from examples.chorales.model import build_model

    with pytest.raises(ValueError, match="max-relative-position: expected 1 to window - 1 = 15"):
        build_model("relative", 53, 16, 16, seed=0)
    with pytest.raises(ValueError, match="arms: expected"):
        build_model("absurd", 53, 16, 15, seed=0)


@pytest.mark.parametrize("arm", ARMS)
def test_no_arm_has_dead_parameters(arm, small_json):
    """Every parameter, and every row of a relative table, takes part in a training step."""
    from examples.chorales.data import Chorales
    from examples.chorales.masking import MaskingCollator
    from examples.chorales.model import build_model, dead_parameters

    chorales = Chorales.load(small_json)
    windows = chorales.windows(24, 5)["train"]
    batch = MaskingCollator(windows, "step", len(chorales.vocabulary), 0)([windows[i] for i in range(64)])
    model = build_model(arm, len(chorales.vocabulary), 24, 23, seed=0)
    assert dead_parameters(model, batch) == []
    names = {name for name, _ in model.named_parameters()}
    absolute = {
        name for name, _ in build_model("absolute", len(chorales.vocabulary), 24, 23, seed=0).named_parameters()
    }
    assert any("position_embeddings" in name for name in names) == (arm != "relative")
    tables = names - absolute
    assert bool(tables) == (arm != "absolute")
    model(**batch).loss.backward()
    for name, table in model.named_parameters():
        if name in tables and 2 * 23 + 1 in table.shape:
            rows = table.grad.abs().movedim(table.shape.index(2 * 23 + 1), 0).flatten(1).amax(1)
            assert (rows > 0).all(), name


def test_arms_start_from_the_same_weights():
    from examples.chorales.model import build_model

    models = [dict(build_model(arm, 53, 16, 15, seed=4).named_parameters()) for arm in ARMS]
    shared = set.intersection(*map(set, models))
    assert len(shared) > 30
    for name in shared:
        assert models[0][name].equal(models[1][name]), name
        assert models[0][name].equal(models[2][name]), name


@pytest.fixture(scope="module")
def finished(small_json, tmp_path_factory, run_command):
    """A small run of all arms, and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = run_command(*command(small_json, out, "--preset", "tiny", "--epochs", "2"))
    assert done.returncode == 0, done.stderr
    return out, done


def test_run_leaves_the_promised_files(finished):
    out, done = finished
    assert sorted(path.name for path in out.iterdir()) == [*sorted([*ARMS, "config.json", "loss.png", "results.json"])]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    results, config = read(out / "results.json"), read(out / "config.json")
    assert results["config"] == config
    assert config["window"] == 16
    assert set(results["arms"]) == set(ARMS)
    baseline = results["baseline"]
    for arm, result in results["arms"].items():
        assert result == read(out / arm / "result.json")
        assert sorted(path.name for path in (out / arm).iterdir()) == ["model", "result.json"]
        # Same masked positions for every arm and the baseline, each window once.
        assert result["test"]["masked_tokens"] == baseline["test"]["masked_tokens"] > 100
        assert 0 < result["test"]["accuracy"] < 1
        assert result["validation"][-1]["step"] == result["steps"]
        best = min(result["validation"], key=lambda point: point["loss"])
        assert result["best_step"] == best["step"]
        assert result["tokens_per_second"] > 0
        assert f"{arm}: {result['parameters']:,} parameters" in done.stdout
    assert 0 < baseline["test"]["accuracy"] < 1
    sizes = [results["arms"][arm]["parameters"] for arm in ("relative", "absolute", "both")]
    assert sizes[1] < sizes[2]
    assert results["windows"]["test"] == 101
    assert done.stdout.count("the copy baseline") == len(ARMS)
    assert "copy neighbour" in done.stdout


@pytest.mark.parametrize("arm", ARMS)
def test_saved_model_is_the_tested_one(arm, finished, small_json):
    """Loading an arm's `model/` and scoring it again gives the loss in results.json."""
    import torch
    from transformers import AutoModelForMaskedLM

    import relattn.huggingface  # noqa: F401  (makes the Auto classes know its models)
    from examples.chorales.data import Chorales
    from examples.chorales.masking import IGNORED
    from examples.chorales.training import cut_windows, evaluation_collators

    out, _ = finished
    config = read(out / "config.json")
    settings = Settings(**{name: config[name] for name in Settings.__dataclass_fields__})
    chorales = Chorales.load(small_json)
    windows = cut_windows(chorales, settings)
    collator = evaluation_collators(windows, settings, len(chorales.vocabulary))["test"]
    batch = collator([windows["test"][index] for index in range(len(windows["test"]))])
    model = AutoModelForMaskedLM.from_pretrained(out / arm / "model").eval()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    wanted = batch["labels"] != IGNORED
    loss = torch.nn.functional.cross_entropy(logits[wanted], batch["labels"][wanted]).item()
    test = read(out / arm / "result.json")["test"]
    assert loss == pytest.approx(test["loss"], rel=1e-5)


def test_rerun_trains_nothing_and_other_settings_are_refused(finished, small_json, run_command):
    out, first = finished
    before = {arm: (out / arm / "result.json").stat().st_mtime_ns for arm in ARMS}
    again = run_command(*command(small_json, out, "--preset", "tiny", "--epochs", "2"))
    assert again.returncode == 0
    assert "parameters\n" not in again.stdout.split("test loss")[0]  # no arm was built
    assert {arm: (out / arm / "result.json").stat().st_mtime_ns for arm in ARMS} == before
    assert again.stdout.split("test loss")[1] == first.stdout.split("test loss")[1]
    other = run_command(*command(small_json, out, "--preset", "tiny", "--epochs", "3"))
    assert other.returncode == 2
    assert "epochs 2.0 -> 3.0" in other.stderr
    assert "Traceback" not in other.stderr


def test_overwrite_removes_only_its_own_files(tmp_path):
    prepare_folder(tmp_path, {"epochs": 1}, overwrite=False)
    (tmp_path / "absolute").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="epochs 1 -> 2"):
        prepare_folder(tmp_path, {"epochs": 2}, overwrite=False)
    prepare_folder(tmp_path, {"epochs": 2}, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "notes.txt"]
    assert read(tmp_path / "config.json") == {"epochs": 2}


LONGER = ["--preset", "tiny", "--arms", "absolute", "--epochs", "4", "--evaluations", "6", "--train-windows", "800"]


@pytest.fixture(scope="module")
def uninterrupted(small_json, tmp_path_factory, run_command):
    out = tmp_path_factory.mktemp("uninterrupted")
    done = run_command(*command(small_json, out, *LONGER))
    assert done.returncode == 0, done.stderr
    return read(out / "results.json")


def test_killed_run_continues_to_the_same_result(small_json, tmp_path, uninterrupted, run_command):
    tmp_path, moved = tmp_path / "run", tmp_path / "moved"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(small_json, tmp_path, *LONGER), cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL, text=True
    )
    folder, deadline = tmp_path / "absolute" / "checkpoints", time.monotonic() + 120
    while not any(folder.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "absolute" / "result.json").exists()
    # As if the kill had come while the next checkpoint was being written.
    (folder / "checkpoint-99999").mkdir()
    (folder / "checkpoint-99999" / "model.safetensors").write_bytes(b"half")

    tmp_path = tmp_path.rename(moved)  # the Trainer's state holds the old path of the best checkpoint
    done = run_command(*command(small_json, tmp_path, *LONGER))
    assert done.returncode == 0, done.stderr
    assert "continuing from checkpoint-" in done.stdout
    assert "checkpoint-99999 is incomplete" in done.stderr
    results = read(tmp_path / "results.json")["arms"]["absolute"]
    expected = uninterrupted["arms"]["absolute"]
    assert results["steps"] == expected["steps"]
    assert results["test"]["loss"] == pytest.approx(expected["test"]["loss"], rel=1e-4)
    for one, other in zip(results["validation"], expected["validation"], strict=True):
        assert one["step"] == other["step"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_two_processes_measure_every_window_once(small_json, tmp_path, uninterrupted, run_command):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run_command(*launcher, *command(small_json, tmp_path, *LONGER, "--workers=1")[1:])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("absolute: ") == 1  # only the first process prints
    assert done.stdout.count("copy neighbour") == 1
    results = read(tmp_path / "results.json")
    assert results["environment"]["processes"] == 2
    one, two = uninterrupted["arms"]["absolute"], results["arms"]["absolute"]
    assert two["test"]["masked_tokens"] == one["test"]["masked_tokens"]
    assert results["baseline"] == uninterrupted["baseline"]
    assert two["steps"] == one["steps"]
    # The same global batches; dropout and the weighting of the halves differ.
    assert two["test"]["loss"] == pytest.approx(one["test"]["loss"], rel=0.1)


def test_masks_follow_the_epoch_also_when_continuing_within_one():
    from types import SimpleNamespace

    from examples.chorales.training import EpochSetter

    windows = SimpleNamespace(set_epoch=lambda epoch: seen.append(epoch))
    seen = []
    for epoch in (None, 0, 0.67, 1.0, 2 - 1e-12, 2.9):
        EpochSetter(windows).on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
    assert seen == [0, 0, 0, 1, 2, 2]


def test_moved_run_still_finds_its_best_checkpoint(tmp_path):
    from examples.chorales.training import adopt_checkpoint

    newest = tmp_path / "checkpoint-20"
    newest.mkdir()
    state = {"best_model_checkpoint": "elsewhere/checkpoint-10", "global_step": 20}
    (newest / "trainer_state.json").write_text(json.dumps(state))
    adopt_checkpoint(newest)
    expected = {"best_model_checkpoint": str(tmp_path / "checkpoint-10"), "global_step": 20}
    assert read(newest / "trainer_state.json") == expected


def test_batch_must_split_over_the_processes(tmp_path):
    from examples.chorales.training import training_arguments

    with pytest.raises(ValueError, match="batch: expected a multiple of the 3 processes, got 16"):
        training_arguments(PRESETS["tiny"], tmp_path, 100, processes=3, workers=0)


def test_workers_are_spawned(small_json, tmp_path):
    """Forked from a process with gloo's threads, a worker once inherited a held lock, and both processes waited for it for ever."""
    from examples.chorales.data import Chorales
    from examples.chorales.masking import MaskingCollator
    from examples.chorales.model import build_model
    from examples.chorales.settings import PRESETS
    from examples.chorales.training import ChoraleTrainer, cut_windows, training_arguments

    settings, chorales = PRESETS["tiny"], Chorales.load(str(small_json))
    windows, size = cut_windows(chorales, settings), len(chorales.vocabulary)
    trainer = ChoraleTrainer(
        model=build_model("absolute", size, settings.window, settings.max_relative_position, 0),
        args=training_arguments(settings, tmp_path, len(windows["train"]), 1, 1),
        train_dataset=windows["train"],
        data_collator=MaskingCollator(windows["train"], settings.masking, size, 0),
        eval_dataset=windows["valid"],
        evaluation={},
    )
    loader = trainer.get_train_dataloader()
    assert loader.base_dataloader.multiprocessing_context.get_start_method() == "spawn"
    assert next(iter(loader))["input_ids"].shape == (settings.batch, settings.window)
