"""Training the decoder, generating with it, MIDI folders, pictures: what the commands leave behind."""

# ruff: noqa: E402 (what cannot be imported is skipped first)

import csv
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path

import numpy as np
import pytest

for package in ("transformers", "accelerate", "matplotlib", "tqdm", "miditok", "pretty_midi"):
    pytest.importorskip(package)

import pretty_midi
import torch

from examples.chorales import attention, generate, train_decoder
from examples.chorales.decoder import MusicTransformer
from examples.chorales.files import SILENT, load_file
from examples.chorales.languages import END, START, ChoraleLanguage, MidiLanguage, read_performance
from examples.chorales.passages import load_midi_folder, load_music, midi_splits
from examples.chorales.sound import chorale_midi, read_chorale, write_midi

pytestmark = pytest.mark.xdist_group("chorales_decoder")

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = [
    "--preset=tiny", "--layers=1", "--width=16", "--window=64", "--max-relative-position=32", "--batch=8",
    "--learning-rate=1e-2", "--saved-precision=bf16",
]  # fmt: skip


def read(path):
    return json.loads(Path(path).read_text())


# ---- MIDI ----


def performance(path, seed=0, notes=60, tempo=90.0, pedal=(), drums=False):
    """Write a MIDI file of made-up piano playing; returns its notes as (start, end, pitch, velocity) in seconds."""
    rng = np.random.default_rng(seed)
    midi = pretty_midi.PrettyMIDI(initial_tempo=tempo)
    piano = pretty_midi.Instrument(0)
    free = np.zeros(128)  # when each key is up again
    start = 0.0
    for _ in range(notes):
        start += float(rng.uniform(0, 0.4))
        pitch = int(rng.integers(40, 80))
        if start > free[pitch]:
            free[pitch] = start + float(rng.uniform(0.1, 1.5))
            piano.notes.append(pretty_midi.Note(int(rng.integers(20, 120)), pitch, start, free[pitch]))
    piano.control_changes += [pretty_midi.ControlChange(64, value, at) for at, value in pedal]
    midi.instruments.append(piano)
    if drums:
        kit = pretty_midi.Instrument(0, is_drum=True)
        kit.notes.append(pretty_midi.Note(100, 36, 0.0, 0.1))
        midi.instruments.append(kit)
    midi.write(str(path))
    return sorted((note.start, note.end, note.pitch, note.velocity) for note in piano.notes)


def played(midi):
    return sorted((note.start, note.end, note.pitch, note.velocity) for part in midi.instruments for note in part.notes)


def by_pitch(notes):
    return np.array(sorted((pitch, start, end, velocity) for start, end, pitch, velocity in notes))


def test_performance_to_tokens_and_back(tmp_path):
    """Times to 10 ms whatever the file's tempo, velocities to one of 32 steps; drums are left out."""
    expected = by_pitch(performance(tmp_path / "one.mid", tempo=73.0, drums=True))
    language = MidiLanguage()
    assert language.size == 3 + 128 + 128 + 32 + 100  # Music Transformer's 388 events and PAD, START, END
    ids = language.encode(tmp_path / "one.mid")
    (tmp_path / "two.mid").write_bytes(language.decode([START, *ids, END]).dumps_midi())
    found = by_pitch(played(pretty_midi.PrettyMIDI(str(tmp_path / "two.mid"))))
    np.testing.assert_array_equal(found[:, 0], expected[:, 0])
    np.testing.assert_allclose(found[:, 1:3], expected[:, 1:3], atol=0.0151)
    np.testing.assert_allclose(found[:, 3], expected[:, 3], atol=4)
    (tmp_path / "up.mid").write_bytes(language.decode(language.transposition(3)[ids]).dumps_midi())
    up = by_pitch(played(pretty_midi.PrettyMIDI(str(tmp_path / "up.mid"))))
    np.testing.assert_allclose(up, found + [3, 0, 0, 0])  # with the ends that belong to them


def test_pedal_holds_notes_until_it_lifts_or_the_key_is_struck_again(tmp_path):
    midi = pretty_midi.PrettyMIDI()
    piano = pretty_midi.Instrument(0)
    for pitch, start, end in ((60, 0.0, 0.5), (60, 2.0, 2.2), (64, 0.2, 0.6), (67, 3.5, 3.8)):
        piano.notes.append(pretty_midi.Note(80, pitch, start, end))
    piano.control_changes += [pretty_midi.ControlChange(64, value, at) for at, value in ((0.3, 127), (3.0, 0))]
    midi.instruments.append(piano)
    midi.write(str(tmp_path / "pedal.mid"))
    (track,) = read_performance(tmp_path / "pedal.mid").tracks
    found = sorted((note.pitch, round(note.start / 960, 2), round(note.end / 960, 2)) for note in track.notes)
    assert found == [(60, 0.0, 2.0), (60, 2.0, 3.0), (64, 0.2, 3.0), (67, 3.5, 3.8)]


def test_maestros_table_decides_the_splits(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RELATTN_CACHE", str(tmp_path / "cache"))
    rows = [
        ("2004/a.midi", "train"),
        ("2004/b.midi", "train"),
        ("2018/c.midi", "validation"),
        ("2018/d.midi", "test"),
        ("2018/e.midi", "test"),
    ]
    for seed, (name, _) in enumerate(rows[:-1]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        performance(tmp_path / name, seed)
    (tmp_path / "2018" / "stray.midi").write_bytes(b"not in the table")
    with open(tmp_path / "maestro-v3.0.0.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["canonical_composer", "canonical_title", "split", "year", "midi_filename", "audio_filename", "duration"])
        writer.writerows([["Frédéric Chopin", "Ballade", split, name[:4], name, name.replace("midi", "wav"), 60.0] for name, split in rows])
    music = load_midi_folder(tmp_path)
    assert {name: pieces.names for name, pieces in music.splits.items()} == {
        "train": ["2004/a.midi", "2004/b.midi"],
        "valid": ["2018/c.midi"],
        "test": ["2018/d.midi"],
    }
    assert "1 files of maestro-v3.0.0.csv are not there" in capsys.readouterr().err
    np.testing.assert_array_equal(music.splits["train"][1][1:-1], music.language.encode(tmp_path / "2004/b.midi"))


@pytest.fixture
def midi_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RELATTN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "midi"
    (folder / "deep").mkdir(parents=True)
    for seed in range(12):
        performance(folder / ("deep" if seed % 2 else "") / f"{seed}.mid", seed)
    return folder


def test_folders_without_a_table(midi_folder, capsys, monkeypatch):
    splits = midi_splits(midi_folder)
    assert {name: len(paths) for name, paths in splits.items()} == {"train": 10, "valid": 1, "test": 1}
    assert midi_splits(midi_folder) == splits
    (splits["train"][3]).write_bytes(b"MThd nonsense")
    music = load_midi_folder(midi_folder)
    assert len(music.splits["train"]) == 9
    assert f"left out: {splits['train'][3]}: cannot be read as MIDI" in capsys.readouterr().err
    monkeypatch.setattr(MidiLanguage, "encode", None)  # what comes from the cache needs no reading
    assert load_midi_folder(midi_folder).fingerprint() == music.fingerprint()
    monkeypatch.undo()
    for name in ("train", "validation", "test"):
        (midi_folder / name).mkdir()
        performance(midi_folder / name / "x.mid")
    assert {name: [path.name for path in paths] for name, paths in midi_splits(midi_folder).items()} == {name: ["x.mid"] for name in splits}


def test_chorales_to_midi_and_back(small_json, tmp_path):
    grid = load_file(small_json)["train"][0]
    grid = grid[np.flatnonzero((grid != SILENT).any(axis=1))[0] :]
    grid[10:14, [1, 2]] = [55, 60]  # the tenor above the alto
    midi = chorale_midi(grid, 100)
    write_midi(tmp_path / "four.mid", midi)
    np.testing.assert_array_equal(read_chorale(tmp_path / "four.mid"), grid[: np.flatnonzero((grid != SILENT).any(axis=1))[-1] + 1])
    pitches = [note.pitch for note in midi.instruments[0].notes]
    starts = np.flatnonzero(np.diff(grid[:, 0], prepend=SILENT - 1))
    assert pitches == [pitch for pitch in grid[starts, 0].tolist() if pitch != SILENT]  # repeated pitches are one note
    # One track with everything: voices are dealt out by height.
    full = grid[(grid != SILENT).all(axis=1)]
    full = full[(np.diff(full, axis=1) < 0).all(axis=1)]
    piano = pretty_midi.Instrument(0)
    piano.notes = [note for part in chorale_midi(full, 100).instruments for note in part.notes]
    midi.instruments = [piano]
    write_midi(tmp_path / "one.mid", midi)
    np.testing.assert_array_equal(read_chorale(tmp_path / "one.mid"), full)


# ---- training ----


def command(data, out, *options):
    return [sys.executable, "-m", "examples.chorales.train_decoder", "--data", str(data), "--out", str(out), *SMALL, *options]


LONGER = ["--positions=relative", "--epochs=12", "--evaluations=6"]


@pytest.fixture(scope="module")
def trained(small_json, tmp_path_factory):
    """A small training of both kinds of positions, without interruption."""
    out = tmp_path_factory.mktemp("trained")
    assert train_decoder.main(command(small_json, out, *LONGER, "--positions=relative,absolute")[3:]) == 0
    return out


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
    from examples.chorales.masking import IGNORED
    from examples.chorales.passages import ScoredCollator, ScoredWindows

    model, language = generate.load_model(run / "model")
    collator = ScoredCollator(ScoredWindows(test, 64, language.unit))
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
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(small_json, out, *LONGER), cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL)
    folder, deadline = out / "relative" / "checkpoints", time.monotonic() + 120
    while not any(folder.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
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


def test_mixed_precision_and_midi_folders(midi_folder, tmp_path, capsys):
    """bfloat16 training on performances, then music from the model, whose tokenizer lies beside it."""
    out = tmp_path / "run"
    options = ["--midi", str(midi_folder), "--out", str(out), *SMALL, "--positions=both", "--precision=bf16", "--evaluations=1"]
    assert train_decoder.main(options) == 0
    assert "events of the test set" in capsys.readouterr().out
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


# ---- generation ----


def test_committed_checkpoint_sings(tmp_path, capsys):
    """Unconditioned, to twice the training length; the files hold what the tokens say."""
    assert generate.main(["--out", str(tmp_path), "--no-check", "--min-tokens=1024"]) == 0
    result = read(tmp_path / "generated.json")
    (sample,) = result["samples"]
    assert (sample["tokens"], result["training_length"], result["prime"]) == (1024, 512, None)
    assert result["drawing"] == {"temperature": 1.0, "top_k": 0, "top_p": 0.98}
    assert sample["files"] == ["sample-0.mid", "sample-0.png", "sample-0.wav"]
    grid = ChoraleLanguage().decode(sample["ids"])
    sung = read_chorale(tmp_path / "sample-0.mid")
    np.testing.assert_array_equal(sung, grid[: len(sung)])
    assert (grid[len(sung) :] == SILENT).all()
    assert (tmp_path / "sample-0.png").read_bytes().startswith(b"\x89PNG")
    with wave.open(str(tmp_path / "sample-0.wav")) as sound:
        assert sound.getnframes() / sound.getframerate() == pytest.approx(sample["seconds"], abs=8)
        frames = np.frombuffer(sound.readframes(10 * sound.getframerate()), dtype=np.int16)
    assert np.abs(frames.astype(int)).max() > 1000
    assert "sample-0.mid: 1024 tokens" in capsys.readouterr().out
    # Four voices that keep their order, mostly: it is a chorale.
    full = grid[(grid != SILENT).all(axis=1)]
    assert len(full) > 0.8 * len(grid)
    assert (np.diff(full, axis=1) <= 0).mean() > 0.8


def test_primed_samples_are_reproducible_and_checked(trained, small_json, tmp_path, capsys):
    given = ["--checkpoint", str(trained / "relative" / "model"), "--data", str(small_json), "--prime=test:1", "--prime-tokens=32"]
    drawing = ["--samples=3", "--tokens=100", "--min-tokens=100", "--temperature=0.9", "--top-k=20", "--top-p=1", "--seed=4"]
    for name in ("one", "two"):
        assert generate.main([*given, *drawing, "--out", str(tmp_path / name)]) == 0
    one, two = (read(tmp_path / name / "generated.json") for name in ("one", "two"))
    assert [sample["ids"] for sample in one["samples"]] == [sample["ids"] for sample in two["samples"]]
    assert (tmp_path / "one" / "sample-2.mid").read_bytes() == (tmp_path / "two" / "sample-2.mid").read_bytes()
    prime = load_music(small_json).splits["test"][1]
    rows = [sample["ids"] for sample in one["samples"]]
    assert all(row[:33] == prime[:33].tolist() and len(row) == 100 for row in rows)
    assert len({tuple(row) for row in rows}) == 3
    assert one["drawing"] == {"temperature": 0.9, "top_k": 20, "top_p": 1.0}
    for sample in one["samples"]:
        assert sample["copying"]["generated"] == (100 - 33) // 4  # the prime is not checked
        passage = sample["copying"]["longest_common_passage"]
        assert passage is None or passage["events"] <= sample["copying"]["generated"]
    assert re.search("sample-2: (longest passage shared|nothing in common) with the training set", capsys.readouterr().out)


def test_a_copy_does_not_go_unnoticed(trained, small_json, tmp_path, monkeypatch, capsys):
    """A model that recites a training piece, a tone higher."""
    piece = load_music(small_json).splits["train"][6]
    recited = ChoraleLanguage().transposition(2)[piece]
    monkeypatch.setattr(generate, "decode", lambda *_, **__: torch.from_numpy(recited.astype(np.int64))[None])
    assert generate.main(["--checkpoint", str(trained / "relative" / "model"), "--data", str(small_json), "--out", str(tmp_path)]) == 0
    (sample,) = read(tmp_path / "generated.json")["samples"]
    steps = (len(piece) - 2) // 4
    passage = sample["copying"]["longest_common_passage"]
    assert (passage["events"], passage["piece"], passage["semitones"]) == (steps, "train[6]", 2)
    assert sample["ended"]
    assert f"{steps} of {steps} 16ths" in capsys.readouterr().out


def test_midi_files_prime_and_the_benchmark_compares(trained, small_json, tmp_path, monkeypatch, capsys):
    lengths = []
    forward = MusicTransformer.forward

    @functools.wraps(forward)
    def counted(self, input_ids, *arguments, **more):
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids, *arguments, **more)

    monkeypatch.setattr(MusicTransformer, "forward", counted)
    grid = load_file(small_json)["test"][2][:24]
    write_midi(tmp_path / "mine.mid", chorale_midi(grid, 80))
    given = ["--checkpoint", str(trained / "absolute" / "model"), "--prime", str(tmp_path / "mine.mid"), "--prime-tokens=50", "--no-check"]
    assert generate.main([*given, "--out", str(tmp_path), "--tokens=120", "--benchmark"]) == 0
    result = read(tmp_path / "generated.json")
    assert result["prime"] == {"piece": "mine.mid", "tokens": 48}  # whole 16ths
    assert result["samples"][0]["ids"][1:49] == ChoraleLanguage().encode(read_chorale(tmp_path / "mine.mid"))[:48].tolist()
    timing = result["cache"]
    assert timing["tokens"] == 120 - 49
    assert timing["same_tokens"]
    assert timing["ratio"] > 0
    assert lengths[-142:-71] == [49] + 70 * [1]  # with the cache, only the new token is computed
    assert lengths[-71:] == list(range(49, 120))
    assert "times as fast; same tokens: yes" in capsys.readouterr().out


def test_without_fluidsynth_the_sines_play(trained, tmp_path, monkeypatch):
    from examples.chorales import sound

    monkeypatch.setattr(sound.shutil, "which", lambda _: None)
    given = ["--checkpoint", str(trained / "relative" / "model"), "--tokens=65", "--min-tokens=65", "--no-check"]
    assert generate.main([*given, "--out", str(tmp_path)]) == 0
    assert read(tmp_path / "generated.json")["samples"][0]["sound"] == "pretty_midi's sines"
    with wave.open(str(tmp_path / "sample-0.wav")) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16)
        assert file.getframerate() == 44100
    assert 20_000 < np.abs(samples.astype(int)).max() <= 32_767


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint=nowhere"], "--checkpoint nowhere: no config.json there"),
        (["--checkpoint=bert"], "--checkpoint bert: expected a relattn-music-transformer, got model_type 'bert'"),
        (["--prime=nowhere.mid"], "--prime nowhere.mid: neither a piece of the data"),
        (["--prime=noise.mid"], "--prime noise.mid: cannot be read as MIDI"),
        (["--prime=test:99"], "--prime test:99: expected test:0 to test:3"),
        (["--prime=test:0", "--tokens=100"], "--tokens: expected at least 133, with the 129 given, got 100"),
        (["--tokens=3"], "--tokens: expected at least 5, with the 1 given, got 3"),
        (["--tokens=40", "--min-tokens=60"], "--min-tokens: expected at most --tokens 40, got 60"),
        (["--prime=test:0", "--prime-tokens=3"], "--prime-tokens: expected at least 4, got 3"),
        (["--prime=short.mid"], "--prime short.mid: every note is shorter than a 16th"),
        (["--soundfont=nowhere.sf2"], "--soundfont nowhere.sf2: no such file"),
        (["--midi=."], "--midi .: the model writes chorales"),
    ],
)
def test_generation_errors_name_the_argument(options, message, small_json, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("bert").mkdir()
    Path("bert/config.json").write_text('{"model_type": "bert"}')
    Path("noise.mid").write_bytes(b"noise")
    short = pretty_midi.PrettyMIDI(initial_tempo=120)
    short.instruments.append(pretty_midi.Instrument(0))
    short.instruments[0].notes.append(pretty_midi.Note(90, 60, 0.03, 0.09))  # between two 16ths, 0.125 s each
    short.write("short.mid")
    options = [*options, "--prime=test:0"] if options == ["--midi=."] else options
    assert generate.main(["--out=out", f"--data={small_json}", *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("option", ["--temperature=0", "--top-p=0", "--top-p=1.5", "--top-k=-1", "--samples=0", "--beams=0", "--bpm=5"])
def test_impossible_drawing_is_refused(option, capsys):
    with pytest.raises(SystemExit):
        generate.parse_arguments([option])
    assert option.split("=")[0] in capsys.readouterr().err


# ---- pictures ----


def test_attention_pictures(trained, small_json, tmp_path, capsys):
    folders = [f"--{positions}={trained / positions / 'model'}" for positions in ("absolute", "relative")]
    assert attention.main([*folders, "--data", str(small_json), "--out", str(tmp_path), "--tokens=48"]) == 0
    names = ["attention-distance.png", "attention-maps.png", "attention.json", "table-norms.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    result = read(tmp_path / "attention.json")
    for positions in ("absolute", "relative"):
        mean = np.array(result["weight_by_distance"][positions])
        assert mean.shape == (1, 2, 32)
        assert ((mean.sum(-1) > 0.2) & (mean.sum(-1) < 1 + 1e-5)).all()
        assert result["shares"][positions]["same_voice"]["even_spread"] == 0.25
    model, _ = generate.load_model(trained / "relative" / "model")
    nearest = model.layers[0].attention.rel_k[0, -1].norm().item()
    assert result["table_norms"][0][0][0] == pytest.approx(nearest, abs=1e-4)
    assert "even spread 25%" in capsys.readouterr().out
    swapped = [f"--absolute={trained / 'absolute' / 'model'}", f"--relative={trained / 'absolute' / 'model'}"]
    assert attention.main([*swapped, "--data", str(small_json), "--out", str(tmp_path)]) == 2
    assert "expected a model with relative positions" in capsys.readouterr().err


def test_weight_is_counted_by_distance_from_the_predicted_token():
    """A stand-in model whose first head attends to the token three before the query, which is four before the predicted one."""

    class Model:
        device = "cpu"

        def __call__(self, input_ids, output_attentions):
            length = input_ids.shape[1]
            weights = torch.zeros(1, 2, length, length)
            rows = torch.arange(length)
            weights[0, 0, rows, (rows - 3).clamp(min=0)] = 1
            weights[0, 1] = torch.ones(length, length).tril() / (rows[:, None] + 1)
            return type("Output", (), {"attentions": (weights, weights)})

    mean = attention.weight_by_distance(Model(), [np.arange(64), np.arange(80)], 64)
    assert mean.shape == (2, 2, 32)
    assert mean[0, 0].argmax() + 1 == 4
    assert mean[0, 0, 3] == 1
    share = attention.shares(mean[:, :1])
    assert share["same_voice"]["mean"] == 1
    assert share["whole_beats"]["mean"] == 0
    assert share["mean_distance"] == 4
    assert attention.shares(mean)["same_voice"]["largest_in"] == {"layer": 1, "head": 1}
