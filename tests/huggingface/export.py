"""Converted models out of Python: `python -m tests.huggingface.export [NAME...]`, for all of tests.huggingface.models half an hour.

Each small model is exported with any batch and length, decomposed, compared with itself at other sizes, and taken to ONNX, where
onnxruntime is compared with PyTorch. It prints how far each came; docs/models.md has the outcome.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

import relattn
from relattn.huggingface import convert
from tests.huggingface.models import CASES, HIDDEN, LENGTH, built, given
from tests.test_export import onnx_file, onnx_runs

_SIZES = (1, 8, 10, 16, HIDDEN)  # of features, not lengths


class Wrapped(nn.Module):
    """With tensors alone for arguments, and the first of its results."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
        self.others = {name: value for name, value in inputs.items() if name not in self.names}

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True)), **self.others)[0]


def arguments(name: str, length: int, batch: int = 2) -> tuple[Tensor, ...]:
    tensors = [value for value in given(name, torch.float32, length).values() if isinstance(value, Tensor)]
    if name == "xlnet":  # torch.onnx fails at "1.0 - mask" of integers, of the original too
        tensors[1] = tensors[1].float()
    return tuple(torch.cat((tensor, tensor[: batch - 2])) for tensor in tensors)


def stages(name: str) -> Iterator[str]:
    """How far it came, until something raises."""
    model = Wrapped(convert(built(name, torch.float32).requires_grad_(False)), given(name, torch.float32))
    first, others = arguments(name, LENGTH), [arguments(name, length, 3) for length in (17, 29)]
    sizes = tuple(
        {axis: Dim.DYNAMIC for axis, size in enumerate(tensor.shape) if axis == 0 or size not in _SIZES} for tensor in first
    )  # fmt: skip
    program = torch.export.export(model, first, dynamic_shapes=(sizes,))
    yield "exported"
    program = program.run_decompositions(relattn.export.decompositions())
    assert "relattn" not in str(program.graph_module)
    yield "decomposed"
    for tensors in others:
        torch.testing.assert_close(program.module()(*tensors), model(*tensors), atol=1e-4, rtol=1e-3)
    yield "any size"
    with tempfile.TemporaryDirectory() as folder:
        run = onnx_runs(onnx_file(program, Path(folder) / "model.onnx"))
        for tensors in (first, *others):
            torch.testing.assert_close(run(*tensors)[0], model(*tensors), atol=1e-4, rtol=1e-3)
    yield "equal in onnxruntime"


def main() -> None:
    for name in sys.argv[1:] or CASES:
        came: list[str] = []
        try:
            for stage in stages(name):
                came.append(stage)
        except Exception as error:  # whatever it was is the answer
            came.append(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
        print(f"{name}: {', '.join(came)}", flush=True)


if __name__ == "__main__":
    main()
