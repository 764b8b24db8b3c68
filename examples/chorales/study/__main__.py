"""Why the published comparison came out backwards: a grid of small training runs, and a report on them.

    python -m examples.chorales.study                          # the grid; the same command continues after a kill
    python -m examples.chorales.study --preset seed            # the notebook's schedule: both published numbers
    python -m examples.chorales.study --list                   # what would run, in which order, and what it costs
    python -m examples.chorales.study report --results DIR     # tables and figures, from the JSON files alone

A cell is one training run; its result is one JSON file in --out. Finished cells are skipped, a killed one continues from
its checkpoint. Any number of processes, started by --jobs or by hand, may share a folder: a lock file keeps a cell to
one of them, and the system releases it when its process ends, however it ends.
"""

import argparse
import contextlib
import fnmatch
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .storage import write_json
from .study_cells import Cell, expected_seconds, preset_cells, read_result
from .terminal import exit_code

COMMITTED = Path(__file__).parent / "results"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.chorales.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", nargs="?", choices=("run", "report"), default="run", help="default: run")
    parser.add_argument("--preset", choices=("grid", "seed", "tiny"), default="grid", help="which cells (default: grid)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="repetitions of every cell (default 3)")
    parser.add_argument("--only", metavar="PATTERN", help="cells whose name matches, as w016-*-s0 (see --list)")
    parser.add_argument("--list", action="store_true", help="print the cells and their cost, run nothing")
    parser.add_argument("--data", metavar="PATH", help="classic JSON, npz or pickle file (default: music21's corpus)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="gets the JSON files (default: runs/study-<preset>)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes, of one thread each (default 1)")
    parser.add_argument("--hours", type=float, metavar="H", help="start no cell after so many hours")
    parser.add_argument("--results", metavar="DIR", type=Path, default=COMMITTED, help="report: on these (default: the committed)")
    parser.add_argument("--readme", metavar="FILE", type=Path, help="report: the file whose marked part is written anew")
    options = parser.parse_args(arguments)
    for name, least in (("jobs", 1), ("seeds", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(options, name)}")
    if options.hours is not None and not options.hours > 0:
        parser.error(f"--hours: expected more than 0, got {options.hours}")
    if options.action == "report" and options.out:
        parser.error("--out: of a run; report reads and writes --results DIR")
    options.out = options.out or Path("runs") / f"study-{options.preset}"
    options.cells = preset_cells(options.preset, options.seeds)
    if options.only:
        options.cells = [cell for cell in options.cells if fnmatch.fnmatchcase(cell.name, options.only)]
        if not options.cells:
            parser.error(f"--only: no cell of preset {options.preset} matches {options.only!r}; --list shows their names")
    return options


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Hold the lock file `path` for the block, or get False where a living process holds it.

    The lock is the system's, not the file's existence: a file that a killed process left behind is free.
    """
    try:
        import fcntl
    except ImportError as error:
        raise OSError("the study needs the file locks of a POSIX system") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            # Whoever opened this file meanwhile gets the lock of a deleted file, and then sees that the cell is done.
            path.unlink(missing_ok=True)


def work(options: argparse.Namespace) -> None:
    """Run every cell that is not finished and not claimed by another process."""
    started = time.monotonic()
    import torch
    import transformers
    from accelerate import PartialState

    from .data import Chorales
    from .report import environment
    from .study_model import run_cell

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    state = PartialState(cpu=not torch.cuda.is_available())
    chorales = Chorales.load(options.data)
    fingerprint = chorales.fingerprint()
    versions = {name: environment(1, "")[name] for name in ("python", "torch", "transformers", "numpy", "system")}
    for cell in options.cells:
        path = options.out / f"{cell.name}.json"
        if path.is_file():
            read_result(path, cell, fingerprint)
            continue
        if options.hours is not None and time.monotonic() - started > 3600 * options.hours:
            print(f"--hours {options.hours:g} are over; the same command continues", flush=True)
            return
        scratch = options.out / "unfinished" / cell.name
        with claim(scratch.with_suffix(".lock")) as mine:
            if not mine or path.is_file():
                continue
            described = {"configuration": cell.configuration(), "data_fingerprint": fingerprint}
            begun = scratch / "cell.json"
            if (scratch / "checkpoints").is_dir():  # of the same cell, or the loss would be of something in between
                read_result(begun, cell, fingerprint)
            write_json(begun, described)
            result = run_cell(cell, chorales, scratch, state, show_progress=options.jobs == 1)
            write_json(path, described | {"environment": versions, **result})
            shutil.rmtree(scratch, ignore_errors=True)
        test = result["test"]
        print(f"{cell.name}: test loss {test['loss']:.4f}, accuracy {test['accuracy']:.2%}, {result['cpu_seconds']:.0f} s", flush=True)


def measured_seconds(folder: Path, cells: list[Cell]) -> dict[str, float]:
    """The most seconds that a finished cell of each group took: one that continued after a kill knows its last part alone."""
    found = {}
    for cell in cells:
        path = folder / f"{cell.name}.json"
        if path.is_file():
            found.setdefault(cell.group, []).append(read_result(path, cell)["cpu_seconds"])
    return {group: max(seconds) for group, seconds in found.items()}


def list_cells(options: argparse.Namespace) -> None:
    """Print every cell with its state and cost."""
    measured = measured_seconds(options.out, options.cells)
    left = 0.0
    for cell in options.cells:
        done = (options.out / f"{cell.name}.json").is_file()
        seconds = expected_seconds(cell, measured)
        left += 0 if done else seconds
        print(f"{cell.name:48s} {'done' if done else f'{seconds:5.0f} s'}")
    finished = sum((options.out / f"{cell.name}.json").is_file() for cell in options.cells)
    print(f"{len(options.cells)} cells, {finished} finished; about {left / 3600:.1f} core-hours to go")


def run(options: argparse.Namespace) -> None:
    """Run the cells in this process, or in --jobs processes of their own."""
    os.environ["OMP_NUM_THREADS"] = "1"  # these models are too small for two threads; --jobs uses the other cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.data and not Path(options.data).is_file():
        raise FileNotFoundError(f"--data {options.data}: no such file")
    if options.jobs == 1:
        work(options)
        return
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_work_in_process, args=(options,)) for _ in range(options.jobs)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failed = [process.exitcode for process in processes if process.exitcode]
    if failed:
        raise OSError(f"{len(failed)} of {options.jobs} processes failed (exit codes {', '.join(map(str, failed))})")


def _work_in_process(options: argparse.Namespace) -> None:
    sys.exit(exit_code(lambda: work(options), "the same command continues"))


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.action == "report":
        from .study_report import write_report

        return exit_code(lambda: write_report(options.results, options.readme))
    return exit_code(lambda: list_cells(options) if options.list else run(options), "the same command continues")


if __name__ == "__main__":
    sys.exit(main())
