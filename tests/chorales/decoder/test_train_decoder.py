"""Training the decoder: what it leaves behind, resuming after a kill, two processes, precision."""

# ruff: noqa: E402 (what cannot be imported is skipped first)

import math
import re
import sys
from pathlib import Path

import pytest

from tests.chorales.decoder.helpers import LONGER, SMALL, command, played
from tests.chorales.helpers import kill_after_first_checkpoint, read, require

require("transformers", "accelerate", "matplotlib", "tqdm", "miditok", "pretty_midi")

import pretty_midi
import torch

from examples.chorales import generate, train_decoder
from examples.chorales.data.files import load_file
from examples.chorales.data.tokens import IGNORED
from examples.chorales.decoder import passages
from examples.chorales.decoder.passages import load_chorales, load_midi_folder, load_music

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


def test_two_processes_share_the_windows(small_json, tmp_path, run_command):
    """Without dropout (of which attention's alone is the same for any number of processes) the curve of one process, but for rounding."""
    # Windows that fill their batches: of the last ones of an epoch, several processes take some of the first ones again.
    options = [*LONGER, "--dropout=0", "--positions=both", "--batch=2", "--epochs=2"]
    assert train_decoder.main(command(small_json, tmp_path / "one", *options)[3:]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run_command(*launcher, *command(small_json, tmp_path / "two", *options, "--context-parallel=2")[1:])
    assert done.returncode == 0, done.stderr
    one, two = (read(tmp_path / name / "results.json")["models"]["both"] for name in ("one", "two"))
    for found, expected in zip(two["validation"], one["validation"], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert two["test"]["nll"] == pytest.approx(one["test"]["nll"], rel=1e-3)
    assert train_decoder.main(command(small_json, tmp_path / "three", *options, "--context-parallel=2")[3:]) == 2


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
