"""Which backend takes which feature in which dtype, by calling each: `python -m relattn --matrix`, as Markdown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch

from relattn.backends import available_backends, triton
from relattn.selfcheck import calls

Cell = str | None  # why it is refused; None: called, and as the float64 reference
WRONG = "**wrong**"
_DEVICES = {"cpu": "CPU", "cuda": "GPU"}
_SHORT = {"float64": "f64", "float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class Column(NamedTuple):
    """A backend, where it ran, and the cells of its rows: feature -> dtype -> cell."""

    backend: str
    where: str
    cells: dict[str, dict[str, Cell]]


def cell(feature: calls.Feature, backend: str, dtype: str, device: str) -> Cell:
    """Call it."""
    call = calls.make(torch.Generator().manual_seed(0), feature.sizes, feature.add)
    try:
        return calls.refused(call, backend, calls.DTYPES[dtype], device, feature)
    except Exception as error:  # a line of the table, and the command's status
        return f"{WRONG}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def column(backend: str, device: str, where: str | None = None, slow: bool = True) -> Column:
    features = [feature for group in calls.FEATURES.values() for feature in group if slow or not feature.slow]
    cells = {feature.name: {dtype: cell(feature, backend, dtype, device) for dtype in feature.dtypes} for feature in features}
    return Column(backend, where or _DEVICES[device], cells)


def columns() -> Iterator[Column]:
    """Of the backends that run here, and of the Triton kernels in Triton's interpreter where no GPU runs them."""
    reasons = available_backends()
    accelerator = "cuda" if torch.cuda.is_available() else None
    if reasons["triton"] is None and not triton.INTERPRETED:
        yield column("triton", "cuda")
    else:
        yield interpreted()
    if reasons["cpu"] is None:
        yield column("cpu", "cpu")
    for device in ("cpu", *([accelerator] if accelerator else [])):
        yield from (column(name, device) for name in ("blocked", "reference"))


def interpreted() -> Column:
    """The Triton kernels on CPU tensors, in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    command = [sys.executable, "-m", "relattn.selfcheck.matrix"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, text=True, check=True)
    return Column(*json.loads(done.stdout))


def markdown(found: list[Column]) -> str:
    """The table, and the reasons of its refusals."""
    reasons: dict[str, int] = {}
    heads = [_head(one, reasons) for one in found]
    lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(found)]
    for group, features in calls.FEATURES.items():
        lines.append(f"| **{group}** |" + " |" * len(found))
        lines += (f"| {feature.name} | " + " | ".join(_text(one, feature.name, reasons) for one in found) + " |" for feature in features)
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", "A number stands for why a backend refuses the dtypes that are missing:", "", *notes])


def _never(one: Column) -> dict[str, str]:
    """The dtypes that a backend does not take at all, and why."""
    asked = {dtype: {cells[dtype] for cells in one.cells.values() if dtype in cells} for dtype in calls.DTYPES}
    return {dtype: reason for dtype, reasons in asked.items() if len(reasons) == 1 and (reason := next(iter(reasons))) is not None}


def _head(one: Column, reasons: dict[str, int]) -> str:
    numbers = {_number(reason, reasons) for reason in _never(one).values()}
    return " ".join([f"`{one.backend}`, {one.where}", *numbers])


def _text(one: Column, feature: str, reasons: dict[str, int]) -> str:
    """The dtypes that were called and are right, and the numbers of the reasons for the others."""
    if feature not in one.cells:
        return "not called"
    cells = {dtype: reason for dtype, reason in one.cells[feature].items() if dtype not in _never(one)}
    taken = [_SHORT[dtype] for dtype, reason in cells.items() if reason is None]
    return " ".join([*taken, *dict.fromkeys(_number(reason, reasons) for reason in cells.values() if reason is not None)])


def _number(reason: str, reasons: dict[str, int]) -> str:
    return f"[{reasons.setdefault(reason, len(reasons) + 1)}]"


_ABOUT = """# What each backend does

Made by `python -m relattn --matrix`, which *calls* every backend with every feature in every dtype at a small size and compares with
the reference in float64: results and, where the heading says so, the gradients of every tensor. f64, f32, bf16 and f16 (float64, float32,
bfloat16, float16) were called, and are right within the error that plain PyTorch has in this dtype. A call that names no backend takes the
fastest that does not refuse it.
"""


def main() -> int:
    """Print the page; the exit status is 1 where a result is wrong."""
    warnings.simplefilter("ignore")  # torch's own, of what it will drop
    found = list(columns())
    where = f"torch {torch.__version__}, instruction set {_variant()}, {_gpu()}"
    print(f"{_ABOUT}\nCalled with {where}.\n\n{markdown(found)}")
    return int(any(WRONG in (reason or "") for one in found for cells in one.cells.values() for reason in cells.values()))


def _variant() -> str:
    from relattn.backends.cpu import variant

    return variant() or "none (no native library)"


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


if __name__ == "__main__":  # of `interpreted`
    print(json.dumps(column("triton", "cpu", "in Triton's interpreter")))
