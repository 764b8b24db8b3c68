"""The build of the native library, on sources small enough to be compiled in a moment."""

import ctypes
import json
import os
import shutil
from pathlib import Path

import pytest

from relattn.kernels.cpu import build
from tests import sanitize

SOURCES = {
    "both.h": "#define ANSWER 42\n",
    "kernel.h": "#define ONE 1\n",
    "variant.cpp": """
#include "both.h"
#include "kernel.h"
#define JOIN(a, b) a##b
#define NAMED(name) JOIN(relattn_variant_, name)
extern "C" int NAMED(RELATTN_VARIANT)() { return ONE; }
""",
    "library.cpp": """
#include "both.h"
#define API extern "C" __attribute__((visibility("default")))
extern "C" int relattn_variant_portable();
API int answer() { return ANSWER; }
API int variants() {
    return relattn_variant_portable()
#ifdef RELATTN_HAVE_AVX2
        + 1
#endif
#ifdef RELATTN_HAVE_AVX512
        + 1
#endif
#ifdef RELATTN_HAVE_AMX
        + 1
#endif
        ;
}
API int past_the_end(int length) {
    volatile int *values = new int[length];
    int found = values[length];
    delete[] values;
    return found;
}
API int overflow(int value) { return value + 1; }
""",
}


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("CXXFLAGS", "LDFLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RELATTN_BUILD_DIR", str(tmp_path / "objects"))
    folder = tmp_path / "tree" / "kernels" / "cpu"
    folder.mkdir(parents=True)
    for name, text in SOURCES.items():
        (folder / name).write_text(text)
    return folder


def rebuild(sources: Path, out: Path) -> set[str]:
    """Build, and return which objects are new."""
    objects = Path(os.environ["RELATTN_BUILD_DIR"])
    before = {file.stem: file.stat().st_mtime_ns for file in objects.rglob("*.o")}
    report = build.build(out, sources=sources)
    assert report["library"], report
    return {file.stem for file in objects.rglob("*.o") if file.stat().st_mtime_ns != before.get(file.stem)}


@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "without ninja"])
def test_builds_a_library_that_loads(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ninja: bool) -> None:
    if not ninja:
        monkeypatch.setattr(build, "_ninja", lambda: None)
    report = build.build(tmp_path / "out", sources=sources)
    assert report == json.loads((tmp_path / "out" / build.REPORT).read_text())
    assert report["library"] is True
    assert report["reason"] is None
    assert report["variants"][0] == "portable"
    assert shutil.which(build.compiler()[0]) in report["compiler"]
    library = ctypes.CDLL(str(tmp_path / "out" / build.LIBRARY))
    assert library.answer() == 42
    assert library.variants() == len(report["variants"])
    assert not hasattr(library, "relattn_variant_portable")  # hidden: only what is marked is exported


def test_compiles_only_what_changed(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    everything = rebuild(sources, out)
    assert {"library", "portable"} <= everything
    assert rebuild(sources, out) == set()
    (sources / "kernel.h").touch()
    assert rebuild(sources, out) == set()  # the contents count, not the times
    (sources / "kernel.h").write_text("#define ONE (2 - 1)\n")
    assert rebuild(sources, out) == everything - {"library"}
    (sources / "both.h").write_text("#define ANSWER 43\n")
    assert rebuild(sources, out) == everything
    assert ctypes.CDLL(str(out / build.LIBRARY)).answer() == 43
    copy = shutil.copytree(sources, tmp_path / "other" / "kernels" / "cpu")
    assert rebuild(copy, tmp_path / "elsewhere") == set()  # as of an sdist unpacked in a new place
    monkeypatch.setenv("CXXFLAGS", "-O0")
    assert rebuild(sources, out) == everything


def test_a_failed_build_says_why_and_leaves_no_stale_library(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rebuild(sources, out)
    (sources / "library.cpp").write_text('#include "both.h"\nint answer() { return MISSING; }\n')
    report = build.build(out, sources=sources)
    assert report == json.loads((out / build.REPORT).read_text())
    assert not report["library"]
    assert "kernels/cpu/library.cpp:2" in report["reason"]
    assert "MISSING" in report["reason"]
    assert {file.name for file in out.iterdir()} == {build.REPORT}


@pytest.mark.parametrize("command", ["/bin/false", "no-such-compiler --flag"])
def test_no_compiler(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("CXX", command)
    report = build.build(tmp_path / "out", sources=sources)
    assert not report["library"]
    assert command in report["reason"]


def test_a_variant_that_the_compiler_does_not_know_is_left_out(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "VARIANTS", {"portable": [], "amx": ["-mno-such-instructions"]})
    report = build.build(tmp_path / "out", sources=sources)
    assert report["variants"] == ["portable"]
    assert ctypes.CDLL(str(tmp_path / "out" / build.LIBRARY)).variants() == 1


@pytest.fixture
def sanitized(sources: Path, tmp_path: Path) -> Path:
    try:
        sanitize.runtime()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    report = build.build(tmp_path / "sanitized", sources=sources, sanitize=sanitize.SANITIZERS)
    assert report["library"], report
    return tmp_path / "sanitized" / build.LIBRARY


@pytest.mark.parametrize(
    ("call", "finding"),
    [("answer()", None), ("past_the_end(4)", "heap-buffer-overflow"), ("overflow(2**31 - 1)", "signed integer overflow")],
)
def test_the_sanitized_run_fails_on_a_finding(sanitized: Path, call: str, finding: str | None) -> None:
    script = f"import ctypes, os; ctypes.CDLL(os.environ['RELATTN_CPU_LIBRARY']).{call}"
    done = sanitize.run(sanitized, "-c", script, capture_output=True, timeout=600)
    assert (done.returncode != 0) == (finding is not None), done.stderr
    assert finding is None or finding in done.stderr
