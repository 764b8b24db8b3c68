"""Programs that run without relattn: the operator decomposed, AOTInductor, ONNX; and quantised or adapted projections."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import relattn
from relattn import RelativeMultiheadAttention, functional, relative_attention, varlen
from tests import draws
from tests.oracles import calls, everything

ALL_TERMS = ("rel_k", "rel_q", "rel_v", "rel_bias", "pos_bias")
INT8 = 0.03  # what 8 bits may be off by, of the largest number


def decomposed(model: nn.Module, arguments: tuple, sizes: Any, rows: int | None = None) -> torch.export.ExportedProgram:
    program = torch.export.export(model, arguments, dynamic_shapes=sizes)
    program = program.run_decompositions(relattn.export.decompositions(rows))
    assert "relattn" not in str(program.graph_module)
    return program


def randomised(model: nn.Module, std: float = 0.5) -> Any:
    """With parameters that all matter."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model.eval()


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Different, as 8 bits are, but not much."""
    difference = (actual - expected).abs().max() / expected.abs().max()
    assert 0.0 < difference < INT8


class Layer(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.attention = RelativeMultiheadAttention(16, 2, batch_first=True, max_relative_position=6, **options)

    def forward(self, inputs: Tensor, padding: Tensor) -> Tensor:
        return self.attention(inputs, inputs, inputs, padding, need_weights=False)[0]


FULL: dict[str, Any] = dict(terms=ALL_TERMS, per_head=True, is_causal=True, window=(5, None), chunk=(4, None))


def layer_inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, length, 16), torch.rand(batch, length) < 0.3


def layer_sizes() -> Any:
    sizes = {0: Dim("batch", max=64), 1: Dim("length", max=4096)}
    return sizes, sizes


# ---- the decomposition ----


@draws.given
def test_it_is_the_reference(draw):
    call = calls(draw)
    if draw(st.booleans()) and ("query_offset" in call or call["query"].shape[2] == call["key"].shape[2]):
        call["chunk"] = (draw(st.integers(1, 3)), draw(st.sampled_from((None, 0, 1))))
    operator = relattn.export.decompositions(draw(st.sampled_from((None, 1, 3))))[torch.ops.relattn.forward.default]
    expected = relative_attention(**call, return_lse=True, backend="reference")
    tensors, settings = functional.validated(**(functional._DEFAULTS | call))
    actual = operator("any", *tensors, *settings)[:2]
    torch.testing.assert_close(actual, expected)
    assert [part.stride() for part in actual] == [part.stride() for part in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [None, 3])
def test_precision_is_the_references(dtype, rows):
    call = everything(query_length=8, key_length=8, dtype=dtype) | dict(is_causal=True)
    tensors, settings = functional.validated(**(functional._DEFAULTS | call))
    operator = relattn.export.decompositions(rows)[torch.ops.relattn.forward.default]
    actual = operator("any", *tensors, *settings)[:2]
    expected = relative_attention(**call, return_lse=True, backend="reference")
    torch.testing.assert_close(actual, expected, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=1e-2)
    assert [part.dtype for part in actual] == [part.dtype for part in expected]


@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0), (0, 0)])
def test_nothing(queries, keys):
    call: dict[str, Any] = everything(query_length=queries, key_length=keys) | dict(is_causal=True, query_offset=0)
    tensors, settings = functional.validated(**(functional._DEFAULTS | call))
    operator = relattn.export.decompositions()[torch.ops.relattn.forward.default]
    expected = relative_attention(**call, return_lse=True, backend="reference")
    torch.testing.assert_close(operator("any", *tensors, *settings)[:2], expected)


def test_a_program_of_any_size():
    model = randomised(Layer(**FULL))
    program = decomposed(model, layer_inputs(2, 5), layer_sizes(), rows=4).module()
    for batch, length in ((3, 9), (1, 1), (2, 40)):
        inputs = layer_inputs(batch, length)
        torch.testing.assert_close(program(*inputs), model(*inputs), atol=1e-5, rtol=1e-4)


def test_a_program_with_weights():
    """"length <= 1023": the warning of long ones was a condition of the program."""

    class Weights(Layer):
        def forward(self, inputs, padding):
            return self.attention(inputs, inputs, inputs, padding)

    model = randomised(Weights(**FULL))
    inputs = layer_inputs(3, 9)
    program = decomposed(model, layer_inputs(2, 5), layer_sizes()).module()
    torch.testing.assert_close(program(*inputs), model(*inputs))


def test_other_lengths_and_an_offset_that_is_a_size():
    class Continue(nn.Module):
        def forward(self, query, key, rel_k, key_lengths):
            offset = key.shape[2] - query.shape[2]
            return relative_attention(query, key, key, rel_k, key_lengths=key_lengths, is_causal=True, query_offset=offset, return_lse=True)

    def inputs(batch: int, queries: int, keys: int) -> tuple[Tensor, ...]:
        tensors = (torch.randn(batch, 2, queries, 8), torch.randn(batch, 2, keys, 8), torch.randn(9, 8))
        return *tensors, torch.randint(0, keys, (batch,))

    batch, sizes = Dim("batch", max=64), (Dim("queries", max=512), Dim("keys", max=512))
    shapes = ({0: batch, 2: sizes[0]}, {0: batch, 2: sizes[1]}, {}, {0: batch})
    for rows in (None, 4):
        program = decomposed(Continue(), inputs(2, 5, 7), shapes, rows).module()
        for given in ((3, 4, 17), (2, 11, 11), (1, 1, 30)):
            arguments = inputs(*given)
            torch.testing.assert_close(program(*arguments), Continue()(*arguments), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [None, 2])
def test_padding_may_hold_anything(rows):
    """A weight of 0 times NaN is NaN."""
    call: dict[str, Any] = everything()
    expected = relative_attention(**call, key_lengths=torch.tensor([3, 5]), key_mask=torch.arange(5)[None].expand(2, -1) > 0)
    call["key"][0, :, 3:], call["value"][0, :, 3:] = torch.nan, torch.inf
    call["key"][:, :, 0], call["value"][:, :, 0] = torch.inf, torch.nan
    call |= dict(key_lengths=torch.tensor([3, 5]), key_mask=torch.arange(5)[None].expand(2, -1) > 0)
    tensors, settings = functional.validated(**(functional._DEFAULTS | call))
    operator = relattn.export.decompositions(rows)[torch.ops.relattn.forward.default]
    torch.testing.assert_close(operator("any", *tensors, *settings)[0], expected)


PACKED: list[dict[str, Any]] = [{}, dict(is_causal=True), dict(chunk=(3, 1)), dict(chunk=(2, None), query_offset=1, window=(4, None))]


def packed_inputs(*lengths: int) -> tuple[Tensor, ...]:
    """Query, key and their ends; a mask of keys, and lengths of which nothing may be left."""
    tokens, ends = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    query, key = torch.randn(2, tokens, 2, 8)
    return query, key, ends, torch.rand(tokens) < 0.8, torch.tensor([max(0, length - 2) for length in lengths])


def decomposed_packed(rows: int | None, query: Tensor, key: Tensor, **call: Any) -> tuple[Tensor, Tensor]:
    defaults = {name: default for name, default in functional._DEFAULTS.items() if name != "attn_mask"}
    tensors, settings = varlen.packed_call(query, key, key, **(defaults | call))
    operator = relattn.export.decompositions(rows)[torch.ops.relattn.forward.default]
    output, lse, _ = operator("any", *tensors, *settings)
    return output[0].transpose(0, 1), lse[0]


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("options", PACKED, ids=str)
def test_packed_sequences(rows, options):
    tables = dict(rel_k=torch.randn(5, 8), rel_q=torch.randn(5, 8), rel_v=torch.randn(2, 5, 8), rel_bias=torch.randn(5)) | options
    for lengths in ((3, 4), (5, 0, 9, 1), (6,)):
        query, key, ends, key_mask, key_lengths = packed_inputs(*lengths)
        call = dict(cu_seqlens_q=ends, key_mask=key_mask, key_lengths=key_lengths) | tables
        expected = relattn.relative_attention_varlen(query, key, key, return_lse=True, backend="reference", **call)
        torch.testing.assert_close(decomposed_packed(rows, query, key, **call), expected, atol=1e-5, rtol=1e-4)


def test_a_program_of_packed_sequences_of_any_number():
    class Packed(nn.Module):
        def forward(self, query, key, ends):
            return relattn.relative_attention_varlen(query, key, key, rel_k, cu_seqlens_q=ends, is_causal=True)

    rel_k = torch.randn(5, 8)
    tokens, sequences = Dim("tokens", max=512), Dim("sequences", max=64)
    program = decomposed(Packed(), packed_inputs(3, 4)[:3], ({0: tokens}, {0: tokens}, {0: sequences + 1})).module()
    for lengths in ((5, 1, 9), (1, 2, 1, 7)):
        inputs = packed_inputs(*lengths)[:3]
        torch.testing.assert_close(program(*inputs), Packed()(*inputs), atol=1e-5, rtol=1e-4)


def test_refused():
    class Attend(nn.Module):
        def __init__(self, **options) -> None:
            super().__init__()
            self.options = options

        def forward(self, query):
            return relative_attention(query, query, query, **self.options)

    program = torch.export.export(Attend(dropout_p=0.1), (torch.randn(1, 2, 4, 8),))
    with pytest.raises(ValueError, match=r"dropout_p: expected 0 .* model.eval\(\)"):
        program.run_decompositions(relattn.export.decompositions())
    query, ends = torch.randn(4, 2, 8), torch.tensor([0, 3, 4])
    for options, message in (
        (dict(cu_seqlens_k=torch.tensor([0, 2, 4])), "cu_seqlens_k: packed keys that are not"),
        (dict(query_offset=torch.tensor([1, 2])), "query_offset: one for each packed sequence"),
    ):
        with pytest.raises(ValueError, match=message):
            decomposed_packed(None, query, query, cu_seqlens_q=ends, **options)
    with pytest.raises(ValueError, match="rows: expected None or a number"):
        relattn.export.decompositions(0)


# ---- without Python's relattn ----

_LOADS = """
import sys, torch
model = torch._inductor.aoti_load_package(sys.argv[1])
for inputs, expected in torch.load(sys.argv[2]):
    torch.testing.assert_close(model(*inputs), expected, atol=1e-5, rtol=1e-4)
assert "relattn" not in sys.modules and not hasattr(torch.ops.relattn, "forward")
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_an_inductor_package_runs_without_relattn(tmp_path: Path) -> None:
    model = randomised(Layer(is_causal=True))  # all terms take the compiler twice as long
    program = decomposed(model, layer_inputs(2, 5), layer_sizes(), rows=4)
    package, file = str(tmp_path / "model.pt2"), str(tmp_path / "expected.pt")
    quick: dict[str, Any] = {  # to compile, not to run
        "aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False, "cpp.simdlen": 0
    }  # fmt: skip
    torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=quick)
    samples = [layer_inputs(*sizes) for sizes in ((3, 9), (2, 5), (1, 30))]
    torch.save([(inputs, model(*inputs).detach()) for inputs in samples], file)
    subprocess.run([sys.executable, "-c", _LOADS, package, file], check=True, cwd=tmp_path)


# ---- ONNX ----


def onnx_file(program: torch.export.ExportedProgram, path: Path) -> str:
    """Exported, of standard operators only."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    torch.onnx.export(program, (), str(path), verbose=False, external_data=False)
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain for opset in model.opset_import} == {""}
    return str(path)


def onnx_runs(file: str) -> Callable[..., list[Tensor]]:
    """A function of any arguments."""
    session = pytest.importorskip("onnxruntime").InferenceSession(file)

    def run(*arguments: Any) -> list[Tensor]:
        flat = [tensor.numpy() for tensor in pytree.tree_leaves(arguments)]
        names = [given.name for given in session.get_inputs()]
        return [torch.from_numpy(output) for output in session.run(None, dict(zip(names, flat, strict=True)))]

    return run


def check_onnx(
    model: nn.Module, inputs: Callable[..., tuple], traced: tuple, sizes: Any, others: list[tuple], path: Path, rows: int | None = None
) -> None:
    pytest.importorskip("onnxruntime")
    run = onnx_runs(onnx_file(decomposed(model, inputs(*traced), sizes, rows), path))
    for size in (traced, *others):
        arguments = inputs(*size)
        with torch.no_grad():
            expected = pytree.tree_leaves(model(*arguments))
        torch.testing.assert_close(run(*arguments), expected, atol=1e-5, rtol=1e-4)


def test_onnx_of_the_layer_quantised_too(tmp_path):
    """In a loop (the others have none). onnxruntime quantises all projections, also those in one weight, which torch.ao leaves alone."""
    model, path = randomised(Layer(**FULL), std=0.2), tmp_path / "model.onnx"
    check_onnx(model, layer_inputs, (2, 5), layer_sizes(), [(3, 9), (1, 1), (1, 40)], path, rows=4)
    onnx, quantization = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime.quantization")
    small, inputs = str(tmp_path / "small.onnx"), layer_inputs(3, 9)
    # In seven bits: on processors without VNNI sums of two products of eight saturate in onnxruntime.
    quantization.quantize_dynamic(str(path), small, weight_type=quantization.QuantType.QInt8, reduce_range=True)
    assert sum(node.op_type == "MatMulInteger" for node in onnx.load(small).graph.node) == 2
    assert_near(onnx_runs(small)(*inputs)[0], model(*inputs))


def test_onnx_of_a_converted_wav2vec2_bert_layer(tmp_path):
    models = pytest.importorskip("tests.huggingface.models")
    from relattn.huggingface import convert

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = convert(models.wav2vec2_bert().encoder.layers[0])

        def forward(self, hidden, seen):
            return self.layer(hidden, attention_mask=seen)[0]

    def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, length, models.HIDDEN), torch.arange(length)[None] < torch.randint(1, length + 1, (batch, 1))

    check_onnx(Encoder().eval(), inputs, (2, 7), layer_sizes(), [(3, 9), (1, 40)], tmp_path / "model.onnx")


def test_onnx_of_a_step_of_the_decoder(tmp_path):
    """With padding on the left, and the cache as inputs and outputs."""
    transformers = pytest.importorskip("transformers")
    from examples.chorales.decoder.model import MusicTransformer, MusicTransformerConfig

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = dict(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
            self.model = randomised(MusicTransformer(MusicTransformerConfig(positions="both", max_relative_position=6, **sizes)))

        def forward(self, tokens, mask, past):
            cache = transformers.DynamicCache()
            for layer, (key, value) in enumerate(past):
                cache.update(key, value, layer)
            logits = self.model(tokens, attention_mask=mask, past_key_values=cache).logits
            return logits, [(layer.keys, layer.values) for layer in cache.layers]

    def inputs(batch: int, past: int) -> tuple:
        mask = torch.ones(batch, past + 1, dtype=torch.long)
        mask[0, :2] = 0
        return torch.randint(3, 20, (batch, 1)), mask, [tuple(torch.randn(2, batch, 2, past, 8)) for _ in range(2)]

    batch, past = Dim("batch", max=64), Dim("past", max=4096)
    sizes = ({0: batch}, {0: batch, 1: past + 1}, [({0: batch, 2: past},) * 2] * 2)
    check_onnx(Step().eval(), inputs, (2, 5), sizes, [(3, 9), (1, 40)], tmp_path / "model.onnx")


# ---- quantised, and adapted ----


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_by_torch_ao():
    """As of nn.MultiheadAttention, the projection in is no module, and the one out is of a class that is left alone unless it is named."""
    quantization, dynamic = (pytest.importorskip(f"torch.ao.{name}") for name in ("quantization", "nn.quantized.dynamic"))
    model, inputs = Layer().eval(), layer_inputs(3, 9)
    left = quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    torch.testing.assert_close(left(*inputs), model(*inputs), atol=0, rtol=0)
    kind = type(model.attention.out_proj)
    small = quantization.quantize_dynamic(model, {kind}, mapping={kind: dynamic.Linear}, dtype=torch.qint8)
    assert isinstance(small.attention.out_proj, dynamic.Linear)
    assert_near(small(*inputs), model(*inputs))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_quantised_by_torchao():
    """By name, all projections."""
    ao = pytest.importorskip("torchao.quantization")
    model, inputs = Layer().eval(), layer_inputs(3, 9)
    expected = model(*inputs)
    names = ("attention.in_proj_weight", "attention.out_proj.weight")
    ao.quantize_(model, ao.FqnToConfig(dict.fromkeys(names, ao.Int8DynamicActivationInt8WeightConfig())), filter_fn=None)
    assert all(type(model.get_parameter(name)) is not nn.Parameter for name in names)
    assert_near(model(*inputs), expected)


def converted_model() -> tuple[Any, dict[str, Tensor]]:
    models = pytest.importorskip("tests.huggingface.models")
    from relattn.huggingface import convert

    return convert(models.wav2vec2_bert()).eval(), models.features(10)(models.LENGTH)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_converted_model_quantised():
    """The copy that torch.ao makes is converted too, and reads its own projections."""
    quantization, (model, inputs) = pytest.importorskip("torch.ao.quantization"), converted_model()
    from relattn.huggingface import revert

    small = quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    layer = small.encoder.layers[0].self_attn
    assert isinstance(layer.linear_q, torch.ao.nn.quantized.dynamic.Linear)
    result, seen = small(**inputs)[0], inputs["attention_mask"].bool()
    assert_near(result[seen], model(**inputs)[0][seen])
    torch.testing.assert_close(revert(small)(**inputs)[0][seen], result[seen], atol=0.02, rtol=0)  # rounded elsewhere, an eighth bit flips


def test_a_converted_model_adapted():
    peft, (model, inputs) = pytest.importorskip("peft"), converted_model()
    from relattn.huggingface import revert

    seen, before = inputs["attention_mask"].bool(), model(**inputs)[0].detach()
    names = ["linear_q", "linear_k", "linear_v", "linear_out", "distance_embedding"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names)).train()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), 1.0)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(**inputs)[0][seen].pow(3).mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in trained.values())
    after = adapted.eval()(**inputs)[0]
    assert (after - before)[seen].abs().max() > 1e-3
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(**inputs)[0][seen], after[seen], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(revert(merged)(**inputs)[0][seen], after[seen], atol=1e-5, rtol=1e-4)
