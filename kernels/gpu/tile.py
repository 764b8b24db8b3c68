"""What is done with one tile of scores, as functions that Triton inlines into the kernels.

A tile is BLOCK queries against BLOCK keys, its *window* the two blocks of table rows that it needs, and the *skew* brings a product with
the window to one column per key: kernels/README.md draws them. Numbers inside a tile: query m, key n.

    scores[m, n] = window[m, BLOCK - 1 + n - m]

For rel_q, whose content is the key, it is window[n, BLOCK - 1 + n - m]. Four cases then: the content is the query or the key (QUERY), and
it stands along the tile's rows or its columns (ROWS). Of each line a tile needs BLOCK consecutive distances, one of each remainder modulo
BLOCK, so that the window's blocks are packed into one, whose lines rotate. The way back, for gradients and for rel_v, is a rotation too.

A rotation goes through shared memory, as a gather on the flattened tile. Matrix units leave in lane l of a warp the rows l / 4 (+ 8), of
them the columns 2 (l mod 4) + {0, 1} (+ 8 t). The tile is flattened in an order of its index bits, free as a matter of layout, in which
the 32 lanes meet 32 different banks when they store it and when they load it rotated, however far: the lowest five bits of an address are,
for content along rows, [r2 r1 r0 c2 c1], where (c2 c1) takes all four values over the four lanes that share a row, whatever is added to c;
along columns [r1 r0 c2 c1 r2]. tests/backends/test_triton.py counts the banks. That holds for 32-bit numbers; 16-bit ones travel in pairs.
"""

import triton
import triton.language as tl

from .operands import chunk_bounds


@triton.jit
def dot(a, b, TILE: tl.constexpr):
    """A product of two tiles in float32. TILE.PRECISION: "tf32" or "ieee", of float32 operands; "interpreter" multiplies float32 copies,
    since Triton's interpreter takes bfloat16's bits for integers."""
    if TILE.PRECISION == "interpreter":
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee", out_dtype=tl.float32)
    else:
        product = tl.dot(a, b, input_precision=TILE.PRECISION, out_dtype=tl.float32)
    return product


@triton.jit
def add_dot(a, b, total, TILE: tl.constexpr):
    """total + a b."""
    if TILE.PRECISION == "interpreter":
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee", out_dtype=tl.float32)
    else:
        total = tl.dot(a, b, total, input_precision=TILE.PRECISION, out_dtype=tl.float32)
    return total


@triton.jit
def add_counted(a, b, total, CAREFUL: tl.constexpr, TILE: tl.constexpr):
    """total + a b. If CAREFUL a zero of `a` leaves out what it meets, whatever that is; a row of `a` with anything else where a row of b
    is not finite is not a number."""
    if CAREFUL:
        wrong = strange_rows(b)
        spoiled = tl.max(tl.where(wrong[None, :] & (a.to(tl.float32) != 0.0), 1.0, 0.0), axis=1) > 0.0
        b = tl.where(wrong[:, None], 0.0, b.to(tl.float32)).to(b.dtype)
        total = tl.where(spoiled[:, None], float("nan"), total)
    return add_dot(a, b, total, TILE)


@triton.jit
def wild_rows(tile):
    """Which rows hold what is not finite, or numbers so large that products with them may not be."""
    return tl.max(tl.where(tl.abs(tile.to(tl.float32)) < 1e15, 0, 1), axis=1) > 0


@triton.jit
def strange_rows(tile):
    """Which rows hold what is not finite."""
    return tl.sum(tile.to(tl.float32) * 0.0, axis=1) != 0.0


@triton.jit
def nothing_of(tile):
    """0.0 if all of a float32 tile is finite; or else not a number."""
    return tl.sum(tl.sum(tile * 0.0, axis=1), axis=0)


@triton.jit
def load_rows(matrix, start, stop, SIZE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows start ... start + BLOCK of a matrix with `stop` rows; zeros beyond."""
    row, column = tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    inside = ((start + row).to(tl.uint32) < stop)[:, None]  # rows before the first are beyond the last
    if SIZE != COLUMNS:
        inside = inside & (column < SIZE)[None, :]
    address = matrix.base + tl.cast(start, tl.int64) * matrix.row + (row[:, None] * matrix.row + column[None, :] * matrix.column)
    return tl.load(address, mask=inside, other=0.0)


@triton.jit
def in_registers(tile, TILE: tl.constexpr):
    """The same tile. Triton has wgmma read a first operand that was loaded from shared memory, each time anew, but keeps one that was
    computed in registers; adding zero is enough (a negative zero may become a positive one)."""
    if TILE.PRECISION != "interpreter":
        tile = tile + tl.full((1, 1), 0.0, tile.dtype)
    return tile


@triton.jit
def store_tile(tiles, tile, index, BLOCK: tl.constexpr):
    """A tile (BLOCK, BLOCK) as number `index` of those in memory, in an order in which eight numbers that follow one another are in the
    same thread, and all lanes' lie together: the store needs no exchange between threads."""
    tile = tl.permute(tl.reshape(tile, (BLOCK // 16, 2, 8, BLOCK // 32, 4, 4, 2)), (1, 3, 0, 2, 5, 4, 6))
    place = tl.cast(index, tl.int64) * (BLOCK * BLOCK) + tl.arange(0, BLOCK * BLOCK)
    tl.store(tiles + place, tl.reshape(tile, (BLOCK * BLOCK,)))


@triton.jit
def load_tile(tiles, index, exists, BLOCK: tl.constexpr):
    """What `store_tile` wrote; zeros if not `exists`."""
    place, count = tl.arange(0, BLOCK * BLOCK), tl.where(exists, BLOCK * BLOCK, 0)
    tile = tl.load(tiles + tl.cast(index, tl.int64) * (BLOCK * BLOCK) + place, mask=place < count, other=0.0)
    tile = tl.permute(tl.reshape(tile, (2, BLOCK // 32, BLOCK // 16, 8, 4, 4, 2)), (2, 0, 3, 1, 5, 4, 6))
    return tl.reshape(tile, (BLOCK, BLOCK))


@triton.jit
def store_rows(matrix, tile, start, stop, SIZE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    inside = (start + row < stop)[:, None]
    if SIZE != COLUMNS:
        inside = inside & (column < SIZE)[None, :]
    address = matrix.base + tl.cast(start, tl.int64) * matrix.row + (row[:, None] * matrix.row + column[None, :] * matrix.column)
    tl.store(address, tile.to(matrix.base.dtype.element_ty), mask=inside)


@triton.jit
def load_window(table, first, table_rows, SIZE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows first ... first + BLOCK of a table, clamped to those it has."""
    start, row = _clamped(first, table_rows, BLOCK)
    column = tl.arange(0, COLUMNS)
    address = table.base + start.to(tl.int64) * table.row + (row[:, None] * table.row + column[None, :] * table.column)
    if SIZE != COLUMNS:
        tile = tl.load(address, mask=(column < SIZE)[None, :], other=0.0)
    else:
        tile = tl.load(address)
    return tile


@triton.jit
def _clamped(first, table_rows, BLOCK: tl.constexpr):
    """The first row that a window reads, and how much further each of its rows is: 64-bit numbers stay scalars."""
    start = tl.minimum(tl.maximum(first, 0), table_rows - 1)
    lead = tl.minimum(tl.maximum(first - start, -BLOCK), BLOCK).to(tl.int32)
    start = start.to(tl.int32)
    return start, tl.minimum(tl.maximum(lead + tl.arange(0, BLOCK), 0), table_rows - 1 - start)


@triton.jit
def load_bias(bias, first, table_rows, BLOCK: tl.constexpr):
    """Entries first ... first + BLOCK of a (R,) bias, clamped to those it has, in units of ln 2."""
    start, row = _clamped(first, table_rows, BLOCK)
    return tl.load(bias.base + start.to(tl.int64) * bias.row + row * bias.row).to(tl.float32) * 1.4426950408889634


@triton.jit
def _flatten(tile, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    if ROWS:  # [r5 r4 r3 | c5 c4 c3 | c0 | r2 r1 r0 | c2 c1]
        tile = tl.permute(tl.reshape(tile, (BLOCK // 8, 8, BLOCK // 8, 4, 2)), (0, 2, 4, 1, 3))
    else:  # [r5 r4 r3 | c5 c4 c3 | c0 | r1 r0 | c2 c1 | r2]
        tile = tl.permute(tl.reshape(tile, (BLOCK // 8, 2, 4, BLOCK // 8, 4, 2)), (0, 3, 5, 2, 4, 1))
    return tl.reshape(tile, (BLOCK * BLOCK,))


@triton.jit
def _unflatten(flat, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    if ROWS:
        tile = tl.permute(tl.reshape(flat, (BLOCK // 8, BLOCK // 8, 2, 8, 4)), (0, 3, 1, 4, 2))
    else:
        tile = tl.permute(tl.reshape(flat, (BLOCK // 8, BLOCK // 8, 2, 4, 4, 2)), (0, 5, 3, 1, 4, 2))
    return tl.reshape(tile, (BLOCK, BLOCK))


@triton.jit
def _content_and_other(BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The two index tiles: along the axis of the content, and along the other (a distance of the window, or a query or key)."""
    content, other = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    if not ROWS:
        content, other = tl.arange(0, BLOCK)[None, :], tl.arange(0, BLOCK)[:, None]
    return content, other


@triton.jit
def unknown_zero(start):
    """0, of an index, which stays below 2^30; but the compiler does not know. Addresses that hold it are computed in the loop, instead of
    once before it and kept in a register each."""
    return start >> 30


@triton.jit
def _turns(
    nought, WIDTH: tl.constexpr, CONTENT: tl.constexpr, OTHER: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """Of place START + CONTENT * content + OTHER * other, modulo BLOCK, with other < WIDTH: eights and rest. Of a thread's elements few
    differ in more than the eights."""
    content = tl.arange(0, BLOCK)[:, None] if ROWS else tl.arange(0, BLOCK)[None, :]
    other = tl.arange(0, WIDTH)[None, :] if ROWS else tl.arange(0, WIDTH)[:, None]
    line = CONTENT * content + OTHER * (other % 8) + (START + BLOCK + nought)
    return content, (line // 8 + OTHER * (other // 8) + BLOCK // 8) % (BLOCK // 8), line % 8


@triton.jit
def _rotate(tile, nought, CONTENT: tl.constexpr, OTHER: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """In the line of each content the elements START + CONTENT * content + OTHER * other, modulo BLOCK; 32-bit."""
    content, eights, rest = _turns(nought, BLOCK, CONTENT, OTHER, START, BLOCK, ROWS)
    if ROWS:
        address = ((content // 8 * (BLOCK // 8) + eights) * 2 + rest % 2) * 32 + content % 8 * 4 + rest // 2
    else:
        address = ((eights * (BLOCK // 8) + content // 8) * 2 + content % 2) * 32 + rest % 4 * 8 + content % 8 // 2 * 2 + rest // 4
    return _unflatten(tl.gather(_flatten(tile, BLOCK, ROWS), _flatten(address, BLOCK, ROWS), 0), BLOCK, ROWS)


@triton.jit
def _flatten_words(tile, BLOCK: tl.constexpr):
    """(BLOCK, BLOCK / 2): [r5 r4 r3 | c4 c3 | c0 | r2 r1 r0 | c2 c1]"""
    return tl.reshape(tl.permute(tl.reshape(tile, (BLOCK // 8, 8, BLOCK // 16, 4, 2)), (0, 2, 4, 1, 3)), (BLOCK * BLOCK // 2,))


@triton.jit
def _rotate_halves(tile, nought, CONTENT: tl.constexpr, OTHER: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr):
    """`_rotate` of 16-bit numbers along rows: columns c and c + BLOCK / 2, which stay that far apart, travel as one 32-bit word."""
    HALF: tl.constexpr = BLOCK // 2
    bits = tile.to(tl.uint16, bitcast=True).to(tl.uint32)
    first, second = tl.split(tl.permute(tl.reshape(bits, (BLOCK, 2, HALF)), (0, 2, 1)))
    content, eights, rest = _turns(nought, HALF, CONTENT, OTHER, START, BLOCK, True)
    address = ((content // 8 * (HALF // 8) + eights % (HALF // 8)) * 2 + rest % 2) * 32 + content % 8 * 4 + rest // 2
    flat = tl.gather(_flatten_words(first | (second << 16), BLOCK), _flatten_words(address, BLOCK), 0)
    words = tl.reshape(tl.permute(tl.reshape(flat, (BLOCK // 8, HALF // 8, 2, 8, 4)), (0, 3, 1, 4, 2)), (BLOCK, HALF))
    words = tl.where(eights < HALF // 8, words, (words >> 16) | (words << 16))
    both = tl.join((words & 0xFFFF).to(tl.uint16), (words >> 16).to(tl.uint16))
    return tl.reshape(tl.permute(both, (0, 2, 1)), (BLOCK, BLOCK)).to(tile.dtype, bitcast=True)


@triton.jit
def skew(low, high, nought, BLOCK: tl.constexpr, ROWS: tl.constexpr, QUERY: tl.constexpr):
    """From the two blocks of a window, one column (row, if not ROWS) per distance, to a tile of scores. Of each line the tile needs BLOCK
    consecutive distances, one of each remainder modulo BLOCK: the two blocks are packed into one, whose lines rotate.

    nought: 0, or `unknown_zero` where registers are scarce.
    """
    packed = tl.where(in_low(BLOCK, ROWS, QUERY), low, high)
    if QUERY:
        scores = _rotate(packed, nought, -1, 1, BLOCK - 1, BLOCK, ROWS)
    else:
        scores = _rotate(packed, nought, 1, -1, BLOCK - 1, BLOCK, ROWS)
    return scores


@triton.jit
def unskew(low, high, nought, BLOCK: tl.constexpr, ROWS: tl.constexpr, QUERY: tl.constexpr):
    """A block of distances: those of the tile whose window has this block as its low one, and those of the tile of which it is the high
    one. They share no place (`in_low` tells them apart), so nothing is added."""
    content, other = _content_and_other(BLOCK, ROWS)
    if QUERY:
        packed = tl.where(other <= content, low, high)
        by_distance = _unrotate(packed, nought, 1, 1, 1, BLOCK, ROWS)
    else:
        packed = tl.where(other >= content, low, high)
        by_distance = _unrotate(packed, nought, 1, -1, BLOCK - 1, BLOCK, ROWS)
    return by_distance


@triton.jit
def _unrotate(tile, nought, CONTENT: tl.constexpr, OTHER: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    if tile.dtype.primitive_bitwidth == 32:
        tile = _rotate(tile, nought, CONTENT, OTHER, START, BLOCK, ROWS)
    elif ROWS:
        tile = _rotate_halves(tile, nought, CONTENT, OTHER, START, BLOCK)
    else:  # single 16-bit numbers meet in the banks
        tile = _rotate(tile.to(tl.float32), nought, CONTENT, OTHER, START, BLOCK, ROWS).to(tile.dtype)
    return tile


@triton.jit
def in_low(BLOCK: tl.constexpr, ROWS: tl.constexpr, QUERY: tl.constexpr):
    """Which elements of `unskew`'s result come from its first argument."""
    content, distance = _content_and_other(BLOCK, ROWS)
    if QUERY:
        low = distance >= BLOCK - 1 - content
    else:
        low = distance >= content
    return low


@triton.jit
def _philox_round(word0, word1, word2, word3, key0, key1):
    high0, low0 = tl.umulhi(word0, 0xD2511F53), word0 * 0xD2511F53
    high2, low2 = tl.umulhi(word2, 0xCD9E8D57), word2 * 0xCD9E8D57
    return high2 ^ word1 ^ key0, low2, high0 ^ word3 ^ key1, low0


@triton.jit
def _philox(seed, batch, head, query, quarter):
    """The four random words of Philox4x32-7 for a place; relattn/philox.py defines it."""
    key0, key1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = (query + quarter).to(tl.uint32) * 0
    word0, word1 = zero + tl.cast(batch, tl.uint32), zero + tl.cast(head, tl.uint32)
    word2, word3 = zero + query.to(tl.uint32), zero + quarter.to(tl.uint32)
    for _ in tl.static_range(7):
        word0, word1, word2, word3 = _philox_round(word0, word1, word2, word3, key0, key1)
        key0, key1 = key0 + 0x9E3779B9, key1 + 0xBB67AE85
    return word0, word1, word2, word3


@triton.jit
def dropout_keep(dropout, query_start, key_start, BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr):
    """Which weights of a tile survive dropout, bool. ALIGNED: key_start is a multiple of 4, and four keys share the work."""
    limit = tl.cast(dropout.threshold, tl.int32).to(tl.uint32, bitcast=True)
    head = dropout.head
    if dropout.origin is not None:
        head, query_start, key_start = head + dropout.origin.head, query_start + dropout.origin.query, key_start + dropout.origin.key
    query = query_start + tl.arange(0, BLOCK)
    if ALIGNED and BLOCK >= 32:  # with less, Triton 3.6 gives threads that share an element different ones
        quarter = key_start // 4 + tl.arange(0, BLOCK // 4)
        if TRANSPOSED:
            word0, word1, word2, word3 = _philox(dropout.seed, dropout.batch, head, query[None, :], quarter[:, None])
        else:
            word0, word1, word2, word3 = _philox(dropout.seed, dropout.batch, head, query[:, None], quarter[None, :])
        keep0, keep1 = (word0 >= limit).to(tl.int8), (word1 >= limit).to(tl.int8)
        keep2, keep3 = (word2 >= limit).to(tl.int8), (word3 >= limit).to(tl.int8)
        four = tl.join(tl.join(keep0, keep2), tl.join(keep1, keep3))  # [..., high bit, low bit] of the key's place among four
        if TRANSPOSED:
            four = tl.permute(four, (0, 2, 3, 1))
        keep = tl.reshape(four, (BLOCK, BLOCK)) != 0
    else:
        key = tl.maximum(key_start + tl.arange(0, BLOCK), 0)  # keys before the first are hidden anyway
        if TRANSPOSED:
            word0, word1, word2, word3 = _philox(dropout.seed, dropout.batch, head, query[None, :], (key // 4)[:, None])
            place = (key % 4)[:, None]
        else:
            word0, word1, word2, word3 = _philox(dropout.seed, dropout.batch, head, query[:, None], (key // 4)[None, :])
            place = (key % 4)[None, :]
        keep = tl.where(place < 2, tl.where(place == 0, word0, word1), tl.where(place == 2, word2, word3)) >= limit
    return keep


@triton.jit
def is_whole(query_start, key_start, visible, BLOCK: tl.constexpr):
    """Whether every query of a tile sees every key of it, masks aside."""
    whole = (
        (key_start >= 0)
        & (key_start + BLOCK <= visible.key_stop)
        & (key_start - (query_start + BLOCK - 1) >= visible.first)
        & (key_start + BLOCK - 1 - query_start <= visible.last)
    )
    if visible.chunks is not None:
        begin, _end = chunk_bounds(query_start + BLOCK - 1, visible.chunks)
        _begin, end = chunk_bounds(query_start, visible.chunks)
        whole = whole & (key_start >= begin) & (key_start + BLOCK <= end)
    return whole


@triton.jit
def hide(scores, query_start, key_start, visible, BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The scores, plus a float mask (then they are in units of ln 2); -inf where the query may not see the key."""
    # Without a mask, tiles that every query sees whole skip this.
    if visible.key_mask is not None or visible.mask is not None or not is_whole(query_start, key_start, visible, BLOCK):
        scores = _masked(scores, query_start, key_start, visible, BLOCK, TRANSPOSED)
    return scores


@triton.jit
def _masked(scores, query_start, key_start, visible, BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr):
    if TRANSPOSED:
        query, key = (query_start + tl.arange(0, BLOCK))[None, :], (key_start + tl.arange(0, BLOCK))[:, None]
    else:
        query, key = (query_start + tl.arange(0, BLOCK))[:, None], (key_start + tl.arange(0, BLOCK))[None, :]
    return _masked_pairs(scores, query, key, visible)


@triton.jit
def _masked_pairs(scores, query, key, visible):
    key_mask, mask = visible.key_mask, visible.mask
    inside = (key >= 0) & (key < visible.key_stop)
    if key_mask is not None:
        inside = inside & (tl.load(key_mask.base + tl.cast(key, tl.int64) * key_mask.row, mask=inside, other=0) != 0)
    distance = key - query
    seen = inside & (distance >= visible.first) & (distance <= visible.last)
    if visible.chunks is not None:
        begin, end = chunk_bounds(query, visible.chunks)
        seen = seen & (key >= begin) & (key < end)
    if mask is not None:
        address = mask.base + tl.cast(query, tl.int64) * mask.row + tl.cast(key, tl.int64) * mask.column
        entry = tl.load(address, mask=(key >= 0) & (key < visible.key_stop) & (query < visible.queries), other=0)
        seen, scores = apply_mask(seen, scores, entry, visible.hidden_from)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def counted_pairs(tile, base, query_start, key_start, visible, BLOCK: tl.constexpr, SKEWED: tl.constexpr):
    """A tile (query, key) of weights or score gradients from memory: 0 where they do not count, since the query does not see the key, or
    since nothing comes from the query (`prepare_kernel`). SKEWED: its columns are the distances of its window's low block.

    base: of the queries of this head. What is in the other places depends on no other query and no other key.
    """
    query, column = (query_start + tl.arange(0, BLOCK))[:, None], tl.arange(0, BLOCK)[None, :]
    key = key_start + column
    if SKEWED:
        key = key_start - (BLOCK - 1) + column + tl.arange(0, BLOCK)[:, None]
    seen = _masked_pairs(tl.full((BLOCK, BLOCK), 0.0, tl.float32), query, key, visible) != float("-inf")
    counts = tl.load(base + query, mask=query < visible.queries, other=float("inf")) != float("inf")
    return tl.where(seen & counts, tile.to(tl.float32), 0.0).to(tile.dtype)


@triton.jit
def apply_mask(seen, scores, entry, hidden_from):
    """What a mask's entries leave to be seen, and the scores with a float mask added."""
    if entry.dtype == tl.uint8:
        seen = seen & (entry != 0)
    else:
        entry = entry.to(tl.float32)
        seen = seen & ~(entry <= hidden_from)
        scores = scores + entry * 1.4426950408889634
    return seen, scores
