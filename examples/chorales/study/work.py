"""Running cells, in this process or several: any number of processes may share a folder."""

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

from ..command import prepare_process, quiet_transformers
from ..storage import write_json
from ..terminal import exit_code
from .cells import Cell, preset_cells
from .rates import chosen_in
from .results import read_result

CONTINUES = "the same command continues"


def selected(options: argparse.Namespace) -> list[Cell]:
    """The cells that the options ask for, as far as it is known by now: some wait for a learning rate.

    Raises:
        ValueError: --only matches none, or a result that chooses a rate is damaged or of other settings.
    """
    chosen = chosen_in(options.out) if options.preset == "rates" else {}
    cells = preset_cells(options.preset, options.seeds, chosen)
    found = [cell for cell in cells if fnmatch.fnmatchcase(cell.name, options.only or "*")]
    if not found:
        raise ValueError(f"--only: no cell of preset {options.preset} matches {options.only!r}; --list shows their names")
    return found


def lock_path(folder: Path, cell: Cell) -> Path:
    """Of the cell alone: names have dots in them, so with_suffix would give several cells one file."""
    return folder / "unfinished" / f"{cell.name}.lock"


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


def _one_after_another(options: argparse.Namespace) -> Iterator[Cell]:
    """Every selected cell once; after each the selection is made anew, as a cell that has finished may add to it."""
    seen: set[Cell] = set()
    while left := [cell for cell in selected(options) if cell not in seen]:
        seen.add(left[0])
        yield left[0]


def work(options: argparse.Namespace) -> None:
    """Run every cell that is not finished and not claimed by another process."""
    started = time.monotonic()
    import torch
    from accelerate import PartialState

    from ..data.tokens import Chorales
    from ..reporting import environment
    from .training import run_cell

    torch.set_num_threads(1)
    quiet_transformers()
    state = PartialState(cpu=not torch.cuda.is_available())
    chorales = Chorales.load(options.data)
    fingerprint = chorales.fingerprint()
    versions = {name: environment(processes=1)[name] for name in ("python", "torch", "transformers", "numpy", "system")}
    for cell in _one_after_another(options):
        path = options.out / f"{cell.name}.json"
        if path.is_file():
            read_result(path, cell, fingerprint)
            continue
        if options.hours is not None and time.monotonic() - started > 3600 * options.hours:
            print(f"--hours {options.hours:g} are over; the same command continues", flush=True)
            return
        scratch = options.out / "unfinished" / cell.name
        with claim(lock_path(options.out, cell)) as mine:
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
        figures = f"test loss {test['loss']:.4f}, accuracy {test['accuracy']:.2%}, {result['cpu_seconds']:.0f} s"
        print(f"{cell.name}: {figures}", flush=True)


def run(options: argparse.Namespace) -> None:
    """Run the cells in this process, or in --jobs processes of their own."""
    os.environ["OMP_NUM_THREADS"] = "1"  # these models are too small for two threads; --jobs uses the other cores
    prepare_process()
    if options.data and not Path(options.data).is_file():
        raise FileNotFoundError(f"--data {options.data}: no such file")
    selected(options)  # what is wrong with it is told once, not by every process
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
    sys.exit(exit_code(lambda: work(options), CONTINUES))
