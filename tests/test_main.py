"""`python -m relattn` tells what this machine can run."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import relattn
from relattn import __main__ as command

FOUND = {"triton": "torch sees no GPU", "cpu": "no C++ library", "blocked": None, "reference": None}


@pytest.fixture
def fixed_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "available_backends", lambda: dict(FOUND))


def test_json_and_table_say_the_same(fixed_backends: None, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["relattn"] == relattn.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["cpu"]["name"]
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert facts["backends"]["triton"] == {"usable": False, "reason": "torch sees no GPU"}
    assert facts["backends"]["reference"] == {"usable": True, "reason": None}
    assert list(facts["backends"]) == list(FOUND)  # fastest first, as the dispatch orders them

    command.main([])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["triton", "not here: torch sees no GPU"] in lines
    assert ["blocked", "usable"] in lines
    assert ["torch", torch.__version__] in lines
    assert [line[0] for line in lines if line[0] in FOUND][-4:] == list(FOUND)


def test_absent_packages_are_named_as_such(
    fixed_backends: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "OPTIONAL", {"triton": ("no-such-triton", "pytest")})
    assert command.report()["versions"]["triton"] == pytest.__version__  # a build under another name counts
    monkeypatch.setattr(command, "OPTIONAL", {"triton": ("no-such-triton",)})
    assert command.report()["versions"]["triton"] is None
    command.main([])
    assert "not installed" in capsys.readouterr().out


def test_each_accelerator_is_listed(
    fixed_backends: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Accelerator {index}")
    assert command.report()["accelerators"] == [
        {"device": "cuda:0", "name": "Accelerator 0"},
        {"device": "cuda:1", "name": "Accelerator 1"},
    ]
    command.main([])
    assert "cuda:1" in capsys.readouterr().out


def test_real_command_imports_no_optional_package(tmp_path: Path) -> None:
    script = (
        "import runpy, sys; sys.argv = ['relattn']\n"
        "runpy.run_module('relattn', run_name='__main__')\n"
        "print(*{'transformers', 'music21', 'matplotlib'} & set(sys.modules), file=sys.stderr)"
    )
    environ = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == []
    names = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    assert names[-4:] == ["triton", "cpu", "blocked", "reference"]


def test_unknown_argument_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["--yaml"])
    assert stop.value.code == 2
    assert "--yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("sm_90", "usable; on sm_90 checked and timed"),
        ("sm_80", "usable; for sm_80 compiled and emulated, not yet run on such a GPU: check with benchmarks/gpu_check.sh"),
        ("gfx942", "usable; for gfx942 compiled, not yet run on such a GPU: check with benchmarks/gpu_check.sh"),
    ],
)
def test_what_is_known_of_the_gpu_kernels(monkeypatch, target, text):
    monkeypatch.setattr(command.triton, "_target", lambda device: target)
    monkeypatch.setattr(command.triton, "INTERPRETED", False)
    monkeypatch.setattr(command, "available_backends", lambda: dict(FOUND, triton=None))
    lines = [line.split(maxsplit=1) for line in command.table(command.report()).splitlines()]
    assert ["triton", text] in lines


def test_a_newer_torch_is_named_and_no_more(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch, "__version__", "2.14.7+cu130")
    command.main([])
    assert "tried with" not in capsys.readouterr().out
    monkeypatch.setattr(torch, "__version__", "2.15.0.dev20261101")
    command.main([])
    assert "  torch 2.15.0.dev20261101 is newer than what relattn" in capsys.readouterr().out
    assert command.untried({"torch": "3.0.1", "transformers": None, "python": "9.9"})[0].startswith("torch 3.0.1 is newer")
