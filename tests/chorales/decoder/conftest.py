"""The decoder's fixtures."""

import pytest

from examples.chorales.decoder.passages import load_chorales
from tests.chorales.decoder.helpers import LONGER, command, performance


@pytest.fixture(scope="session")
def music(small_json):
    return load_chorales(small_json)


@pytest.fixture(scope="session")
def trained(small_json, tmp_path_factory):
    """A small training of both kinds of positions, without interruption."""
    from examples.chorales import train_decoder

    out = tmp_path_factory.mktemp("trained")
    assert train_decoder.main(command(small_json, out, *LONGER, "--positions=relative,absolute")[3:]) == 0
    return out


@pytest.fixture
def midi_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RELATTN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "midi"
    (folder / "deep").mkdir(parents=True)
    for seed in range(12):
        performance(folder / ("deep" if seed % 2 else "") / f"{seed}.mid", seed)
    return folder
