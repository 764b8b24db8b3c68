"""The backward pass, in kernels that each keep what they sum in registers: no atomics, the same bits every time.

`prepare_kernel` computes a few numbers per query. `query_gradient_kernel` has its queries stay put and walks the keys, as the forward pass
does; `key_gradient_kernel` has its keys stay put and walks the queries. Both recompute the scores. The tables' gradients, and of large
heads all of them, are products of tiles that the former leaves in memory (products.py), or have a walk of their own (tables.py).

With w the weights and do the output's gradient, of a tile: dw = do v^T (+ the skew of do rel_v^T), ds = w (dw - delta), where
delta = sum_j w dw = do.o; then dq = ds k + unskewed(ds) rel_k, dk = ds^T q + unskewed(ds)^T rel_q, dv = w^T do.
"""

import triton
import triton.language as tl

from .forward import (
    add_by_distance,
    drawn_seed,
    edge_scores,
    key_ranges,
    load_queries,
    offsets_of,
    relative_window,
    steps_of,
    tile_scores,
    walk_keys,
    window_start,
)
from .operands import (
    SIZES,
    Dropout,
    Matrix,
    Queries,
    Saved,
    Span,
    Tables,
    Visible,
    all_rows,
    at,
    begin_of,
    chunk_queries,
    chunks_of,
    length_of,
    past,
    program_of,
    rows_before,
    slots_before,
    slots_of,
)
from .tile import (
    add_counted,
    add_dot,
    dot,
    dropout_keep,
    hide,
    load_bias,
    load_rows,
    load_window,
    skew,
    store_rows,
    store_tile,
    unknown_zero,
    unskew,
    wild_rows,
)


@triton.jit
def _wild_keys(found, key, value, tables, key_stop, key_start, key_step, row_start, row_step, TILE: tl.constexpr):
    """found, int32, or whether some of the keys, of the values, or of the tables' rows are wild: every step-th block of them."""
    for start in tl.range(key_start, key_stop, key_step, num_stages=1):
        tile = load_rows(key, start, key_stop, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
        found = found | wild_rows(tile).to(tl.int32)
        tile = load_rows(value, start, key_stop, TILE.VALUE_SIZE, TILE.VALUE_COLUMNS, TILE.BLOCK)
        found = found | wild_rows(tile).to(tl.int32)
    for start in tl.range(row_start, tables.rows, row_step, num_stages=1):
        if tables.rel_k is not None:
            tile = load_rows(tables.rel_k, start, tables.rows, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
            found = found | wild_rows(tile).to(tl.int32)
        if tables.rel_q is not None:
            tile = load_rows(tables.rel_q, start, tables.rows, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
            found = found | wild_rows(tile).to(tl.int32)
    return found


@triton.jit(do_not_specialize=SIZES)
def prepare_kernel(
    inputs, output, grad_output, lse, grad_lse, saved, units, batches, heads, group, queries, keys, table_rows, table_start, first, last,
    HIDES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Per query, what `saved` is of: delta; base and inverse, so that the weights are inverse * 2^(scores - base); edges, what the tables'
    first and last row add to the scores; and for 16 queries each, wild: whether what is hidden, or ignored, may do harm (`is_wild`).

    Queries that see nothing, and those from which no gradient comes, have an infinite base: their weights are 0, whatever they hold.
    base is the log-sum-exp and inverse 1, or not there (None). A row whose scores share a large number (a mask of -1e9) has a log-sum-exp
    that no longer holds the logarithm of its sum: where inverse is there, such rows get their highest score and the sum anew.
    """
    # Variables: of arguments, Triton 3.6 forgets the compile-time strides once a loop or an `if` has begun.
    given, to_output, to_slopes = inputs, output, grad_output
    block, blocks, batch, head = program_of(tl.program_id(0), 0, given.query_ends, batches, heads, queries, False, TILE.BLOCK)
    query_start = block * TILE.BLOCK
    row = query_start + tl.arange(0, TILE.BLOCK)
    place = rows_before(given.query_ends, batch, head, heads, queries) + row
    from_query = begin_of(given.query_ends, batch)
    from_key = begin_of(given.key_ends, batch)
    own, own_keys = length_of(given.query_ends, batch, queries), length_of(given.key_ends, batch, keys)
    if given.query_ends is not None:
        own_keys, blocks = tl.where(query_start < own, own_keys, 0), tl.maximum(blocks, 1)

    values = load_rows(at(to_output, batch, head, from_query), query_start, own, TILE.VALUE_SIZE, TILE.VALUE_COLUMNS, TILE.BLOCK)
    slopes = load_rows(at(to_slopes, batch, head, from_query), query_start, own, TILE.VALUE_SIZE, TILE.VALUE_COLUMNS, TILE.BLOCK)
    sums = tl.sum(values.to(tl.float32) * slopes.to(tl.float32), axis=1)
    log_sum = tl.load(lse + place, mask=row < own, other=0.0)
    sees_none = log_sum == float("-inf")
    owes = tl.max(tl.where(slopes.to(tl.float32) == 0.0, 0, 1), axis=1) > 0  # of no use, unless HIDES
    if grad_lse is not None:
        slope = tl.load(grad_lse + place, mask=row < own, other=0.0)
        sums -= slope
        owes = owes | (slope != 0.0)
    if HIDES:
        sees_none = sees_none | ~owes  # nothing comes from it
    tl.store(saved.delta + place, tl.where(sees_none, 0.0, sums), mask=row < own)
    if HIDES:
        wild = wild_rows(values) | wild_rows(slopes) | (~(tl.abs(log_sum) < 1e15) & (log_sum != float("-inf")))
        # Of the queries only these: the others, if they were wild, would have a wild sum.
        column = tl.arange(0, TILE.COLUMNS)
        content = at(given.query_u, batch, head, from_query)
        address = content.base + row.to(tl.int64)[:, None] * content.row + column[None, :] * content.column
        wild = wild | wild_rows(tl.load(address, mask=(sees_none & (row < own))[:, None] & (column < TILE.SIZE)[None, :], other=0.0))
        found = wild.to(tl.int32)
        _first, _last, _start, key_stop = offsets_of(given, batch, own_keys, table_start, first, last)
        part = head % group * blocks + block  # each of the programs of a key head has some of the keys
        found = _wild_keys(
            found, at(given.key, batch, head // group, from_key), at(given.value, batch, head // group, from_key),
            Tables(at(given.rel_k, batch, head), at(given.rel_q, batch, head), None, None, table_rows, table_start),
            key_stop, part * TILE.BLOCK, group * blocks * TILE.BLOCK, query_start, blocks * TILE.BLOCK, TILE,
        )  # fmt: skip
        to_wild = saved.wild + slots_before(given.query_ends, batches, batch, head, heads, queries, 16) + row // 16
        tl.store(to_wild, (row * 0 + tl.max(found, axis=0)).to(tl.uint8), mask=(row < own) & (row % 16 == 0))

    if TILE.CLIPPED or saved.inverse is not None:
        contents = Queries(at(given.query_u, batch, head, from_query), at(given.query_v, batch, head, from_query))
        query = load_queries(contents, query_start, own, TILE)
        nearest, farthest, start, key_stop = offsets_of(given, batch, own_keys, table_start, first, last)
        tables = Tables(
            at(given.rel_k, batch, head), at(given.rel_q, batch, head), None, at(given.rel_bias, batch, head), table_rows, start
        )
    if TILE.CLIPPED:
        side = all_rows(given.query_ends, batches, heads, queries)
        for SIDE in tl.static_range(2):
            edge = edge_scores(query.v, tables, (table_rows - 1) * SIDE, units, TILE)
            edge = tl.where(sees_none, 0.0, edge)
            tl.store(saved.edges + side * SIDE + place, edge, mask=row < own)

    highest = log_sum * 1.4426950408889634
    if saved.inverse is not None:
        norm = tl.full((TILE.BLOCK,), 1.0, tl.float32)
        if tl.max(tl.where(sees_none, 0.0, tl.abs(log_sum))) > 64.0:
            visible = Visible(
                nearest, farthest, own, key_stop, at(given.key_mask, batch, head, from_key), at(given.mask, batch, head),
                units.hidden_from, chunks_of(given, batch),
            )  # fmt: skip
            _unused, highest, norm = walk_keys(
                sums[:, None], tl.full((TILE.BLOCK,), float("-inf"), tl.float32), tl.full((TILE.BLOCK,), 0.0, tl.float32), query,
                query_start, at(given.key, batch, head // group, from_key), None, tables, visible, None, 0, own_keys, units, True, TILE,
            )  # fmt: skip
            highest = tl.where(highest == float("-inf"), 0.0, highest)
        tl.store(saved.inverse + place, tl.where(norm == 0.0, 0.0, 1.0 / norm), mask=row < own)
    highest = tl.where(highest == float("inf"), float("nan"), highest)
    tl.store(saved.base + place, tl.where(sees_none, float("inf"), highest), mask=row < own)


@triton.jit
def is_wild(wild, batch, head, heads, group, queries, ends=None, batches=1):
    """Whether of a head's queries and keys, or of those of the heads that share its keys, something may be infinite or not a number in
    products with zeros: then the careful loops run."""
    sixteens, lane = tl.cdiv(length_of(ends, batch, queries), 16), tl.arange(0, 256)
    count = group * sixteens
    start = wild + slots_before(ends, batches, batch, head // group * group, heads, queries, 16)
    found = tl.full((256,), 0, tl.int32)
    for index in tl.range(0, count, 256, num_stages=1):
        place = index + lane
        if ends is not None:  # sixteens of other sequences lie between those of one head and of the next
            place = place // sixteens * slots_of(ends, batches, queries, 16) + place % sixteens
        found = found | tl.load(start + place, mask=index + lane < count, other=0).to(tl.int32)
    return tl.max(found, axis=0) > 0


@triton.jit
def _query_walk(
    total, query, query_start, slopes, delta, base, inverse, left, right, kept_tiles, grad_tiles, owed_tiles, first_tile, begin, end,
    key, value, tables, visible, dropout, units, ADD: tl.constexpr, CAREFUL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The queries' gradient but for the far tiles' tables (unless not ADD), and the sums of each row's score gradients far to the left and
    to the right, over keys begin ... end. What is wanted of the tiles goes to memory from `first_tile` on."""
    span = key_ranges(query_start, visible, tables, TILE)
    start, stop = tl.maximum(span.start, begin), tl.minimum(span.stop, end)
    sums_left, sums_right = tl.full((TILE.BLOCK,), 0.0, tl.float32), tl.full((TILE.BLOCK,), 0.0, tl.float32)
    # Its product anew costs less than keeping the window's low block, where the table's rows are loaded anyway.
    AGAIN: tl.constexpr = ADD and TILE.LATE and tables.rel_k is not None and tables.rel_bias is None
    for FAR in tl.static_range(1 if TILE.CLIPPED else 0, -1, -1):
        steps = steps_of(start, stop, span, FAR, TILE)
        low, before, edge = total, tl.full((TILE.BLOCK, TILE.BLOCK), 0.0, query.u.dtype), tl.full((TILE.BLOCK,), 0.0, tl.float32)
        if (tables.rel_k is not None or tables.rel_bias is not None) and not FAR and not AGAIN:
            low = relative_window(query.v, tables, window_start(query_start, steps.start, tables, TILE.BLOCK), units, TILE)
        for step in tl.range(steps.start, steps.stop, TILE.BLOCK):
            key_start = step
            if FAR:
                key_start += tl.where(step >= steps.turn, steps.jump, 0)
                edge = tl.where(step < steps.turn, left, right)
            first = window_start(query_start, key_start, tables, TILE.BLOCK)
            key_tile = load_rows(key, key_start, visible.key_stop, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
            if AGAIN and not FAR:
                table = load_window(tables.rel_k, first, tables.rows, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
                here = dot(query.v, tl.trans(table), TILE)
                scores, _unused = tile_scores(query, key_tile, here, tables, first, unknown_zero(key_start), units, FAR, TILE)
            else:
                scores, low = tile_scores(query, key_tile, low, tables, first, unknown_zero(key_start), units, FAR, TILE)
            scores = hide(scores, query_start, key_start, visible, TILE.BLOCK, False)
            unit = units.log2_scale if TILE.LATE else 1.0
            weights = tl.exp2(scores * unit - (base - edge * unit)[:, None])
            if inverse is not None:
                weights = weights * inverse[:, None]
            if CAREFUL:
                weights = tl.where((scores == float("-inf")) | (base == float("inf"))[:, None], 0.0, weights)
            value_tile = load_rows(value, key_start, visible.key_stop, TILE.VALUE_SIZE, TILE.VALUE_COLUMNS, TILE.BLOCK)
            if tables.rel_v is not None:
                window = load_window(tables.rel_v, first, tables.rows, TILE.VALUE_SIZE, TILE.VALUE_COLUMNS, TILE.BLOCK)
                by_low = dot(slopes, tl.trans(window), TILE)
                window = load_window(tables.rel_v, first + TILE.BLOCK, tables.rows, TILE.VALUE_SIZE, TILE.VALUE_COLUMNS, TILE.BLOCK)
                grad = skew(by_low, dot(slopes, tl.trans(window), TILE), unknown_zero(key_start), TILE.BLOCK, True, True)
                grad = add_dot(slopes, tl.trans(value_tile), grad, TILE)
            else:
                grad = dot(slopes, tl.trans(value_tile), TILE)
            kept = weights
            if TILE.DROPOUT:
                keep = dropout_keep(dropout, query_start, key_start, TILE.BLOCK, False, True)
                grad = tl.where(keep, grad * dropout.keep_scale, 0.0)
                kept = tl.where(keep, weights, 0.0)
            if kept_tiles is not None:
                store_tile(kept_tiles, kept.to(key_tile.dtype), first_tile + (key_start - begin) // TILE.BLOCK, TILE.BLOCK)
            grad = weights * (grad - delta[:, None])
            if CAREFUL:
                grad = tl.where(weights == 0.0, 0.0, grad)
            half = grad.to(key_tile.dtype)
            if grad_tiles is not None:
                store_tile(grad_tiles, half, first_tile + (key_start - begin) // TILE.BLOCK, TILE.BLOCK)
            if FAR:
                row_sums = tl.sum(grad, axis=1)
                sums_left += tl.where(step < steps.turn, row_sums, 0.0)
                sums_right += tl.where(step < steps.turn, 0.0, row_sums)
            elif tables.rel_k is not None:
                # The low block of this window was the high block of the last: what both tiles owe to it.
                owed = unskew(half, before, unknown_zero(key_start), TILE.BLOCK, True, True)
                if owed_tiles is not None:
                    store_tile(owed_tiles, owed, first_tile + (key_start - begin) // TILE.BLOCK, TILE.BLOCK)
                if ADD:
                    if not AGAIN:
                        table = load_window(tables.rel_k, first, tables.rows, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
                    total = add_counted(owed, table, total, CAREFUL, TILE)
                before = half
            if ADD:
                total = add_counted(half, key_tile, total, CAREFUL, TILE)
        if tables.rel_k is not None and not FAR:  # noqa: SIM102 (this is the compiler's condition)
            if steps.stop > steps.start:  # what the last tile owes to the high block of its window
                beyond = (steps.stop - steps.start + TILE.BLOCK - 1) // TILE.BLOCK * TILE.BLOCK + steps.start
                none = tl.full((TILE.BLOCK, TILE.BLOCK), 0.0, before.dtype)
                owed = unskew(none, before, unknown_zero(beyond), TILE.BLOCK, True, True)
                if owed_tiles is not None:
                    store_tile(owed_tiles, owed, first_tile + (beyond - begin) // TILE.BLOCK, TILE.BLOCK)
                if ADD:
                    first = window_start(query_start, beyond, tables, TILE.BLOCK)
                    table = load_window(tables.rel_k, first, tables.rows, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
                    total = add_counted(owed, table, total, CAREFUL, TILE)
    return total, sums_left, sums_right


@triton.jit
def _times(sums, tile):
    """Rows of a tile times a number each, of which 0 leaves out what it meets."""
    return tl.where((sums == 0.0)[:, None], 0.0, sums[:, None] * tile.to(tl.float32))


@triton.jit
def _query_gradient(
    total, query, query_start, slopes, delta, base, inverse, left, right, place, to_query, edge_sums, edge_owed,
    kept_tiles, grad_tiles, owed_tiles, running, columns, key_begin, key_end, key, value, tables, visible, dropout, side, units,
    keys, table_rows, ADD: tl.constexpr, CAREFUL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`query_gradient_kernel` from its loop on."""
    row, queries = query_start + tl.arange(0, TILE.BLOCK), visible.queries
    total, sums_left, sums_right = _query_walk(
        total, query, query_start, slopes, delta, base, inverse, left, right,
        kept_tiles, grad_tiles, owed_tiles, tl.program_id(0).to(tl.int64) * columns, key_begin, key_end,
        key, value, tables, visible, dropout, units, ADD, CAREFUL, TILE,
    )  # fmt: skip
    if TILE.CLIPPED:
        tl.store(edge_sums + place, sums_left, mask=row < queries)
        tl.store(edge_sums + side + place, sums_right, mask=row < queries)
        if edge_owed is not None:
            column = tl.arange(0, TILE.COLUMNS)
            address = edge_owed + tl.program_id(0).to(tl.int64) * TILE.SIZE + column
            tl.store(address, tl.sum(_times(sums_left, query.v), axis=0), mask=column < TILE.SIZE)
            address += tl.num_programs(0).to(tl.int64) * TILE.SIZE
            tl.store(address, tl.sum(_times(sums_right, query.v), axis=0), mask=column < TILE.SIZE)
        if tables.rel_k is not None:
            column = tl.arange(0, TILE.COLUMNS)
            address = tables.rel_k.base + column * tables.rel_k.column
            edge = tl.load(address, mask=column < TILE.SIZE, other=0.0).to(tl.float32)
            total += _times(sums_left, edge[None, :])
            address += tl.cast(table_rows - 1, tl.int64) * tables.rel_k.row
            edge = tl.load(address, mask=column < TILE.SIZE, other=0.0).to(tl.float32)
            total += _times(sums_right, edge[None, :])
    if ADD:
        if key_end >= keys:
            store_rows(to_query, total * units.scale, query_start, queries, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
        elif running is not None:
            sums = Matrix(running + tl.program_id(0).to(tl.int64) * (TILE.BLOCK * TILE.SIZE), TILE.SIZE, 1)
            store_rows(sums, total, 0, TILE.BLOCK, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)



@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    inputs, grad_output, saved, grad_query, edge_sums, edge_owed, kept_tiles, grad_tiles, owed_tiles, running, units,
    batches, heads, group, queries, keys, table_rows, table_start, first, last, threshold, first_pair, columns, key_begin, key_end,
    ADD: tl.constexpr, HIDES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (query block of a head of a batch element, from number first_pair of these on), for keys key_begin ... key_end.

    If CLIPPED, edge_sums (2, B, H, Lq) float32 gets, per query, the score gradients of the keys far to the left and far to the right: what
    the tables' first and last row are owed there; and edge_owed (2, programs, D) float32, or None, these sums times the queries.
    kept_tiles, grad_tiles and owed_tiles (programs, columns, BLOCK x BLOCK), or None, get the weights that dropout keeps, unscaled, the
    scores' gradients, and these by distance: tile c those of the window's low block of key block c, so that there is one more. Tiles of
    which no query sees anything are not written. `running` (programs, BLOCK, D) float32 keeps the sums between the launches for one part of
    the keys and for the next. Without ADD there is no grad_query.
    """
    block, _blocks, batch, head = program_of(tl.program_id(0), first_pair, inputs.query_ends, batches, heads, queries, True, TILE.BLOCK)
    query_start = block * TILE.BLOCK
    row = query_start + tl.arange(0, TILE.BLOCK)
    place = rows_before(inputs.query_ends, batch, head, heads, queries) + row
    from_query = begin_of(inputs.query_ends, batch)
    from_key = begin_of(inputs.key_ends, batch)
    own, own_keys = length_of(inputs.query_ends, batch, queries), length_of(inputs.key_ends, batch, keys)
    if inputs.query_ends is not None:
        own_keys = tl.where(query_start < own, own_keys, 0)

    # Before any `if`: of arguments, Triton 3.6 forgets the compile-time strides then.
    key, value = at(inputs.key, batch, head // group, from_key), at(inputs.value, batch, head // group, from_key)
    to_query = at(grad_query, batch, head, from_query)
    nearest, farthest, start, key_stop = offsets_of(inputs, batch, own_keys, table_start, first, last)
    visible = Visible(
        nearest, farthest, own, key_stop, at(inputs.key_mask, batch, head, from_key), at(inputs.mask, batch, head), units.hidden_from,
        chunks_of(inputs, batch),
    )
    tables = Tables(
        at(inputs.rel_k, batch, head), at(inputs.rel_q, batch, head), at(inputs.rel_v, batch, head), at(inputs.rel_bias, batch, head),
        table_rows, start,
    )  # fmt: skip
    contents = Queries(at(inputs.query_u, batch, head, from_query), at(inputs.query_v, batch, head, from_query))
    query = load_queries(contents, query_start, own, TILE)
    slopes = load_rows(at(grad_output, batch, head, from_query), query_start, own, TILE.VALUE_SIZE, TILE.VALUE_COLUMNS, TILE.BLOCK)
    delta = tl.load(saved.delta + place, mask=row < own, other=0.0)
    base = tl.load(saved.base + place, mask=row < own, other=float("inf"))
    careful = False
    if HIDES and (ADD or TILE.CLIPPED):  # of tiles in memory their products leave out what does not count
        careful = is_wild(saved.wild, batch, head, heads, group, queries, inputs.query_ends, batches)
    inverse = None
    if saved.inverse is not None:
        inverse = tl.load(saved.inverse + place, mask=row < own, other=0.0)
    dropout = Dropout(drawn_seed(inputs, TILE), threshold, units.keep_scale, batch, head, inputs.origin)
    left, right = base, base
    side = all_rows(inputs.query_ends, batches, heads, queries)
    if TILE.CLIPPED:
        left = tl.load(saved.edges + place, mask=row < own, other=0.0)
        right = tl.load(saved.edges + side + place, mask=row < own, other=0.0)

    total = tl.full((TILE.BLOCK, TILE.COLUMNS), 0.0, tl.float32)
    if running is not None:
        sums = Matrix(running + tl.program_id(0).to(tl.int64) * (TILE.BLOCK * TILE.SIZE), TILE.SIZE, 1)
        if key_begin > 0:
            total = load_rows(sums, 0, TILE.BLOCK, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
    if careful:
        _query_gradient(
            total, query, query_start, slopes, delta, base, inverse, left, right, place, to_query, edge_sums, edge_owed,
            kept_tiles, grad_tiles, owed_tiles, running, columns, key_begin, key_end, key, value, tables, visible, dropout, side, units,
            own_keys, table_rows, ADD, True, TILE,
        )  # fmt: skip
    else:
        _query_gradient(
            total, query, query_start, slopes, delta, base, inverse, left, right, place, to_query, edge_sums, edge_owed,
            kept_tiles, grad_tiles, owed_tiles, running, columns, key_begin, key_end, key, value, tables, visible, dropout, side, units,
            own_keys, table_rows, ADD, False, TILE,
        )  # fmt: skip


@triton.jit
def _transposed_window(query_v, low_rows, high_rows, tables, first, units, TILE: tl.constexpr):
    """What rel_k, of which these are the window's two blocks, or None, and rel_bias add to the scores (key, query)."""
    if low_rows is not None:
        low = dot(low_rows, tl.trans(query_v), TILE)
        high = dot(high_rows, tl.trans(query_v), TILE)
        if not TILE.LATE:
            low, high = low * units.log2_scale, high * units.log2_scale
    else:
        low, high = tl.full((TILE.BLOCK, TILE.BLOCK), 0.0, tl.float32), tl.full((TILE.BLOCK, TILE.BLOCK), 0.0, tl.float32)
    if tables.rel_bias is not None:
        low += load_bias(tables.rel_bias, first, tables.rows, TILE.BLOCK)[:, None]
        high += load_bias(tables.rel_bias, first + TILE.BLOCK, tables.rows, TILE.BLOCK)[:, None]
    return skew(low, high, 0, TILE.BLOCK, False, True)


@triton.jit
def transposed_tile(
    key, value, query, slopes, saved, low_rows, high_rows, tables, first, query_start, key_start, visible, dropout, units,
    ALIGNED: tl.constexpr, FAR: tl.constexpr, CAREFUL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile with its keys as rows: (weights that dropout keeps, unscaled, and gradient of the scores), both (key, query) float32.

    key, value, query, slopes: tiles. low_rows, high_rows: the two blocks of rel_k's window, or None; `first`: the tables' row where the
    window begins. FAR: saved.edges stands for all of the window. `saved` is of this head, and read where it is used: every thread needs a
    good part of it, in registers.
    """
    row = query_start + tl.arange(0, TILE.BLOCK)
    if (low_rows is not None or tables.rel_bias is not None) and not FAR:
        window = _transposed_window(query.v, low_rows, high_rows, tables, first, units, TILE)
        if TILE.LATE:
            scores = add_dot(key, tl.trans(query.u), window, TILE)
        else:
            scores = dot(key, tl.trans(query.u), TILE) * units.log2_scale + window
    else:
        scores = dot(key, tl.trans(query.u), TILE)
        if not TILE.LATE:
            scores = scores * units.log2_scale
    if tables.rel_q is not None:
        table = load_window(tables.rel_q, first, tables.rows, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
        low = dot(key, tl.trans(table), TILE)
        table = load_window(tables.rel_q, first + TILE.BLOCK, tables.rows, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
        by_key = skew(low, dot(key, tl.trans(table), TILE), 0, TILE.BLOCK, True, False)
        scores += by_key if TILE.LATE else by_key * units.log2_scale
    scores = hide(scores, query_start, key_start, visible, TILE.BLOCK, True)
    base = tl.load(saved.base + row, mask=row < visible.queries, other=float("inf"))
    none = base
    unit = units.log2_scale if TILE.LATE else 1.0
    if FAR:
        base -= tl.load(saved.edges + row, mask=row < visible.queries, other=0.0) * unit
    weights = tl.exp2(scores * unit - base[None, :])
    if saved.inverse is not None:
        weights = weights * tl.load(saved.inverse + row, mask=row < visible.queries, other=0.0)[None, :]
    if CAREFUL:
        weights = tl.where((scores == float("-inf")) | (none == float("inf"))[None, :], 0.0, weights)
    if tables.rel_v is not None:
        table = load_window(tables.rel_v, first, tables.rows, TILE.VALUE_SIZE, TILE.VALUE_COLUMNS, TILE.BLOCK)
        low = dot(table, tl.trans(slopes), TILE)
        table = load_window(tables.rel_v, first + TILE.BLOCK, tables.rows, TILE.VALUE_SIZE, TILE.VALUE_COLUMNS, TILE.BLOCK)
        grad = skew(low, dot(table, tl.trans(slopes), TILE), 0, TILE.BLOCK, False, True)
        grad = add_dot(value, tl.trans(slopes), grad, TILE)
    else:
        grad = dot(value, tl.trans(slopes), TILE)
    kept = weights
    if TILE.DROPOUT:
        keep = dropout_keep(dropout, query_start, key_start, TILE.BLOCK, True, ALIGNED)
        grad = tl.where(keep, grad * dropout.keep_scale, 0.0)
        kept = tl.where(keep, weights, 0.0)
    grad = weights * (grad - tl.load(saved.delta + row, mask=row < visible.queries, other=0.0)[None, :])
    if CAREFUL:
        grad = tl.where(weights == 0.0, 0.0, grad)
    return kept, grad


@triton.jit
def query_ranges(key_start, visible, tables, TILE: tl.constexpr):
    """Queries that see some of the keys; those before `near` have their keys far to the right, those from `beyond` on far to the left. All
    but `stop` are multiples of BLOCK."""
    BLOCK: tl.constexpr = TILE.BLOCK
    last_key = tl.minimum(key_start + BLOCK, visible.key_stop) - 1
    start = tl.minimum(tl.maximum(key_start - visible.last, 0), visible.queries)
    stop = tl.minimum(last_key - visible.first + 1, visible.queries)
    if visible.chunks is not None:
        begin, end = chunk_queries(key_start, last_key, visible.chunks)
        start = tl.minimum(tl.maximum(start, begin), visible.queries)
        stop = tl.minimum(stop, end)
    none = (stop <= start) | (last_key < key_start)
    start = (start // BLOCK * BLOCK).to(tl.int32)
    stop = tl.where(none, start, stop).to(tl.int32)
    near, beyond = start, stop
    if TILE.CLIPPED:
        # Far to the right: key_start - (query_start + BLOCK - 1) >= last row. To the left: last key - query_start <= tables.start.
        above = (stop + BLOCK - 1) // BLOCK * BLOCK
        end = tl.maximum(key_start + 1 - tables.start - tables.rows + 1, start) // BLOCK * BLOCK
        near = tl.minimum(end, above).to(tl.int32)
        begin = tl.maximum(key_start + BLOCK - 1 - tables.start + BLOCK - 1, near) // BLOCK * BLOCK
        beyond = tl.minimum(begin, tl.maximum(above, near)).to(tl.int32)
    return Span(start, near, beyond, stop)


@triton.jit
def _key_walk(
    grad_key, grad_value, sums, key, value, queries, grad_output, saved, side, key_start, tables, visible, dropout, units,
    SUMS: tl.constexpr, CAREFUL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values (tiles) from the queries (Matrix) of one head."""
    span = query_ranges(key_start, visible, tables, TILE)
    for FAR in tl.static_range(1 if TILE.CLIPPED else 0, -1, -1):
        steps = steps_of(span.start, span.stop, span, FAR, TILE)
        for step in tl.range(steps.start, steps.stop, TILE.BLOCK):
            query_start, here = step, saved
            if FAR:  # the keys lie to the right of the first queries
                query_start += tl.where(step >= steps.turn, steps.jump, 0)
                here = Saved(saved.delta, saved.base, saved.inverse, saved.edges + tl.where(step < steps.turn, side, 0), None)
            first = window_start(query_start, key_start, tables, TILE.BLOCK)
            low, high = None, None
            if tables.rel_k is not None and not FAR:
                low = load_window(tables.rel_k, first, tables.rows, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
                high = load_window(tables.rel_k, first + TILE.BLOCK, tables.rows, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
            query = load_queries(queries, query_start, visible.queries, TILE)
            slopes = load_rows(grad_output, query_start, visible.queries, TILE.VALUE_SIZE, TILE.VALUE_COLUMNS, TILE.BLOCK)
            weights, grad = transposed_tile(
                key, value, query, slopes, here, low, high, tables, first, query_start, key_start, visible, dropout, units,
                True, FAR, CAREFUL, TILE,
            )  # fmt: skip
            grad_value = add_counted(weights.to(slopes.dtype), slopes, grad_value, CAREFUL, TILE)
            if SUMS:
                sums += tl.sum(grad, axis=1)
            half = grad.to(query.u.dtype)
            grad_key = add_counted(half, query.u, grad_key, CAREFUL, TILE)
            if tables.rel_q is not None:
                grad_key = add_by_distance(
                    half, tables.rel_q, first, tables.rows, grad_key, TILE.SIZE, TILE.COLUMNS, True, False, CAREFUL, TILE
                )
    return grad_key, grad_value, sums


@triton.jit
def _key_gradient(
    inputs, grad_output, saved, key, value, key_start, key_stop, batch, key_head, nearest, farthest, start, drawn, batches,
    to_key, to_value, key_sums, units, heads, group, queries, keys, table_rows, threshold, CAREFUL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`key_gradient_kernel` from its loops on."""
    total_key = tl.full((TILE.BLOCK, TILE.COLUMNS), 0.0, tl.float32)
    total_value = tl.full((TILE.BLOCK, TILE.VALUE_COLUMNS), 0.0, tl.float32)
    side = all_rows(inputs.query_ends, batches, heads, queries)
    from_query = begin_of(inputs.query_ends, batch)
    from_key = begin_of(inputs.key_ends, batch)
    own, own_keys = length_of(inputs.query_ends, batch, queries), length_of(inputs.key_ends, batch, keys)
    for member in tl.range(0, group):
        head = key_head * group + member
        rows = rows_before(inputs.query_ends, batch, head, heads, queries)
        visible = Visible(
            nearest, farthest, own, key_stop, at(inputs.key_mask, batch, head, from_key), at(inputs.mask, batch, head),
            units.hidden_from, chunks_of(inputs, batch),
        )  # fmt: skip
        tables = Tables(
            at(inputs.rel_k, batch, head), at(inputs.rel_q, batch, head), at(inputs.rel_v, batch, head), at(inputs.rel_bias, batch, head),
            table_rows, start,
        )  # fmt: skip
        total_key, total_value, sums = _key_walk(
            total_key, total_value, tl.full((TILE.BLOCK,), 0.0, tl.float32), key, value,
            Queries(at(inputs.query_u, batch, head, from_query), at(inputs.query_v, batch, head, from_query)),
            at(grad_output, batch, head, from_query),
            Saved(saved.delta + rows, saved.base + rows, past(saved.inverse, rows), past(saved.edges, rows), None), side,
            key_start, tables, visible,
            Dropout(drawn, threshold, units.keep_scale, batch, head, inputs.origin), units, key_sums is not None, CAREFUL, TILE,
        )  # fmt: skip
        if key_sums is not None:
            column = key_start + tl.arange(0, TILE.BLOCK)
            tl.store(key_sums + rows_before(inputs.key_ends, batch, head, heads, keys) + column, sums, mask=column < own_keys)
    store_rows(to_key, total_key * units.scale, key_start, own_keys, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
    total_value = total_value * units.keep_scale
    store_rows(to_value, total_value, key_start, own_keys, TILE.VALUE_SIZE, TILE.VALUE_COLUMNS, TILE.BLOCK)


@triton.jit(do_not_specialize=SIZES)
def key_gradient_kernel(
    inputs, grad_output, saved, grad_key, grad_value, key_sums, units,
    batches, heads, group, queries, keys, table_rows, table_start, first, last, threshold,
    HIDES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (key block of a key head of a batch element); `heads` counts query heads. key_sums (B, H, Lk) float32 or None gets the score
    gradients summed over the queries."""
    # Variables: of arguments, Triton 3.6 forgets the compile-time strides once a loop or an `if` has begun.
    given = inputs
    given_grad = grad_output
    kept = saved
    to_keys, to_values = grad_key, grad_value
    block, _blocks, batch, key_head = program_of(
        tl.program_id(0), 0, given.key_ends, batches, heads // group, keys, False, TILE.BLOCK
    )  # fmt: skip
    key_start = block * TILE.BLOCK
    from_key = begin_of(given.key_ends, batch)

    own_keys = length_of(given.key_ends, batch, keys)
    nearest, farthest, start, key_stop = offsets_of(given, batch, own_keys, table_start, first, last)
    key = load_rows(at(given.key, batch, key_head, from_key), key_start, key_stop, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
    value = load_rows(at(given.value, batch, key_head, from_key), key_start, key_stop, TILE.VALUE_SIZE, TILE.VALUE_COLUMNS, TILE.BLOCK)
    to_key, to_value = at(to_keys, batch, key_head, from_key), at(to_values, batch, key_head, from_key)
    drawn = drawn_seed(given, TILE)
    careful = False
    if HIDES:
        careful = is_wild(kept.wild, batch, key_head * group, heads, group, queries, given.query_ends, batches)
    if careful:
        _key_gradient(
            given, given_grad, kept, key, value, key_start, key_stop, batch, key_head, nearest, farthest, start, drawn, batches,
            to_key, to_value, key_sums, units, heads, group, queries, keys, table_rows, threshold, True, TILE,
        )  # fmt: skip
    else:
        _key_gradient(
            given, given_grad, kept, key, value, key_start, key_stop, batch, key_head, nearest, farthest, start, drawn, batches,
            to_key, to_value, key_sums, units, heads, group, queries, keys, table_rows, threshold, False, TILE,
        )  # fmt: skip
