"""Times the Triton kernels' configurations on the machine at hand, where RELATTN_AUTOTUNE=1 asks for it, and remembers what it found."""

from __future__ import annotations

import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from relattn._version import __version__

_REPEATS = 5
_SECONDS = 0.02  # of launches in one repeat


def wanted() -> bool:
    return os.environ.get("RELATTN_AUTOTUNE", "0") not in ("", "0")


def cache_folder() -> Path:
    """RELATTN_CACHE, or else relattn in XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("RELATTN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "relattn")).expanduser()


def _timings_file() -> Path:
    return cache_folder() / "autotune.json"


def by_speed(
    kernel: str,
    call: str,
    candidates: Sequence[Any],
    launch: Callable[[Any], None],
    fails: Callable[[Exception], bool],
    device: torch.device,
) -> list[Any]:
    """The candidates, fastest first, by the file or by timing `launch` with each. Those that raise what `fails` knows are left out.

    kernel, call: what is timed, as a key. While a CUDA graph is being captured, nothing is timed and nothing changes.
    """
    timings, key = _read(), f"{_machine(device)} | {kernel} | {call}"
    if key not in timings:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return list(candidates)
        timings = {key: _measure(candidates, launch, fails, device)}
        _write(timings)
    times = timings[key]
    known = [candidate for candidate in candidates if str(candidate) in times]
    return sorted(known, key=lambda candidate: times[str(candidate)]) or list(candidates)


def _measure(candidates: Sequence[Any], launch, fails: Callable[[Exception], bool], device: torch.device) -> dict[str, float]:
    """Milliseconds of a launch, by candidate."""
    import statistics  # takes milliseconds to import, a quarter of relattn's

    times = {}
    for candidate in candidates:
        try:
            launch(candidate)  # compiles
        except Exception as error:
            if not fails(error):
                raise
            continue
        once = _milliseconds(launch, candidate, 1, device)
        count = max(1, min(1000, int(1e3 * _SECONDS / max(once, 1e-3))))
        times[str(candidate)] = statistics.median(_milliseconds(launch, candidate, count, device) for _ in range(_REPEATS))
    return times


def _milliseconds(launch, candidate, count: int, device: torch.device) -> float:
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            launch(candidate)
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / count
    began = time.perf_counter()
    for _ in range(count):
        launch(candidate)
    return 1e3 * (time.perf_counter() - began) / count


@functools.cache
def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"relattn {__version__} torch {torch.__version__} {name}"


def _read() -> dict[str, dict[str, float]]:
    path = _timings_file()
    try:
        state = path.stat()
        return _parsed(path, state.st_mtime_ns, state.st_size)
    except (OSError, ValueError, RecursionError):
        return {}


@functools.lru_cache(maxsize=1)
def _parsed(path: Path, *_state: int) -> dict[str, dict[str, float]]:
    """The file's content, parsed anew when it has changed, and not at every launch."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected timings by call, got {type(content).__name__}")

    def sound(times: Any) -> bool:
        return isinstance(times, dict) and all(isinstance(one, (int, float)) for one in times.values())

    return {key: times for key, times in content.items() if sound(times)}  # what is damaged is timed again


def _write(new: dict[str, dict[str, float]]) -> None:
    """Add to the file."""
    write_whole(_timings_file(), json.dumps(_read() | new, indent=1))


def write_whole(path: Path, text: str) -> None:
    """Replace a file of the cache: a reader never sees half of it. In a folder that cannot be written to, nothing is kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # the new name must not outlive a crash that the content does not
        os.replace(file.name, path)
    except OSError:
        return  # a read-only home: the next process finds it out again
