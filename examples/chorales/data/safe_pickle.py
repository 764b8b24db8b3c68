"""A pickle reader for data files from strangers: plain containers, numbers, strings and numpy arrays, nothing else.

Allowing numpy's own classes would not be enough: `numpy.ndarray(shape, "O", buffer)` and a crafted `dtype` state turn
bytes of the file into pointers. So no name of the file is ever looked up: the few that numpy's pickles need are
answered by the stand-ins below, which build arrays of numbers from bytes and arrays of objects from lists.
"""

import io
import math
import pickle
import re
from typing import Any, Literal

import numpy as np


class _Dtype:
    """Stands for numpy.dtype: a number type, or "O"."""

    def __init__(self, code: str, *_: Any):
        if not (isinstance(code, str) and re.fullmatch(r"[<>|=]?([?bBhHiIlLqQefd]|[biuf]\d|O8?)", code)):
            raise pickle.UnpicklingError(f"refused the numpy dtype {code!r}: only numbers and objects are accepted")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        byte_order = state[1]
        if byte_order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(byte_order)


def _as_bytes(data: Any) -> bytes:
    """Python 2 strings arrive as latin-1 text."""
    return data.encode("latin1") if isinstance(data, str) else bytes(data)


def _numbers(data: Any, dtype: _Dtype, shape: tuple | None, fortran: bool) -> np.ndarray:
    if dtype.dtype.hasobject:
        raise pickle.UnpicklingError("refused an object array given as bytes")
    array = np.frombuffer(_as_bytes(data), dtype=dtype.dtype)
    return array if shape is None else array.reshape(shape, order="F" if fortran else "C")


class _Array:
    """Stands for an array under construction; `_resolve` replaces it by the array."""

    items: list | None  # of an object array; of any other, `array` holds the numbers
    order: Literal["C", "F"]

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        if dtype.dtype.hasobject:
            if not (isinstance(data, list) and math.prod(shape) == len(data)):
                raise pickle.UnpicklingError("garbled object array")
            self.items, self.shape, self.order = data, shape, "F" if fortran else "C"
        else:
            self.items, self.array = None, _numbers(data, dtype, shape, fortran)

    def resolve(self) -> np.ndarray:
        if self.items is None:
            return self.array
        flat = np.empty(len(self.items), dtype=object)
        for index, item in enumerate(self.items):
            flat[index] = _resolve(item)
        return flat.reshape(self.shape, order=self.order)


class _NdarrayName:
    """Stands for the name numpy.ndarray, which arrays pass to `_reconstruct`; it cannot be called."""

    def __new__(cls, *_: Any):
        raise pickle.UnpicklingError("refused a direct call of numpy.ndarray")


def _reconstruct(subtype: Any, *_: Any) -> _Array:
    if subtype is not _NdarrayName:
        raise pickle.UnpicklingError("refused a subclass of numpy.ndarray")
    return _Array()


def _scalar(dtype: _Dtype, data: Any) -> Any:
    return _numbers(data, dtype, None, False)[0]


def _frombuffer(data: Any, dtype: _Dtype, shape: tuple, order: str) -> np.ndarray:
    return _numbers(data, dtype, shape, order == "F")


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"refused the encoding {encoding!r}")
    return text.encode("latin1")


# numpy.core is numpy 1.x's name, numpy._core numpy 2.x's; python 3 writes _codecs.encode for bytes in protocol 2.
_STAND_INS = {
    ("numpy", "ndarray"): _NdarrayName,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}
for _package in ("numpy.core", "numpy._core"):
    _STAND_INS[f"{_package}.multiarray", "_reconstruct"] = _reconstruct
    _STAND_INS[f"{_package}.multiarray", "scalar"] = _scalar
    _STAND_INS[f"{_package}.numeric", "_frombuffer"] = _frombuffer


class RestrictedUnpickler(pickle.Unpickler):
    """Refuses every name that is not one of the stand-ins."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(
                f"refused to load {module}.{name}: only plain containers, numbers and numpy arrays are accepted"
            )
        return _STAND_INS[module, name]


def _resolve(value: Any) -> Any:
    """Replace array stand-ins within containers by the arrays they stand for."""
    if isinstance(value, _Array):
        return value.resolve()
    if isinstance(value, dict):
        return {key: _resolve(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_resolve(item) for item in value)
    return value


def load_pickle(data: bytes) -> Any:
    """Unpickle `data`, python 2 pickles included; anything but plain data is a pickle.UnpicklingError."""
    return _resolve(RestrictedUnpickler(io.BytesIO(data), encoding="latin1").load())
