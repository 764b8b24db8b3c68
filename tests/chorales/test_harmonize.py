"""Harmonising a melody with the committed model: files, rests, transposition, Bach's own voices, what is refused."""

# ruff: noqa: E402 (what cannot be imported is skipped first)

import json

import numpy as np
import pytest

from tests.chorales.helpers import read, require

require("transformers", "matplotlib", "tqdm", "mido", "pretty_midi", "music21")

from examples.chorales import harmonize
from examples.chorales.data.files import SILENT, load_file
from examples.chorales.decoder import measures
from examples.chorales.decoder.scores import read_melody
from examples.chorales.decoder.sound import chorale_midi, read_chorale, write_midi

# Old Hundredth, quarter by quarter, with a rest after its second line.
TUNE = np.repeat(
    [67, 67, 66, 64, 62, 67, 69, 71, 71, 71, 71, 69, 67, 72, 71, 69, SILENT]
    + [67, 69, 71, 69, 67, 64, 66, 67, 74, 71, 67, 69, 72, 71, 69, 67], 4
).astype(np.int16)  # fmt: skip


def midi_file(path, melody):
    write_midi(path, chorale_midi(np.stack([melody, *[np.full_like(melody, SILENT)] * 3], axis=1), 80))
    return str(path)


def test_a_melody_gets_three_lower_voices(tmp_path, capsys):
    """An octave too low: it is transposed. In what the committed model writes the voices keep their order and their ranges."""
    given = ["--melody", midi_file(tmp_path / "tune.mid", np.where(TUNE == SILENT, SILENT, TUNE - 12)), "--out", str(tmp_path / "out")]
    assert harmonize.main([*given, "--steps=40"]) == 0
    printed = capsys.readouterr().out
    assert "tune.mid: transposed by +12 semitones" in printed
    result = read(tmp_path / "out" / "harmonized.json")
    (sample,) = result["samples"]
    assert sample["files"] == [f"harmony-0{suffix}" for suffix in (".mid", ".musicxml", ".png", ".wav")]
    assert all((tmp_path / "out" / name).stat().st_size > 1000 or name.endswith(".mid") for name in sample["files"])
    grid = read_chorale(tmp_path / "out" / "harmony-0.mid")
    np.testing.assert_array_equal(grid[:, 0], TUNE)
    np.testing.assert_array_equal(read_melody(tmp_path / "out" / "harmony-0.musicxml"), TUNE)
    assert (grid[TUNE == SILENT] == SILENT).all()
    assert (grid[TUNE != SILENT] != SILENT).all()
    counts = measures.count(grid)
    assert counts == result["measures"]["harmonized"]
    # Voices drawn from all pitches would cross in nearly every step, and leave their ranges in half of them.
    assert counts["crossed"] < 0.1 * counts["steps"]
    assert counts["out_of_range"] < 0.1 * counts["notes"]
    # Nor would they meet in chords: drawn from each voice's register alone, in one step of ten.
    assert counts["triads"] + counts["sevenths"] > 0.75 * counts["steps"]
    assert "steps that are triads" in printed


def test_a_piece_of_the_data_is_compared_with_its_own_voices(small_json, tmp_path, capsys):
    given = ["--data", str(small_json), "--steps=2", "--samples=2", "--seed=3"]
    for name in ("one", "two"):
        assert harmonize.main([*given, "--melody=test:1", "--out", str(tmp_path / name)]) == 0
    one, two = (read(tmp_path / name / "harmonized.json") for name in ("one", "two"))
    assert one["samples"] == two["samples"]
    assert "as Bach's: alto" in capsys.readouterr().out
    assert "Bach's" in one["measures"]


def test_agreement_by_hand():
    bach = np.array([[72, 64, 60, 48], [72, 64, SILENT, 48], [SILENT, 65, 60, 48], [74, 65, 60, 50]])
    other = np.array([[72, 64, 60, 36], [72, 62, 60, 48], [SILENT, SILENT, SILENT, SILENT], [74, 65, 60, 51]])
    # The third step does not count, as the melody rests; nor does the tenor in the second.
    assert harmonize.agreement(other, bach) == {"alto": (2, 3), "tenor": (2, 2), "bass": (1, 3)}


def test_evaluation_takes_pieces_of_the_test_set(small_json, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- harmonize -->\n<!-- /harmonize -->\nafter\n")
    given = ["--data", str(small_json), "--steps=2", "--evaluate=2", "--out", str(tmp_path), "--readme", str(page)]
    assert harmonize.main(given) == 0
    result = read(tmp_path / "harmonized.json")
    pieces = load_file(small_json)["test"]
    assert result["pieces"] == [0, len(pieces) - 1]
    assert result["agreement"]["bass"][1] == sum(
        int(((pieces[index] != SILENT)[:, [0, 3]]).all(axis=1).sum()) for index in result["pieces"]
    )
    assert result["measures"]["Bach's"] == measures.total(pieces[index] for index in result["pieces"])
    assert "As Bach's, 2 pieces" in capsys.readouterr().out
    assert "| steps that are triads |" in page.read_text()


def test_transposition_into_a_sopranos_range():
    for melody, shift in (([60, 81], 0), ([48, 69], 12), ([59, 78], 1), ([82, 85], -12), ([36, SILENT, 50], 24), ([81, 90], -12)):
        assert harmonize.into_range(np.array(melody)) == shift
    with pytest.raises(ValueError, match=r"--melody: expected a range of at most 21 semitones, as sopranos have, got 22"):
        harmonize.into_range(np.array([60, 82]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--melody=missing.mid"], "--melody missing.mid: no such file; or a piece of the data"),
        (["--melody=tune.wav"], "expected a name that ends in"),
        (["--melody=test:99"], "--melody test:99: expected test:0 to test:3"),
        (["--checkpoint=nowhere"], "--checkpoint nowhere: no config.json there"),
        (["--soundfont=none.sf2"], "--soundfont none.sf2: no such file"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options, message, small_json, tmp_path, capsys):
    assert harmonize.main(["--data", str(small_json), "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("masking", [None, "step"])  # of an older version; of the comparison's other presets
def test_a_model_of_another_kind_is_refused(masking, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "relattn-bert", "pitches": [60], "masking": masking}))
    assert harmonize.main(["--checkpoint", str(tmp_path)]) == 2
    assert f"its config.json has masking {masking!r}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--steps=0", "--temperature=0", "--temperature=2", "--samples=0", "--evaluate=0", "--bpm=0"])
def test_impossible_options_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        harmonize.parse_arguments([option])
    assert f"{option.partition('=')[0]}: expected" in capsys.readouterr().err
