"""Why the published comparison came out backwards: a grid of small training runs, and a report on them.

    python -m examples.chorales.study                          # the grid; the same command continues after a kill
    python -m examples.chorales.study --preset seed            # the notebook's schedule: both published numbers
    python -m examples.chorales.study --preset rates           # a learning rate for each arm, and long curves
    python -m examples.chorales.study --list                   # what would run, in which order, and what it costs
    python -m examples.chorales.study report --results DIR     # tables and figures, from the JSON files alone

A cell is one training run; its result is one JSON file in --out. Finished cells are skipped, a killed one continues
from its checkpoint. Any number of processes, started by --jobs or by hand, may share a folder: a lock file keeps a cell
to one of them, and the system releases it when its process ends, however it ends.
"""

import argparse
import sys
from pathlib import Path

from ..terminal import exit_code
from .cells import PRESETS, Cell, expected_seconds
from .rates import chosen_in, waiting
from .results import COMMITTED, read_result
from .work import CONTINUES, run, selected


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.chorales.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("action", nargs="?", choices=("run", "report"), default="run", help="default: run")
    add("--preset", choices=PRESETS, default="grid", help="which cells (default: grid)")
    add("--seeds", type=int, default=3, metavar="N", help="repetitions of every cell (default 3)")
    add("--only", metavar="PATTERN", help="cells whose name matches, as w016-*-s0 (see --list)")
    add("--list", action="store_true", help="print the cells and their cost, run nothing")
    add("--data", metavar="PATH", help="classic JSON, npz or pickle file (default: music21's corpus)")
    add("--out", metavar="DIR", type=Path, help="gets the JSON files (default: runs/study-<preset>)")
    add("--jobs", type=int, default=1, metavar="N", help="processes, of one thread each (default 1)")
    add("--hours", type=float, metavar="H", help="start no cell after so many hours")
    add("--results", metavar="DIR", type=Path, help="report: on these (default: the committed)")
    add("--readme", metavar="FILE", type=Path, help="report: the file whose marked part is written anew")
    options = parser.parse_args(arguments)
    for name, least in (("jobs", 1), ("seeds", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(options, name)}")
    if options.hours is not None and not options.hours > 0:
        parser.error(f"--hours: expected more than 0, got {options.hours}")
    for name, value in vars(options).items():
        of = "report" if name in ("results", "readme") else "run"
        if name != "action" and value != parser.get_default(name) and of != options.action:
            parser.error(f"--{name}: of the action {of}, not of {options.action}")
    options.out = options.out or Path("runs") / f"study-{options.preset}"
    options.results = options.results or COMMITTED
    return options


def measured_seconds(folder: Path, cells: list[Cell]) -> dict[str, float]:
    """The most seconds that a finished cell of each group took: one that was killed knows its last part alone."""
    found: dict[str, list[float]] = {}
    for cell in cells:
        path = folder / f"{cell.name}.json"
        if path.is_file():
            found.setdefault(cell.group, []).append(read_result(path, cell)["cpu_seconds"])
    return {group: max(seconds) for group, seconds in found.items()}


def list_cells(options: argparse.Namespace) -> None:
    """Print every cell with its state and cost."""
    cells = selected(options)
    measured = measured_seconds(options.out, cells)
    left = 0.0
    for cell in cells:
        done = (options.out / f"{cell.name}.json").is_file()
        seconds = expected_seconds(cell, measured)
        left += 0 if done else seconds
        print(f"{cell.name:48s} {'done' if done else f'{seconds:5.0f} s'}")
    finished = sum((options.out / f"{cell.name}.json").is_file() for cell in cells)
    print(f"{len(cells)} cells, {finished} finished; about {left / 3600:.1f} core-hours to go")
    if options.preset == "rates" and (later := waiting(chosen_in(options.out))):
        print(f"more cells follow once these have a learning rate: {', '.join(later)}")


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.action == "report":
        from .report import write_report

        return exit_code(lambda: write_report(options.results, options.readme))
    return exit_code(lambda: list_cells(options) if options.list else run(options), CONTINUES)


if __name__ == "__main__":
    sys.exit(main())
