"""What a call did on its tensors, step by step, to be done again by the next call of the same signature on others.

Triton looks at every argument of a launch to find the compiled kernel, and the backend computes sizes, grids and workspaces around it:
hundreds of microseconds, which short sequences would wait for. All of it follows from the call's signature (shapes, strides, dtypes,
alignment, settings), so the first call of a signature leaves a tape, which names its tensors instead of holding them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 256  # bytes; torch's allocators align as much, and Triton's kernels are compiled for 16


class Slot(str):
    """In a launch's arguments: a tensor, or a tuple made of some, by its name."""


class Tape:
    """The first call records, with `new`, `group`, `launch` and `torch`, which do at once what they write down, on the tensors given here;
    `close` lets go of these. Later calls `run`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.device = next(iter(tensors.values())).device
        # Of a tensor, the launcher asks the driver each time whether it may be read.
        self.by_address = self.device.type == "cuda"
        self.live: dict[str, Any] = dict(tensors)
        self._steps: list[Callable[[_Run], None]] = []
        self._workspace: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._steps)

    def new(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Slot:
        """An uninitialised tensor of the whole call; the same one, asked for again with the same name and shape."""
        slot = Slot(f"{name} {shape}")
        if slot not in self._workspace:
            self._workspace[slot] = self._bytes, shape, dtype
            self._bytes += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
            self.live[slot] = torch.empty(shape, dtype=dtype, device=self.device)
        return slot

    def group(self, name: str, template: Any) -> Slot:
        """A tuple with Slots in it, put together once for all launches that take it."""
        fill = _filler(template)
        self.live[name] = fill(self.live)

        def step(run: _Run) -> None:
            run.values[name] = fill(run.values)

        self._steps.append(step)
        return Slot(name)

    def launch(
        self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any],
        check: Callable[[Any], None] | None = None,
    ) -> None:  # fmt: skip
        """A Triton kernel with its arguments in their order, Slots in place of tensors. check: raises if what was compiled must not run."""
        fill = _filler(arguments)
        with self._on_device():
            if check is not None:
                check(kernel.warmup(*fill(self.live), grid=grid, **options))
            compiled = kernel[grid](*fill(self.live), **options)
        if hasattr(compiled, "packed_metadata"):  # by Triton's compiler, and not the interpreter
            whole = (*grid, 1, 1)[:3]

            def step(run: _Run) -> None:
                compiled[whole](*fill(run.values))
        else:

            def step(run: _Run) -> None:
                kernel[grid](*fill(run.values), **options)

        self._steps.append(step)

    def torch(self, function: Callable[..., Any], *slots: Slot) -> None:
        """A function that writes into its arguments. It must hold no tensor itself."""
        function(*(self.live[slot] for slot in slots))
        self._steps.append(lambda run: function(*(run.tensor(slot) for slot in slots)))

    def mark(self) -> tuple[Any, ...]:
        return len(self._steps), self._bytes, dict(self._workspace)

    def cut(self, mark: tuple[Any, ...]) -> list[Callable[[_Run], None]]:
        """Forget the steps since `mark`, which are returned."""
        length, self._bytes, self._workspace = mark[0], mark[1], dict(mark[2])
        steps = self._steps[length:]
        del self._steps[length:]
        return steps

    def again(self, steps: list[Callable[[_Run], None]]) -> None:
        """While recording: take steps that were cut once more."""
        self._take(steps, _Run(dict(self.live), self.live.__getitem__))

    def close(self) -> None:
        self.live = {}

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        workspace = torch.empty(self._bytes, dtype=torch.uint8, device=self.device) if self._bytes else None

        def tensor(name: str) -> Tensor:
            if name in tensors:
                return tensors[name]
            assert workspace is not None
            start, shape, dtype = self._workspace[name]
            return workspace[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

        if self.by_address:
            values: dict[str, Any] = {name: given.data_ptr() for name, given in tensors.items()}
            if workspace is not None:
                base = workspace.data_ptr()
                values |= {name: base + room[0] for name, room in self._workspace.items()}
        else:
            values = dict(tensors) | {name: tensor(name) for name in self._workspace}
        self._take(self._steps, _Run(values, tensor))

    def _take(self, steps: list[Callable[[_Run], None]], run: _Run) -> None:
        with self._on_device():
            for step in steps:
                step(run)

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        """Triton launches on the current device."""
        if self.device.type != "cuda" or torch.cuda.current_device() == self.device.index:
            return contextlib.nullcontext()
        return torch.cuda.device(self.device)


class _Run(NamedTuple):
    values: dict[str, Any]  # what kernels get in place of Slots
    tensor: Callable[[str], Tensor]


def _filler(template: Any) -> Callable[[Mapping[str, Any]], Any]:
    """A function that puts values into the Slots of a template, as quickly as can be."""
    return _holes(template) or (lambda values: template)


def _holes(template: Any) -> Callable[[Mapping[str, Any]], Any] | None:
    if isinstance(template, Slot):
        return lambda values: values[template]
    if not isinstance(template, tuple):
        return None
    holes = [(index, hole) for index, part in enumerate(template) if (hole := _holes(part)) is not None]
    make = template._make if hasattr(template, "_make") else tuple  # a NamedTuple's parts keep their names
    if not holes:
        return None

    def fill(values: Mapping[str, Any]) -> tuple[Any, ...]:
        parts = list(template)
        for index, hole in holes:
            parts[index] = hole(values)
        return make(parts)

    return fill
