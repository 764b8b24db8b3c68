"""The pictures of what the decoder attends to."""

# ruff: noqa: E402 (what cannot be imported is skipped first)

import numpy as np
import pytest

from tests.chorales.helpers import read, require

require("transformers", "accelerate", "matplotlib", "tqdm", "miditok", "pretty_midi")

import torch

from examples.chorales import attention, generate

pytestmark = pytest.mark.xdist_group("chorales_decoder")  # a costly fixture is shared


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
    """A stand-in model whose first head attends to the token three before the query, four before the predicted one."""

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
