"""Draws skew.svg, the picture of how.md: `python docs/skew.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

BLOCK = 4
LOW, HIGH, UNUSED = "#56B4E9", "#E69F00", "#E8E8E8"


def cells(axis, left: float, top: float, rows: list[list[tuple[str, str]]]) -> None:
    """A grid of cells, each a text and a colour."""
    for m, row in enumerate(rows):
        for n, (text, colour) in enumerate(row):
            axis.add_patch(pyplot.Rectangle((left + n, top + m), 1, 1, facecolor=colour, edgecolor="white", linewidth=2))
            axis.text(left + n + 0.5, top + m + 0.55, text, ha="center", va="center", fontsize=11)


def main() -> None:
    figure, axis = pyplot.subplots(figsize=(10, 4.1), facecolor="white")
    distances = range(1 - BLOCK, BLOCK + 1)

    def colour(distance: int) -> str:
        return LOW if distance <= 0 else HIGH

    def shown(m: int, distance: int) -> tuple[str, str]:
        return (str(distance), colour(distance)) if 0 <= m + distance < BLOCK else ("", UNUSED)

    cells(axis, 0, 0, [[shown(m, distance) for distance in distances] for m in range(BLOCK)])
    cells(axis, 13, 0, [[(str(n - m), colour(n - m)) for n in range(BLOCK)] for m in range(BLOCK)])
    for m in range(BLOCK):
        axis.text(-0.3, m + 0.55, f"query {m}", ha="right", va="center", fontsize=10)
        axis.text(12.7, m + 0.55, f"query {m}", ha="right", va="center", fontsize=10)
        axis.text(13.5 + m, -0.25, f"key {m}", ha="center", va="bottom", fontsize=8)
    for place, text in ((BLOCK / 2, "low block of the table"), (1.5 * BLOCK, "high block")):
        axis.text(place, -0.25, text, ha="center", va="bottom", fontsize=10)
    arrow = {"arrowstyle": "-|>", "linewidth": 1.6, "color": "black"}
    axis.annotate("", (11, 1.4), (8.4, 1.4), arrowprops=arrow)
    axis.text(9.7, 1.15, "skew: every row\none place further", ha="center", va="bottom", fontsize=10)
    axis.annotate("", (8.4, 2.6), (11, 2.6), arrowprops=arrow)
    axis.text(9.7, 2.85, "un-skew:\ngradients, back", ha="center", va="top", fontsize=10)
    axis.text(BLOCK, BLOCK + 0.35, "queries x window of the table:\na column for each distance", ha="center", va="top", fontsize=11)
    axis.text(13 + BLOCK / 2, BLOCK + 0.35, "scores of a tile:\na column for each key", ha="center", va="top", fontsize=11)
    axis.set(xlim=(-2, 17.3), ylim=(BLOCK + 1.3, -1), aspect="equal")
    axis.axis("off")
    matplotlib.rcParams["svg.hashsalt"] = "skew"  # the same names, and so the same file, every time
    figure.savefig(Path(__file__).with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
