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

    Args:
        sliding: forget, after each call, the positions that no later query of the layer sees, which its `window` or
            `chunk` must bound to the left: streams of any length take a bounded memory. Masks then cover the positions
            that are held, and the new ones.
    """

    def __init__(self, sliding: bool = False) -> None:
        self.sliding = bool(sliding)
        self.reset()

    def reset(self) -> None:
        """Forget everything and release the memory."""
        # Never kept for reuse: a tensor that autograd saved must not be written to.
        self._key: Tensor | None = None  # (B, H, capacity, D), of which start ... stop are held
        self._value: Tensor | None = None
        self._start = self._stop = 0
        self._forgotten = 0

    @property
    def length(self) -> int:
        """Number of positions held."""
        return self._stop - self._start

    @property
    def seen(self) -> int:
        """Number of positions ever appended, also of those that are forgotten."""
        return self._forgotten + self.length

    def __len__(self) -> int:
        return self.length

    @property
    def key(self) -> Tensor | None:
        """(B, H, length, D), a view; None while nothing was appended."""
        return None if self._key is None else self._key[:, :, self._start : self._stop]

    @property
    def value(self) -> Tensor | None:
        """(B, H, length, D), a view; None while nothing was appended."""
        return None if self._value is None else self._value[:, :, self._start : self._stop]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add positions at the end.

        Args:
            key, value: (B, H, steps, D).

        Returns:
            All keys and values that are held, (B, H, length, D) each. Views: without autograd, later appends leave them as
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
        length, steps = self.length, key.shape[2]
        held_key, held_value = self.key, self.value
        if self._key is None or self._value is None or held_key is None or held_value is None:
            self._key, self._value = key, value
        elif torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._key, self._value = torch.cat((held_key, key), dim=2), torch.cat((held_value, value), dim=2)
            self._start = 0
        else:
            # What was handed out is never written to: positions that were forgotten give their room back with their buffer.
            frozen = self._key.is_inference() and not torch.is_inference_mode_enabled()  # may no longer be written to
            if self._stop + steps > self._key.shape[2] or frozen:
                capacity = max(length + steps, 2 * length, 16)
                self._key, self._value = _moved(held_key, capacity), _moved(held_value, capacity)
                self._start = 0
            stop = self._start + length
            self._key[:, :, stop : stop + steps], self._value[:, :, stop : stop + steps] = key, value
        self._stop = self._start + length + steps
        return self._key[:, :, self._start : self._stop], self._value[:, :, self._start : self._stop]

    def forget(self, count: int) -> None:
        """The first `count` of the positions that are held. Their memory goes with the buffer, when it is full.

        Raises:
            ValueError: fewer are held.
        """
        if not 0 <= count <= self.length:
            raise ValueError(f"count: expected 0 to {self.length}, the number of positions held, got {count}")
        self._start, self._forgotten = self._start + count, self._forgotten + count


def _moved(held: Tensor, capacity: int) -> Tensor:
    """The positions held at the beginning of a larger tensor."""
    batch, heads, length, size = held.shape
    larger = held.new_empty((batch, heads, capacity, size))
    larger[:, :, :length] = held
    return larger
