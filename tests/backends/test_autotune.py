"""The file of timings: what is damaged in it is timed again."""

import json

import pytest
import torch

from relattn.backends import autotune


@pytest.mark.parametrize(
    "content", [b"", b"{ half a fi", b"[]", b"\xff\xfe", b"3", b'{"KEY": 3}', b'{"KEY": {"(1,)": "fast"}}', b"[" * 100_000]
)
def test_damaged_timings_are_taken_anew(monkeypatch, tmp_path, content):
    """JSON of another shape than ours ended in TypeError."""
    monkeypatch.setenv("RELATTN_CACHE", str(tmp_path))
    monkeypatch.setattr(autotune, "_measure", lambda candidates, *_: {str(tuple(one)): -float(one[0]) for one in candidates})
    device = torch.device("cpu")
    key = f"{autotune._machine(device)} | kernel | call"
    (tmp_path / "autotune.json").write_bytes(content.replace(b"KEY", key.encode()))
    assert autotune.by_speed("kernel", "call", [(1,), (2,)], lambda _: None, lambda _: False, device) == [(2,), (1,)]
    assert json.loads((tmp_path / "autotune.json").read_text()) == {key: {"(1,)": -1.0, "(2,)": -2.0}}
