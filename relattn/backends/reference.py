"""The definition of relative attention, as plain PyTorch: the specification that every other backend is tested against.

It materialises (B, H, Lq, Lk) and (B, H, Lq, R) tensors, takes any floating dtype, and is differentiable any number of times.

For batch b, query head h, query i and key j::

    d(i,j) = j - (i + query_offset)                       relative position: key minus query
    r(i,j) = clamp(d, -left, right) + left                row of a relative table, R = left + right + 1 rows
    s_ij   = scale * [(q_i + u_h).k_j + (q_i + v_h).rel_k[h,r] + k_j.rel_q[h,r]] + rel_bias[h,r] + attn_mask[b,h,i,j]
    w_ij   = softmax over the keys that i may see; then dropout
    o_i    = sum_j w_ij (v_j + rel_v[h,r])
    lse_i  = logsumexp_j s_ij

A query that may see no key gets o = 0, lse = -inf and no gradient. What a query may not see changes neither its output nor a gradient,
whatever it holds (`relattn.backends.products`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from relattn.arguments import Settings, Tensors, hidden_from, lse_dtype, with_layout
from relattn.backends import products
from relattn.backends.sequences import sequences
from relattn.philox import dropout_keep


def relative_position(tensors: Tensors, settings: Settings) -> Tensor:
    """d(i,j), int64 of shape (1, 1, Lq, Lk), or (B, 1, Lq, Lk) where offsets differ by batch."""
    device = tensors.query.device
    query = torch.arange(tensors.query.shape[2], device=device)[:, None] + settings.query_offset
    key = torch.arange(tensors.key.shape[2], device=device)
    if tensors.query_offsets is None:
        return (key - query)[None, None]
    return key - (query + tensors.query_offsets.to(torch.int64)[:, None, None, None])


def visible(tensors: Tensors, settings: Settings, distance: Tensor) -> Tensor | None:
    """Which keys a query may attend to, bool and broadcastable to (B, H, Lq, Lk); None if all."""
    conditions = []
    if settings.is_causal:
        conditions.append(distance <= 0)
    if settings.window_left is not None:
        conditions.append(distance >= -settings.window_left)
    if settings.window_right is not None:
        conditions.append(distance <= settings.window_right)
    if settings.chunk_size is not None:
        key = torch.arange(tensors.key.shape[2], device=tensors.key.device)
        start, stop = settings.chunk_start(key - distance), settings.chunk_stop(key - distance)
        conditions.append(key < stop if start is None else (key >= start) & (key < stop))
    if tensors.key_mask is not None:
        conditions.append(tensors.key_mask[:, None, None, :])
    if tensors.key_lengths is not None:
        position = torch.arange(tensors.key.shape[2], device=tensors.key.device)
        conditions.append((position < tensors.key_lengths[:, None])[:, None, None, :])
    if tensors.attn_mask is not None:
        mask = tensors.attn_mask
        conditions.append(mask if mask.dtype == torch.bool else ~(mask <= hidden_from(mask.dtype)))
    result = None
    for condition in conditions:
        result = condition if result is None else result & condition
    return result


def attention(
    tensors: Tensors, settings: Settings, seed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The output (B, Hq, Lq, Dv), its log-sum-exp (B, Hq, Lq) and the weights (B, Hq, Lq, Lk) after dropout, None for a packed call.

    `seed` (int64, shape ()) is needed where `settings.dropout_p` > 0.
    """
    if tensors.cu_seqlens_q is None:
        return _attention(tensors, settings, seed, 0)
    query, value = tensors.query, tensors.value
    done = [_attention(part.tensors, settings, seed, part.number)[:2] for part in sequences(tensors)]
    nothing = query[:, :, :0, :1].expand(-1, -1, -1, value.shape[3]), query[:, :, :0, 0].to(lse_dtype(query.dtype))
    output, lse = (torch.cat(parts, dim=2) for parts in zip(nothing, *done, strict=True))
    return with_layout(query, output), lse, None


def _attention(tensors: Tensors, settings: Settings, seed: Tensor | None, first_batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a call that is not packed; dropout counts its batch elements from `first_batch` on."""
    query, key, value = tensors.query, tensors.key, tensors.value
    batch, heads, query_length, _ = query.shape
    key_length = key.shape[2]
    dtype = query.dtype
    if heads != key.shape[1]:  # grouped queries: query head h reads key head h // (Hq / Hkv)
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
        value = value.repeat_interleave(heads // value.shape[1], dim=1)

    distance = relative_position(tensors, settings)
    row = (distance.clamp(-settings.left, settings.right) + settings.left).expand(batch, heads, -1, -1)

    def per_head(table: Tensor, dims: int) -> Tensor:  # (R, ...) or (H, R, ...) -> (H, R, ...)
        return table.to(dtype).expand(heads, *table.shape[-(dims - 1) :])

    def plus(bias: Tensor | None) -> Tensor:  # scaled before the products, which could overflow float16
        return settings.scale * (query if bias is None else query + bias.to(dtype)[:, None, :])

    def by_table(product: Callable[[Tensor, Tensor], Tensor], rows: Tensor, table: Tensor) -> Tensor:
        """rows (B, H, L, n) with a table of each head."""
        folded = rows.transpose(0, 1).flatten(1, 2)
        return product(folded, per_head(table, 3)).unflatten(1, (batch, rows.shape[2])).transpose(0, 1)

    scores = products.scores(plus(tensors.pos_bias_u), key)
    if tensors.rel_k is not None:
        by_row = by_table(products.scores, plus(tensors.pos_bias_v), tensors.rel_k)
        scores = scores + by_row.gather(-1, row)
    if tensors.rel_q is not None:
        by_row = by_table(products.scores, settings.scale * key, tensors.rel_q)
        scores = scores + by_row.gather(-1, row.transpose(-2, -1)).transpose(-2, -1)
    scores = scores.to(lse_dtype(dtype))
    if tensors.rel_bias is not None:
        by_row = per_head(tensors.rel_bias, 2).to(scores.dtype)[None, :, None, :]
        scores = scores + by_row.expand(batch, -1, query_length, -1).gather(-1, row)

    allowed = visible(tensors, settings, distance)
    if tensors.attn_mask is not None and tensors.attn_mask.dtype != torch.bool:
        mask = tensors.attn_mask
        scores = scores + mask.to(scores.dtype).masked_fill(mask <= hidden_from(mask.dtype), 0.0)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    weights, lse = products.softmax(scores)

    if settings.dropout_p > 0.0:
        assert seed is not None
        keep = dropout_keep(
            seed, settings.dropout_p, *_indices(settings, first_batch, batch, heads, query_length, query.device), settings.first_key,
            settings.first_key + key_length,
        )  # fmt: skip
        weights = torch.where(keep, weights, 0.0) / ((1.0 - settings.dropout_p) or 1.0)  # nothing is kept where this is 0
    weights = weights.to(dtype)
    output = products.weighted(weights, value)
    if tensors.rel_v is not None:
        rows = settings.left + settings.right + 1
        by_row = weights.new_zeros((batch, heads, query_length, rows)).scatter_add(-1, row, weights)
        output = output + by_table(products.weighted, by_row, tensors.rel_v)
    return with_layout(tensors.query, output), lse, weights


def _indices(
    settings: Settings, first_batch: int, batch: int, heads: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch_index = torch.arange(first_batch, first_batch + batch, device=device)[:, None, None]
    head_index = torch.arange(settings.first_head, settings.first_head + heads, device=device)[:, None]
    return batch_index, head_index, torch.arange(settings.first_query, settings.first_query + length, device=device)


def skew(scores: Tensor, *, is_causal: bool = False) -> Tensor:
    """From one column per distance to one column per key, without copying an index: the skewing step of Music Transformer.

    Huang et al. 2018, section 3.4.1 (the causal form), here also for both directions and for any two lengths.

    Args:
        scores: (..., Lq, Lq + Lk - 1), the columns being the distances key - query from -(Lq - 1) to Lk - 1. With `is_causal`
            (..., Lq, Lk) with Lk >= Lq, the columns being the distances -(Lk - 1) ... 0 and the last query standing at the last key.

    Returns:
        (..., Lq, Lk) with `out[..., i, j] = scores[..., i, column of distance(i, j)]`; zero where `is_causal` and the key lies ahead
        (the published pad-and-reshape leaves the next row's values there).

    Raises:
        ValueError: too few columns for the number of rows.
    """
    _check_matrices(scores)
    rows, columns = scores.shape[-2:]
    if columns < rows:
        needed = f"(..., {rows}, Lk) with Lk >= {rows}" if is_causal else f"(..., {rows}, {rows} + Lk - 1)"
        raise ValueError(f"scores: expected {needed}, got {tuple(scores.shape)}")
    if is_causal:
        # Distances ahead get columns of zeros; then the key axis starts Lk - Lq before query 0.
        return skew(F.pad(scores, (0, rows - 1)))
    if rows == 0:
        return scores.new_zeros((*scores.shape[:-1], columns + 1))
    if rows == 1:
        return scores
    # Flat address of (i, column j - i + rows - 1): i * (columns - 1) + j + rows - 1.
    flat = scores.flatten(-2)[..., rows - 1 : rows * columns - 1]
    return flat.unflatten(-1, (rows, columns - 1))[..., : columns - rows + 1]


def _check_matrices(scores: Tensor) -> None:
    if scores.dim() < 2:
        raise ValueError(f"scores: expected at least 2 dimensions (..., queries, columns), got {tuple(scores.shape)}")


def unskew(scores: Tensor, *, is_causal: bool = False) -> Tensor:
    """The inverse of `skew` (and its transpose): from one column per key to one per distance, zero where no key has that distance.

    Args:
        scores: (..., Lq, Lk); Lk >= Lq where `is_causal`, and then entries ahead of the query are ignored.

    Returns:
        (..., Lq, Lq + Lk - 1), or (..., Lq, Lk) where `is_causal`.
    """
    _check_matrices(scores)
    rows, keys = scores.shape[-2:]
    if is_causal:
        if keys < rows:
            raise ValueError(f"scores: expected (..., {rows}, Lk) with Lk >= {rows}, got {tuple(scores.shape)}")
        return unskew(scores)[..., :keys]
    if rows == 0:
        return scores.new_zeros((*scores.shape[:-1], max(keys - 1, 0)))
    if rows == 1:
        return scores
    flat = F.pad(scores, (0, rows - 2)).flatten(-2)
    return F.pad(flat, (rows - 1, 1)).unflatten(-1, (rows, keys + rows - 1))


def shaw_relative_scores(
    query: Tensor, rel_k: Tensor, key_length: int | None = None, *, max_relative_position: int, query_offset: int = 0
) -> Tensor:
    """q_i . a^K_ij by the (Lq, Lk, D) tensor of Shaw, Uszkoreit and Vaswani 2018 (equation 4's second term, unscaled).

    Args:
        query: (B, H, Lq, D).
        rel_k: (2 * max_relative_position + 1, D), the farthest distance to the left first.
        key_length: Lk; None = Lq.

    Returns:
        (B, H, Lq, Lk). Memory O(Lq Lk D): for comparison, not for use.

    Raises:
        ValueError: `rel_k` has another shape.
    """
    query_length, size = query.shape[2:]
    if rel_k.shape != (2 * max_relative_position + 1, size):
        raise ValueError(f"rel_k: expected ({2 * max_relative_position + 1}, {size}), got {tuple(rel_k.shape)}")
    key = torch.arange(query_length if key_length is None else key_length, device=query.device)
    distance = key - (torch.arange(query_length, device=query.device)[:, None] + query_offset)
    table = rel_k[distance.clamp(-max_relative_position, max_relative_position) + max_relative_position]
    return torch.einsum("bhid,ijd->bhij", query, table)
