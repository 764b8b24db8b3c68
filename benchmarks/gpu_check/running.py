"""Runs the jobs of a stage, each a process of its own, until a deadline; one JSON file and one archive of logs.

A job is a function that `python -m benchmarks.processes` can call. Its last line of JSON is its result, also when it
was stopped, so that a long one prints as it goes. Whatever it started ends with it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.processes import stop
from examples.chorales.storage import write_json

_SPARE = 5.0  # seconds: nothing is begun when fewer are left
_LOG = 2**20  # bytes at most of a job's log in the archive: its end


class Job(NamedTuple):
    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any] = {}  # noqa: RUF012 (never written to)
    limit: float = 60.0  # seconds
    prefix: tuple[str, ...] = ()  # a tool that runs it, such as compute-sanitizer
    environment: dict[str, str] = {}  # noqa: RUF012
    parse: Callable[[str], Any] | None = None  # what makes a result of the log, if that is not a line of JSON


class Group(NamedTuple):
    jobs: Sequence[Job]
    at_once: int = 1
    limit: float = 1e9  # seconds, all jobs together
    essential: bool = False  # where one of its jobs fails, the stage ends


def run_stage(
    stage: str, groups: Sequence[Group], folder: Path, seconds: float, inline: bool = False
) -> dict[str, Any]:
    """Run the groups one after the other, and write OUT/stage.json after every job, OUT/stage_logs.tar.gz after every
    group. `inline`: in this process, for dry runs."""
    began = time.monotonic()
    report: dict[str, Any] = {"stage": stage, "date": time.strftime("%Y-%m-%d %H:%M"), "parts": {}}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as logs:
        for group in groups:
            deadline = min(began + seconds, time.monotonic() + group.limit)
            ended = _inline(group, Path(logs)) if inline else _run_group(group, deadline, Path(logs))
            for name, part in ended:
                report["parts"][name] = part
                report["seconds"] = round(time.monotonic() - began, 1)
                write_json(folder / f"{stage}.json", report)
                print(f"{report['seconds']:6.0f} s  {name}: {part['status']}", flush=True)
            _pack(Path(logs), folder / f"{stage}_logs.tar.gz")
            if group.essential and any(report["parts"][job.name]["status"] != "ok" for job in group.jobs):
                report["ended"] = "what comes next would mean nothing: see the parts that failed"
                write_json(folder / f"{stage}.json", report)
                break
    return report


class _Running:
    """A job's process."""

    def __init__(self, job: Job, deadline: float, logs: Path, threads: int) -> None:
        self.job, self.began = job, time.monotonic()
        self.stop_at = min(self.began + job.limit, deadline)
        self.log = logs / f"{''.join(letter if letter.isalnum() else '_' for letter in job.name)}.log"
        target = f"{job.function.__module__}:{job.function.__qualname__}"
        command = [*job.prefix, sys.executable, "-m", "benchmarks.processes", target, json.dumps(job.arguments)]
        variables = {"OMP_NUM_THREADS": str(threads)} | dict(os.environ) | job.environment
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=variables, start_new_session=True
            )

    def is_over(self) -> bool:
        return self.process.poll() is not None or time.monotonic() >= self.stop_at

    def end(self) -> dict[str, Any]:
        code = self.process.poll()
        stop(self.process)
        seconds = time.monotonic() - self.began
        status = f"stopped after {seconds:.0f} s" if code is None else "ok" if code == 0 else f"exit status {code}"
        return _part(self.job, status, seconds, self.log.read_text(encoding="utf-8", errors="replace"))


def _run_group(group: Group, deadline: float, logs: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    waiting = list(group.jobs)
    running: list[_Running] = []
    threads = max(1, (os.cpu_count() or 1) // group.at_once)
    try:
        while waiting or running:
            while waiting and len(running) < group.at_once and time.monotonic() < deadline - _SPARE:
                running.append(_Running(waiting.pop(0), deadline, logs, threads))
            if not running:
                yield from ((job.name, {"status": "no time left"}) for job in waiting)
                return
            for each in [each for each in running if each.is_over()]:
                running.remove(each)
                yield each.job.name, each.end()
            time.sleep(0.02)
    finally:
        for each in running:
            stop(each.process)


def _inline(group: Group, logs: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for job in group.jobs:
        began, output = time.monotonic(), io.StringIO()
        with contextlib.redirect_stdout(output):
            try:
                print("\n" + json.dumps(job.function(**json.loads(json.dumps(job.arguments)))))
                status = "ok"
            except (Exception, SystemExit) as error:
                status = f"{type(error).__name__}: {error}"
                print(traceback.format_exc())
        (logs / "dry.log").write_text(output.getvalue())
        yield job.name, _part(job._replace(parse=None), status, time.monotonic() - began, output.getvalue())


def _part(job: Job, status: str, seconds: float, log: str) -> dict[str, Any]:
    part: dict[str, Any] = {"status": status, "seconds": round(seconds, 1)}
    if job.parse is not None:
        with contextlib.suppress(ValueError, LookupError):
            part["result"] = job.parse(log)
    else:
        for line in reversed(log.splitlines()):
            with contextlib.suppress(ValueError):
                part["result"] = json.loads(line)
                break
    if status == "ok" and isinstance(part.get("result"), dict) and part["result"].get("wrong"):
        part["status"] = "wrong"
    if part["status"] != "ok" or "result" not in part:
        part["log"] = log.splitlines()[-12:]
    return part


def _pack(logs: Path, archive: Path) -> None:
    with tarfile.open(archive.with_suffix(".tmp"), "w:gz") as file:
        for log in sorted(logs.iterdir()):
            content = log.read_bytes()[-_LOG:]
            entry = tarfile.TarInfo(log.name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    os.replace(archive.with_suffix(".tmp"), archive)
