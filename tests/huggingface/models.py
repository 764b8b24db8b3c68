"""Small models with two layers of relative attention, as `convert` meets them, and their inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers
from transformers.models.fastspeech2_conformer import modeling_fastspeech2_conformer
from transformers.models.granite_speech import modeling_granite_speech
from transformers.models.granite_speech5 import modeling_granite_speech5
from transformers.models.seamless_m4t import modeling_seamless_m4t
from transformers.models.seamless_m4t_v2 import modeling_seamless_m4t_v2
from transformers.models.speecht5 import modeling_speecht5
from transformers.models.vits import modeling_vits

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
    settings |= dict(
        left_max_position_embeddings=6,
        right_max_position_embeddings=2,
        conv_depthwise_kernel_size=5,
        max_source_positions=30,
    )
    return transformers.Wav2Vec2BertModel(
        transformers.Wav2Vec2BertConfig(**(settings | dict(apply_spec_augment=False) | more))
    )


def wav2vec2_conformer(**more) -> nn.Module:
    settings = (
        COMMON
        | without(*NO_DROPOUT, "feat_quantizer")
        | dict(position_embeddings_type="relative", apply_spec_augment=False)
    )
    settings |= dict(
        conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(8, 4), feat_extract_norm="layer", max_source_positions=30
    )
    settings |= dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, conv_depthwise_kernel_size=5)
    return transformers.Wav2Vec2ConformerModel(transformers.Wav2Vec2ConformerConfig(**(settings | more)))


def seamless(module: Any, version: str, kind: str, **more) -> nn.Module:
    settings: dict[str, Any] = dict(hidden_size=HIDDEN, speech_encoder_layers=2, speech_encoder_attention_heads=HEADS)
    settings |= dict(
        speech_encoder_intermediate_size=32,
        feature_projection_input_dim=10,
        add_adapter=False,
        position_embeddings_type=kind,
    )
    settings |= dict(
        speech_encoder_dropout=0.0, speech_encoder_layerdrop=0.0, conv_depthwise_kernel_size=5, max_source_positions=30
    )
    settings |= dict(left_max_position_embeddings=6, right_max_position_embeddings=2) if version else {}
    config = getattr(transformers, f"SeamlessM4T{version}Config")(**(settings | more))
    return getattr(module, f"SeamlessM4T{version}SpeechEncoder")(config)


def fast_conformer(name: str, **more) -> nn.Module:
    settings = (
        COMMON
        | without("activation", "attention")
        | dict(num_mel_bins=16, subsampling_factor=4, subsampling_conv_channels=4)
    )
    settings |= dict(conv_kernel_size=5, dropout=0.0, dropout_positions=0.0) | more
    return getattr(transformers, f"{name}Encoder")(getattr(transformers, f"{name}EncoderConfig")(**settings))


def frames(length: int) -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 4 * length, 16), "attention_mask": mask_of(4 * length, 4 * PADDED)}


def fastspeech2(**more) -> nn.Module:
    settings: dict[str, Any] = dict(
        hidden_size=HIDDEN, encoder_num_attention_heads=HEADS, encoder_linear_units=32, encoder_layers=2
    )
    settings |= {f"encoder_{name}_rate": 0.0 for name in ("dropout", "positional_dropout", "attention_dropout")} | more
    config = transformers.FastSpeech2ConformerConfig(**settings)
    model = modeling_fastspeech2_conformer.FastSpeech2ConformerEncoder(config, config.encoder_config)
    for layer in model.conformer_layers:  # left uninitialised there
        nn.init.zeros_(layer.self_attn.pos_bias_u), nn.init.zeros_(layer.self_attn.pos_bias_v)
    return model


def fastspeech2_inputs(length: int) -> dict[str, Any]:
    return {
        "input_tensor": torch.randn(2, length, HIDDEN),
        "attention_mask": mask_of(length)[:, None],
        "return_dict": True,
    }


def speecht5(**more) -> nn.Module:
    settings = dict(
        hidden_size=HIDDEN, encoder_layers=2, encoder_attention_heads=HEADS, encoder_ffn_dim=32, vocab_size=29
    )
    settings |= without("positional", "hidden", "attention", "activation") | dict(
        encoder_layerdrop=0.0, encoder_max_relative_position=4
    )
    return modeling_speecht5.SpeechT5EncoderWithTextPrenet(transformers.SpeechT5Config(**(settings | more)))


def speecht5_inputs(length: int) -> dict[str, Tensor]:
    return {"input_values": torch.randint(3, 29, (2, length)), "attention_mask": mask_of(length)}


def xlnet(**more) -> nn.Module:
    settings = dict(vocab_size=29, d_model=HIDDEN, n_layer=2, n_head=HEADS, d_inner=32, dropout=0.0, mem_len=7)
    return transformers.XLNetModel(transformers.XLNetConfig(**(settings | more)))


def vits(**more) -> nn.Module:
    settings = (
        COMMON
        | without("hidden", "attention", "activation")
        | dict(ffn_dim=32, window_size=4, vocab_size=29, flow_size=4)
    )
    settings["attn_implementation"] = "eager"  # as VitsModel sets it
    settings.pop("intermediate_size")
    return modeling_vits.VitsTextEncoder(transformers.VitsConfig(**(settings | more)))


def vits_inputs(length: int) -> dict[str, Tensor]:
    inputs = tokens(length)
    return inputs | {"padding_mask": inputs["attention_mask"][..., None].to(torch.get_default_dtype())}


def deberta(name: str, **more) -> nn.Module:
    settings = COMMON | dict(
        vocab_size=29, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, relative_attention=True
    )
    settings |= dict(pos_att_type=["c2p", "p2c"], position_biased_input=False, max_relative_positions=8) | more
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings))


T5: dict[str, Any] = dict(vocab_size=29, d_model=HIDDEN, d_kv=8, d_ff=32, num_layers=2, num_heads=HEADS, dropout_rate=0.0)
T5 |= dict(relative_attention_num_buckets=8, relative_attention_max_distance=10, decoder_start_token_id=0)


def t5(name: str, kind: str = "EncoderModel", **more) -> nn.Module:
    return getattr(transformers, f"{name}{kind}")(getattr(transformers, f"{name}Config")(**(T5 | more)))


def mpnet(**more) -> nn.Module:
    settings = COMMON | dict(vocab_size=29, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0) | more
    return transformers.MPNetModel(transformers.MPNetConfig(**settings))


def wavlm(**more) -> nn.Module:
    settings = COMMON | without(*NO_DROPOUT, "feat_quantizer") | dict(conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(8, 4))
    settings |= dict(feat_extract_norm="layer", num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, apply_spec_augment=False)
    return transformers.WavLMModel(transformers.WavLMConfig(**(settings | dict(num_buckets=8, max_bucket_distance=10) | more)))


def sew_d(**more) -> nn.Module:
    settings = COMMON | without(*NO_DROPOUT) | dict(conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(8, 4), feat_extract_norm="layer")
    settings |= dict(squeeze_factor=1, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, apply_spec_augment=False)
    settings |= dict(max_position_embeddings=16, position_buckets=4, share_att_key=True) | more
    return transformers.SEWDModel(transformers.SEWDConfig(**settings))


def granite(**more) -> nn.Module:
    settings = dict(input_dim=10, num_layers=2, hidden_dim=HIDDEN, output_dim=12, num_heads=HEADS, dim_head=8, feedforward_mult=2)
    settings |= dict(context_size=9, max_pos_emb=12, dropout=0.0, conv_kernel_size=5) | more
    return modeling_granite_speech.GraniteSpeechCTCEncoder(transformers.GraniteSpeechEncoderConfig(**settings))


def granite5(**more) -> nn.Module:
    settings = COMMON | dict(num_mel_bins=2, head_dim=8, context_size=6, max_position_embeddings=9, conv_kernel_size=5, vocab_size=12)
    settings |= dict(subsample_layers=[], num_key_value_heads=HEADS, attention_dropout=0.0, activation_dropout=0.0) | more
    return modeling_granite_speech5.GraniteSpeech5Encoder(modeling_granite_speech5.GraniteSpeech5EncoderConfig(**settings))


def funnel(**more) -> nn.Module:
    settings: dict[str, Any] = dict(vocab_size=29, d_model=HIDDEN, n_head=HEADS, d_head=8, d_inner=32, num_decoder_layers=1)
    settings |= dict(block_sizes=[1, 2], hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0) | more
    return transformers.FunnelModel(transformers.FunnelConfig(**settings))


def waves(length: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 8 * length + 8), "attention_mask": mask_of(8 * length + 8, 8 * PADDED)}


part = functools.partial
CASES = {
    "wav2vec2-bert": Case(wav2vec2_bert, features(10)),
    "wav2vec2-bert-relative": Case(part(wav2vec2_bert, "relative"), features(10)),
    "wav2vec2-conformer": Case(wav2vec2_conformer, waves),
    "seamless-v1": Case(part(seamless, modeling_seamless_m4t, "", "relative"), features(10)),
    "seamless-v2": Case(part(seamless, modeling_seamless_m4t_v2, "v2", "relative_key"), features(10)),
    "seamless-v2-chunks": Case(
        part(
            seamless,
            modeling_seamless_m4t_v2,
            "v2",
            "relative_key",
            speech_encoder_chunk_size=8,
            speech_encoder_left_chunk_num=1,
        ),
        features(10),
    ),
    "parakeet": Case(part(fast_conformer, "Parakeet"), frames),
    "nemotron": Case(
        part(fast_conformer, "NemotronAsrStreaming", sliding_window=5, default_num_lookahead_tokens=1), frames
    ),
    "nemotron-causal": Case(
        part(fast_conformer, "NemotronAsrStreaming", sliding_window=5, default_num_lookahead_tokens=0), frames
    ),
    "fastspeech2": Case(fastspeech2, fastspeech2_inputs, True),
    "speecht5": Case(speecht5, speecht5_inputs, True),
    "xlnet": Case(xlnet, tokens, True),
    "xlnet-uni": Case(part(xlnet, attn_type="uni"), tokens, True, False),
    "vits": Case(vits, vits_inputs, True),
    "deberta": Case(part(deberta, "Deberta"), tokens, True, True, 1e-6),
    "deberta-long": Case(
        part(deberta, "Deberta", max_relative_positions=-1, pos_att_type=["p2c"]), tokens, True, True, 1e-6
    ),
    "deberta-v2": Case(
        part(deberta, "DebertaV2", position_buckets=4, norm_rel_ebd="layer_norm", conv_kernel_size=3),
        tokens,
        True,
        True,
        1e-6,
    ),
    "deberta-v2-shared": Case(
        part(deberta, "DebertaV2", position_buckets=8, max_relative_positions=30, share_att_key=True),
        tokens,
        True,
        True,
        1e-6,
    ),
    "deberta-v2-c2p": Case(part(deberta, "DebertaV2", pos_att_type=["c2p"]), tokens, True, True, 1e-6),
    "t5": Case(part(t5, "T5"), tokens),
    "umt5": Case(part(t5, "UMT5"), tokens),
    "mpnet": Case(mpnet, tokens, True),
    "wavlm": Case(wavlm, waves, True),
    "funnel": Case(funnel, tokens, True, True, 1e-6),
    "sew-d": Case(sew_d, waves, True, True, 1e-6),
    "granite": Case(granite, lambda length: {"hidden_states": torch.randn(2, length, 10), "attention_mask": mask_of(length)}, pads=False),
    "granite5": Case(granite5, features(8)),
    "wavlm-stable": Case(part(wavlm, do_stable_layer_norm=True), waves, True),
}
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
