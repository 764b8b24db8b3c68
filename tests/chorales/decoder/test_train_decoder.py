"""Training the decoder: what it leaves behind, resuming after a kill, two processes, precision."""

# ruff: noqa: E402 (what cannot be imported is skipped first)

import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.chorales.decoder.helpers import LONGER, SMALL, command, played
from tests.chorales.helpers import kill_after_first_checkpoint, read, require

require("transformers", "accelerate", "matplotlib", "tqdm", "miditok", "pretty_midi")

import pretty_midi
import torch
import torch.distributed as dist

from examples.chorales import generate, train_decoder
from examples.chorales.data.files import load_file
from examples.chorales.data.tokens import IGNORED
from examples.chorales.decoder import passages
from examples.chorales.decoder.passages import load_chorales, load_midi_folder, load_music
from examples.chorales.trainer import Clock
from tests.distributed.processes import Processes

pytestmark = pytest.mark.xdist_group("chorales_decoder")  # a costly fixture is shared


def test_training_leaves_the_promised_files(trained, small_json):
    assert sorted(path.name for path in trained.iterdir()) == ["absolute", "config.json", "loss.png", "relative", "results.json"]
    results = read(trained / "results.json")
    notes = sum((grid != None).size for grid in load_file(small_json)["test"])  # noqa: E711 (rests are tokens too)
    for positions, result in results["models"].items():
        assert result == read(trained / positions / "result.json")
        assert sorted(path.name for path in (trained / positions).iterdir()) == ["model", "result.json"]
        assert result["test"]["tokens"] == notes
        assert result["validation"][-1]["loss"] < result["validation"][0]["loss"] - 0.1
        assert result["valid"]["nll"] == pytest.approx(min(point["loss"] for point in result["validation"]), rel=1e-3)
        config = read(trained / positions / "model" / "config.json")
        assert (config["positions"], config["language"], config["training_length"]) == (positions, "chorale", 64)
        assert config["use_cache"]  # for whoever decodes with it
    assert results["published_unverified"] == {"absolute": 0.417, "relative": 0.357}
    text = train_decoder.table(results)
    assert re.search(rf"relative +{results['models']['relative']['valid']['nll']:.4f} .* 0\.357", text)
    assert f"{notes:,} note tokens" in text


def test_reported_nll_is_that_of_the_saved_model(trained, small_json):
    """Of the rounded weights."""
    check_nll(trained / "relative", load_music(small_json).splits["test"])


def check_nll(run: Path, test) -> None:
    """The reported one, computed once more, one window at a time, without the Trainer."""
    model, language = generate.load_model(run / "model")
    collator = passages.ScoredCollator(passages.ScoredWindows(test, 64, language.unit))
    total = count = 0
    with torch.no_grad():
        for index in range(len(collator.windows)):
            batch = collator([(0, index)])
            labels = batch["labels"][0]
            log_probability = model(batch["input_ids"]).logits[0].log_softmax(-1)
            for place in torch.nonzero(labels != IGNORED).flatten().tolist():
                total -= log_probability[place, labels[place]].item()
                count += 1
    expected = read(run / "result.json")["test"]
    assert count == expected["tokens"]
    assert total / count == pytest.approx(expected["nll"], rel=1e-5)


def test_killed_training_continues_to_the_same_result(small_json, tmp_path, trained, run_command):
    out = tmp_path / "run"
    kill_after_first_checkpoint(command(small_json, out, *LONGER))
    assert any((out / "relative" / "checkpoints").glob("checkpoint-*/trainer_state.json"))
    assert not (out / "relative" / "result.json").exists()
    done = run_command(*command(small_json, out, *LONGER))
    assert done.returncode == 0, done.stderr
    assert "relative: continuing from checkpoint-" in done.stdout
    found, expected = (read(run / "relative" / "result.json") for run in (out, trained))
    assert [point["step"] for point in found["validation"]] == [point["step"] for point in expected["validation"]]
    for one, other in zip(found["validation"], expected["validation"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert found["test"]["nll"] == pytest.approx(expected["test"]["nll"], rel=1e-4)
    # Once more: nothing is trained. With other settings: refused.
    again = train_decoder.main(command(small_json, out, *LONGER)[3:])
    assert again == 0
    assert train_decoder.main(command(small_json, out, *LONGER, "--epochs=13")[3:]) == 2


def test_two_processes_share_the_batches(small_json, tmp_path, trained, run_command):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run_command(*launcher, *command(small_json, tmp_path, *LONGER)[1:])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("relative: ") == 1  # only the first process prints
    one, two = read(trained / "results.json"), read(tmp_path / "results.json")
    assert two["environment"]["processes"] == 2
    one, two = one["models"]["relative"], two["models"]["relative"]
    assert two["steps"] == one["steps"]
    assert two["test"]["tokens"] == one["test"]["tokens"]
    assert two["test"]["nll"] == pytest.approx(one["test"]["nll"], rel=0.1)  # the same batches; dropout differs
    assert two["tokens_per_second"] > 0


def _train(options: list[str], stop: bool = False) -> int:
    """One of several processes, as torchrun would start it. `stop`: after the first checkpoint."""
    rank, count = dist.get_rank(), dist.get_world_size()
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="localhost", MASTER_PORT="1")
    if stop:
        Clock.on_save = interrupt
    return train_decoder.main(options)


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_processes_share_windows_and_heads(small_json, tmp_path):
    """The curve of one process, but for rounding, from and to checkpoints of other numbers. Heads drop what they drop there."""
    options = [*SMALL, "--positions=both", "--batch=3", "--epochs=0.5", "--evaluations=2"]

    def given(name: str, *more: str) -> list[str]:
        return command(small_json, tmp_path / name, *options, *more)[3:]

    def curve(name: str) -> list[float]:
        result = read(tmp_path / name / "results.json")["models"]["both"]
        return [*(point["loss"] for point in result["training"] + result["validation"]), result["test"]["nll"]]

    assert train_decoder.main(given("one", "--dropout=0")) == 0
    with Processes(4, imported=["examples.chorales.decoder.parallel"]) as four:
        shared = given("four", "--dropout=0", "--context-parallel=2", "--tensor-parallel=2")
        assert set(four.run(_train, shared, True)) != {0}
    assert len(list((tmp_path / "four" / "both" / "checkpoints").glob("checkpoint-*"))) == 1
    shutil.copytree(tmp_path / "four", tmp_path / "again")
    assert train_decoder.main(given("again", "--dropout=0")) == 0
    with Processes(2) as two:
        assert two.run(_train, given("four", "--dropout=0", "--tensor-parallel=2")) == [0, 0]
    for name in ("again", "four"):
        assert curve(name) == pytest.approx(curve("one"), rel=1e-4)
    check_nll(tmp_path / "four" / "both", load_music(small_json).splits["test"])
    with Processes(2) as two:
        assert two.run(_train, given("heads", "--tensor-parallel=2", "--dropout=0.3", "--evaluations=1")) == [0, 0]
    assert train_decoder.main(given("whole", "--dropout=0.3", "--evaluations=1")) == 0
    assert curve("heads") == pytest.approx(curve("whole"), rel=1e-5)
    for impossible in ("--context-parallel=2", "--tensor-parallel=2"):
        assert train_decoder.main(given("none", impossible)) == 2


def test_mixed_precision_and_midi_folders(midi_folder, tmp_path, capsys):
    """bfloat16 training on performances, then music from the model, whose tokenizer lies beside it."""
    out = tmp_path / "run"
    options = ["--midi", str(midi_folder), "--out", str(out), *SMALL, "--positions=both", "--precision=bf16", "--evaluations=1"]
    (midi_folder / "broken.mid").write_bytes(b"MThd")
    assert train_decoder.main(options) == 0
    printed = capsys.readouterr().out
    assert "events of the test set" in printed
    assert "Files left out, as they cannot be read faithfully: 1 (" in printed
    left_out = read(out / "results.json")["left_out"]
    assert (left_out["count"], list(left_out["files"])) == (1, ["broken.mid"])
    assert "published_unverified" not in read(out / "results.json")
    checkpoint = out / "both" / "model"
    assert (checkpoint / "tokenizer.json").is_file()
    given = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "music"), "--prime", "test:0", "--prime-tokens=40"]
    assert generate.main([*given, "--midi", str(midi_folder), "--tokens=160", "--min-tokens=160"]) == 0
    result = read(tmp_path / "music" / "generated.json")
    (sample,) = result["samples"]
    assert sample["tokens"] == 160
    assert sample["copying"]["unit"] == "notes"
    test = load_midi_folder(midi_folder).splits["test"]
    check_nll(out / "both", test)
    assert result["prime"] == {"piece": test.names[0], "tokens": 40}
    assert sample["ids"][:41] == test[0][:41].tolist()
    midi = pretty_midi.PrettyMIDI(str(tmp_path / "music" / "sample-0.mid"))
    assert len(played(midi)) > 3
    assert generate.main(given) == 2
    assert "--midi: expected the folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--positions=relative,rotary"], ["--window=4"], ["--layers=0"], ["--dropout=1"], ["--transpose=-1"], ["--epochs=0"],
        ["--midi=folder", "--data=file"], ["--precision=fp8"],
    ],
)  # fmt: skip
def test_impossible_training_is_refused(options, capsys):
    with pytest.raises(SystemExit) as stop:
        train_decoder.parse_arguments(options)
    assert stop.value.code == 2
    assert options[0].split("=")[0].strip("-") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--midi=nowhere"], "--midi nowhere: no such folder"),
        (["--data=nowhere.json"], "--data nowhere.json: no such file"),
        (["--midi=."], "--midi .: expected at least three .mid or .midi files, found 0"),
        (["--precision=fp16"], "--precision fp16: needs a GPU"),
        (["--width=30"], "width: expected a multiple of twice the 2 heads, got 30"),
    ],
)
def test_errors_name_the_argument(options, message, small_json, tmp_path, monkeypatch, capsys):
    if "fp16" in message and torch.cuda.is_available():
        pytest.skip("with a GPU it works")
    monkeypatch.chdir(tmp_path)
    data = [] if any(option.startswith(("--midi", "--data")) for option in options) else [f"--data={small_json}"]
    assert train_decoder.main(["--preset=tiny", "--out=out", *data, *options]) == 2
    assert message in capsys.readouterr().err


def test_committed_checkpoints_are_small_and_know_bach(classic_path):
    """Nats per note of the classic test set's first pieces, far below what copying the previous note reaches, 1.3."""
    pieces = load_chorales(classic_path).splits["test"]
    few = type(pieces)(pieces.ids[: pieces.bounds[5]], pieces.bounds[:6], pieces.names[:5])
    for positions, bound in (("relative", 0.7), ("absolute", 1.2)):
        folder = generate.CHECKPOINT.with_name(positions)
        assert sum(path.stat().st_size for path in folder.iterdir()) < 5e6
        model, language = generate.load_model(folder)
        assert model.config.positions == positions
        collator = passages.ScoredCollator(passages.ScoredWindows(few, 512, language.unit))
        total = count = 0
        with torch.no_grad():
            for index in range(len(collator.windows)):
                batch = collator([(0, index)])
                logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                total += torch.nn.functional.cross_entropy(logits[0], batch["labels"][0], reduction="sum").item()
                count += int((batch["labels"] != IGNORED).sum())
        assert math.log(2) * 0.2 < total / count < bound
