"""T5 and its like with their decoders: cross attention, caches, weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers

from relattn.huggingface import convert, revert
from tests.huggingface.models import LENGTH, PADDED, close, gradients, mask_of, t5
from tests.huggingface.test_families import Largest

NAMES = ("T5", "MT5", "UMT5", "LongT5", "Pop2Piano", "SwitchTransformers", "Udop")
UDOP = dict(relative_attention_num_buckets=32, relative_attention_max_distance=20)  # its encoder has 32 buckets, whatever is asked for
EXPERTS = dict(num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, router_jitter_noise=0.0, add_router_probs=False)
OUTPUTS = 17


def model_of(name: str, dtype: torch.dtype = torch.float64, **more) -> nn.Module:
    torch.manual_seed(0)
    model = t5(name, "ForConditionalGeneration", **({"SwitchTransformers": EXPERTS, "Udop": UDOP}.get(name, {}) | more)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def calls(name: str = "") -> dict[str, dict[str, Any]]:
    torch.manual_seed(1)
    boxes = dict(bbox=torch.rand(2, LENGTH, 4, dtype=torch.float64)) if name == "Udop" else {}
    inputs = boxes | dict(input_ids=torch.randint(3, 29, (2, LENGTH)), decoder_input_ids=torch.randint(3, 29, (2, OUTPUTS)))
    padding = dict(attention_mask=mask_of(LENGTH))
    left = torch.ones(2, OUTPUTS, dtype=torch.long)
    left[1, :4] = 0
    return {"whole": inputs, "padded": inputs | padding, "padded answers": inputs | padding | dict(decoder_attention_mask=left)}


@pytest.mark.parametrize("call", calls())
@pytest.mark.parametrize("name", NAMES)
def test_decoders_equal_the_original(name: str, call: str) -> None:
    model, inputs = model_of(name), calls(name)[call]
    seen = inputs.get("decoder_attention_mask", torch.ones(2, OUTPUTS)).bool()
    for implementation in ("eager", "sdpa") if getattr(model, "_supports_sdpa", False) else ("eager",):
        model.set_attn_implementation(implementation)
        expected = model(**inputs).logits
        close(convert(model)(**inputs).logits[seen], expected[seen])
        assert torch.equal(revert(model)(**inputs).logits, expected)


@pytest.mark.parametrize("name", ["T5", "UMT5", "LongT5"])
def test_gradients(name: str) -> None:
    """Of the buckets too, twice the same bits."""
    model, inputs = model_of(name).train(), calls()["padded"]
    expected = gradients(model, model(**inputs).logits, False)
    convert(model)
    first, second = (gradients(model, model(**inputs).logits, False) for _ in range(2))
    assert first.keys() == second.keys() == expected.keys()
    for parameter, gradient in first.items():
        close(gradient, expected[parameter])
        assert torch.equal(gradient, second[parameter])


@pytest.mark.parametrize("kind", [{}, dict(num_beams=3), dict(cache_implementation="static")], ids=str)
@pytest.mark.parametrize("name", ["T5", "MT5", "UMT5", "Udop"])
def test_generates_the_same(name: str, kind: dict) -> None:
    """Beyond the farthest bucket (10)."""
    model, inputs = model_of(name), calls(name)["padded"]
    del inputs["decoder_input_ids"]
    options = dict(max_new_tokens=25, min_new_tokens=25, do_sample=False) | kind
    expected = model.generate(**inputs, **options)
    assert torch.equal(convert(model).generate(**inputs, **options), expected)


@pytest.mark.parametrize("name", ["T5", "UMT5"])
def test_weights_of_decoders(name: str) -> None:
    model, inputs = model_of(name), calls()["padded"]
    model.set_attn_implementation("eager")
    expected = model(**inputs, output_attentions=True)
    found = convert(model)(**inputs, output_attentions=True)
    real = torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - PADDED]])
    for one, other in zip(found.encoder_attentions, expected.encoder_attentions, strict=True):
        close(one.transpose(1, 2)[real], other.transpose(1, 2)[real])
    for kind in ("decoder_attentions", "cross_attentions"):
        for one, other in zip(getattr(found, kind), getattr(expected, kind), strict=True):
            close(one, other)


def test_a_bias_that_is_given_is_used() -> None:
    """As where a layer is called by itself, with what its model would hand over."""
    encoder = model_of("T5").encoder
    attention = encoder.block[1].layer[0].SelfAttention
    states, bias = torch.randn(2, 9, 24, dtype=torch.float64), torch.randn(1, 3, 9, 9, dtype=torch.float64)
    expected = attention(states, position_bias=bias)[0]
    convert(encoder)
    close(attention(states, position_bias=bias)[0], expected)


@pytest.mark.parametrize("name", ["T5", "MT5"])
def test_decoders_hold_no_tensor_of_length_by_length(name: str) -> None:
    """Nor does cross attention, whose bias is none."""
    model = model_of(name, torch.float32)
    tokens = torch.randint(3, 29, (2, 100))
    inputs = dict(input_ids=tokens, decoder_input_ids=tokens, attention_mask=mask_of(100))
    with torch.no_grad(), Largest(100) as after:
        convert(model)(**inputs)
    assert not after.found


def pix2struct() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=29, hidden_size=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, dropout_rate=0.0)
    text = sizes | dict(relative_attention_num_buckets=8, relative_attention_max_distance=10, decoder_start_token_id=0)
    vision = dict(hidden_size=24, d_ff=32, d_kv=8, num_hidden_layers=1, num_attention_heads=3, patch_embed_hidden_size=4, seq_len=16)
    config = transformers.Pix2StructConfig(text_config=text, vision_config=vision)
    model = transformers.Pix2StructForConditionalGeneration(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def test_pix2struct() -> None:
    """Its decoder; padding in picture and answer, and with caches."""
    model = pix2struct()
    patches = torch.cat((torch.arange(1, 10).repeat(2, 1)[..., None].expand(-1, -1, 2), torch.randn(2, 9, 4)), -1).double()
    inputs = dict(flattened_patches=patches, attention_mask=mask_of(9, 4).double())
    answers = calls()["padded answers"]
    answer = dict(decoder_input_ids=answers["decoder_input_ids"], decoder_attention_mask=answers["decoder_attention_mask"])
    options: dict[str, Any] = dict(max_new_tokens=25, min_new_tokens=25, do_sample=False)
    expected, tokens = model(**inputs, **answer).logits, model.generate(**inputs, **options)
    convert(model)
    seen = answer["decoder_attention_mask"].bool()
    close(model(**inputs, **answer).logits[seen], expected[seen])
    assert torch.equal(model.generate(**inputs, **options), tokens)
    with Largest(100) as after, torch.no_grad():
        model(**inputs, decoder_input_ids=torch.randint(3, 29, (2, 100)))
    assert not after.found
