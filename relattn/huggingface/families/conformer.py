"""Wav2Vec2-BERT, Wav2Vec2-Conformer and SeamlessM4T: a Conformer with "relative" or "relative_key" positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from relattn.huggingface.attend import attend, is_foreign, projected, table_by_head, wants_weights
from relattn.huggingface.conversion import CompactMasks, Plan, Replacement, original, part, replacement, unknown


def _relative_key(
    module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *positions: Any, **kwargs: Any
) -> tuple:
    """Shaw et al. 2018 with a range of its own on each side: rows by key minus query, as here."""
    if is_foreign(module, attention_mask):
        return original(module)(hidden_states, attention_mask, *positions, **kwargs)
    query, key, value = projected(hidden_states, module.head_size, module.linear_q, module.linear_k, module.linear_v)
    sides = (module.left_max_position_embeddings, module.right_max_position_embeddings)
    # By a call of the embedding, not its weight: hooks and adapters on it keep working.
    rel_k = module.distance_embedding(torch.arange(sum(sides) + 1, device=query.device)).to(query.dtype)
    output, weights = attend(
        module, query, key, value, attention_mask, module.dropout.p, wants_weights(module, kwargs),
        rel_k=rel_k, max_relative_position=sides, scale=module.scaling,
    )  # fmt: skip
    return module.linear_out(output), weights


def _relative(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    relative_position_embeddings: Tensor | None = None,
    **kwargs: Any,
) -> tuple:
    """Transformer-XL's form: projected sinusoids, one row for each distance, u and v."""
    positions = relative_position_embeddings
    shared = positions is not None and positions.shape[:2] == (1, 2 * hidden_states.shape[1] - 1)
    if is_foreign(module, attention_mask) or not shared:
        return original(module)(hidden_states, attention_mask, positions, **kwargs)
    query, key, value = projected(hidden_states, module.head_size, module.linear_q, module.linear_k, module.linear_v)
    rel_k = table_by_head(module.linear_pos(positions)[0], module.head_size)
    output, weights = attend(
        module, query, key, value, attention_mask, module.dropout.p, wants_weights(module, kwargs),
        rel_k=rel_k, pos_bias_u=module.pos_bias_u, pos_bias_v=module.pos_bias_v, scale=module.scaling,
    )  # fmt: skip
    return module.linear_out(output), weights


_PROJECTIONS: dict[str, Any] = dict(
    linear_q=nn.Module, linear_k=nn.Module, linear_v=nn.Module, linear_out=nn.Module, dropout=nn.Dropout
)


def _conformer(parameters: str) -> Plan:
    def plan(module: nn.Module) -> list[Replacement] | str:
        kind = getattr(module, "position_embeddings_type", "missing")
        attributes = _PROJECTIONS | dict(scaling=float, head_size=int, config=object)
        if kind == "relative_key":
            attributes |= dict(
                left_max_position_embeddings=int, right_max_position_embeddings=int, distance_embedding=nn.Module
            )
            return [replacement(module, "forward", _relative_key, parameters, **attributes)]
        if kind == "relative":
            attributes |= dict(linear_pos=nn.Module, pos_bias_u=Tensor, pos_bias_v=Tensor)
            return [replacement(module, "forward", _relative, parameters, **attributes)]
        if kind not in (None, "rotary"):
            raise unknown(module, f"position_embeddings_type={kind!r}")
        return f"position_embeddings_type={kind!r} has no relative term"

    return plan


def _apply_chunk_attention(module: Any, attention_mask: Tensor | None, hidden_states: Tensor) -> Tensor | None:
    """SeamlessM4T v2: a single chunk hides nothing, and needs no (L, L) mask."""
    asked = getattr(module.config, "config", module.config)._attn_implementation  # behind CompactMasks
    if hidden_states.shape[1] <= module.config.speech_encoder_chunk_size and asked != "eager":
        return attention_mask
    return original(module, "_apply_chunk_attention")(attention_mask, hidden_states)


def _conformer_encoder(module: Any) -> list[Replacement] | str:
    attentions = [getattr(layer, "self_attn", None) for layer in part(module, "layers")]
    kinds = {getattr(attention, "position_embeddings_type", None) for attention in attentions}
    if not kinds <= {"relative", "relative_key"}:
        return "its layers have no relative term"
    return [Replacement(module, "config", CompactMasks, False)]


def _seamless_v2_encoder(module: Any) -> list[Replacement] | str:
    planned = _conformer_encoder(module)
    if isinstance(planned, str):
        return planned
    method, parameters = "_apply_chunk_attention", "attention_mask hidden_states"
    return [*planned, replacement(module, method, _apply_chunk_attention, parameters, False, config=object)]


_WITH_POSITIONS = _conformer("hidden_states attention_mask relative_position_embeddings kwargs")

PLANS: dict[str, Plan] = {
    "Wav2Vec2BertSelfAttention": _WITH_POSITIONS,
    "Wav2Vec2BertEncoder": _conformer_encoder,
    "Wav2Vec2ConformerSelfAttention": _WITH_POSITIONS,
    "Wav2Vec2ConformerEncoder": _conformer_encoder,
    "SeamlessM4TConformerSelfAttention": _WITH_POSITIONS,
    "SeamlessM4TConformerEncoder": _conformer_encoder,
    "SeamlessM4Tv2ConformerSelfAttention": _conformer("hidden_states attention_mask kwargs"),
    "SeamlessM4Tv2ConformerEncoder": _seamless_v2_encoder,
}
