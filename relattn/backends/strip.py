"""The skew of a strip: a block of queries of some heads against a range of keys, in plain PyTorch, without moving an element.

The skew is free. For a strip of `rows` queries and `keys` keys the distances present are `columns = rows + keys - 1` consecutive
numbers. The product q.rel_k^T is stored with one column per distance; the entry for (row m, key n) then stands in column
n - m + rows - 1, at address m * columns + n - m + rows - 1 = m * (columns - 1) + n + rows - 1: seen with a row stride of columns - 1 the
same memory *is* the strip with one column per key, and the product q.k^T accumulates onto it in place. The other way round, gradients
written through that view stand one column per distance, provided the entries that belong to no key are zero.

Strips hold (P, Q, rows, ...), P x Q = G being heads x batch or batch x heads; tables are (T, R, ...), T = 1 where heads share them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Strip(NamedTuple):
    """Queries start..stop against keys first..last, and where their distances lie in the tables.

    Of the `columns` distances the first `left` lie below the tables' range and read row `row`, the last `right` beyond it and read row
    `last_row - 1`; those between, the band, read the rows row..last_row one by one.
    """

    start: int
    stop: int
    first: int
    last: int
    row: int
    last_row: int
    left: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def keys(self) -> int:
        return self.last - self.first

    @property
    def columns(self) -> int:
        return self.rows + self.keys - 1

    @property
    def right(self) -> int:
        return self.columns - self.left - (self.last_row - self.row)


def skewed(buffer: Tensor, strip: Strip) -> Tensor:
    """The view (G, rows, keys) of a buffer with one column per distance, (P, Q, rows, columns)."""
    stride = max(strip.columns - 1, strip.keys)  # they differ for a single row, whose stride only has to look valid
    shape = (buffer.shape[0] * buffer.shape[1], strip.rows, strip.keys)
    return buffer.as_strided(shape, (strip.rows * strip.columns, stride, 1), strip.rows - 1)


def skewed_keys(product: Tensor, strip: Strip) -> Tensor:
    """The view (P, Q, rows, chunk) of a tile with keys as rows and distances from high to low, (P, Q, chunk, chunk + rows - 1)."""
    heads, batch, chunk, columns = product.shape
    strides = (batch * chunk * columns, chunk * columns, 1, max(columns - 1, 1))
    return product.as_strided((heads, batch, strip.rows, chunk), strides, chunk - 1)


def table_columns(buffer: Tensor, strip: Strip) -> Tensor:
    return buffer[..., strip.left : strip.columns - strip.right]


def clear_gaps(buffer: Tensor, strip: Strip) -> None:
    """Zero what belongs to no key: before the first row, between the rows, after the last."""
    rows, keys, columns = strip.rows, strip.keys, strip.columns
    if rows > 1:
        flat = buffer.view(-1, rows * columns)
        flat[:, : rows - 1] = 0
        flat[:, 1 - rows :] = 0
        flat.as_strided((flat.shape[0], rows - 1, rows - 2), (rows * columns, columns - 1, 1), rows - 1 + keys).zero_()


def fold_edges(buffer: Tensor, strip: Strip) -> Tensor:
    """Add the columns beyond the table to the edge rows' columns; return the band."""
    band = table_columns(buffer, strip)
    if strip.left:
        band[..., 0] += buffer[..., : strip.left].sum(-1)
    if strip.right:
        band[..., -1] += buffer[..., -strip.right :].sum(-1)
    return band


def merge(tensor: Tensor, like: Tensor) -> Tensor:
    """(P, Q, rows, n) as (P, Q * rows, n), P being the heads, or as (1, P * Q * rows, n) if they share `like`, (T, ...)."""
    groups = tensor.shape[0] if like.shape[0] > 1 else 1
    return tensor.reshape(groups, -1, tensor.shape[-1])


def times_table(rows: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
    """rows (P, Q, rows, n) times table (T, n, m): (P, Q, rows, m), into `out` if given."""
    merged = merge(rows, table)
    target = None if out is None else out.view(merged.shape[0], -1, out.shape[-1])
    if table.shape[0] == 1:  # one plain product: much faster than a batch of one
        result = torch.mm(merged[0], table[0], out=None if target is None else target[0])
    else:
        result = torch.bmm(merged, table, out=target)
    return result.view(*rows.shape[:3], -1) if out is None else out


def only_seen(weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of weights @ rows in which a weight of 0 takes nothing of a row that is not finite, and any other makes it NaN.

    rows (T, n, m) and weights (T, rows, n) or (P, Q, rows, n), which are changed in place.
    """
    spoilt = ~rows.isfinite().all(-1)
    weights.masked_fill_((weights != 0.0) & (spoilt[:, None] if weights.dim() == 3 else spoilt[:, None, None]), torch.nan)
    return weights, masked(rows, spoilt[..., None])


def finite(tensor: Tensor) -> Tensor:
    """With 0 in place of what is not finite."""
    return masked(tensor, ~tensor.isfinite())


def masked(tensor: Tensor, hidden: Tensor) -> Tensor:
    """With 0 where hidden, and strides and alignment as they were: the last bits of a product depend on these."""
    single = tuple(slice(1) if stride == 0 else slice(None) for stride in tensor.stride())
    once = tensor[single]  # what is repeated without memory of its own
    span = 1 + sum((size - 1) * stride for size, stride in zip(once.shape, once.stride(), strict=True))
    start = tensor.data_ptr() // tensor.element_size() % 16
    copy = once.new_empty(span + start).as_strided(once.shape, once.stride(), start)
    return copy.copy_(once).masked_fill_(hidden.expand(tensor.shape)[single], 0.0).expand(tensor.shape)
