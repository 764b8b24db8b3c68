"""The report: its arithmetic, its tables from files alone, and that the committed one is up to date."""

import numpy as np
import pytest

from examples.chorales.study.__main__ import main
from examples.chorales.study.cells import ABSOLUTE, AS_PUBLISHED, BOTH, RATES, RELATIVE, at_rate
from examples.chorales.study.estimates import Estimate, difference
from examples.chorales.study.report import readme_part, render, verdicts, write_report
from examples.chorales.study.results import COMMITTED, Results
from tests.chorales.helpers import require
from tests.chorales.study.helpers import cell, results_of, write_cell

require("transformers", "accelerate", "matplotlib", "tqdm")

pytestmark = pytest.mark.xdist_group("chorales_study")  # one test takes a run's costly fixture


def test_intervals():
    """Student's t: 4.3027 for three values, 2.7764 for five."""
    three = Estimate.of([1.0, 2.0, 3.0])
    assert (three.mean, three.n) == (2.0, 3)
    assert three.half == pytest.approx(4.3027 / 3**0.5)
    assert Estimate.of([0.0, 0.0, 0.0, 0.0, 5.0]).half == pytest.approx(2.7764 * 5**0.5 / 5**0.5)
    assert Estimate.of([7.0]).half is None
    assert three.text(".2f") == "2.00 ± 2.48 (3)"
    assert Estimate.of([0.5]).text("+.1%") == "+50.0% (1)"
    assert Estimate.of([-1.0, -1.1, -0.9]).sign == -1
    assert Estimate.of([1.0, 2.0, -3.0]).sign == Estimate.of([5.0]).sign == 0
    with pytest.raises(ValueError, match="values"):
        Estimate.of([])


def test_intervals_cover_95_percent():
    """Of 4000 samples of three normal numbers; three standard errors are 1 %."""
    samples = np.random.default_rng(0).normal(1.0, 2.0, (4000, 3))
    covered = [abs(e.mean - 1.0) <= e.half for e in (Estimate.of(list(map(float, sample))) for sample in samples)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.01)


def test_differences_are_paired_by_seed():
    one, other = {0: 1.0, 1: 5.0, 2: 9.0, 7: 100.0}, {0: 0.9, 1: 4.9, 2: 8.9, 5: 0.0}
    gap = difference(one, other)
    assert gap.n == 3
    assert gap.mean == pytest.approx(0.1)
    assert gap.half == pytest.approx(0, abs=1e-9)  # unpaired it would be about 14
    assert difference({0: 1.0}, {1: 1.0}) is None


def test_report_from_files_alone(tmp_path):
    for seed in range(3):
        jitter = 0.01 * seed
        notebook = dict(masking="time", seed=seed)
        write_cell(tmp_path, cell(ABSOLUTE, **notebook), 0.5 + jitter)
        write_cell(tmp_path, cell(AS_PUBLISHED, **notebook), 0.7 + jitter)
        write_cell(tmp_path, cell(RELATIVE, **notebook), 0.55 + jitter)
        write_cell(tmp_path, cell(ABSOLUTE, window=128, seed=seed), 0.4 + jitter, longer=2.0 + jitter)
        write_cell(tmp_path, cell(RELATIVE, window=128, seed=seed), 0.3 + jitter, longer=0.25)
        write_cell(tmp_path, cell(BOTH, window=128, seed=seed), 0.3 + jitter * (-1) ** seed)
        write_cell(tmp_path, cell(ABSOLUTE, window=128, seed=seed, voice=True), 0.1 + jitter)
        write_cell(tmp_path, cell(RELATIVE, window=128, seed=seed, voice=True), 0.2 + jitter)
    write_cell(tmp_path, cell(BOTH, masking="time"), 0.45)
    write_cell(tmp_path, cell(ABSOLUTE, schedule="tiny"), 3.0, longer=3.5, longer_window=32)
    write_cell(tmp_path, cell(RELATIVE | dict(skew="published"), masking="time"), 0.75)
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- study -->\nold\n<!-- /study -->\nb\n")
    write_report(tmp_path, readme)
    assert readme.read_text().startswith("a\n<!-- study -->\n27 cells of up to 3 seeds")
    assert readme.read_text().endswith("\n<!-- /study -->\nb\n")
    text = (tmp_path / "report.md").read_text()
    for name in ("story.png", "differences.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert name in text
    assert "| absolute | 0.510 ± 0.025 (3) | 80.0% ± 0.0% (3)" in text  # 4.3027 * 0.01 / sqrt(3)
    assert "the relative arm's loss is +0.200 ± 0.000 (3)" in text
    assert "Both repairs change it by: -0.150 ± 0.000 (3), which closes 75% of the gap." in text
    assert "Small tables alone change it by: +0.050 (1)." in text  # one seed: no share of the gap
    assert "What then remains against absolute positions: +0.050 ± 0.000 (3)." in text
    assert "| both against absolute | -0.107 ± 0.029 (3) |" in text  # of -0.1, -0.12, -0.1
    assert "| both against repaired relative | -0.007 ± 0.029 (3), not told apart |" in text
    assert "| both against absolute | -0.050 (1) |" in text
    # From window 16 to 128 with other masks is no change of one factor; a voice label is.
    assert "window 16 → window 128" not in text
    change = "voice not given → voice given; window 128, step masks, any start"
    assert f"{change} | -0.300 ± 0.000 (3) | -0.100 ± 0.000 (3) | +0.200" in text
    assert "512: 2.010 ± 0.025 (3) | +1.600 ± 0.000 (3) |" in text
    assert "32: 3.500 (1) | +0.500 (1) |" in text
    results = Results(tmp_path)
    found = verdicts(results, "relative", "absolute")
    assert [len(found[kind]) for kind in ("wins", "loses", "not told apart", "one seed")] == [1, 2, 0, 0]
    assert "window 128" in found["wins"][0]
    assert "window 16" in found["loses"][0]
    assert "voice given" in found["loses"][1]
    assert len(verdicts(results, "both", "relative")["not told apart"]) == 1
    assert len(verdicts(results, "both", "absolute")["one seed"]) == 1


def test_committed_report_is_of_the_committed_cells():
    results = Results(COMMITTED)
    assert (COMMITTED / "report.md").read_text() == render(results)
    part = (COMMITTED.parents[2] / "docs" / "chorales.md").read_text().split("<!-- study -->\n")[1].split("<!-- /study -->")[0]
    assert part == readme_part(results)


def test_report_on_rates_of_their_own(tmp_path):
    """Three arms at 512 tokens with rates of their own; the long curve of the first two."""
    best = {"absolute": "4e-3", "relative": "2e-3", "both": "1e-3"}
    for arm in (ABSOLUTE, RELATIVE, BOTH):
        name = arm["positions"]
        for rate in RATES:
            loss = 0.4 if rate == best[name] else 0.5
            for trial in ("trial", "curve-trial"):
                made = cell(arm, window=512, schedule=at_rate(trial, rate))
                write_cell(tmp_path, made, 9.0, validation=[[1, loss], [2, loss + 1]])
        for seed in range(3):
            write_cell(tmp_path, cell(arm, window=512, seed=seed), 3.0, validation=[[1, 4.0], [2, 3.0]])
            own = cell(arm, window=512, seed=seed, schedule=at_rate("short", best[name]))
            write_cell(tmp_path, own, {"absolute": 2.0, "relative": 0.5, "both": 0.4 + seed}[name], validation=[[1, 4.0], [2, 3.0]])
    # The absolute arm falls as the square root of the tokens, from 4 at the half to 2.83 at the end: 1 needs eight times as many.
    falling = [[step, 4 * (4 / step) ** 0.5] for step in range(1, 9)]
    for arm, losses in ((ABSOLUTE, falling), (RELATIVE, [[step, 1.0] for step in range(1, 9)])):
        made = cell(arm, window=512, schedule=at_rate("curve", best[arm["positions"]]))
        write_cell(tmp_path, made, losses[-1][1], validation=losses)
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    row = "| window 512, 2 M tokens"
    assert f"{row}, absolute | 0.500 | 0.500 | 0.400 | 4e-3 | 2.000 ± 0.000 (3) | -1.000 ± 0.000 (3) |  |" in text
    assert f"{row}, relative | 0.500 | 0.400 | 0.500 | 2e-3 | 0.500 ± 0.000 (3) | the same runs | -1.500 ± 0.000 (3) |" in text
    assert "| 1e-3 | 1.400 ± 2.484 (3) | -1.600 ± 2.484 (3), not told apart | -0.600 ± 2.484 (3), not told apart |" in text
    assert "| window 512, 16 M tokens, relative | 0.500 | 0.400 | 0.500 | 2e-3 | 1.000 (1) | the same runs | -1.828 (1) |" in text
    assert "| 16.0 M | 2.828 (1) | 1.000 (1) | -1.828 (1) |" in text
    assert "| 8.0 M | 4.000 (1) | 1.000 (1) | -3.000 (1) |" in text
    assert "the validation loss changed by -0.438 (1) (absolute) and +0.000 (1) (relative)." in text  # from 4 / sqrt(1.5)
    assert "Extrapolated, not measured: " in text
    assert "at 128 M tokens (seed 0)." in text
    assert "trial" not in text.split("## Every setting")[1].split("##")[0]
    missing = text.split("## Missing")[1]
    assert "w512-step-any-absolute-curve@4e-3 (1, 2)" in missing
    assert "a rate of both at window 128" in missing


def test_one_finished_cell_makes_a_report(tmp_path):
    write_cell(tmp_path, cell(ABSOLUTE, masking="time"), 0.5)
    assert "0.500 (1)" in render(Results(tmp_path))
    write_report(tmp_path)
    assert (tmp_path / "story.png").is_file()
    assert not (tmp_path / "differences.png").exists()


def test_report_on_a_run(finished):
    out, _ = finished
    text = render(Results(out))
    for result in results_of(out).values():
        assert f"{result['longer']['loss']:.3f} (1)" in text


def test_report_refuses_what_does_not_compare(tmp_path, capsys):
    assert main(["report", f"--results={tmp_path}"]) == 2
    assert "no JSON files of finished cells" in capsys.readouterr().err
    write_cell(tmp_path, cell(), 0.5)
    write_cell(tmp_path, cell(seed=1), 0.5, fingerprint="g")
    with pytest.raises(ValueError, match="2 different data sets"):
        Results(tmp_path)
    (tmp_path / f"{cell(seed=1).name}.json").unlink()
    path = tmp_path / f"{cell().name}.json"
    path.write_text(path.read_text().replace('"learning_rate": 0.002', '"learning_rate": 9.0'))
    assert main(["report", f"--results={tmp_path}"]) == 2
    assert "was made with other settings (schedule" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", f"--out={tmp_path}"])
    assert "--out: of the action run, not of report" in capsys.readouterr().err
    (tmp_path / "other.json").write_text('{"loss": 1}')
    with pytest.raises(ValueError, match=r"other\.json is not the result of a cell"):
        Results(tmp_path)
