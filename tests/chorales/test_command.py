"""What commands do around their work."""

import pytest

from examples.chorales.command import prepare_folder
from examples.chorales.compare.model import ARMS
from tests.chorales.helpers import read


def test_what_was_refused_before_training_binds_nobody(tmp_path):
    prepare_folder(tmp_path, {"epochs": 1}, ARMS, overwrite=False)
    prepare_folder(tmp_path, {"epochs": 2}, ARMS, overwrite=False)
    assert read(tmp_path / "config.json") == {"epochs": 2}
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="epochs 2 -> 3"):
        prepare_folder(tmp_path, {"epochs": 3}, ARMS, overwrite=False)


def test_overwrite_removes_only_its_own_files(tmp_path):
    prepare_folder(tmp_path, {"epochs": 1}, ARMS, overwrite=False)
    (tmp_path / "absolute").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="epochs 1 -> 2"):
        prepare_folder(tmp_path, {"epochs": 2}, ARMS, overwrite=False)
    prepare_folder(tmp_path, {"epochs": 2}, ARMS, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "notes.txt"]
    assert read(tmp_path / "config.json") == {"epochs": 2}
