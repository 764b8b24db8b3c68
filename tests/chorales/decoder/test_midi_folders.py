"""Folders of MIDI files: their splits, what is left out, the cache."""

import csv
import os

import numpy as np
import pytest

from examples.chorales.decoder.languages import MidiLanguage
from examples.chorales.decoder.passages import load_midi_folder, midi_splits
from tests.chorales.decoder.helpers import performance
from tests.chorales.helpers import require

require("miditok", "pretty_midi", "tqdm")


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


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-3],
        lambda data: data[:100] + bytes([data[100] ^ 255]) + data[101:],
        lambda data: b"PK\x03\x04 half a file",
        lambda data: b"\x93NUMPY",
    ],
)
def test_a_damaged_cache_of_tokens_is_rebuilt(midi_folder, capsys, damage):
    """An empty one ended the run with EOFError, a truncated one with BadZipFile."""
    music = load_midi_folder(midi_folder)
    (cache,) = (midi_folder.parent / "cache").iterdir()
    cache.write_bytes(damage(cache.read_bytes()))
    assert load_midi_folder(midi_folder).fingerprint() == music.fingerprint()
    assert f"rebuilding the cache {cache}" in capsys.readouterr().err
    assert load_midi_folder(midi_folder).fingerprint() == music.fingerprint()
    assert "rebuilding" not in capsys.readouterr().err
    assert list(cache.parent.iterdir()) == [cache]


def test_what_is_left_out_is_named_and_counted_also_from_the_cache(midi_folder, capsys):
    """A delta of 2^28 ticks ended the run with symusic's TypeError."""
    path = midi_splits(midi_folder)["train"][2]
    path.write_bytes(path.read_bytes().replace(b"\x00\xc0", b"\xff\xff\xff\x7f\xc0", 1))
    name = path.relative_to(midi_folder).as_posix()
    for _ in range(2):
        music = load_midi_folder(midi_folder)
        assert list(music.left_out) == [name]
        assert music.left_out[name].startswith(f"{path}: cannot be read as MIDI (")
        assert len(music.splits["train"]) == 9
        assert f"music: left out: {path}: cannot be read as MIDI (" in capsys.readouterr().err


@pytest.mark.parametrize("valid", ["val", "valid", "validation", "dev", "Val"])
def test_subfolders_by_all_their_names(midi_folder, capsys, valid):
    """`val` was none of them: the files of train and test were mixed by their hashes, without a word."""
    for name in ("train", valid, "test"):
        (midi_folder / name).mkdir()
        performance(midi_folder / name / f"{name}.mid")
    assert {name: [path.stem for path in paths] for name, paths in midi_splits(midi_folder).items()} == {
        "train": ["train"],
        "valid": [valid],
        "test": ["test"],
    }
    said = "music: split by its subfolders train, valid and test: 1 train, 1 valid, 1 test; 12 files beside them are left out"
    assert said in capsys.readouterr().err


def test_a_hash_that_mixes_subfolders_says_so(midi_folder, capsys):
    midi_splits(midi_folder)
    assert capsys.readouterr().err == "music: split by a hash of the files' names: 10 train, 1 valid, 1 test\n"
    for name in ("train", "test"):
        (midi_folder / name).mkdir()
        performance(midi_folder / name / "x.mid")
    midi_splits(midi_folder)
    assert "NOT by subfolders: there is one for train, test, but none for valid" in capsys.readouterr().err


def test_names_that_are_not_utf_8(midi_folder, capsys):
    """They ended the run with UnicodeEncodeError."""
    name = os.fsdecode(b"caf\xe9.mid")
    try:
        performance(midi_folder / "new.mid", seed=99)
        (midi_folder / "new.mid").rename(midi_folder / name)
        (midi_folder / os.fsdecode(b"\xff.mid")).write_bytes(b"noise")
    except OSError:
        pytest.skip("this file system has none")
    for _ in range(2):  # from the files, and from the cache
        music = load_midi_folder(midi_folder)
        names = [name for pieces in music.splits.values() for name in pieces.names]
        assert "caf\\xe9.mid" in names
        assert len(names) == 13
    assert "\\xff.mid: cannot be read as MIDI" in capsys.readouterr().err
