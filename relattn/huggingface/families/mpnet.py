"""MPNet: T5's bias by distance, which the encoder makes once for all layers. Its attention is only eager."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from relattn.huggingface.attend import attend, expanded_mask, projected
from relattn.huggingface.conversion import Plan, Replacement, original, part, replacement
from relattn.huggingface.families.t5 import bias_by_distance

_MOST = 128  # distances from there on share a bucket, whatever the configuration


def _compute_position_bias(module: Any, x: Tensor, position_ids: Tensor | None = None, num_buckets: int = 32) -> Tensor:
    """(H, R) instead of (B, H, L, L)."""
    if position_ids is not None:
        return original(module, "compute_position_bias")(x, position_ids, num_buckets)
    distances = torch.arange(-_MOST, _MOST + 1, device=x.device)
    return bias_by_distance(module.relative_position_bucket(distances, num_buckets=num_buckets), module.relative_attention_bias)


def _attention(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple:
    if position_bias is None or position_bias.dim() != 2:
        return original(module)(hidden_states, attention_mask, position_bias, output_attentions, **kwargs)
    query, key, value = projected(hidden_states, module.attention_head_size, module.q, module.k, module.v)
    output, weights = attend(
        module, query, key, value, attention_mask, module.dropout.p, output_attentions, rel_bias=position_bias, max_relative_position=_MOST
    )
    return (module.o(output), weights) if output_attentions else (module.o(output),)


def _model(module: Any, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, *rest: Any, **kwargs: Any) -> Any:
    """A mask of padding with one row in memory for all queries; the model's mask function takes 4-D ones as they are."""
    return original(module)(input_ids, expanded_mask(module, attention_mask, module.dtype), *rest, **kwargs)


def _plan(module: Any) -> list[Replacement]:
    parameters = "hidden_states attention_mask position_bias output_attentions kwargs"
    attributes: dict[str, Any] = dict.fromkeys(("q", "k", "v", "o"), nn.Module) | dict(attention_head_size=int, dropout=nn.Dropout)
    attentions = [part(part(layer, "attention", "MPNetAttention"), "attn", "MPNetSelfAttention") for layer in part(module, "layer")]
    return [
        replacement(module, "compute_position_bias", _compute_position_bias, "x position_ids num_buckets", False),
        *(replacement(attention, "forward", _attention, parameters, **attributes) for attention in attentions),
    ]


def _model_plan(module: Any) -> list[Replacement]:
    parameters = "input_ids attention_mask position_ids inputs_embeds output_attentions output_hidden_states return_dict kwargs"
    return [replacement(module, "forward", _model, parameters, False, config=object)]


PLANS: dict[str, Plan] = {"MPNetEncoder": _plan, "MPNetModel": _model_plan}
