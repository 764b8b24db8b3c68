"""The layer where it is used: in torch's transformers, with nested tensors, decoding with a cache, compiled, exported, under autocast."""

import io
import pickle
import warnings

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from relattn import KeyValueCache, RelativeMultiheadAttention
from tests import draws
from tests.test_module import ALL_TERMS, randomise

flag = st.booleans()


def new_layer(embed: int = 8, heads: int = 2, **options) -> RelativeMultiheadAttention:
    """A float64 layer with random parameters, in eval."""
    options = dict(max_relative_position=2, batch_first=True, terms=ALL_TERMS, dtype=torch.float64) | options
    layer = RelativeMultiheadAttention(embed, heads, **options)
    randomise(layer)
    return layer.eval()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


# ---- torch's transformers ------------------------------------------------------------------------------------------


def encoder_layer() -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dtype=torch.float64).eval()


def encoded(layer: nn.TransformerEncoderLayer, source: torch.Tensor, **call) -> torch.Tensor:
    """What an encoder layer computes, with its attention really called."""
    attended = layer.self_attn(source, source, source, need_weights=False, **call)[0]
    hidden = layer.norm1(source + attended)
    return layer.norm2(hidden + layer.linear2(torch.relu(layer.linear1(hidden))))


def test_encoder_layer_calls_it_in_eval() -> None:
    """Regression: the fused inference path reads an MHA subclass's weights and leaves the relative terms out without a word."""
    layer = encoder_layer()
    source = random(3, 5, 8)
    layer.self_attn = new_layer()
    expected = encoded(layer, source)
    with torch.no_grad():
        torch.testing.assert_close(layer(source), expected)
        for twin in (pickle.loads(pickle.dumps(layer)), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)):
            torch.testing.assert_close(twin(source), expected)
        for name in ("rel_k", "rel_q", "rel_v", "rel_bias"):
            nn.init.zeros_(layer.self_attn.get_parameter(name))
        assert (layer(source) - expected).abs().max() > 0.1  # so the comparison above can see the terms
        layer.self_attn._forward_pre_hooks.clear()  # torch 2.13's switch: the fused path would have been taken
        without = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
        without.load_state_dict(layer.self_attn.state_dict(), strict=False)
        fused = layer(source)
        layer.self_attn = without.eval()
        torch.testing.assert_close(fused, layer(source))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [{}, dict(kdim=8, vdim=8), dict(kdim=5)], ids=str)
def test_others_find_the_weights(sizes: dict, bias: bool) -> None:
    """`_qkv_same_embed_dim` said False beside an in_proj_weight: who reads the weights by it asserted, refused, or warned."""
    layer = new_layer(bias=bias, batch_first=False, **sizes)
    for name in ("rel_k", "rel_q", "rel_v", "rel_bias", "pos_bias_u", "pos_bias_v"):
        nn.init.zeros_(layer.get_parameter(name))
    query, key, value = random(4, 2, 8), random(5, 2, layer.kdim), random(5, 2, layer.vdim)
    expected = nn.functional.multi_head_attention_forward(
        query, key, value, 8, 2, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0, layer.out_proj.weight,
        layer.out_proj.bias, training=False, use_separate_proj_weight=not layer._qkv_same_embed_dim, q_proj_weight=layer.q_proj_weight,
        k_proj_weight=layer.k_proj_weight, v_proj_weight=layer.v_proj_weight,
    )  # fmt: skip
    torch.testing.assert_close(layer(query, key, value), expected)


def test_encoder_of_it_does_not_warn() -> None:
    layer = encoder_layer()
    layer.self_attn = new_layer()
    with warnings.catch_warnings(action="error"):
        assert nn.TransformerEncoder(layer, 1).use_nested_tensor


def test_lora() -> None:
    """PEFT refused the layer: "only same embed for query/key/value is supported"."""
    peft = pytest.importorskip("peft")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = encoder_layer()
            self.layer.self_attn = new_layer()

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.layer(inputs)

    model, inputs = Model().eval(), random(3, 5, 8)
    before = model(inputs)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["self_attn"])).double()
    torch.testing.assert_close(adapted(inputs), before)
    optimizer = torch.optim.SGD([parameter for parameter in adapted.parameters() if parameter.requires_grad], 1.0)
    for _ in range(2):
        optimizer.zero_grad()
        adapted.train()(inputs).square().sum().backward()
        optimizer.step()
    with torch.no_grad():  # where the fused path would be taken
        trained = adapted.eval()(inputs)
        assert (trained - before).abs().max() > 1e-3
        torch.testing.assert_close(adapted.merge_and_unload()(inputs), trained)


@pytest.mark.parametrize("options", [{}, dict(kdim=8, vdim=8), dict(add_bias_kv=True), dict(bias=False)], ids=str)
def test_offloaded_by_accelerate(options: dict) -> None:
    """"expected device meta": hooks fill out_proj's weight when it is called, and the layer's check came before that."""
    accelerate = pytest.importorskip("accelerate")
    layer, inputs = new_layer(**options), random(3, 5, 8)
    expected = layer(inputs, inputs, inputs)
    accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
    assert layer.out_proj.weight.device.type == "meta"
    torch.testing.assert_close(layer(inputs, inputs, inputs), expected)


@pytest.mark.parametrize("name", ["in_proj_bias", "out_proj.weight", "out_proj.bias", "k_proj_weight", "v_proj_weight"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_a_parameter_of_another_dtype_is_named(name: str, need_weights: bool) -> None:
    """Was torch's "self and mat2 must have the same dtype", of nobody knows what."""
    layer, inputs = new_layer(**(dict(kdim=5) if name.endswith("proj_weight") else {})), random(3, 5, 8)
    layer.get_parameter(name).data = layer.get_parameter(name).data.half()
    with pytest.raises(TypeError, match=rf"^{name}: expected torch.float64 as the projection of the query, got torch.float16"):
        layer(inputs, inputs[..., : layer.kdim], inputs, need_weights=need_weights)


@pytest.mark.parametrize("swapped", ["all", "first", "second"])
def test_swapped_into_a_built_encoder(swapped: str) -> None:
    """A built encoder turns padded input into nested tensors in eval: its layers, ours or torch's, must take and return them."""
    encoder = nn.TransformerEncoder(encoder_layer(), 2).eval()
    assert encoder.use_nested_tensor
    for index, layer in enumerate(encoder.layers):
        randomise(layer, 0.3)
        if swapped in ("all", ("first", "second")[index]):
            layer.self_attn = new_layer()
    source, lengths = random(3, 6, 8), [6, 2, 4]
    padding = torch.arange(6) >= torch.tensor(lengths)[:, None]
    calls = []
    forward = RelativeMultiheadAttention._forward_nested
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(RelativeMultiheadAttention, "_forward_nested", lambda *a, **k: calls.append(1) or forward(*a, **k))
        output = encoder(source, src_key_padding_mask=padding)
    assert len(calls) == (2 if swapped == "all" else 1)
    for row, length in enumerate(lengths):
        expected = source[row : row + 1, :length]
        for layer in encoder.layers:
            expected = encoded(layer, expected)
        torch.testing.assert_close(output[row, :length], expected[0])
        assert (output[row, length:] == 0).all()


def test_decoder() -> None:
    torch.manual_seed(0)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, 0.0, dtype=torch.float64), 1)
    target, memory = random(4, 2, 8), random(6, 2, 8)
    layer = decoder.layers[0]
    layer.self_attn = new_layer(batch_first=False)
    layer.multihead_attn = new_layer(batch_first=False)
    mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    trained = decoder(target, memory, tgt_mask=mask)
    x = layer.norm1(target + layer.self_attn(target, target, target, is_causal=True)[0])
    x = layer.norm2(x + layer.multihead_attn(x, memory, memory)[0])
    torch.testing.assert_close(trained, layer.norm3(x + layer.linear2(torch.relu(layer.linear1(x)))))
    with torch.no_grad():
        torch.testing.assert_close(decoder.eval()(target, memory, tgt_mask=mask), trained)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout: torch.layout) -> None:
    layer = new_layer().train()  # training: torch's own layer refuses them there
    rows = [random(length, 8).requires_grad_() for length in (3, 1, 5)]
    memories = [random(length, 8) for length in (2, 4, 3)]

    def nested(parts: list[torch.Tensor]) -> torch.Tensor:
        with warnings.catch_warnings(action="ignore"):
            return torch.nested.as_nested_tensor(parts, layout=layout)

    source, memory = nested(rows), nested(memories)
    alone = [layer(row, row, row, need_weights=False)[0] for row in rows]
    output = layer(source, source, source, need_weights=False)[0]
    assert output.layout == layout
    (output + source).unbind()  # the same lengths to torch's eyes, else the sum is refused
    for found, expected in zip(output.unbind(), alone, strict=True):
        torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(sum(x.square().sum() for x in of), rows) for of in (output.unbind(), alone)]
    torch.testing.assert_close(*gradients)
    output, weights = layer(source, memory, memory)
    for index, (row, other) in enumerate(zip(rows, memories, strict=True)):
        expected, expected_weights = layer(row, other, other)
        torch.testing.assert_close(output.unbind()[index], expected)
        torch.testing.assert_close(weights[index, : len(row), : len(other)], expected_weights)
    with pytest.raises(ValueError, match=r"^attn_mask: expected None beside nested tensors"):
        layer(source, source, source, attn_mask=torch.zeros(5, 5))
    with pytest.raises(ValueError, match=r"^key: expected a nested tensor"):
        layer(source, random(3, 5, 8), random(3, 5, 8))
    with pytest.raises(ValueError, match=r"^value: expected the lengths"):
        layer(source, source, memory)
    with pytest.raises(ValueError, match=r"^query: .*batch_first=True"):
        new_layer(batch_first=False)(source, source, source)


# ---- decoding ------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@draws.given
def test_decoding_equals_the_causal_pass(draw) -> None:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    batch_first, batched, extra, autograd, need_weights = (draw(flag) for _ in range(5))
    layer = new_layer(
        batch_first=batch_first, add_bias_kv=extra, add_zero_attn=extra, per_head=draw(flag),
        is_causal=draw(flag), max_relative_position=draw(st.sampled_from((0, 2, 40, (3, 0)))),
        window=draw(st.sampled_from((None, (2, 0)))),
    )  # fmt: skip
    steps = draw(st.lists(st.integers(1, 20), min_size=1, max_size=5))
    length, batch = sum(steps), 2 if batched else 1
    time = 1 if batch_first and batched else 0
    shape = [length, 8] if not batched else [batch, length, 8] if batch_first else [length, batch, 8]
    inputs = random(*shape)
    padding = torch.rand(batch, length) < 0.3 if draw(flag) else None
    mask = torch.randn(length, length).double() if draw(flag) else None

    def masks(start: int, stop: int) -> dict:
        return dict(
            key_padding_mask=None if padding is None else padding[:, :stop] if batched else padding[0, :stop],
            attn_mask=None if mask is None else mask[start:stop, :stop],
        )

    with torch.set_grad_enabled(autograd):
        call = dict(is_causal=not layer.is_causal, need_weights=need_weights)
        expected, expected_weights = layer(inputs, inputs, inputs, **call, **masks(0, length))
        cache, outputs, start = KeyValueCache(), [], 0
        for count in steps:
            part = inputs.narrow(time, start, count)
            output, weights = layer(part, part, part, cache=cache, **call, **masks(start, start + count))
            outputs.append(output)
            if need_weights and not extra:
                found = expected_weights[..., start : start + count, : start + count]
                torch.testing.assert_close(weights, found)
            start += count
            assert len(cache) == cache.length == start
            assert cache.key.shape == cache.value.shape == (batch, 2, start, 4)  # never with the extra keys
        torch.testing.assert_close(torch.cat(outputs, time), expected)
        if autograd:
            gradients = [torch.autograd.grad(x.square().sum(), list(layer.parameters())) for x in (torch.cat(outputs, time), expected)]
            torch.testing.assert_close(*gradients)


def test_cache_copies_few_positions() -> None:
    """200 steps move to a larger buffer a few times, not 200 times; earlier views stay as they were."""
    cache, buffers = KeyValueCache(), set()
    assert cache.key is None
    with torch.no_grad():
        for step in range(200):
            key, value = cache.append(torch.full((1, 1, 1, 2), float(step)), torch.full((1, 1, 1, 2), -float(step)))
            buffers.add(key.untyped_storage().data_ptr())
            if step == 20:
                early, kept = key, key.clone()
    assert len(buffers) <= 6
    assert torch.equal(early, kept)
    assert torch.equal(key[0, 0, :, 0], torch.arange(200.0))
    assert torch.equal(value, -key)
    assert torch.equal(cache.key, key)
    assert torch.equal(cache.value, value)
    cache.reset()
    assert cache.length == 0
    assert cache.key is cache.value is None


def test_cache_between_autograd_modes() -> None:
    """What autograd saved is not written to, what inference mode made is not written to later, by whatever order of modes."""
    layer = new_layer(is_causal=True)
    inputs = random(1, 12, 8)
    expected = layer(inputs, inputs, inputs)[0]
    modes = (torch.no_grad, torch.inference_mode, torch.enable_grad)
    for first in modes:
        for second in modes:
            cache, outputs = KeyValueCache(), []
            for step, mode in enumerate((first, first, second, second, first, second)):
                part = inputs[:, 2 * step : 2 * step + 2]
                with mode():
                    outputs.append(layer(part, part, part, cache=cache, need_weights=False)[0])
            torch.testing.assert_close(torch.cat(outputs, 1), expected)
            for output in outputs:
                if output.requires_grad:
                    output.sum().backward(retain_graph=True)


def test_cache_while_only_the_tables_are_trained() -> None:
    """Keys that need no gradient themselves are saved for that of the tables: they may not be written over either."""
    layer = new_layer(is_causal=True).requires_grad_(False)
    tables = [layer.get_parameter(name).requires_grad_() for name in ("rel_k", "rel_q", "rel_v", "rel_bias")]
    inputs, cache = random(1, 40, 8), KeyValueCache()
    outputs = [layer(*[part] * 3, cache=cache, need_weights=False)[0] for part in inputs.split(1, dim=1)]
    expected = layer(inputs, inputs, inputs, need_weights=False)[0]
    gradients = [torch.autograd.grad(x.square().sum(), tables) for x in (torch.cat(outputs, 1), expected)]
    torch.testing.assert_close(*gradients)


def test_cache_refuses() -> None:
    layer = new_layer(is_causal=True)
    cache, part = KeyValueCache(), random(2, 3, 8)
    layer(part, part, part, cache=cache)
    held = cache.key.clone()
    with pytest.raises(ValueError, match=r"^cache: expected a causal layer or call"):
        new_layer()(part, part, part, cache=cache)
    with pytest.raises(TypeError, match=r"^cache: expected a relattn.KeyValueCache, got dict"):
        layer(part, part, part, cache={})
    with pytest.raises(ValueError, match=r"^cache: expected \(2, 2, steps, 4\).* got \(3, 2, 1, 4\)"):
        layer(*[random(3, 1, 8)] * 3, cache=cache)
    with pytest.raises(ValueError, match=r"^cache: .*float64.* got .*float32"):
        new_layer(is_causal=True, dtype=torch.float32)(*[part.float()] * 3, cache=cache)
    with pytest.raises(ValueError, match=r"^cache: .*steps, 4.* got \(2, 4, 3, 2\)"):
        new_layer(heads=4, is_causal=True)(part, part, part, cache=cache)
    with pytest.raises(ValueError, match=r"^cache: .* on cpu.* on meta"):
        cache.append(held.to("meta"), held.to("meta"))
    with pytest.raises(ValueError, match=r"^query_offset: expected None beside a cache"):
        layer(part, part, part, cache=cache, query_offset=3)
    with pytest.raises(ValueError, match=r"^key: expected the 2 positions of query beside a cache, got 3"):
        layer(part[:, :2], part, part, cache=cache)
    with pytest.raises(ValueError, match=r"^attn_mask: expected \(3, 6\) or \(4, 3, 6\), got \(3, 3\)"):
        layer(part, part, part, cache=cache, attn_mask=torch.zeros(3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^key_padding_mask: expected \(2, 6\), got \(2, 3\)"):
        layer(part, part, part, cache=cache, key_padding_mask=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"^window: "):
        new_layer(window=(1, 1))(part, part, part, cache=cache, is_causal=True)
    assert torch.equal(cache.key, held)  # a refused call leaves the cache as it was


# ---- compiled, exported, under autocast, checkpointed ---------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, dict(add_bias_kv=True, batch_first=False, is_causal=True)])
def test_compiled(options: dict) -> None:
    """One graph for forward and backward, not more than two over many lengths."""
    torch._dynamo.reset()
    layer = new_layer(**options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for length in (5, 7, 9, 12):
        inputs = random(length, length + 1, 8).requires_grad_()
        results = []
        for call in (layer, compiled):
            output = call(inputs, inputs, inputs, need_weights=False)[0]
            results.append((output, torch.autograd.grad(output.square().sum(), (inputs, *layer.parameters()))))
        torch.testing.assert_close(*results)
    assert counter.frame_count <= 2


def test_compiled_decoding() -> None:
    torch._dynamo.reset()
    layer = new_layer(is_causal=True)
    inputs = random(2, 10, 8)
    expected = layer(inputs, inputs, inputs)[0]
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(layer, fullgraph=True, backend=counter)
    cache, outputs = KeyValueCache(), []
    with torch.no_grad():
        for index in range(10):
            part = inputs[:, index : index + 1]
            outputs.append(step(part, part, part, need_weights=False, cache=cache)[0])
    torch.testing.assert_close(torch.cat(outputs, 1), expected)
    assert counter.frame_count <= 3  # the empty cache, the first length, any length


def test_exported() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = new_layer()

        def forward(self, inputs, padding):
            return self.layer(inputs, inputs, inputs, padding, need_weights=False)[0]

    model = Model()
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=4096)}
    program = torch.export.export(model, (random(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)), dynamic_shapes=(sizes, sizes))
    inputs, padding = random(3, 9, 8), torch.rand(3, 9) < 0.3
    exported = program.module()
    outputs = [of(inputs, padding) for of in (exported, model)]
    torch.testing.assert_close(*outputs)
    gradients = [
        torch.autograd.grad(output.square().sum(), [of.get_parameter(name) for name, _ in model.named_parameters()])
        for of, output in zip((exported, model), outputs, strict=True)
    ]
    torch.testing.assert_close(*gradients)  # an exported operator without autograd of its own would lose them silently


class Network(nn.Module):
    def __init__(self, need_weights: bool = False, **options) -> None:
        super().__init__()
        self.need_weights, self.attention = need_weights, new_layer(**options)

    def forward(self, inputs: torch.Tensor, padding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, weights = self.attention(inputs, inputs, inputs, padding, need_weights=self.need_weights)
        return (output + inputs, weights) if self.need_weights else output + inputs


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("options", [{}, dict(add_bias_kv=True, is_causal=True, window=(2, 0)), dict(backend="reference")], ids=str)
def test_traced_and_saved(options: dict, need_weights: bool) -> None:
    """The trace held a Python function, which cannot be saved. Loaded, it serves other sizes, and trains."""
    network, file = Network(need_weights, **options), io.BytesIO()
    torch.jit.save(torch.jit.trace(network, (random(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool))), file)
    loaded = torch.jit.load(io.BytesIO(file.getvalue()))
    inputs, padding = random(3, 9, 8), torch.rand(3, 9) < 0.3
    torch.testing.assert_close(loaded(inputs, padding), network(inputs, padding))
    gradients = []
    for of in (loaded, network):
        output = of(inputs, padding)
        loss = (output[0] if need_weights else output).square().sum()
        gradients.append(dict(zip(dict(of.named_parameters()), torch.autograd.grad(loss, list(of.parameters())), strict=True)))
    torch.testing.assert_close(*gradients)


def test_symbolic_trace_keeps_it_as_a_leaf() -> None:
    """torch's own layer is one by its module's name; here "query: expected a tensor, got Proxy"."""
    network = Network()
    graph = torch.fx.symbolic_trace(network)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["attention"]
    inputs, padding = random(3, 9, 8), torch.rand(3, 9) < 0.3
    torch.testing.assert_close(graph(inputs, padding), network(inputs, padding))


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast(extra: bool, need_weights: bool) -> None:
    torch.manual_seed(0)
    layer = new_layer(dtype=torch.float32, add_bias_kv=extra)
    inputs = torch.randn(2, 6, 8, requires_grad=True)
    call = dict(need_weights=need_weights, attn_mask=torch.randn(6, 6), key_padding_mask=torch.zeros(2, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = layer(inputs, inputs, inputs, **call)
        layer(*[inputs.bfloat16()] * 3, **call)
        with pytest.raises(TypeError, match=r"^query: expected torch.float32 .* got torch.float64"):
            layer(*[inputs.double()] * 3)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(inputs, inputs, inputs, **call)[0], atol=0.1, rtol=0.1)
    output.float().sum().backward()
    assert layer.rel_k.grad.dtype == torch.float32
    assert layer.rel_k.grad.abs().sum() > 0


@pytest.mark.parametrize("need_weights", [False, True])
def test_half_precision(need_weights: bool) -> None:
    torch.manual_seed(0)
    layer = new_layer(dtype=torch.float32, add_zero_attn=True)
    inputs = torch.randn(2, 6, 8)
    expected, _ = layer(inputs, inputs, inputs, need_weights=need_weights)
    output, weights = layer.bfloat16()(*[inputs.bfloat16()] * 3, need_weights=need_weights)
    assert output.dtype == torch.bfloat16
    assert weights is None or weights.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.1, rtol=0.1)


def test_checkpointed_dropout_is_replayed() -> None:
    layer = new_layer(dropout=0.5, add_bias_kv=True).train()
    inputs = random(2, 6, 8).requires_grad_()
    gradients = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        torch.manual_seed(3)
        loss = run(lambda x: layer(x, x, x, need_weights=False)[0].square().sum(), inputs)
        gradients.append(torch.autograd.grad(loss, (inputs, *layer.parameters())))
    torch.testing.assert_close(*gradients)


def test_backend_is_handed_on() -> None:
    layer = new_layer(backend="reference")
    inputs = random(1, 4, 8).requires_grad_()
    output = layer(inputs, inputs, inputs, need_weights=False)[0]
    (first,) = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
    first.square().sum().backward()  # a second derivative: the reference backend alone has it
    assert inputs.grad.abs().sum() > 0
