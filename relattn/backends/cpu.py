"""The native CPU backend: kernels/cpu, a C++ library without torch, loaded with ctypes.

What it is handed is one block of numbers, laid out as kernels/cpu/call.h has it: sizes and settings, then for every tensor its place, dtype
and strides. It is the same for all calls of one signature; a second block has what is not, the addresses.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relattn.arguments import DIFFERENTIABLE, Settings, Tensors, empty_gradient, empty_with_layout
from relattn.backends import blocked

_ABI_VERSION = 5  # as in library.cpp
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3, torch.int64: 4}
_TENSORS = 28  # in Call
_CALL = struct.Struct(f"=26q2d{6 * _TENSORS}q")

# Calls of fewer multiplications than this run on one thread: about 20 microseconds of work. Waking another takes a few, and more where
# threads have gone to sleep.
_ALONE = 1e5
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


# What the library is told of a tensor: its place among a call's addresses, its dtype, and four strides.
_ABSENT = (0,) * 6
# Before the addresses stand: seed, threads, the tile's two bounds; the number of keys, query_offset; strides of keys, values, key_mask.
_NUMBERS = 4 + 2 + 4 + 4 + 2


def _described(place: int, tensor: Tensor | None, dims: tuple[int, ...]) -> tuple[int, ...]:
    """Dimension k of the tensor is Call's dims[k]; along the others the stride is 0."""
    if tensor is None:
        return _ABSENT
    strides = [0, 0, 0, 0]
    for dim, size, stride in zip(dims, tensor.shape, tensor.stride(), strict=True):
        strides[dim] = stride if size != 1 else 0
    return (place, _DTYPES[tensor.dtype], *strides)


def _full(place: int, tensor: Tensor | None) -> tuple[int, ...]:
    """(B, H, L, D)"""
    return _ABSENT if tensor is None else (place, _DTYPES[tensor.dtype], *tensor.stride())


def _table(place: int, tensor: Tensor | None) -> tuple[int, ...]:
    """(R, D) or (H, R, D)"""
    if tensor is None:
        return _ABSENT
    head = tensor.stride(0) if tensor.dim() == 3 else 0
    return (place, _DTYPES[tensor.dtype], 0, head, *tensor.stride()[-2:])


def _bias_table(place: int, tensor: Tensor | None) -> tuple[int, ...]:
    """(R,) or (H, R)"""
    if tensor is None:
        return _ABSENT
    head = tensor.stride(0) if tensor.dim() == 2 else 0
    return (place, _DTYPES[tensor.dtype], 0, head, tensor.stride(-1), 0)


def _differs_by_head(name: str, table: Tensor) -> bool:
    """Whether it is a table with one gradient per head although its heads lie in the same memory."""
    dims = {"rel_k": 3, "rel_q": 3, "rel_v": 3, "rel_bias": 2}.get(name)
    return table.dim() == dims and table.shape[0] > 1 and table.stride(0) == 0


def _pos_bias(place: int, tensor: Tensor | None) -> tuple[int, ...]:
    """(H, D)"""
    return _described(place, tensor, (1, 3))


def _mask(place: int, tensor: Tensor | None) -> tuple[int, ...]:
    """Broadcastable to (B, H, L, L)"""
    return _ABSENT if tensor is None else _described(place, tensor, tuple(range(4 - tensor.dim(), 4)))


class Plan:
    """What the library is told of calls of one signature (shapes, strides, dtypes, settings): everything but addresses and the seed,
    how many keys there are, how they lie and where queries stand.

    `inputs`, here and below, are those of the call's `Tensors` that it has, in their order. None of them is kept.
    """

    def __init__(self, tensors: Tensors, settings: Settings) -> None:
        query, value = tensors.query, tensors.value
        shape = (*query.shape[:3], value.shape[3])
        self.settings, self.dtype = settings, settings.output_dtype(query.dtype)
        self.names = [name for name, tensor in zip(Tensors._fields, tensors, strict=True) if tensor is not None]
        self.empty = query.numel() == 0 or value.numel() == 0
        self.key_mask = self.names.index("key_mask") if "key_mask" in self.names else None
        self.output = shape, empty_with_layout(query, shape).stride()
        self.lse = shape[:3], (shape[1] * shape[2], shape[2], 1)
        # Tables that are expanded over the heads have a gradient for each of them all the same.
        self.expanded = [index for index, name in enumerate(self.names) if _differs_by_head(name, getattr(tensors, name))]
        integers = [name for name in ("key_lengths", "query_offsets", "cu_seqlens_q", "cu_seqlens_k") if name in self.names]
        self.sequences = query.shape[0] if tensors.cu_seqlens_q is None else tensors.cu_seqlens_q.shape[0] - 1
        self.converted = [self.names.index(name) for name in integers if getattr(tensors, name).dtype != torch.int64]
        tensors = tensors._replace(**{name: getattr(tensors, name).to(torch.int64) for name in integers})
        self.forward_call = None if self.empty else self._call(tensors, (_ABSENT,) * 11, self._saved(self.dtype))
        self.backward_calls: dict[tuple, tuple[bytes, list]] = {}

    def _saved(self, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the Call says of output and lse but for their places, as the forward pass makes them."""
        return (_DTYPES[dtype], *self.output[1]), (0, *self.lse[1], 0)

    def _call(
        self, tensors: Tensors, gradients: tuple[tuple[int, ...], ...], saved: tuple[tuple[int, ...], tuple[int, ...]]
    ) -> bytes:  # fmt: skip
        """The Call; addresses come in the order of the inputs, output, lse (`saved` describes them), and what `gradients` describes."""
        settings, (_, heads, queries, size) = self.settings, tensors.query.shape
        key, value = tensors.key, tensors.value
        place = {name: _NUMBERS + index for index, name in enumerate((*self.names, "output", "lse"))}

        def described(how, name: str, *dims) -> tuple[int, ...]:
            return how(place.get(name, 0), getattr(tensors, name), *dims)

        entries = (
            described(_full, "query"), described(_full, "key"), described(_full, "value"),
            (place["output"], *saved[0]), (place["lse"], *saved[1]),
            described(_table, "rel_k"), described(_table, "rel_q"), described(_table, "rel_v"), described(_bias_table, "rel_bias"),
            described(_pos_bias, "pos_bias_u"), described(_pos_bias, "pos_bias_v"), described(_mask, "attn_mask"),
            described(_described, "key_mask", (0, 2)), described(_described, "key_lengths", (0,)),
            described(_described, "query_offsets", (0,)), described(_described, "cu_seqlens_q", (0,)),
            described(_described, "cu_seqlens_k", (0,)), *gradients,
        )  # fmt: skip
        window_right = 0 if settings.is_causal else settings.window_right
        return _CALL.pack(
            self.sequences, heads, key.shape[1], queries, 0, size, value.shape[3], settings.left + settings.right + 1,
            settings.left, settings.right,
            settings.window_left is not None, settings.window_left or 0, window_right is not None, window_right or 0,
            settings.chunk_size or 0, -1 if settings.chunk_left is None else settings.chunk_left,
            0, 0, settings.first_head, settings.first_query, settings.first_key, settings.is_part, 0, 0, 0, 0,
            settings.scale, settings.dropout_p, *itertools.chain.from_iterable(entries),
        )  # fmt: skip

    def _convert(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Lengths and offsets as int64."""
        if not self.converted:
            return tensors
        return [tensor.to(torch.int64) if index in self.converted else tensor for index, tensor in enumerate(tensors)]

    def _run(self, function: Any, call: bytes, tensors: Sequence[Tensor], offset: int, seed: Tensor | None) -> None:
        tensors = self._convert(tensors)
        addresses = [tensor.data_ptr() for tensor in tensors]
        if 0 in addresses:
            tensors = [tensor.clone() if tensor._is_zerotensor() else tensor for tensor in tensors]  # autograd's, of zeros
            addresses = [tensor.data_ptr() for tensor in tensors]
        if 0 in addresses:
            shape = tuple(tensors[addresses.index(0)].shape)
            raise ValueError(f"relattn: the native CPU kernel reads memory, and a tensor of shape {shape} has none")
        drawn = int(seed) if self.settings.dropout_p > 0.0 and seed is not None else 0
        query, key, value = tensors[:3]
        keys, mask = value.shape[2], (0, 0) if self.key_mask is None else tensors[self.key_mask].stride()
        rows = keys if query.shape[0] == self.sequences else keys // max(self.sequences, 1)  # that one query sees, about
        threads = torch.get_num_threads() if query.numel() * rows >= _ALONE else 1
        numbers = _numbers(len(addresses)).pack(
            drawn, threads, *_TILE, keys, offset, *key.stride(), *value.stride(), *mask, *addresses
        )  # fmt: skip
        if function(call, numbers) != 0:
            raise MemoryError("relattn: the native CPU kernel could not allocate its working memory")

    def forward(self, inputs: Sequence[Tensor], offset: int, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        query = inputs[0]
        output = query.new_empty_strided(*self.output, dtype=self.dtype)
        lse = query.new_empty_strided(*self.lse, dtype=torch.float32)
        if self.forward_call is None:
            return output.zero_(), lse.fill_(-torch.inf)
        self._run(_library.relattn_forward, self.forward_call, (*inputs, output, lse), offset, seed)
        return output, lse

    def backward(
        self, grad_output: Tensor, grad_lse: Tensor | None, inputs: Sequence[Tensor], offset: int, output: Tensor, lse: Tensor,
        seed: Tensor | None, needs: Sequence[bool],
    ) -> list[Tensor]:  # fmt: skip
        """Gradients of those inputs that `needs` names, one for one, in their order."""
        if self.empty:
            return [empty_gradient(tensor).zero_() for tensor, need in zip(inputs, needs, strict=False) if need]
        slopes = (grad_output,) if grad_lse is None else (grad_output, grad_lse)
        if self.expanded:
            inputs = [tensor.contiguous() if index in self.expanded else tensor for index, tensor in enumerate(inputs)]
        keys = [(tensor.shape, tensor.stride()) for tensor in inputs[1:3]]  # of which the gradients are
        signature = tuple(needs), output.dtype, output.stride(), lse.stride(), *keys, *[(slope.stride(), slope.dtype) for slope in slopes]
        found = self.backward_calls.get(signature)
        if found is None:
            saved = (_DTYPES[output.dtype], *output.stride()), (0, *lse.stride(), 0)
            found = self._backward_call(slopes, inputs, needs, saved)
            if len(self.backward_calls) >= _MOST_BACKWARD:
                self.backward_calls.clear()
            self.backward_calls[signature] = found
        call, wanted = found
        gradients = [output.new_empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in wanted]
        self._run(_library.relattn_backward, call, (*inputs, output, lse, *slopes, *gradients), offset, seed)
        return gradients

    def _backward_call(
        self, slopes: Sequence[Tensor], inputs: Sequence[Tensor], needs: Sequence[bool],
        saved: tuple[tuple[int, ...], tuple[int, ...]],
    ) -> tuple[bytes, list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]]:
        """The Call, and shape, strides and dtype of each gradient."""
        inputs = self._convert(inputs)
        tensors = Tensors(**dict(zip(self.names, inputs, strict=True)))
        place = itertools.count(_NUMBERS + len(inputs) + 2)
        described = [_full(next(place), slopes[0])]
        described.append((next(place), 0, *slopes[1].stride(), 0) if len(slopes) > 1 else _ABSENT)
        needed = {name for name, need in zip(self.names, needs, strict=False) if need}
        gradients = {name: empty_gradient(getattr(tensors, name)) for name in self.names if name in needed}
        for name, how in _GRADIENTS.items():
            described.append(how(next(place), gradients[name]) if name in needed else _ABSENT)
        wanted = [(tuple(gradient.shape), gradient.stride(), gradient.dtype) for gradient in gradients.values()]
        return self._call(tensors, tuple(described), saved), wanted


# In the order of Call, which is that of Tensors.
_GRADIENTS = {
    "query": _full, "key": _full, "value": _full, "rel_k": _table, "rel_q": _table, "rel_v": _table, "rel_bias": _bias_table,
    "pos_bias_u": _pos_bias, "pos_bias_v": _pos_bias,
}  # fmt: skip
_MOST_BACKWARD = 64  # calls that a plan keeps: by numbers of keys, the gradients that are needed, and how the output's lies in memory


@functools.cache
def _numbers(addresses: int) -> struct.Struct:
    return struct.Struct(f"={_NUMBERS + addresses}q")


def _present(tensors: Tensors) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def forward(tensors: Tensors, settings: Settings, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, Lq, Dv) and log-sum-exp (B, Hq, Lq)."""
    return Plan(tensors, settings).forward(_present(tensors), settings.query_offset, seed)


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
    needed = [need for tensor, need in zip(tensors, needs, strict=False) if tensor is not None]
    return Plan(tensors, settings).backward(
        grad_output, grad_lse, _present(tensors), settings.query_offset, output, lse, seed, needed
    )  # fmt: skip
