"""What travels through the kernels under one name: operands with their strides, and what belongs together.

Triton takes a NamedTuple as an argument of a kernel and of the functions in it, and specialises its numbers as it does loose ones, always:
strides, of which the compiler should know which are 1 and which are multiples of 16, travel here; sizes, whose values must not make new
kernels, are loose arguments in `SIZES`. None stands for what is absent, at compile time; with Triton 3.6 no function can return a tuple
that holds None, so these are made in the kernels, nor can such a tuple be compared with None itself.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Sizes and offsets change from call to call: their values must not make new kernels.
SIZES = [
    "heads", "group", "queries", "keys", "batches", "split_keys", "splits", "rows", "table_rows", "table_start", "first", "last",
    "threshold", "diagonals", "first_diagonal", "shared_heads", "chunk", "chunk_batches", "first_pair", "columns", "key_begin", "key_end",
    "value_programs", "key_programs", "query_programs",
    "count", "step", "distances", "first_row", "pairs", "pair_step", "edge_rows", "first_table", "first_head", "first_edge",
    "numbers", "seen_begin", "seen_end",
]  # fmt: skip


LACKING = tl.constexpr(0)  # a compile-time stride: nothing is left of it in the code


class Operand(NamedTuple):
    """A tensor (B, H, rows, columns) and its strides; LACKING of a dimension that it has not."""

    base: Any
    batch: Any
    head: Any
    row: Any
    column: Any


class Matrix(NamedTuple):
    """What an operand holds for one batch element and head: (rows, columns)."""

    base: Any
    row: Any
    column: Any


class Inputs(NamedTuple):
    """Of every kernel, as relattn.arguments.Tensors has them. query_v is None where it equals query_u."""

    query_u: Any  # Operand, as all down to mask
    query_v: Any
    key: Any
    value: Any
    rel_k: Any  # (H, R, D), as rel_q; rel_v (H, R, Dv); stride 0 where the heads share it
    rel_q: Any
    rel_v: Any
    rel_bias: Any  # (H, R): its rows have no columns
    key_mask: Any  # (B, Lk): its rows have no columns
    mask: Any
    key_lengths: Any  # pointers: (B,)
    offsets: Any  # (B,), on top of what table_start, first and last hold
    seed: Any
    chunk: Any = None  # Chunk
    origin: Any = None  # Origin: the call is a part of another, whose dropout counts from there
    query_ends: Any = None  # pointers (N + 1,), of packed sequences: a tensor's rows are all tokens, and what is said of batch elements
    key_ends: Any = None  # is said of sequences, of which number n has the tokens ends[n] ... ends[n + 1] - 1


class Origin(NamedTuple):
    """The first head, query and key of a call, as a part of another; that of keys is a multiple of 4."""

    head: Any
    query: Any
    key: Any


class Chunk(NamedTuple):
    """Chunks of `size` positions, counted from key -first on: a query at i + offset sees its own and `left` before it, or if that is
    negative all before it."""

    size: Any
    left: Any
    offset: Any
    first: Any


class Chunks(NamedTuple):
    """Chunks of one batch element: of query i the first key is lower + t, and the first that is hidden behind it upper + t, where t is
    (i + shift) rounded down to a multiple of `size`; and of key j it is j + phase that is rounded. 64-bit, but for size, and shift and
    phase, which are less than size."""

    size: Any
    shift: Any
    phase: Any
    lower: Any
    upper: Any


class Units(NamedTuple):
    scale: Any  # of the scores
    log2_scale: Any  # scores times this are in units of ln 2
    hidden_from: Any  # a float mask's number, from which on downwards it hides
    keep_scale: Any  # of the weights that dropout keeps


class Saved(NamedTuple):
    """Per query, (B, H, Lq) float32 pointers that `prepare_kernel` writes and the backward kernels read; it says what they are."""

    delta: Any
    base: Any
    inverse: Any
    edges: Any  # (2, B, H, Lq)
    wild: Any  # (B, H, cdiv(Lq, 16)) uint8


class Tile(NamedTuple):
    """Compile-time constants of a tile of BLOCK queries and BLOCK keys."""

    BLOCK: int
    SIZE: int  # numbers of a row of queries, keys, rel_k and rel_q
    COLUMNS: int  # and those that a tile has for them, a power of two
    VALUE_SIZE: int  # of values, rel_v and the output
    VALUE_COLUMNS: int
    CLIPPED: bool  # whether tiles may be far: all their distances belong to the tables' first or last row
    LATE: bool  # scores are multiplied into units of ln 2 in the exponent only
    DROPOUT: bool
    PRECISION: str  # of `tile.dot`


class Queries(NamedTuple):
    """Queries as they meet the keys, and as they meet rel_k: Matrix, v None where it is u; or tiles of both."""

    u: Any
    v: Any


class Tables(NamedTuple):
    """Of one head, Matrix or None; `rows` each has, and the distance (key index minus query index) of the first, `start`."""

    rel_k: Any
    rel_q: Any
    rel_v: Any
    rel_bias: Any
    rows: Any
    start: Any


class Visible(NamedTuple):
    """What queries of one batch element and head see: distances first ... last (key index minus query index) of keys before key_stop, but
    for what the masks (Matrix or None) and the chunks hide."""

    first: Any
    last: Any
    queries: Any
    key_stop: Any
    key_mask: Any
    mask: Any
    hidden_from: Any
    chunks: Any  # Chunks or None: hidden is too what lies in other chunks


class Dropout(NamedTuple):
    seed: Any
    threshold: Any
    keep_scale: Any
    batch: Any
    head: Any
    origin: Any  # Origin or None


class Part(NamedTuple):
    """What of the scores has its tiles in memory (products.py)."""

    pair: Any  # the first head (of batch elements), and how many
    pairs: Any
    columns: Any  # tiles in a row of the buffer
    begin: Any  # keys
    end: Any


class Span(NamedTuple):
    """Where a loop over tiles begins and stops; the tiles before `near` and from `beyond` on are far ones."""

    start: Any
    near: Any
    beyond: Any
    stop: Any


class Steps(NamedTuple):
    """A loop over one part of a Span's tiles: steps start ... stop, of which those from `turn` on stand for a tile `jump` further."""

    start: Any
    turn: Any
    jump: Any
    stop: Any


@triton.jit
def at(operand, batch, head, begin=None):
    """The Matrix of one batch element and head, or of a sequence, whose rows begin at `begin`. Of None it is None."""
    if operand is not None:
        base = operand.base + tl.cast(head, tl.int64) * operand.head + tl.cast(batch, tl.int64) * operand.batch
        if begin is not None:
            base += begin * operand.row
        return Matrix(base, operand.row, operand.column)


@triton.jit
def begin_of(ends, batch):
    """The first token of a packed sequence. Without `ends` it is None."""
    if ends is not None:
        return tl.load(ends + batch).to(tl.int64)


@triton.jit
def length_of(ends, batch, length):
    """Of a batch element or a sequence."""
    if ends is not None:
        length = (tl.load(ends + batch + 1) - tl.load(ends + batch)).to(tl.int32)
    return length


@triton.jit
def rows_before(ends, batch, head, heads, length):
    """Where the rows of a head begin in what is kept for each, (B, H, length), or of packed sequences (H, all tokens)."""
    if ends is None:
        before = (tl.cast(batch, tl.int64) * heads + head) * length
    else:
        before = tl.cast(head, tl.int64) * length + tl.load(ends + batch)
    return before


@triton.jit
def all_rows(ends, batches, heads, length):
    """How many there are of these."""
    count = tl.cast(heads, tl.int64) * length
    if ends is None:
        count *= batches
    return count


@triton.jit
def _slot(ends, batch, SIZE: tl.constexpr):
    """The first of a packed sequence's blocks of SIZE tokens, among slots of which each sequence has as many as it needs, or one or two
    more: nobody has to know the lengths to know how many there are in all (`slots_of`)."""
    return tl.load(ends + batch).to(tl.int32) // SIZE + batch


@triton.jit
def slots_of(ends, batches, length, SIZE: tl.constexpr):
    """Blocks of SIZE rows of a head, of a batch element or of all packed sequences."""
    if ends is None:
        count = tl.cdiv(length, SIZE)
    else:
        count = length // SIZE + batches
    return count


@triton.jit
def slots_before(ends, batches, batch, head, heads, length, SIZE: tl.constexpr):
    """Where the blocks of a head begin in what is kept for each of them."""
    count = slots_of(ends, batches, length, SIZE)
    if ends is None:
        before = (tl.cast(batch, tl.int64) * heads + head) * count
    else:
        before = tl.cast(head, tl.int64) * count + _slot(ends, batch, SIZE)
    return before


@triton.jit
def _sequence_of(ends, batches, slot, SIZE: tl.constexpr):
    """Which of the packed sequences has a slot."""
    lane = tl.arange(0, 128)
    count = tl.full((128,), 0, tl.int32)
    for begin in tl.range(0, batches, 128, num_stages=1):
        first = tl.load(ends + begin + lane, mask=begin + lane < batches, other=0).to(tl.int32) // SIZE + begin + lane
        count += ((begin + lane < batches) & (first <= slot)).to(tl.int32)
    return tl.sum(count, axis=0) - 1


@triton.jit
def program_of(program, first_pair, ends, batches, heads, length, LAST_FIRST: tl.constexpr, SIZE: tl.constexpr):
    """A program's block of SIZE rows, how many blocks there are, the batch element (or sequence), and the head. Programs are numbered by
    head (of batch elements, from number first_pair of these on) and block. Of packed sequences some have a block behind the last one."""
    slots = slots_of(ends, batches, length, SIZE)
    block, pair = program % slots, program // slots + first_pair
    if ends is None:
        blocks, batch, head = slots, pair // heads, pair % heads
    else:
        batch, head = _sequence_of(ends, batches, block, SIZE), pair
        block -= _slot(ends, batch, SIZE)
        blocks = tl.cdiv(length_of(ends, batch, length), SIZE)
    if LAST_FIRST:  # under a causal mask they see the most keys
        if ends is None:
            block = blocks - 1 - block
        else:
            block = tl.where(block < blocks, blocks - 1 - block, block)
    return block, blocks, batch, head


@triton.jit
def chunks_of(inputs, batch):
    """The Chunks of one batch element, or None."""
    if inputs.chunk is not None:
        offset, size = tl.cast(inputs.chunk.offset, tl.int64), tl.cast(inputs.chunk.size, tl.int64)
        if inputs.offsets is not None:
            offset += tl.load(inputs.offsets + batch).to(tl.int64)
        phase = tl.cast(inputs.chunk.first, tl.int64) % size
        rest = (offset % size + phase) % size  # of the sign of `offset`, perhaps
        shift = tl.where(rest < 0, rest + size, rest)
        left = tl.cast(inputs.chunk.left, tl.int64)
        lower = tl.where(left < 0, -(1 << 62), offset - shift - left * size)
        return Chunks(tl.cast(inputs.chunk.size, tl.int32), shift.to(tl.int32), phase.to(tl.int32), lower, offset - shift + size)


@triton.jit
def chunk_bounds(query, chunks):
    """Of queries, or of one: the first key that they see of their chunks, and the first behind. Cut to 2^30, 32-bit."""
    turn = ((query + chunks.shift) // chunks.size * chunks.size).to(tl.int64)
    low = tl.minimum(tl.maximum(turn + chunks.lower, -(1 << 30)), 1 << 30).to(tl.int32)
    return low, tl.minimum(tl.maximum(turn + chunks.upper, -(1 << 30)), 1 << 30).to(tl.int32)


@triton.jit
def chunk_queries(first_key, last_key, chunks):
    """Which queries some keys' chunks are seen from: the first one, and the first behind them."""
    size, last = tl.cast(chunks.size, tl.int64), tl.maximum(last_key, 0)
    # Of query i the chunk begins at i + shift, rounded down, plus upper - size.
    start = (first_key + chunks.phase) // chunks.size * size - chunks.phase - chunks.shift - (chunks.upper - size)
    stop = (last + chunks.phase) // chunks.size * size - chunks.phase + size - chunks.shift - chunks.lower
    stop = tl.where(chunks.lower <= -(1 << 62), 1 << 30, stop)
    start = tl.minimum(tl.maximum(start, -(1 << 30)), 1 << 30).to(tl.int32)
    return start, tl.minimum(tl.maximum(stop, -(1 << 30)), 1 << 30).to(tl.int32)


@triton.jit
def past(pointer, offset):
    if pointer is not None:
        return pointer + offset
