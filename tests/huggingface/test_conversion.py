"""relattn.huggingface.convert: every converted model against itself before, in value and gradient; what must stay as it was."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

import transformers
from transformers.models.deberta_v2 import modeling_deberta_v2
from transformers.models.fastspeech2_conformer import modeling_fastspeech2_conformer
from transformers.models.seamless_m4t import modeling_seamless_m4t
from transformers.models.seamless_m4t_v2 import modeling_seamless_m4t_v2
from transformers.models.speecht5 import modeling_speecht5
from transformers.models.vits import modeling_vits
from transformers.models.wav2vec2_bert import modeling_wav2vec2_bert

from examples.chorales.storage import read_json
from relattn import convert as implementation
from relattn import relative_attention
from relattn.huggingface import convert, revert

HIDDEN, HEADS, LENGTH, PADDED = 24, 3, 23, 9  # the second sequence ends with 9 frames or tokens of padding
COMMON: dict[str, Any] = dict(hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=32)
NO_DROPOUT = ("hidden", "activation", "attention", "feat_proj", "final", "conformer_conv")


class Case(NamedTuple):
    """A small model with two layers of relative attention, and its inputs."""

    build: Callable[..., nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]  # of a length; the mask has the name "attention_mask"
    eager: bool = False  # the original has no other implementation, and always gives weights
    pads: bool = True  # the original takes a mask of padding
    tolerance: float = 1e-9  # of float64: some originals take a scale or the softmax in float32


def features(size: int) -> Callable[[int], dict[str, Tensor]]:
    return lambda length: {"input_features": torch.randn(2, length, size), "attention_mask": mask_of(length)}


def tokens(length: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 29, (2, length)), "attention_mask": mask_of(length)}


def mask_of(length: int, padded: int = PADDED) -> Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, length - padded :] = 0
    return mask


def without(*names: str) -> dict[str, float]:
    return {f"{name}_dropout": 0.0 for name in names} | {"layerdrop": 0.0}


def wav2vec2_bert(kind: str = "relative_key", **more) -> nn.Module:
    settings = COMMON | without(*NO_DROPOUT) | dict(feature_projection_input_dim=10, position_embeddings_type=kind)
    settings |= dict(left_max_position_embeddings=6, right_max_position_embeddings=2, conv_depthwise_kernel_size=5, max_source_positions=30)
    return transformers.Wav2Vec2BertModel(transformers.Wav2Vec2BertConfig(**(settings | dict(apply_spec_augment=False) | more)))


def wav2vec2_conformer(**more) -> nn.Module:
    settings = COMMON | without(*NO_DROPOUT, "feat_quantizer") | dict(position_embeddings_type="relative", apply_spec_augment=False)
    settings |= dict(conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(8, 4), feat_extract_norm="layer", max_source_positions=30)
    settings |= dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, conv_depthwise_kernel_size=5)
    return transformers.Wav2Vec2ConformerModel(transformers.Wav2Vec2ConformerConfig(**(settings | more)))


def seamless(module: Any, version: str, kind: str, **more) -> nn.Module:
    settings: dict[str, Any] = dict(hidden_size=HIDDEN, speech_encoder_layers=2, speech_encoder_attention_heads=HEADS)
    settings |= dict(speech_encoder_intermediate_size=32, feature_projection_input_dim=10, add_adapter=False, position_embeddings_type=kind)
    settings |= dict(speech_encoder_dropout=0.0, speech_encoder_layerdrop=0.0, conv_depthwise_kernel_size=5, max_source_positions=30)
    settings |= dict(left_max_position_embeddings=6, right_max_position_embeddings=2) if version else {}
    config = getattr(transformers, f"SeamlessM4T{version}Config")(**(settings | more))
    return getattr(module, f"SeamlessM4T{version}SpeechEncoder")(config)


def fast_conformer(name: str, **more) -> nn.Module:
    settings = COMMON | without("activation", "attention") | dict(num_mel_bins=16, subsampling_factor=4, subsampling_conv_channels=4)
    settings |= dict(conv_kernel_size=5, dropout=0.0, dropout_positions=0.0) | more
    return getattr(transformers, f"{name}Encoder")(getattr(transformers, f"{name}EncoderConfig")(**settings))


def frames(length: int) -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 4 * length, 16), "attention_mask": mask_of(4 * length, 4 * PADDED)}


def fastspeech2(**more) -> nn.Module:
    settings: dict[str, Any] = dict(hidden_size=HIDDEN, encoder_num_attention_heads=HEADS, encoder_linear_units=32, encoder_layers=2)
    settings |= {f"encoder_{name}_rate": 0.0 for name in ("dropout", "positional_dropout", "attention_dropout")} | more
    config = transformers.FastSpeech2ConformerConfig(**settings)
    model = modeling_fastspeech2_conformer.FastSpeech2ConformerEncoder(config, config.encoder_config)
    for layer in model.conformer_layers:  # left uninitialised there
        nn.init.zeros_(layer.self_attn.pos_bias_u), nn.init.zeros_(layer.self_attn.pos_bias_v)
    return model


def fastspeech2_inputs(length: int) -> dict[str, Any]:
    return {"input_tensor": torch.randn(2, length, HIDDEN), "attention_mask": mask_of(length)[:, None], "return_dict": True}


def speecht5(**more) -> nn.Module:
    settings = dict(hidden_size=HIDDEN, encoder_layers=2, encoder_attention_heads=HEADS, encoder_ffn_dim=32, vocab_size=29)
    settings |= without("positional", "hidden", "attention", "activation") | dict(encoder_layerdrop=0.0, encoder_max_relative_position=4)
    return modeling_speecht5.SpeechT5EncoderWithTextPrenet(transformers.SpeechT5Config(**(settings | more)))


def speecht5_inputs(length: int) -> dict[str, Tensor]:
    return {"input_values": torch.randint(3, 29, (2, length)), "attention_mask": mask_of(length)}


def xlnet(**more) -> nn.Module:
    settings = dict(vocab_size=29, d_model=HIDDEN, n_layer=2, n_head=HEADS, d_inner=32, dropout=0.0, mem_len=7)
    return transformers.XLNetModel(transformers.XLNetConfig(**(settings | more)))


def vits(**more) -> nn.Module:
    settings = COMMON | without("hidden", "attention", "activation") | dict(ffn_dim=32, window_size=4, vocab_size=29, flow_size=4)
    settings["attn_implementation"] = "eager"  # as VitsModel sets it
    settings.pop("intermediate_size")
    return modeling_vits.VitsTextEncoder(transformers.VitsConfig(**(settings | more)))


def vits_inputs(length: int) -> dict[str, Tensor]:
    inputs = tokens(length)
    return inputs | {"padding_mask": inputs["attention_mask"][..., None].to(torch.get_default_dtype())}


def deberta(name: str, **more) -> nn.Module:
    settings = COMMON | dict(vocab_size=29, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, relative_attention=True)
    settings |= dict(pos_att_type=["c2p", "p2c"], position_biased_input=False, max_relative_positions=8) | more
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings))


part = functools.partial
CASES = {
    "wav2vec2-bert": Case(wav2vec2_bert, features(10)),
    "wav2vec2-bert-relative": Case(part(wav2vec2_bert, "relative"), features(10)),
    "wav2vec2-conformer": Case(
        wav2vec2_conformer,
        lambda length: {"input_values": torch.randn(2, 8 * length + 8), "attention_mask": mask_of(8 * length + 8, 8 * PADDED)},
    ),
    "seamless-v1": Case(part(seamless, modeling_seamless_m4t, "", "relative"), features(10)),
    "seamless-v2": Case(part(seamless, modeling_seamless_m4t_v2, "v2", "relative_key"), features(10)),
    "seamless-v2-chunks": Case(
        part(seamless, modeling_seamless_m4t_v2, "v2", "relative_key", speech_encoder_chunk_size=8, speech_encoder_left_chunk_num=1),
        features(10),
    ),
    "parakeet": Case(part(fast_conformer, "Parakeet"), frames),
    "nemotron": Case(part(fast_conformer, "NemotronAsrStreaming", sliding_window=5, default_num_lookahead_tokens=1), frames),
    "nemotron-causal": Case(part(fast_conformer, "NemotronAsrStreaming", sliding_window=5, default_num_lookahead_tokens=0), frames),
    "fastspeech2": Case(fastspeech2, fastspeech2_inputs, True),
    "speecht5": Case(speecht5, speecht5_inputs, True),
    "xlnet": Case(xlnet, tokens, True),
    "xlnet-uni": Case(part(xlnet, attn_type="uni"), tokens, True, False),
    "vits": Case(vits, vits_inputs, True),
    "deberta": Case(part(deberta, "Deberta"), tokens, True, True, 1e-6),
    "deberta-long": Case(part(deberta, "Deberta", max_relative_positions=-1, pos_att_type=["p2c"]), tokens, True, True, 1e-6),
    "deberta-v2": Case(
        part(deberta, "DebertaV2", position_buckets=4, norm_rel_ebd="layer_norm", conv_kernel_size=3), tokens, True, True, 1e-6
    ),
    "deberta-v2-shared": Case(
        part(deberta, "DebertaV2", position_buckets=8, max_relative_positions=30, share_att_key=True), tokens, True, True, 1e-6
    ),
    "deberta-v2-c2p": Case(part(deberta, "DebertaV2", pos_att_type=["c2p"]), tokens, True, True, 1e-6),
}  # fmt: skip
every_case = pytest.mark.parametrize("name", CASES)


def built(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **settings) -> nn.Module:
    """In eval mode, every parameter random: those that start at zero (u, v) would hide their places."""
    torch.manual_seed(seed)
    model = CASES[name].build(**settings).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def given(name: str, dtype: torch.dtype = torch.float64, length: int = LENGTH, padded: bool = True) -> dict[str, Any]:
    torch.manual_seed(1)
    inputs = CASES[name].inputs(length)
    if not padded or not CASES[name].pads:
        del inputs["attention_mask"]
        if "padding_mask" in inputs:
            inputs["padding_mask"] = torch.ones_like(inputs["padding_mask"])
    floats = [key for key, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()]
    return inputs | {key: inputs[key].to(dtype) for key in floats}


def seen(output: Tensor, padded: bool) -> Tensor:
    """bool (B, L) of an output (B, L, ...): True where it is not padding."""
    lengths = torch.tensor([output.shape[1], output.shape[1] - PADDED * padded])
    return torch.arange(output.shape[1]) < lengths[:, None]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance * max(1.0, expected.abs().max().item()), rtol=tolerance)


def gradients(model: nn.Module, output: Tensor, padded: bool) -> dict[str, Tensor]:
    torch.manual_seed(2)
    factor = torch.randn_like(output) * seen(output, padded)[..., None]
    model.zero_grad(set_to_none=True)
    (output * factor).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@every_case
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
def test_equals_the_original(name: str, padded: bool) -> None:
    model, inputs = built(name), given(name, padded=padded)
    original = model(**inputs)[0]
    assert convert(model) is model
    assert sum("forward" in vars(module) for module in model.modules()) >= 2
    output = model(**inputs)[0]
    where = seen(output, padded)
    close(output[where], original[where], CASES[name].tolerance)


CONFORMERS = [name for name in CASES if name.startswith(("wav2vec2", "seamless"))]


@pytest.mark.parametrize("name", CONFORMERS)
def test_equals_the_original_under_eager(name: str) -> None:
    """Whose masks of padding are added to the scores; SeamlessM4T v2's boolean ones as they are, which is kept."""
    model, inputs = built(name), given(name)
    model.set_attn_implementation("eager")
    original = model(**inputs)[0]
    output = convert(model)(**inputs)[0]
    where = seen(output, True)
    close(output[where], original[where], CASES[name].tolerance)


@pytest.mark.parametrize(("buckets", "most"), [(3, 8), (4, 8), (5, 8), (7, 12), (9, 16), (16, 16), (8, 100)])
def test_deberta_beyond_its_buckets(buckets: int, most: int) -> None:
    model = built("deberta-v2", position_buckets=buckets, max_relative_positions=most)
    inputs = given("deberta-v2", length=150, padded=False)
    original = model(**inputs)[0]
    close(convert(model)(**inputs)[0], original, CASES["deberta-v2"].tolerance)


def test_parakeet_layers_take_other_masks() -> None:
    """As where a hook gives a layer a mask of its own, for local attention."""
    model, inputs = built("parakeet"), given("parakeet", padded=False)
    frames = torch.arange(model(**inputs)[0].shape[1])
    local = ((frames - frames[:, None]).abs() <= 1)[None, None]

    def narrow(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        return args, kwargs | {"attention_mask": local}

    encoder = next(module for module in model.modules() if type(module).__name__ == "ParakeetEncoder")
    for layer in encoder.layers:
        layer.register_forward_pre_hook(narrow, with_kwargs=True)
    original = model(**inputs)[0]
    close(convert(model)(**inputs)[0], original, CASES["parakeet"].tolerance)


def test_table_of_another_dtype() -> None:
    model, inputs = built("wav2vec2-bert", torch.float32), given("wav2vec2-bert", torch.float32)
    for layer in model.encoder.layers:
        layer.self_attn.distance_embedding.bfloat16()
    original = model(**inputs)[0]
    where = seen(original, True)
    close(convert(model)(**inputs)[0][where], original[where], 1e-4)


def test_settings_of_a_converted_encoder_are_the_models() -> None:
    model = convert(built("wav2vec2-bert"))
    model.encoder.config.layerdrop = 0.25
    assert model.config.layerdrop == 0.25
    model.encoder.config._attn_implementation = "eager"
    assert model.config._attn_implementation == "eager"


@every_case
def test_gradients_in_training_equal_the_original(name: str) -> None:
    model, inputs = built(name).train(), given(name)
    twin = convert(copy.deepcopy(model))
    expected = gradients(model, model(**inputs)[0], True)
    found = gradients(twin, twin(**inputs)[0], True)
    assert found.keys() == expected.keys()
    for parameter in expected:
        close(found[parameter], expected[parameter], 10 * CASES[name].tolerance)


@every_case
def test_native_kernel_and_autocast(name: str) -> None:
    model, inputs = built(name, torch.float32), given(name, torch.float32)
    original = model(**inputs)[0]
    where = seen(original, True)
    scale, usual = original[where].abs().max(), 0.05
    with torch.autocast("cpu", torch.bfloat16), contextlib.suppress(RuntimeError):  # DeBERTa fails under autocast: a mask overflows
        usual = (model(**inputs)[0][where] - original[where]).abs().max() / scale
    convert(model)
    close(model(**inputs)[0][where], original[where], 2e-4)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs)[0]
        assert (output[where] - original[where]).abs().max() / scale < 2 * usual + 0.02
    output.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("name", ["wav2vec2-bert", "wav2vec2-conformer", "parakeet", "xlnet", "deberta-v2", "fastspeech2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(name: str, dtype: torch.dtype) -> None:
    exact = built(name, torch.float32)
    model, inputs = copy.deepcopy(exact).to(dtype), given(name, dtype)
    precise = {key: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value for key, value in inputs.items()}
    expected = exact(**precise)[0]
    where = seen(expected, True)
    usual = (model(**inputs)[0].float() - expected)[where].abs().max()
    output = convert(model)(**inputs)[0]
    assert output.dtype == dtype
    assert (output.float() - expected)[where].abs().max() < 2 * usual + 0.02 * expected[where].abs().max()


@every_case
def test_attention_weights(name: str) -> None:
    """Also where the original, with "sdpa", gives none: then as its "eager" has them."""
    if name.startswith("nemotron"):
        pytest.skip("its eager attention hides what its mask shows")
    # Beside "eager", SeamlessM4T v2 adds its boolean mask to the scores as ones, and Parakeet's padding becomes NaN.
    model, inputs = built(name), given(name, padded=not name.startswith(("seamless-v2", "parakeet")))
    if name == "seamless-v2-chunks":
        model.config.speech_encoder_chunk_size = LENGTH
    if not CASES[name].eager:
        model.set_attn_implementation("eager")
    expected = model(**inputs, output_attentions=True).attentions
    if not CASES[name].eager:
        model.set_attn_implementation("sdpa")
    output = convert(model)(**inputs, output_attentions=True)
    assert len(output.attentions) == len(expected) == 2
    for weights, right in zip(output.attentions, expected, strict=True):
        length = output[0].shape[1]
        assert weights.shape == right.shape == (2, HEADS, length, length)
        where = seen(output[0], True)
        close(weights.transpose(1, 2)[where], right.transpose(1, 2)[where], 1e-6)
    assert not model(**inputs).get("attentions")


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
def test_attention_weights_of_chunks(padded: bool) -> None:
    model, inputs = convert(built("nemotron")), given("nemotron", padded=padded)
    output = model(**inputs, output_attentions=True)
    close(output[0], model(**inputs)[0])
    length = output[0].shape[1]
    frames = torch.arange(length)
    allowed = implementation._chunk_mask(frames, frames, (2, 2))[None] & seen(output[0], padded)[:, None, :]
    for weights in output.attentions:
        assert torch.equal(weights > 0, allowed[:, None].expand_as(weights))
        close(weights.sum(-1), allowed.any(-1)[:, None].expand(-1, HEADS, -1).double())


class Largest(TorchDispatchMode):
    """Notes the shapes of tensors that are large in two dimensions, in their own memory."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.found = length, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and sum(size >= self.length for size in tensor.shape) >= 2:
                own = tensor.untyped_storage().nbytes() // tensor.element_size()
                if own >= self.length**2:
                    self.found.add((str(function), tuple(tensor.shape)))
        return result


# Of the originals' own making, one for all heads: XLNet's mask, chunks of several.
WITH_A_MASK = {"xlnet"}


@every_case
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
def test_holds_no_tensor_of_length_by_length(name: str, padded: bool, monkeypatch) -> None:
    monkeypatch.setattr(implementation, "_BLOCK", 16)
    length = 100
    model, inputs = built(name, torch.float32), given(name, torch.float32, length, padded)
    if (padded and name in WITH_A_MASK) or name in ("xlnet-uni", "seamless-v2-chunks"):
        pytest.skip("the model makes a mask of length by length")
    with torch.no_grad():
        length = model(**inputs)[0].shape[1]
        with Largest(length) as before:
            model(**inputs)
        convert(model)
        with Largest(length) as after:
            model(**inputs)
    assert before.found
    assert not after.found


@pytest.mark.parametrize("size", [0, 1, 3])
@pytest.mark.parametrize("left", [0, 4, 40])
def test_chunks_in_blocks(size: int, left: int, monkeypatch) -> None:
    """Nemotron's chunks of size + 1 frames, in blocks of queries shorter than the sequence, against its own mask."""
    monkeypatch.setattr(implementation, "_BLOCK", 4)
    model, inputs = built("nemotron", sliding_window=left + 1), given("nemotron")
    original = model(**inputs, num_lookahead_tokens=size)[0]
    output = convert(model)(**inputs, num_lookahead_tokens=size)[0]
    where = seen(output, True)
    close(output[where], original[where])
    frames = torch.arange(12) < torch.tensor([[12], [3]])
    positions = torch.arange(12)
    dense = implementation._chunk_mask(positions, positions, (size + 1, left // (size + 1)))
    expected = ~(dense & frames[:, None]).any(-1)
    assert torch.equal(implementation._sees_none(frames, (size + 1, left // (size + 1))), expected)


def test_nemotron_streams_as_before() -> None:
    model = built("nemotron")
    inputs = given("nemotron", padded=False)["input_features"]

    def stream() -> Tensor:
        cache: dict[str, Any] = {}
        outputs = []
        for start in range(0, inputs.shape[1], 16):
            output = model(inputs[:, start : start + 16], use_cache=True, **cache)
            cache = {"past_key_values": output.past_key_values, "padding_cache": output.padding_cache}
            outputs.append(output.last_hidden_state)
        return torch.cat(outputs, 1)

    expected = stream()
    convert(model)
    close(stream(), expected)


@pytest.mark.parametrize("kind", ["bi", "uni"])
def test_xlnet_with_memory(kind: str) -> None:
    model, inputs = built("xlnet", attn_type=kind), given("xlnet", padded=kind == "bi")  # it cannot join a causal mask and padding
    memory = model(**given("xlnet", padded=False)).mems
    expected = model(**inputs, mems=memory)[0]
    found = convert(model)(**inputs, mems=memory)[0]
    where = seen(found, kind == "bi")
    close(found[where], expected[where])
    assert not torch.equal(found, expected)


def test_xlnet_with_segments_or_two_streams_is_the_original() -> None:
    model, inputs = built("xlnet", torch.float32), given("xlnet", torch.float32)
    segments = {"token_type_ids": (torch.arange(LENGTH) > 11).long().expand(2, -1)}
    target = torch.zeros(2, 1, LENGTH)
    target[:, 0, -1] = 1.0
    hidden = torch.zeros(2, LENGTH, LENGTH)
    hidden[:, :, -1] = 1.0
    twin = convert(copy.deepcopy(model))
    for more in (segments, {"target_mapping": target, "perm_mask": hidden}):
        assert torch.equal(twin(**inputs, **more)[0], model(**inputs, **more)[0])


def test_deberta_with_states_of_its_own_is_the_original() -> None:
    """The enhanced mask decoder: queries that are not the keys."""
    for name in ("deberta-v2", "deberta-v2-c2p"):
        model, inputs = built(name), given(name)
        expected = model(**inputs, output_hidden_states=True)
        layer = model.encoder.layer[-1]
        states = expected.hidden_states[-1]
        arguments = dict(query_states=states, rel_embeddings=model.encoder.get_rel_embedding())
        mask = model.encoder.get_attention_mask(inputs["attention_mask"])
        right = layer(states, mask, relative_pos=model.encoder.get_rel_pos(states), **arguments)[0]
        convert(model)
        mask = model.encoder.get_attention_mask(inputs["attention_mask"])
        assert torch.equal(layer(states, mask, relative_pos=model.encoder.get_rel_pos(states), **arguments)[0], right)


# ---- what must stay as it was ----


@every_case
def test_revert_is_exact_and_nothing_is_left(name: str) -> None:
    model, inputs = built(name, torch.float32), given(name, torch.float32)
    original = model(**inputs)[0]
    before = {module: dict(vars(module)) for module in model.modules()}
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    convert(convert(model))
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    assert revert(model) is model
    for module, attributes in before.items():
        assert vars(module).keys() == attributes.keys()
        assert vars(module).get("config") is attributes.get("config")
    assert torch.equal(model(**inputs)[0], original)
    revert(model)


@pytest.mark.parametrize("name", ["wav2vec2-bert", "parakeet", "nemotron", "deberta-v2"])
def test_files_are_unchanged(name: str, tmp_path) -> None:
    model, inputs = built(name, torch.float32), given(name, torch.float32)
    model.save_pretrained(tmp_path / "before")
    original = model(**inputs)[0]
    convert(model).save_pretrained(tmp_path / "after")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()
    loaded = type(model).from_pretrained(tmp_path / "after").eval()
    assert torch.equal(loaded(**inputs)[0], original)


@pytest.mark.parametrize("name", ["wav2vec2-bert", "nemotron", "vits", "deberta"])
def test_copies_pickles_and_replicas(name: str) -> None:
    model, inputs = convert(built(name)), given(name)
    output = model(**inputs)[0]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        assert torch.equal(twin(**inputs)[0], output)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.div_(1.5)
        assert vars(revert(twin)).keys() == vars(revert(copy.deepcopy(model))).keys()
    for module in model.modules():
        if "forward" in vars(module):
            replica = module._replicate_for_data_parallel()
            assert replica.forward.args == (replica,)
            assert module.forward.args == (module,)


@pytest.mark.parametrize("name", ["wav2vec2-bert", "parakeet", "nemotron", "vits", "deberta-v2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_replays_dropout(name: str, reentrant: bool) -> None:
    if reentrant and name == "deberta-v2":
        pytest.skip("the original fails: its layers share the embeddings of positions")
    settings = {"attention_probs_dropout_prob": 0.3} if name.startswith("deberta") else {"attention_dropout": 0.3}
    found = []
    for checkpointing in (False, True):
        model, inputs = convert(built(name, **settings)).train(), given(name)
        if checkpointing and hasattr(model, "gradient_checkpointing_enable"):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        elif checkpointing:
            checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=reentrant)
            for layer in model.encoder.layers:
                layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, checkpoint
        torch.manual_seed(5)
        found.append(gradients(model, model(**inputs)[0], True))
    for key, right in found[0].items():
        close(found[1][key], right)


@pytest.mark.parametrize("name", ["wav2vec2-bert", "xlnet", "fastspeech2"])
def test_dropout_in_training_only(name: str) -> None:
    settings = {"xlnet": {"dropout": 0.5}, "fastspeech2": {"encoder_attention_dropout_rate": 0.5}}.get(name, {"attention_dropout": 0.5})
    model, inputs = convert(built(name, **settings)), given(name)
    assert torch.equal(model(**inputs)[0], model(**inputs)[0])
    model.train()
    assert not torch.equal(model(**inputs)[0], model(**inputs)[0])
    torch.manual_seed(3)
    output = model(**inputs)[0]
    torch.manual_seed(3)
    assert torch.equal(model(**inputs)[0], output)


@pytest.mark.parametrize("name", ["wav2vec2-bert", "seamless-v1", "parakeet", "speecht5", "vits", "deberta-v2", "xlnet"])
def test_compiles(name: str) -> None:
    model, inputs = convert(built(name, torch.float32)), given(name, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=name not in ("vits",))  # VitsEncoder calls numpy's generator
    with torch.no_grad():
        expected = model(**inputs)[0]
        close(compiled(**inputs)[0], expected, 1e-5)
    torch._dynamo.reset()


# ---- heads, messages ----


def test_heads_and_logs(caplog) -> None:
    settings = dict(num_mel_bins=16, subsampling_factor=4, subsampling_conv_channels=4, conv_kernel_size=5) | COMMON
    encoder = transformers.ParakeetEncoderConfig(**settings)
    heads = [transformers.ParakeetForCTC(transformers.ParakeetCTCConfig(encoder_config=encoder.to_dict(), vocab_size=11, pad_token_id=10))]
    tdt = transformers.ParakeetTDTConfig(
        encoder_config=encoder.to_dict(), vocab_size=11, decoder_hidden_size=8, num_decoder_layers=1, pad_token_id=2, blank_token_id=10
    )
    heads.append(transformers.ParakeetForTDT(tdt))
    with caplog.at_level(logging.INFO, "relattn.convert"):
        for model in heads:
            convert(model)
            assert sum("forward" in vars(module) for module in model.modules()) == 3  # with the encoder's
    assert caplog.messages == ["converted 2 ParakeetEncoderAttention"] * 2
    logits = heads[0].eval()(**given("parakeet", torch.float32)).logits
    expected = revert(heads[0])(**given("parakeet", torch.float32)).logits
    where = seen(logits, True)
    close(logits[where], expected[where], 1e-4)


def test_whole_seamless_model() -> None:
    """The text models beside the speech encoder are left alone, and share its configuration."""
    settings = dict(hidden_size=HIDDEN, speech_encoder_layers=1, speech_encoder_attention_heads=HEADS, speech_encoder_intermediate_size=32)
    settings |= dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16)
    settings |= dict(decoder_ffn_dim=16, vocab_size=29, feature_projection_input_dim=10, adaptor_kernel_size=2, adaptor_stride=2)
    model = transformers.SeamlessM4Tv2ForSpeechToText(transformers.SeamlessM4Tv2Config(**settings)).eval()
    inputs = given("seamless-v2", torch.float32) | {"decoder_input_ids": torch.randint(3, 29, (2, 5))}
    before = model.config.to_dict()
    expected = model(**inputs).logits
    close(convert(model)(**inputs).logits, expected, 1e-4)
    assert model.config.to_dict() == before
    assert sum("forward" in vars(module) for module in model.modules()) == 1


def test_nothing_to_convert(caplog) -> None:
    t5 = transformers.T5EncoderModel(transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=29))
    for model, message in (
        (t5, "T5Attention: its position_bias"),
        (built("wav2vec2-bert", kind="rotary"), "position_embeddings_type='rotary' has no relative term"),
        (built("deberta-v2", relative_attention=False), "relative_attention=False"),
        (built("deberta", talking_head=True), "talking_head=True"),
        (built("xlnet", bi_data=True), "bi_data=True"),
        (nn.Linear(2, 2), "no layer of a class that relattn knows"),
    ):
        with pytest.raises(ValueError, match=f"model: nothing to convert in this {type(model).__name__} .*{message}"):
            convert(model)
        with caplog.at_level(logging.INFO, "relattn.convert"):
            assert convert(model, strict=False) is model
        assert message in caplog.messages[-1]
        assert not any(implementation._is_bound(value) for module in model.modules() for value in vars(module).values())


def _other_forward(self, hidden_states, attention_mask=None, relative_position_embeddings=None, tables=None, **kwargs):
    raise NotImplementedError


class _Subclass(modeling_wav2vec2_bert.Wav2Vec2BertSelfAttention):
    def forward(self, hidden_states, attention_mask=None, relative_position_embeddings=None, **kwargs):
        raise NotImplementedError


def test_unknown_layouts_raise_and_change_nothing(monkeypatch) -> None:
    def refused(model: nn.Module, message: str) -> None:
        known = rf"model: transformers\.models\..* of transformers {transformers.__version__} .*"
        with pytest.raises(ValueError, match=rf"{known}{message}.*nothing was converted"):
            convert(model)
        assert not any(implementation._is_bound(value) for module in model.modules() for value in vars(module).values())

    model = built("wav2vec2-bert")
    with monkeypatch.context() as patch:
        patch.setattr(modeling_wav2vec2_bert.Wav2Vec2BertSelfAttention, "forward", _other_forward)
        refused(model, r"forward\(self hidden_states .*tables kwargs\)")
    last = model.encoder.layers[1].self_attn  # the first is fine
    with monkeypatch.context() as patch:
        patch.setattr(last, "scaling", None)
        refused(model, "its attribute scaling is NoneType")
    with monkeypatch.context() as patch:
        patch.setattr(last, "position_embeddings_type", "alibi")
        refused(model, "position_embeddings_type='alibi'")
    last.__class__ = _Subclass
    with pytest.raises(ValueError, match=r"test_convert\._Subclass .*a subclass of Wav2Vec2BertSelfAttention with a forward of its own"):
        convert(model)
    assert "forward" not in vars(model.encoder.layers[0].self_attn)
    # A helper that the replacement does without is as good as a forward.
    for name, owner, method in (
        ("fastspeech2", modeling_fastspeech2_conformer.FastSpeech2ConformerAttention, "shift_relative_position_tensor"),
        ("vits", modeling_vits.VitsAttention, "_get_relative_embeddings"),
        ("deberta-v2", modeling_deberta_v2.DebertaV2Encoder, "get_attention_mask"),
        ("seamless-v2", modeling_seamless_m4t_v2.SeamlessM4Tv2ConformerEncoder, "_apply_chunk_attention"),
    ):
        model = built(name)
        module = next(module for module in model.modules() if type(module) is owner)
        module.__class__ = type(f"Own{owner.__name__}", (owner,), {method: lambda self, *args: None})
        with pytest.raises(ValueError, match=rf"a subclass of {owner.__name__} with a {method} of its own"):
            convert(model)
        module.__class__ = type(f"Own{owner.__name__}", (owner,), {"more": lambda self: None})
        assert convert(model) is model
    model = built("deberta-v2")
    with monkeypatch.context() as patch:
        patch.setattr(modeling_deberta_v2.DebertaV2Encoder, "get_rel_pos", lambda self, hidden_states: None)
        refused(model, r"get_rel_pos\(self hidden_states\)")
    model.encoder.layer[0].attention.self = nn.Identity()
    refused(model, "its self is Identity, expected DisentangledSelfAttention")
    model.encoder.layer[0] = nn.Identity()
    with pytest.raises(ValueError, match=f"of transformers {transformers.__version__} .*its attention is NoneType, expected DebertaV2Att"):
        convert(model)
    model = built("wav2vec2-bert")
    model.encoder.layers[0].self_attn.forward = _other_forward
    with pytest.raises(ValueError, match="forward of a Wav2Vec2BertSelfAttention was replaced already"):
        convert(model)


def test_revert_sees_what_wrapped_a_layer_since() -> None:
    model = convert(built("wav2vec2-bert"))
    layer = model.encoder.layers[0].self_attn
    layer._old_forward, layer.forward = layer.forward, lambda *args, **kwargs: layer._old_forward(*args, **kwargs)
    with pytest.raises(RuntimeError, match="a converted Wav2Vec2BertSelfAttention was wrapped since"):
        revert(model)


def test_positions_of_another_length_are_refused() -> None:
    model = convert(built("parakeet"))
    with pytest.raises(ValueError, match="position_embeddings: expected 17 rows for 9 keys, got 19"):
        model.layers[0].self_attn(torch.randn(1, 9, HIDDEN).double(), torch.randn(1, 19, HIDDEN).double())


# ---- the recipe of the README, for toolkits ----


class RelPositionMultiHeadedAttention(nn.Module):
    """As ESPnet's and NeMo's, written from Transformer-XL's formula (Dai et al. 2019, section 3.3):

    s_ij = ((q_i + u) . k_j + (q_i + v) . W R_(i-j)) / sqrt(d), with the rows of pos_emb from distance i - j = L - 1 down to -(L - 1).
    """

    def __init__(self, heads: int, size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.h, self.d_k = heads, size // heads
        self.linear_q, self.linear_k, self.linear_v, self.linear_out = (nn.Linear(size, size) for _ in range(4))
        self.linear_pos = nn.Linear(size, size, bias=False)
        self.pos_bias_u, self.pos_bias_v = (nn.Parameter(torch.randn(heads, self.d_k)) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward_qkv(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        pairs = ((self.linear_q, query), (self.linear_k, key), (self.linear_v, value))
        return tuple(linear(x).view(x.shape[0], -1, self.h, self.d_k).transpose(1, 2) for linear, x in pairs)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, pos_emb: Tensor, mask: Tensor | None) -> Tensor:
        """mask: (B, 1, L) or (B, L, L), zero where hidden."""
        q, k, v = self.forward_qkv(query, key, value)
        p = self.linear_pos(pos_emb).view(1, -1, self.h, self.d_k).transpose(1, 2)[0]
        length = query.shape[1]
        i, j = torch.arange(length)[:, None], torch.arange(length)
        content = torch.einsum("bhid,bhjd->bhij", q + self.pos_bias_u[:, None], k)
        position = torch.einsum("bhid,hijd->bhij", q + self.pos_bias_v[:, None], p[:, length - 1 - (i - j)])
        scores = (content + position) / self.d_k**0.5
        if mask is not None:
            hidden = mask[:, None] == 0
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        if mask is not None:
            weights = weights.masked_fill(hidden, 0.0)
        return self.linear_out((self.dropout(weights) @ v).transpose(1, 2).flatten(2))


def swapped_forward() -> Callable:
    """As the README has it."""
    blocks = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if "def swapped_forward" in block]
    names: dict[str, Any] = {"relative_attention": relative_attention}
    exec(block, names)
    return names["swapped_forward"]


@pytest.mark.parametrize("masked", ["none", "padding", "chunks"])
def test_recipe_for_toolkits(masked: str, monkeypatch) -> None:
    torch.manual_seed(0)
    layer = RelPositionMultiHeadedAttention(HEADS, HIDDEN).double()
    x, pos_emb = torch.randn(2, LENGTH, HIDDEN).double(), torch.randn(1, 2 * LENGTH - 1, HIDDEN).double()
    masks = {"none": None, "padding": mask_of(LENGTH)[:, None]}
    masks["chunks"] = (torch.arange(LENGTH)[:, None] // 4 >= torch.arange(LENGTH) // 4).expand(2, -1, -1)
    factor = torch.randn(2, LENGTH, HIDDEN).double()
    found = []
    for forward in (RelPositionMultiHeadedAttention.forward, swapped_forward()):
        monkeypatch.setattr(RelPositionMultiHeadedAttention, "forward", forward)
        output = layer(x, x, x, pos_emb, masks[masked])
        layer.zero_grad()
        (output * factor).sum().backward()
        found.append([output, *(parameter.grad for parameter in layer.parameters())])
    for ours, theirs in zip(found[1], found[0], strict=True):
        close(ours, theirs)


# ---- python -m benchmarks.huggingface ----


def test_benchmark_goes_on_where_it_was(tmp_path, capsys, monkeypatch) -> None:
    """From the command line to the part of a README, on a model of a small configuration, in this process."""
    from benchmarks import huggingface as benchmark

    def attempt(function, arguments, timeout, threads):
        return function(**arguments | ({"memory_limit": None} if "memory_limit" in arguments else {}))

    def inputs(seconds: float) -> dict[str, Tensor]:
        return {"input_features": torch.randn(1, round(50 * seconds), 10)}

    small = benchmark.Model("small", lambda layers: wav2vec2_bert(), inputs, "Wav2Vec2BertSelfAttention", core=True)
    monkeypatch.setattr(benchmark, "attempt", attempt)
    monkeypatch.setitem(benchmark.MODELS, "w2v-bert", small)
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- conversion -->\nold\n<!-- /conversion -->\nb\n")
    command = ["--device", "cpu", "--models", "w2v-bert", "--audio", "2", "--pass", "forward,train", "--seconds", "0.01"]
    command += ["--readme", str(readme)]
    assert benchmark.main([*command, "--out", str(tmp_path)]) == 0
    results = read_json(tmp_path / "results.json")
    assert [(row["part"], row["pass"], row["frames"]) for row in results["rows"]] == [
        (part, passed, 100) for part in benchmark.PARTS for passed in benchmark.PASSES
    ]
    for row in results["rows"]:
        assert row["before"]["status"] == row["after"]["status"] == "ok"
        assert 0 < row["error"] < 1e-3
        assert row["faster"] == pytest.approx(row["before"]["median_ms"] / row["after"]["median_ms"])
    assert readme.read_text().startswith("a\n<!-- conversion -->\n")
    assert "| small | 2 s | 100 |" in readme.read_text()
    assert "| - without projections | 2 s | 100 |" in readme.read_text()
    assert " of 3 goals met" in capsys.readouterr().out  # not slower: core, attention, encoder

    monkeypatch.setattr(benchmark, "_row", lambda *_: pytest.fail("measured again"))
    assert benchmark.main([*command, "--out", str(tmp_path)]) == 0
    assert benchmark.main([*command, "--out", str(tmp_path), "--layers", "1"]) == 2
    assert "holds rows of other settings" in capsys.readouterr().err

    (tmp_path / "report.md").unlink()
    assert benchmark.main(["--render", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "report.md").read_text() in readme.read_text()


def test_benchmark_of_what_ended_badly(tmp_path, monkeypatch) -> None:
    from benchmarks import huggingface as benchmark

    fine = {"status": "ok", "peak_bytes": 30 * 2**20, "returned_bytes": 10 * 2**20, "first_ms": 1.0}
    times = {"median_ms": 70.0, "quartiles_ms": [1, 2], "rounds": 3}

    def attempt(function, arguments, timeout, threads):
        if function is benchmark.memory:
            gone = arguments["side"] == "before" and arguments["subject"]["seconds"] == 60
            return {"status": "out of memory", "detail": ""} if gone else dict(fine)
        sides = {side: times if side == "before" else times | {"median_ms": 10.0} for side in arguments["sides"]}
        return {"frames": 1500, "error": {"core": math.nan, "encoder": 0.5}.get(arguments["subject"]["part"], 1e-6)} | sides

    monkeypatch.setattr(benchmark, "attempt", attempt)
    command = ["--device", "cpu", "--models", "w2v-bert", "--audio", "30,60,90", "--out", str(tmp_path)]
    assert benchmark.main(command) == 0
    rows = read_json(tmp_path / "results.json")["rows"]
    assert [row["before"]["status"] for row in rows] == ["ok"] * 3 + ["out of memory"] * 6
    assert rows[-1]["before"]["detail"].startswith("not tried")
    text = (tmp_path / "report.md").read_text()
    assert rows[0]["after"]["status"] == "wrong"  # NaN
    assert "out of memory → 10.0" in text
    assert "WRONG: w2v-BERT 2.0, 30 s, encoder" in text
    assert "goal >= 20" in text  # of memory: missed; of speed: met
    assert "goal >= 6" not in text


def test_readme_shows_the_committed_measurements() -> None:
    from benchmarks import huggingface as benchmark

    clone = Path(benchmark.__file__).parents[1]
    part = (clone / "README.md").read_text().split("<!-- conversion -->\n")[1].split("<!-- /conversion -->")[0]
    folder = clone / "benchmarks" / "results" / "huggingface"
    assert part == (folder / "report.md").read_text() == benchmark.report(read_json(folder / "results.json"))
