"""torch.jit.trace: a call of the public function as one operator, `relattn::traced`.

A trace follows tensors only, sizes among them: an int that comes from a size is a tensor while it is made, and a number that is none stays
what it was for the traced length. So the operator takes the arguments as they were given, integers as tensors, and everything else
(checks, choice of a backend) happens whenever it runs. A loaded trace needs `import relattn`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from relattn.operators import library

_TENSORS = ("rel_k", "rel_q", "rel_v", "rel_bias", "pos_bias_u", "pos_bias_v", "attn_mask", "key_mask", "key_lengths")
_INTEGERS = ("left", "right", "window_left", "window_right", "query_offset")
library.define(
    "traced(Tensor query, Tensor key, Tensor value, *, "
    + ", ".join(f"Tensor? {name}" for name in (*_TENSORS, *_INTEGERS, "scale"))
    + ", int[]? chunk, bool is_causal, float dropout_p, bool enable_gqa, bool weights, str? backend)"
    + " -> (Tensor output, Tensor lse, Tensor weights)",
    tags=(torch.Tag.nondeterministic_seeded,),
)


def is_tracing() -> bool:
    """Whether calls are to become this operator: not where ONNX, which knows no operator of ours, is the trace's reader."""
    return torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export()


def traced(
    query: Tensor, key: Tensor, value: Tensor, *, max_relative_position: Any = None, window: Any = None, chunk: Any = None,
    query_offset: Any = None, scale: Any = None, weights: bool = False, backend: str | None = None, **others: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, log-sum-exp and (if asked for, else empty) weights; the arguments are `relative_attention`'s."""
    from relattn.functional import chunk_sides, clip_sides, window_sides

    if isinstance(max_relative_position, Tensor):  # made of sizes
        max_relative_position = (max_relative_position, max_relative_position)
    sides, reach = max_relative_position, window
    if sides is not None and not _has_tensors(sides):
        sides = clip_sides(sides)
    if reach is None or not _has_tensors(reach):
        reach = window_sides(reach, others["is_causal"])
    numbers = dict(zip(_INTEGERS, (*(sides or (None, None)), *reach, query_offset), strict=True))
    return torch.ops.relattn.traced(
        query, key, value, **others, **{name: _as_tensor(number) for name, number in numbers.items()},
        chunk=None if chunk is None else [side for side in chunk_sides(chunk) if side is not None], scale=_as_tensor(scale),
        weights=weights, backend=backend,
    )  # fmt: skip


def _has_tensors(pair: Any) -> bool:
    return isinstance(pair, (tuple, list)) and len(pair) == 2 and any(isinstance(side, Tensor) for side in pair)


def _as_tensor(number: Any) -> Tensor | None:
    if number is None or isinstance(number, Tensor):
        return number
    return torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else None)


def _plain(number: Any) -> Any:
    """A tensor without dimensions as a number, which TorchScript may have made of it already. One on a device stays, for who computes."""
    return number.item() if isinstance(number, Tensor) and number.dim() == 0 and number.device.type == "cpu" else number


def _traced(
    query: Tensor, key: Tensor, value: Tensor, *, left: Tensor | None, right: Tensor | None, window_left: Tensor | None,
    window_right: Tensor | None, chunk: list[int] | None, query_offset: Tensor | None, scale: Tensor | None, weights: bool,
    backend: str | None, **others: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from relattn.functional import attention_with_weights, relative_attention

    call = others | dict(
        max_relative_position=None if left is None else (_plain(left), _plain(right)),
        window=(_plain(window_left), _plain(window_right)),
        chunk=None if chunk is None else (*chunk, None)[:2],
        query_offset=_plain(query_offset),
        scale=_plain(scale),
    )
    if weights:
        return attention_with_weights(query, key, value, **call)
    output, lse = relative_attention(query, key, value, **call, return_lse=True, backend=backend)
    return output, lse, output.new_empty(0)


library.impl("traced", _traced, "CompositeImplicitAutograd")
