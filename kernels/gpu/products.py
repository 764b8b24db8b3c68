"""Gradients as matrix products of tiles that `query_gradient_kernel` left in memory: nothing of them is computed twice.

The launcher cuts the scores into parts, some heads and some keys at a time, so that the tiles of a part fit into a fixed number of bytes.
One launch makes all products of a small part, each in programs of its own: short sequences wait for launches. Of a large part those that
take as many registers share one.
"""

import triton
import triton.language as tl

from .backward import is_wild, query_ranges
from .forward import key_ranges, offsets_of, window_start
from .operands import SIZES, Matrix, Part, Tables, Visible, at, chunks_of
from .tile import add_counted, counted_pairs, load_rows, load_tile, load_window, store_rows


@triton.jit
def counted(
    tile, inputs, saved, batch, head, query_start, key_start, visible, heads, hidden_from, SKEWED: tl.constexpr, TILE: tl.constexpr
):
    """`counted_pairs` of a tile that `query_gradient_kernel` left, whose own loop may not have been careful."""
    visible = Visible(
        visible.first, visible.last, visible.queries, visible.key_stop, at(inputs.key_mask, batch, head), at(inputs.mask, batch, head),
        hidden_from, visible.chunks,
    )  # fmt: skip
    base = saved.base + (batch * heads + head).to(tl.int64) * visible.queries
    return counted_pairs(tile, base, query_start, key_start, visible, TILE.BLOCK, SKEWED)


@triton.jit
def _by_key(
    program, inputs, saved, content, tiles, gradient, partial, partial_sums, scale, part, hidden_from,
    heads, group, queries, keys, table_rows, table_start, first, last, chunk,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, CAREFUL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (key block of the part, key head of a batch element, split of the queries): the tiles, transposed, times `content`.

    That is the values' gradient, of the tiles of weights and the output's gradient, or the keys' gradient, of those of the scores'
    gradients and the queries. Without `partial` there is one split, and it goes to `gradient`; or else, of `chunk` queries each, to partial
    (splits, key heads, key blocks, BLOCK, D) float32, unscaled. partial_sums (splits, heads, key blocks, BLOCK) float32, or None, gets the
    tiles summed over the queries.
    """
    blocks, key_blocks, key_pairs = tl.cdiv(queries, TILE.BLOCK), tl.cdiv(part.end - part.begin, TILE.BLOCK), part.pairs // group
    column, unit, split = program % key_blocks, program // key_blocks % key_pairs, program // key_blocks // key_pairs
    key_start = part.begin + column * TILE.BLOCK
    pair = unit * group + part.pair
    batch, key_head = pair // heads, pair % heads // group
    nearest, farthest, start, key_stop = offsets_of(inputs, batch, keys, table_start, first, last)
    visible = Visible(nearest, farthest, queries, key_stop, None, None, 0.0, chunks_of(inputs, batch))
    span = query_ranges(key_start, visible, Tables(None, None, None, None, table_rows, start), TILE)
    begin, end = tl.maximum(span.start, split * chunk), tl.minimum(span.stop, (split + 1) * chunk)
    total = tl.full((TILE.BLOCK, COLUMNS), 0.0, tl.float32)
    for member in tl.range(0, group):
        matrix = at(content, batch, key_head * group + member)
        last_row = (unit * group + member + 1).to(tl.int64) * blocks - 1
        sums = tl.full((TILE.BLOCK,), 0.0, tl.float32)
        for query_start in tl.range(begin, end, TILE.BLOCK):
            tile = load_tile(tiles, (last_row - query_start // TILE.BLOCK) * part.columns + column, True, TILE.BLOCK)
            if CAREFUL:
                head = key_head * group + member
                tile = counted(tile, inputs, saved, batch, head, query_start, key_start, visible, heads, hidden_from, False, TILE)
            rows = load_rows(matrix, query_start, queries, SIZE, COLUMNS, TILE.BLOCK)
            total = add_counted(tl.trans(tile), rows, total, CAREFUL, TILE)
            if partial_sums is not None:
                sums += tl.sum(tile.to(tl.float32), axis=0)
        if partial_sums is not None:
            slot = ((split * key_pairs + unit) * group + member).to(tl.int64) * key_blocks + column
            tl.store(partial_sums + slot * TILE.BLOCK + tl.arange(0, TILE.BLOCK), sums)
    if partial is not None:
        slot = (split * key_pairs + unit).to(tl.int64) * key_blocks + column
        store_rows(Matrix(partial + slot * (TILE.BLOCK * SIZE), SIZE, 1), total, 0, TILE.BLOCK, SIZE, COLUMNS, TILE.BLOCK)
    else:
        store_rows(at(gradient, batch, key_head), total * scale, key_start, keys, SIZE, COLUMNS, TILE.BLOCK)


@triton.jit
def _by_query(
    program, inputs, saved, grad_tiles, owed_tiles, running, grad_query, part, units,
    heads, group, queries, keys, table_rows, table_start, first, last, CAREFUL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program as `query_gradient_kernel`'s: the queries' gradient, `running` between the launches for one part of the keys and the next."""
    blocks = tl.cdiv(queries, TILE.BLOCK)
    query_start = (blocks - 1 - program % blocks) * TILE.BLOCK
    pair = program // blocks + part.pair
    batch, head = pair // heads, pair % heads
    key = at(inputs.key, batch, head // group)
    nearest, farthest, start, key_stop = offsets_of(inputs, batch, keys, table_start, first, last)
    visible = Visible(nearest, farthest, queries, key_stop, None, None, 0.0, chunks_of(inputs, batch))
    tables = Tables(at(inputs.rel_k, batch, head), None, None, None, table_rows, start)
    span = key_ranges(query_start, visible, tables, TILE)
    begin, end = tl.maximum(span.start, part.begin), tl.minimum(span.stop, part.end)
    first_tile = program.to(tl.int64) * part.columns
    sums = Matrix(running + program.to(tl.int64) * (TILE.BLOCK * TILE.SIZE), TILE.SIZE, 1)
    total = tl.full((TILE.BLOCK, TILE.COLUMNS), 0.0, tl.float32)
    if part.begin > 0:
        total = load_rows(sums, 0, TILE.BLOCK, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
    # Both products in one loop: with one of them in it, Triton 3.6 overwrites an operand in registers that a product still reads.
    for key_start in tl.range(begin, end, TILE.BLOCK):
        index = first_tile + (key_start - part.begin) // TILE.BLOCK
        rows = load_rows(key, key_start, key_stop, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
        tile = load_tile(grad_tiles, index, True, TILE.BLOCK)
        if CAREFUL:
            tile = counted(tile, inputs, saved, batch, head, query_start, key_start, visible, heads, units.hidden_from, False, TILE)
        total = add_counted(tile, rows, total, CAREFUL, TILE)
        window = window_start(query_start, key_start, tables, TILE.BLOCK)
        rows = load_window(tables.rel_k, window, table_rows, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
        tile = load_tile(owed_tiles, index, True, TILE.BLOCK)
        if CAREFUL:
            tile = counted(tile, inputs, saved, batch, head, query_start, key_start, visible, heads, units.hidden_from, True, TILE)
        total = add_counted(tile, rows, total, CAREFUL, TILE)
    if end > begin:
        beyond = (end - begin + TILE.BLOCK - 1) // TILE.BLOCK * TILE.BLOCK + begin
        window = window_start(query_start, beyond, tables, TILE.BLOCK)
        rows = load_window(tables.rel_k, window, table_rows, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
        index = first_tile + (beyond - part.begin) // TILE.BLOCK
        tile = load_tile(owed_tiles, index, True, TILE.BLOCK)
        if CAREFUL:
            tile = counted(tile, inputs, saved, batch, head, query_start, beyond, visible, heads, units.hidden_from, True, TILE)
        total = add_counted(tile, rows, total, CAREFUL, TILE)
    if part.end >= keys:
        store_rows(at(grad_query, batch, head), total * units.scale, query_start, queries, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
    else:
        store_rows(sums, total, 0, TILE.BLOCK, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)


@triton.jit
def _by_distance(
    program, inputs, saved, owed_tiles, partial, partial_sums, part, hidden_from,
    heads, queries, keys, table_rows, table_start, first, last, COUNT: tl.constexpr, CAREFUL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (block of distances, head of a batch element): rel_k's gradient, unscaled, and the score gradients' sums, by distance.

    partial (pairs, blocks of distances, BLOCK, D) and partial_sums (pairs, blocks of distances, BLOCK), or None, float32. Block t begins at
    distance (t - last query block + first key block of the part) BLOCK - (BLOCK - 1), key index minus query index.
    """
    blocks = tl.cdiv(queries, TILE.BLOCK)
    distances = blocks + tl.cdiv(part.end - part.begin, TILE.BLOCK)
    diagonal = program % distances - (blocks - 1)  # of query block i it is column i + diagonal of the part
    unit = program // distances
    batch, head = (unit + part.pair) // heads, (unit + part.pair) % heads
    content = at(inputs.query_u, batch, head)
    if inputs.query_v is not None:
        content = at(inputs.query_v, batch, head)
    nearest, farthest, start, key_stop = offsets_of(inputs, batch, keys, table_start, first, last)
    visible = Visible(nearest, farthest, queries, key_stop, None, None, 0.0, chunks_of(inputs, batch))
    tables = Tables(None, None, None, None, table_rows, start)
    total, sums = tl.full((TILE.BLOCK, TILE.COLUMNS), 0.0, tl.float32), tl.full((TILE.BLOCK,), 0.0, tl.float32)
    lead = part.begin + diagonal * TILE.BLOCK  # of a tile's first key over its first query; what it holds lies on both sides of that
    seen = (lead - 2 * TILE.BLOCK <= farthest) & (lead + 2 * TILE.BLOCK >= nearest)
    for block in tl.range(tl.maximum(0, -diagonal), tl.where(seen, tl.minimum(blocks, part.columns - diagonal), 0)):
        key_start = part.begin + (block + diagonal) * TILE.BLOCK
        span = key_ranges(block * TILE.BLOCK, visible, tables, TILE)
        begin, end = tl.maximum(span.start, part.begin), tl.minimum(span.stop, part.end)
        written = (end > begin) & (key_start >= begin) & (key_start < end + TILE.BLOCK)
        index = (unit.to(tl.int64) * blocks + blocks - 1 - block) * part.columns + block + diagonal
        tile = load_tile(owed_tiles, index, written, TILE.BLOCK)
        if CAREFUL and COUNT:
            tile = counted(tile, inputs, saved, batch, head, block * TILE.BLOCK, key_start, visible, heads, hidden_from, True, TILE)
        rows = load_rows(content, block * TILE.BLOCK, queries, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
        total = add_counted(tl.trans(tile), rows, total, CAREFUL, TILE)
        if partial_sums is not None:
            sums += tl.sum(tile.to(tl.float32), axis=0)
    slot = program.to(tl.int64)
    store_rows(Matrix(partial + slot * (TILE.BLOCK * TILE.SIZE), TILE.SIZE, 1), total, 0, TILE.BLOCK, TILE.SIZE, TILE.COLUMNS, TILE.BLOCK)
    if partial_sums is not None:
        tl.store(partial_sums + slot * TILE.BLOCK + tl.arange(0, TILE.BLOCK), sums)


@triton.jit
def _by_key_either(
    program, inputs, saved, content, tiles, gradient, partial, partial_sums, scale, part, hidden_from,
    heads, group, queries, keys, table_rows, table_start, first, last, chunk,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, HIDES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`_by_key`, careful or not."""
    # Variables: of arguments, Triton 3.6 forgets the compile-time strides once a loop or an `if` has begun.
    given, rows, to = inputs, content, gradient
    kept = saved
    pair = program // tl.cdiv(part.end - part.begin, TILE.BLOCK) % (part.pairs // group) * group + part.pair
    careful = False
    if HIDES:
        careful = is_wild(kept.wild, pair // heads, pair % heads, heads, group, queries)
    if careful:
        _by_key(
            program, given, kept, rows, tiles, to, partial, partial_sums, scale, part, hidden_from,
            heads, group, queries, keys, table_rows, table_start, first, last, chunk, SIZE, COLUMNS, True, TILE,
        )  # fmt: skip
    else:
        _by_key(
            program, given, kept, rows, tiles, to, partial, partial_sums, scale, part, hidden_from,
            heads, group, queries, keys, table_rows, table_start, first, last, chunk, SIZE, COLUMNS, False, TILE,
        )  # fmt: skip


@triton.jit
def _by_query_either(
    program, inputs, saved, grad_tiles, owed_tiles, running, grad_query, part, units,
    heads, group, queries, keys, table_rows, table_start, first, last, HIDES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`_by_query`, careful or not."""
    given, to, kept = inputs, grad_query, saved
    pair = program // tl.cdiv(queries, TILE.BLOCK) + part.pair
    careful = False
    if HIDES:
        careful = is_wild(kept.wild, pair // heads, pair % heads, heads, group, queries)
    if careful:
        _by_query(
            program, given, kept, grad_tiles, owed_tiles, running, to, part, units,
            heads, group, queries, keys, table_rows, table_start, first, last, True, TILE,
        )  # fmt: skip
    else:
        _by_query(
            program, given, kept, grad_tiles, owed_tiles, running, to, part, units,
            heads, group, queries, keys, table_rows, table_start, first, last, False, TILE,
        )  # fmt: skip


@triton.jit
def _by_distance_either(
    program, inputs, saved, owed_tiles, partial, partial_sums, part, hidden_from,
    heads, group, queries, keys, table_rows, table_start, first, last, COUNT: tl.constexpr, HIDES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`_by_distance`, careful or not."""
    given, kept = inputs, saved
    pair = program // (tl.cdiv(queries, TILE.BLOCK) + tl.cdiv(part.end - part.begin, TILE.BLOCK)) + part.pair
    careful = False
    if HIDES:
        careful = is_wild(kept.wild, pair // heads, pair % heads, heads, group, queries)
    if careful:
        _by_distance(
            program, given, kept, owed_tiles, partial, partial_sums, part, hidden_from,
            heads, queries, keys, table_rows, table_start, first, last, COUNT, True, TILE,
        )  # fmt: skip
    else:
        _by_distance(
            program, given, kept, owed_tiles, partial, partial_sums, part, hidden_from,
            heads, queries, keys, table_rows, table_start, first, last, COUNT, False, TILE,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def product_kernel(
    inputs, grad_output, saved, kept_tiles, grad_tiles, owed_tiles, running, grad_query, grad_key, grad_value, key_partial, value_partial,
    key_sums, partial, partial_sums, units, heads, group, queries, keys, table_rows, table_start, first, last,
    first_pair, pairs, columns, key_begin, key_end, chunk, value_programs, key_programs, query_programs,
    VALUES: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, DISTANCES: tl.constexpr, HIDES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Products of a part: `pairs` heads (of batch elements) from number first_pair on, keys key_begin ... key_end.

    Of the programs the first `value_programs` have the values' gradient, the next `key_programs` the keys', the next `query_programs` the
    queries', and all others rel_k's; of those that are compiled in.
    """
    # Variables: of arguments, Triton 3.6 forgets the compile-time strides once a loop or an `if` has begun.
    given, slopes, to_query, to_key, to_value = inputs, grad_output, grad_query, grad_key, grad_value
    numbers = saved
    part = Part(first_pair, pairs, columns, key_begin, key_end)
    program = tl.program_id(0)
    if VALUES:
        if program < value_programs:
            _by_key_either(
                program, given, numbers, slopes, kept_tiles, to_value, value_partial, None, units.keep_scale, part, units.hidden_from,
                heads, group, queries, keys, table_rows, table_start, first, last, chunk, TILE.VALUE_SIZE, TILE.VALUE_COLUMNS,
                HIDES, TILE,
            )  # fmt: skip
        program -= value_programs
    if KEYS:
        if (program >= 0) & (program < key_programs):
            _by_key_either(
                program, given, numbers, given.query_u, grad_tiles, to_key, key_partial, key_sums, units.scale, part, units.hidden_from,
                heads, group, queries, keys, table_rows, table_start, first, last, chunk, TILE.SIZE, TILE.COLUMNS, HIDES, TILE,
            )  # fmt: skip
        program -= key_programs
    if QUERIES:
        if (program >= 0) & (program < query_programs):
            _by_query_either(
                program, given, numbers, grad_tiles, owed_tiles, running, to_query, part, units,
                heads, group, queries, keys, table_rows, table_start, first, last, HIDES, TILE,
            )  # fmt: skip
        program -= query_programs
    if DISTANCES:  # noqa: SIM102 (this is the compiler's condition)
        if program >= 0:
            _by_distance_either(
                program, given, numbers, owed_tiles, partial, partial_sums, part, units.hidden_from,
                heads, group, queries, keys, table_rows, table_start, first, last, grad_tiles is not None, HIDES, TILE,
            )  # fmt: skip


@triton.jit
def _join(
    partial, gradient, scale, heads, group, keys, splits, first_pair, key_begin,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    key_start = key_begin + tl.program_id(0) * TILE.BLOCK
    pair = tl.program_id(1) * group + first_pair
    total = tl.full((TILE.BLOCK, COLUMNS), 0.0, tl.float32)
    for split in tl.range(0, splits):
        slot = (split * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        total += load_rows(Matrix(partial + slot * (TILE.BLOCK * SIZE), SIZE, 1), 0, TILE.BLOCK, SIZE, COLUMNS, TILE.BLOCK)
    store_rows(at(gradient, pair // heads, pair % heads // group), total * scale, key_start, keys, SIZE, COLUMNS, TILE.BLOCK)


@triton.jit(do_not_specialize=SIZES)
def join_kernel(
    key_partial, value_partial, grad_key, grad_value, units, heads, group, keys, splits, first_pair, key_begin, TILE: tl.constexpr
):
    """Program (key block of the part, key head of a batch element, keys or values): sums the splits of `product_kernel`, in their order."""
    to_key, to_value = grad_key, grad_value
    if key_partial is not None:  # noqa: SIM102 (this is the compiler's condition)
        if tl.program_id(2) == 0:
            _join(
                key_partial, to_key, units.scale, heads, group, keys, splits, first_pair, key_begin, TILE.SIZE, TILE.COLUMNS, TILE
            )  # fmt: skip
    if value_partial is not None:  # noqa: SIM102
        if tl.program_id(2) == 1:
            _join(
                value_partial, to_value, units.keep_scale, heads, group, keys, splits, first_pair, key_begin,
                TILE.VALUE_SIZE, TILE.VALUE_COLUMNS, TILE,
            )  # fmt: skip
