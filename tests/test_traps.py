"""Bugs that relative attention is known for, each stated where it is tested (DESIGN.md, section 6). On every backend this machine has.

Traps of the layer are in tests/test_module.py, those of transformers in tests/huggingface.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import relattn
from tests.oracles import USABLE, attend, close, definition, device_of, every_backend, everything, precision, takes_float64

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.parametrize("backend", [name for name in relattn.available_backends() if name not in USABLE])
def test_every_backend_is_tested(backend: str) -> None:
    """Not on this machine: the one place where the tests say so."""
    pytest.skip(f"{backend}: {relattn.available_backends()[backend]}")


def tolerance(dtype: torch.dtype) -> float:
    """For outputs of a few times 1 in size."""
    return 1e-12 if dtype == torch.float64 else 40 * torch.finfo(dtype).eps


# Skews


def seeds_skewing(tensor: Tensor) -> Tensor:
    """`_skewing` of the seed notebook, as published there."""
    batch_size, num_heads, length, _ = tensor.shape
    padded = F.pad(tensor, (1, 0))
    reshaped = padded.reshape(batch_size, num_heads, 2 * length, length)
    return reshaped[:, :, length:, :]


def labelled(length: int, columns: int) -> Tensor:
    """Logits that say where they come from: 1000 * (query + 1) + column."""
    return (1000.0 * torch.arange(1, length + 1)[:, None] + torch.arange(columns)).double()[None, None]


@pytest.mark.parametrize("length", [16, 8, 2])  # 16 is the notebook's; its formula for odd lengths differs and is no better
def test_the_seed_notebooks_skew_reads_other_queries(length: int) -> None:
    """The notebook keeps rows L ... 2L - 1 of the (2L, L) reshape: output row i is made of the logits of query L/2 + i // 2, at
    distances that jump, with a padding's 0 in every other row. "Vanilla beats relative" was measured with that."""
    logits = labelled(length, 2 * length - 1)
    theirs, ours = seeds_skewing(logits)[0, 0], relattn.skew(logits)[0, 0]
    for i in range(length):
        read = theirs[i][theirs[i] != 0]
        assert (read // 1000 - 1).tolist() == [length // 2 + i // 2] * (length - (i % 2 == 0))
        assert (ours[i] // 1000 - 1).tolist() == [i] * length
        assert (ours[i] % 1000 - (length - 1)).tolist() == [j - i for j in range(length)]


@every_backend
def test_the_operator_is_not_the_seed_notebooks(backend: str) -> None:
    """At the notebook's size, 16 tokens and 4 heads of 32: the right distances, and far from what the notebook computed."""
    call = {name: value for name, value in everything(2, 4, 16, 16, 32, 32, clip=15).items() if name in ("query", "key", "value", "rel_q")}
    table = call.pop("rel_q")
    logits = call["query"] @ table.T
    distance = torch.arange(16) - torch.arange(16)[:, None]
    right = logits.gather(-1, (distance + 15).expand(2, 4, 16, 16))
    output = attend(backend, **call, rel_k=table)
    close(output, F.scaled_dot_product_attention(**call, attn_mask=right / math.sqrt(32)), precision(backend))
    notebook = F.scaled_dot_product_attention(**call, attn_mask=seeds_skewing(logits) / math.sqrt(32))
    assert (output - notebook).abs().amax((0, 1, 3)).min() > 0.1  # every query gets something else


@pytest.mark.parametrize("length", [6, 7])
def test_the_causal_skew_leaves_nothing_above_the_diagonal(length: int) -> None:
    """Ports of Music Transformer skip the paper's mask before the skew: above the diagonal then stand the *next* query's logits, from
    its farthest keys on. Harmless under a causal mask, silent garbage without one."""
    logits = labelled(length, length)
    published = F.pad(logits, (1, 0)).reshape(1, 1, length + 1, length)[..., 1:, :]
    ours = relattn.skew(logits, is_causal=True)
    for i in range(length):
        for j in range(length):
            if j <= i:
                assert ours[0, 0, i, j] == published[0, 0, i, j] == logits[0, 0, i, length - 1 + j - i]
            else:
                assert ours[0, 0, i, j] == 0
                assert published[0, 0, i, j] == (logits[0, 0, i + 1, j - i - 2] if j > i + 1 else 0)


@every_backend
def test_a_causal_table_without_is_causal_clamps_ahead(backend: str) -> None:
    """The same table (L - 1, 0) without is_causal: keys ahead read the row of distance 0, not the next query's logits."""
    call = everything(query_length=6, key_length=6, clip=5)
    call = {name: call[name] for name in ("query", "key", "value")} | dict(rel_k=call["rel_q"][:6])
    clamped = call["query"] @ call["rel_k"].T
    distance = torch.arange(6) - torch.arange(6)[:, None]
    bias = clamped.gather(-1, (distance.clamp(max=0) + 5).expand(2, 2, 6, 6)) / 2
    expected = F.scaled_dot_product_attention(call["query"], call["key"], call["value"], attn_mask=bias)
    close(attend(backend, **call, max_relative_position=(5, 0)), expected, precision(backend))


# Masks


@every_backend
@every_dtype
@pytest.mark.parametrize("hidden", ["-inf", "finfo.min", "finfo.min / 2"])
@pytest.mark.parametrize("mask_dtype", ["query's", "float32"])
@pytest.mark.parametrize("length", [9, 150])  # one tile or strip, and more than one (128 or less) that none divides
def test_the_lowest_number_hides_a_key(backend: str, dtype: torch.dtype, hidden: str, mask_dtype: str, length: int) -> None:
    """Libraries write finfo.min where they mean -inf. Multiplied by log2(e) for exp2 it overflows, and a row of such entries gives
    -inf - -inf = NaN; taken literally such a row attends evenly to everything it must not see."""
    mask_dtype = dtype if mask_dtype == "query's" else torch.float32
    entry = {"-inf": -math.inf, "finfo.min": torch.finfo(mask_dtype).min, "finfo.min / 2": torch.finfo(mask_dtype).min / 2}[hidden]
    seen = torch.rand(2, 1, length, length, generator=torch.Generator().manual_seed(0)) < 0.6
    seen[1, :, 4] = False  # nothing to attend to
    seen[0, :, :, 2:] &= torch.arange(length)[:, None] != 5  # query 5 sees at most the first two keys
    added = torch.randn(2, 1, length, length, generator=torch.Generator().manual_seed(1)).to(mask_dtype)
    results = []
    for mask in (added.masked_fill(~seen, entry), added.masked_fill(~seen, -math.inf)):
        call = everything(query_length=length, key_length=length, dtype=dtype, grad=True)
        output, lse = attend(backend, **call, attn_mask=mask, return_lse=True)
        assert output[1, :, 4].abs().max() == 0
        assert (lse[1, :, 4] == -math.inf).all()
        assert (lse[:, :, 5 if length == 9 else 6 :].isfinite()).any()
        output.float().square().sum().backward()
        gradients = [value.grad for value in call.values()]
        assert all(gradient.isfinite().all() for gradient in gradients)
        results.append((output, lse, *gradients))
    for literal, infinite in zip(*results, strict=True):
        assert torch.equal(literal, infinite)
    call = everything(query_length=length, key_length=length, dtype=dtype)
    rows = slice(2, 8)
    if length == 9:
        expected = definition(**call, attn_mask=added.masked_fill(~seen, entry))[0]
        close(results[0][0].detach().double()[:, :, rows], expected[:, :, rows], tolerance(dtype))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_finite_entries_are_added(backend: str, dtype: torch.dtype) -> None:
    """Old BERT's -10000 and others' -1e9 are numbers: a row of nothing else attends as if there were no mask (softmax does not mind a
    constant); beside ordinary entries they hide. And an entry just above half the lowest number is still a number."""
    call = everything(dtype=dtype)
    plain, lse = attend(backend, **call, return_lse=True)
    constant = torch.full((5, 5), -1e4, dtype=dtype)
    output, shifted = attend(backend, **call, attn_mask=constant, return_lse=True)
    computed = dtype if takes_float64(backend) else torch.float32
    slack = 1e4 * torch.finfo(computed).eps * 10  # rounding of scores near -1e4
    close(output, plain, slack)
    close(shifted, lse - 1e4, slack)
    beside = torch.zeros(5, 5, dtype=dtype)
    beside[:, 3] = -1e9
    exact = attend(backend, **call, attn_mask=beside != -1e9)
    close(attend(backend, **call, attn_mask=beside), exact, tolerance(computed))
    nearly = torch.full((5, 5), torch.finfo(computed).min / 2 * 0.99, dtype=dtype)
    output, lse = attend(backend, **call, attn_mask=nearly, return_lse=True)
    assert lse.isfinite().all()
    assert output.isfinite().all()
    assert (output != 0).any()


@every_backend
def test_true_means_may_attend(backend: str) -> None:
    """nn.MultiheadAttention's masks say the opposite. Each mask of the function leaves one key: its value (and rel_v's row) comes out."""
    call = everything()
    expected = definition(**call)[0]  # only for its shape and its difference
    only = torch.arange(5) == 3
    rows = (3 - torch.arange(5)).clamp(-2, 2) + 2
    value = call["value"][:, :, 3:4] + call["rel_v"][rows]
    assert (expected - value).abs().max() > 0.1
    for mask in (
        dict(attn_mask=only),
        dict(attn_mask=only.expand(2, 2, 5, 5)),
        dict(attn_mask=torch.zeros(5).double().masked_fill(~only, -math.inf)),
        dict(key_mask=only.expand(2, 5)),
        dict(key_lengths=torch.tensor([4, 4]), window=(5, 0), attn_mask=torch.arange(5) >= 3),
    ):
        output = attend(backend, **call, **mask)
        if "window" in mask:  # queries 0 to 2 stand left of key 3
            assert not output[:, :, :3].any()
            output, value = output[:, :, 3:], value[:, :, 3:]
        close(output, value, precision(backend))
    close(
        attend(backend, **{name: call[name] for name in ("query", "key", "value")}, attn_mask=torch.ones(5, 5).tril().bool()),
        F.scaled_dot_product_attention(call["query"], call["key"], call["value"], attn_mask=torch.ones(5, 5).tril().bool()),
        precision(backend),
    )


NOTHING = {  # settings under which the queries named see nothing, out of 2 sequences of 5 queries and 5 keys
    "attn_mask": (dict(attn_mask=torch.arange(5)[:, None].expand(5, 5) != 2), [(0, 2), (1, 2)]),
    "attn_mask of -inf": (dict(attn_mask=torch.zeros(2, 1, 5, 1).double().index_fill(2, torch.tensor([1]), -math.inf)), [(0, 1), (1, 1)]),
    "key_mask": (dict(key_mask=torch.tensor([[True] * 5, [False] * 5])), [(1, i) for i in range(5)]),
    "key_lengths": (dict(key_lengths=torch.tensor([0, 3])), [(0, i) for i in range(5)]),
    "is_causal": (dict(is_causal=True, query_offset=-2), [(b, i) for b in range(2) for i in range(2)]),
    "is_causal by sequence": (dict(is_causal=True, query_offset=torch.tensor([-9, -1])), [(0, i) for i in range(5)] + [(1, 0)]),
    "window beyond the keys": (dict(window=(1, 1), query_offset=4), [(b, i) for b in range(2) for i in range(2, 5)]),
    "window before the keys": (dict(window=(1, 1), query_offset=-9), [(b, i) for b in range(2) for i in range(5)]),
    "together": (
        dict(is_causal=True, window=(0, None), key_mask=torch.tensor([[False, False, True, True, True]] * 2)),
        [(b, i) for b in range(2) for i in range(2)],
    ),
}  # fmt: skip


@every_backend
@pytest.mark.parametrize("how", NOTHING)
def test_a_query_that_sees_nothing_gets_zero(backend: str, how: str) -> None:
    """softmax over nothing is NaN, and one NaN row poisons all gradients. Here: output 0, lse -inf, gradient 0, other rows unharmed."""
    options, rows = NOTHING[how]
    call = everything(grad=True)
    output, lse = attend(backend, **call, **options, return_lse=True)
    expected, expected_lse = definition(**call, **options)
    close(output, expected, precision(backend))
    close(lse, expected_lse, precision(backend))
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    for b, i in rows:
        nothing[b, i] = True
    assert torch.equal(lse == -math.inf, nothing[:, None].expand(2, 2, 5))  # these rows and no others
    assert not output.transpose(1, 2)[nothing].any()
    (output.square().sum() + output.sum() + lse.sum()).backward()
    assert not call["query"].grad.transpose(1, 2)[nothing].any()
    for name, value in call.items():
        assert value.grad.isfinite().all(), name
    if not nothing.all():
        assert call["query"].grad.transpose(1, 2)[~nothing].abs().sum(-1).min() > 0
        gradients = {name: value.grad.clone() for name, value in call.items()}
        seen = everything(grad=True)
        output, lse = attend(backend, **seen, **options, return_lse=True)
        kept = ~nothing[:, None].expand(2, 2, 5)
        (output[kept].square().sum() + output[kept].sum() + lse[kept].sum()).backward()
        for name, value in seen.items():  # the rows that see nothing add nothing anywhere
            close(value.grad, gradients[name], precision(backend))
    else:
        assert all(not value.grad.any() for value in call.values())


@every_backend
@every_dtype
def test_a_query_that_sees_nothing_in_half_precision(backend: str, dtype: torch.dtype) -> None:
    call = everything(dtype=dtype, grad=True)
    output, lse = attend(backend, **call, key_lengths=torch.tensor([5, 0]), return_lse=True)
    assert torch.equal(output[1], torch.zeros_like(output[1]))
    assert (lse[1] == -math.inf).all()
    output.float().sum().backward()
    for name, value in call.items():
        assert value.grad.isfinite().all(), name
    assert all(not call[name].grad[1].any() for name in ("query", "key", "value"))


@every_backend
def test_hidden_keys_may_hold_anything(backend: str) -> None:
    """Padding is not always zeros: a hidden key's huge numbers must not reach the result or its gradients."""
    call = everything()
    hidden = torch.tensor([[True, True, True, False, False], [True] * 5])
    clean = attend(backend, **call, key_mask=hidden)
    for name in ("key", "value"):
        call[name] = call[name].clone()
        call[name][0, :, 3:] = 1e30
    for value in call.values():
        value.requires_grad_()
    output = attend(backend, **call, key_mask=hidden)
    close(output, clean, precision(backend))
    output.sum().backward()
    assert all(value.grad.isfinite().all() for value in call.values())
    assert not call["key"].grad[0, :, 3:].any()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("term", ["key", "rel_k", "rel_q"])
def test_products_beyond_half_precisions_range(backend: str, dtype: torch.dtype, term: str) -> None:
    """64 products of 40 * 40 make 102400, beyond float16's 65504, where the scaled score of 12800 is not: a product kept in float16
    before it is scaled is inf, and inf - inf NaN. torch's attention takes such input."""
    size, large = 64, 40.0
    call = dict(query=torch.full((1, 1, 4, size), large), key=torch.zeros(1, 1, 4, size), value=torch.randn(1, 1, 4, size))
    if term == "rel_q":
        call["query"], call["key"] = call["key"], call["query"]
    call[term] = torch.full((1, 1, 4, size) if term == "key" else (3, size), large)
    output, lse = attend(backend, **{name: value.to(dtype) for name, value in call.items()}, return_lse=True)
    close(lse, torch.full((1, 1, 4), large * large * 8 + math.log(4)), 0.01)
    close(output, call["value"].to(dtype).float().mean(2, keepdim=True).expand(1, 1, 4, size).to(dtype), tolerance(dtype))


# Positions


@every_backend
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(max_relative_position=(1, 3)),
        dict(is_causal=True),
        dict(window=(2, 1)),
        dict(window=(1, None), is_causal=True),
        dict(key_lengths=torch.tensor([9, 4])),
    ],
    ids=lambda options: ", ".join(options) or "clamp",
)
@pytest.mark.parametrize("start", [0, 3, 8])
def test_the_offset_enters_clamp_causal_and_window(backend: str, options, start: int) -> None:
    """Decoding from a cache: a call with the queries from `start` on is those rows of the whole call. Offsets forgotten in one of the
    three places agree at start = 0 only."""
    call = everything(query_length=9, key_length=9)
    whole, whole_lse = attend(backend, **call, **options, query_offset=0, return_lse=True)
    for stop in (start + 1, 9):  # one step and many
        part = call | dict(query=call["query"][:, :, start:stop])
        for offset in (start, torch.tensor(start), torch.tensor([start, start], dtype=torch.int32)):
            output, lse = attend(backend, **part, **options, query_offset=offset, return_lse=True)
            close(output, whole[:, :, start:stop], precision(backend))
            close(lse, whole_lse[:, :, start:stop], precision(backend))
    moved = attend(backend, **call, **options, query_offset=2)
    assert "key_lengths" in options or (moved - whole).abs().amax((1, 2, 3)).min() > 0.01  # and an offset does something


@every_backend
def test_offsets_by_sequence(backend: str) -> None:
    """Each sequence of a batch at its own place equals each alone; negative places too."""
    call = everything(3, query_length=4, key_length=7)
    options = dict(is_causal=True, window=(3, None))
    offsets = torch.tensor([3, -2, 6])
    output, lse = attend(backend, **call, **options, query_offset=offsets, return_lse=True)
    for b in range(3):
        alone = call | {name: call[name][b : b + 1] for name in ("query", "key", "value")}
        one, one_lse = attend(backend, **alone, **options, query_offset=int(offsets[b]), return_lse=True)
        close(output[b : b + 1], one, precision(backend))
        close(lse[b : b + 1], one_lse, precision(backend))


@every_backend
@pytest.mark.parametrize("offset", [2**33, -(2**33), 2**31 - 2, -(2**31) + 2], ids=str)
@pytest.mark.parametrize("by_sequence", [False, True])
def test_far_offsets_do_not_overflow(backend: str, offset: int, by_sequence: bool) -> None:
    """All distances clamp to one edge row. In 32-bit arithmetic 2^33 is 0, and 2^31 - 2 + i turns negative."""
    call = everything()
    given = torch.tensor([offset] * 2) if by_sequence else offset
    row = 0 if offset > 0 else -1
    one_row = call | dict(rel_k=call["rel_k"][:, [row]], rel_q=call["rel_q"][[row]], rel_v=call["rel_v"][[row]])
    one_row["rel_bias"] = call["rel_bias"][:, [row]]
    output, lse = attend(backend, **call, query_offset=given, return_lse=True)
    expected, expected_lse = attend(backend, **one_row, return_lse=True)
    close(output, expected, precision(backend))
    close(lse, expected_lse, precision(backend))
    causal, causal_lse = attend(backend, **call, query_offset=given, is_causal=True, return_lse=True)
    close(causal, expected if offset > 0 else torch.zeros_like(expected), precision(backend))
    close(causal_lse, expected_lse if offset > 0 else torch.full_like(expected_lse, -math.inf), precision(backend))


@every_backend
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16], ids=str)
def test_offsets_and_lengths_in_small_integers(backend: str, dtype: torch.dtype) -> None:
    """Arithmetic in the tensor's own dtype would wrap: query 29 at offset 120 stands at 149, beyond int8; uint8 has no -1."""
    call = everything(query_length=30, key_length=160)
    small, large = torch.tensor([120, 100], dtype=dtype), torch.tensor([120, 100])
    options = dict(window=(5, 2))
    output = attend(backend, **call, **options, query_offset=small, key_lengths=small)
    close(output, attend(backend, **call, **options, query_offset=large, key_lengths=large), precision(backend))
    assert output.abs().amax((1, 2, 3)).min() > 0.1


@every_backend
def test_unclipped_tables_read_every_row(backend: str) -> None:
    """Rows one off at either end, or an edge row read twice: with as many rows as distances each row's gradient comes from its own
    diagonal, L - |d| pairs. Uniform weights (query 0) make rel_bias's gradient easy to write down."""
    length = 150  # beyond a strip or tile of 128, and odd ones: none divides it
    value = torch.randn(1, 1, length, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rel_bias = torch.zeros(2 * length - 1, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, 1, length, 2, dtype=torch.float64)
    attend(backend, query=zero, key=zero, value=value, rel_bias=rel_bias).square().sum().backward()
    mean = value.mean()
    each = 2 * mean * (value.flatten() - mean) / length  # d(mean^2)/ds_ij, for every i
    expected = torch.stack([each[max(0, d) : length + min(0, d)].sum() for d in range(1 - length, length)])
    close(rel_bias.grad, expected, precision(backend))


# Memory


@every_backend
@pytest.mark.parametrize("layout", ["heads first", "heads last"])
@pytest.mark.parametrize("sizes", [(2, 3, 5, 4), (2, 1, 5, 4), (1, 3, 1, 4)], ids=str)
def test_the_output_lies_as_sdpas_does(backend: str, layout: str, sizes) -> None:
    """Models view the heads-last output as (B, L, H * D): a backend with a layout of its own breaks that, or costs a copy, and
    disagrees with what torch.compile was told."""
    batch, heads, length, size = sizes
    shape = sizes if layout == "heads first" else (batch, length, heads, size)
    query, key, value = (torch.randn(shape, device=device_of(backend)) for _ in range(3))
    if layout == "heads last":
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    rel_k = torch.randn(3, size, device=device_of(backend))
    output = relattn.relative_attention(query, key, value, rel_k, backend=backend)
    theirs = F.scaled_dot_product_attention(query, key, value)

    def strides(tensor: Tensor) -> list[int]:  # of sizes above 1: the others mean nothing
        return [stride for stride, count in zip(tensor.stride(), tensor.shape, strict=True) if count > 1]

    assert strides(output) == strides(theirs)
    if layout == "heads last":
        output.transpose(1, 2).view(batch, length, heads * size)  # raises where a copy would be needed


@every_backend
def test_inputs_in_any_memory_order_and_left_alone(backend: str) -> None:
    """Strided slices, expanded and transposed inputs give what contiguous ones give, and none is written to."""
    call = everything(query_length=6, key_length=6, size=3, value_size=3)

    def strange(tensor: Tensor) -> Tensor:
        wide = torch.full((*tensor.shape, 2), math.nan, dtype=tensor.dtype)
        wide[..., 0] = tensor
        return wide[..., 0].transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.dim() == 3 else wide[..., 0]

    moved = {name: strange(value) for name, value in call.items()}
    moved["value"] = call["value"][:1].expand(2, -1, -1, -1)
    call["value"] = moved["value"].contiguous()
    before = {name: value.clone() for name, value in moved.items()}
    close(attend(backend, **moved, is_causal=True), attend(backend, **call, is_causal=True), precision(backend))
    for name, value in moved.items():
        assert torch.equal(value, before[name]), name
