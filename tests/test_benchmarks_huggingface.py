"""`python -m benchmarks.huggingface`: its runs, its report, and the part of the manual."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
from examples.chorales.storage import read_json
from tests.huggingface.models import wav2vec2_bert


def test_benchmark_goes_on_where_it_was(tmp_path, capsys, monkeypatch) -> None:
    """From the command line to the part of a page, on a model of a small configuration, in this process."""
    from benchmarks import huggingface as benchmark

    def attempt(function, arguments, timeout, threads):
        return function(**arguments | ({"memory_limit": None} if "memory_limit" in arguments else {}))

    def inputs(seconds: float) -> dict[str, Tensor]:
        return {"input_features": torch.randn(1, round(50 * seconds), 10)}

    small = benchmark.Model("small", lambda layers: wav2vec2_bert(), inputs, "Wav2Vec2BertSelfAttention", core=True)
    monkeypatch.setattr(benchmark, "attempt", attempt)
    monkeypatch.setitem(benchmark.MODELS, "w2v-bert", small)
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- conversion -->\nold\n<!-- /conversion -->\nb\n")
    command = [
        "--device",
        "cpu",
        "--models",
        "w2v-bert",
        "--audio",
        "2",
        "--pass",
        "forward,train",
        "--seconds",
        "0.01",
    ]
    command += ["--readme", str(readme)]
    assert benchmark.main([*command, "--out", str(tmp_path)]) == 0
    results = read_json(tmp_path / "results.json")
    assert [(row["part"], row["pass"], row["frames"]) for row in results["rows"]] == [
        (part, passed, 100) for part in benchmark.PARTS for passed in benchmark.PASSES
    ]
    for row in results["rows"]:
        assert row["before"]["status"] == row["after"]["status"] == "ok"
        assert 0 < row["error"] < 1e-3
        assert row["faster"] == pytest.approx(row["before"]["median_ms"] / row["after"]["median_ms"])
    assert readme.read_text().startswith("a\n<!-- conversion -->\n")
    assert "| small | 2 s | 100 |" in readme.read_text()
    assert "| - without projections | 2 s | 100 |" in readme.read_text()
    assert " of 3 goals met" in capsys.readouterr().out  # not slower: core, attention, encoder

    monkeypatch.setattr(benchmark, "_row", lambda *_: pytest.fail("measured again"))
    assert benchmark.main([*command, "--out", str(tmp_path)]) == 0
    assert benchmark.main([*command, "--out", str(tmp_path), "--layers", "1"]) == 2
    assert "holds rows of other settings" in capsys.readouterr().err

    (tmp_path / "report.md").unlink()
    assert benchmark.main(["--render", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "report.md").read_text() in readme.read_text()


def test_benchmark_of_what_ended_badly(tmp_path, monkeypatch) -> None:
    from benchmarks import huggingface as benchmark

    fine = {"status": "ok", "peak_bytes": 30 * 2**20, "returned_bytes": 10 * 2**20, "first_ms": 1.0}
    times = {"median_ms": 70.0, "quartiles_ms": [1, 2], "rounds": 3}

    def attempt(function, arguments, timeout, threads):
        if function is benchmark.memory:
            gone = arguments["side"] == "before" and arguments["subject"]["seconds"] == 60
            return {"status": "out of memory", "detail": ""} if gone else dict(fine)
        sides = {side: times if side == "before" else times | {"median_ms": 10.0} for side in arguments["sides"]}
        return {
            "frames": 1500,
            "error": {"core": math.nan, "encoder": 0.5}.get(arguments["subject"]["part"], 1e-6),
        } | sides

    monkeypatch.setattr(benchmark, "attempt", attempt)
    command = ["--device", "cpu", "--models", "w2v-bert", "--audio", "30,60,90", "--out", str(tmp_path)]
    assert benchmark.main(command) == 0
    rows = read_json(tmp_path / "results.json")["rows"]
    assert [row["before"]["status"] for row in rows] == ["ok"] * 3 + ["out of memory"] * 6
    assert rows[-1]["before"]["detail"].startswith("not tried")
    text = (tmp_path / "report.md").read_text()
    assert rows[0]["after"]["status"] == "wrong"  # NaN
    assert "out of memory → 10.0" in text
    assert "WRONG: w2v-BERT 2.0, 30 s, encoder" in text
    assert "goal >= 20" in text  # of memory: missed; of speed: met
    assert "goal >= 6" not in text


def test_manual_shows_the_committed_measurements() -> None:
    from benchmarks import huggingface as benchmark

    clone = Path(benchmark.__file__).parents[1]
    part = (clone / "docs" / "models.md").read_text().split("<!-- conversion -->\n")[1].split("<!-- /conversion -->")[0]
    folder = clone / "benchmarks" / "results" / "huggingface"
    assert part == (folder / "report.md").read_text() == benchmark.report(read_json(folder / "results.json"))
