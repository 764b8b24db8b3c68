"""Inkling: a bias by distance that each query mixes from a bank of profiles: columns of the query, and a table of the profiles.

The score is (q, r / scale).(k, 0) + (q, r / scale).(0, profile of the distance), r being what the query mixes with.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from relattn.huggingface.conversion import CompactMasks, Plan, Replacement, original, part, replacement


def _mixture(module: Any, relative_states: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """(B, H, L, profiles), with which the layer does what it does with (B, H, L, Lk): scale it for long contexts."""
    return relative_states.transpose(1, 2)


def _attention(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    conv_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple:
    asked = module.config._attn_implementation
    if asked != "relattn":
        raise ValueError(f"attn_implementation: a converted {type(module).__name__} takes 'sdpa' or 'eager', got {asked!r}; revert first")
    offset: Any = 0
    if past_key_values is not None:  # before the layer updates it
        _, first_key = past_key_values.get_mask_sizes(hidden_states.shape[1], module.layer_idx)
        offset = past_key_values.get_query_offset(module.layer_idx) - first_key

    def by_distance(query: Tensor, key: Tensor, mixture: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        extent = module.rel_extent if query.shape[2] > 1 else min(module.rel_extent, key.shape[2])  # one token sees few rows
        profiles = nn.functional.pad(module.rel_logits_proj.proj[:, :extent].flip(1).t(), (query.shape[-1], 0, 1, 0))  # 0 farther left
        query = nn.functional.pad(query, (0, mixture.shape[-1])) + nn.functional.pad(mixture / module.scaling, (query.shape[-1], 0))
        key = nn.functional.pad(key, (0, mixture.shape[-1]))
        return query, key, dict(rel_k=profiles.to(query.dtype), max_relative_position=(extent, 0), query_offset=offset)

    kwargs["by_distance"] = by_distance
    return original(module)(hidden_states, attention_mask, conv_mask, past_key_values, **kwargs)


def _plan(module: Any) -> list[Replacement]:
    attributes: dict[str, Any] = dict(config=object, layer_idx=int, scaling=float, rel_extent=int, is_causal=bool)
    parameters = "hidden_states attention_mask conv_mask past_key_values kwargs"
    logits = part(module, "rel_logits_proj", "InklingRelativeLogits")
    return [
        replacement(module, "forward", _attention, parameters, **attributes),
        replacement(logits, "forward", _mixture, "relative_states query_positions key_positions", False, proj=Tensor),
        *_with_compact_masks(module),
    ]


def _with_compact_masks(module: Any) -> list[Replacement]:
    return [Replacement(module, "config", CompactMasks, False)]


PLANS: dict[str, Plan] = {"InklingAttention": _plan, "InklingTextModel": _with_compact_masks}
