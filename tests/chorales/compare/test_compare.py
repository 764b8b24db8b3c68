"""The comparison end to end: files, resuming after a kill, two processes."""

# ruff: noqa: E402 (what cannot be imported is skipped first)

import sys

import pytest

from tests.chorales.helpers import kill_after_first_checkpoint, module_command, read, require

require("transformers", "accelerate", "matplotlib", "tqdm")

import torch
from transformers import AutoModelForMaskedLM

import relattn.huggingface  # noqa: F401  (makes the Auto classes know its models)
from examples.chorales.compare.model import ARMS
from examples.chorales.compare.settings import Settings
from examples.chorales.compare.training import cut_windows, evaluation_collators
from examples.chorales.data.tokens import IGNORED

# The runs share costly fixtures and both cores.
pytestmark = pytest.mark.xdist_group("chorales_compare")

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
    return module_command("compare", "--data", data, "--out", out, *SMALL, *options)


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
def test_saved_model_is_the_tested_one(arm, finished, chorales):
    """Loading an arm's `model/` and scoring it again gives the loss in results.json."""
    out, _ = finished
    config = read(out / "config.json")
    settings = Settings(**{name: config[name] for name in Settings.__dataclass_fields__})
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
    again = run_command(*command(small_json, out, "--preset", "tiny", "--epochs", "2", "--arms=both"))
    assert again.returncode == 0
    assert "parameters\n" not in again.stdout.split("test loss")[0]  # no arm was built
    assert {arm: (out / arm / "result.json").stat().st_mtime_ns for arm in ARMS} == before
    assert again.stdout.split("test loss")[1] == first.stdout.split("test loss")[1]  # of all arms
    other = run_command(*command(small_json, out, "--preset", "tiny", "--epochs", "3"))
    assert other.returncode == 2
    assert "epochs 2.0 -> 3.0" in other.stderr
    assert "Traceback" not in other.stderr


LONGER = ["--preset", "tiny", "--arms", "absolute", "--epochs", "4", "--evaluations", "6", "--train-windows", "800"]


@pytest.fixture(scope="module")
def uninterrupted(small_json, tmp_path_factory, run_command):
    out = tmp_path_factory.mktemp("uninterrupted")
    done = run_command(*command(small_json, out, *LONGER))
    assert done.returncode == 0, done.stderr
    return read(out / "results.json")


def test_killed_run_continues_to_the_same_result(small_json, tmp_path, uninterrupted, run_command):
    tmp_path, moved = tmp_path / "run", tmp_path / "moved"
    kill_after_first_checkpoint(command(small_json, tmp_path, *LONGER))
    folder = tmp_path / "absolute" / "checkpoints"
    assert any(folder.glob("checkpoint-*/trainer_state.json"))
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
