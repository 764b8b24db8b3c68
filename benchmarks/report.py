"""Tables of measurements: rows with their figures, the goals these are held to, and how both are printed.

A table is {"title", "figure" (what the figures are), "rows"}; a row {"name", "value", "unit", and where they apply "quartiles", "rounds",
"figure", "goal", "met"}. It goes into the JSON as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Table = dict[str, Any]
_UNITS = {"ms": 1.0, "us": 1e3}


def judged(figure: float, goal: float | None = None, *, at_most: bool = False) -> dict[str, Any]:
    """A figure, rounded to what is printed, its goal and whether it is met."""
    result: dict[str, Any] = {"figure": round(figure, 3)}
    if goal is not None:
        result["goal"] = f"{'<=' if at_most else '>='} {goal:.4g}"
        result["met"] = figure <= goal if at_most else figure >= goal
    return result


def speeds(title: str, own: str, timings: Mapping[str, dict], goals: Mapping[str, float] | None = None, unit: str = "ms") -> Table:
    """How fast `own` is as a multiple of each other side's speed; goals: at least so much."""
    goals = goals or {}
    rows = [_row(name, timing, unit) for name, timing in timings.items()]
    for row in rows:
        if row["name"] != own:
            figure = timings[row["name"]]["median_ms"] / timings[own]["median_ms"]
            row.update(judged(figure, goals.get(row["name"])))
    return {"title": title, "figure": f"{own} is so many times as fast", "rows": rows}


def costs(title: str, base: str, timings: Mapping[str, dict], goals: Mapping[str, float] | None = None, unit: str = "ms") -> Table:
    """The time of each side as a multiple of that of `base`; goals: at most so much."""
    goals = goals or {}
    rows = [_row(name, timing, unit) for name, timing in timings.items()]
    for row in rows:
        if row["name"] != base:
            figure = timings[row["name"]]["median_ms"] / timings[base]["median_ms"]
            row.update(judged(figure, goals.get(row["name"]), at_most=True))
    return {"title": title, "figure": f"times as long as {base}", "rows": rows}


def _row(name: str, timing: dict, unit: str) -> dict[str, Any]:
    value, quartiles = (timing["median_ms"], timing["quartiles_ms"])
    factor = _UNITS[unit]
    return {
        "name": name,
        "value": round(value * factor, 4),
        "unit": unit,
        "quartiles": [round(q * factor, 4) for q in quartiles],
        "rounds": timing["rounds"],
    }


def text(table: Table) -> str:
    lines = [f"{table['title']:<74}{table['figure']}"]
    for row in table["rows"]:
        line = f"  {row['name']:<34}"
        line += f"{_number(row['value']):>9} {row['unit']:<4}" if "value" in row else " " * 14
        if "quartiles" in row:
            spread = f"{_number(row['quartiles'][0])} - {_number(row['quartiles'][1])}"
            line += f"{spread:>17} {'(' + str(row['rounds']) + ')':>6}"
        line = f"{line:<74}"
        if "figure" in row:
            line += f"{row['figure']:>7.2f}"
        if "goal" in row:
            line += f"   {row['goal']:<8} {'met' if row['met'] else 'MISSED'}"
        lines.append(line.rstrip())
    lines.extend(f"  {note}" for note in table.get("notes", ()))
    return "\n".join(lines)


def _number(value: float) -> str:
    """Three digits that count, or all before the point."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"


def goals(tables: list[Table]) -> tuple[list[str], int]:
    """The goals missed, in words, and how many there were."""
    rows = [(table["title"], row) for table in tables for row in table["rows"] if "goal" in row]
    missed = [f"{title}: {row['name']} {row['figure']:.2f}, goal {row['goal']}" for title, row in rows if not row["met"]]
    return missed, len(rows)
