"""Gradients of the tables, without atomics.

Where products.py does not serve (clipped tables, rel_q, rel_v, offsets by batch element) one program keeps one diagonal of tiles: those
whose first key minus first query is the same have the same window of distances, so its two blocks of the table's gradient are summed in
registers while the program walks the queries of its share of heads and batch elements. Each program writes its sums to a place of its own;
`table_sum_kernel` adds them up in a fixed order, as it does the sums of products.py, and folds the distances beyond the tables into the
edge rows. It has a program for some rows of a table, which are few where a table is clipped: what many programs left is added up by
`matrix_sum_kernel` before.
"""

import triton
import triton.language as tl

from .backward import is_wild, transposed_tile
from .forward import drawn_seed, load_queries, offsets_of
from .operands import (
    SIZES,
    Dropout,
    Matrix,
    Queries,
    Saved,
    Tables,
    Visible,
    at,
    begin_of,
    chunks_of,
    length_of,
    past,
    rows_before,
)
from .tile import add_counted, in_low, load_rows, load_window, store_rows, unskew


@triton.jit
def _diagonal_walk(
    total_low, total_high, sums_low, sums_high, low, high, queries, key, value, grad_output, saved, tables, window, visible,
    dropout, start, stop, step, lead, units, TABLE: tl.constexpr, SUMS: tl.constexpr, ALIGNED: tl.constexpr, CAREFUL: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Blocks of queries start, start + step ... stop against the keys that stand `lead` further. low, high: rel_k's rows from
    `window` on."""
    for query_start in tl.range(start, stop, step):
        key_start = query_start + lead
        query = load_queries(queries, query_start, visible.queries, TILE)
        slopes = load_rows(grad_output, query_start, visible.queries, TILE.VALUE_SIZE, TILE.VALUE_COLUMNS, TILE.BLOCK)
        key_tile = load_rows(key, key_start, visible.key_stop, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
        value_tile = load_rows(value, key_start, visible.key_stop, TILE.VALUE_SIZE, TILE.VALUE_COLUMNS, TILE.BLOCK)
        weights, grad = transposed_tile(
            key_tile, value_tile, query, slopes, saved, low, high, tables, window, query_start, key_start, visible, dropout, units,
            ALIGNED, False, CAREFUL, TILE,
        )  # fmt: skip
        if TABLE == "rel_q":  # the content is the key: (key, distance)
            half = grad.to(key_tile.dtype)
            by_distance = unskew(half, half, 0, TILE.BLOCK, True, False)
            inside = in_low(TILE.BLOCK, True, False)
            part = tl.where(inside, by_distance, 0.0).to(key_tile.dtype)
            total_low = add_counted(tl.trans(part), key_tile, total_low, CAREFUL, TILE)
            part = tl.where(inside, 0.0, by_distance).to(key_tile.dtype)
            total_high = add_counted(tl.trans(part), key_tile, total_high, CAREFUL, TILE)
        else:  # (distance, query)
            inside = in_low(TILE.BLOCK, False, True)
            if TABLE == "rel_v":
                content = slopes
                half = weights.to(content.dtype)
                by_distance = unskew(half, half, 0, TILE.BLOCK, False, True)
            elif SUMS:
                content = query.v
                by_distance = unskew(grad, grad, 0, TILE.BLOCK, False, True)
                sums_low += tl.sum(tl.where(inside, by_distance, 0.0), axis=1)
                sums_high += tl.sum(tl.where(inside, 0.0, by_distance), axis=1)
            else:
                content = query.v
                half = grad.to(content.dtype)
                by_distance = unskew(half, half, 0, TILE.BLOCK, False, True)
            if TABLE != "sums":
                part = tl.where(inside, by_distance, 0.0).to(content.dtype)
                total_low = add_counted(part, content, total_low, CAREFUL, TILE)
                part = tl.where(inside, 0.0, by_distance).to(content.dtype)
                total_high = add_counted(part, content, total_high, CAREFUL, TILE)
    return total_low, total_high, sums_low, sums_high


@triton.jit(do_not_specialize=SIZES)
def table_gradient_kernel(
    inputs, grad_output, saved, partial, partial_sums, units,
    heads, group, queries, keys, batches, table_rows, table_start, first, last, threshold,
    diagonals, first_diagonal, first_head, shared_heads, chunk_batches, chunk,
    TABLE: tl.constexpr, ABSORB: tl.constexpr, FAR: tl.constexpr, FAR_BLOCK: tl.constexpr, HIDES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (diagonal, `shared_heads` heads of those from first_head on, split): `chunk` queries of `chunk_batches` batch elements, the
    splits of one batch element lying together. TABLE: "rel_k", "rel_q" or "rel_v", or "sums" for no table at all.

    partial (splits, groups of heads, diagonals, 2 BLOCK, D) and, for rel_k and "sums", partial_sums (splits, heads of these groups,
    diagonals, 2 BLOCK) or None, float32: the gradient, and the sum of the score gradients, by distance. Unscaled, also by what dropout
    leaves.
    The window of diagonal t of `diagonals` begins at distance (first_diagonal + t) BLOCK - (BLOCK - 1), key index minus query index, minus
    the batch element's own offset (`offsets`). With ABSORB the first and the last diagonal stand for all those beyond them too. With FAR,
    which excludes that, pairs of a query and a key are left out that lie in a tile of FAR_BLOCK, a multiple of BLOCK, far from the tables.
    """
    # Variables: of arguments, Triton 3.6 forgets the compile-time strides once a loop or an `if` has begun.
    given = inputs
    given_grad = grad_output
    # Diagonals from the middle outwards: the longest ones first.
    BLOCK: tl.constexpr = TILE.BLOCK
    place = tl.program_id(0)
    index = diagonals // 2 + tl.where(place % 2 == 0, place // 2, -(place // 2) - 1)
    if diagonals % 2 == 0:
        index = diagonals // 2 + tl.where(place % 2 == 0, -(place // 2) - 1, place // 2)
    split, head_group = tl.program_id(2), tl.program_id(1)
    chunks = tl.num_programs(2) // tl.cdiv(batches, chunk_batches)
    first_batch, query_begin = split // chunks * chunk_batches, split % chunks * chunk
    COLUMNS: tl.constexpr = TILE.VALUE_COLUMNS if TABLE == "rel_v" else TILE.COLUMNS
    PHASES: tl.constexpr = FAR_BLOCK // BLOCK
    drawn = drawn_seed(given, TILE)

    table_start64 = tl.cast(table_start, tl.int64)
    total_low, total_high = tl.full((BLOCK, COLUMNS), 0.0, tl.float32), tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
    slot = split.to(tl.int64)
    for member in tl.range(0, shared_heads):
        head_here = head_group * shared_heads + member
        head = first_head + head_here
        sums_low, sums_high = tl.full((BLOCK,), 0.0, tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
        for element in tl.range(first_batch, tl.minimum(first_batch + chunk_batches, batches)):
            from_query = begin_of(given.query_ends, element)
            from_key = begin_of(given.key_ends, element)
            own, own_keys = length_of(given.query_ends, element, queries), length_of(given.key_ends, element, keys)
            nearest, farthest, start_here, key_stop = offsets_of(given, element, own_keys, table_start64, first, last)
            shift = tl.cast(0, tl.int64)
            if given.offsets is not None:
                shift = tl.load(given.offsets + element).to(tl.int64)
            rows = rows_before(given.query_ends, element, head, heads, queries)
            visible = Visible(
                nearest, farthest, own, key_stop, at(given.key_mask, element, head, from_key), at(given.mask, element, head),
                units.hidden_from, chunks_of(given, element),
            )  # fmt: skip
            rel_k = at(given.rel_k, element, head)
            tables = Tables(
                None, at(given.rel_q, element, head), at(given.rel_v, element, head), at(given.rel_bias, element, head),
                table_rows, start_here,
            )  # fmt: skip
            wild = False
            if HIDES:
                wild = is_wild(saved.wild, element, head, heads, group, queries, given.query_ends, batches)
            lowest = (index + first_diagonal).to(tl.int64)
            highest = lowest
            if ABSORB:  # all that have tiles, from the last query and the first key to the first query and the last key
                if index == 0:
                    lowest = tl.minimum(lowest, (-own - shift) // BLOCK - 2)
                    highest = tl.minimum(highest, (own_keys - shift) // BLOCK + 2)
                if index == diagonals - 1:
                    lowest = tl.maximum(lowest, (-own - shift) // BLOCK - 2)
                    highest = tl.maximum(highest, (own_keys - shift) // BLOCK + 2)
            for diagonal in tl.range(lowest, highest + 1):
                lead = diagonal * BLOCK + shift
                window = diagonal * BLOCK - (BLOCK - 1) - table_start64
                # Tiles with a key and a query, whose distances lead - BLOCK < d < lead + BLOCK some query may see.
                start = tl.maximum(query_begin, (tl.maximum(1 - BLOCK - lead, 0) + BLOCK - 1) // BLOCK * BLOCK)
                stop = tl.minimum(tl.minimum(query_begin + chunk, own), key_stop - lead)
                seen = (lead + BLOCK - 1 >= nearest) & (lead - (BLOCK - 1) <= farthest) & (stop > start)
                for phase in tl.static_range(PHASES):
                    begin = start + ((phase * BLOCK - start) % FAR_BLOCK + FAR_BLOCK) % FAR_BLOCK
                    if FAR:  # the tile of FAR_BLOCK around this one
                        around = (phase * BLOCK + lead + 16 * FAR_BLOCK * queries) // FAR_BLOCK * FAR_BLOCK - 16 * FAR_BLOCK * queries
                        after, until = around + FAR_BLOCK - 1 > table_start64, around - FAR_BLOCK + 1 < table_start64 + table_rows - 1
                        seen_here = seen & after & until
                    else:
                        seen_here = seen
                    if seen_here & (stop > begin):
                        low, high = None, None
                        if rel_k is not None:
                            low = load_window(rel_k, window, table_rows, TILE.SIZE, TILE.COLUMNS, BLOCK)
                            high = load_window(rel_k, window + BLOCK, table_rows, TILE.SIZE, TILE.COLUMNS, BLOCK)
                        if wild:
                            total_low, total_high, sums_low, sums_high = _diagonal_walk(
                                total_low, total_high, sums_low, sums_high, low, high,
                                Queries(at(given.query_u, element, head, from_query), at(given.query_v, element, head, from_query)),
                                at(given.key, element, head // group, from_key), at(given.value, element, head // group, from_key),
                                at(given_grad, element, head, from_query),
                                Saved(saved.delta + rows, saved.base + rows, past(saved.inverse, rows), None, None), tables, window,
                                visible,
                                Dropout(drawn, threshold, units.keep_scale, element, head, given.origin),
                                begin.to(tl.int32), stop.to(tl.int32), FAR_BLOCK, lead.to(tl.int32), units,
                                TABLE, partial_sums is not None, given.offsets is None, True, TILE,
                            )  # fmt: skip
                        else:
                            total_low, total_high, sums_low, sums_high = _diagonal_walk(
                                total_low, total_high, sums_low, sums_high, low, high,
                                Queries(at(given.query_u, element, head, from_query), at(given.query_v, element, head, from_query)),
                                at(given.key, element, head // group, from_key), at(given.value, element, head // group, from_key),
                                at(given_grad, element, head, from_query),
                                Saved(saved.delta + rows, saved.base + rows, past(saved.inverse, rows), None, None), tables, window,
                                visible,
                                Dropout(drawn, threshold, units.keep_scale, element, head, given.origin),
                                begin.to(tl.int32), stop.to(tl.int32), FAR_BLOCK, lead.to(tl.int32), units,
                                TABLE, partial_sums is not None, given.offsets is None, False, TILE,
                            )  # fmt: skip
        if partial_sums is not None:
            place64 = ((slot * tl.num_programs(1) * shared_heads + head_here) * diagonals + index) * (2 * BLOCK)
            tl.store(partial_sums + place64 + tl.arange(0, BLOCK), sums_low)
            tl.store(partial_sums + place64 + BLOCK + tl.arange(0, BLOCK), sums_high)
    slot = (slot * tl.num_programs(1) + head_group) * diagonals + index
    if TABLE == "rel_v":
        _store_window(partial, slot, total_low, total_high, TILE.VALUE_SIZE, TILE.VALUE_COLUMNS, BLOCK)
    elif TABLE != "sums":
        _store_window(partial, slot, total_low, total_high, TILE.SIZE, TILE.COLUMNS, BLOCK)


@triton.jit
def _store_window(partial, slot, low, high, SIZE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """The two blocks of a window, in the slot that is its own."""
    window = partial + slot * (2 * BLOCK * SIZE)
    store_rows(Matrix(window, SIZE, 1), low, 0, BLOCK, SIZE, COLUMNS, BLOCK)
    store_rows(Matrix(window + BLOCK * SIZE, SIZE, 1), high, 0, BLOCK, SIZE, COLUMNS, BLOCK)


@triton.jit(do_not_specialize=SIZES)
def matrix_sum_kernel(partial, total, numbers, count, step, first_pair, first_table, TILE: tl.constexpr):
    """Program (block of numbers, table, side): of partial (sides, count, numbers) float32 the sum of every step-th matrix from
    (table - first_pair) mod step on, to total (sides, tables, numbers). In the order of the matrices, whatever their number."""
    lane = tl.program_id(0) * TILE.BLOCK + tl.arange(0, TILE.BLOCK)
    table, side = tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    own = partial + side * count * numbers
    held = tl.full((TILE.BLOCK,), 0.0, tl.float32)
    for begin in tl.range((table + first_table + step - first_pair % step) % step, count, 16 * step):
        for index in tl.static_range(16):  # loads that do not wait for one another
            matrix = begin + index * step
            there = tl.where(matrix < count, numbers, 0)
            held += tl.load(own + tl.cast(matrix, tl.int64) * numbers + lane, mask=lane < there, other=0.0)
    tl.store(total + (side * tl.num_programs(1) + table) * numbers + lane, held, mask=lane < numbers)


@triton.jit
def _add_rows(total, matrices, count, first, step, held, row, known, TILE: tl.constexpr):
    """Add the rows of every step-th of `count` matrices (held, D), in their order."""
    column = tl.arange(0, TILE.COLUMNS)
    place = row.to(tl.int64)[:, None] * TILE.SIZE + column[None, :]
    inside = known[:, None] & (column < TILE.SIZE)[None, :]
    fours = first + tl.maximum(count - first + step - 1, 0) // (4 * step) * (4 * step)
    for one in tl.range(first, fours, 4 * step):
        for index in tl.static_range(4):  # loads that do not wait for one another
            offset = tl.cast(one + index * step, tl.int64) * held * TILE.SIZE
            total += tl.load(matrices + offset + place, mask=inside, other=0.0)
    for one in tl.range(fours, count, step):
        total += tl.load(matrices + tl.cast(one, tl.int64) * held * TILE.SIZE + place, mask=inside, other=0.0)
    return total


@triton.jit(do_not_specialize=SIZES)
def table_sum_kernel(
    partial, edges, gradient, scale, count, step, first_pair, distances, seen_begin, seen_end, chunk, first_row,
    pairs, pair_step, first_edge, edge_rows, first_table, table_rows, HALVES: tl.constexpr, ADD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (block of table rows, table): what `partial` holds by distance, summed by table row, times `scale`, to gradient (T, R, D).
    The first two programs of a table have its first and its last row, to which all distances beyond belong.

    partial (count, distances, D) float32. Of two HALVES it is (count, diagonals, 2, chunk, D): the high half of a diagonal and the low
    half of the next one hold the same distances, and these are (diagonals + 1) chunk. Distance x belongs to row x + first_row, and only
    those from seen_begin to before seen_end hold anything; to table t belongs every step-th matrix from (t - first_pair) mod step on.
    edges (2, pairs, edge_rows, D) float32, or None: what far tiles owe to the first and to the last row, to table t of every pair_step-th
    pair from (t - first_edge) mod pair_step on. With ADD the gradient, float32 then, is added to.
    """
    block, table = tl.program_id(0), tl.program_id(1) + first_table
    lane = tl.arange(0, TILE.BLOCK)
    # Of a program in between each lane has a row; of the first and the last row all lanes have distances.
    edge = block < 2
    row = tl.where(edge, (table_rows - 1) * block, (block - 2) * TILE.BLOCK + 1 + lane)
    start = tl.where(edge, seen_begin, (block - 2) * TILE.BLOCK + 1 - first_row)
    stop = tl.minimum(start + TILE.BLOCK, table_rows - 1 - first_row)
    last = tl.where(table_rows == 1, distances, tl.maximum(table_rows - 1 - first_row, 0))
    start = tl.where(block == 1, tl.maximum(last, seen_begin), start)
    stop = tl.where(edge, tl.where((block == 1) | (table_rows == 1), seen_end, tl.minimum(1 - first_row, seen_end)), stop)
    total = tl.full((TILE.BLOCK, TILE.COLUMNS), 0.0, tl.float32)
    first = (table + step - first_pair % step) % step
    for begin in tl.range(start, tl.minimum(stop, distances), TILE.BLOCK):
        distance = begin + lane
        known = (distance >= 0) & (distance < tl.minimum(stop, distances))
        if HALVES == 1:
            total = _add_rows(total, partial, count, first, step, distances, distance, known, TILE)
        else:
            held = 2 * (distances - chunk)
            low = distance + distance // chunk * chunk
            total = _add_rows(total, partial, count, first, step, held, low, known & (low < held), TILE)
            total = _add_rows(total, partial, count, first, step, held, low - chunk, known & (distance >= chunk), TILE)
    if edges is not None:  # noqa: SIM102 (this is the compiler's condition)
        if edge:
            first_pair_of = (table + pair_step - first_edge % pair_step) % pair_step
            for side in tl.range(block, tl.where(table_rows == 1, 2, block + 1)):  # a table of one row has both
                owed = edges + tl.cast(side, tl.int64) * pairs * edge_rows * TILE.SIZE
                for begin in tl.range(0, edge_rows, TILE.BLOCK):
                    known = begin + lane < edge_rows
                    total = _add_rows(total, owed, pairs, first_pair_of, pair_step, edge_rows, begin + lane, known, TILE)
    column = tl.arange(0, TILE.COLUMNS)
    rows = tl.where(edge, tl.minimum(1, table_rows - block), table_rows - 2 - (block - 2) * TILE.BLOCK)
    mask = (lane < rows)[:, None] & (column < TILE.SIZE)[None, :]
    total = tl.where(edge, tl.sum(total, axis=0)[None, :], total) * scale
    place = gradient.base + table.to(tl.int64) * gradient.head + row.to(tl.int64)[:, None] * gradient.row
    place += column[None, :] * gradient.column
    if ADD:
        total += tl.load(place, mask=mask, other=0.0)
    tl.store(place, total.to(gradient.base.dtype.element_ty), mask=mask)
