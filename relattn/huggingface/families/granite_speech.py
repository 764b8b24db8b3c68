"""Granite Speech: Shaw's form within blocks of frames that do not see each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from relattn.huggingface.attend import attend, projected, split_heads
from relattn.huggingface.conversion import Plan, Replacement, replacement


def _within_blocks(module: Any, distances: Tensor) -> dict[str, Any]:
    """Arguments of relative_attention from the rows of the table (block, block) by query and key."""
    rows = torch.cat((distances[1:, 0].flip(0), distances[0]))  # by key minus query, from the farthest to the left on
    size = module.context_size
    return dict(rel_k=module.rel_pos_emb(rows), max_relative_position=size - 1, chunk=(size, 0))


def _granite_speech(module: Any, hidden_states: Tensor, attention_dists: Tensor) -> Tensor:
    """Its dropout is that of the projection's output; the weights have none."""
    hidden_states = module.pre_norm(hidden_states)
    query = module.to_q(hidden_states)
    key, value = module.to_kv(hidden_states).chunk(2, dim=-1)
    query, key, value = (split_heads(states, module.dim_head) for states in (query, key, value))
    output, _ = attend(module, query, key, value, None, 0.0, scale=module.scale, **_within_blocks(module, attention_dists))
    return module.dropout(module.to_out(output))


def _granite_speech5(
    module: Any, hidden_states: Tensor, position_embeddings: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple:
    query, key, value = projected(hidden_states, module.head_dim, module.q_proj, module.k_proj, module.v_proj)
    by_distance = _within_blocks(module, position_embeddings)
    output, _ = attend(module, query, key, value, attention_mask, module.attention_dropout, scale=module.scaling, **by_distance)
    return module.o_proj(output), None


def _plan(module: nn.Module) -> list[Replacement]:
    attributes: dict[str, Any] = dict.fromkeys(("pre_norm", "to_q", "to_kv", "to_out", "rel_pos_emb", "dropout"), nn.Module)
    attributes |= dict(dim_head=int, scale=float, context_size=int)
    return [replacement(module, "forward", _granite_speech, "hidden_states attention_dists", **attributes)]


def _plan5(module: nn.Module) -> list[Replacement]:
    parameters = "hidden_states position_embeddings attention_mask kwargs"
    attributes: dict[str, Any] = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "rel_pos_emb"), nn.Module)
    attributes |= dict(head_dim=int, scaling=float, context_size=int, attention_dropout=(int, float))
    return [replacement(module, "forward", _granite_speech5, parameters, **attributes)]


PLANS: dict[str, Plan] = {
    "GraniteSpeechConformerAttention": _plan,
    "GraniteSpeechPlusConformerAttention": _plan,
    "GraniteSpeech5EncoderAttention": _plan5,
}
