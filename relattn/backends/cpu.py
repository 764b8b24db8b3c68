"""The native CPU backend: kernels/cpu, a C++ library without torch, loaded with ctypes.

What it is handed is one block of numbers, laid out as kernels/cpu/call.h has it: sizes and settings, then for every tensor its address,
dtype and strides.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import json
import os
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relattn.arguments import DIFFERENTIABLE, Settings, Tensors, empty_gradient, empty_with_layout
from relattn.backends import blocked

_ABI_VERSION = 1  # as in library.cpp
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3, torch.int64: 4}
_ABSENT = (0,) * 6
_TENSORS = 26  # in Call
_CALL = struct.Struct(f"=19q2d{6 * _TENSORS}q")

# Calls of fewer multiplications than this run on one thread: about 25 microseconds, less than waking another takes.
_ALONE = 1e6
# Upper bounds of a tile of scores, (queries, keys); 0 = the kernel's own. Tests cut finer.
_TILE = (0, 0)


def _folder() -> Path | None:
    """Where relattn.kernels.cpu lies, without importing it."""
    try:
        spec = importlib.util.find_spec("relattn.kernels")
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "cpu"


def _why_not_built(folder: Path | None) -> str:
    if folder is None:
        return "this is a source tree without relattn.kernels: pip install -e ."
    try:
        reason = json.loads((folder / "build_report.json").read_text(encoding="utf-8"))["reason"]
    except (OSError, ValueError, KeyError):
        reason = None
    return f"the native library was not built: {reason or 'no build report'}"


def _load() -> tuple[Any, str | None]:
    """The library, or None and why there is none."""
    given, folder = os.environ.get("RELATTN_CPU_LIBRARY"), _folder()
    if given:
        path = Path(given)
    elif folder is None or not (folder / "librelattn_cpu.so").exists():
        return None, _why_not_built(folder)
    else:
        path = folder / "librelattn_cpu.so"
    try:
        library = ctypes.CDLL(str(path))
        library.relattn_abi_version.restype = library.relattn_call_size.restype = ctypes.c_int64
        library.relattn_variant.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        return None, f"the native library could not be loaded: {error}"
    if library.relattn_abi_version() != _ABI_VERSION or library.relattn_call_size() != _CALL.size:
        return None, f"the native library is of another version of relattn: install relattn again ({path})"
    name = os.environ.get("RELATTN_CPU_VARIANT")
    if name and library.relattn_use_variant(name.encode()) != 0:
        return None, f"RELATTN_CPU_VARIANT={name}: it was not built, or this processor lacks it"
    return library, None


# Loaded at import: what torch.compile traces then sees a constant.
_library, _reason = _load()


def unavailable() -> str | None:
    return _reason


def variant() -> str | None:
    """The instruction set in use: "amx", "avx512", "avx2" or "portable"; None without the library."""
    return None if _library is None else _library.relattn_variant().decode()


def use_variant(name: str) -> None:
    """Use another of the built instruction sets in this process, as tests and benchmarks do.

    Raises:
        ValueError: it was not built, or this processor lacks it.
    """
    if _library is None or _library.relattn_use_variant(name.encode()) != 0:
        raise ValueError(f"name: {name!r} was not built, or this processor lacks it")


def unsupported(tensors: Tensors, settings: Settings) -> str | None:
    query = tensors.query
    if query.device.type != "cpu":
        return f"it runs on CPU tensors, and these are on {query.device}"
    if query.dtype == torch.float64:
        return "it computes in float32, and these are torch.float64"
    if tensors.attn_mask is not None and tensors.attn_mask.requires_grad:
        return "attn_mask requires a gradient"
    return None


def _describe(tensor: Tensor | None, dims: tuple[int, ...]) -> tuple[int, ...]:
    """Address, dtype and the four strides of Call: dimension k of the tensor is Call's dims[k]; along the others the stride is 0."""
    if tensor is None:
        return _ABSENT
    strides = [0, 0, 0, 0]
    for dim, size, stride in zip(dims, tensor.shape, tensor.stride(), strict=True):
        strides[dim] = stride if size != 1 else 0
    return (tensor.data_ptr(), _DTYPES[tensor.dtype], *strides)


def _full(tensor: Tensor | None) -> tuple[int, ...]:
    """(B, H, L, D)"""
    if tensor is None:
        return _ABSENT
    pointer = tensor.data_ptr()
    if pointer == 0:
        raise ValueError(f"relattn: the native CPU kernel reads memory, and a tensor of shape {tuple(tensor.shape)} has none")
    return (pointer, _DTYPES[tensor.dtype], *tensor.stride())


def _table(tensor: Tensor | None) -> tuple[int, ...]:
    """(R, D) or (H, R, D)"""
    if tensor is None:
        return _ABSENT
    head = tensor.stride(0) if tensor.dim() == 3 else 0
    return (tensor.data_ptr(), _DTYPES[tensor.dtype], 0, head, *tensor.stride()[-2:])


def _bias_table(tensor: Tensor | None) -> tuple[int, ...]:
    """(R,) or (H, R)"""
    if tensor is None:
        return _ABSENT
    head = tensor.stride(0) if tensor.dim() == 2 else 0
    return (tensor.data_ptr(), _DTYPES[tensor.dtype], 0, head, tensor.stride(-1), 0)


def _differs_by_head(table: Tensor, name: str) -> bool:
    """Whether a table has one gradient per head although its heads lie in the same memory."""
    return table.dim() == (2 if name == "rel_bias" else 3) and table.shape[0] > 1 and table.stride(0) == 0


def _pos_bias(tensor: Tensor | None) -> tuple[int, ...]:
    """(H, D)"""
    return _describe(tensor, (1, 3))


def _mask(tensor: Tensor | None) -> tuple[int, ...]:
    """Broadcastable to (B, H, L, L)"""
    return _ABSENT if tensor is None else _describe(tensor, tuple(range(4 - tensor.dim(), 4)))


def _pack(tensors: Tensors, settings: Settings, seed: Tensor, output: Tensor, lse: Tensor, gradients: tuple) -> tuple[bytes, list]:
    """The Call, and tensors that it points to and nobody else holds."""
    query, key, value = tensors.query, tensors.key, tensors.value
    batch, heads, queries, size = query.shape
    window_right = 0 if settings.is_causal else settings.window_right
    rows = settings.left + settings.right + 1
    products = batch * heads * queries * key.shape[2] * size
    threads = torch.get_num_threads() if products >= _ALONE else 1
    integers = []
    for tensor in (tensors.key_lengths, tensors.query_offsets):
        integers.append(None if tensor is None else tensor.to(torch.int64))
    described = (
        _full(query), _full(key), _full(value), _full(output), (lse.data_ptr(), 0, *lse.stride(), 0),
        _table(tensors.rel_k), _table(tensors.rel_q), _table(tensors.rel_v), _bias_table(tensors.rel_bias),
        _pos_bias(tensors.pos_bias_u), _pos_bias(tensors.pos_bias_v), _mask(tensors.attn_mask), _describe(tensors.key_mask, (0, 2)),
        _describe(integers[0], (0,)), _describe(integers[1], (0,)), *gradients,
    )  # fmt: skip
    return _CALL.pack(
        batch, heads, key.shape[1], queries, key.shape[2], size, value.shape[3], rows, settings.left, settings.right,
        settings.window_left is not None, settings.window_left or 0, window_right is not None, window_right or 0,
        settings.query_offset, int(seed) if settings.dropout_p > 0.0 else 0, threads, *_TILE, settings.scale, settings.dropout_p,
        *itertools.chain.from_iterable(described),
    ), integers  # fmt: skip


_NO_GRADIENTS = (_ABSENT,) * 11


def forward(tensors: Tensors, settings: Settings, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, Lq, Dv) and log-sum-exp (B, Hq, Lq)."""
    query = tensors.query
    batch, heads, length, _ = query.shape
    output = empty_with_layout(query, (batch, heads, length, tensors.value.shape[3]))
    lse = query.new_empty((batch, heads, length), dtype=torch.float32)
    if output.numel() == 0 or tensors.key.numel() == 0:
        return output.zero_(), lse.fill_(-torch.inf)
    call, _keep = _pack(tensors, settings, seed, output, lse, _NO_GRADIENTS)
    _check(_library.relattn_forward(call))
    return output, lse


def _check(status: int) -> None:
    if status != 0:
        raise MemoryError("relattn: the native CPU kernel could not allocate its working memory")


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    tensors: Tensors,
    settings: Settings,
    output: Tensor,
    lse: Tensor,
    seed: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the differentiable tensors for which `needs` is True, in the order of `DIFFERENTIABLE`."""
    if needs[DIFFERENTIABLE.index("attn_mask")]:  # not through `unsupported`, but the operator can be called by itself
        return blocked.backward(grad_output, grad_lse, tensors, settings, output, lse, seed, needs)
    differentiable = zip(DIFFERENTIABLE, tensors, needs, strict=False)
    gradients = {name: empty_gradient(tensor) for name, tensor, need in differentiable if need and tensor is not None}
    if output.numel() == 0 or tensors.key.numel() == 0:
        return [gradient.zero_() for gradient in gradients.values()]
    # A table that is expanded over the heads has a gradient for each of them all the same.
    tables = {name: getattr(tensors, name) for name in ("rel_k", "rel_q", "rel_v", "rel_bias")}
    expanded = {name: table.contiguous() for name, table in tables.items() if table is not None and _differs_by_head(table, name)}
    tensors = tensors._replace(**expanded)
    grad = gradients.get
    described = (
        _full(grad_output), _ABSENT if grad_lse is None else (grad_lse.data_ptr(), 0, *grad_lse.stride(), 0),
        _full(grad("query")), _full(grad("key")), _full(grad("value")),
        _table(grad("rel_k")), _table(grad("rel_q")), _table(grad("rel_v")), _bias_table(grad("rel_bias")),
        _pos_bias(grad("pos_bias_u")), _pos_bias(grad("pos_bias_v")),
    )  # fmt: skip
    call, _keep = _pack(tensors, settings, seed, output, lse, described)
    _check(_library.relattn_backward(call))
    return list(gradients.values())
