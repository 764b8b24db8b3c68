"""What the commands' reports share: versions, aligned tables, curves, and how pictures are written."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path

from .command import available_cores
from .storage import atomic_write

COLOURS = {"absolute": "#1f77b4", "relative": "#d62728", "both": "#2ca02c", "none": "#7f7f7f"}


def environment(processes: int) -> dict:
    """Versions and resources that the figures depend on."""
    import numpy
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right, a rule below the first row."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for name, *figures in rows:
        cells = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]).rstrip())
    lines.insert(1, "-" * len(lines[0]))
    return lines


def draw_curves(axes, results: dict[str, dict]) -> None:
    """Training (thin) and validation (thick) loss of every arm over optimizer steps."""
    for arm, result in results.items():
        colour = COLOURS[arm]
        axes.plot(*_points(_smooth(result["training"])), color=colour, linewidth=0.9, alpha=0.55, label=f"{arm}, train")
        axes.plot(*_points(result["validation"]), color=colour, linewidth=2.2, marker="o", label=f"{arm}, valid")


def _points(curve: list[dict]) -> tuple[list, list]:
    return [point["step"] for point in curve], [point["loss"] for point in curve]


def _smooth(curve: list[dict], span: int = 3) -> list[dict]:
    """Mean of each point and up to `span` - 1 before it: logged training losses are means over few batches."""
    smoothed = []
    for index, point in enumerate(curve):
        nearby = [other["loss"] for other in curve[max(0, index - span + 1) : index + 1]]
        smoothed.append({"step": point["step"], "loss": sum(nearby) / len(nearby)})
    return smoothed


def save_figure(figure, path: Path, dpi: int) -> None:
    """Write a matplotlib figure as PNG, atomically."""
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=dpi)
