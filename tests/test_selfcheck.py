"""`python -m relattn --check` and `--matrix`; that docs/matrix.md is what `--matrix` prints."""

import re
from pathlib import Path

import pytest
import torch

from relattn import __main__ as command
from relattn import backends
from relattn.backends import cpu
from relattn.selfcheck import calls, check, matrix

PAGE = Path(__file__).resolve().parents[1] / "docs" / "matrix.md"
FEATURES = [feature for group in calls.FEATURES.values() for feature in group]


@pytest.fixture
def wrong_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocked forgets a part of the table."""
    real = backends.BACKENDS["blocked"]

    def forward(tensors, settings, seed):
        table = tensors.rel_k
        return real.forward(tensors if table is None else tensors._replace(rel_k=table * 0.98), settings, seed)

    monkeypatch.setitem(backends.BACKENDS, "blocked", real._replace(forward=forward))


def committed() -> tuple[list[str], dict[str, list[str]], dict[str, str]]:
    """The page's heads, its rows by feature, and the reasons by number."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    notes = dict(re.fullmatch(r"(\d+)\. (.*)", line).groups() for line in lines if re.match(r"\d+\. ", line))
    return rows[0][1:], {row[0]: row[1:] for row in rows[2:] if not row[0].startswith("**")}, notes


def test_the_page_has_every_backend_and_feature() -> None:
    """python -m relattn --matrix > docs/matrix.md"""
    heads, rows, _ = committed()
    assert [head.split("`")[1] for head in heads] == ["triton", "cpu", "blocked", "reference"]
    assert list(rows) == [feature.name for feature in FEATURES]
    assert matrix.WRONG not in PAGE.read_text(encoding="utf-8")
    assert "not called" not in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("backend", ["cpu", "blocked", "reference"])
@pytest.mark.parametrize(("dtype", "short"), [("float64", "f64"), ("float32", "f32")])
def test_the_page_is_what_calls_give(backend: str, dtype: str, short: str) -> None:
    """But for what takes seconds, and for dtypes that have float32's code."""
    if backend == "cpu" and cpu.unavailable():
        pytest.skip(str(cpu.unavailable()))
    heads, rows, notes = committed()
    (place,) = (place for place, head in enumerate(heads) if f"`{backend}`" in head)

    def reasons(cell: str) -> set[str]:
        return {notes[number] for number in re.findall(r"\[(\d+)\]", cell)}

    for feature in FEATURES:
        if not feature.slow and dtype in feature.dtypes:
            found = matrix.cell(feature, backend, dtype, "cpu")
            assert (short in rows[feature.name][place].split()) == (found is None), (feature.name, found)
            assert found is None or found in reasons(rows[feature.name][place]) | reasons(heads[place]), feature.name


def test_a_wrong_backend_is_seen(wrong_blocked: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    by_name = {feature.name: feature for feature in FEATURES}
    assert matrix.cell(by_name["`rel_q`"], "blocked", "float32", "cpu") is None
    assert str(matrix.cell(by_name["`rel_k`"], "blocked", "float32", "cpu")).startswith(matrix.WRONG)
    monkeypatch.setattr(calls, "FEATURES", {"some": (by_name["`rel_k`"], by_name["`torch.export`"])})
    monkeypatch.setattr(matrix, "columns", lambda: iter([matrix.column("blocked", "cpu", slow=False)]))
    assert matrix.main() == 1
    assert "not called" in capsys.readouterr().out


def test_an_unknown_error_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_):
        raise RuntimeError("shape mismatch")

    monkeypatch.setitem(backends.BACKENDS, "blocked", backends.BACKENDS["blocked"]._replace(forward=broken))
    assert matrix.cell(FEATURES[0], "blocked", "float32", "cpu") == f"{matrix.WRONG}: RuntimeError: shape mismatch"


def test_reasons_that_hold_for_a_dtype_stand_in_the_head() -> None:
    cells = {feature.name: {"float64": "too long", "float32": None, "float16": None} for feature in FEATURES}
    cells[FEATURES[3].name] = {"float64": "too long", "float32": "no room", "float16": None}
    lines = matrix.markdown([matrix.Column("one", "CPU", cells)]).splitlines()
    assert lines[0] == "| | `one`, CPU [1] |"
    assert f"| {FEATURES[0].name} | f32 f16 |" in lines
    assert f"| {FEATURES[3].name} | f16 [2] |" in lines
    assert lines[-2:] == ["1. too long", "2. no room"]


@pytest.fixture
def quick_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_SECONDS", 0.0)
    monkeypatch.setattr(check, "_LENGTHS", {"cpu": 16})
    monkeypatch.setattr(check, "_busy", lambda *_: [])


def test_check(quick_check: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["--check"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"  blocked +8 right", line) for line in lines)
    assert any(re.fullmatch(r"  materialising skew +[\d.]+ ms +[\d.]+ times \w+'s", line) for line in lines)
    assert "advice" in lines


def test_check_of_a_wrong_backend(quick_check: None, wrong_blocked: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["--check"])
    assert stop.value.code == 1
    assert re.search(r"blocked +\d right, \d WRONG\n    call \d in \w+: Wrong: output", capsys.readouterr().out)


def test_mixtures_have_every_feature_and_are_taken() -> None:
    seen: set[str] = set()
    for seed in range(40):
        call = check.mixture(seed)
        seen |= {*call.tensors, *(name for name, value in call.arguments.items() if value is not False)}
        assert calls.refused(call, "reference", torch.float32, "cpu", calls.Feature("random")) is None
    assert {"rel_k", "rel_q", "rel_v", "rel_bias", "pos_bias_u", "attn_mask", "key_mask", "key_lengths", "is_causal", "window"} <= seen
    assert {"chunk", "query_offset", "dropout_p", "enable_gqa", "scale", "cu_seqlens_q", "cu_seqlens_k"} <= seen


def facts(**of_cpu) -> dict:
    reason = of_cpu.pop("reason", None)
    return {"backends": {"cpu": {"reason": reason}}, "cpu": {"cores": 4, "threads": 4, "instruction_set": "amx"} | of_cpu, "versions": {}}


def test_advice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(check, "_CPUINFO", info)
    monkeypatch.setattr(check.triton, "INTERPRETED", False)
    info.write_text("flags\t: sse2 avx2 avx512bw\nflags\t: sse2\n")
    assert not [*check.advice(facts(instruction_set="avx512"))]
    assert ["this processor has avx512" in line for line in check.advice(facts(instruction_set="avx2"))] == [True]
    assert ["OMP_NUM_THREADS=4" in line for line in check.advice(facts(instruction_set="avx512", threads=9))] == [True]
    assert ["no C++ compiler" in line and "install" in line for line in check.advice(facts(reason="no C++ compiler"))] == [True]
    monkeypatch.setenv("RELATTN_CPU_VARIANT", "avx2")
    assert ["RELATTN_CPU_VARIANT" in line for line in check.advice(facts(instruction_set="avx2"))] == [True]
    info.write_text("flags\t: sse2\n")
    assert ["no AVX2" in line for line in check.advice(facts(instruction_set="portable"))] == [True]
    info.write_text("Features\t: fp asimd\n")
    assert not [*check.advice(facts(instruction_set="portable"))]
