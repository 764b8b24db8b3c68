"""The folder of MIDI files out of music21's corpus: readable pieces, and nothing is exported twice."""

import pytest

from tests.chorales.helpers import require

require("music21", "tqdm", "mido")

from examples.chorales.data import export  # noqa: E402  (what cannot be imported is skipped first)
from examples.chorales.decoder.midi_files import read_notes  # noqa: E402


def test_pieces_are_exported_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "_LARGEST", 300)  # bytes: short tunes, so that it is soon done
    given = ["--out", str(tmp_path), "--pieces=1"]
    assert export.main(given) == 0
    files = sorted(tmp_path.iterdir())
    assert len(files) == 1
    assert all(path.suffix == ".mid" and "bach" not in path.name for path in files)
    assert all(len(read_notes(path, pedal=False).notes) > 5 for path in files)
    before = files[0].stat().st_mtime_ns
    assert export.main(given) == 0
    assert sorted(tmp_path.iterdir()) == files
    assert files[0].stat().st_mtime_ns == before
    assert "1 files" in capsys.readouterr().out


def test_no_pieces_are_refused(capsys):
    with pytest.raises(SystemExit):
        export.parse_arguments(["--pieces=0"])
    assert "--pieces: expected at least 1, got 0" in capsys.readouterr().err
