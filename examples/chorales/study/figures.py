"""The study's figures, from the cells' JSON files."""

import math
from pathlib import Path

from ..reporting import COLOURS, save_figure
from .cells import CHOICES, CURVE_WINDOW
from .estimates import Estimate, Values
from .rates import CURVE_KINDS, at_own_rate, curves, power_law
from .results import Results
from .wording import LONGER, NOTEBOOK, OWN_SCHEDULE, PUBLISHED_LOSS, Setting, setting_text

_DPI = 120


def _figure(width: float, height: float, columns: int = 1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _logarithmic(axis) -> None:
    """Plain numbers at the ticks of an axis that is logarithmic by now."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 7, 8)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _row(axes, y: float, values: Values, colour: str) -> None:
    """Every seed as a small dot, mean and interval as a large one."""
    estimate = Estimate.over(values)
    axes.plot(list(values.values()), [y] * len(values), "o", color=colour, markersize=4, alpha=0.4)
    axes.errorbar(estimate.mean, y, xerr=estimate.half, fmt="D", color=colour, markersize=6, capsize=4)


def plot_story(path: Path, results: Results) -> None:
    """The study in three panels: the published pair, its repairs one by one, and every window."""
    figure, (pair, repairs, windows) = _figure(13, 4.4, 3)
    _plot_arms(pair, results, OWN_SCHEDULE, PUBLISHED_LOSS)
    pair.plot([], [], "x", color="black", label="published, one run")
    pair.legend(fontsize="small", loc="upper right")
    _plot_arms(repairs, results, NOTEBOOK, {})
    _plot_windows(windows, results)
    titles = ("1. the notebook's schedule, window 16", "2. the repairs one by one, 2 M tokens", "3. windows of 16 to 512 tokens")
    for axes, title in zip((pair, repairs, windows), titles, strict=True):
        axes.set_title(title, fontsize="medium")
    save_figure(figure, path, _DPI)


# Arms in a story's order, and words short enough for its panels.
_SHORT_TEXT = {
    "absolute": "absolute",
    "relative.published.normal": "relative\nas published",
    "relative.published": "… small\ntables alone",
    "relative.normal": "… right\nskew alone",
    "relative": "… both repairs",
    "both.published.normal": "as published,\nabsolute kept",
    "both": "both,\nrepaired",
}


def _plot_arms(axes, results: Results, setting: Setting, published: dict[str, float]) -> None:
    """Test loss of every arm in one setting, and what was published; a model without positions, far away, is told in words."""
    arms = [arm for arm in reversed(_SHORT_TEXT) if results.values(arm, **setting)]
    for y, arm in enumerate(arms):
        _row(axes, y, results.values(arm, **setting), COLOURS[arm.split(".")[0]])
        if arm in published:
            axes.plot(published[arm], y, "x", color="black", markersize=8, markeredgewidth=2)
    axes.set_yticks(range(len(arms)), [_SHORT_TEXT[arm] for arm in arms])
    axes.set_ylim(-0.6, len(arms) - 0.2)
    without = results.values("none", **setting)
    note = f"\nno positions at all: {Estimate.over(without).mean:.2f}" if without else ""
    axes.set_xlabel(f"test loss on masked tokens (nats){note}")
    axes.grid(axis="x", alpha=0.3)


def _plot_windows(axes, results: Results) -> None:
    """Test loss against the window at one rate for all; beside it each arm at its own rate, and after more tokens."""
    setting = {name: LONGER[name] for name in ("masking", "phase", "voice")}
    windows = sorted({cell.window for cell in results.having(schedule="short", **setting)})
    if not windows:
        axes.set_axis_off()  # nothing has a place on logarithmic axes without data
        return
    # kind -> label, form, size, whether it is filled
    looks = {
        "short": ("2 M tokens, 2e-3", "o-", 6, True),
        "own": ("2 M tokens, own rate", "s", 6, False),
        "more": ("8 or 16 M tokens", "*", 11, True),
    }
    for arm, shift in (("absolute", 0.94), ("relative", 1.0), ("both", 1.06)):
        of_arm = [choice for choice in CHOICES if choice.positions == arm]
        tuned = {choice: at_own_rate(results, choice) for choice in of_arm}
        losses = {choice: {seed: result["test"]["loss"] for seed, result in found.items()} for choice, found in tuned.items()}
        own = [(choice.window, values) for choice, values in losses.items() if choice.schedule == "short"]
        more = [(choice.window, values) for choice, values in losses.items() if choice.schedule == "curve"]
        more.append((LONGER["window"], results.values(arm, **LONGER | {"schedule": "long"})))
        short = [(w, results.values(arm, window=w, schedule="short", **setting)) for w in windows]
        for kind, found in (("short", short), ("own", own), ("more", more)):
            points = [(w * shift, Estimate.over(values)) for w, values in found if values]
            if points:
                means = [estimate.mean for _, estimate in points]
                halves = [math.nan if estimate.half is None else estimate.half for _, estimate in points]
                _, form, size, full = looks[kind]
                face = COLOURS[arm] if full else "white"
                places = [place for place, _ in points]
                style = dict(fmt=form, markersize=size, markerfacecolor=face, color=COLOURS[arm], capsize=3)
                axes.errorbar(places, means, yerr=halves, **style)
        axes.plot([], [], color=COLOURS[arm], label=arm)
    for label, form, _, full in looks.values():
        axes.plot([], [], form[0], color="grey", markerfacecolor="grey" if full else "white", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(windows, [str(window) for window in windows])
    axes.set_yscale("log")
    _logarithmic(axes.yaxis)
    axes.set(xlabel="window (tokens)\nmasks of steps, windows start anywhere", ylabel="test loss (nats), logarithmic")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left")


def plot_curves(path: Path, results: Results) -> None:
    """Validation loss against the tokens seen at the window where absolute positions begin late; one line per run."""
    figure, (axes,) = _figure(8, 4.6)
    styles = dict(zip(CURVE_KINDS, (":", "--", "-.", "-"), strict=True))
    for (arm, kind), runs in curves(results).items():
        for number, points in enumerate(runs):
            label = None if number else f"{arm}, {kind}"
            axes.plot(*zip(*points, strict=True), styles[kind], color=COLOURS[arm], label=label)
            if arm == "absolute" and kind == CURVE_KINDS[-1]:
                start, slope = power_law(points)
                ends = [points[-1][0], 4 * points[-1][0]]
                label = None if number else "extrapolated: power law of the second half"
                axes.plot(ends, [math.exp(start) * end**slope for end in ends], ":", color="grey", label=label)
    axes.set_xscale("log")
    limits = axes.get_xlim()
    axes.set_xticks([2.5e5 * 2**power for power in range(9)])
    axes.set_xlim(limits)
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e6:g} M")
    axes.minorticks_off()
    axes.set_yscale("log")
    _logarithmic(axes.yaxis)
    axes.set(xlabel="training tokens seen", ylabel="validation loss (nats)")
    axes.set_title(setting_text(LONGER | {"window": CURVE_WINDOW}) + "; each run's rate decays to 0", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save_figure(figure, path, _DPI)


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
            _row(axes, y + (0.14 if arm == "relative" else -0.14), values, COLOURS[arm])
    for arm in ("relative", "both"):
        axes.plot([], [], "D", color=COLOURS[arm], label=f"{arm} - absolute")
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [text for text, _ in rows])
    axes.margins(x=0.1)
    axes.set_xscale("symlog", linthresh=0.2)  # where absolute positions have not begun to learn they are far behind
    ticks = (-2, -1, -0.5, -0.2, -0.1, 0, 0.1, 0.2)
    axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("difference of test loss (nats), logarithmic beyond 0.2\nleft: better than absolute")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small")
    save_figure(figure, path, _DPI)
