"""What a comparison leaves behind: results.json, loss.png and a table."""

import os
import platform
from pathlib import Path

from .storage import atomic_write, write_json

_COLOURS = {"absolute": "#1f77b4", "relative": "#d62728", "both": "#2ca02c"}


def environment(processes: int, device: str) -> dict:
    """Versions and resources that the figures depend on."""
    import numpy
    import torch
    import transformers

    from .corpus import available_cores

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def write_results(folder: Path, results: dict) -> None:
    """results.json and loss.png in `folder`, each complete or absent."""
    write_json(folder / "results.json", results)
    plot_losses(folder / "loss.png", results)


def plot_losses(path: Path, results: dict) -> None:
    """Training (thin) and validation (thick) loss of every arm over optimizer steps, and the copy baseline's."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    baseline = results["baseline"]["valid"]["loss"]
    for arm, result in results["arms"].items():
        colour = _COLOURS[arm]
        curve = result["training"]
        axes.plot(*_points(_smooth(curve)), color=colour, linewidth=0.9, alpha=0.55, label=f"{arm}, train")
        axes.plot(*_points(result["validation"]), color=colour, linewidth=2.2, marker="o", label=f"{arm}, valid")
    axes.axhline(baseline, color="black", linestyle="--", linewidth=1.2, label="copy baseline, valid")
    axes.set(xlabel="optimizer step", ylabel="loss on masked tokens (nats)", xlim=(0, None))
    # A logarithmic scale keeps apart the arms' last losses, which are what is compared, under the steep start.
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    config = results["config"]
    axes.set_title("Bach chorales: window {window}, stride {stride}, masking by {masking}".format(**config))
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize="small")
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=130)


def _points(curve: list[dict]) -> tuple[list, list]:
    return [point["step"] for point in curve], [point["loss"] for point in curve]


def _smooth(curve: list[dict], span: int = 3) -> list[dict]:
    """Mean of each point and up to `span` - 1 before it: logged training losses are means over few batches."""
    smoothed = []
    for index, point in enumerate(curve):
        nearby = [other["loss"] for other in curve[max(0, index - span + 1) : index + 1]]
        smoothed.append({"step": point["step"], "loss": sum(nearby) / len(nearby)})
    return smoothed


def table(results: dict) -> str:
    """Arms and baseline on the test set, then one sentence on which arms beat copying."""
    rows = [("", "test loss", "accuracy", "valid loss", "parameters", "tokens/s")]
    for arm, result in results["arms"].items():
        best = min(point["loss"] for point in result["validation"])
        speed = result["tokens_per_second"]
        rows.append(
            (
                arm,
                f"{result['test']['loss']:.4f}",
                f"{result['test']['accuracy']:.2%}",
                f"{best:.4f}",
                f"{result['parameters']:,}",
                "-" if speed is None else f"{speed:,.0f}",
            )
        )
    copy = results["baseline"]
    test, valid = copy["test"], copy["valid"]
    rows.append(("copy neighbour", f"{test['loss']:.4f}", f"{test['accuracy']:.2%}", f"{valid['loss']:.4f}", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for name, *figures in rows:
        cells = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]).rstrip())
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([*lines, "", verdict(results)])


def verdict(results: dict) -> str:
    """Which arms predict more masked test tokens than copying does."""
    copy = results["baseline"]["test"]["accuracy"]
    phrases = []
    for arm, result in results["arms"].items():
        gain = 100 * (result["test"]["accuracy"] - copy)
        phrases.append(
            f"{arm} beats the copy baseline by {gain:.1f} points"
            if gain > 0
            else f"{arm} does NOT beat the copy baseline ({gain:.1f} points)"
        )
    count = results["baseline"]["test"]["masked_tokens"]
    return f"Accuracy on the same {count:,} masked test tokens: {'; '.join(phrases)}."
