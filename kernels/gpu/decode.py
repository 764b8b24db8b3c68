"""One query per sequence, as decoding asks: the forward pass with the query heads that share a key head packed into one tile.

A program has a key head of a batch element and a part of the keys. Its rows are ROWS of the query heads, so that keys and values are read
once for all of them. All rows stand at the same position: a key has one distance, whatever the row, and a tile of keys needs the BLOCK
table rows of its BLOCK distances, without a skew. That asks for one table for all rows: shared by the heads, or of the one head there is.
"""

import triton
import triton.language as tl

from .forward import edge_scores, key_ranges, offsets_of, steps_of
from .operands import SIZES, Matrix, Tables, Visible, at, chunk_bounds, chunks_of
from .tile import add_counted, add_dot, apply_mask, dot, is_whole, load_bias, load_rows, load_window, nothing_of

ROWS = tl.constexpr(16)  # the fewest that matrix units take


@triton.jit
def load_heads(matrix, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """The one row that each head has. matrix.base: a pointer per head, 64-bit offsets of heads that may lie far apart."""
    column = tl.arange(0, COLUMNS)[None, :]
    return tl.load(matrix.base[:, None] + column * matrix.column, mask=column < SIZE, other=0.0)


@triton.jit
def key_scores(query_u, query_v, key, tables, key_start, units, FAR: tl.constexpr, TILE: tl.constexpr):
    """Scores (head, key) in units of ln 2, but for what is hidden. FAR: without rel_k and rel_bias, the caller adds a number per head."""
    first = key_start - tables.start  # the table row of the first key's distance
    scores = dot(query_u, tl.trans(key), TILE)
    if tables.rel_k is not None and not FAR:
        table = load_window(tables.rel_k, first, tables.rows, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
        scores = add_dot(query_v, tl.trans(table), scores, TILE)
    if tables.rel_q is not None:
        table = load_window(tables.rel_q, first, tables.rows, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
        scores += tl.sum(table.to(tl.float32) * key.to(tl.float32), axis=1)[None, :]
    scores = scores * units.log2_scale
    if tables.rel_bias is not None and not FAR:
        bias = Matrix(tables.rel_bias.base[:, None], tables.rel_bias.row, tables.rel_bias.column)
        scores += load_bias(bias, first, tables.rows, TILE.BLOCK)
    return scores


@triton.jit
def hide_keys(scores, key_start, visible, BLOCK: tl.constexpr):
    """As tile.hide; the mask has a pointer per row, since a row is a head."""
    if visible.key_mask is not None or visible.mask is not None or not is_whole(0, key_start, visible, BLOCK):
        scores = _masked(scores, key_start, visible, BLOCK)
    return scores


@triton.jit
def _masked(scores, key_start, visible, BLOCK: tl.constexpr):
    key = (key_start + tl.arange(0, BLOCK))[None, :]  # and its distance from the query, whose index is 0
    key_mask, mask = visible.key_mask, visible.mask
    inside = (key >= 0) & (key < visible.key_stop)
    seen = inside & (key >= visible.first) & (key <= visible.last)
    if key_mask is not None:
        seen = seen & (tl.load(key_mask.base + tl.cast(key, tl.int64) * key_mask.row, mask=inside, other=0) != 0)
    if mask is not None:
        entry = tl.load(mask.base[:, None] + tl.cast(key, tl.int64) * mask.column, mask=inside, other=0)
        seen, scores = apply_mask(seen, scores, entry, visible.hidden_from)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def load_seen(value, key_start, visible, TILE: tl.constexpr):
    """The values of those keys of a tile that some row may see, a mask aside; zeros else."""
    start = tl.maximum(visible.first, 0).to(tl.int32)
    stop = tl.minimum(visible.last + 1, visible.key_stop).to(tl.int32)
    key, column = key_start + tl.arange(0, TILE.BLOCK), tl.arange(0, TILE.VALUE_COLUMNS)
    inside = (key - start).to(tl.uint32) < tl.maximum(stop - start, 0).to(tl.uint32)
    if visible.key_mask is not None:
        address = visible.key_mask.base + tl.cast(key, tl.int64) * visible.key_mask.row
        inside = inside & (tl.load(address, mask=inside, other=0) != 0)
    inside = inside[:, None]
    if TILE.VALUE_SIZE != TILE.VALUE_COLUMNS:
        inside = inside & (column < TILE.VALUE_SIZE)[None, :]
    row = tl.arange(0, TILE.BLOCK)[:, None] * value.row
    return tl.load(value.base + tl.cast(key_start, tl.int64) * value.row + (row + column[None, :] * value.column), mask=inside, other=0.0)


@triton.jit
def _walk(query_u, query_v, key, value, tables, visible, begin, end, units, CAREFUL: tl.constexpr, TILE: tl.constexpr):
    """As forward.walk_keys; rows are heads."""
    total = tl.full((ROWS, TILE.VALUE_COLUMNS), 0.0, tl.float32)
    highest, norm = tl.full((ROWS,), float("-inf"), tl.float32), tl.full((ROWS,), 0.0, tl.float32)
    span = key_ranges(0, visible, tables, TILE)
    begin, end = tl.maximum(span.start, begin), tl.minimum(span.stop, end)
    # Far tiles would read one table row over and over, all programs the same.
    for FAR in tl.static_range(1 if TILE.CLIPPED else 0, -1, -1):
        steps = steps_of(begin, end, span, FAR, TILE)
        left, right = norm, norm
        if FAR:
            left = edge_scores(query_v, tables, 0, units, TILE)
            right = edge_scores(query_v, tables, tables.rows - 1, units, TILE)
        for step in tl.range(steps.start, steps.stop, TILE.BLOCK):
            key_start = step
            if FAR:
                key_start += tl.where(step >= steps.turn, steps.jump, 0)
            key_tile = load_rows(key, key_start, visible.key_stop, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
            scores = key_scores(query_u, query_v, key_tile, tables, key_start, units, FAR, TILE)
            if FAR:
                scores += tl.where(step < steps.turn, left, right)[:, None]
            scores = hide_keys(scores, key_start, visible, TILE.BLOCK)
            new_highest = tl.maximum(highest, tl.max(scores, axis=1))
            base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
            weights = tl.exp2(scores - base[:, None])
            if CAREFUL:
                weights = tl.where(scores == float("-inf"), 0.0, weights)
            shrink = tl.exp2(highest - base)
            norm = norm * shrink + tl.sum(weights, axis=1)
            highest = new_highest
            weights = weights.to(value.base.dtype.element_ty)
            value_tile = load_seen(value, key_start, visible, TILE)
            total = add_counted(weights, value_tile, total * shrink[:, None], CAREFUL, TILE)
            if tables.rel_v is not None:
                table = load_window(
                    tables.rel_v, key_start - tables.start, tables.rows, TILE.VALUE_SIZE, TILE.VALUE_COLUMNS, TILE.BLOCK
                )  # fmt: skip
                total = add_counted(weights, table, total, CAREFUL, TILE)
    return total, highest, norm


@triton.jit(do_not_specialize=SIZES)
def decode_kernel(
    inputs, output, lse, units, batches, heads, group, queries, keys, split_keys, table_rows, table_start, first, last,
    TILE: tl.constexpr,
):  # fmt: skip
    """Program (ROWS of the query heads of a key head of a batch element, split of the keys).

    The arguments are those of `forward_kernel`, with one query; TILE: BLOCK keys, and LATE and DROPOUT are False.
    """
    blocks = tl.cdiv(group, ROWS)
    block, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    key_heads = heads // group
    batch, key_head = pair // key_heads, pair % key_heads
    split = tl.program_id(1)
    place = block * ROWS + tl.arange(0, ROWS)
    own = place < group
    head = key_head * group + tl.minimum(place, group - 1)  # rows beyond the group do its last head's work again

    nearest, farthest, start, key_stop = offsets_of(inputs, batch, keys, table_start, first, last)
    chunks = chunks_of(inputs, batch)
    if chunks is not None:  # the one query's, whose index is 0
        begin, end = chunk_bounds(0, chunks)
        nearest, farthest = tl.maximum(nearest, begin), tl.minimum(farthest, end - 1)
    visible = Visible(
        nearest, farthest, queries, key_stop, at(inputs.key_mask, batch, key_head), at(inputs.mask, batch, head), units.hidden_from, None
    )
    # One table serves all rows: that of the only head, or one with a stride of 0 from head to head. Biases have a pointer per row.
    tables = Tables(
        at(inputs.rel_k, batch, key_head), at(inputs.rel_q, batch, key_head), at(inputs.rel_v, batch, key_head),
        at(inputs.rel_bias, batch, head), table_rows, start,
    )  # fmt: skip
    query_u = load_heads(at(inputs.query_u, batch, head), TILE.SIZE, TILE.COLUMNS)
    query_v = query_u
    if inputs.query_v is not None:
        query_v = load_heads(at(inputs.query_v, batch, head), TILE.SIZE, TILE.COLUMNS)
    key, value, here = at(inputs.key, batch, key_head), at(inputs.value, batch, key_head), at(output, batch, head)

    total, highest, norm = _walk(
        query_u, query_v, key, value, tables, visible, split * split_keys, (split + 1) * split_keys, units, False, TILE
    )
    if visible.mask is not None:  # what else hides a key hides it from all rows, and it is not loaded  # noqa: SIM102 (the compiler's condition)
        if nothing_of(total) != 0.0:
            total, highest, norm = _walk(
                query_u, query_v, key, value, tables, visible, split * split_keys, (split + 1) * split_keys, units, True, TILE
            )  # fmt: skip
    # A query that sees nothing: output 0 and -inf.
    total = total * tl.where(norm == 0.0, 0.0, 1.0 / norm)[:, None]
    log_sum = (tl.where(highest == float("-inf"), 0.0, highest) + tl.log2(norm)) * 0.6931471805599453
    rows = (split * batches * heads).to(tl.int64)  # of the splits before
    column = tl.arange(0, TILE.VALUE_COLUMNS)
    address = (here.base + rows * TILE.VALUE_SIZE)[:, None] + column[None, :] * here.column
    tl.store(address, total.to(here.base.dtype.element_ty), mask=own[:, None] & (column < TILE.VALUE_SIZE)[None, :])
    tl.store(lse + rows + batch * heads + head, log_sum, mask=own)
