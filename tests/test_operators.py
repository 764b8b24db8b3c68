"""The operators as torch's machinery sees them: compile, export, opcheck, vmap, autocast, checkpointing, second derivatives."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import relattn
from relattn import RelativeAttentionFunction, relative_attention
from relattn.arguments import Settings, Tensors
from relattn.backends import triton

# Of CPU tensors: Triton's kernels take them in its interpreter only.
ELSEWHERE = ("reference",) if triton.INTERPRETED else ("reference", "triton")
BACKENDS = [name for name, reason in relattn.available_backends().items() if reason is None and name not in ELSEWHERE]
SINGLE = ("cpu", "triton")  # no float64
B, H, L, D = 2, 3, 9, 8


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.manual_seed(0)
    torch._dynamo.reset()


def inputs(*shapes, dtype=torch.float32, requires_grad=True):
    return [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]


# The combinations that change which branch of a backward pass runs; shapes are tiny because gradcheck is quadratic in them.
GRADCHECK = {
    "rel_k": dict(rel_k=(5, 4)),
    "rel_k per head, clipped": dict(rel_k=(2, 3, 4), max_relative_position=1),
    "rel_q": dict(rel_q=(7, 4)),
    "rel_v": dict(rel_v=(2, 5, 3)),
    "rel_bias": dict(rel_bias=(2, 5)),
    "u and v": dict(rel_k=(7, 4), pos_bias_u=(2, 4), pos_bias_v=(2, 4)),
    "all terms, causal": dict(
        rel_k=(5, 4), rel_q=(2, 5, 4), rel_v=(5, 3), rel_bias=(5,), pos_bias_u=(2, 4), pos_bias_v=(2, 4), is_causal=True, query_offset=1
    ),
    "float mask": dict(attn_mask=(2, 1, 4, 1), rel_bias=(5,)),
    "asymmetric clip, window": dict(rel_k=(6, 4), max_relative_position=(3, 2), window=(2, 1)),
    "key lengths with an empty one": dict(rel_k=(5, 4), key_lengths=torch.tensor([3, 0])),
    "offsets by batch": dict(rel_k=(5, 4), query_offset=torch.tensor([2, -3])),
    "dropout": dict(rel_k=(5, 4), rel_v=(5, 3), dropout_p=0.4),
}


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in SINGLE])
@pytest.mark.parametrize("case", GRADCHECK)
def test_gradcheck(backend, case):
    arguments = dict(GRADCHECK[case])
    tensors = {"query": (2, 2, 4, 4), "key": (2, 2, 5, 4), "value": (2, 2, 5, 3)}
    tensors |= {name: arguments.pop(name) for name in list(arguments) if isinstance(arguments[name], tuple) and name in Tensors._fields}
    values = inputs(*tensors.values(), dtype=torch.float64)

    def call(*values):
        torch.manual_seed(3)  # the same dropout at every evaluation
        return relative_attention(**dict(zip(tensors, values, strict=True)), **arguments, return_lse="lengths" not in case, backend=backend)

    assert torch.autograd.gradcheck(call, values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads_last", [False, True])
def test_opcheck(backend, dtype, heads_last):
    """Schema, fakes (shapes, strides, dtypes) and tracing of both operators, with terms of every kind."""
    if heads_last:
        query, key, value = (x.transpose(1, 2) for x in inputs(*[(B, L, H, D)] * 3, dtype=dtype, requires_grad=False))
    else:
        query, key, value = inputs(*[(B, H, L, D)] * 3, dtype=dtype, requires_grad=False)
    rows = 2 * L - 1
    tensors = Tensors(
        query, key, value, torch.randn(rows, D), None, torch.randn(H, rows, D), torch.randn(H, rows), torch.randn(H, D), None,
        torch.randn(L, L, dtype=dtype), torch.ones(B, L, dtype=torch.bool), torch.tensor([L, 4]), None,
    )  # fmt: skip
    settings = Settings(L - 1, L - 1, True, None, None, 0, 0.3, D**-0.5)
    opcheck(torch.ops.relattn.forward.default, (backend, *tensors, *settings))
    output, lse, seed = torch.ops.relattn.forward(backend, *tensors, *settings)
    needs = [tensor is not None for tensor in tensors[:10]]
    arguments = (backend, *tensors, *settings, torch.randn_like(output), torch.randn_like(lse), output, lse, seed, needs)
    opcheck(torch.ops.relattn.backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_training_needs_two_graphs_for_many_lengths(backend):
    counter = CompileCounterWithBackend("aot_eager")

    def attend(query, key, value, rel_k):
        return relative_attention(query, key, value, rel_k, max_relative_position=16, is_causal=True, query_offset=0, backend=backend)

    compiled, rel_k = torch.compile(attend, backend=counter, fullgraph=True), torch.randn(33, D, requires_grad=True)
    for length in (5, 8, 13, 32, 47, 64, 100):
        arguments = [*inputs(*[(B, H, length, D)] * 3), rel_k]
        results = []
        for function in (compiled, attend):
            output = function(*arguments)
            results.append([output, *torch.autograd.grad(output.square().sum(), arguments)])
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_decoding_needs_two_graphs_for_many_offsets(backend):
    counter = CompileCounterWithBackend("aot_eager")

    def attend(query, key, value, rel_k, offset):
        return relative_attention(query, key, value, rel_k, max_relative_position=16, is_causal=True, query_offset=offset, backend=backend)

    compiled, rel_k = torch.compile(attend, backend=counter, fullgraph=True), torch.randn(33, D)
    for length in range(5, 40):
        query, key, value = inputs((B, H, 1, D), (B, H, length, D), (B, H, length, D), requires_grad=False)
        actual, expected = (function(query, key, value, rel_k, length - 1) for function in (compiled, attend))
        torch.testing.assert_close(actual, expected)
    assert counter.frame_count <= 2


def test_compiled_by_inductor_with_dropout_draws_what_eager_draws():
    query, rel_k = inputs((B, H, L, D), (2 * L - 1, D))

    def attend(query, rel_k):
        return relative_attention(query * 2, query, query, rel_k, dropout_p=0.5) + 1

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True)):
        torch.manual_seed(5)
        output = function(query, rel_k)
        results.append([output, *torch.autograd.grad(output.square().sum(), [query, rel_k])])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_dynamic_in_length_and_trains(strict):
    class Attend(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rel_k = torch.nn.Parameter(torch.randn(65, D))

        def forward(self, x):
            return relative_attention(x, x, x, self.rel_k)

    model, short, long = Attend(), *inputs((1, H, L, D), (1, H, 50, D), requires_grad=False)
    program = torch.export.export(model, (short,), dynamic_shapes={"x": {2: torch.export.Dim("length", min=2, max=4096)}}, strict=strict)
    exported = program.module()
    torch.testing.assert_close(exported(long), model(long))
    exported(long).square().sum().backward()
    model(long).square().sum().backward()
    torch.testing.assert_close(dict(exported.named_parameters())["rel_k"].grad, model.rel_k.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_is_refused(backend):
    """A plain backward returned 5.97 for a gradient penalty of 16.80, without an error."""
    query, rel_k = inputs((1, 2, 4, 8), (7, 8), dtype=torch.float32 if backend in SINGLE else torch.float64)

    def penalty(backend):
        output = relative_attention(query, query, query, rel_k, backend=backend)
        (slope,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
        return slope.square().sum()

    loss = penalty(backend)  # the first derivative is right, and may be used
    torch.testing.assert_close(loss, penalty("reference"), atol=0, rtol=1e-5)
    with pytest.raises(RuntimeError, match=r'second derivative.*backend="reference"'):
        loss.backward()
    with pytest.raises(RuntimeError, match="second derivative"):
        grad(lambda q: grad(lambda q: relative_attention(q, q, q, rel_k.detach(), backend=backend).square().sum())(q).square().sum())(query)
    penalty("reference").backward()
    assert rel_k.grad.abs().sum() > 0
    compiled = torch.compile(
        lambda: relative_attention(query, query, query, rel_k, backend=backend).square().sum(), backend="aot_eager", fullgraph=True
    )
    with pytest.raises(RuntimeError, match=r"double backward|second derivative"):
        torch.autograd.grad(torch.autograd.grad(compiled(), query, create_graph=True)[0].square().sum(), query)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap(backend):
    queries, rel_k = inputs((5, 1, 2, 4, 8), (7, 8), requires_grad=False)

    def loss(query, rel_k):
        return relative_attention(query, query, query, rel_k, backend=backend).square().sum()

    expected = [torch.stack(parts) for parts in zip(*(grad(loss, argnums=(0, 1))(query, rel_k) for query in queries), strict=True)]
    torch.testing.assert_close(list(vmap(grad(loss, argnums=(0, 1)), in_dims=(0, None))(queries, rel_k)), expected)

    def drop(query):
        return relative_attention(query, query, query, rel_k, dropout_p=0.5, backend=backend)

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(drop)(queries)
    same = queries[:1].expand(5, -1, -1, -1, -1)
    different = vmap(drop, randomness="different")(same)
    assert not torch.equal(different[0], different[1])


def test_batched_gradients_are_refused_by_name():
    query = torch.randn(1, 2, 4, 8, requires_grad=True)
    output = relative_attention(query, query, query)
    with pytest.raises(RuntimeError, match="jacrev"):
        torch.autograd.grad(output, query, torch.ones(3, *output.shape), is_grads_batched=True)
    jacobian = torch.func.jacrev(lambda query: relative_attention(query, query, query))(query)
    expected = torch.func.jacrev(lambda query: relative_attention(query, query, query, backend="reference"))(query)
    torch.testing.assert_close(jacobian, expected)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_dropout_under_vmap_and_fake_tensors(backend):
    from torch._subclasses.fake_tensor import FakeTensorMode

    queries = torch.randn(3, 1, 2, 4, 8)
    vmap(lambda query: relative_attention(query, query, query, dropout_p=0.5, backend=backend), randomness="different")(queries)
    with FakeTensorMode():
        query = torch.randn(1, 2, 4, 8, requires_grad=True)
        relative_attention(query, query, query, dropout_p=0.5, backend=backend).sum().backward()
        assert query.grad.shape == query.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_same_dropout(backend, reentrant):
    query, rel_k = inputs((B, H, L, D), (2 * L - 1, D))

    def attend(query, rel_k):
        return relative_attention(query, query, query, rel_k, dropout_p=0.5, backend=backend)

    results = []
    for call in (attend, lambda *arguments: checkpoint(attend, *arguments, use_reentrant=reentrant)):
        query.grad = rel_k.grad = None
        torch.manual_seed(1)
        output = call(query, rel_k)
        output.square().sum().backward()
        results.append((output.detach(), query.grad, rel_k.grad))
    for plain, replayed in zip(*results, strict=True):
        assert torch.equal(plain, replayed)


def test_dropout_is_the_same_in_every_backend_and_follows_manual_seed():
    query, rel_k = inputs((B, H, L, D), (2 * L - 1, D), requires_grad=False)
    outputs = []
    for backend in ["reference", *BACKENDS, *BACKENDS]:
        torch.manual_seed(11)
        outputs.append(relative_attention(query, query, query, rel_k, dropout_p=0.3, backend=backend))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])
    assert not torch.allclose(relative_attention(query, query, query, rel_k, dropout_p=0.3), outputs[0])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_autocast(backend):
    """All floating tensors but float64 ones are cast, as torch's attention does; gradients have the dtypes of what was given."""
    query, rel_k, rel_bias = inputs((B, H, L, D), (2 * L - 1, D), (H, 2 * L - 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, lse = relative_attention(query, query, query, rel_k, rel_bias=rel_bias, return_lse=True, backend=backend)
        assert output.dtype == torch.bfloat16
        assert lse.dtype == torch.float32
        output.float().square().sum().backward()  # also inside autocast
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in (query, rel_k, rel_bias)]
    relative_attention(half[0], half[0], half[0], half[1], rel_bias=half[2], backend=backend).float().square().sum().backward()
    for tensor, same in zip((query, rel_k, rel_bias), half, strict=True):
        assert tensor.grad.dtype == torch.float32
        torch.testing.assert_close(tensor.grad, same.grad.float(), atol=2e-2, rtol=2e-2)
    if backend in SINGLE:
        return
    with torch.autocast("cpu", dtype=torch.bfloat16):
        double = query.detach().double()
        assert relative_attention(double, double, double, backend=backend).dtype == torch.float64


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_float32_tables_beside_half_precision(backend):
    query = torch.randn(B, H, L, D, dtype=torch.bfloat16, requires_grad=True)
    tables = inputs((2 * L - 1, D), (H, 2 * L - 1), (H, D))
    output = relative_attention(query, query, query, tables[0], rel_bias=tables[1], pos_bias_u=tables[2], backend=backend)
    assert output.dtype == torch.bfloat16
    gradients = torch.autograd.grad(output.float().sum(), [query, *tables])
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16] + [torch.float32] * 3


def test_flops():
    """QK^T, the relative product and PV: 2 B H L L D each forward; backward the scores once more and two products for each."""
    query, rel_k = inputs((B, H, L, D), (2 * L - 1, D))
    product = 2 * B * H * L * L * D
    with FlopCounterMode(display=False) as counter:
        output = relative_attention(query, query, query, rel_k)
    assert counter.get_total_flops() == 3 * product
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == (2 * 3 + 2) * product


def test_function_is_an_autograd_function_with_the_documented_outputs():
    query = torch.randn(B, H, L, D, requires_grad=True)
    output, lse, seed = RelativeAttentionFunction.apply(
        "blocked", *Tensors(query, query, query), *Settings(0, 0, False, None, None, 0, 0.0, 1.0)
    )
    assert output.requires_grad
    assert lse.requires_grad
    assert not seed.requires_grad
    torch.testing.assert_close(output, torch.nn.functional.scaled_dot_product_attention(query, query, query, scale=1.0))


def test_only_the_needed_gradients_are_computed():
    query, key, value, rel_k = inputs(*[(B, H, L, D)] * 3, (2 * L - 1, D))
    for needed in ([rel_k], [query], [value], [key, rel_k]):
        for tensor in (query, key, value, rel_k):
            tensor.requires_grad_(any(tensor is one for one in needed))
        output = relative_attention(query, key, value, rel_k)
        expected = relative_attention(query, key, value, rel_k, backend="reference")
        torch.testing.assert_close(
            torch.autograd.grad(output.square().sum(), needed), torch.autograd.grad(expected.square().sum(), needed), atol=1e-4, rtol=1e-4
        )


def saved(function: Callable, *arguments: torch.Tensor) -> Callable:
    """The function's trace, written and read again."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(function, arguments), file)
    return torch.jit.load(io.BytesIO(file.getvalue()))


TRACED = {  # settings out of sizes, which are tensors while a trace is made
    "number of rows": lambda length: {},
    "clip": lambda length: dict(max_relative_position=length - 1),
    "clip to each side": lambda length: dict(max_relative_position=(length - 1, length - 1)),
    "offset": lambda length: dict(query_offset=length - 7),
    "causal with an offset": lambda length: dict(query_offset=length // 2, is_causal=True),
    "window": lambda length: dict(window=(length // 2, None)),
    "scale": lambda length: dict(scale=1 / length),
    "plain numbers": lambda length: dict(query_offset=2, window=(3, 1), scale=0.3),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", [None, "reference", *BACKENDS])
@pytest.mark.parametrize("case", TRACED)
def test_a_saved_trace_serves_every_length(backend, case):
    """The autograd Function in Python could not be saved; "max_relative_position: got tensor(7)" where sizes are arguments."""

    def attend(query, table):
        length = query.shape[2]
        options = TRACED[case](length) | dict(backend=backend)
        return relative_attention(query, query, query, table[table.shape[0] // 2 - length + 1 : table.shape[0] // 2 + length], **options)

    table = torch.randn(101, D)
    loaded = saved(attend, torch.randn(B, H, L, D), table)
    for length in (L, 5, 31):
        tensors = [torch.randn(3, H, length, D, requires_grad=True), table.clone().requires_grad_()]
        results = []
        for function in (loaded, attend):
            output = function(*tensors)
            results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
        torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_refuses_by_name():
    query = torch.randn(B, H, L, D)
    with pytest.raises(TypeError, match=r"^max_relative_position: expected an int"):
        torch.jit.trace(lambda query: relative_attention(query, query, query, max_relative_position="3"), query)
    loaded = saved(lambda query, table: relative_attention(query, query, query, table), query, torch.randn(5, D))
    with pytest.raises(RuntimeError, match=r"rel_k: expected \(R, 8\)"):
        loaded(query, torch.randn(5, D + 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_is_refused_by_name(backend):
    """torch asked for a jvp of "custom autograd.Function", which no user had written."""
    query = torch.randn(1, 2, 4, 8)

    def attend(query, backend=backend):
        return relative_attention(query, query, query, backend=backend).square().sum()

    def dual(query):
        with torch.autograd.forward_ad.dual_level():
            return attend(torch.autograd.forward_ad.make_dual(query, query))

    for call in (lambda query: torch.func.jvp(attend, (query,), (query,)), torch.func.jacfwd(attend), torch.func.hessian(attend), dual):
        with pytest.raises(RuntimeError, match=r'forward-mode.*backend="reference"'):
            call(query)
    slope = torch.func.jvp(lambda query: attend(query, "reference"), (query,), (query,))[1]
    torch.testing.assert_close(slope, (torch.func.grad(attend)(query) * query).sum())


def test_symbolic_trace_of_the_function_names_the_remedy():
    with pytest.raises(TypeError, match=r"^query: .* got Proxy; torch.fx.wrap"):
        torch.fx.symbolic_trace(lambda query: relative_attention(query, query, query))


def test_inputs_are_not_changed():
    tensors = inputs(*[(B, H, 40, D)] * 3, (2 * 40 - 1, D), (40, 40))
    before = copy.deepcopy([tensor.detach() for tensor in tensors])
    *others, mask = tensors
    relative_attention(*others, attn_mask=mask, is_causal=True).sum().backward()
    for tensor, original in zip(tensors, before, strict=True):
        assert torch.equal(tensor, original)
