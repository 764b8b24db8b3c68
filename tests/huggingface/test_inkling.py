"""Inkling: full and sliding layers, grouped queries, caches, long contexts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import relattn
from relattn.huggingface import convert, revert
from tests.huggingface.models import LENGTH, close, gradients
from tests.huggingface.test_families import Largest

transformers = pytest.importorskip("transformers.models.inkling.modeling_inkling")
PADDED = 4


def built(dtype: torch.dtype = torch.float64, **more: Any) -> nn.Module:
    from transformers.models.inkling.configuration_inkling import InklingTextConfig

    torch.manual_seed(0)
    sizes = dict(vocab_size=29, hidden_size=24, num_hidden_layers=2, intermediate_size=16, moe_intermediate_size=8, n_routed_experts=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, swa_num_attention_heads=2, swa_num_key_value_heads=1)
    sizes |= dict(swa_head_dim=8, d_rel=3, rel_extent=6, sliding_window_size=5, local_layer_ids=[0], num_experts_per_tok=1)
    sizes |= dict(mlp_layer_types=["dense", "dense"], log_scaling_n_floor=10, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = transformers.InklingForCausalLM(InklingTextConfig(**(sizes | more))).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def given(padded: bool = False, left: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if padded:
        mask[1, slice(PADDED) if left else slice(-PADDED, None)] = 0
    return dict(input_ids=torch.randint(3, 29, (2, LENGTH)), attention_mask=mask)


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_equals_the_original(padded: bool, implementation: str) -> None:
    """In gradients too, twice the same bits, and after revert."""
    model, inputs = built().train(), given(padded)
    model.set_attn_implementation(implementation)
    seen = inputs["attention_mask"].bool()
    expected = model(**inputs).logits
    right = gradients(model, expected * seen[..., None], False)
    convert(model)
    output = model(**inputs).logits
    close(output[seen], expected[seen], 1e-6)
    first, second = (gradients(model, model(**inputs).logits * seen[..., None], False) for _ in range(2))
    for name, gradient in first.items():
        close(gradient, right[name], 1e-5)
        assert torch.equal(gradient, second[name])
    assert torch.equal(revert(model)(**inputs).logits, expected)


@pytest.mark.parametrize("kind", [{}, dict(num_beams=3)], ids=str)
def test_generates_the_same(kind: dict) -> None:
    """(With a StaticCache the original fails under "sdpa".)"""
    model, inputs = built(torch.float32), given(True, left=True)  # in float64 the original's hidden rows are NaN: its softmax is in float32
    options: dict[str, Any] = dict(max_new_tokens=15, min_new_tokens=15, do_sample=False) | kind
    expected = model.generate(**inputs, **options)
    assert torch.equal(convert(model).generate(**inputs, **options), expected)


def test_holds_no_tensor_of_length_by_length() -> None:
    """But the mask of sliding layers, which the model makes for all heads."""
    model, tokens = built(torch.float32, local_layer_ids=[]), torch.randint(3, 29, (2, 100))
    with torch.no_grad(), Largest(100) as before:
        model(tokens)
    with torch.no_grad(), Largest(100) as after:
        convert(model)(tokens)
    many = {shape for _, shape in after.found if len(shape) == 4 and shape[1] > 1}
    assert {shape for _, shape in before.found if len(shape) == 4 and shape[1] > 1}
    assert not many


def test_other_attention_is_refused() -> None:
    model = convert(built())
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation: a converted InklingAttention takes 'sdpa' or 'eager', got 'flex_attention'"):
        model.model.layers[0].self_attn(torch.randn(1, 4, 24, dtype=torch.float64), None)


def test_exported_for_any_size() -> None:
    """Of a program positions were taken for packed sequences, whose mask was for one number of tokens: "Guard failed: ... == 46"."""

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = convert(built(torch.float32)).requires_grad_(False)

        def forward(self, a: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=a, use_cache=False).logits

    model, tokens = Logits(), torch.randint(3, 29, (3, 29))
    sizes = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    program = torch.export.export(model, (torch.randint(3, 29, (2, LENGTH)),), dynamic_shapes=(sizes,))
    program = program.run_decompositions(relattn.export.decompositions())
    close(program.module()(tokens), model(tokens), 1e-5)
