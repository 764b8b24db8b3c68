"""The cache that `RelativeMultiheadAttention` decodes with."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of the positions seen so far, for incremental decoding with one `RelativeMultiheadAttention`.

    One cache serves one layer and one batch of sequences: give every layer its own, and a fresh (or `reset`) one to
        every new batch.
    Without autograd the tensors lie in buffers that double when full, so that n steps copy O(n) positions, not O(n^2).
    With autograd enabled, or inside torch.compile, they are joined anew at each step, since a tensor saved for the
    backward pass must not change.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything and release the memory."""
        # Never kept for reuse: a tensor that autograd saved must not be written to.
        self._key: Tensor | None = None  # (B, H, capacity, D)
        self._value: Tensor | None = None
        self._length = 0

    @property
    def length(self) -> int:
        """Number of positions held."""
        return self._length

    def __len__(self) -> int:
        return self._length

    @property
    def key(self) -> Tensor | None:
        """(B, H, length, D), a view; None while nothing was appended."""
        return None if self._key is None else self._key[:, :, : self._length]

    @property
    def value(self) -> Tensor | None:
        """(B, H, length, D), a view; None while nothing was appended."""
        return None if self._value is None else self._value[:, :, : self._length]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add positions at the end.

        Args:
            key, value: (B, H, steps, D).

        Returns:
            All keys and values so far, (B, H, length, D) each. Views: without autograd, later appends leave them as
            they are.

        Raises:
            ValueError: batch, heads, head size, dtype or device differ from what the cache holds.
        """
        for held, new in ((self._key, key), (self._value, value)):
            if held is None:
                continue
            same_shape = held.shape[:2] == new.shape[:2] and held.shape[3] == new.shape[3]
            if not (same_shape and held.dtype == new.dtype and held.device == new.device):
                batch, heads, _, size = held.shape
                raise ValueError(
                    f"cache: expected ({batch}, {heads}, steps, {size}), {held.dtype} on {held.device}, as it holds, "
                    f"got {tuple(new.shape)}, {new.dtype} on {new.device} (each layer and each batch needs its own)"
                )
        if self._key is None or self._value is None:
            self._key, self._value = key, value
        elif torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._key, self._value = _joined(self._key, self._length, key), _joined(self._value, self._length, value)
        else:
            self._key = _written(self._key, self._length, key)
            self._value = _written(self._value, self._length, value)
        self._length = self._length + key.shape[2]
        return self._key[:, :, : self._length], self._value[:, :, : self._length]


def _joined(buffer: Tensor, length: int, new: Tensor) -> Tensor:
    """A new tensor of the `length` positions held and the new ones."""
    return torch.cat((buffer[:, :, :length], new), dim=2)


def _written(buffer: Tensor, length: int, new: Tensor) -> Tensor:
    """`buffer` with `new` written after the `length` positions held, moved to a larger one if it does not fit."""
    stop = length + new.shape[2]
    frozen = buffer.is_inference() and not torch.is_inference_mode_enabled()  # may no longer be written to
    if stop > buffer.shape[2] or frozen:
        batch, heads, _, size = buffer.shape
        larger = new.new_empty((batch, heads, max(stop, 2 * length, 16), size))
        larger[:, :, :length] = buffer[:, :, :length]
        buffer = larger
    buffer[:, :, length:stop] = new
    return buffer
