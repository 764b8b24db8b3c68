"""WavLM: a bias by distance, in buckets, times a gate that each query has: one more column of the query and of the table.

With it the score is (q, gate / scale).(k, 0) + (q, gate / scale).(0, bias): the gated bias is a product of query and table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from relattn.huggingface.attend import attend, projected
from relattn.huggingface.conversion import Plan, Replacement, original, replacement
from relattn.huggingface.families.t5 import bias_by_distance


def _gate(module: Any, hidden_states: Tensor) -> Tensor:
    """(B, H, L, 1), as the original's forward has it."""
    by_head = hidden_states.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
    projection = module.gru_rel_pos_linear(by_head).unflatten(-1, (2, 4)).sum(-1)
    first, second = projection.sigmoid().chunk(2, dim=-1)
    return first * (second * module.gru_rel_pos_const - 1.0) + 2.0


def _attention(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    index: int = 0,
    **kwargs: Any,
) -> tuple:
    """What goes from layer to layer as position_bias is (H, R)."""
    if kwargs.get("output_attentions") or (position_bias is not None and position_bias.dim() != 2):
        return original(module)(hidden_states, attention_mask, position_bias, index, **kwargs)
    if position_bias is None:
        distances = torch.arange(-module.max_distance, module.max_distance + 1, device=hidden_states.device)
        position_bias = bias_by_distance(module._relative_positions_bucket(distances), module.rel_attn_embed)
    query, key, value = projected(hidden_states, module.head_dim, module.q_proj, module.k_proj, module.v_proj)
    query = torch.cat((query, _gate(module, hidden_states) / module.scaling), dim=-1)
    key = nn.functional.pad(key, (0, 1))
    table = nn.functional.pad(position_bias[..., None].to(query.dtype), (module.head_dim, 0))
    mask = None if attention_mask is None else attention_mask.eq(1)
    output, _ = attend(
        module, query, key, value, mask, module.dropout,
        rel_k=table, max_relative_position=module.max_distance, scale=module.scaling,
    )  # fmt: skip
    return module.out_proj(output), None, position_bias


def _encoder(module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """The layers have no configuration, and hear here whether it asks for weights."""
    kwargs.setdefault("output_attentions", bool(getattr(module.config, "output_attentions", False)))
    return original(module)(hidden_states, attention_mask, **kwargs)


def _plan(module: Any) -> list[Replacement]:
    projections = ("q_proj", "k_proj", "v_proj", "out_proj", "gru_rel_pos_linear")
    attributes: dict[str, Any] = dict.fromkeys(projections, nn.Module) | dict(
        gru_rel_pos_const=Tensor, num_heads=int, head_dim=int, scaling=float, dropout=(int, float), max_distance=int, num_buckets=int
    )
    return [replacement(module, "forward", _attention, "hidden_states attention_mask position_bias index kwargs", **attributes)]


def _encoder_plan(module: Any) -> list[Replacement]:
    return [replacement(module, "forward", _encoder, "hidden_states attention_mask kwargs", False, config=object)]


PLANS: dict[str, Plan] = {"WavLMAttention": _plan, "WavLMEncoder": _encoder_plan, "WavLMEncoderStableLayerNorm": _encoder_plan}
