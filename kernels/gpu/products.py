"""Gradients as matrix products of tiles that `query_gradient_kernel` left in memory: nothing of them is computed twice.

The launcher cuts the scores into parts, some heads and some keys at a time, so that the tiles of a part fit into a fixed number of bytes.
"""

import triton
import triton.language as tl

from .backward import query_ranges
from .forward import key_ranges, offsets_of, window_start
from .operands import SIZES, Matrix, Tables, Visible, at
from .tile import add_dot, load_rows, load_tile, load_window, store_rows


@triton.jit(do_not_specialize=SIZES)
def key_product_kernel(
    inputs, content, tiles, gradient, partial, partial_sums, scale,
    heads, group, queries, keys, table_rows, table_start, first, last, first_pair, columns, key_begin, chunk,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (key block of the part, key head of a batch element, split of the queries): the tiles, transposed, times `content`.

    That is the values' gradient, of the tiles of weights and the output's gradient, or the keys' gradient, of those of the scores'
    gradients and the queries. With more than one split, `chunk` queries each, it goes to partial (splits, key heads, key blocks, BLOCK, D)
    float32, unscaled. partial_sums (splits, heads, key blocks, BLOCK) float32, or None, gets the tiles summed over the queries.
    """
    column, blocks = tl.program_id(0), tl.cdiv(queries, TILE.BLOCK)
    key_start = key_begin + column * TILE.BLOCK
    pair = tl.program_id(1) * group + first_pair
    batch, key_head = pair // heads, pair % heads // group
    given, to = content, at(gradient, batch, key_head)  # before any loop, see `key_gradient_kernel`
    nearest, farthest, start, key_stop = offsets_of(inputs, batch, keys, table_start, first, last)
    visible = Visible(nearest, farthest, queries, key_stop, None, None, 0.0)
    span = query_ranges(key_start, visible, Tables(None, None, None, None, table_rows, start), TILE)
    begin, end = tl.maximum(span.start, tl.program_id(2) * chunk), tl.minimum(span.stop, (tl.program_id(2) + 1) * chunk)
    total = tl.full((TILE.BLOCK, COLUMNS), 0.0, tl.float32)
    for member in tl.range(0, group):
        head = key_head * group + member
        matrix = at(given, batch, head)
        last_row = (tl.program_id(1) * group + member + 1).to(tl.int64) * blocks - 1
        sums = tl.full((TILE.BLOCK,), 0.0, tl.float32)
        for query_start in tl.range(begin, end, TILE.BLOCK):
            tile = load_tile(tiles, (last_row - query_start // TILE.BLOCK) * columns + column, True, TILE.BLOCK)
            rows = load_rows(matrix, query_start, queries, SIZE, COLUMNS, TILE.BLOCK)
            total = add_dot(tl.trans(tile), rows, total, TILE)
            if partial_sums is not None:
                sums += tl.sum(tile.to(tl.float32), axis=0)
        if partial_sums is not None:
            slot = ((tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * group + member).to(tl.int64) * tl.num_programs(0) + column
            tl.store(partial_sums + slot * TILE.BLOCK + tl.arange(0, TILE.BLOCK), sums)
    if partial is not None:
        slot = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * tl.num_programs(0) + column
        store_rows(Matrix(partial + slot * (TILE.BLOCK * SIZE), SIZE, 1), total, 0, TILE.BLOCK, SIZE, COLUMNS, TILE.BLOCK)
    else:
        store_rows(to, total * scale, key_start, keys, SIZE, COLUMNS, TILE.BLOCK)


@triton.jit(do_not_specialize=SIZES)
def join_kernel(
    partial, gradient, scale, heads, group, keys, splits, first_pair, key_begin,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (key block of the part, key head of a batch element): sums the splits of `key_product_kernel`, in their order."""
    key_start = key_begin + tl.program_id(0) * TILE.BLOCK
    pair = tl.program_id(1) * group + first_pair
    to = at(gradient, pair // heads, pair % heads // group)
    total = tl.full((TILE.BLOCK, COLUMNS), 0.0, tl.float32)
    for split in tl.range(0, splits):
        slot = (split * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        part = Matrix(partial + slot * (TILE.BLOCK * SIZE), SIZE, 1)
        total += load_rows(part, 0, TILE.BLOCK, SIZE, COLUMNS, TILE.BLOCK)
    store_rows(to, total * scale, key_start, keys, SIZE, COLUMNS, TILE.BLOCK)


@triton.jit(do_not_specialize=SIZES)
def query_product_kernel(
    inputs, grad_tiles, owed_tiles, running, grad_query, units,
    heads, group, queries, keys, table_rows, table_start, first, last, first_pair, columns, key_begin, key_end, TILE: tl.constexpr,
):  # fmt: skip
    """Program as `query_gradient_kernel`'s: the queries' gradient, `running` between the launches for one part of the keys and the next."""
    blocks = tl.cdiv(queries, TILE.BLOCK)
    query_start = (blocks - 1 - tl.program_id(0) % blocks) * TILE.BLOCK
    pair = tl.program_id(0) // blocks + first_pair
    batch, head = pair // heads, pair % heads
    key, to = at(inputs.key, batch, head // group), at(grad_query, batch, head)
    nearest, farthest, start, key_stop = offsets_of(inputs, batch, keys, table_start, first, last)
    visible = Visible(nearest, farthest, queries, key_stop, None, None, 0.0)
    tables = Tables(at(inputs.rel_k, batch, head), None, None, None, table_rows, start)
    span = key_ranges(query_start, visible, tables, TILE)
    begin, end = tl.maximum(span.start, key_begin), tl.minimum(span.stop, key_end)
    first_tile = tl.program_id(0).to(tl.int64) * columns
    sums = Matrix(running + tl.program_id(0).to(tl.int64) * (TILE.BLOCK * TILE.SIZE), TILE.SIZE, 1)
    total = tl.full((TILE.BLOCK, TILE.COLUMNS), 0.0, tl.float32)
    if key_begin > 0:
        total = load_rows(sums, 0, TILE.BLOCK, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
    for key_start in tl.range(begin, end, TILE.BLOCK):
        index = first_tile + (key_start - key_begin) // TILE.BLOCK
        rows = load_rows(key, key_start, key_stop, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
        total = add_dot(load_tile(grad_tiles, index, True, TILE.BLOCK), rows, total, TILE)
        window = window_start(query_start, key_start, tables, TILE.BLOCK)
        rows = load_window(tables.rel_k, window, table_rows, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
        total = add_dot(load_tile(owed_tiles, index, True, TILE.BLOCK), rows, total, TILE)
    if end > begin:
        beyond = (end - begin + TILE.BLOCK - 1) // TILE.BLOCK * TILE.BLOCK + begin
        window = window_start(query_start, beyond, tables, TILE.BLOCK)
        rows = load_window(tables.rel_k, window, table_rows, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
        index = first_tile + (beyond - key_begin) // TILE.BLOCK
        total = add_dot(load_tile(owed_tiles, index, True, TILE.BLOCK), rows, total, TILE)
    if key_end >= keys:
        store_rows(to, total * units.scale, query_start, queries, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
    else:
        store_rows(sums, total, 0, TILE.BLOCK, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)


@triton.jit(do_not_specialize=SIZES)
def table_product_kernel(
    inputs, owed_tiles, partial, partial_sums,
    heads, queries, keys, table_rows, table_start, first, last, first_pair, columns, key_begin, key_end, TILE: tl.constexpr,
):  # fmt: skip
    """Program (block of distances, head of a batch element): rel_k's gradient, unscaled, and the score gradients' sums, by distance.

    partial (pairs, blocks of distances, BLOCK, D) and partial_sums (pairs, blocks of distances, BLOCK), or None, float32. Block t begins at
    distance (t - last query block + first key block of the part) BLOCK - (BLOCK - 1), key index minus query index.
    """
    blocks = tl.cdiv(queries, TILE.BLOCK)
    diagonal = tl.program_id(0) - (blocks - 1)  # of query block i it is column i + diagonal of the part
    pair = tl.program_id(1) + first_pair
    batch, head = pair // heads, pair % heads
    content = at(inputs.query_u, batch, head)
    if inputs.query_v is not None:
        content = at(inputs.query_v, batch, head)
    nearest, farthest, start, key_stop = offsets_of(inputs, batch, keys, table_start, first, last)
    visible = Visible(nearest, farthest, queries, key_stop, None, None, 0.0)
    tables = Tables(None, None, None, None, table_rows, start)
    total, sums = tl.full((TILE.BLOCK, TILE.COLUMNS), 0.0, tl.float32), tl.full((TILE.BLOCK,), 0.0, tl.float32)
    for block in tl.range(tl.maximum(0, -diagonal), tl.minimum(blocks, columns - diagonal)):
        key_start = key_begin + (block + diagonal) * TILE.BLOCK
        span = key_ranges(block * TILE.BLOCK, visible, tables, TILE)
        begin, end = tl.maximum(span.start, key_begin), tl.minimum(span.stop, key_end)
        written = (end > begin) & (key_start >= begin) & (key_start < end + TILE.BLOCK)
        index = (tl.program_id(1).to(tl.int64) * blocks + blocks - 1 - block) * columns + block + diagonal
        tile = load_tile(owed_tiles, index, written, TILE.BLOCK)
        rows = load_rows(content, block * TILE.BLOCK, queries, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
        total = add_dot(tl.trans(tile), rows, total, TILE)
        if partial_sums is not None:
            sums += tl.sum(tile.to(tl.float32), axis=0)
    slot = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    store_rows(Matrix(partial + slot * (TILE.BLOCK * TILE.SIZE), TILE.SIZE, 1), total, 0, TILE.BLOCK, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
    if partial_sums is not None:
        tl.store(partial_sums + slot * TILE.BLOCK + tl.arange(0, TILE.BLOCK), sums)
