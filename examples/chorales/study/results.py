"""What cells leave behind: one JSON file each, refused where it is of other settings or other data."""

import dataclasses
from pathlib import Path

from ..storage import read_json
from .cells import Cell
from .estimates import Values
from .wording import Setting

COMMITTED = Path(__file__).parents[1] / "results"


def read_result(path: Path, cell: Cell, fingerprint: str | None = None) -> dict:
    """The content of a cell's file; raises ValueError where it is not there, and as `check_result`."""
    if not path.is_file():
        raise ValueError(
            f"--out: {path} is missing, so nobody knows what the checkpoints beside it are of; remove that folder"
        )
    result = read_json(path)
    check_result(result, path, cell, fingerprint)
    return result


def check_result(result, path: Path, cell: Cell, fingerprint: str | None = None) -> None:
    """Raise ValueError where `result`, read from `path`, is of a run with another configuration, or on other data."""
    expected = cell.configuration()
    found = result.get("configuration", {}) if isinstance(result, dict) else {}
    changed = [
        f"{name} {found.get(name)!r} -> {expected[name]!r}"
        for name in expected
        if found.get(name) != _as_json(expected[name])
    ]
    if fingerprint is not None and not changed and result.get("data_fingerprint") != fingerprint:
        changed = [f"data {result.get('data_fingerprint')} -> {fingerprint}"]
    if changed:
        raise ValueError(
            f"{path} was made with other settings ({'; '.join(changed)}); remove it or choose another folder"
        )


def _as_json(value):
    """What reading a written value gives back: tuples become lists."""
    if isinstance(value, dict):
        return {name: _as_json(item) for name, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, (list, tuple)) else value


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
            sets = f"{len(data)} different data sets ({', '.join(sorted(data))})"
            raise ValueError(f"--results {folder}: cells of {sets} do not compare")

    def having(self, **setting) -> dict[Cell, dict]:
        """The cells with this setting (fields of Cell)."""

        def fits(cell: Cell) -> bool:
            return all(getattr(cell, name) == value for name, value in setting.items())

        return {cell: result for cell, result in self.cells.items() if fits(cell)}

    def values(self, arm: str, metric: str = "loss", part: str = "test", **setting) -> Values:
        """seed -> metric of the cells with this arm and setting; `part` is "test" or "longer"."""
        found = self.having(arm=arm, **setting)
        return {cell.seed: result[part][metric] for cell, result in found.items() if part in result}

    def settings(self) -> list[Setting]:
        """The distinct settings (everything but arm and seed), shortest budget first.

        Not those at a rate of an arm's own, where two arms of one setting may be of two schedules (rates.py).
        """
        order = {"tiny": 0, "short": 1, "long": 2, "notebook": 3}
        common = [cell for cell in self.cells if cell.schedule in order]
        keys = {(order[c.schedule], c.window, c.masking, c.phase, c.voice, c.schedule) for c in common}
        names = ("window", "masking", "phase", "voice", "schedule")
        return [dict(zip(names, key[1:], strict=True)) for key in sorted(keys)]

    def parameters(self, arm: str, **setting) -> int:
        return next(iter(self.having(arm=arm, **setting).values()))["parameters"]
