"""Report and pictures of measured rows: `python -m benchmarks.render DIR ... [--readme docs/benchmarks.md]`.

From DIR/results.json alone: DIR/report.md, time.png, memory.png, speed.png, and, of training, overview.png, time beside memory. With
--readme, the part of that file between `<!-- benchmarks -->` and `<!-- /benchmarks -->` is written anew from the folders given, in
their order.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.peers import PASSES, PEERS
from examples.chorales.storage import atomic_write, read_json, write_part
from examples.chorales.terminal import exit_code

_MIB = 2**20
_PASSES = {"forward": "forward", "train": "forward + backward", "decode": "decoding, one query"}
_CEILING = "sdpa"
_REFERENCE = "relattn-reference"  # the plain implementation of the tests: in the tables, not in the pictures
_FAILED = {"out of memory": "out of memory", "timeout": "too slow", "crash": "crash", "error": "error", "wrong": "wrong"}
# Colours that colour-blind readers can tell apart (Okabe and Ito); relattn's own are the strong ones.
_STYLE = {
    "relattn-triton": ("#D55E00", "o", 3.0),
    "relattn-cpu": ("#D55E00", "o", 3.0),
    "relattn-blocked": ("#E69F00", "o", 2.0),
    "skew": ("#0072B2", "s", 1.4),
    "skew-compiled": ("#56B4E9", "s", 1.4),
    "shaw": ("#CC79A7", "^", 1.4),
    "sdpa-bias": ("#009E73", "D", 1.4),
    "flex": ("#7A5195", "v", 1.4),
    "w2v-bert": ("#8C564B", "P", 1.4),
    "parakeet": ("#7F7F7F", "X", 1.4),
    "flash-deberta": ("#B8A600", "<", 1.4),
    "disentangled-flash": ("#17A2B8", ">", 1.4),
    _CEILING: ("#000000", "", 1.6),
    "sdpa-flash": ("#444444", "|", 1.0),
    "sdpa-cudnn": ("#888888", "_", 1.0),
}


class Results:
    """Rows of one folder, by (pass, peer, length)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.content = read_json(folder / "results.json")
        self.settings, self.environment = self.content["settings"], self.content["environment"]
        self.rows = {(row["pass"], row["peer"], row["length"]): row for row in self.content["rows"]}
        self.passes = [passed for passed in PASSES if any(key[0] == passed for key in self.rows)]
        self.lengths = sorted({key[2] for key in self.rows})

    def row(self, passed: str, peer: str, length: int) -> dict[str, Any]:
        return self.rows.get((passed, peer, length), {"status": "not applicable", "detail": "not measured"})

    def peers(self, passed: str) -> list[str]:
        """Those that took part."""
        return [peer for peer in PEERS if any(self.row(passed, peer, length)["status"] != "not applicable" for length in self.lengths)]

    def value(self, passed: str, peer: str, length: int, field: str) -> float | None:
        row = self.row(passed, peer, length)
        return row.get(field) if row["status"] == "ok" else None

    def own(self, passed: str) -> str | None:
        """relattn's backend that is automatic here."""
        names = ("relattn-triton", "relattn-cpu", "relattn-blocked")
        return next((name for name in names if name in self.peers(passed)), None)

    def title(self) -> str:
        """The settings, in words."""
        setting = self.settings
        parts = [f"B = {setting['batch']}, H = {setting['heads']}, D = {setting['head_dim']}", setting["dtype"]]
        parts += ["causal"] * setting["causal"]
        parts.append("one table row per distance" if setting["clip"] is None else f"distances clipped at {setting['clip']}")
        return ", ".join(parts)

    def machine(self) -> str:
        found = self.environment
        where = f"{found['gpu']}" if "gpu" in found else f"{found['processor']}, {found['threads']} threads of {found['cores']} cores"
        return f"{where}, torch {found['torch']}, relattn {found['relattn']}"


def _number(value: float) -> str:
    """Three digits that count, or all before the point."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def _milliseconds(value: float) -> str:
    return f"{value / 1e3:.2f} s" if value >= 1e3 else f"{_number(value)} ms"


def _cells(results: Results, passed: str, peer: str, lengths: list[int], cell: Callable[[dict[str, Any]], str]) -> list[str]:
    cells = []
    for length in lengths:
        row = results.row(passed, peer, length)
        cells.append(cell(row) if row["status"] == "ok" else _FAILED.get(row["status"], ""))
    return cells


def table(results: Results, passed: str, kind: str, lengths: list[int]) -> list[str]:
    """Lines of Markdown: peers by lengths; kind "time" (and multiples of relattn's), "memory" or "ceiling"."""
    own = results.own(passed)

    def time_of(row: dict[str, Any]) -> str:
        base = None if own is None else results.value(passed, own, row["length"], "median_ms")
        return _milliseconds(row["median_ms"]) + ("" if base is None or row["peer"] == own else f" ({row['median_ms'] / base:.2f}x)")

    cell: dict[str, Callable[[dict[str, Any]], str]] = {
        "time": time_of,
        "memory": lambda row: f"{_number(row['peak_bytes'] / _MIB)} MiB",
        "ceiling": lambda row: f"{row['percent_of_matrix_ceiling']:.0f} %",
    }
    heading = {"time": "median time", "memory": "peak memory beyond the inputs", "ceiling": "of the matrix ceiling"}[kind]
    lines = [f"| {_PASSES[passed]}: {heading} | " + " | ".join(f"L = {length}" for length in lengths) + " |"]
    lines.append("| --- |" + " ---: |" * len(lengths))
    for peer in results.peers(passed):
        label = f"**{PEERS[peer].label}**" if peer == own else PEERS[peer].label
        lines.append(f"| {label} | " + " | ".join(_cells(results, passed, peer, lengths, cell[kind])) + " |")
    return lines


def report(results: Results) -> str:
    found = results.environment
    lines = [f"# Relative attention: {results.title()}", "", f"{results.machine()}. {results.content['date']}.", ""]
    lines += ["![time](time.png)", "![memory](memory.png)", "![speed](speed.png)", ""]
    for passed in results.passes:
        for kind in ("time", "memory", "ceiling"):
            lines += [*table(results, passed, kind, results.lengths), ""]
    lines += [
        "(2.00x) = takes twice relattn's time. Every row is one process: checked against the float64 reference, then peak memory (results",
        "included), then time: medians. \"SDPA, no relative term\" is torch's attention without what the others compute: a bound, not a",
        "peer. The matrix ceiling is torch's fastest product of square matrices in this dtype, measured in the same run: "
        f"{results.content['matrix_tflops']:.3g}",
        "TFLOP/s; operations are those that the mathematics needs (benchmarks/trial.py), so that nobody gains by computing more.",
        "",
    ]
    lines += _remarks(results)
    lines.append("Machine: " + ", ".join(f"{name} {value}" for name, value in found.items()) + ".")
    lines.append(f"Commit {', '.join(map(str, results.content['commits']))}.")
    return "\n".join(lines) + "\n"


def _remarks(results: Results) -> list[str]:
    """What did not run and why, the widest spread, and what disturbed."""
    reasons: dict[str, list[str]] = {}
    for passed in results.passes:
        for peer in PEERS:
            for length in results.lengths:
                row = results.row(passed, peer, length)
                if row["status"] == "ok" or row.get("detail") == "not measured":
                    continue
                detail = row.get("detail") or f"errors of {row['errors']} roundings"
                text = detail if row["status"] == "not applicable" else f"{row['status']} ({detail})"
                where = f"{PEERS[peer].label}, {passed}" + ("" if row["status"] == "not applicable" else f", L = {length}")
                known = reasons.setdefault(text, [])
                if where not in known:
                    known.append(where)
    lines = ["Not in the tables, or not with a figure:", ""] if reasons else []
    lines += [f"- {'; '.join(where)}: {text}" for text, where in reasons.items()] + [""] * bool(reasons)
    timed = [row for row in results.rows.values() if "median_ms" in row]
    if timed:
        spread = max(timed, key=lambda row: (row["quartiles_ms"][1] - row["quartiles_ms"][0]) / row["median_ms"])
        low, high = spread["quartiles_ms"]
        busy = max((row.get("other_processes_cores") or 0.0) for row in timed)
        lines += [
            f"Widest quartiles: {PEERS[spread['peer']].label}, {spread['pass']}, L = {spread['length']}: {low:.3g} to {high:.3g} ms around "
            f"{spread['median_ms']:.3g}. Other processes took at most {busy:.2f} cores while a row ran.",
            "",
        ]
    return lines


class Panel(NamedTuple):
    """A value of every peer's rows of one pass against their length."""

    passed: str
    title: str
    label: str
    value: Callable[[dict[str, Any]], float | None]


def draw(results: Results) -> list[Path]:
    """time.png, memory.png and speed.png, with a panel for each pass; overview.png, time and memory of training."""
    import matplotlib

    matplotlib.use("Agg")
    labels = {
        "time": "median time, ms",
        "memory": "peak memory beyond the inputs, MiB",
        "speed": "speed, as a part of attention\nwithout a relative term",
    }

    def panel(passed: str, name: str) -> Panel:
        value: dict[str, Callable[[dict[str, Any]], float | None]] = {
            "time": lambda row: row["median_ms"],
            "memory": lambda row: row["peak_bytes"] / _MIB,
            "speed": lambda row: _relative_speed(results, passed, row),
        }
        return Panel(passed, _PASSES[passed], labels[name], value[name])

    pictures = {name: [panel(passed, name) for passed in results.passes] for name in labels}
    if "train" in results.passes:
        pictures["overview"] = [panel("train", name)._replace(title=f"{_PASSES['train']}: {name}") for name in ("time", "memory")]
    return [_picture(results, name, panels) for name, panels in pictures.items()]


def _relative_speed(results: Results, passed: str, row: dict[str, Any]) -> float | None:
    base = results.value(passed, _CEILING, row["length"], "median_ms")
    return None if base is None else base / row["median_ms"]


def _picture(results: Results, name: str, panels: list[Panel]) -> Path:
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullLocator

    alike = len({panel.label for panel in panels}) == 1
    size = (1.6 + 4.4 * len(panels) + 1.4, 4.4)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, sharey=alike, squeeze=False, layout="constrained")
    handles: dict[str, Any] = {}
    for axis, (passed, title, label, value) in zip(axes[0], panels, strict=True):
        lost: dict[int, list[str]] = {}
        for peer in results.peers(passed):
            if peer == _REFERENCE:
                continue
            colour, marker, width = _STYLE[peer]
            rows = [results.row(passed, peer, length) for length in results.lengths]
            points = [(row["length"], value(row)) for row in rows if row["status"] == "ok"]
            points = [(length, height) for length, height in points if height is not None]
            line = axis.plot(
                *zip(*points, strict=True) if points else ([], []), color=colour, marker=marker, linewidth=width, markersize=4 + width,
                linestyle="--" if peer == _CEILING else "-", zorder=3 if peer.startswith("relattn") else 2,
            )[0]  # fmt: skip
            handles.setdefault(peer, line)
            for row in rows:
                if row["status"] in _FAILED:
                    lost.setdefault(row["length"], []).append(peer)
        axis.set(xscale="log", yscale="log", xlabel="sequence length L")
        axis.set_title(title, pad=18 if lost else 6, fontsize=12)
        axis.set_xticks(results.lengths, [str(length) for length in results.lengths])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda height, _: f"{height:g}"))
        axis.grid(True, which="major", color="#DDDDDD", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
        if not alike or axis is axes[0][0]:
            axis.set_ylabel(label)
        _mark_lost(results, axis, passed, lost)
    labels = [PEERS[peer].label for peer in handles]
    figure.legend(handles.values(), labels, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(f"{results.title()}\n{results.machine()}", fontsize=9)
    path = results.folder / f"{name}.png"
    with atomic_write(path, "wb") as file:
        # Without a date or version inside: the same rows give the same file.
        figure.savefig(file, dpi=130, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return path


def _mark_lost(results: Results, axis: Any, passed: str, lost: dict[int, list[str]]) -> None:
    """Above the axes at the lengths where peers gave no figure: a cross in each one's colour; what became of them beside the first."""

    def above(length: int, offset: float, text: str, **style: Any) -> None:
        axis.annotate(
            text, (length, 1.0), xycoords=axis.get_xaxis_transform(), xytext=(offset, 9), textcoords="offset points", va="center",
            annotation_clip=False, **style,
        )  # fmt: skip

    for length, peers in lost.items():
        for place, peer in enumerate(peers):
            offset = 11 * (place - (len(peers) - 1) / 2)
            above(length, offset, "\u00d7", color=_STYLE[peer][0], fontsize=15, fontweight="bold", ha="center")
    if lost:
        first = min(lost)
        words = sorted({_FAILED[results.row(passed, peer, length)["status"]] for length, peers in lost.items() for peer in peers})
        above(first, -5.5 * len(lost[first]) - 4, ", ".join(words), color="#444444", fontsize=9, ha="right")


def render(folder: Path) -> list[Path]:
    """Write report.md and the pictures of a folder; the paths, results.json first.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the report is written all the same.
    """
    results = Results(folder)
    path = folder / "report.md"
    with atomic_write(path) as file:
        file.write(report(results))
    try:
        pictures = draw(results)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{path} is written; the pictures need {error.name}: pip install "relattn[bench]", then python -m benchmarks.render {folder}'
        ) from error
    return [folder / "results.json", path, *pictures]


def readme_part(folders: list[Path], root: Path) -> str:
    """What stands between the marks of a page in the folder `root`."""
    lines = []
    for folder in folders:
        results = Results(folder)
        place = Path(os.path.relpath(folder.resolve(), root.resolve())).as_posix()
        lines += [f"**{results.machine()}**: {results.title()} (all figures: `{place}/report.md`).", ""]
        lengths = [length for length in results.lengths if length in (512, 2048, 8192, 32768)]
        lengths = lengths if len(lengths) > 2 else results.lengths[-3:]
        for passed in results.passes:
            if passed == results.passes[0] != "decode":
                lines += [f"![time against length]({place}/time.png)", f"![memory against length]({place}/memory.png)", ""]
            lines += [*table(results, passed, "time", lengths), ""]
            if passed == "train":
                lines += [*table(results, passed, "memory", lengths), ""]
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    for folder in options.folders:
        print("Written: " + ", ".join(str(path) for path in render(folder)))
    if options.readme:
        write_part(options.readme, "benchmarks", readme_part(options.folders, options.readme.parent))
        print(f"Written: {options.readme}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.render", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--readme", type=Path, help="the file whose marked part is written anew")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
