"""What the tests compare with: the definition in loops, random calls of it, and the backends that this machine can run."""

import functools
import math

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import relattn

FLOATS = ("query", "key", "value", "rel_k", "rel_q", "rel_v", "rel_bias", "pos_bias_u", "pos_bias_v")


# Kernels added later are tested from the day they run; what cannot run here is one skipped test of tests/test_traps.py, with its reason.
USABLE = [name for name, reason in relattn.available_backends().items() if reason is None]
every_backend = pytest.mark.parametrize("backend", USABLE)


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@functools.cache
def takes_float64(backend: str) -> bool:
    one = torch.zeros(1, 1, 1, 16, dtype=torch.float64, device=device_of(backend))
    return backend in ("reference", "blocked") or relattn.explain(one, one, one).reasons.get(backend) is None


def precision(backend: str) -> float:
    """What `attend` may be off by on float64 input, for results and gradients of up to about ten."""
    return 1e-12 if takes_float64(backend) else 1e-4


def attend(backend: str, **call):
    """`relative_attention` by one backend, on its device; skips where this backend says that it does not take such calls.

    The tensors of `call` stay leaves (gradients reach them); results come back to the CPU. A backend without float64 gets float32.
    """

    def move(value):
        if not isinstance(value, Tensor):
            return value
        single = value.dtype == torch.float64 and not takes_float64(backend)
        return value.to(device_of(backend), torch.float32 if single else value.dtype)

    moved = {name: move(value) for name, value in call.items()}
    if backend not in ("reference", "blocked"):  # these two take everything, by design
        arguments = {name: value for name, value in moved.items() if name != "return_lse"}
        reason = relattn.explain(**arguments).reasons.get(backend)
        if reason is not None:
            pytest.skip(f"{backend}: {reason}")
    result = relattn.relative_attention(**moved, backend=backend)

    def back(value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.to("cpu", dtype)

    dtype = call["query"].dtype
    if isinstance(result, tuple):
        return back(result[0], dtype), back(result[1], torch.float64 if dtype == torch.float64 else result[1].dtype)
    return back(result, dtype)


def definition(
    query, key, value, rel_k=None, *, rel_q=None, rel_v=None, rel_bias=None, pos_bias_u=None, pos_bias_v=None,
    max_relative_position=None, attn_mask=None, key_mask=None, key_lengths=None, is_causal=False, window=None,
    query_offset=None, scale=None, enable_gqa=False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """DESIGN.md, section 2, a Python number at a time: (output, lse) in float64. Shares no code with relattn."""
    batch, heads, query_length, size = query.shape
    key_length, value_size = value.shape[2:]
    group = heads // key.shape[1]
    tables = [table.shape[-2] for table in (rel_k, rel_q, rel_v) if table is not None]
    tables += [] if rel_bias is None else [rel_bias.shape[-1]]
    if max_relative_position is not None:
        left, right = (max_relative_position,) * 2 if isinstance(max_relative_position, int) else max_relative_position
    else:
        left = right = (tables[0] - 1) // 2 if tables else 0
    scale = 1 / math.sqrt(size) if scale is None else scale
    mask = None if attn_mask is None else attn_mask.broadcast_to(batch, heads, query_length, key_length)
    lowest = None if mask is None or mask.dtype == torch.bool else torch.finfo(mask.dtype).min / 2
    window_left, window_right = (None, None) if window is None else window

    def numbers(tensor):
        return None if tensor is None else tensor.detach().tolist()

    def by_head(table, dims):  # a table shared by the heads is each head's
        return None if table is None else numbers(table if table.dim() == dims else table.expand(heads, *table.shape))

    q, k, v, mask_of, key_seen = map(numbers, (query, key, value, mask, key_mask))
    rel_k, rel_q, rel_v, rel_bias = by_head(rel_k, 3), by_head(rel_q, 3), by_head(rel_v, 3), by_head(rel_bias, 2)
    zero = [[0.0] * size] * heads
    u, w = numbers(pos_bias_u) or zero, numbers(pos_bias_v) or zero

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    def plus(a, b):
        return [x + y for x, y in zip(a, b, strict=True)]

    output = torch.zeros(batch, heads, query_length, value_size, dtype=torch.float64)
    lse = torch.full((batch, heads, query_length), -math.inf, dtype=torch.float64)
    for b in range(batch):
        offset = query_offset
        if isinstance(offset, Tensor):
            offset = int(offset) if offset.dim() == 0 else int(offset[b])
        for h in range(heads):
            for i in range(query_length):
                scores, values = [], []
                for j in range(key_length):
                    d = j - (i + (offset or 0))
                    r = (-left if d < -left else right if d > right else d) + left
                    if is_causal and d > 0:
                        continue
                    if window_left is not None and d < -window_left:
                        continue
                    if window_right is not None and d > window_right:
                        continue
                    if key_seen is not None and not key_seen[b][j]:
                        continue
                    if key_lengths is not None and j >= int(key_lengths[b]):
                        continue
                    added = 0.0 if mask is None else mask_of[b][h][i][j]
                    if added is False or (lowest is not None and added <= lowest):
                        continue
                    key_j = k[b][h // group][j]
                    product = dot(plus(q[b][h][i], u[h]), key_j)
                    if rel_k is not None:
                        product += dot(plus(q[b][h][i], w[h]), rel_k[h][r])
                    if rel_q is not None:
                        product += dot(key_j, rel_q[h][r])
                    score = scale * product
                    if rel_bias is not None:
                        score += rel_bias[h][r]
                    if lowest is not None:
                        score += added
                    scores.append(score)
                    values.append(v[b][h // group][j] if rel_v is None else plus(v[b][h // group][j], rel_v[h][r]))
                if scores:
                    highest = max(scores)
                    shares = [math.exp(score - highest) for score in scores]
                    total = sum(shares)
                    lse[b, h, i] = highest + math.log(total)
                    row = [sum(s * x[c] for s, x in zip(shares, values, strict=True)) / total for c in range(value_size)]
                    output[b, h, i] = torch.tensor(row, dtype=torch.float64)
    return output, lse


flag = st.booleans()


def calls(draw, dtype: torch.dtype = torch.float64) -> dict:
    """Arguments of `relative_attention` (without dropout, backend and return_lse): any terms, any settings, tiny sizes.

    Lengths to 7 against clips to 4 give distances on both sides of either edge; value's size differs from query's, so that one taken
    for the other fails; offsets reach beyond the keys, so that rows without a key to see are common.
    """
    torch.manual_seed(draw(st.integers(0, 2**31)))
    batch, key_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    heads = key_heads * group
    query_length, key_length = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    size, value_size = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    left, right = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    rows = left + right + 1

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    def table(*shape: int) -> Tensor | None:
        return random(*((heads,) if draw(flag) else ()), *shape) if draw(flag) else None

    call = dict(
        query=random(batch, heads, query_length, size),
        key=random(batch, key_heads, key_length, size),
        value=random(batch, key_heads, key_length, value_size),
        rel_k=table(rows, size),
        rel_q=table(rows, size),
        rel_v=table(rows, value_size),
        rel_bias=table(rows),
        pos_bias_u=random(heads, size) if draw(flag) else None,
        pos_bias_v=random(heads, size) if draw(flag) else None,
        is_causal=draw(flag),
        enable_gqa=group > 1,
        scale=draw(st.sampled_from((None, 0.7))),
    )
    if call["rel_k"] is None:
        call["pos_bias_v"] = None  # stands in rel_k's product only, and is refused without it
    if any(call[name] is not None for name in ("rel_k", "rel_q", "rel_v", "rel_bias")) and not (left == right and draw(flag)):
        call["max_relative_position"] = left if left == right and draw(flag) else (left, right)
    if draw(flag):
        side = st.one_of(st.none(), st.integers(0, 4))
        call["window"] = (draw(side), draw(st.sampled_from((None, 0))) if call["is_causal"] else draw(side))
    kinds = ("one", "each") if call["is_causal"] and query_length != key_length else (None, "one", "each", "0-d")
    match draw(st.sampled_from(kinds)):
        case "one":
            call["query_offset"] = draw(st.integers(-4, 8))
        case "each":
            kind = draw(st.sampled_from((torch.int64, torch.int32, torch.int8)))
            call["query_offset"] = torch.randint(-4, 9, (batch,), dtype=kind)
        case "0-d":
            call["query_offset"] = torch.tensor(draw(st.integers(-4, 8)))
    if draw(flag):
        call["key_mask"] = torch.rand(batch, key_length) < 0.7
    if draw(flag):
        call["key_lengths"] = torch.randint(0, key_length + 1, (batch,), dtype=draw(st.sampled_from((torch.int64, torch.int32))))
    kind = draw(st.sampled_from((None, "bool", "float")))
    if kind is not None:
        full = (batch, heads, query_length, key_length)
        shape = [size if draw(flag) else 1 for size in full][draw(st.integers(0, 3)) :]
        mask = torch.rand(shape) < 0.7
        if kind == "float":
            hidden = draw(st.sampled_from((-math.inf, torch.finfo(dtype).min)))
            mask = random(*shape).masked_fill(~mask, hidden)
        call["attn_mask"] = mask
    return {name: value for name, value in call.items() if value is not None}


def everything(
    batch: int = 2, heads: int = 2, query_length: int = 5, key_length: int = 5, size: int = 4, value_size: int = 3, clip: int = 2,
    *, dtype: torch.dtype = torch.float64, grad: bool = False, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Every floating-point argument of a call, random; half of the tables by head, half shared."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

    rows = 2 * clip + 1
    return dict(
        query=random(batch, heads, query_length, size),
        key=random(batch, heads, key_length, size),
        value=random(batch, heads, key_length, value_size),
        rel_k=random(heads, rows, size),
        rel_q=random(rows, size),
        rel_v=random(rows, value_size),
        rel_bias=random(heads, rows),
        pos_bias_u=random(heads, size),
        pos_bias_v=random(heads, size),
    )


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(
    batch: int, heads: int, query_length: int, key_length: int, size: int, key_heads: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value."""
    key_heads = heads if key_heads is None else key_heads
    return (
        random(batch, heads, query_length, size, seed=1),
        random(batch, key_heads, key_length, size, seed=2),
        random(batch, key_heads, key_length, size, seed=3),
    )


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal to an absolute tolerance, infinities in the same places."""
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0.0)
