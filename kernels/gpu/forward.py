"""The forward pass: one program computes BLOCK queries of one head against their keys, as FlashAttention does, with the relative terms
inside the loop. Nothing but the output and its log-sum-exp is written.

From one block of keys to the next the window of the table moves on by one block: what was its high block becomes its low one, so
rel_k takes a single product more per tile than plain attention. Where tables are clipped (CLIPPED), tiles that lie so far to one side that
all their distances belong to the tables' first or last row take no such product, but a number per query; in the few others both blocks
are computed.

Scores are kept in units of ln 2, so that weights are powers of two; with LATE they are multiplied into these units only in the exponent.
"""

import triton
import triton.language as tl

from .tile import add_dot, dot, dropout_keep, in_low, load_bias, load_rows, load_window, mask_scores, skew, store_rows, unskew

# Sizes and offsets change from call to call: their values must not make new kernels.
SIZES = [
    "heads", "group", "queries", "keys", "query_blocks", "split_keys", "table_rows", "query_offset", "first", "last", "left",
    "threshold", "splits", "rows",
]  # fmt: skip


@triton.jit
def relative_window(
    content, rel_k, rel_bias, first, table_rows, rel_k_strides, rel_bias_stride, log2_scale,
    LATE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of a window: content.rel_k^T (query, distance) plus rel_bias."""
    if rel_k is not None:
        table = load_window(rel_k, first, table_rows, rel_k_strides, SIZE, BLOCK, BLOCK_SIZE)
        window = dot(content, tl.trans(table), PRECISION)
        if not LATE:
            window = window * log2_scale
        if rel_bias is not None:
            window += load_bias(rel_bias, first, table_rows, rel_bias_stride, BLOCK)[None, :]
    else:
        window = tl.zeros((BLOCK, BLOCK), tl.float32) + load_bias(rel_bias, first, table_rows, rel_bias_stride, BLOCK)[None, :]
    return window


@triton.jit
def tile_scores(
    query_u, query_v, key, low, edge_left, edge_right, rel_k, rel_q, rel_bias, rel_k_strides, rel_q_strides, rel_bias_stride,
    first, key_start, near, beyond, table_rows, log2_scale,
    CLIPPED: tl.constexpr, LATE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(query, key), and the window's high block. `low`: its low block. Tiles before `near` and from `beyond` on are far ones."""
    high = low
    if rel_k is None and rel_bias is None:
        scores = dot(query_u, tl.trans(key), PRECISION)
        if not LATE:
            scores = scores * log2_scale
    elif CLIPPED:
        scores = dot(query_u, tl.trans(key), PRECISION)
        if not LATE:
            scores = scores * log2_scale
        if (key_start >= near) & (key_start < beyond):
            block = relative_window(
                query_v, rel_k, rel_bias, first, table_rows, rel_k_strides, rel_bias_stride, log2_scale,
                LATE, SIZE, BLOCK, BLOCK_SIZE, PRECISION,
            )  # fmt: skip
            following = relative_window(
                query_v, rel_k, rel_bias, first + BLOCK, table_rows, rel_k_strides, rel_bias_stride, log2_scale,
                LATE, SIZE, BLOCK, BLOCK_SIZE, PRECISION,
            )  # fmt: skip
            scores += skew(block, following, BLOCK, True, True)
        else:
            scores += tl.where(key_start < near, edge_left, edge_right)[:, None]
    else:
        high = relative_window(
            query_v, rel_k, rel_bias, first + BLOCK, table_rows, rel_k_strides, rel_bias_stride, log2_scale,
            LATE, SIZE, BLOCK, BLOCK_SIZE, PRECISION,
        )  # fmt: skip
        if LATE:
            scores = add_dot(query_u, tl.trans(key), skew(low, high, BLOCK, True, True), PRECISION)
        else:
            scores = dot(query_u, tl.trans(key), PRECISION) * log2_scale + skew(low, high, BLOCK, True, True)
    if rel_q is not None:
        before = dot(load_window(rel_q, first, table_rows, rel_q_strides, SIZE, BLOCK, BLOCK_SIZE), tl.trans(key), PRECISION)
        after = dot(load_window(rel_q, first + BLOCK, table_rows, rel_q_strides, SIZE, BLOCK, BLOCK_SIZE), tl.trans(key), PRECISION)
        by_key = skew(before, after, BLOCK, False, False)
        scores += by_key if LATE else by_key * log2_scale
    return scores, high


@triton.jit
def edge_scores(
    query_v, rel_k, rel_bias, row, rel_k_strides, rel_bias_stride, log2_scale,
    LATE: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """What row `row` of the tables adds to the scores of each query."""
    edge = tl.zeros((query_v.shape[0],), tl.float32)
    if rel_k is not None:
        column = tl.arange(0, BLOCK_SIZE)
        entry = tl.load(rel_k + tl.cast(row, tl.int64) * rel_k_strides[0] + column * rel_k_strides[1], mask=column < SIZE, other=0.0)
        edge += tl.sum(query_v.to(tl.float32) * entry.to(tl.float32)[None, :], axis=1)
        if not LATE:
            edge = edge * log2_scale
    if rel_bias is not None:
        edge += tl.load(rel_bias + tl.cast(row, tl.int64) * rel_bias_stride).to(tl.float32) * 1.4426950408889634
    return edge


@triton.jit
def key_ranges(
    query_start, queries, key_stop, first_distance, last_distance, table_start, table_rows, CLIPPED: tl.constexpr, BLOCK: tl.constexpr
):
    """Keys start ... stop that some of the queries see, and in between where tiles far to the left end and those far to the right begin.

    All but `stop` are multiples of BLOCK. `table_start`: the distance (key index minus query index) of the tables' first row.
    """
    last_query = tl.minimum(query_start + BLOCK, queries) - 1
    start = tl.minimum(tl.maximum(query_start + first_distance, 0), key_stop)
    stop = tl.maximum(tl.minimum(last_query + last_distance + 1, key_stop), start)
    start = (start // BLOCK * BLOCK).to(tl.int32)
    stop = stop.to(tl.int32)
    near, beyond = start, stop
    if CLIPPED:
        # Far to the left: key_start + BLOCK - 1 - query_start <= table_start. To the right: key_start - last query >= its last row.
        end = tl.maximum(query_start + table_start + 1, start) // BLOCK * BLOCK
        near = tl.minimum(end, (stop + BLOCK - 1) // BLOCK * BLOCK).to(tl.int32)
        begin = tl.maximum(query_start + BLOCK - 1 + table_start + table_rows - 1 + BLOCK - 1, near) // BLOCK * BLOCK
        beyond = tl.minimum(begin, tl.maximum((stop + BLOCK - 1) // BLOCK * BLOCK, near)).to(tl.int32)
    return start, near, beyond, stop


@triton.jit
def _shifted(bound, offset):
    """bound + offset, cut to 2^30, more than indices differ by. Both may be as large as 2^62, and a bound beyond that is none."""
    half = (bound >> 1) + (offset >> 1)
    near = tl.minimum(tl.maximum(bound + offset, -(1 << 30)), 1 << 30)
    far = tl.where((bound > (1 << 62)) | ((bound >= -(1 << 62)) & (half > 0)), 1 << 30, -(1 << 30))
    return tl.where((tl.abs(half) < (1 << 40)) & (tl.abs(bound) <= (1 << 62)), near, far)


@triton.jit
def distances(offsets, batch, query_offset, first, last, left):
    """Key index minus query index of one batch element: the first and the last distance seen, and that of the tables' first row.

    `first` and `last` hold query_offset already, `offsets` comes on top of it.
    """
    offset = tl.cast(0, tl.int64)
    if offsets is not None:
        offset += tl.load(offsets + batch).to(tl.int64)
    table_start = offset + query_offset - left
    return _shifted(tl.cast(first, tl.int64), offset), _shifted(tl.cast(last, tl.int64), offset), table_start


@triton.jit
def is_whole(query_start, key_start, key_stop, first_distance, last_distance, BLOCK: tl.constexpr):
    """Whether every query of a tile sees every key of it, masks aside."""
    return (
        (key_start >= 0)
        & (key_start + BLOCK <= key_stop)
        & (key_start - (query_start + BLOCK - 1) >= first_distance)
        & (key_start + BLOCK - 1 - query_start <= last_distance)
    )


@triton.jit
def walk_keys(
    total, highest, norm, query_u, query_v, key, value, rel_k, rel_q, rel_v, rel_bias, key_mask, mask,
    key_strides, value_strides, rel_k_strides, rel_q_strides, rel_v_strides, rel_bias_stride, key_mask_stride, mask_strides,
    begin, end, query_start, queries, key_stop, first_distance, last_distance, table_start, table_rows, log2_scale, hidden_from,
    seed, threshold, batch, head,
    CLIPPED: tl.constexpr, LATE: tl.constexpr, VALUES: tl.constexpr, DROPOUT: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_VALUE_SIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries against those keys of begin ... end that some of them see: (sum of values, highest score, sum of weights)."""
    start, near, beyond, stop = key_ranges(
        query_start, queries, key_stop, first_distance, last_distance, table_start, table_rows, CLIPPED, BLOCK
    )
    start, stop = tl.maximum(start, begin), tl.minimum(stop, end)
    low, left, right = total, highest, highest
    if rel_k is not None or rel_bias is not None:
        if CLIPPED:
            left = edge_scores(query_v, rel_k, rel_bias, 0, rel_k_strides, rel_bias_stride, log2_scale, LATE, SIZE, BLOCK_SIZE)
            right = edge_scores(
                query_v, rel_k, rel_bias, table_rows - 1, rel_k_strides, rel_bias_stride, log2_scale, LATE, SIZE, BLOCK_SIZE
            )
        else:
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
        unit = log2_scale if LATE else 1.0
        new_highest = tl.maximum(highest, tl.max(scores, axis=1) * unit)
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores * unit - base[:, None])
        shrink = tl.exp2(highest - base)
        norm = norm * shrink + tl.sum(weights, axis=1)
        highest = new_highest
        if VALUES:
            if DROPOUT:
                keep = dropout_keep(seed, threshold, batch, head, query_start, key_start, BLOCK, False, True)
                weights = tl.where(keep, weights, 0.0)  # scaled at the end, in float32
            weights = weights.to(value.dtype.element_ty)
            value_tile = load_rows(value, key_start, key_stop, value_strides, VALUE_SIZE, BLOCK, BLOCK_VALUE_SIZE)
            total = add_dot(weights, value_tile, total * shrink[:, None], PRECISION)
            if rel_v is not None:
                by_distance = unskew(weights, weights, BLOCK, True, True)
                inside = in_low(BLOCK, True, True)
                table = load_window(rel_v, first, table_rows, rel_v_strides, VALUE_SIZE, BLOCK, BLOCK_VALUE_SIZE)
                total = add_dot(tl.where(inside, by_distance, 0.0).to(weights.dtype), table, total, PRECISION)
                table = load_window(rel_v, first + BLOCK, table_rows, rel_v_strides, VALUE_SIZE, BLOCK, BLOCK_VALUE_SIZE)
                total = add_dot(tl.where(inside, 0.0, by_distance).to(weights.dtype), table, total, PRECISION)
    return total, highest, norm


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    query_u, query_v, key, value, rel_k, rel_q, rel_v, rel_bias, key_mask, key_lengths, mask, offsets, seed, output, lse,
    query_strides, key_strides, value_strides, rel_k_strides, rel_q_strides, rel_v_strides, rel_bias_strides,
    key_mask_strides, mask_strides, output_strides,
    heads, group, queries, keys, query_blocks, split_keys, table_rows, query_offset, first, last, left, log2_scale, hidden_from,
    threshold, keep_scale,
    CLIPPED: tl.constexpr, LATE: tl.constexpr, DROPOUT: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_VALUE_SIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (query block of a head of a batch element, split of the keys). Shapes as in relattn.arguments.Tensors.

    query_v is None where it equals query_u. lse (splits, B, H, Lq) and output (splits, B, H, Lq, Dv) are partial where there is more than
    one split; output_strides has five entries. `first` and `last`, the distances (key index minus query index) seen, as in `distances`.
    """
    # The last blocks first: under a causal mask they see the most keys.
    query_start = (query_blocks - 1 - tl.program_id(0) % query_blocks) * BLOCK
    batch, head = tl.program_id(0) // query_blocks // heads, tl.program_id(0) // query_blocks % heads
    split = tl.program_id(1)
    batch64, head64, key_head = batch.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)

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

    total = tl.zeros((BLOCK, BLOCK_VALUE_SIZE), tl.float32)
    highest, norm = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
    total, highest, norm = walk_keys(
        total, highest, norm, tile_u, tile_v,
        key + batch64 * key_strides[0] + key_head * key_strides[1], value + batch64 * value_strides[0] + key_head * value_strides[1],
        rel_k, rel_q, rel_v, rel_bias, key_mask, mask, (key_strides[2], key_strides[3]), (value_strides[2], value_strides[3]),
        (rel_k_strides[1], rel_k_strides[2]), (rel_q_strides[1], rel_q_strides[2]), (rel_v_strides[1], rel_v_strides[2]),
        rel_bias_strides[1], key_mask_strides[1], mask_strides,
        split * split_keys, (split + 1) * split_keys, query_start, queries, key_stop, first, last, table_start, table_rows,
        log2_scale, hidden_from, drawn, threshold, batch, head,
        CLIPPED, LATE, True, DROPOUT, SIZE, VALUE_SIZE, BLOCK, BLOCK_SIZE, BLOCK_VALUE_SIZE, PRECISION,
    )  # fmt: skip
    # A query that sees nothing: output 0 and -inf.
    total = total * tl.where(norm == 0.0, 0.0, (keep_scale if DROPOUT else 1.0) / norm)[:, None]
    log_sum = (tl.where(highest == float("-inf"), 0.0, highest) + tl.log2(norm)) * 0.6931471805599453
    slot = split.to(tl.int64)
    output += slot * output_strides[0] + batch64 * output_strides[1] + head64 * output_strides[2]
    store_rows(
        output, total, query_start, queries, (output_strides[3], output_strides[4]), VALUE_SIZE, BLOCK, BLOCK_VALUE_SIZE
    )
    lse += slot * (tl.num_programs(0) // query_blocks).to(tl.int64) * queries + (batch64 * heads + head64) * queries
    row = query_start + tl.arange(0, BLOCK)
    tl.store(lse + row, log_sum, mask=row < queries)


@triton.jit(do_not_specialize=SIZES)
def combine_kernel(
    partial, partial_lse, output, lse, output_strides, heads, queries, splits, rows,
    VALUE_SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_VALUE_SIZE: tl.constexpr,
):  # fmt: skip
    """Joins the splits of `forward_kernel`, in their order: partial (splits, B, H, Lq, Dv) and partial_lse (splits, B, H, Lq), float32."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_VALUE_SIZE)
    inside, full = row < rows, (row < rows)[:, None] & (column < VALUE_SIZE)[None, :]
    total = tl.zeros((BLOCK, BLOCK_VALUE_SIZE), tl.float32)
    highest, norm = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for split in tl.range(0, splits):
        part = tl.load(partial_lse + split * rows + row, mask=inside, other=float("-inf"))
        values = tl.load(partial + ((split * rows + row) * VALUE_SIZE)[:, None] + column[None, :], mask=full, other=0.0)
        new_highest = tl.maximum(highest, part, propagate_nan=tl.PropagateNan.ALL)
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        shrink, weight = tl.exp(highest - base), tl.exp(part - base)
        total = total * shrink[:, None] + values * weight[:, None]
        norm = norm * shrink + weight
        highest = new_highest
    total = total * tl.where(norm == 0.0, 0.0, 1.0 / norm)[:, None]
    batch, head, index = row // queries // heads, row // queries % heads, row % queries
    output += batch * output_strides[0] + head * output_strides[1] + index * output_strides[2]
    tl.store(output[:, None] + column[None, :] * output_strides[3], total.to(output.dtype.element_ty), mask=full)
    log_sum = tl.where(highest == float("-inf"), 0.0, highest) + tl.log(norm)
    tl.store(lse + row, log_sum, mask=inside)
