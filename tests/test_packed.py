"""Packed sequences and chunks through the public functions and the layer (every backend's results: tests/fuzz.py draws both)."""

from __future__ import annotations

import inspect
import os
import re

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import relattn
from benchmarks.measure import extra_memory
from relattn import RelativeMultiheadAttention, relative_attention, relative_attention_varlen
from tests.fuzz import check, packed_call
from tests.oracles import USABLE

LENGTHS = (3, 0, 7, 1, 12, 0)


def ends(lengths=LENGTHS, dtype=torch.int32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def tensors(lengths=LENGTHS, heads: int = 4, size: int = 16, dtype=torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = {name: (sum(lengths), heads, size) for name in ("query", "key", "value")} | {"rel_k": (9, size)}
    return {name: torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for name, shape in shapes.items()}


def one_at_a_time(call: dict[str, Tensor], lengths=LENGTHS, **arguments) -> Tensor:
    """Outputs of `relative_attention` of each sequence, joined."""
    outputs, start = [call["query"][:0]], 0
    for length in lengths:
        part = {name: call[name][start : start + length].transpose(0, 1)[None] for name in ("query", "key", "value")}
        outputs.append(relative_attention(**part, rel_k=call["rel_k"], **arguments)[0].transpose(0, 1))
        start += length
    return torch.cat(outputs)


OPTIONS = [{}, dict(is_causal=True), dict(window=(2, 3)), dict(chunk=(3, 1)), dict(chunk=(4, None), is_causal=True)]


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_sequence_is_a_call_of_its_own(backend: str, options: dict) -> None:
    call = tensors()
    output = relative_attention_varlen(**call, cu_seqlens_q=ends(), **options, backend=backend)
    expected = one_at_a_time(call, **options, backend=backend)
    torch.testing.assert_close(output, expected)
    weight = torch.randn_like(output)
    found, wanted = (torch.autograd.grad((of * weight).sum(), list(call.values())) for of in (output, expected))
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", USABLE)
def test_one_sequence_is_the_call_that_is_not_packed(backend: str) -> None:
    """To the last bit."""
    call = tensors((130,))
    output, lse = relative_attention_varlen(**call, cu_seqlens_q=ends((130,)), is_causal=True, return_lse=True, backend=backend)
    plain = {name: call[name].transpose(0, 1)[None] for name in ("query", "key", "value")}
    expected, expected_lse = relative_attention(**plain, rel_k=call["rel_k"], is_causal=True, return_lse=True, backend=backend)
    assert torch.equal(output, expected[0].transpose(0, 1))
    assert torch.equal(lse, expected_lse[0])
    found, wanted = (torch.autograd.grad(of.square().sum(), list(call.values())) for of in (output, expected))
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("backend", USABLE)
def test_the_order_of_sequences_is_of_no_account(backend: str) -> None:
    """To the last bit, but for the gradient of the table, which is summed over all of them."""
    lengths, turned = (5, 40, 17), (17, 40, 5)
    call = tensors(lengths)
    rows = torch.cat([torch.arange(45, 62), torch.arange(5, 45), torch.arange(5)])
    other = {name: (tensor if name == "rel_k" else tensor[rows]).detach().requires_grad_() for name, tensor in call.items()}
    output = relative_attention_varlen(**call, cu_seqlens_q=ends(lengths), backend=backend)
    turned_output = relative_attention_varlen(**other, cu_seqlens_q=ends(turned), backend=backend)
    assert torch.equal(output[rows], turned_output)
    found, wanted = (
        torch.autograd.grad(of.square().sum(), list(of_call.values())) for of, of_call in ((output, call), (turned_output, other))
    )
    for name, gradient, expected in zip(call, found, wanted, strict=True):
        if name == "rel_k":
            torch.testing.assert_close(gradient, expected, atol=2e-5, rtol=1e-4)
        else:
            assert torch.equal(gradient[rows], expected), name


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,)], ids=str)
def test_nothing_and_almost_nothing(backend: str, lengths: tuple) -> None:
    call = tensors(lengths)
    output, lse = relative_attention_varlen(**call, cu_seqlens_q=ends(lengths), return_lse=True, backend=backend)
    assert output.shape == (sum(lengths), 4, 16)
    assert lse.shape == (4, sum(lengths))
    gradients = torch.autograd.grad(output.sum(), list(call.values()), allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
    if lengths == (1,):
        torch.testing.assert_close(output, call["value"])


@pytest.mark.parametrize("backend", USABLE)
def test_queries_without_keys_and_keys_without_queries(backend: str) -> None:
    call = tensors((4, 3)) | {name: tensors((5, 6))[name] for name in ("key", "value")}
    output, lse = relative_attention_varlen(
        **call, cu_seqlens_q=ends((4, 0, 3)), cu_seqlens_k=ends((0, 5, 6)), return_lse=True, backend=backend
    )
    assert torch.equal(output[:4], torch.zeros(4, 4, 16))
    assert (lse[:, :4] == -torch.inf).all()
    gradients = dict(zip(call, torch.autograd.grad(output.square().sum(), list(call.values())), strict=True))
    assert gradients["key"][:5].abs().max() == gradients["value"][:5].abs().max() == gradients["query"][:4].abs().max() == 0
    assert gradients["key"][5:].abs().max() > 0


@pytest.mark.parametrize("backend", USABLE)
def test_the_mask_of_dropout_is_that_of_the_padded_call(backend: str) -> None:
    call, longest = tensors((9, 12)), 12

    def padded(tensor: Tensor) -> Tensor:
        return torch.stack([torch.cat((tensor[:9], tensor.new_zeros(3, 4, 16))), tensor[9:]]).transpose(1, 2)

    torch.manual_seed(0)
    output = relative_attention_varlen(**call, cu_seqlens_q=ends((9, 12)), dropout_p=0.4, max_seqlen_q=longest, backend=backend)
    torch.manual_seed(0)
    plain = {name: padded(call[name]) for name in ("query", "key", "value")}
    lengths = torch.tensor([9, 12])
    expected = relative_attention(**plain, rel_k=call["rel_k"], key_lengths=lengths, dropout_p=0.4, backend=backend).transpose(1, 2)
    torch.testing.assert_close(output, torch.cat((expected[0, :9], expected[1])))


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_calls(backend: str, dtype: torch.dtype) -> None:
    for seed in range(100, 140):
        check(packed_call(seed), backend, dtype)


@pytest.mark.parametrize("backend", USABLE)
def test_what_is_hidden_may_hold_anything(backend: str) -> None:
    call = tensors((9, 0, 12))
    hidden = torch.zeros(21, dtype=torch.bool)
    hidden[[2, 3, 8, 20]] = True
    results = []
    for holds in (1.0, torch.nan, -torch.inf):
        filled = {
            name: tensor.detach().masked_fill(hidden[:, None, None], holds) if name in ("key", "value") else tensor.detach()
            for name, tensor in call.items()
        }
        filled = {name: tensor.requires_grad_() for name, tensor in filled.items()}
        output = relative_attention_varlen(**filled, cu_seqlens_q=ends((9, 0, 12)), key_mask=~hidden, backend=backend)
        results.append((output, *torch.autograd.grad(output.square().sum(), list(filled.values()))))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    assert results[0][2][hidden].abs().max() == 0


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_of_the_native_kernel(threads: int) -> None:
    """One long sequence, which they share, among short ones, which are one thread's each: the same results, twice the same bits."""
    if "cpu" not in USABLE:
        pytest.skip("no native kernel")
    lengths = (7, 1, 400, 3, 60, 0, 2, 61)
    call, kept = tensors(lengths, heads=2), torch.get_num_threads()
    expected = one_at_a_time(call, lengths, backend="cpu")
    weight = torch.randn_like(expected)
    torch.set_num_threads(threads)
    try:
        outputs = [relative_attention_varlen(**call, cu_seqlens_q=ends(lengths), backend="cpu") for _ in range(2)]
        gradients = [torch.autograd.grad((output * weight).sum(), list(call.values())) for output in outputs]
    finally:
        torch.set_num_threads(kept)
    assert torch.equal(outputs[0], expected)
    assert torch.equal(outputs[1], expected)
    assert all(map(torch.equal, *gradients))
    wanted = torch.autograd.grad((expected * weight).sum(), list(call.values()))
    torch.testing.assert_close(gradients[0], wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of resident memory cannot be reset")
def test_memory_goes_with_the_sum_of_the_lengths() -> None:
    """One long sequence among many short ones: padded, they would be a hundred times as large."""
    if "cpu" not in USABLE:
        pytest.skip("no native kernel")
    lengths = (3000, *[10] * 200)
    call = tensors(lengths, heads=2, size=32)
    relative_attention_varlen(**tensors((50,), heads=2, size=32), cu_seqlens_q=ends((50,)), backend="cpu")

    def train() -> Tensor:
        output = relative_attention_varlen(**call, cu_seqlens_q=ends(lengths), backend="cpu")
        return torch.stack([gradient.sum() for gradient in torch.autograd.grad(output.sum(), list(call.values()))])

    extra, _ = extra_memory(train)
    packed = 4 * 5000 * 2 * 32
    assert extra < 12 * packed + 8e6  # padded it would be 200 x 3000 tokens, 120 times the query alone


def test_chunks_are_what_the_mask_of_nemo_says() -> None:
    """`chunked_limited` with att_context_size [70, 13], as NeMo makes it: chunks of 14, and 5 to the left."""
    length, (left, right) = 200, (70, 13)
    call = {name: tensor.transpose(0, 1)[None] for name, tensor in tensors((length,)).items() if name != "rel_k"}
    frames = torch.arange(length) // (right + 1)
    behind = frames[:, None] - frames[None, :]
    mask = (behind >= 0) & (behind <= left // (right + 1))
    torch.testing.assert_close(relative_attention(**call, chunk=(14, 5)), relative_attention(**call, attn_mask=mask))


def test_a_cache_that_slides_with_chunks_is_the_full_pass() -> None:
    """Streaming: a chunk at a time with the chunks before it that it sees, and nothing older."""
    size, left, length = 4, 2, 30
    call = {name: tensor.transpose(0, 1)[None] for name, tensor in tensors((length,)).items() if name != "rel_k"}
    table = torch.randn(2 * 40 + 1, 16)
    whole = relative_attention(**call, rel_k=table, chunk=(size, left))
    parts, held = [], {name: call[name][:, :, :0] for name in ("key", "value")}
    for start in range(0, length, size):
        stop = min(start + size, length)
        for name in held:
            held[name] = torch.cat((held[name], call[name][:, :, start:stop]), 2)[:, :, -(left * size + stop - start) :]
        offset = held["key"].shape[2] - (stop - start)
        parts.append(relative_attention(call["query"][:, :, start:stop], **held, rel_k=table, query_offset=offset))
    torch.testing.assert_close(torch.cat(parts, 2), whole)


# ---- what is refused ----


def refused(match: str, error: type[Exception] = ValueError, **changes) -> None:
    for function in (relative_attention_varlen, relattn.explain):
        if function is relattn.explain and "end at" in match + "descend longer":
            continue  # it looks at no values
        with pytest.raises(error, match="^" + match):
            function(**(tensors() | dict(cu_seqlens_q=ends()) | changes))


def test_errors_name_the_argument() -> None:
    refused(re.escape("query: expected 3 dimensions (tokens, heads, head size), got shape (1, 2, 3, 4)"), query=torch.zeros(1, 2, 3, 4))
    refused("cu_seqlens_q: expected torch.int32 .*got torch.float32", TypeError, cu_seqlens_q=ends().float())
    refused("cu_seqlens_q: expected a tensor, got list", TypeError, cu_seqlens_q=[0, 23])
    refused(re.escape("cu_seqlens_q: expected (N + 1,), got (0,)"), cu_seqlens_q=ends()[:0])
    refused(re.escape("cu_seqlens_k: expected (7,) as cu_seqlens_q, got (2,)"), cu_seqlens_k=ends((23,)))
    refused("cu_seqlens_k: 5 keys beside 23 queries need it", key=torch.zeros(5, 4, 16), value=torch.zeros(5, 4, 16))
    refused(re.escape("key_mask: expected (23,), got (1, 23)"), key_mask=torch.ones(1, 23, dtype=torch.bool))
    refused(re.escape("key_lengths: expected (6,), got (23,)"), key_lengths=torch.ones(23, dtype=torch.int64))
    refused(re.escape("query_offset: expected (6,), got (1,)"), query_offset=torch.ones(1, dtype=torch.int64))
    refused("query_offset: is_causal with queries and keys of different cu_seqlens needs it", is_causal=True, cu_seqlens_k=ends())
    refused("max_seqlen_q: expected an int, got float", TypeError, max_seqlen_q=1.0)
    refused("max_seqlen_k: expected a length of at least 0, got -1", max_seqlen_k=-1)
    with pytest.raises(TypeError, match="attn_mask"):
        relative_attention_varlen(**tensors(), cu_seqlens_q=ends(), attn_mask=torch.zeros(23, 23))
    with pytest.raises(TypeError, match="attn_mask"):
        relattn.explain(**tensors(), cu_seqlens_q=ends(), attn_mask=torch.zeros(23, 23))


@pytest.mark.parametrize("backend", [None, *USABLE])
def test_what_cu_seqlens_hold_is_checked(backend: str | None) -> None:
    for holds, message in (
        ((1, 3, 23), "cu_seqlens_q: expected to begin at 0 and end at 23, the number of tokens, got 1 and 23"),
        ((0, 3, 22), "cu_seqlens_q: expected to begin at 0 and end at 23, the number of tokens, got 0 and 22"),
        ((0, 9, 3, 23), "cu_seqlens_q: expected numbers that do not descend, got -6 from one to the next"),
    ):
        with pytest.raises(ValueError, match="^" + message):
            relative_attention_varlen(**tensors(), cu_seqlens_q=torch.tensor(holds), backend=backend)
    with pytest.raises(ValueError, match=r"^max_seqlen_q: a sequence has 12 tokens, more than the 11 given"):
        relative_attention_varlen(**tensors(), cu_seqlens_q=ends(), max_seqlen_q=11, backend=backend)


def test_the_arguments_are_those_of_the_other_function() -> None:
    ours, others = (inspect.signature(function).parameters for function in (relative_attention_varlen, relative_attention))
    assert ours.keys() - others.keys() == {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
    assert others.keys() - ours.keys() == {"attn_mask"}
    assert all(ours[name].default == others[name].default for name in ours.keys() & others.keys())


# ---- torch ----


def test_operators() -> None:
    call = tensors()
    arguments, settings = relattn.varlen.packed_call(**call, cu_seqlens_q=ends(), max_seqlen_q=12, **defaults())
    torch.library.opcheck(torch.ops.relattn.forward.default, ("blocked", *arguments, *settings))


def defaults() -> dict:
    from relattn.functional import _DEFAULTS

    return {name: value for name, value in _DEFAULTS.items() if name not in ("rel_k", "attn_mask")}


def test_compiled_once_for_all_numbers_of_sequences() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def attend(call: dict, cu_seqlens: Tensor) -> Tensor:
        return relative_attention_varlen(**call, cu_seqlens_q=cu_seqlens, is_causal=True, chunk=(4, 1))

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for lengths in ((3, 4), (5, 1, 7), (2, 2, 2, 2, 9), (8, 4, 6), (30, 2)):
        call = tensors(lengths)
        found, expected = compiled(call, ends(lengths)), attend(call, ends(lengths))
        assert torch.equal(found, expected)
        gradients = (torch.autograd.grad(of.square().sum(), list(call.values())) for of in (found, expected))
        assert all(map(torch.equal, *gradients))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the first, and one for all sizes


def test_products_are_those_of_the_sequences() -> None:
    call = tensors()
    with FlopCounterMode(display=False) as packed:
        relative_attention_varlen(**call, cu_seqlens_q=ends()).sum().backward()
    with FlopCounterMode(display=False) as alone:
        one_at_a_time(call).sum().backward()
    assert packed.get_total_flops() == alone.get_total_flops() > 0


def test_explain() -> None:
    explanation = relattn.explain(**tensors(), cu_seqlens_q=ends())
    assert explanation.backend in USABLE


# ---- the layer ----


def layer(**options) -> RelativeMultiheadAttention:
    torch.manual_seed(0)
    options = dict(max_relative_position=4, terms=("rel_k", "rel_v", "pos_bias"), batch_first=True) | options
    return RelativeMultiheadAttention(16, 4, **options).double()


@pytest.mark.parametrize("options", [{}, dict(chunk=(3, 1)), dict(is_causal=True), dict(add_bias_kv=True, add_zero_attn=True)], ids=str)
def test_packed_input_of_the_layer(options: dict) -> None:
    of, x = layer(**options), torch.randn(23, 16, dtype=torch.float64, requires_grad=True)
    output, weights = of(x, cu_seqlens=ends(), max_seqlen=12)
    assert weights is None
    rows = [part for part in x.split(LENGTHS) if len(part)]
    expected = torch.cat([of(part, part, part)[0] for part in rows])  # with weights, by the reference
    torch.testing.assert_close(output, expected)
    leaves = [x, *of.parameters()]
    found, wanted = (torch.autograd.grad(y.square().sum(), leaves) for y in (output, expected))
    torch.testing.assert_close(found, wanted)
    memory = torch.randn(11, 16, dtype=torch.float64)
    if not (of.is_causal or of.chunk):
        padding = torch.rand(11) < 0.3
        output, _ = of(x[:7], memory, memory, cu_seqlens=ends((5, 2)), cu_seqlens_k=ends((3, 8)), key_padding_mask=padding)
        parts = zip(x[:7].split((5, 2)), memory.split((3, 8)), padding.split((3, 8)), output.split((5, 2)), strict=True)
        for mine, theirs, hidden, found in parts:
            torch.testing.assert_close(found, of(mine, theirs, theirs, key_padding_mask=hidden)[0])


def test_jagged_tensors_are_not_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    of, x = layer(), torch.randn(23, 16, dtype=torch.float64, requires_grad=True)
    nested = torch.nested.nested_tensor_from_jagged(x, ends(dtype=torch.int64))
    monkeypatch.setattr(torch.nested, "to_padded_tensor", None)
    output = of(nested, nested, nested, need_weights=False)[0]
    (output + nested).values()  # the same lengths to torch's eyes
    torch.testing.assert_close(output.values(), of(x, cu_seqlens=ends())[0])
    memory = torch.nested.nested_tensor_from_jagged(torch.randn(11, 16, dtype=torch.float64), ends((1, 2, 0, 3, 5, 0), torch.int64))
    output = of(nested, memory, memory, need_weights=False)[0]
    expected = of(x, memory.values(), memory.values(), cu_seqlens=ends(), cu_seqlens_k=memory.offsets())[0]
    torch.testing.assert_close(output.values(), expected)


def test_the_layer_names_what_does_not_fit() -> None:
    of, x = layer(), torch.zeros(23, 16, dtype=torch.float64)
    for match, arguments in (
        ("attn_mask: expected None beside cu_seqlens, got Tensor", dict(attn_mask=torch.zeros(23, 23))),
        ("cache: expected None beside cu_seqlens, got KeyValueCache", dict(cache=relattn.KeyValueCache())),
        ("key_padding_mask: expected a boolean one beside cu_seqlens", dict(key_padding_mask=torch.zeros(23).double())),
        ("max_seqlen: expected cu_seqlens beside it, got None", dict(cu_seqlens=None, max_seqlen=3)),
        ("cu_seqlens_k: expected cu_seqlens beside it, got None", dict(cu_seqlens=None, cu_seqlens_k=ends())),
    ):
        with pytest.raises(ValueError, match="^" + match):
            of(x, **(dict(cu_seqlens=ends()) | arguments))
    with pytest.raises(ValueError, match=re.escape("query: expected (tokens, 16) beside cu_seqlens, got shape (1, 23, 16)")):
        of(x[None], cu_seqlens=ends())
    with pytest.raises(ValueError, match=r"^chunk: expected"):
        layer(chunk=(0, 1))
