"""The backward pass, in kernels that each keep what they sum in registers: no atomics, the same bits every time.

`prepare_kernel` computes a few numbers per query. `query_gradient_kernel` has its queries stay put and walks the keys, as the forward pass
does; `key_gradient_kernel` has its keys stay put and walks the queries. gradients of the tables are in tables.py. All recompute the scores.

With w the weights and do the output's gradient, of a tile: dw = do v^T (+ the skew of do rel_v^T), ds = w (dw - delta), where
delta = sum_j w dw = do.o; then dq = ds k + unskewed(ds) rel_k, dk = ds^T q + unskewed(ds)^T rel_q, dv = w^T do.
"""

import triton
import triton.language as tl

from .forward import SIZES, distances, edge_scores, is_whole, key_ranges, relative_window, tile_scores, walk_keys
from .tile import add_dot, dot, dropout_keep, in_low, load_bias, load_rows, load_window, mask_scores, skew, store_rows, unskew


@triton.jit(do_not_specialize=SIZES)
def prepare_kernel(
    query_u, query_v, key, rel_k, rel_q, rel_bias, key_mask, key_lengths, mask, offsets, output, grad_output, lse, grad_lse,
    delta, base, inverse, edges,
    query_strides, key_strides, rel_k_strides, rel_q_strides, rel_bias_strides, key_mask_strides, mask_strides,
    output_strides, grad_strides, grad_lse_strides,
    heads, group, queries, keys, query_blocks, table_rows, query_offset, first, last, left, log2_scale, hidden_from,
    CLIPPED: tl.constexpr, LATE: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_VALUE_SIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Per query, (B, H, Lq) float32: delta; base and inverse, so that the weights are inverse * 2^(scores - base); edges (2, B, H, Lq),
    what the tables' first and last row add to the scores.

    base is the log-sum-exp and inverse 1, or not there (None). A row whose scores share a large number (a mask of -1e9) has a log-sum-exp
    that no longer holds the logarithm of its sum: where inverse is there, such rows get their highest score and the sum anew.
    """
    query_start = tl.program_id(0) % query_blocks * BLOCK
    batch, head = tl.program_id(0) // query_blocks // heads, tl.program_id(0) // query_blocks % heads
    batch64, head64, key_head = batch.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
    rows, row = (batch64 * heads + head64) * queries, query_start + tl.arange(0, BLOCK)

    output += batch64 * output_strides[0] + head64 * output_strides[1]
    grad_output += batch64 * grad_strides[0] + head64 * grad_strides[1]
    values = load_rows(output, query_start, queries, (output_strides[2], output_strides[3]), VALUE_SIZE, BLOCK, BLOCK_VALUE_SIZE)
    slopes = load_rows(grad_output, query_start, queries, (grad_strides[2], grad_strides[3]), VALUE_SIZE, BLOCK, BLOCK_VALUE_SIZE)
    sums = tl.sum(values.to(tl.float32) * slopes.to(tl.float32), axis=1)
    log_sum = tl.load(lse + rows + row, mask=row < queries, other=0.0)
    sees_none = log_sum == float("-inf")
    if grad_lse is not None:
        address = grad_lse + batch64 * grad_lse_strides[0] + head64 * grad_lse_strides[1] + row.to(tl.int64) * grad_lse_strides[2]
        sums -= tl.load(address, mask=row < queries, other=0.0)
    tl.store(delta + rows + row, tl.where(sees_none, 0.0, sums), mask=row < queries)

    if CLIPPED or inverse is not None:
        tile_u = load_rows(
            query_u + batch64 * query_strides[0] + head64 * query_strides[1], query_start, queries,
            (query_strides[2], query_strides[3]), SIZE, BLOCK, BLOCK_SIZE,
        )  # fmt: skip
        tile_v = tile_u
        if query_v is not None:
            tile_v = load_rows(
                query_v + batch64 * query_strides[0] + head64 * query_strides[1], query_start, queries,
                (query_strides[2], query_strides[3]), SIZE, BLOCK, BLOCK_SIZE,
            )  # fmt: skip
        if rel_k is not None:
            rel_k += head64 * rel_k_strides[0]
        if rel_bias is not None:
            rel_bias += head64 * rel_bias_strides[0]
    if CLIPPED:
        for SIDE in tl.static_range(2):
            edge = edge_scores(
                tile_v, rel_k, rel_bias, (table_rows - 1) * SIDE, (rel_k_strides[1], rel_k_strides[2]), rel_bias_strides[1], log2_scale,
                LATE, SIZE, BLOCK_SIZE,
            )  # fmt: skip
            side = (tl.num_programs(0) // query_blocks).to(tl.int64) * queries * SIDE
            tl.store(edges + side + rows + row, edge, mask=row < queries)

    # Of a row that sees nothing every score is -inf: any finite base gives weights of 0.
    highest = tl.where(sees_none, 0.0, log_sum * 1.4426950408889634)
    if inverse is not None:
        norm = tl.full((BLOCK,), 1.0, tl.float32)
        if tl.max(tl.where(sees_none, 0.0, tl.abs(log_sum))) > 64.0:
            first_distance, last_distance, table_start = distances(offsets, batch, query_offset, first, last, left)
            key_stop = keys
            if key_lengths is not None:
                key_stop = tl.minimum(tl.load(key_lengths + batch).to(tl.int64), keys).to(tl.int32)
            if rel_q is not None:
                rel_q += head64 * rel_q_strides[0]
            if key_mask is not None:
                key_mask += batch64 * key_mask_strides[0]
            if mask is not None:
                mask += batch64 * mask_strides[0] + head64 * mask_strides[1]
            _unused, highest, norm = walk_keys(
                sums[:, None], tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32), tile_u, tile_v,
                key + batch64 * key_strides[0] + key_head * key_strides[1], key, rel_k, rel_q, None, rel_bias, key_mask, mask,
                (key_strides[2], key_strides[3]), key_strides, (rel_k_strides[1], rel_k_strides[2]),
                (rel_q_strides[1], rel_q_strides[2]), rel_k_strides, rel_bias_strides[1], key_mask_strides[1], mask_strides,
                0, keys, query_start, queries, key_stop, first_distance, last_distance, table_start, table_rows, log2_scale, hidden_from,
                0, 0, batch, head,
                CLIPPED, LATE, False, False, SIZE, VALUE_SIZE, BLOCK, BLOCK_SIZE, BLOCK_VALUE_SIZE, PRECISION,
            )  # fmt: skip
            highest = tl.where(highest == float("-inf"), 0.0, highest)
        tl.store(inverse + rows + row, tl.where(norm == 0.0, 0.0, 1.0 / norm), mask=row < queries)
    tl.store(base + rows + row, highest, mask=row < queries)


@triton.jit
def _query_walk(
    total, query_u, query_v, slopes, base, inverse, delta, left, right, key, value, rel_k, rel_q, rel_v, rel_bias, key_mask, mask,
    key_strides, value_strides, rel_k_strides, rel_q_strides, rel_v_strides, rel_bias_stride, key_mask_stride, mask_strides,
    query_start, queries, key_stop, first_distance, last_distance, table_start, table_rows, log2_scale, hidden_from,
    seed, threshold, keep_scale, batch, head,
    CLIPPED: tl.constexpr, LATE: tl.constexpr, DROPOUT: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_VALUE_SIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The queries' gradient but for the far tiles' tables, and the sums of each row's score gradients far to the left and to the right."""
    start, near, beyond, stop = key_ranges(
        query_start, queries, key_stop, first_distance, last_distance, table_start, table_rows, CLIPPED, BLOCK
    )
    sums_left, sums_right = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    low, before = total, tl.zeros((BLOCK, BLOCK), query_u.dtype)
    if (rel_k is not None or rel_bias is not None) and not CLIPPED:
        low = relative_window(
            query_v, rel_k, rel_bias, start - query_start - (BLOCK - 1) - table_start, table_rows, rel_k_strides, rel_bias_stride,
            log2_scale, LATE, SIZE, BLOCK, BLOCK_SIZE, PRECISION,
        )  # fmt: skip
    for key_start in tl.range(start, stop, BLOCK):
        first = key_start - query_start - (BLOCK - 1) - table_start
        key_tile = load_rows(key, key_start, key_stop, key_strides, SIZE, BLOCK, BLOCK_SIZE)
        scores, low = tile_scores(
            query_u, query_v, key_tile, low, left, right, rel_k, rel_q, rel_bias, rel_k_strides, rel_q_strides, rel_bias_stride,
            first, key_start, near, beyond, table_rows, log2_scale, CLIPPED, LATE, SIZE, BLOCK, BLOCK_SIZE, PRECISION,
        )  # fmt: skip
        if key_mask is not None or mask is not None or not is_whole(query_start, key_start, key_stop, first_distance, last_distance, BLOCK):
            scores = mask_scores(
                scores, query_start, key_start, queries, key_stop, first_distance, last_distance, key_mask, key_mask_stride,
                mask, mask_strides, hidden_from, BLOCK, False,
            )  # fmt: skip
        weights = tl.exp2(scores * (log2_scale if LATE else 1.0) - base[:, None])
        if inverse is not None:
            weights = weights * inverse[:, None]
        value_tile = load_rows(value, key_start, key_stop, value_strides, VALUE_SIZE, BLOCK, BLOCK_VALUE_SIZE)
        if rel_v is not None:
            table = load_window(rel_v, first, table_rows, rel_v_strides, VALUE_SIZE, BLOCK, BLOCK_VALUE_SIZE)
            by_low = dot(slopes, tl.trans(table), PRECISION)
            table = load_window(rel_v, first + BLOCK, table_rows, rel_v_strides, VALUE_SIZE, BLOCK, BLOCK_VALUE_SIZE)
            grad = skew(by_low, dot(slopes, tl.trans(table), PRECISION), BLOCK, True, True)
            grad = add_dot(slopes, tl.trans(value_tile), grad, PRECISION)
        else:
            grad = dot(slopes, tl.trans(value_tile), PRECISION)
        if DROPOUT:
            keep = dropout_keep(seed, threshold, batch, head, query_start, key_start, BLOCK, False, True)
            grad = tl.where(keep, grad * keep_scale, 0.0)
        grad = weights * (grad - delta[:, None])
        half = grad.to(key_tile.dtype)
        if CLIPPED:
            if (key_start >= near) & (key_start < beyond):
                if rel_k is not None:
                    none = tl.zeros((BLOCK, BLOCK), half.dtype)
                    table = load_window(rel_k, first, table_rows, rel_k_strides, SIZE, BLOCK, BLOCK_SIZE)
                    total = add_dot(unskew(half, none, BLOCK, True, True), table, total, PRECISION)
                    table = load_window(rel_k, first + BLOCK, table_rows, rel_k_strides, SIZE, BLOCK, BLOCK_SIZE)
                    total = add_dot(unskew(none, half, BLOCK, True, True), table, total, PRECISION)
            else:
                row_sums = tl.sum(grad, axis=1)
                sums_left += tl.where(key_start < near, row_sums, 0.0)
                sums_right += tl.where(key_start < near, 0.0, row_sums)
        elif rel_k is not None:
            # The low block of this window was the high block of the last: one product for what both tiles owe to it.
            table = load_window(rel_k, first, table_rows, rel_k_strides, SIZE, BLOCK, BLOCK_SIZE)
            total = add_dot(unskew(half, before, BLOCK, True, True), table, total, PRECISION)
            before = half
        total = add_dot(half, key_tile, total, PRECISION)
    if rel_k is not None and not CLIPPED:  # noqa: SIM102 (this is the compiler's condition)
        if stop > start:
            first = (stop - start + BLOCK - 1) // BLOCK * BLOCK + start - query_start - (BLOCK - 1) - table_start
            table = load_window(rel_k, first, table_rows, rel_k_strides, SIZE, BLOCK, BLOCK_SIZE)
            owed = unskew(tl.zeros((BLOCK, BLOCK), before.dtype), before, BLOCK, True, True)
            total = add_dot(owed, table, total, PRECISION)
    return total, sums_left, sums_right


@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    query_u, query_v, key, value, rel_k, rel_q, rel_v, rel_bias, key_mask, key_lengths, mask, offsets, seed, grad_output,
    delta, base, inverse, edges, grad_query, edge_sums,
    query_strides, key_strides, value_strides, rel_k_strides, rel_q_strides, rel_v_strides, rel_bias_strides,
    key_mask_strides, mask_strides, grad_strides, grad_query_strides,
    heads, group, queries, keys, query_blocks, table_rows, query_offset, first, last, left, scale, log2_scale, hidden_from,
    threshold, keep_scale,
    CLIPPED: tl.constexpr, LATE: tl.constexpr, DROPOUT: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_VALUE_SIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (query block of a head of a batch element). If CLIPPED, edge_sums (2, B, H, Lq) float32 gets, per query, the score gradients
    of the keys far to the left and far to the right: what the tables' first and last row are owed there."""
    query_start = (query_blocks - 1 - tl.program_id(0) % query_blocks) * BLOCK
    batch, head = tl.program_id(0) // query_blocks // heads, tl.program_id(0) // query_blocks % heads
    batch64, head64, key_head = batch.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
    rows, row = (batch64 * heads + head64) * queries, query_start + tl.arange(0, BLOCK)

    first, last, table_start = distances(offsets, batch, query_offset, first, last, left)
    key_stop = keys
    if key_lengths is not None:
        key_stop = tl.minimum(tl.load(key_lengths + batch).to(tl.int64), keys).to(tl.int32)
    if rel_k is not None:
        rel_k += head64 * rel_k_strides[0]
    if rel_q is not None:
        rel_q += head64 * rel_q_strides[0]
    if rel_v is not None:
        rel_v += head64 * rel_v_strides[0]
    if rel_bias is not None:
        rel_bias += head64 * rel_bias_strides[0]
    if key_mask is not None:
        key_mask += batch64 * key_mask_strides[0]
    if mask is not None:
        mask += batch64 * mask_strides[0] + head64 * mask_strides[1]
    drawn = 0
    if DROPOUT:
        drawn = tl.load(seed)

    row_strides = (query_strides[2], query_strides[3])
    query_u += batch64 * query_strides[0] + head64 * query_strides[1]
    tile_u = load_rows(query_u, query_start, queries, row_strides, SIZE, BLOCK, BLOCK_SIZE)
    tile_v = tile_u
    if query_v is not None:
        query_v += batch64 * query_strides[0] + head64 * query_strides[1]
        tile_v = load_rows(query_v, query_start, queries, row_strides, SIZE, BLOCK, BLOCK_SIZE)
    grad_output += batch64 * grad_strides[0] + head64 * grad_strides[1]
    slopes = load_rows(grad_output, query_start, queries, (grad_strides[2], grad_strides[3]), VALUE_SIZE, BLOCK, BLOCK_VALUE_SIZE)
    rows_delta = tl.load(delta + rows + row, mask=row < queries, other=0.0)
    rows_base = tl.load(base + rows + row, mask=row < queries, other=0.0)
    rows_inverse = None
    if inverse is not None:
        rows_inverse = tl.load(inverse + rows + row, mask=row < queries, other=0.0)

    left, right = rows_base, rows_base
    side = (tl.num_programs(0) // query_blocks).to(tl.int64) * queries
    if CLIPPED:
        left = tl.load(edges + rows + row, mask=row < queries, other=0.0)
        right = tl.load(edges + side + rows + row, mask=row < queries, other=0.0)
    total, sums_left, sums_right = _query_walk(
        tl.zeros((BLOCK, BLOCK_SIZE), tl.float32), tile_u, tile_v, slopes, rows_base, rows_inverse, rows_delta, left, right,
        key + batch64 * key_strides[0] + key_head * key_strides[1], value + batch64 * value_strides[0] + key_head * value_strides[1],
        rel_k, rel_q, rel_v, rel_bias, key_mask, mask, (key_strides[2], key_strides[3]), (value_strides[2], value_strides[3]),
        (rel_k_strides[1], rel_k_strides[2]), (rel_q_strides[1], rel_q_strides[2]), (rel_v_strides[1], rel_v_strides[2]),
        rel_bias_strides[1], key_mask_strides[1], mask_strides,
        query_start, queries, key_stop, first, last, table_start, table_rows, log2_scale, hidden_from,
        drawn, threshold, keep_scale, batch, head,
        CLIPPED, LATE, DROPOUT, SIZE, VALUE_SIZE, BLOCK, BLOCK_SIZE, BLOCK_VALUE_SIZE, PRECISION,
    )  # fmt: skip
    if CLIPPED:
        tl.store(edge_sums + rows + row, sums_left, mask=row < queries)
        tl.store(edge_sums + side + rows + row, sums_right, mask=row < queries)
        if rel_k is not None:
            column = tl.arange(0, BLOCK_SIZE)
            edge = tl.load(rel_k + column * rel_k_strides[2], mask=column < SIZE, other=0.0).to(tl.float32)
            total += sums_left[:, None] * edge[None, :]
            rel_k += tl.cast(table_rows - 1, tl.int64) * rel_k_strides[1]
            edge = tl.load(rel_k + column * rel_k_strides[2], mask=column < SIZE, other=0.0).to(tl.float32)
            total += sums_right[:, None] * edge[None, :]
    store_rows(
        grad_query + batch64 * grad_query_strides[0] + head64 * grad_query_strides[1], total * scale, query_start, queries,
        (grad_query_strides[2], grad_query_strides[3]), SIZE, BLOCK, BLOCK_SIZE,
    )  # fmt: skip


@triton.jit
def _transposed_window(
    query_v, table_low, table_high, rel_bias, rel_bias_stride, first, table_rows, log2_scale, LATE: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What rel_k, of which these are the window's two blocks, or None, and rel_bias add to the scores (key, query)."""
    if table_low is not None:
        low, high = dot(table_low, tl.trans(query_v), PRECISION), dot(table_high, tl.trans(query_v), PRECISION)
        if not LATE:
            low, high = low * log2_scale, high * log2_scale
    else:
        low, high = tl.zeros((BLOCK, BLOCK), tl.float32), tl.zeros((BLOCK, BLOCK), tl.float32)
    if rel_bias is not None:
        low += load_bias(rel_bias, first, table_rows, rel_bias_stride, BLOCK)[:, None]
        high += load_bias(rel_bias, first + BLOCK, table_rows, rel_bias_stride, BLOCK)[:, None]
    return skew(low, high, BLOCK, False, True)


@triton.jit
def transposed_tile(
    key_tile, value_tile, query_u, query_v, slopes, base, inverse, delta, edges, side, table_low, table_high,
    rel_k, rel_q, rel_v, rel_bias, key_mask, mask,
    rel_k_strides, rel_q_strides, rel_v_strides, rel_bias_stride, key_mask_stride, mask_strides,
    query_start, key_start, queries, key_stop, first_distance, last_distance, first, near, beyond, table_rows, log2_scale, hidden_from,
    seed, threshold, keep_scale, batch, head,
    CLIPPED: tl.constexpr, LATE: tl.constexpr, ALIGNED: tl.constexpr, DROPOUT: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_VALUE_SIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile with its keys as rows: (weights that dropout keeps, unscaled, and gradient of the scores), both (key, query) float32.

    table_low, table_high: the two blocks of rel_k's window, or None; `first`: the tables' row where the window begins. If CLIPPED, queries
    before `near` and from `beyond` on have far tiles, with the keys to the right and to the left, and the blocks are loaded where needed.
    base, inverse, delta and edges are read where they are used: every thread needs a good part of them, in registers.
    """
    row = query_start + tl.arange(0, BLOCK)
    if CLIPPED:
        scores = dot(key_tile, tl.trans(query_u), PRECISION)
        if not LATE:
            scores = scores * log2_scale
        if (query_start >= near) & (query_start < beyond):
            if rel_k is not None:
                low_rows = load_window(rel_k, first, table_rows, rel_k_strides, SIZE, BLOCK, BLOCK_SIZE)
                high_rows = load_window(rel_k, first + BLOCK, table_rows, rel_k_strides, SIZE, BLOCK, BLOCK_SIZE)
                scores += _transposed_window(
                    query_v, low_rows, high_rows, rel_bias, rel_bias_stride, first, table_rows, log2_scale, LATE, BLOCK, PRECISION
                )
            else:
                scores += _transposed_window(
                    query_v, None, None, rel_bias, rel_bias_stride, first, table_rows, log2_scale, LATE, BLOCK, PRECISION
                )
        else:
            edge = edges + tl.where(query_start < near, side, 0)
            scores += tl.load(edge + row, mask=row < queries, other=0.0)[None, :]
    elif table_low is not None or rel_bias is not None:
        window = _transposed_window(
            query_v, table_low, table_high, rel_bias, rel_bias_stride, first, table_rows, log2_scale, LATE, BLOCK, PRECISION
        )
        if LATE:
            scores = add_dot(key_tile, tl.trans(query_u), window, PRECISION)
        else:
            scores = dot(key_tile, tl.trans(query_u), PRECISION) * log2_scale + window
    else:
        scores = dot(key_tile, tl.trans(query_u), PRECISION)
        if not LATE:
            scores = scores * log2_scale
    if rel_q is not None:
        table = load_window(rel_q, first, table_rows, rel_q_strides, SIZE, BLOCK, BLOCK_SIZE)
        low = dot(key_tile, tl.trans(table), PRECISION)
        table = load_window(rel_q, first + BLOCK, table_rows, rel_q_strides, SIZE, BLOCK, BLOCK_SIZE)
        by_key = skew(low, dot(key_tile, tl.trans(table), PRECISION), BLOCK, True, False)
        scores += by_key if LATE else by_key * log2_scale
    if key_mask is not None or mask is not None or not is_whole(query_start, key_start, key_stop, first_distance, last_distance, BLOCK):
        scores = mask_scores(
            scores, query_start, key_start, queries, key_stop, first_distance, last_distance, key_mask, key_mask_stride,
            mask, mask_strides, hidden_from, BLOCK, True,
        )  # fmt: skip
    weights = tl.exp2(scores * (log2_scale if LATE else 1.0) - tl.load(base + row, mask=row < queries, other=float("inf"))[None, :])
    if inverse is not None:
        weights = weights * tl.load(inverse + row, mask=row < queries, other=0.0)[None, :]
    if rel_v is not None:
        table = load_window(rel_v, first, table_rows, rel_v_strides, VALUE_SIZE, BLOCK, BLOCK_VALUE_SIZE)
        low = dot(table, tl.trans(slopes), PRECISION)
        table = load_window(rel_v, first + BLOCK, table_rows, rel_v_strides, VALUE_SIZE, BLOCK, BLOCK_VALUE_SIZE)
        grad = skew(low, dot(table, tl.trans(slopes), PRECISION), BLOCK, False, True)
        grad = add_dot(value_tile, tl.trans(slopes), grad, PRECISION)
    else:
        grad = dot(value_tile, tl.trans(slopes), PRECISION)
    kept = weights
    if DROPOUT:
        keep = dropout_keep(seed, threshold, batch, head, query_start, key_start, BLOCK, True, ALIGNED)
        grad = tl.where(keep, grad * keep_scale, 0.0)
        kept = tl.where(keep, weights, 0.0)
    return kept, weights * (grad - tl.load(delta + row, mask=row < queries, other=0.0)[None, :])


@triton.jit
def query_ranges(
    key_start, key_stop, queries, first_distance, last_distance, table_start, table_rows, CLIPPED: tl.constexpr, BLOCK: tl.constexpr
):
    """Queries start ... stop that see some of the keys; in between where those end whose keys lie far to the right, and where those
    begin whose keys lie far to the left. All but `stop` are multiples of BLOCK."""
    last_key = tl.minimum(key_start + BLOCK, key_stop) - 1
    start = tl.minimum(tl.maximum(key_start - last_distance, 0), queries)
    stop = tl.maximum(tl.minimum(last_key - first_distance + 1, queries), start)
    stop = tl.where(last_key < key_start, start, stop)
    start = (start // BLOCK * BLOCK).to(tl.int32)
    stop = stop.to(tl.int32)
    near, beyond = start, stop
    if CLIPPED:
        # Far to the right: key_start - (query_start + BLOCK - 1) >= last row. To the left: last key - query_start <= table_start.
        above = (stop + BLOCK - 1) // BLOCK * BLOCK
        end = tl.maximum(key_start + 1 - table_start - table_rows + 1, start) // BLOCK * BLOCK
        near = tl.minimum(end, above).to(tl.int32)
        begin = tl.maximum(key_start + BLOCK - 1 - table_start + BLOCK - 1, near) // BLOCK * BLOCK
        beyond = tl.minimum(begin, tl.maximum(above, near)).to(tl.int32)
    return start, near, beyond, stop


@triton.jit
def _key_walk(
    grad_key, grad_value, sums, key_tile, value_tile, query_u, query_v, grad_output, base, inverse, delta, edges, side,
    rel_k, rel_q, rel_v, rel_bias, key_mask, mask,
    row_strides, grad_row_strides, rel_k_strides, rel_q_strides, rel_v_strides, rel_bias_stride, key_mask_stride, mask_strides,
    key_start, queries, key_stop, first_distance, last_distance, table_start, table_rows, log2_scale, hidden_from,
    seed, threshold, keep_scale, batch, head,
    CLIPPED: tl.constexpr, LATE: tl.constexpr, SUMS: tl.constexpr, DROPOUT: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_VALUE_SIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values from the queries of one head."""
    start, near, beyond, stop = query_ranges(
        key_start, key_stop, queries, first_distance, last_distance, table_start, table_rows, CLIPPED, BLOCK
    )
    for query_start in tl.range(start, stop, BLOCK):
        first = key_start - query_start - (BLOCK - 1) - table_start
        tile_u = load_rows(query_u, query_start, queries, row_strides, SIZE, BLOCK, BLOCK_SIZE)
        tile_v = tile_u
        if query_v is not None:
            tile_v = load_rows(query_v, query_start, queries, row_strides, SIZE, BLOCK, BLOCK_SIZE)
        slopes = load_rows(grad_output, query_start, queries, grad_row_strides, VALUE_SIZE, BLOCK, BLOCK_VALUE_SIZE)
        low, high = None, None
        if rel_k is not None and not CLIPPED:
            low = load_window(rel_k, first, table_rows, rel_k_strides, SIZE, BLOCK, BLOCK_SIZE)
            high = load_window(rel_k, first + BLOCK, table_rows, rel_k_strides, SIZE, BLOCK, BLOCK_SIZE)
        weights, grad = transposed_tile(
            key_tile, value_tile, tile_u, tile_v, slopes, base, inverse, delta, edges, side, low, high,
            rel_k, rel_q, rel_v, rel_bias, key_mask, mask,
            rel_k_strides, rel_q_strides, rel_v_strides, rel_bias_stride, key_mask_stride, mask_strides,
            query_start, key_start, queries, key_stop, first_distance, last_distance, first, near, beyond, table_rows,
            log2_scale, hidden_from, seed, threshold, keep_scale, batch, head,
            CLIPPED, LATE, True, DROPOUT, SIZE, VALUE_SIZE, BLOCK, BLOCK_SIZE, BLOCK_VALUE_SIZE, PRECISION,
        )  # fmt: skip
        grad_value = add_dot(weights.to(slopes.dtype), slopes, grad_value, PRECISION)
        if SUMS:
            sums += tl.sum(grad, axis=1)
        half = grad.to(tile_u.dtype)
        grad_key = add_dot(half, tile_u, grad_key, PRECISION)
        if rel_q is not None:
            by_distance = unskew(half, half, BLOCK, True, False)
            inside = in_low(BLOCK, True, False)
            table = load_window(rel_q, first, table_rows, rel_q_strides, SIZE, BLOCK, BLOCK_SIZE)
            grad_key = add_dot(tl.where(inside, by_distance, 0.0).to(half.dtype), table, grad_key, PRECISION)
            table = load_window(rel_q, first + BLOCK, table_rows, rel_q_strides, SIZE, BLOCK, BLOCK_SIZE)
            grad_key = add_dot(tl.where(inside, 0.0, by_distance).to(half.dtype), table, grad_key, PRECISION)
    return grad_key, grad_value, sums


@triton.jit(do_not_specialize=SIZES)
def key_gradient_kernel(
    query_u, query_v, key, value, rel_k, rel_q, rel_v, rel_bias, key_mask, key_lengths, mask, offsets, seed, grad_output,
    delta, base, inverse, edges, grad_key, grad_value, key_sums,
    query_strides, key_strides, value_strides, rel_k_strides, rel_q_strides, rel_v_strides, rel_bias_strides,
    key_mask_strides, mask_strides, grad_strides, grad_key_strides, grad_value_strides,
    heads, group, queries, keys, key_blocks, table_rows, query_offset, first, last, left, scale, log2_scale, hidden_from,
    threshold, keep_scale,
    CLIPPED: tl.constexpr, LATE: tl.constexpr, DROPOUT: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_VALUE_SIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (key block of a key head of a batch element); `heads` counts query heads. key_sums (B, H, Lk) float32 or None gets the score
    gradients summed over the queries."""
    key_heads = heads // group
    key_start = tl.program_id(0) % key_blocks * BLOCK
    batch, key_head = tl.program_id(0) // key_blocks // key_heads, tl.program_id(0) // key_blocks % key_heads
    batch64, key_head64 = batch.to(tl.int64), key_head.to(tl.int64)

    first, last, table_start = distances(offsets, batch, query_offset, first, last, left)
    key_stop = keys
    if key_lengths is not None:
        key_stop = tl.minimum(tl.load(key_lengths + batch).to(tl.int64), keys).to(tl.int32)
    if key_mask is not None:
        key_mask += batch64 * key_mask_strides[0]
    drawn = 0
    if DROPOUT:
        drawn = tl.load(seed)
    key_tile = load_rows(
        key + batch64 * key_strides[0] + key_head64 * key_strides[1], key_start, key_stop, (key_strides[2], key_strides[3]),
        SIZE, BLOCK, BLOCK_SIZE,
    )  # fmt: skip
    value_tile = load_rows(
        value + batch64 * value_strides[0] + key_head64 * value_strides[1], key_start, key_stop, (value_strides[2], value_strides[3]),
        VALUE_SIZE, BLOCK, BLOCK_VALUE_SIZE,
    )  # fmt: skip

    total_key, total_value = tl.zeros((BLOCK, BLOCK_SIZE), tl.float32), tl.zeros((BLOCK, BLOCK_VALUE_SIZE), tl.float32)
    for member in tl.range(0, group):
        head = key_head * group + member
        head64 = head.to(tl.int64)
        rows = (batch64 * heads + head64) * queries
        head_rel_k, head_rel_q, head_rel_v, head_rel_bias, head_mask, head_inverse = rel_k, rel_q, rel_v, rel_bias, mask, inverse
        if rel_k is not None:
            head_rel_k = rel_k + head64 * rel_k_strides[0]
        if rel_q is not None:
            head_rel_q = rel_q + head64 * rel_q_strides[0]
        if rel_v is not None:
            head_rel_v = rel_v + head64 * rel_v_strides[0]
        if rel_bias is not None:
            head_rel_bias = rel_bias + head64 * rel_bias_strides[0]
        if mask is not None:
            head_mask = mask + batch64 * mask_strides[0] + head64 * mask_strides[1]
        if inverse is not None:
            head_inverse = inverse + rows
        head_edges, side = edges, (tl.num_programs(0) // key_blocks * group).to(tl.int64) * queries
        if CLIPPED:
            head_edges = edges + rows
        head_v = query_v
        if query_v is not None:
            head_v = query_v + batch64 * query_strides[0] + head64 * query_strides[1]
        sums = tl.zeros((BLOCK,), tl.float32)
        total_key, total_value, sums = _key_walk(
            total_key, total_value, sums, key_tile, value_tile,
            query_u + batch64 * query_strides[0] + head64 * query_strides[1], head_v,
            grad_output + batch64 * grad_strides[0] + head64 * grad_strides[1], base + rows, head_inverse, delta + rows, head_edges, side,
            head_rel_k, head_rel_q, head_rel_v, head_rel_bias, key_mask, head_mask,
            (query_strides[2], query_strides[3]), (grad_strides[2], grad_strides[3]),
            (rel_k_strides[1], rel_k_strides[2]), (rel_q_strides[1], rel_q_strides[2]), (rel_v_strides[1], rel_v_strides[2]),
            rel_bias_strides[1], key_mask_strides[1], mask_strides,
            key_start, queries, key_stop, first, last, table_start, table_rows, log2_scale, hidden_from,
            drawn, threshold, keep_scale, batch, head,
            CLIPPED, LATE, key_sums is not None, DROPOUT, SIZE, VALUE_SIZE, BLOCK, BLOCK_SIZE, BLOCK_VALUE_SIZE, PRECISION,
        )  # fmt: skip
        if key_sums is not None:
            column = key_start + tl.arange(0, BLOCK)
            tl.store(key_sums + (batch64 * heads + head64) * keys + column, sums, mask=column < keys)
    store_rows(
        grad_key + batch64 * grad_key_strides[0] + key_head64 * grad_key_strides[1], total_key * scale, key_start, keys,
        (grad_key_strides[2], grad_key_strides[3]), SIZE, BLOCK, BLOCK_SIZE,
    )  # fmt: skip
    store_rows(
        grad_value + batch64 * grad_value_strides[0] + key_head64 * grad_value_strides[1], total_value * keep_scale, key_start, keys,
        (grad_value_strides[2], grad_value_strides[3]), VALUE_SIZE, BLOCK, BLOCK_VALUE_SIZE,
    )  # fmt: skip
