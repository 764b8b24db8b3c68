"""The native CPU backend: its instruction sets, the edges of what it takes, its memory, and what it says where it cannot run.

Random calls in every dtype are in test_backends.py, threads and processes in test_cpu_threads.py.
"""

from __future__ import annotations

import _ctypes
import itertools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import relattn
from relattn import relative_attention
from relattn.backends import cpu
from tests.edges import edges
from tests.fuzz import call_of, check, decoding_call, failed_once, native_variants, random_call, run
from tests.hidden import check_hidden, hidden_call

native = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"no native library: {cpu.unavailable()}")


VARIANTS = native_variants()


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest):
    chosen = cpu.variant()
    cpu.use_variant(request.param)
    assert cpu.variant() == request.param
    yield request.param
    cpu.use_variant(chosen)


# Instruction sets


@native
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the processor's features are read from /proc/cpuinfo")
def test_what_the_processor_has_is_usable() -> None:
    """A variant that is never chosen would be tested nowhere, and missed by nobody but the user who waits."""
    built = json.loads(Path(cpu._library._name).with_name("build_report.json").read_text())["variants"]
    features = next((line.split() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), [])
    asked = {"portable": "", "avx2": "avx2 fma", "avx512": "avx512f avx512bw avx512dq avx512vl fma"}
    assert [name for name in asked if name in built and set(asked[name].split()) <= set(features) and name not in VARIANTS] == []
    if "RELATTN_CPU_VARIANT" not in os.environ:
        assert cpu.variant() == VARIANTS[0]


@native
@pytest.mark.skipif(VARIANTS == ["portable"], reason="one variant only")
def test_another_variant_runs_other_code() -> None:
    """Products are summed in another order: results differ in their last bits. They would not if the choice did nothing."""
    chosen, outputs = cpu.variant(), []
    query, rel_k = torch.randn(1, 2, 50, 64), torch.randn(99, 64)
    try:
        for name in (VARIANTS[0], "portable"):
            cpu.use_variant(name)
            outputs.append(relative_attention(query, query, query, rel_k, backend="cpu"))
    finally:
        cpu.use_variant(chosen)
    assert not torch.equal(*outputs)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


@native
def test_calls_that_failed_once(variant: str) -> None:
    for seed, dtype in failed_once("cpu"):
        check(call_of(seed, "cpu"), "cpu", dtype)


@native
@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 20), (torch.bfloat16, 20), (torch.float16, 10)], ids=str)
def test_random_calls_of_every_variant(variant: str, dtype: torch.dtype, count: int) -> None:
    for seed in range(count):
        check(random_call(7000 + 100 * VARIANTS.index(variant) + seed), "cpu", dtype)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_hidden_places_hold_anything(variant: str, dtype: torch.dtype) -> None:
    for seed in range(12):
        check_hidden(hidden_call(9000 + 100 * VARIANTS.index(variant) + seed, "cpu"), "cpu", dtype)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_few_queries(variant: str, dtype: torch.dtype) -> None:
    for seed in range(40):
        check(decoding_call(100 * VARIANTS.index(variant) + seed), "cpu", dtype)


@native
def test_few_queries_do_not_depend_on_threads() -> None:
    call, results = decoding_call(1), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            tensors, arguments = call.cast(torch.float32)
            results.append(relative_attention(**tensors, **arguments, backend="cpu", return_lse=True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


# Edges


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_edges(variant: str, dtype: torch.dtype) -> None:
    """Sizes, layouts, offsets, windows, masks, scales: all that fail are named."""
    failed = {}
    for name, call in edges(1 + VARIANTS.index(variant)).items():
        try:
            check(call, "cpu", dtype)
        except AssertionError as error:
            failed[name] = str(error)[:200]
    assert not failed


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_nan_stays_in_its_row(variant: str, dtype: torch.dtype, is_causal: bool) -> None:
    """A diverged query is seen as such, by every NaN there is (their bits differ), and no other query notices."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 40, 24, generator=generator).to(dtype) for _ in range(3))
    rel_k, rel_bias = torch.randn(79, 24, generator=generator).to(dtype), torch.randn(79, generator=generator).to(dtype)
    clean, clean_lse = relative_attention(query, key, value, rel_k, rel_bias=rel_bias, is_causal=is_causal, return_lse=True, backend="cpu")
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    nans = [torch.tensor(torch.nan, dtype=dtype)]
    nans += [torch.tensor(pattern, dtype=bits).view(dtype) for pattern in (-1, torch.iinfo(bits).max)]
    for nan, row in itertools.product(nans, (0, 7)):  # causal, query 0 sees one key: no sum over several that could become NaN later
        spoilt = query.clone()
        spoilt[0, 1, row, 3] = nan
        output, lse = relative_attention(spoilt, key, value, rel_k, rel_bias=rel_bias, is_causal=is_causal, return_lse=True, backend="cpu")
        assert output[0, 1, row].isnan().all()
        assert lse[0, 1, row].isnan()
        output[0, 1, row], lse[0, 1, row] = clean[0, 1, row], clean_lse[0, 1, row]
        assert torch.equal(output, clean)
        assert torch.equal(lse, clean_lse)


@native
def test_infinite_scores_are_nan_as_in_softmax(variant: str) -> None:
    query, key, value = (torch.randn(1, 2, 20, 8) for _ in range(3))
    mask = torch.zeros(20, 20)
    mask[3, 5] = torch.inf
    outputs = [relative_attention(query, key, value, attn_mask=mask, backend=name) for name in ("cpu", "reference")]
    assert outputs[0][:, :, 3].isnan().all()
    torch.testing.assert_close(*outputs, equal_nan=True)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_an_earlier_call_left_in_memory_does_not_matter(variant: str, dtype: torch.dtype) -> None:
    """Working memory is kept from call to call. In half precision, table rows that no key was at were read from there, times a weight of
    0: the key mask's -inf of the call before made the gradients of query and key NaN."""
    query, key, value = (torch.randn(1, 1, 20, 16).to(dtype).requires_grad_() for _ in range(3))
    table = torch.randn(39, 16).to(dtype).requires_grad_()

    def gradients():
        output = relative_attention(query, key, value, table, rel_v=table, backend="cpu")
        return torch.autograd.grad(output.float().square().sum(), (query, key, value, table))

    expected = gradients()
    hidden = torch.zeros(1, 200_000, dtype=torch.bool)
    hidden[0, 0] = hidden[0, -1] = True
    long = torch.randn(1, 1, 200_000, 8)
    relative_attention(torch.randn(1, 1, 1, 8), long, long, key_mask=hidden, backend="cpu")
    for found, gradient in zip(gradients(), expected, strict=True):
        assert torch.equal(found, gradient)


@native
def test_the_bound_of_edges_notices_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself: with the window's sides changed for each other, calls that have windows fail."""
    original = cpu.Plan.__init__

    def swapped(self, tensors, settings):
        original(self, tensors, settings._replace(window_left=settings.window_right, window_right=settings.window_left))

    monkeypatch.setattr(cpu.Plan, "__init__", swapped)
    with pytest.raises(AssertionError):
        check(edges(0)["window of 2^62 behind"], "cpu", torch.float32)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_output_gradient_that_is_one_number(variant: str, dtype: torch.dtype) -> None:
    """`output.sum().backward()` hands over a gradient whose strides are 0."""
    tensors = [torch.randn(2, 3, 30, 20).to(dtype).requires_grad_() for _ in range(3)]
    output, lse = relative_attention(*tensors, return_lse=True, backend="cpu")
    one = torch.ones((), dtype=dtype).expand(output.shape)
    expanded = torch.autograd.grad((output, lse), tensors, (one, torch.ones(()).expand(lse.shape)), retain_graph=True)
    dense = torch.autograd.grad((output, lse), tensors, (one.contiguous(), torch.ones(lse.shape)))
    assert all(map(torch.equal, expanded, dense))
    assert dense[2].any()


@native
def test_tensors_that_are_more_than_their_memory() -> None:
    """A negated view (the imaginary part of a conjugate) has the sign in a flag, an efficient zero has no memory at all: an address
    alone would read the wrong numbers, or crash."""
    parts = [torch.randn(1, 2, 9, 8) for _ in range(4)]
    negated = torch.complex(parts[0], parts[1]).conj().imag
    assert negated.is_neg()
    expected = relative_attention(-parts[1], parts[2], parts[3], backend="cpu")
    torch.testing.assert_close(relative_attention(negated, parts[2], parts[3], backend="cpu"), expected)
    tensors = [part.clone().requires_grad_() for part in parts[:3]]
    output, lse = relative_attention(*tensors, return_lse=True, backend="cpu")
    zero = torch._efficientzerotensor(output.shape)
    found = torch.autograd.grad((output, lse), tensors, (zero, torch.ones_like(lse)), retain_graph=True)
    expected = torch.autograd.grad(lse, tensors, torch.ones_like(lse), allow_unused=True)
    assert not found[2].any()
    torch.testing.assert_close(found[:2], expected[:2])
    assert found[0].any()


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offsets_beyond_two_to_the_31st(tmp_path: Path, dtype: torch.dtype) -> None:
    """Rows 2^30 elements apart, in a file with holes: the third row's offset is no 32-bit number any more."""
    far = 2**30
    flat = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * far + 4096, dtype=dtype)
    generator = torch.Generator().manual_seed(0)

    def distant(first: int, *shape: int) -> torch.Tensor:
        """(..., 3, 16), rows far apart."""
        strides = [64] * (len(shape) - 2) + [far, 1]
        tensor = flat.as_strided(shape, strides, first)
        return tensor.copy_(torch.randn(shape, generator=generator))

    tensors = [distant(first, 1, 2, 3, 16) for first in (0, 128, 256)] + [distant(384, 2, 3, 16)]
    mask = distant(512, 3, 16)[:, :3]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    close = [tensor.detach().contiguous().requires_grad_() for tensor in tensors]
    results = []
    for given, added in ((tensors, mask), (close, mask.contiguous())):
        output = relative_attention(*given, rel_v=given[3], attn_mask=added, backend="cpu")
        results.append([output, *torch.autograd.grad(output.float().square().sum(), given)])
    assert tensors[0].stride(2) == far
    torch.testing.assert_close(*results, atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=1e-2)


# Memory

# Peak resident memory of a fresh process above that before the call, less output and gradients. The peak is reset first (Linux only).
_MEMORY = textwrap.dedent("""
    import json, sys
    from pathlib import Path
    import torch
    from relattn import relative_attention
    from relattn.backends import cpu

    def resident(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024

    heads, length, dtype, heads_last, backward, threads = json.loads(sys.argv[1])
    dtype, rows = getattr(torch, dtype), 2 * length - 1
    torch.set_num_threads(threads)
    cpu._ALONE = 0

    def call(length, table, gradient):
        shape = (1, length, heads, 64) if heads_last else (1, heads, length, 64)
        inputs = [torch.randn(shape).to(dtype) for _ in range(3)]
        inputs = [(tensor.transpose(1, 2) if heads_last else tensor).requires_grad_(backward) for tensor in inputs]
        def run():
            output, lse = relative_attention(*inputs, table, return_lse=True, backend="cpu", window=WINDOW)
            if backward:
                output.backward(gradient[:, :, :length])
            results = [output, lse] + ([tensor.grad for tensor in (*inputs, table)] if backward else [])
            return sum(result.nbytes for result in results)
        return run

    table = torch.randn(rows, 64).to(dtype).requires_grad_(backward)
    gradient = torch.ones(1, heads, length, 64, dtype=dtype)
    call(64, table, gradient)()  # what is loaded and started at the first use
    table.grad = None
    run = call(length, table, gradient)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    results = run()
    print(resident("VmHWM") - before - results)
""")


def extra_memory(*options, window: str = "None", **environment: str) -> int:
    """Options: see `_MEMORY`. A window makes the call short, and takes memory as one without."""
    script = _MEMORY.replace("WINDOW", window)
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(options)], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def memory_bound(heads: int, length: int, dtype: str, threads: int) -> float:
    """Beyond results: at most four times the query, a float32 table for each thread, and 8 MB."""
    return 4 * heads * length * 64 * getattr(torch, dtype).itemsize + threads * (2 * length - 1) * 64 * 4 + 8e6


@native
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of resident memory cannot be reset")
@pytest.mark.parametrize(
    ("heads", "length", "dtype", "heads_last", "backward", "threads"),
    [
        (8, 4096, "float32", True, False, 1),
        (8, 4096, "float32", False, True, 2),
        (8, 4096, "bfloat16", True, True, 2),
        (1, 8192, "float32", False, True, 2),
        (1, 8192, "bfloat16", False, True, 2),
    ],
)
def test_memory(heads: int, length: int, dtype: str, heads_last: bool, backward: bool, threads: int) -> None:
    extra = extra_memory(heads, length, dtype, heads_last, backward, threads)
    assert extra < memory_bound(heads, length, dtype, threads), f"{extra / 2**20:.1f} MiB"


# What cannot run, and why


@pytest.fixture
def loaded_with(monkeypatch: pytest.MonkeyPatch):
    """loaded_with(name=value, ...): load the library once more, in an environment of these values; after the test all is as before."""
    chosen = cpu.variant()

    def load(**environment: str) -> None:
        for name in ("RELATTN_CPU_LIBRARY", "RELATTN_CPU_VARIANT"):
            if name in environment:
                monkeypatch.setenv(name, environment[name])
        library, reason = cpu._load()
        monkeypatch.setattr(cpu, "_library", library)
        monkeypatch.setattr(cpu, "_reason", reason)

    yield load
    monkeypatch.undo()
    if chosen is not None:
        cpu.use_variant(chosen)


def refused(reason: str, **changed) -> None:
    """The call is explained, goes to the next backend, and is an error where this one was asked for."""
    query = torch.randn(1, 2, 5, 8)
    call = dict(query=query, key=query, value=query) | changed
    explanation = relattn.explain(**call)
    assert reason in explanation.reasons["cpu"]
    assert explanation.backend == "blocked"
    expected = relative_attention(**call, backend="blocked")
    assert torch.equal(relative_attention(**call), expected)
    with pytest.raises(ValueError, match="'cpu' cannot take this call: ") as error:
        relative_attention(**call, backend="cpu")
    assert reason in str(error.value)


@native
def test_calls_that_it_does_not_take() -> None:
    query = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    refused("torch.float64", query=query, key=query, value=query)
    refused("attn_mask requires a gradient", attn_mask=torch.zeros(5, 5, requires_grad=True))
    assert relattn.explain(*[torch.randn(1, 2, 5, 8)] * 3, attn_mask=torch.zeros(5, 5)).backend == "cpu"


def test_no_library(loaded_with, tmp_path: Path) -> None:
    loaded_with(RELATTN_CPU_LIBRARY=str(tmp_path / "absent.so"))
    refused("absent.so")
    assert cpu.variant() is None
    with pytest.raises(ValueError, match="'portable'"):
        cpu.use_variant("portable")


def test_a_library_that_was_not_built(loaded_with, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's words, as the build noted them."""
    (tmp_path / "build_report.json").write_text(json.dumps({"reason": "no C++ compiler"}))
    monkeypatch.delenv("RELATTN_CPU_LIBRARY", raising=False)
    monkeypatch.setattr(cpu, "_folder", lambda: tmp_path)
    loaded_with()
    refused("the native library was not built: no C++ compiler")


@pytest.mark.parametrize("content", ["nothing", "another library"])
def test_a_library_that_does_not_load(loaded_with, tmp_path: Path, content: str) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    loaded_with(RELATTN_CPU_LIBRARY=str(broken) if content == "nothing" else _ctypes.__file__)
    refused("the native library could not be loaded")


@native
@pytest.mark.parametrize("changed", ["number", "size"])
def test_a_library_of_another_version(loaded_with, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    """After an update of half of the files its Call would be read wrongly."""
    if changed == "number":
        monkeypatch.setattr(cpu, "_ABI_VERSION", cpu._ABI_VERSION + 1)
    else:
        monkeypatch.setattr(cpu, "_CALL", type(cpu._CALL)(cpu._CALL.format + "q"))
    loaded_with()
    refused("of another version of relattn")


@native
def test_an_unknown_variant(loaded_with) -> None:
    loaded_with(RELATTN_CPU_VARIANT="avx1024")
    refused("RELATTN_CPU_VARIANT=avx1024")


@native
def test_a_variant_that_is_not_there_changes_nothing() -> None:
    chosen = cpu.variant()
    with pytest.raises(ValueError, match="'avx1024'"):
        cpu.use_variant("avx1024")
    assert cpu.variant() == chosen


@native
def test_the_variant_asked_for_is_used(loaded_with) -> None:
    loaded_with(RELATTN_CPU_VARIANT="portable")
    assert cpu.variant() == "portable"


@native
@pytest.mark.parametrize(("name", "value"), [("RELATTN_CPU_LIBRARY", "absent.so"), ("RELATTN_CPU_VARIANT", "avx1024")])
def test_the_command_says_why(name: str, value: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "relattn", "--json"], env=os.environ | {name: value}, capture_output=True, text=True, check=True
    )
    state = json.loads(done.stdout)["backends"]["cpu"]
    assert not state["usable"]
    assert value in state["reason"]


@native
def test_runs_are_bit_for_bit_equal_in_every_variant(variant: str) -> None:
    for seed in (1, 2, 3):
        for dtype in (torch.float32, torch.bfloat16):
            first, second = (run(random_call(seed), "cpu", dtype) for _ in range(2))
            assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["rel_k", "rel_q", "rel_v", "rel_bias"])
def test_a_table_expanded_over_the_heads_has_a_gradient_for_each(name):
    """Its heads share memory, as those of a shared table do: only the first head's gradient was written, the others were left as found."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 20, 16).unbind()
    table = torch.randn((21,) if name == "rel_bias" else (21, 16))
    table = table.expand(4, *table.shape).requires_grad_()
    gradients = []
    for backend in ("cpu", "reference"):
        output = relative_attention(query, key, value, **{name: table}, max_relative_position=10, backend=backend)
        gradients.append(torch.autograd.grad(output.square().sum(), table)[0])
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [33, 48, 112, 130])
def test_values_larger_than_keys_with_a_strided_last_dimension(size):
    """AMX packs them in whole instructions, for which a buffer was too small: gradients were off by a third."""
    torch.manual_seed(0)
    query, key = (torch.randn(1, 1, 40, 16).bfloat16().requires_grad_() for _ in range(2))
    value = torch.randn(1, 1, size, 40).bfloat16().transpose(2, 3).requires_grad_()
    exact = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    upstream = torch.randn(1, 1, 40, size).bfloat16()
    found = torch.autograd.grad(relative_attention(query, key, value, backend="cpu"), (query, key, value), upstream)
    expected = torch.autograd.grad(relative_attention(*exact, backend="reference"), exact, upstream.double())
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).abs().max() < 0.02 * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_a_key_mask_hides_may_be_anything(dtype, number):
    """Also between keys that are seen: -inf was added to the hidden scores, and NaN stayed NaN."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 24, 16, dtype=dtype).unbind()
    seen = torch.ones(1, 24, dtype=torch.bool)
    seen[:, 10] = False
    expected = relative_attention(query, key, value, key_mask=seen, backend="cpu")
    key = key.clone()
    key[:, :, 10] = number
    torch.testing.assert_close(relative_attention(query, key, value, key_mask=seen, backend="cpu"), expected, atol=0, rtol=0)


def test_a_row_of_nan_is_nan_in_the_reference_too():
    """It was taken for a row that sees nothing."""
    query = torch.randn(1, 1, 4, 8)
    query[:, :, 2] = torch.nan
    for backend in ("cpu", "reference"):  # blocked leaves short rows to torch's kernel, which makes them 0
        output = relative_attention(query, torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8), backend=backend)
        assert output.isnan().any(-1).flatten().tolist() == [False, False, True, False], backend
