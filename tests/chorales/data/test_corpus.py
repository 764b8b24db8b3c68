"""music21's corpus: the split, the grid, and the cache that is whole or rebuilt."""

import collections
import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from examples.chorales.data import corpus
from examples.chorales.data.files import SILENT, load_file
from relattn.backends import autotune

SMALL = {
    "train": [np.array([[72, 65, 60, 48], [72, SILENT, 60, 48]], dtype=np.int16)],
    "valid": [np.array([[70, 65, 60, 48]], dtype=np.int16)],
    "test": [np.array([[71, 65, 60, 127]], dtype=np.int16), np.array([[0, 1, 2, 3]], dtype=np.int16)],
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a parser that counts its calls instead of parsing."""
    monkeypatch.setenv("RELATTN_CACHE", str(tmp_path / "cache"))
    calls = []

    def parse(workers):
        calls.append(workers)
        return SMALL

    monkeypatch.setattr(corpus, "_parse_all", parse)
    return calls


def assert_small(splits):
    for name, pieces in SMALL.items():
        assert len(splits[name]) == len(pieces)
        for one, other in zip(splits[name], pieces, strict=True):
            np.testing.assert_array_equal(one, other)


def test_split_states_what_is_unmatched():
    with open(corpus.SPLIT_FILE, newline="") as file:
        rows = list(csv.DictReader(file))
    assert collections.Counter(row["split"] for row in rows) == {"train": 229, "valid": 76, "test": 77}
    unmatched = [(row["split"], row["index"]) for row in rows if not row["music21_file"]]
    assert unmatched == [("train", i) for i in ("25", "68", "113", "170")] + [("valid", i) for i in ("35", "56")]
    files = [name for _, _, name, _ in corpus.read_split()]
    assert len(set(files)) == len(files) == 376  # no piece is in two splits
    place = {name: (split, index) for split, index, name, _ in corpus.read_split()}
    assert place["bwv414.mxl"] == ("valid", 74)
    assert place["bwv253.mxl"] == ("train", 224)


def test_corpus_is_parsed_once(cache, capsys):
    assert_small(corpus.load_corpus())
    assert_small(corpus.load_corpus())
    assert len(cache) == 1
    assert capsys.readouterr().err == ""
    assert [path.name for path in corpus.cache_path().parent.iterdir()] == ["chorales-16th.bin"]  # no temporary left


def _cut(data):
    return data[:-3]


def _flip(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def _old(data):
    return data.replace(b'"recipe": "', b'"recipe": "0', 1)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_cut, "truncated or corrupt"),
        (_flip, "truncated or corrupt"),
        (_old, "another version"),
        (lambda data: b"", "header is unreadable"),
        (lambda data: data[:20], "header is unreadable"),
        (lambda data: b"[]\n" + data, "header is unreadable"),
        (lambda data: b"\xff\xfe" * 100, "header is unreadable"),
    ],
)
def test_damaged_cache_is_rebuilt_with_a_message(cache, capsys, damage, reason):
    corpus.load_corpus()
    path = corpus.cache_path()
    good = path.read_bytes()
    path.write_bytes(damage(good))
    assert_small(corpus.load_corpus())
    assert len(cache) == 2
    assert reason in capsys.readouterr().err
    assert path.read_bytes() == good


def test_cache_that_cannot_be_written_is_no_error(cache, capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RELATTN_CACHE", str(tmp_path / "file"))
    assert_small(corpus.load_corpus())
    assert "could not be cached" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("chosen", "folder"),
    [
        ({"RELATTN_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"RELATTN_CACHE": "~/a"}, "/home/someone/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/relattn"),
        ({"RELATTN_CACHE": ""}, "/home/someone/.cache/relattn"),
    ],
)
def test_cache_folder_follows_the_environment(monkeypatch, chosen, folder):
    """The kernels' cache and the chorales' lie in one folder."""
    for name in ("RELATTN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/someone", **chosen}.items():
        monkeypatch.setenv(name, value)
    assert corpus.cache_path().parent == autotune.cache_folder() == Path(folder)


def test_missing_music21_names_the_extra(run_command, tmp_path):
    """Hide music21 from the command: one sentence, no traceback."""
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'music21' else find(name, *rest)\n"
        "from examples.chorales.data.__main__ import main; sys.exit(main(['--summary']))"
    )
    done = run_command(sys.executable, "-c", code, RELATTN_CACHE=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith('error: the default chorales need music21: pip install "relattn[chorales]"')
    assert done.stdout == ""


def test_data_module_needs_no_optional_package(run_command):
    code = (
        "import sys, json, examples.chorales.data.__main__, examples.chorales.compare.masking\n"
        "import examples.chorales.data.corpus, examples.chorales.compare.__main__\n"
        "print(json.dumps([m for m in ('torch', 'music21', 'transformers', 'matplotlib', 'tqdm') if m in sys.modules]))"
    )
    done = run_command(sys.executable, "-c", code)
    assert json.loads(done.stdout) == []


# One piece each with: nothing special, an upbeat, repeats, instruments beside the voices, and from every split.
SAMPLE = [("train", 0), ("train", 1), ("train", 3), ("train", 4), ("valid", 2), ("test", 1), ("test", 2)]


def test_music21_pieces_agree_with_the_classic_ones(classic_path):
    pytest.importorskip("music21")
    classic = load_file(classic_path)
    rows = {(split, index): (name, repeats) for split, index, name, repeats in corpus.read_split()}
    for split, index in SAMPLE:
        grid, other = corpus.parse_chorale(*rows[split, index]), classic[split][index]
        assert len(grid) == len(other), (split, index)
        assert (grid == other).mean() > 0.95, (split, index)
