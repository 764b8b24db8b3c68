"""Gradients of the tables, without atomics: one program keeps one diagonal of tiles.

Tiles whose first key minus first query is the same have the same window of distances, so its two blocks of the table's gradient are summed
in registers while the program walks the queries of its share of heads and batch elements. Each program writes its sums to a place of its
own; the caller adds them up in a fixed order, and folds the distances beyond the tables into the edge rows.
"""

import triton
import triton.language as tl

from .backward import transposed_tile
from .forward import SIZES, distances
from .tile import add_dot, in_low, load_rows, load_window, store_rows, unskew


@triton.jit
def _diagonal_walk(
    total_low, total_high, sums_low, sums_high, low, high, query_u, query_v, key, value, grad_output, base, inverse, delta,
    rel_q, rel_v, rel_bias, key_mask, mask,
    row_strides, key_strides, value_strides, grad_row_strides, rel_q_strides, rel_v_strides, rel_bias_stride, key_mask_stride, mask_strides,
    start, stop, step, lead, queries, key_stop, first_distance, last_distance, first, table_rows, log2_scale, hidden_from,
    seed, threshold, keep_scale, batch, head,
    TABLE: tl.constexpr, LATE: tl.constexpr, SUMS: tl.constexpr, ALIGNED: tl.constexpr, DROPOUT: tl.constexpr,
    SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_VALUE_SIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Blocks of queries start, start + step ... stop against the keys that stand `lead` further."""
    for query_start in tl.range(start, stop, step):
        key_start = query_start + lead
        tile_u = load_rows(query_u, query_start, queries, row_strides, SIZE, BLOCK, BLOCK_SIZE)
        tile_v = tile_u
        if query_v is not None:
            tile_v = load_rows(query_v, query_start, queries, row_strides, SIZE, BLOCK, BLOCK_SIZE)
        slopes = load_rows(grad_output, query_start, queries, grad_row_strides, VALUE_SIZE, BLOCK, BLOCK_VALUE_SIZE)
        key_tile = load_rows(key, key_start, key_stop, key_strides, SIZE, BLOCK, BLOCK_SIZE)
        value_tile = load_rows(value, key_start, key_stop, value_strides, VALUE_SIZE, BLOCK, BLOCK_VALUE_SIZE)
        weights, grad = transposed_tile(
            key_tile, value_tile, tile_u, tile_v, slopes, base, inverse, delta, None, 0, low, high,
            None, rel_q, rel_v, rel_bias, key_mask, mask,
            rel_q_strides, rel_q_strides, rel_v_strides, rel_bias_stride, key_mask_stride, mask_strides,
            query_start, key_start, queries, key_stop, first_distance, last_distance, first, 0, 0, table_rows, log2_scale, hidden_from,
            seed, threshold, keep_scale, batch, head,
            False, LATE, ALIGNED, DROPOUT, SIZE, VALUE_SIZE, BLOCK, BLOCK_SIZE, BLOCK_VALUE_SIZE, PRECISION,
        )  # fmt: skip
        if TABLE == "rel_q":  # the content is the key: (key, distance)
            half = grad.to(key_tile.dtype)
            by_distance = unskew(half, half, BLOCK, True, False)
            inside = in_low(BLOCK, True, False)
            part = tl.where(inside, by_distance, 0.0).to(key_tile.dtype)
            total_low = add_dot(tl.trans(part), key_tile, total_low, PRECISION)
            part = tl.where(inside, 0.0, by_distance).to(key_tile.dtype)
            total_high = add_dot(tl.trans(part), key_tile, total_high, PRECISION)
        else:  # (distance, query)
            inside = in_low(BLOCK, False, True)
            if TABLE == "rel_v":
                content = slopes
                half = weights.to(content.dtype)
                by_distance = unskew(half, half, BLOCK, False, True)
            elif SUMS:
                content = tile_v
                by_distance = unskew(grad, grad, BLOCK, False, True)
                sums_low += tl.sum(tl.where(inside, by_distance, 0.0), axis=1)
                sums_high += tl.sum(tl.where(inside, 0.0, by_distance), axis=1)
            else:
                content = tile_v
                half = grad.to(content.dtype)
                by_distance = unskew(half, half, BLOCK, False, True)
            if TABLE != "sums":
                part = tl.where(inside, by_distance, 0.0).to(content.dtype)
                total_low = add_dot(part, content, total_low, PRECISION)
                part = tl.where(inside, 0.0, by_distance).to(content.dtype)
                total_high = add_dot(part, content, total_high, PRECISION)
    return total_low, total_high, sums_low, sums_high


@triton.jit(do_not_specialize=[*SIZES, "diagonals", "first_diagonal", "shared_heads", "batches", "chunk"])
def table_gradient_kernel(
    query_u, query_v, key, value, rel_k, rel_q, rel_v, rel_bias, key_mask, key_lengths, mask, offsets, seed, grad_output,
    delta, base, inverse, partial, partial_sums,
    query_strides, key_strides, value_strides, rel_k_strides, rel_q_strides, rel_v_strides, rel_bias_strides,
    key_mask_strides, mask_strides, grad_strides,
    heads, group, queries, keys, batch, diagonals, first_diagonal, shared_heads, batches, chunk,
    table_rows, query_offset, first, last, left, log2_scale, hidden_from, threshold, keep_scale,
    TABLE: tl.constexpr, LATE: tl.constexpr, ABSORB: tl.constexpr, FAR: tl.constexpr, FAR_BLOCK: tl.constexpr, DROPOUT: tl.constexpr,
    SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_VALUE_SIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (diagonal, `shared_heads` heads, split): `chunk` queries of `batches` batch elements, the splits of one batch element lying
    together. TABLE: "rel_k", "rel_q" or "rel_v", or "sums" for no table at all.

    partial (splits, heads / shared_heads, diagonals, 2 BLOCK, D) and, for rel_k and "sums", partial_sums (splits, heads, diagonals,
    2 BLOCK) or None, float32: the gradient, and the sum of the score gradients, by distance. Unscaled, also by what dropout leaves.
    The window of diagonal t of `diagonals` begins at distance (first_diagonal + t) BLOCK - (BLOCK - 1), key index minus query index, minus
    the batch element's own offset (`offsets`). With ABSORB the first and the last diagonal stand for all those beyond them too. With FAR,
    which excludes that, pairs of a query and a key are left out that lie in a tile of FAR_BLOCK, a multiple of BLOCK, far from the tables.
    """
    # Diagonals from the middle outwards: the longest ones first.
    place = tl.program_id(0)
    index = diagonals // 2 + tl.where(place % 2 == 0, place // 2, -(place // 2) - 1)
    if diagonals % 2 == 0:
        index = diagonals // 2 + tl.where(place % 2 == 0, -(place // 2) - 1, place // 2)
    split, head_group = tl.program_id(2), tl.program_id(1)
    chunks = (queries + chunk - 1) // chunk
    first_batch, query_begin = split // chunks * batches, split % chunks * chunk
    COLUMNS: tl.constexpr = BLOCK_VALUE_SIZE if TABLE == "rel_v" else BLOCK_SIZE
    ROW_SIZE: tl.constexpr = VALUE_SIZE if TABLE == "rel_v" else SIZE
    PHASES: tl.constexpr = FAR_BLOCK // BLOCK
    drawn = 0
    if DROPOUT:
        drawn = tl.load(seed)

    table_start = tl.cast(query_offset, tl.int64) - left
    total_low, total_high = tl.zeros((BLOCK, COLUMNS), tl.float32), tl.zeros((BLOCK, COLUMNS), tl.float32)
    slot = split.to(tl.int64)
    for member in tl.range(0, shared_heads):
        head = head_group * shared_heads + member
        head64, key_head = head.to(tl.int64), (head // group).to(tl.int64)
        sums_low, sums_high = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        head_rel_q, head_rel_v, head_rel_bias, head_mask = rel_q, rel_v, rel_bias, mask
        if rel_q is not None:
            head_rel_q = rel_q + head64 * rel_q_strides[0]
        if rel_v is not None:
            head_rel_v = rel_v + head64 * rel_v_strides[0]
        if rel_bias is not None:
            head_rel_bias = rel_bias + head64 * rel_bias_strides[0]
        for element in tl.range(first_batch, tl.minimum(first_batch + batches, batch)):
            batch64 = tl.cast(element, tl.int64)
            first_distance, last_distance, _ = distances(offsets, element, query_offset, first, last, left)
            shift = tl.cast(0, tl.int64)
            if offsets is not None:
                shift = tl.load(offsets + element).to(tl.int64)
            key_stop = keys
            if key_lengths is not None:
                key_stop = tl.minimum(tl.load(key_lengths + element).to(tl.int64), keys).to(tl.int32)
            if mask is not None:
                head_mask = mask + batch64 * mask_strides[0] + head64 * mask_strides[1]
            head_key_mask = key_mask
            if key_mask is not None:
                head_key_mask = key_mask + batch64 * key_mask_strides[0]
            rows = (batch64 * heads + head64) * queries
            head_inverse = inverse
            if inverse is not None:
                head_inverse = inverse + rows
            head_v = query_v
            if query_v is not None:
                head_v = query_v + batch64 * query_strides[0] + head64 * query_strides[1]
            lowest = (index + first_diagonal).to(tl.int64)
            highest = lowest
            if ABSORB:  # all that have tiles, from the last query and the first key to the first query and the last key
                if index == 0:
                    lowest = tl.minimum(lowest, (-queries - shift) // BLOCK - 2)
                    highest = tl.minimum(highest, (keys - shift) // BLOCK + 2)
                if index == diagonals - 1:
                    lowest = tl.maximum(lowest, (-queries - shift) // BLOCK - 2)
                    highest = tl.maximum(highest, (keys - shift) // BLOCK + 2)
            for diagonal in tl.range(lowest, highest + 1):
                lead = diagonal * BLOCK + shift
                window = diagonal * BLOCK - (BLOCK - 1) - table_start
                # Tiles with a key and a query, whose distances lead - BLOCK < d < lead + BLOCK some query may see.
                start = tl.maximum(query_begin, (tl.maximum(1 - BLOCK - lead, 0) + BLOCK - 1) // BLOCK * BLOCK)
                stop = tl.minimum(tl.minimum(query_begin + chunk, queries), key_stop - lead)
                seen = (lead + BLOCK - 1 >= first_distance) & (lead - (BLOCK - 1) <= last_distance) & (stop > start)
                for phase in tl.static_range(PHASES):
                    begin = start + ((phase * BLOCK - start) % FAR_BLOCK + FAR_BLOCK) % FAR_BLOCK
                    if FAR:  # the tile of FAR_BLOCK around this one
                        around = (phase * BLOCK + lead + 16 * FAR_BLOCK * queries) // FAR_BLOCK * FAR_BLOCK - 16 * FAR_BLOCK * queries
                        seen_here = seen & (around + FAR_BLOCK - 1 > table_start) & (around - FAR_BLOCK + 1 < table_start + table_rows - 1)
                    else:
                        seen_here = seen
                    if seen_here & (stop > begin):
                        low, high = None, None
                        if rel_k is not None:
                            strides = (rel_k_strides[1], rel_k_strides[2])
                            low = load_window(rel_k + head64 * rel_k_strides[0], window, table_rows, strides, SIZE, BLOCK, BLOCK_SIZE)
                            high = load_window(
                                rel_k + head64 * rel_k_strides[0], window + BLOCK, table_rows, strides, SIZE, BLOCK, BLOCK_SIZE
                            )  # fmt: skip
                        total_low, total_high, sums_low, sums_high = _diagonal_walk(
                            total_low, total_high, sums_low, sums_high, low, high,
                            query_u + batch64 * query_strides[0] + head64 * query_strides[1], head_v,
                            key + batch64 * key_strides[0] + key_head * key_strides[1],
                            value + batch64 * value_strides[0] + key_head * value_strides[1],
                            grad_output + batch64 * grad_strides[0] + head64 * grad_strides[1], base + rows, head_inverse, delta + rows,
                            head_rel_q, head_rel_v, head_rel_bias, head_key_mask, head_mask,
                            (query_strides[2], query_strides[3]), (key_strides[2], key_strides[3]), (value_strides[2], value_strides[3]),
                            (grad_strides[2], grad_strides[3]), (rel_q_strides[1], rel_q_strides[2]), (rel_v_strides[1], rel_v_strides[2]),
                            rel_bias_strides[1], key_mask_strides[1], mask_strides,
                            begin.to(tl.int32), stop.to(tl.int32), FAR_BLOCK, lead.to(tl.int32), queries, key_stop,
                            first_distance, last_distance, window, table_rows, log2_scale, hidden_from,
                            drawn, threshold, keep_scale, element, head,
                            TABLE, LATE, partial_sums is not None, offsets is None, DROPOUT, SIZE, VALUE_SIZE,
                            BLOCK, BLOCK_SIZE, BLOCK_VALUE_SIZE, PRECISION,
                        )  # fmt: skip
        if partial_sums is not None:
            place64 = ((slot * heads + head64) * diagonals + index) * (2 * BLOCK)
            tl.store(partial_sums + place64 + tl.arange(0, BLOCK), sums_low)
            tl.store(partial_sums + place64 + BLOCK + tl.arange(0, BLOCK), sums_high)
    if TABLE != "sums":
        partial += ((slot * tl.num_programs(1) + head_group) * diagonals + index) * (2 * BLOCK * ROW_SIZE)
        store_rows(partial, total_low, 0, BLOCK, (ROW_SIZE, 1), ROW_SIZE, BLOCK, COLUMNS)
        store_rows(partial + BLOCK * ROW_SIZE, total_high, 0, BLOCK, (ROW_SIZE, 1), ROW_SIZE, BLOCK, COLUMNS)
