"""Shared by the study's tests: cells, runs of the tiny preset, results as a run would leave them."""

import json

from examples.chorales.study.cells import ABSOLUTE, Cell
from tests.chorales.helpers import module_command


def cell(arm=ABSOLUTE, **changes) -> Cell:
    return Cell(**(arm | dict(window=16, masking="step", phase="any", seed=0) | changes))


def command(data, out, *options):
    return module_command("study", "--preset=tiny", "--seeds=1", f"--data={data}", f"--out={out}", *options)


def results_of(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def write_cell(folder, made, loss, change=0.5, longer=None, longer_window=512, fingerprint="f", validation=()):
    score = dict(loss=loss, accuracy=0.8, copy_accuracy=0.78, change_loss=1.0, change_accuracy=change, change_copy_accuracy=0.1)
    score |= dict(masked_tokens=100, change_tokens=20)
    result = {
        "configuration": made.configuration(),
        "data_fingerprint": fingerprint,
        "environment": {"python": "3"},
        "parameters": 437_045,
        "steps": max((step for step, _ in validation), default=0),
        "validation": validation,
        "test": score,
    }
    if longer:
        result["longer"] = {"window": longer_window, **score, "loss": longer}
    (folder / f"{made.name}.json").write_text(json.dumps(result))
