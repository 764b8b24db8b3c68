"""FastSpeech2-Conformer: Transformer-XL's form."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from relattn.huggingface.attend import attend, projected, table_by_head
from relattn.huggingface.conversion import Plan, Replacement, original, replacement


def _fastspeech2(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    pos_emb: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple:
    batch, length, _ = hidden_states.shape
    mask_fits = attention_mask is None or attention_mask.shape == (batch, 1, length)
    if output_attentions or not mask_fits or pos_emb is None or pos_emb.shape[:2] != (1, 2 * length - 1):
        return original(module)(hidden_states, attention_mask, pos_emb, output_attentions)
    query, key, value = projected(hidden_states, module.head_dim, module.linear_q, module.linear_k, module.linear_v)
    mask = None if attention_mask is None else attention_mask[:, 0]  # (B, L), zero where hidden
    rel_k = table_by_head(module.linear_pos(pos_emb)[0], module.head_dim)
    output, _ = attend(
        module, query, key, value, mask, module.dropout.p,
        rel_k=rel_k, pos_bias_u=module.pos_bias_u, pos_bias_v=module.pos_bias_v,
    )  # fmt: skip
    return module.linear_out(output), None


def _fastspeech2_plan(module: nn.Module) -> list[Replacement]:
    parameters = "hidden_states attention_mask pos_emb output_attentions"
    projections = ("linear_q", "linear_k", "linear_v", "linear_out", "linear_pos")
    attributes: dict[str, Any] = dict.fromkeys(projections, nn.Module)
    attributes |= dict(pos_bias_u=Tensor, pos_bias_v=Tensor, head_dim=int, dropout=nn.Dropout)
    return [replacement(module, "forward", _fastspeech2, parameters, **attributes)]


PLANS: dict[str, Plan] = {"FastSpeech2ConformerAttention": _fastspeech2_plan}
