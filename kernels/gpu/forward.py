"""The forward pass: one program computes BLOCK queries of one head against their keys, as FlashAttention does, with the relative terms
inside the loop. Nothing but the output and its log-sum-exp is written.

From one block of keys to the next the window of the table moves on by one block: what was its high block becomes its low one, so
rel_k takes a single product more per tile than plain attention. Where tables are clipped (CLIPPED), tiles that lie so far to one side that
all their distances belong to the tables' first or last row take no such product, but a number per query: they have a loop of their own,
before that of the tiles in between.

Scores are kept in units of ln 2, so that weights are powers of two; with LATE they are multiplied into these units only in the exponent.
"""

import triton
import triton.language as tl

from .operands import (
    SIZES,
    Dropout,
    Matrix,
    Queries,
    Span,
    Steps,
    Tables,
    Visible,
    all_rows,
    at,
    begin_of,
    chunk_bounds,
    chunks_of,
    length_of,
    program_of,
    rows_before,
)
from .tile import (
    add_counted,
    add_dot,
    dot,
    dropout_keep,
    hide,
    in_low,
    in_registers,
    load_bias,
    load_rows,
    load_window,
    skew,
    store_rows,
    strange_rows,
    unskew,
)


@triton.jit
def relative_window(content, tables, first, units, TILE: tl.constexpr):
    """One block of a window: content.rel_k^T (query, distance) plus rel_bias."""
    if tables.rel_k is not None:
        table = load_window(tables.rel_k, first, tables.rows, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
        window = dot(content, tl.trans(table), TILE)
        if not TILE.LATE:
            window = window * units.log2_scale
        if tables.rel_bias is not None:
            window += load_bias(tables.rel_bias, first, tables.rows, TILE.BLOCK)[None, :]
    else:
        window = tl.full((TILE.BLOCK, TILE.BLOCK), 0.0, tl.float32)
        window += load_bias(tables.rel_bias, first, tables.rows, TILE.BLOCK)[None, :]
    return window


@triton.jit
def tile_scores(query, key, low, tables, first, nought, units, FAR: tl.constexpr, TILE: tl.constexpr):
    """Scores (query, key) but for what is hidden, and the window's high block, the next tile's low one.

    low: the window's low block; first: the tables' row where it begins; nought: see `skew`. FAR: without a window, the caller adds a number
    per query.
    """
    high = low
    if (tables.rel_k is None and tables.rel_bias is None) or FAR:
        scores = dot(query.u, tl.trans(key), TILE)
        if not TILE.LATE:
            scores = scores * units.log2_scale
    else:
        high = relative_window(query.v, tables, first + TILE.BLOCK, units, TILE)
        if TILE.LATE:
            scores = add_dot(query.u, tl.trans(key), skew(low, high, nought, TILE.BLOCK, True, True), TILE)
        else:
            scores = dot(query.u, tl.trans(key), TILE) * units.log2_scale + skew(low, high, nought, TILE.BLOCK, True, True)
    if tables.rel_q is not None:
        table = load_window(tables.rel_q, first, tables.rows, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
        before = dot(table, tl.trans(key), TILE)
        table = load_window(tables.rel_q, first + TILE.BLOCK, tables.rows, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
        after = dot(table, tl.trans(key), TILE)
        by_key = skew(before, after, nought, TILE.BLOCK, False, False)
        scores += by_key if TILE.LATE else by_key * units.log2_scale
    return scores, high


@triton.jit
def edge_scores(query_v, tables, row, units, TILE: tl.constexpr):
    """What row `row` of the tables adds to the scores of each query."""
    edge = tl.full((query_v.shape[0],), 0.0, tl.float32)
    if tables.rel_k is not None:
        column = tl.arange(0, TILE.COLUMNS)
        address = tables.rel_k.base + tl.cast(row, tl.int64) * tables.rel_k.row + column * tables.rel_k.column
        entry = tl.load(address, mask=column < TILE.SIZE, other=0.0)
        edge += tl.sum(query_v.to(tl.float32) * entry.to(tl.float32)[None, :], axis=1)
        if not TILE.LATE:
            edge = edge * units.log2_scale
    if tables.rel_bias is not None:
        edge += tl.load(tables.rel_bias.base + tl.cast(row, tl.int64) * tables.rel_bias.row).to(tl.float32) * 1.4426950408889634
    return edge


@triton.jit
def key_ranges(query_start, visible, tables, TILE: tl.constexpr):
    """Keys that some of the queries see, and where tiles far to the left end and those far to the right begin.

    All but `stop` are multiples of BLOCK.
    """
    BLOCK: tl.constexpr = TILE.BLOCK
    last_query = tl.minimum(query_start + BLOCK, visible.queries) - 1
    start = tl.minimum(tl.maximum(query_start + visible.first, 0), visible.key_stop)
    stop = tl.minimum(last_query + visible.last + 1, visible.key_stop)
    if visible.chunks is not None:
        begin, _end = chunk_bounds(query_start, visible.chunks)
        _begin, end = chunk_bounds(last_query, visible.chunks)
        start = tl.minimum(tl.maximum(start, begin), visible.key_stop)
        stop = tl.minimum(stop, end)
    stop = tl.maximum(stop, start)
    start = (start // BLOCK * BLOCK).to(tl.int32)
    stop = stop.to(tl.int32)
    near, beyond = start, stop
    if TILE.CLIPPED:
        # Far to the left: key_start + BLOCK - 1 - query_start <= tables.start. To the right: key_start - last query >= its last row.
        end = tl.maximum(query_start + tables.start + 1, start) // BLOCK * BLOCK
        near = tl.minimum(end, (stop + BLOCK - 1) // BLOCK * BLOCK).to(tl.int32)
        begin = tl.maximum(query_start + BLOCK - 1 + tables.start + tables.rows - 1 + BLOCK - 1, near) // BLOCK * BLOCK
        beyond = tl.minimum(begin, tl.maximum((stop + BLOCK - 1) // BLOCK * BLOCK, near)).to(tl.int32)
    return Span(start, near, beyond, stop)


@triton.jit
def steps_of(start, stop, span, FAR: tl.constexpr, TILE: tl.constexpr):
    """Of the tiles start ... stop of a span: the far ones of both sides, or those in between."""
    turn, jump = stop, 0
    if FAR:
        near, beyond = tl.minimum(span.near, stop), tl.maximum(span.beyond, start)
        turn = start + (tl.maximum(near - start, 0) + TILE.BLOCK - 1) // TILE.BLOCK * TILE.BLOCK
        jump = beyond - turn
        stop = turn + tl.maximum(stop - beyond, 0)
    elif TILE.CLIPPED:
        start, stop = tl.maximum(span.near, start), tl.minimum(span.beyond, stop)
    return Steps(start, turn, jump, stop)


@triton.jit
def _shifted(bound, offset):
    """bound + offset, cut to 2^30, more than indices differ by. Both may be as large as 2^62, and a bound beyond that is none."""
    half = (bound >> 1) + (offset >> 1)
    near = tl.minimum(tl.maximum(bound + offset, -(1 << 30)), 1 << 30)
    far = tl.where((bound > (1 << 62)) | ((bound >= -(1 << 62)) & (half > 0)), 1 << 30, -(1 << 30))
    return tl.where((tl.abs(half) < (1 << 40)) & (tl.abs(bound) <= (1 << 62)), near, far)


@triton.jit
def offsets_of(inputs, batch, keys, table_start, first, last):
    """Of one batch element, as key index minus query index: the first and the last distance seen, and that of the tables' first row. And
    where its keys end."""
    offset = tl.cast(0, tl.int64)
    if inputs.offsets is not None:
        offset += tl.load(inputs.offsets + batch).to(tl.int64)
    key_stop = keys
    if inputs.key_lengths is not None:
        key_stop = tl.minimum(tl.load(inputs.key_lengths + batch).to(tl.int64), keys).to(tl.int32)
    return _shifted(tl.cast(first, tl.int64), offset), _shifted(tl.cast(last, tl.int64), offset), offset + table_start, key_stop


@triton.jit
def drawn_seed(inputs, TILE: tl.constexpr):
    seed = 0
    if TILE.DROPOUT:
        seed = tl.load(inputs.seed)
    return seed


@triton.jit
def window_start(query_start, key_start, tables, BLOCK: tl.constexpr):
    """The tables' row where the window of a tile begins."""
    return key_start - query_start - (BLOCK - 1) - tables.start


@triton.jit
def queries_in_registers(query, TILE: tl.constexpr):
    """Heads up to 64 leave registers for it."""
    if TILE.COLUMNS <= 64:
        u = in_registers(query.u, TILE)
        v = in_registers(query.v, TILE)
        query = Queries(u, v)
    return query


@triton.jit
def load_queries(queries, start, stop, TILE: tl.constexpr):
    """Tiles of what is Matrix, or None, in `queries`."""
    u = load_rows(queries.u, start, stop, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
    v = u
    if queries.v is not None:
        v = load_rows(queries.v, start, stop, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
    return Queries(u, v)


@triton.jit
def walk_keys(
    total, highest, norm, query, query_start, key, value, tables, visible, dropout, begin, end, units,
    CAREFUL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Queries against those keys of begin ... end that some of them see: (sum of values, highest score, sum of weights).

    key, value: Matrix. Without a value the first of these is what it was. CAREFUL: what is hidden may hold anything.
    """
    span = key_ranges(query_start, visible, tables, TILE)
    begin, end = tl.maximum(span.start, begin), tl.minimum(span.stop, end)
    for FAR in tl.static_range(1 if TILE.CLIPPED else 0, -1, -1):
        steps = steps_of(begin, end, span, FAR, TILE)
        low, edge = total, tl.full((TILE.BLOCK,), 0.0, tl.float32)
        if FAR:
            left = edge_scores(query.v, tables, 0, units, TILE)
            right = edge_scores(query.v, tables, tables.rows - 1, units, TILE)
        elif tables.rel_k is not None or tables.rel_bias is not None:
            low = relative_window(query.v, tables, window_start(query_start, steps.start, tables, TILE.BLOCK), units, TILE)
        for step in tl.range(steps.start, steps.stop, TILE.BLOCK):
            key_start = step
            if FAR:
                key_start += tl.where(step >= steps.turn, steps.jump, 0)
                edge = tl.where(step < steps.turn, left, right)
            first = window_start(query_start, key_start, tables, TILE.BLOCK)
            key_tile = load_rows(key, key_start, visible.key_stop, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
            scores, low = tile_scores(query, key_tile, low, tables, first, 0, units, FAR, TILE)
            scores = hide(scores, query_start, key_start, visible, TILE.BLOCK, False)
            unit = units.log2_scale if TILE.LATE else 1.0
            here = tl.max(scores, axis=1) + edge
            if CAREFUL:
                here = tl.where(tl.max(scores, axis=1) == float("-inf"), float("-inf"), here)
            new_highest = tl.maximum(highest, here * unit)
            base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
            weights = tl.exp2(scores * unit - (base - edge * unit)[:, None])
            if CAREFUL:
                weights = tl.where(scores == float("-inf"), 0.0, weights)
            shrink = tl.exp2(highest - base)
            norm = norm * shrink + tl.sum(weights, axis=1)
            highest = new_highest
            if value is not None:
                if TILE.DROPOUT:
                    keep = dropout_keep(dropout, query_start, key_start, TILE.BLOCK, False, True)
                    weights = tl.where(keep, weights, 0.0)  # scaled at the end, in float32
                weights = weights.to(value.base.dtype.element_ty)
                value_tile = load_rows(value, key_start, visible.key_stop, TILE.VALUE_SIZE, TILE.VALUE_COLUMNS, TILE.BLOCK)
                total = add_counted(weights, value_tile, total * shrink[:, None], CAREFUL, TILE)
                if tables.rel_v is not None:
                    total = add_by_distance(
                        weights, tables.rel_v, first, tables.rows, total, TILE.VALUE_SIZE, TILE.VALUE_COLUMNS, True, True, CAREFUL, TILE
                    )
    return total, highest, norm


@triton.jit
def add_by_distance(
    tile, table, first, rows, total,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, QUERY: tl.constexpr, CAREFUL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """total plus the tile, un-skewed, times the table's rows."""
    by_distance = unskew(tile, tile, 0, TILE.BLOCK, ROWS, QUERY)
    inside = in_low(TILE.BLOCK, ROWS, QUERY)
    window = load_window(table, first, rows, SIZE, COLUMNS, TILE.BLOCK)
    total = add_counted(tl.where(inside, by_distance, 0.0).to(tile.dtype), window, total, CAREFUL, TILE)
    window = load_window(table, first + TILE.BLOCK, rows, SIZE, COLUMNS, TILE.BLOCK)
    return add_counted(tl.where(inside, 0.0, by_distance).to(tile.dtype), window, total, CAREFUL, TILE)


@triton.jit
def hides_strange(queries, value, query_start, begin, end, tables, visible, units, TILE: tl.constexpr):
    """Whether a tile that not all queries see whole holds a value that is not finite, or what it needs of a table does. Of the others, what
    comes into the sums was seen."""
    found = tl.full((TILE.BLOCK,), 0, tl.int32)
    left, right = end, end
    MASKED: tl.constexpr = visible.key_mask is not None or visible.mask is not None
    if not MASKED:
        # To the left the tiles whose first key the last query does not see, to the right those whose last key the first one does not.
        first_key, stop_key = query_start + TILE.BLOCK - 1 + visible.first, query_start + visible.last + 1
        if visible.chunks is not None:
            chunk_begin, _end = chunk_bounds(query_start + TILE.BLOCK - 1, visible.chunks)
            _begin, chunk_end = chunk_bounds(query_start, visible.chunks)
            first_key, stop_key = tl.maximum(first_key, chunk_begin), tl.minimum(stop_key, chunk_end)
        left = tl.maximum(tl.minimum(first_key, end), begin).to(tl.int32)
        left = begin + (left - begin + TILE.BLOCK - 1) // TILE.BLOCK * TILE.BLOCK
        right = tl.minimum(tl.maximum(stop_key - TILE.BLOCK, left), end + TILE.BLOCK).to(tl.int32)
        right = begin + (right - begin + TILE.BLOCK - 1) // TILE.BLOCK * TILE.BLOCK
        if tables.rel_v is not None:  # a window has a row more than its tile, of the next one
            right = tl.maximum(tl.minimum(right - TILE.BLOCK, (end - 1) // TILE.BLOCK * TILE.BLOCK), left)
    for step in tl.range(begin, left + tl.maximum(end - right, 0), TILE.BLOCK, num_stages=1):
        key_start = step + tl.where(step >= left, right - left, 0)
        tile = load_rows(value, key_start, visible.key_stop, TILE.VALUE_SIZE, TILE.VALUE_COLUMNS, TILE.BLOCK)
        found = found | strange_rows(tile).to(tl.int32)
        if tables.rel_v is not None:
            first = window_start(query_start, key_start, tables, TILE.BLOCK)
            for HALF in tl.static_range(2):
                window = first + HALF * TILE.BLOCK
                tile = load_window(tables.rel_v, window, tables.rows, TILE.VALUE_SIZE, TILE.VALUE_COLUMNS, TILE.BLOCK)
                found = found | strange_rows(tile).to(tl.int32)
    if TILE.CLIPPED:
        query = load_queries(queries, query_start, visible.queries, TILE)
        for SIDE in tl.static_range(2):
            edge = edge_scores(query.v, tables, (tables.rows - 1) * SIDE, units, TILE)
            found = found | tl.where(edge * 0.0 != 0.0, 1, 0)
    return tl.max(found, axis=0) > 0


@triton.jit
def _attend(
    query, query_start, split, key, value, tables, visible, dropout, output, lse, rows, units, split_keys,
    CAREFUL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`forward_kernel` from its loop on. output, lse: of this head and the first split; rows: of a split."""
    queries = visible.queries
    query = load_queries(query, query_start, queries, TILE)
    query = queries_in_registers(query, TILE)
    total = tl.full((TILE.BLOCK, TILE.VALUE_COLUMNS), 0.0, tl.float32)
    highest, norm = tl.full((TILE.BLOCK,), float("-inf"), tl.float32), tl.full((TILE.BLOCK,), 0.0, tl.float32)
    total, highest, norm = walk_keys(
        total, highest, norm, query, query_start, key, value, tables, visible, dropout,
        split * split_keys, (split + 1) * split_keys, units, CAREFUL, TILE,
    )  # fmt: skip
    # A query that sees nothing: output 0 and -inf.
    total = total * tl.where(norm == 0.0, 0.0, (units.keep_scale if TILE.DROPOUT else 1.0) / norm)[:, None]
    log_sum = (tl.where(highest == float("-inf"), 0.0, highest) + tl.log2(norm)) * 0.6931471805599453
    before = split * rows
    here = Matrix(output.base + before * TILE.VALUE_SIZE, output.row, output.column)
    store_rows(here, total, query_start, queries, TILE.VALUE_SIZE, TILE.VALUE_COLUMNS, TILE.BLOCK)
    row = query_start + tl.arange(0, TILE.BLOCK)
    tl.store(lse + before + row, log_sum, mask=row < queries)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    inputs, output, lse, units, batches, heads, group, queries, keys, split_keys, table_rows, table_start, first, last, threshold,
    HIDES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (query block of a head of a batch element, split of the keys).

    lse (splits, B, H, Lq) and output (splits, B, H, Lq, Dv), contiguous, are partial where there is more than one split; `output` is the
    Operand of the first. Of packed sequences (operands.Inputs) `queries` and `keys` count all tokens and `batches` the sequences. `first`
    and `last`, the distances (key index minus query index) seen, and table_start, that of the tables' first row, hold the call's
    query_offset already. HIDES: a key that one query sees may be hidden from another.
    """
    block, _blocks, batch, head = program_of(tl.program_id(0), 0, inputs.query_ends, batches, heads, queries, True, TILE.BLOCK)
    query_start = block * TILE.BLOCK
    split = tl.program_id(1)
    from_query = begin_of(inputs.query_ends, batch)
    from_key = begin_of(inputs.key_ends, batch)
    own, own_keys = length_of(inputs.query_ends, batch, queries), length_of(inputs.key_ends, batch, keys)
    if inputs.query_ends is not None:
        own_keys = tl.where(query_start < own, own_keys, 0)

    nearest, farthest, start, key_stop = offsets_of(inputs, batch, own_keys, table_start, first, last)
    visible = Visible(
        nearest, farthest, own, key_stop, at(inputs.key_mask, batch, head, from_key), at(inputs.mask, batch, head), units.hidden_from,
        chunks_of(inputs, batch),
    )
    tables = Tables(
        at(inputs.rel_k, batch, head), at(inputs.rel_q, batch, head), at(inputs.rel_v, batch, head), at(inputs.rel_bias, batch, head),
        table_rows, start,
    )  # fmt: skip
    query = Queries(at(inputs.query_u, batch, head, from_query), at(inputs.query_v, batch, head, from_query))
    key, value = at(inputs.key, batch, head // group, from_key), at(inputs.value, batch, head // group, from_key)
    dropout = Dropout(drawn_seed(inputs, TILE), threshold, units.keep_scale, batch, head, inputs.origin)

    to, to_lse = at(output, batch, head, from_query), lse + rows_before(inputs.query_ends, batch, head, heads, queries)
    rows = all_rows(inputs.query_ends, batches, heads, queries)
    careful = False
    if HIDES:
        span = key_ranges(query_start, visible, tables, TILE)
        begin, end = tl.maximum(span.start, split * split_keys), tl.minimum(span.stop, (split + 1) * split_keys)
        careful = hides_strange(query, value, query_start, begin, end, tables, visible, units, TILE)
    if careful:
        _attend(
            query, query_start, split, key, value, tables, visible, dropout, to, to_lse, rows, units, split_keys, True, TILE,
        )  # fmt: skip
    else:
        _attend(
            query, query_start, split, key, value, tables, visible, dropout, to, to_lse, rows, units, split_keys, False, TILE,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def combine_kernel(partial, partial_lse, output, lse, heads, queries, splits, rows, TILE: tl.constexpr):
    """Joins the splits of `forward_kernel`, in their order: partial (splits, B, H, Lq, Dv) and partial_lse (splits, B, H, Lq), float32."""
    row = tl.program_id(0).to(tl.int64) * TILE.BLOCK + tl.arange(0, TILE.BLOCK)
    column = tl.arange(0, TILE.VALUE_COLUMNS)
    inside, full = row < rows, (row < rows)[:, None] & (column < TILE.VALUE_SIZE)[None, :]
    total = tl.full((TILE.BLOCK, TILE.VALUE_COLUMNS), 0.0, tl.float32)
    highest, norm = tl.full((TILE.BLOCK,), float("-inf"), tl.float32), tl.full((TILE.BLOCK,), 0.0, tl.float32)
    for split in tl.range(0, splits):
        part = tl.load(partial_lse + split * rows + row, mask=inside, other=float("-inf"))
        values = tl.load(partial + ((split * rows + row) * TILE.VALUE_SIZE)[:, None] + column[None, :], mask=full, other=0.0)
        new_highest = tl.maximum(highest, part, propagate_nan=tl.PropagateNan.ALL)
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        shrink, weight = tl.exp(highest - base), tl.exp(part - base)
        total = total * shrink[:, None] + values * weight[:, None]
        norm = norm * shrink + weight
        highest = new_highest
    total = total * tl.where(norm == 0.0, 0.0, 1.0 / norm)[:, None]
    batch, head, index = row // queries // heads, row // queries % heads, row % queries
    place = output.base + batch * output.batch + head * output.head + index * output.row
    tl.store(place[:, None] + column[None, :] * output.column, total.to(output.base.dtype.element_ty), mask=full)
    log_sum = tl.where(highest == float("-inf"), 0.0, highest) + tl.log(norm)
    tl.store(lse + row, log_sum, mask=inside)
