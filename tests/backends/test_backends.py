"""Every backend that this machine can run, against the float64 reference (see tests/fuzz.py for the bound)."""

from __future__ import annotations

import itertools
import resource
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

import relattn
from relattn import relative_attention
from relattn.backends import blocked
from tests import draws
from tests.fuzz import WITHOUT_MASK_GRADIENT, call_of, check, failed_once, random_call, run

# (Triton's are test_triton.py's: its interpreter is slow, and a GPU another device.)
BACKENDS = [name for name, reason in relattn.available_backends().items() if reason is None and name not in ("reference", "triton")]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
IN_FLOAT64 = [name for name in BACKENDS if name != "cpu"]  # the native kernels compute in float32


@pytest.mark.parametrize(
    ("backend", "dtype"), [(name, dtype) for name in BACKENDS for dtype in DTYPES if dtype != torch.float64 or name in IN_FLOAT64]
)
@pytest.mark.parametrize("first", range(0, 120, 30))
def test_random_calls(backend, dtype, first):
    for seed in range(first, first + 30):
        check(random_call(seed), backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60)
@draws.given
def test_unseen_random_calls(backend, draw):
    check(random_call(draw(st.integers(1000, 2**31))), backend, torch.float32)


@pytest.mark.parametrize("backend", ["reference", *IN_FLOAT64])  # the native kernels': test_cpu.py
def test_calls_that_failed_once(backend):
    for seed, dtype in failed_once(backend):
        check(call_of(seed, backend), backend, dtype)


def test_the_bound_notices_an_error_of_one_row(monkeypatch):
    """The comparison itself: a band one table row off must be far outside the bound."""
    original = blocked._Group.strips

    def off_by_one(self):
        for strip in original(self):
            shifted = strip.last_row - strip.row > 1
            yield strip._replace(row=strip.row + 1, last_row=strip.last_row, left=strip.left + 1) if shifted else strip

    monkeypatch.setattr(blocked._Group, "strips", off_by_one)
    calls = (call for call in map(random_call, range(200)) if "rel_k" in call.tensors and call.arguments["max_relative_position"][0] > 2)
    noticed = 0
    for call in itertools.islice(calls, 20):  # some see a single row of the table, or hide almost everything
        try:
            check(call, "blocked", torch.float32)
        except AssertionError:
            noticed += 1
    assert noticed >= 12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
def test_empty_lengths(backend, lengths):
    """No queries: an empty output. No keys: output 0, log-sum-exp -inf, zero gradients."""
    queries, keys = lengths
    query = torch.randn(2, 3, queries, 8, requires_grad=True)
    key, value = (torch.randn(2, 3, keys, 8, requires_grad=True) for _ in range(2))
    rel_k = torch.randn(9, 8, requires_grad=True)
    output, lse = relative_attention(query, key, value, rel_k, return_lse=True, backend=backend)
    assert output.shape == (2, 3, queries, 8)
    assert not output.any()
    assert lse.shape == (2, 3, queries)
    assert torch.all(lse == -torch.inf)
    for gradient in torch.autograd.grad(output.sum(), [query, key, value, rel_k]):
        assert not gradient.any()


@pytest.mark.parametrize("backend", IN_FLOAT64)
def test_groups_and_strips_do_not_change_the_result(backend, monkeypatch):
    """Cut as finely as possible and not at all, with everything switched on: the same result, the same dropout."""
    for seed in (3, 7, 19, 42, 77):
        call = random_call(seed)
        whole = run(call, backend, torch.float64)
        monkeypatch.setattr(blocked, "_STRIP_SCORES_CPU", 1)
        monkeypatch.setattr(blocked, "_STRIP_ROWS", 3)
        monkeypatch.setattr(blocked, "_COPIED", 0)
        monkeypatch.setattr(blocked, "_TORCH_KERNEL", 0)
        cut = run(call, backend, torch.float64)
        monkeypatch.undo()
        for name, expected in whole.items():
            torch.testing.assert_close(cut[name], expected, atol=1e-11, rtol=1e-11, msg=f"{name}; {call}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_are_bit_for_bit_equal(backend):
    torch.use_deterministic_algorithms(True)
    try:
        for seed in (1, 2, 3, 5, 8, 13):
            first, second = (run(random_call(seed), backend, torch.float32) for _ in range(2))
            assert all(torch.equal(first[name], second[name]) for name in first)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("heads_last", [False, True])
def test_output_follows_the_layout_of_the_query(backend, heads_last):
    shape = (2, 6, 3, 8) if heads_last else (2, 3, 6, 8)
    query = torch.randn(shape).transpose(1, 2) if heads_last else torch.randn(shape)
    output = relative_attention(query, query, query, torch.randn(11, 8), backend=backend)
    assert output.stride() == query.stride() == torch.nn.functional.scaled_dot_product_attention(query, query, query).stride()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in WITHOUT_MASK_GRADIENT])
def test_mask_with_gradient_summed_over_what_it_broadcasts(backend):
    query = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    for shape in [(7, 7), (3, 1, 7), (2, 1, 1, 7), (1, 1), (2, 3, 7, 7)]:
        mask = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        gradients = [
            torch.autograd.grad(relative_attention(query, query, query, attn_mask=mask, backend=name).square().sum(), mask)[0]
            for name in (backend, "reference")
        ]
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [16, 300])  # below and above what torch's fused attention serves
def test_rows_masked_by_a_large_number_have_right_gradients(backend, length):
    """A row of -1e9 attends to all keys alike. Its log-sum-exp of -1e9 has lost the logarithm of their number: weights recovered from it
    were n times too large, and so were the gradients, without an error."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3)]
    tensors.append(torch.randn(2 * length - 1, 16, requires_grad=True))
    mask = torch.zeros(length, length)
    mask[2] = -1e9
    mask[:, :3] -= 1e9
    weight = torch.randn(1, 2, length, 16)
    gradients = []
    for name in (backend, "reference"):
        output = relative_attention(*tensors, attn_mask=mask, backend=name)
        gradients.append(torch.autograd.grad((output * weight).sum(), tensors))
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("length", [6, 300])
def test_hidden_rows_pass_no_gradient_from_their_log_sum_exp(backend, length):
    """The slope of lse ** 2 at -inf is infinite, and 0 * inf was NaN."""
    query, rel_k = torch.randn(1, 2, length, 8, requires_grad=True), torch.randn(2 * length - 1, 8, requires_grad=True)
    mask = torch.ones(length, length, dtype=torch.bool)
    mask[2] = False
    output, lse = relative_attention(query, query, query, rel_k, attn_mask=mask, return_lse=True, backend=backend)
    gradients = torch.autograd.grad(output.sum() + lse.square().mean(), [query, rel_k])
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("length", [6, 300])
def test_tables_may_hide(backend, length):
    """A causal rel_bias of -inf is the causal mask, also for queries before the first key, which see nothing."""
    tensors = [torch.randn(1, 2, length, 8, requires_grad=True) for _ in range(3)]
    bias = torch.zeros(2 * length - 1)
    bias[length:] = -torch.inf
    results = []
    for arguments in (dict(rel_bias=bias.requires_grad_()), dict(is_causal=True)):
        output, lse = relative_attention(*tensors, **arguments, query_offset=-3, return_lse=True, backend=backend)
        gradients = torch.autograd.grad(output.square().sum(), tensors)
        results.append([output, lse, *gradients])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)
    assert (results[0][1][:, :, :3] == -torch.inf).all()


@pytest.mark.parametrize("backend", ["reference", *IN_FLOAT64])  # the native kernels read memory
def test_meta_tensors(backend):
    """Shapes without numbers, as for building large models."""
    query = torch.empty(2, 4, 7, 8, device="meta", requires_grad=True)
    rel_k = torch.empty(13, 8, device="meta", requires_grad=True)
    output, lse = relative_attention(query, query, query, rel_k, is_causal=True, dropout_p=0.1, return_lse=True, backend=backend)
    output.sum().backward()
    assert (output.shape, lse.shape, query.grad.shape, rel_k.grad.shape) == (query.shape, query.shape[:3], query.shape, rel_k.shape)


# Extra memory is the high-water resident set of a fresh process less that before the call, as in benchmarks/speed.py.
_MEMORY = textwrap.dedent("""
    import resource, sys, torch, relattn
    torch.set_num_threads(1)
    length, backend = int(sys.argv[1]), sys.argv[2]
    query, key, value = (torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3))
    table = torch.randn(2 * length - 1, 16, requires_grad=True)
    inputs, small = [query, key, value, table], torch.randn(1, 2, 64, 16, requires_grad=True)
    relattn.relative_attention(small, small, small, table[: 127], backend=backend).sum().backward()  # what is loaded at first use
    for tensor in inputs:
        tensor.grad = torch.zeros_like(tensor)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    relattn.relative_attention(*inputs, backend=backend).sum().backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
""")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_no_tensor_of_length_squared(backend):
    """At L = 8192 one float32 L x L tensor for two heads is 512 MiB; forward and backward together stay far below it."""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
    result = subprocess.run([sys.executable, "-c", _MEMORY, "8192", backend], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 96, result.stdout
