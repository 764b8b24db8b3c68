"""The encoder of SpeechT5: Shaw's form, one table for all layers, which transformers spreads to (L, L, D).

Its attention is only eager, with a float mask (B, 1, L, L).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from relattn.huggingface.attend import attend, expanded_mask, projected
from relattn.huggingface.conversion import Plan, Replacement, original, part, replacement


def _speecht5_encoder(
    module: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None = None, *rest: Any, **kwargs: Any
) -> Any:
    return original(module)(hidden_states, expanded_mask(module, attention_mask, hidden_states.dtype), *rest, **kwargs)


def _speecht5_positions(module: Any, hidden_states: Tensor) -> Tensor:
    """The table by key minus query, (2 max_length, D), where the original spreads it to (L, L, D).

    Its own rows go by query minus key.
    """
    return module.pe_k(torch.arange(2 * module.max_length - 1, -1, -1, device=hidden_states.device))


def _speecht5(
    module: Any,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple:
    compact = position_bias is not None and position_bias.dim() == 2
    if not compact or output_attentions or key_value_states is not None or past_key_values is not None:
        if compact:
            position_bias = _spread(position_bias, hidden_states.shape[1])  # type: ignore[arg-type]
        return original(module)(
            hidden_states, key_value_states, past_key_values, attention_mask, position_bias, output_attentions, **kwargs
        )
    query, key, value = projected(hidden_states, module.head_dim, module.q_proj, module.k_proj, module.v_proj)
    right = position_bias.shape[0] // 2  # type: ignore[union-attr]
    output, _ = attend(
        module, query, key, value, attention_mask, module.dropout,
        rel_k=position_bias, max_relative_position=(right - 1, right), scale=module.scaling,
    )  # fmt: skip
    return module.out_proj(output), None


def _spread(table: Tensor, length: int) -> Tensor:
    """(L, L, D) from `_speecht5_positions`."""
    right = table.shape[0] // 2
    frames = torch.arange(length, device=table.device)
    return table[(frames - frames[:, None]).clamp(1 - right, right) + right - 1]


_ATTENTION: dict[str, Any] = dict(
    q_proj=nn.Module, k_proj=nn.Module, v_proj=nn.Module, out_proj=nn.Module,
    head_dim=int, scaling=float, dropout=(int, float),
)  # fmt: skip


def _speecht5_plan(module: Any) -> list[Replacement]:
    attention = "hidden_states key_value_states past_key_values attention_mask position_bias output_attentions kwargs"
    encoder = "hidden_states attention_mask output_attentions output_hidden_states return_dict kwargs"
    positions = part(module, "embed_positions", "SpeechT5RelativePositionalEncoding")
    planned = [
        replacement(module, "forward", _speecht5_encoder, encoder, False, config=object),
        replacement(positions, "forward", _speecht5_positions, "hidden_states", False, pe_k=nn.Module, max_length=int),
    ]
    return planned + [
        replacement(part(layer, "attention", "SpeechT5Attention"), "forward", _speecht5, attention, **_ATTENTION)
        for layer in part(module, "layers")
    ]


PLANS: dict[str, Plan] = {"SpeechT5Encoder": _speecht5_plan}
