"""The study's report: tables (markdown) and figures from the cells' JSON files, and from nothing else.

Differences are paired: two arms of one seed start from the same weights, see the same batches in the same order with the
same masks, and are tested on the same tokens. Intervals are 95 % t-intervals over seeds.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .storage import atomic_write, read_json, write_part
from .study_cells import Cell, check_result

PUBLISHED_LOSS = {"absolute": 0.4014, "relative.published.normal": 0.4865}  # the seed notebook's last lines

# 97.5 % points of Student's t for 1, 2, ... degrees of freedom; beyond, the last is a little too wide.
_T = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
)  # fmt: skip

_COLOURS = {"absolute": "#1f77b4", "relative": "#d62728", "both": "#2ca02c", "none": "#7f7f7f"}

# arm (Cell.arm) -> how tables and figures call it
_ARM_TEXT = {
    "absolute": "absolute",
    "relative.published.normal": "relative as published: its skew, N(0, 1) tables",
    "relative.published": "relative, published skew, small tables",
    "relative.normal": "relative, right skew, N(0, 1) tables",
    "relative": "relative, right skew, small tables",
    "both": "both, right skew, small tables",
    "both.published.normal": "both, published skew, N(0, 1) tables",
    "none": "no positions at all",
}

Values = dict[int, float]  # seed -> value


@dataclass(frozen=True)
class Estimate:
    """Mean of `n` values and half the length of its 95 % interval (None for one value)."""

    mean: float
    half: float | None
    n: int

    @classmethod
    def of(cls, values: list[float]) -> "Estimate":
        n = len(values)
        if not n:
            raise ValueError("values: expected at least one, got none")
        mean = sum(values) / n
        if n == 1:
            return cls(mean, None, 1)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
        return cls(mean, _T[min(n - 1, len(_T)) - 1] * deviation / math.sqrt(n), n)

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval lies on one side of zero, else (or for one value) 0."""
        if self.half is None or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1

    def text(self, form: str = ".3f") -> str:
        half = "" if self.half is None else f" ± {self.half:{form.replace('+', '')}}"
        return f"{self.mean:{form}}{half} ({self.n})"


def difference(one: Values, other: Values) -> Estimate | None:
    """Mean of one - other over the seeds that both have, or None where there is none."""
    shared = sorted(one.keys() & other.keys())
    return Estimate.of([one[seed] - other[seed] for seed in shared]) if shared else None


class Results:
    """The finished cells of a folder."""

    def __init__(self, folder: Path):
        self.cells: dict[Cell, dict] = {}
        names = {field.name for field in dataclasses.fields(Cell)}
        for path in sorted(folder.glob("*.json")):
            result = read_json(path)
            try:
                configuration = result["configuration"]
                factors = {name: configuration[name] for name in names - {"schedule"}}
                cell = Cell(**factors, schedule=configuration["schedule"]["name"])
                result["test"]["loss"], result["data_fingerprint"]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"--results: {path} is not the result of a cell ({error!r})") from error
            check_result(result, path, cell)  # the settings of its schedule are today's
            self.cells[cell] = result
        if not self.cells:
            raise FileNotFoundError(f"--results {folder}: no JSON files of finished cells there")
        data = {result["data_fingerprint"] for result in self.cells.values()}
        if len(data) > 1:
            raise ValueError(f"--results {folder}: cells of {len(data)} different data sets ({', '.join(sorted(data))}) do not compare")

    def values(self, arm: str, metric: str = "loss", part: str = "test", **setting) -> Values:
        """seed -> metric of the cells with this arm and setting (fields of Cell); `part` is "test" or "longer"."""
        return {
            cell.seed: result[part][metric]
            for cell, result in self.cells.items()
            if cell.arm == arm and part in result and all(getattr(cell, name) == value for name, value in setting.items())
        }

    def settings(self) -> list[dict]:
        """The distinct settings (everything but arm and seed), shortest budget first."""
        order = {"tiny": 0, "short": 1, "long": 2, "notebook": 3}
        keys = {(order[c.schedule], c.window, c.masking, c.phase, c.voice, c.schedule) for c in self.cells}
        return [dict(zip(("window", "masking", "phase", "voice", "schedule"), key[1:], strict=True)) for key in sorted(keys)]

    def parameters(self, arm: str, **setting) -> int:
        return next(r["parameters"] for c, r in self.cells.items() if c.arm == arm and all(getattr(c, n) == v for n, v in setting.items()))


def _factor_text(field: str, value: str | int | bool) -> str:
    """A level of a factor in a few words; "" for what goes without saying."""
    return {
        "window": f"window {value}",
        "masking": f"{value} masks",
        "phase": "any start" if value == "any" else "starts at 4n",
        "voice": "voice given" if value else "",
        "schedule": {"short": "", "long": "4x budget", "notebook": "notebook's schedule", "tiny": "tiny"}.get(str(value), ""),
    }[field]


def setting_text(setting: dict, leave_out: str | None = None) -> str:
    """A setting in a few words."""
    words = [_factor_text(field, value) for field, value in setting.items() if field != leave_out]
    return ", ".join(word for word in words if word)


def _cell(estimate: Estimate | None, form: str = ".3f") -> str:
    return "–" if estimate is None else estimate.text(form)


def _of(values: Values) -> Estimate | None:
    return Estimate.of([values[seed] for seed in sorted(values)]) if values else None


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


# ---- sections ----

NOTEBOOK = dict(window=16, masking="time", phase="any", voice=False, schedule="short")
OWN_SCHEDULE = NOTEBOOK | {"schedule": "notebook"}
LONGER = dict(window=128, masking="step", phase="any", voice=False, schedule="short")


def section_arms(results: Results, setting: dict) -> str:
    """Every arm of one setting: loss, accuracies, parameters."""
    rows = []
    for arm, text in _ARM_TEXT.items():
        loss = _of(results.values(arm, **setting))
        if loss is not None:
            accuracy, change = (_of(results.values(arm, metric, **setting)) for metric in ("accuracy", "change_accuracy"))
            rows.append(
                [text, _cell(loss), _cell(accuracy, ".1%"), _cell(change, ".1%"), f"{results.parameters(arm, **setting):,}"]
                + [f"{loss.mean - PUBLISHED_LOSS[arm]:+.3f}" if arm in PUBLISHED_LOSS else ""] * (setting["schedule"] == "notebook")
            )
    copies = [r["test"] for c, r in results.cells.items() if all(getattr(c, n) == v for n, v in setting.items())]
    copy = copies[0]
    rows.append(["copying the neighbour", "", f"{copy['copy_accuracy']:.1%}", f"{copy['change_copy_accuracy']:.1%}", ""])
    header = ["", "test loss", "accuracy", "at pitch changes", "parameters"]
    if setting["schedule"] == "notebook":
        header.append("loss against the published")
        rows[-1].append("")
    return markdown_table(header, rows)


# (what is compared, arm, minus arm)
_EFFECTS = (
    ("as published against absolute: the reversal", "relative.published.normal", "absolute"),
    ("as published against no positions at all", "relative.published.normal", "none"),
    ("repair the skew alone", "relative.normal", "relative.published.normal"),
    ("small tables alone", "relative.published", "relative.published.normal"),
    ("repair both", "relative", "relative.published.normal"),
    ("small tables, once the skew is right", "relative", "relative.normal"),
    ("right skew, once the tables are small", "relative", "relative.published"),
    ("keep absolute positions, nothing else", "both.published.normal", "relative.published.normal"),
    ("repaired relative against absolute", "relative", "absolute"),
    ("both against absolute", "both", "absolute"),
    ("both against repaired relative", "both", "relative"),
)


def section_effects(results: Results, setting: dict) -> str:
    """Paired differences of loss between arms of one setting; negative: the first is better."""
    rows = []
    for text, one, other in _EFFECTS:
        metrics = [difference(results.values(one, m, **setting), results.values(other, m, **setting)) for m in ("loss", "change_accuracy")]
        if metrics[0] is not None:
            rows.append([text, _cell(metrics[0], "+.3f"), _cell(metrics[1], "+.1%")])
    return markdown_table(["", "difference of loss", "of accuracy at pitch changes"], rows) if rows else ""


def section_settings(results: Results) -> str:
    """The three main arms in every setting, and what relative positions gain there."""
    rows = []
    for setting in results.settings():
        values = {arm: results.values(arm, **setting) for arm in ("absolute", "relative", "both")}
        if values["absolute"] and values["relative"]:
            gains = [difference(values[arm], values["absolute"]) for arm in ("relative", "both")]
            rows.append([setting_text(setting), *(_cell(_of(v)) for v in values.values()), *(_cell(g, "+.3f") for g in gains)])
    return markdown_table(["test loss", "absolute", "relative", "both", "relative - absolute", "both - absolute"], rows) if rows else ""


def section_changes(results: Results) -> str:
    """Accuracy where copying fails, for every setting."""
    rows = []
    for setting in results.settings():
        values = {arm: results.values(arm, "change_accuracy", **setting) for arm in ("absolute", "relative", "both")}
        if values["absolute"] and values["relative"]:
            copy = _of(results.values("absolute", "change_copy_accuracy", **setting))
            gain = difference(values["relative"], values["absolute"])
            rows.append([setting_text(setting), f"{copy.mean:.1%}", *(_cell(_of(v), ".1%") for v in values.values()), _cell(gain, "+.1%")])
    header = ["accuracy at pitch changes", "copying", "absolute", "relative", "both", "relative - absolute"]
    return markdown_table(header, rows) if rows else ""


# (field of the setting, from, to): a change of one factor
_CHANGES = (
    ("masking", "time", "step"),
    ("masking", "step", "token"),
    ("masking", "step", "span"),
    ("phase", "four", "any"),
    ("voice", False, True),
    ("schedule", "short", "long"),
    *(("window", 16, window) for window in (64, 128, 256, 512)),
)


_PLAIN = {"voice": "not given", "schedule": "short"}


def section_factors(results: Results) -> str:
    """One factor changed, the rest kept: what it does to each arm, and to the distance between them (both paired by seed)."""
    rows = []
    settings = results.settings()
    for field, before, after in _CHANGES:
        for setting in settings:
            changed = setting | {field: after}
            if setting[field] != before or changed not in settings:
                continue
            absolute, relative = (
                {seed: to[seed] - of[seed] for seed in sorted(to.keys() & of.keys())}
                for of, to in ((results.values(arm, **setting), results.values(arm, **changed)) for arm in ("absolute", "relative"))
            )
            gap = difference(relative, absolute)
            if gap is not None:
                words = [_factor_text(field, value) or f"{field} {_PLAIN[field]}" for value in (before, after)]
                kept = setting_text(setting, leave_out=field)
                rows.append(
                    [f"{words[0]} → {words[1]}; {kept}", *(_cell(_of(v), "+.3f") for v in (absolute, relative)), _cell(gap, "+.3f")]
                )
    return markdown_table(["change of loss", "absolute", "relative", "relative - absolute"], rows) if rows else ""


def section_longer(results: Results) -> str:
    """Trained on one window, tested on a longer one."""
    rows = []
    for setting in results.settings():
        for arm, text in _ARM_TEXT.items():
            longer = results.values(arm, part="longer", **setting)
            if longer:
                own = results.values(arm, **setting)
                size = next(iter(results.values(arm, "window", part="longer", **setting).values()))
                marked = text + (" *" if arm.startswith(("absolute", "both")) else "")
                row = [f"{marked}; {setting_text(setting)}", _cell(_of(own)), f"{size}: {_cell(_of(longer))}"]
                rows.append([*row, _cell(difference(longer, own), "+.3f")])
    if not rows:
        return ""
    note = (
        "\\* Absolute positions end with the training window. The longer test gives these models as many positions as it needs; "
        "those beyond the training window are fresh N(0, 0.02), as in a model built with all of them and trained on short windows only."
    )
    return markdown_table(["", "trained window", "longer window", "difference"], rows) + "\n\n" + note


def verdicts(results: Results, one: str, other: str) -> dict[str, list[str]]:
    """{"wins": ..., "loses": ..., "not told apart": ..., "one seed": ...}: settings by the interval of one - other."""
    found: dict[str, list[str]] = {"wins": [], "loses": [], "not told apart": [], "one seed": []}
    for setting in results.settings():
        gap = difference(results.values(one, **setting), results.values(other, **setting))
        if gap is not None:
            kind = "one seed" if gap.n == 1 else {-1: "wins", 1: "loses", 0: "not told apart"}[gap.sign]
            found[kind].append(f"{setting_text(setting)} ({gap.text('+.3f')})")
    return found


def section_verdicts(results: Results) -> str:
    """In words: where relative positions win, where they do not."""
    lines = []
    for one, other in (("relative", "absolute"), ("both", "absolute"), ("both", "relative")):
        lines.append(f"**{one} against {other}**, difference of loss:")
        lines += [f"- {kind}: {'; '.join(settings)}" for kind, settings in verdicts(results, one, other).items() if settings]
        lines.append("")
    return "\n".join(lines).strip()


def section_reversal(results: Results, setting: dict) -> str:
    """Sentences on the reversal in one setting, as far as its cells are there."""
    loss: Callable[[str], Values] = lambda arm: results.values(arm, **setting)  # noqa: E731
    published = difference(loss("relative.published.normal"), loss("absolute"))
    if published is None:
        return "The published comparison has not run yet."
    lines = [f"As published, the relative arm's loss is {published.text('+.3f')} against absolute positions."]

    def add(text: str, one: str, other: str) -> None:
        gap = difference(loss(one), loss(other))
        if gap is not None:
            share = ""
            if published.mean > 0 and other == "relative.published.normal":
                percent = f"{abs(gap.mean) / published.mean:.0%}"
                share = f", which closes {percent} of the gap" if gap.mean < 0 else f", which widens the gap by {percent}"
            lines.append(f"{text}: {gap.text('+.3f')}{share}.")

    add("The same arm against a model with no positions at all", "relative.published.normal", "none")
    add("Repairing only the skew changes it by", "relative.normal", "relative.published.normal")
    add("Small tables alone change it by", "relative.published", "relative.published.normal")
    add("Both repairs change it by", "relative", "relative.published.normal")
    add("What then remains against absolute positions", "relative", "absolute")
    return " ".join(lines)


def render(results: Results) -> str:
    """The report as markdown."""
    seeds = sorted({cell.seed for cell in results.cells})
    one = next(iter(results.cells.values()))
    versions = ", ".join(f"{name} {value}" for name, value in one["environment"].items())
    parts = [
        "# The study's results",
        f"Written by `python -m examples.chorales.study report` from {len(results.cells)} finished cells, "
        f"seeds {', '.join(map(str, seeds))}. Numbers are mean ± half the 95 % t-interval over seeds (n); "
        "a number with (1) has one seed and no interval. Loss is in nats per "
        "masked token of the test set; differences are paired by seed, negative where the first is better. Intervals are not "
        "widened for the number of comparisons. Data fingerprint "
        f"{one['data_fingerprint']}; {versions}.",
    ]

    def add(title: str, *sections: str) -> None:
        if any(sections):
            parts.extend([f"## {title}", *(section for section in sections if section)])

    settings = results.settings()
    if OWN_SCHEDULE in settings:
        add(
            "The notebook's schedule",
            "Published test losses: absolute 0.4014, relative 0.4865, one run each.",
            section_arms(results, OWN_SCHEDULE),
            section_effects(results, OWN_SCHEDULE),
        )
    if NOTEBOOK in settings:
        add(
            "The published comparison, repaired step by step",
            f"{setting_text(NOTEBOOK)}, as in the notebook; a fixed budget of tokens.",
            "![repairs](repairs.png)",
            section_reversal(results, NOTEBOOK),
            section_arms(results, NOTEBOOK),
            section_effects(results, NOTEBOOK),
        )
    if LONGER in settings:
        add(f"A longer window: {setting_text(LONGER)}", section_arms(results, LONGER), section_effects(results, LONGER))
    if table := section_settings(results):
        add("Every setting", "![differences](differences.png)", "![windows](windows.png)", table)
        factors = section_factors(results)
        add(
            "One factor at a time",
            factors
            and "A negative number in the last column: the change favours relative positions. Changes of masks, windows and "
            "phase change the task too, so read that column, not the first two.",
            factors,
        )
        add("Where relative attention wins, and where it does not", section_verdicts(results))
    add("Where copying fails", section_changes(results))
    add("Longer than trained", section_longer(results))
    return "\n\n".join(parts) + "\n"


def readme_part(results: Results) -> str:
    """What a README shows of the report."""
    seeds = len({cell.seed for cell in results.cells})
    parts = [f"{len(results.cells)} cells of up to {seeds} seeds; mean ± half the 95 % interval over seeds (n)."]
    if OWN_SCHEDULE in results.settings():
        parts += ["The notebook's schedule:", section_arms(results, OWN_SCHEDULE)]
    if NOTEBOOK in results.settings():
        parts += ["The same window and masks, two million tokens:", section_arms(results, NOTEBOOK), section_reversal(results, NOTEBOOK)]
    if table := section_settings(results):
        parts += ["Every setting:", table]
    return "\n\n".join(parts) + "\n"


# ---- figures ----


def _figure(width: float, height: float, columns: int = 1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure, path: Path) -> None:
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)


def _logarithmic(axis) -> None:
    """Plain numbers at the ticks of an axis that is logarithmic by now."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 7, 8)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _row(axes, y: float, values: Values, colour: str) -> None:
    """Every seed as a small dot, mean and interval as a large one."""
    estimate = _of(values)
    axes.plot(list(values.values()), [y] * len(values), "o", color=colour, markersize=4, alpha=0.4)
    axes.errorbar(estimate.mean, y, xerr=estimate.half, fmt="D", color=colour, markersize=6, capsize=4)


def plot_repairs(path: Path, results: Results, setting: dict) -> None:
    """Test loss of every arm of the published comparison."""
    arms = [arm for arm in reversed(_ARM_TEXT) if results.values(arm, **setting)]
    figure, (axes,) = _figure(8, 0.5 + 0.42 * len(arms))
    for y, arm in enumerate(arms):
        _row(axes, y, results.values(arm, **setting), _COLOURS[arm.split(".")[0]])
    axes.set_yticks(range(len(arms)), [_ARM_TEXT[arm] for arm in arms])
    axes.set_xlabel("test loss on masked tokens (nats), logarithmic")
    axes.set_xscale("log")  # a model without positions is far from all others
    _logarithmic(axes.xaxis)
    axes.set_title(setting_text(setting), fontsize="medium")
    axes.grid(axis="x", alpha=0.3)
    _save(figure, path)


def plot_differences(path: Path, results: Results) -> None:
    """relative - absolute and both - absolute in every setting."""
    from matplotlib.ticker import NullLocator

    rows = []
    for setting in results.settings():
        absolute = results.values("absolute", **setting)
        gaps = {}
        for arm in ("relative", "both"):
            values = results.values(arm, **setting)
            shared = values.keys() & absolute.keys()
            if shared:
                gaps[arm] = {seed: values[seed] - absolute[seed] for seed in shared}
        if gaps:
            rows.append((setting_text(setting), gaps))
    rows.reverse()
    figure, (axes,) = _figure(9, 0.8 + 0.36 * len(rows))
    for y, (_, gaps) in enumerate(rows):
        for arm, values in gaps.items():
            _row(axes, y + (0.14 if arm == "relative" else -0.14), values, _COLOURS[arm])
    for arm in ("relative", "both"):
        axes.plot([], [], "D", color=_COLOURS[arm], label=f"{arm} - absolute")
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [text for text, _ in rows])
    axes.margins(x=0.1)
    axes.set_xscale("symlog", linthresh=0.2)  # where absolute positions have not begun to learn they are far behind
    axes.set_xticks([-2, -1, -0.5, -0.2, -0.1, 0, 0.1, 0.2], labels=["-2", "-1", "-0.5", "-0.2", "-0.1", "0", "0.1", "0.2"])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("difference of test loss (nats), logarithmic beyond 0.2\nleft: better than absolute")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small")
    _save(figure, path)


def plot_windows(path: Path, results: Results) -> None:
    """Loss, and accuracy at pitch changes, against the window."""
    setting = {name: LONGER[name] for name in ("masking", "phase", "voice", "schedule")}
    figure, panels = _figure(10, 4, 2)
    windows = sorted({cell.window for cell in results.cells if all(getattr(cell, n) == v for n, v in setting.items())})
    for axes, metric, label in zip(panels, ("loss", "change_accuracy"), ("test loss (nats)", "accuracy at pitch changes"), strict=True):
        for arm in ("absolute", "relative", "both"):
            found = [(w, results.values(arm, metric, window=w, **setting)) for w in windows]
            points = [(w, _of(values)) for w, values in found if values]
            if points:
                axes.errorbar(
                    [w for w, _ in points],
                    [e.mean for _, e in points],
                    yerr=[math.nan if e.half is None else e.half for _, e in points],
                    fmt="o-",
                    capsize=4,
                    color=_COLOURS[arm],
                    label=arm,
                )
        axes.set_xscale("log", base=2)
        axes.set_xticks(windows, [str(window) for window in windows])
        if metric == "loss":
            axes.set_yscale("log")
            _logarithmic(axes.yaxis)
        axes.set(xlabel="window (tokens)", ylabel=label)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    _save(figure, path)


def write_report(folder: Path, readme: Path | None = None) -> None:
    """report.md and its figures beside the JSON files in `folder`; in `readme`, the part between `<!-- study -->` and `<!-- /study -->`."""
    results = Results(folder)
    if readme:
        write_part(readme, "study", readme_part(results))
    with atomic_write(folder / "report.md") as file:
        file.write(render(results))
    settings = results.settings()
    written = ["report.md"]
    if NOTEBOOK in settings:
        plot_repairs(folder / "repairs.png", results, NOTEBOOK)
        written.append("repairs.png")
    if section_settings(results):
        plot_differences(folder / "differences.png", results)
        plot_windows(folder / "windows.png", results)
        written += ["differences.png", "windows.png"]
    print(f"{len(results.cells)} cells; written: {', '.join(str(folder / name) for name in written)}")
