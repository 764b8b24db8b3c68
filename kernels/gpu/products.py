"""Gradients as matrix products of tiles that `query_gradient_kernel` left in memory: nothing of them is computed twice.

The launcher cuts the scores into parts, some heads and some keys at a time, so that the tiles of a part fit into a fixed number of bytes.
"""

import triton
import triton.language as tl

from .backward import add_last_owed, query_ranges
from .forward import key_ranges, offsets_of, window_start
from .operands import SIZES, Matrix, Tables, Visible, at
from .tile import add_dot, load_rows, load_tile, load_window, store_rows, unknown_zero, unskew


@triton.jit(do_not_specialize=SIZES)
def key_product_kernel(
    inputs, grad_output, tiles, gradient, key_sums, units,
    heads, group, queries, keys, table_rows, table_start, first, last, first_pair, columns, key_begin, VALUES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Program (key block of the part, key head of a batch element): the values' gradient (VALUES) from the tiles of weights, or the keys'
    from those of the scores' gradients. key_sums (B, H, Lk) float32, or None, gets these summed over the queries."""
    SIZE: tl.constexpr = TILE.VALUE_SIZE if VALUES else TILE.SIZE
    COLUMNS: tl.constexpr = TILE.VALUE_COLUMNS if VALUES else TILE.COLUMNS
    column, blocks = tl.program_id(0), tl.cdiv(queries, TILE.BLOCK)
    key_start = key_begin + column * TILE.BLOCK
    pair = tl.program_id(1) * group + first_pair
    batch, key_head = pair // heads, pair % heads // group
    nearest, farthest, start, key_stop = offsets_of(inputs, batch, keys, table_start, first, last)
    visible = Visible(nearest, farthest, queries, key_stop, None, None, 0.0)
    span = query_ranges(key_start, visible, Tables(None, None, None, None, table_rows, start), TILE)
    total = tl.full((TILE.BLOCK, COLUMNS), 0.0, tl.float32)
    for member in tl.range(0, group):
        head = key_head * group + member
        content = at(grad_output if VALUES else inputs.query_u, batch, head)
        last_row = (tl.program_id(1) * group + member + 1).to(tl.int64) * blocks - 1
        sums = tl.full((TILE.BLOCK,), 0.0, tl.float32)
        for query_start in tl.range(span.start, span.stop, TILE.BLOCK):
            tile = load_tile(tiles, (last_row - query_start // TILE.BLOCK) * columns + column, True, TILE.BLOCK)
            rows = load_rows(content, query_start, queries, SIZE, COLUMNS, TILE.BLOCK)
            total = add_dot(tl.trans(tile), rows, total, TILE)
            if key_sums is not None:
                sums += tl.sum(tile.to(tl.float32), axis=0)
        if key_sums is not None:
            place = key_start + tl.arange(0, TILE.BLOCK)
            tl.store(key_sums + (batch.to(tl.int64) * heads + head) * keys + place, sums, mask=place < keys)
    scale = units.keep_scale if VALUES else units.scale
    store_rows(at(gradient, batch, key_head), total * scale, key_start, keys, SIZE, COLUMNS, TILE.BLOCK)


@triton.jit(do_not_specialize=SIZES)
def query_product_kernel(
    inputs, tiles, running, grad_query, units,
    heads, group, queries, keys, table_rows, table_start, first, last, first_pair, columns, key_begin, key_end, TILE: tl.constexpr,
):  # fmt: skip
    """Program as `query_gradient_kernel`'s: the queries' gradient, `running` between the launches for one part of the keys and the next."""
    blocks = tl.cdiv(queries, TILE.BLOCK)
    query_start = (blocks - 1 - tl.program_id(0) % blocks) * TILE.BLOCK
    pair = tl.program_id(0) // blocks + first_pair
    batch, head = pair // heads, pair % heads
    nearest, farthest, start, key_stop = offsets_of(inputs, batch, keys, table_start, first, last)
    visible = Visible(nearest, farthest, queries, key_stop, None, None, 0.0)
    tables = Tables(at(inputs.rel_k, batch, head), None, None, None, table_rows, start)
    span = key_ranges(query_start, visible, tables, TILE)
    begin, end = tl.maximum(span.start, key_begin), tl.minimum(span.stop, key_end)
    key, first_tile = at(inputs.key, batch, head // group), tl.program_id(0).to(tl.int64) * columns
    sums = Matrix(running + tl.program_id(0).to(tl.int64) * (TILE.BLOCK * TILE.SIZE), TILE.SIZE, 1)
    total = tl.full((TILE.BLOCK, TILE.COLUMNS), 0.0, tl.float32)
    if key_begin > 0:
        total = load_rows(sums, 0, TILE.BLOCK, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
    before = tl.full((TILE.BLOCK, TILE.BLOCK), 0.0, tiles.dtype.element_ty)
    for key_start in tl.range(begin, end, TILE.BLOCK):
        tile = load_tile(tiles, first_tile + (key_start - key_begin) // TILE.BLOCK, True, TILE.BLOCK)
        rows = load_rows(key, key_start, key_stop, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
        total = add_dot(tile, rows, total, TILE)
        table = load_window(
            tables.rel_k, window_start(query_start, key_start, tables, TILE.BLOCK), table_rows, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK
        )
        total = add_dot(unskew(tile, before, unknown_zero(key_start), TILE.BLOCK, True, True), table, total, TILE)
        before = tile
    if end > begin:
        total = add_last_owed(before, begin, end, query_start, tables, total, TILE)
    if key_end >= keys:
        store_rows(at(grad_query, batch, head), total * units.scale, query_start, queries, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
    else:
        store_rows(sums, total, 0, TILE.BLOCK, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)


@triton.jit(do_not_specialize=SIZES)
def table_product_kernel(
    inputs, tiles, partial, partial_sums,
    heads, queries, keys, table_rows, table_start, first, last, first_pair, columns, key_begin, key_end, TILE: tl.constexpr,
):  # fmt: skip
    """Program (block of distances, head of a batch element): rel_k's gradient, unscaled, and the score gradients' sums, by distance.

    partial (pairs, blocks of distances, BLOCK, D) and partial_sums (pairs, blocks of distances, BLOCK), or None, float32. Block t begins at
    distance (t - last query block + first key block of the part) BLOCK - (BLOCK - 1), key index minus query index.
    """
    blocks = tl.cdiv(queries, TILE.BLOCK)
    diagonal = tl.program_id(0) - (blocks - 1)  # of query block i its key block i + diagonal, counted from the part's first
    pair = tl.program_id(1) + first_pair
    batch, head = pair // heads, pair % heads
    nearest, farthest, start, key_stop = offsets_of(inputs, batch, keys, table_start, first, last)
    visible = Visible(nearest, farthest, queries, key_stop, None, None, 0.0)
    tables = Tables(None, None, None, None, table_rows, start)
    content = at(inputs.query_u, batch, head)
    if inputs.query_v is not None:
        content = at(inputs.query_v, batch, head)
    total, sums = tl.full((TILE.BLOCK, TILE.COLUMNS), 0.0, tl.float32), tl.full((TILE.BLOCK,), 0.0, tl.float32)
    # The tile of which the block is the low one is i + diagonal, the one of which it is the high one stands before it.
    for block in tl.range(tl.maximum(0, -diagonal), tl.minimum(blocks, columns + 1 - diagonal)):
        column = block + diagonal
        key_start = key_begin + column * TILE.BLOCK
        span = key_ranges(block * TILE.BLOCK, visible, tables, TILE)
        begin, end = tl.maximum(span.start, key_begin), tl.minimum(span.stop, key_end)
        place = (tl.program_id(1).to(tl.int64) * blocks + blocks - 1 - block) * columns + column
        low = load_tile(tiles, place, (key_start >= begin) & (key_start < end), TILE.BLOCK)
        high = load_tile(tiles, place - 1, (key_start - TILE.BLOCK >= begin) & (key_start - TILE.BLOCK < end), TILE.BLOCK)
        owed = unskew(low, high, unknown_zero(block), TILE.BLOCK, True, True)  # (query, distance)
        rows = load_rows(content, block * TILE.BLOCK, queries, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
        total = add_dot(tl.trans(owed), rows, total, TILE)
        if partial_sums is not None:
            sums += tl.sum(owed.to(tl.float32), axis=0)
    place = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    store_rows(Matrix(partial + place * (TILE.BLOCK * TILE.SIZE), TILE.SIZE, 1), total, 0, TILE.BLOCK, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
    if partial_sums is not None:
        tl.store(partial_sums + place * TILE.BLOCK + tl.arange(0, TILE.BLOCK), sums)
