"""The samples to listen to: files of both checkpoints, recordings that hold their music, the manual's part."""

# ruff: noqa: E402 (what cannot be imported is skipped first)

from pathlib import Path

import numpy as np
import pytest

from tests.chorales.helpers import require

require("transformers", "accelerate", "matplotlib", "tqdm", "miditok", "pretty_midi", "soundfile")

import soundfile

from examples.chorales import generate, listening
from examples.chorales.decoder.sound import read_chorale, write_recording


def test_a_recording_is_the_beginning_of_its_sound(tmp_path):
    """A tone of 440 Hz, twelve seconds, of which five are wanted."""
    time = np.arange(12 * 44_100) / 44_100
    soundfile.write(tmp_path / "tone.wav", 0.5 * np.sin(2 * np.pi * 440 * time), 44_100)
    write_recording(tmp_path / "tone.mp3", tmp_path / "tone.wav", 5)
    heard, rate = soundfile.read(tmp_path / "tone.mp3")
    assert rate == 22_050
    assert len(heard) / rate == pytest.approx(5, abs=0.1)
    first = heard[rate // 2 : rate // 2 + 2 * rate]
    assert np.abs(np.fft.rfft(first)).argmax() / 2 == pytest.approx(440, abs=1)
    assert np.abs(first).max() == pytest.approx(0.5, abs=0.1)
    assert np.abs(heard[-rate // 8 :]).max() < 0.1  # faded out
    assert (tmp_path / "tone.mp3").stat().st_size < 40_000


def test_both_checkpoints_sing_for_the_manual(small_json, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(listening, "TOKENS", 65)
    left = tmp_path / "out" / ".relative" / ".sound-killed"  # by a run that was killed while fluidsynth played
    left.mkdir(parents=True)
    (left / "sound.wav").write_text("")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- listening -->\n<!-- /listening -->\nafter\n", encoding="utf-8")
    given = ["--data", str(small_json), "--samples=2", "--out", str(tmp_path / "out"), "--readme", str(page)]
    assert listening.main(given) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    files = [f"{arm}-{index}{suffix}" for arm in ("absolute", "relative") for index in range(2) for suffix in (".mid", ".mp3")]
    assert names == sorted([*files, "samples-absolute.png", "samples-relative.png"])
    text = page.read_text(encoding="utf-8")
    assert all(f'"_static/{name}"' in text for name in files)
    assert "| | relative | absolute | Bach, test |" in text.replace("|  |", "| |")


def test_committed_samples_are_small_and_complete():
    files = [path for path in Path(generate.SAMPLES).iterdir() if path.suffix in (".mid", ".mp3")]
    assert sorted(path.name for path in files) == sorted(
        f"{arm}-{index}{suffix}" for arm in listening.ARMS for index in range(8) for suffix in (".mid", ".mp3")
    )
    assert sum(path.stat().st_size for path in files) < 2_000_000
    assert all(read_chorale(path).shape[1] == 4 for path in files if path.suffix == ".mid")
