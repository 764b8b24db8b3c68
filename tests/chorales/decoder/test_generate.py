"""Generating: samples and their files, primes, the copy check, the benchmark, what is refused."""

# ruff: noqa: E402 (what cannot be imported is skipped first)

import functools
import re
import wave
from pathlib import Path

import numpy as np
import pytest

from tests.chorales.helpers import read, require

require("transformers", "accelerate", "matplotlib", "tqdm", "miditok", "pretty_midi")

import pretty_midi
import torch

from examples.chorales import generate
from examples.chorales.data.files import SILENT, load_file
from examples.chorales.decoder import measures, sound
from examples.chorales.decoder.languages import ChoraleLanguage
from examples.chorales.decoder.model import MusicTransformer
from examples.chorales.decoder.passages import load_music
from examples.chorales.decoder.sound import chorale_midi, read_chorale, write_midi

pytestmark = pytest.mark.xdist_group("chorales_decoder")  # a costly fixture is shared


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
    with wave.open(str(tmp_path / "sample-0.wav")) as recording:
        assert recording.getnframes() / recording.getframerate() == pytest.approx(sample["seconds"], abs=8)
        frames = np.frombuffer(recording.readframes(10 * recording.getframerate()), dtype=np.int16)
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
    printed = capsys.readouterr().out
    assert re.search("sample-2: (longest passage shared|nothing in common) with the training set", printed)
    assert "steps with crossed voices" in printed
    decode = ChoraleLanguage().decode
    assert one["measures"]["generated"] == measures.total(decode(row[33:]) for row in rows)
    assert one["measures"]["Bach, test"] == measures.total(load_file(small_json)["test"])


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


@pytest.mark.parametrize("option", ["--samples=2", "--temperature=0.5", "--top-k=4", "--top-p=0.5", "--seed=1"])
def test_beam_search_draws_nothing(option, capsys):
    with pytest.raises(SystemExit):
        generate.parse_arguments(["--beams=2", option])
    assert f"{option.split('=')[0]}: of sampling; --beams 2" in capsys.readouterr().err
