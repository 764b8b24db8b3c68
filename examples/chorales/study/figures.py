"""The study's figures, from the cells' JSON files."""

import math
from pathlib import Path

from ..reporting import COLOURS, save_figure
from .estimates import Estimate, Values
from .results import Results
from .wording import ARM_TEXT, LONGER, Setting, setting_text

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


def plot_repairs(path: Path, results: Results, setting: Setting) -> None:
    """Test loss of every arm of the published comparison."""
    arms = [arm for arm in reversed(ARM_TEXT) if results.values(arm, **setting)]
    figure, (axes,) = _figure(8, 0.5 + 0.42 * len(arms))
    for y, arm in enumerate(arms):
        _row(axes, y, results.values(arm, **setting), COLOURS[arm.split(".")[0]])
    axes.set_yticks(range(len(arms)), [ARM_TEXT[arm] for arm in arms])
    axes.set_xlabel("test loss on masked tokens (nats), logarithmic")
    axes.set_xscale("log")  # a model without positions is far from all others
    _logarithmic(axes.xaxis)
    axes.set_title(setting_text(setting), fontsize="medium")
    axes.grid(axis="x", alpha=0.3)
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


def plot_windows(path: Path, results: Results) -> None:
    """Loss, and accuracy at pitch changes, against the window."""
    setting = {name: LONGER[name] for name in ("masking", "phase", "voice", "schedule")}
    figure, panels = _figure(10, 4, 2)
    windows = sorted({cell.window for cell in results.having(**setting)})
    shown = (("loss", "test loss (nats)"), ("change_accuracy", "accuracy at pitch changes"))
    for axes, (metric, label) in zip(panels, shown, strict=True):
        for arm in ("absolute", "relative", "both"):
            found = [(w, results.values(arm, metric, window=w, **setting)) for w in windows]
            points = [(w, Estimate.over(values)) for w, values in found if values]
            if points:
                axes.errorbar(
                    [w for w, _ in points],
                    [e.mean for _, e in points],
                    yerr=[math.nan if e.half is None else e.half for _, e in points],
                    fmt="o-",
                    capsize=4,
                    color=COLOURS[arm],
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
    save_figure(figure, path, _DPI)
