"""T5 and its like: a bias by distance, in buckets, added to the scores; the first layer's serves all layers (UMT5: each has its own)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from relattn.huggingface.attend import is_foreign
from relattn.huggingface.conversion import CompactMasks, Plan, Replacement, original, replacement


def bias_by_distance(buckets: Tensor, embedding: nn.Module) -> Tensor:
    """(H, R) of the buckets (R,) of distances that ascend."""
    return embedding(buckets).transpose(0, 1)


def _sides(module: Any) -> tuple[int, int]:
    """Distances from there on share a bucket; a decoder sees none to the right."""
    most = max(module.relative_attention_max_distance, module.relative_attention_num_buckets)
    return most, 0 if _is_decoder(module) else most


def _is_decoder(module: Any) -> bool:
    return getattr(module, "is_decoder", True)  # Pix2Struct's does not say so


def _distances(module: Any, device: torch.device) -> Tensor:
    left, right = _sides(module)
    return torch.arange(-left, right + 1, device=device)


def _arguments(module: Any, table: Tensor | None, past_key_values: Any) -> dict[str, Any]:
    """Of relative_attention, for the self-attention of new tokens behind those of a cache."""
    if table is None:
        return {}
    past = 0 if past_key_values is None else past_key_values.get_seq_length(module.layer_idx)
    past = past.clone() if isinstance(past, Tensor) else past  # a StaticCache's, which is updated before it is used
    return dict(rel_bias=table, max_relative_position=_sides(module), query_offset=past)


def _is_original(module: Any, mask: Any) -> bool:
    return module.config._attn_implementation != "relattn" or is_foreign(module, mask)


def _t5(
    module: Any,
    hidden_states: Tensor,
    mask: Tensor | None = None,
    key_value_states: Tensor | None = None,
    position_bias: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple:
    """What goes from layer to layer as position_bias is (H, R), or of cross attention, which has none, empty."""
    given = position_bias is not None and position_bias.dim() == 4
    if not given and not _is_original(module, mask):
        if position_bias is None and module.has_relative_attention_bias and key_value_states is None:
            buckets = module._relative_position_bucket(
                _distances(module, hidden_states.device),
                bidirectional=not _is_decoder(module),
                num_buckets=module.relative_attention_num_buckets,
                max_distance=module.relative_attention_max_distance,
            )
            position_bias = bias_by_distance(buckets, module.relative_attention_bias)
        elif position_bias is None:
            position_bias = hidden_states.new_empty(0)
        table = position_bias if position_bias.dim() == 2 else None
        kwargs["by_distance"] = kwargs.get("by_distance", {}) | _arguments(module, table, past_key_values)
    return original(module)(hidden_states, mask, key_value_states, position_bias, past_key_values, **kwargs)


def _pix2struct(module: Any, hidden_states: Tensor, mask: Tensor | None = None, *rest: Any, **kwargs: Any) -> tuple:
    """Its layers cut masks (B, 1, ., L) to the number of keys; that attention is causal is told beside them."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        mask = mask[:, None, None, :]
        kwargs["by_distance"] = {"is_causal": module.is_causal}
    return _t5(module, hidden_states, mask, *rest, **kwargs)


def _umt5(
    module: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple:
    if not _is_original(module, attention_mask):
        table = None
        if module.has_relative_attention_bias:
            buckets = module._relative_position_bucket(_distances(module, hidden_states.device))
            table = bias_by_distance(buckets, module.relative_attention_bias)
        kwargs["by_distance"] = _arguments(module, table, past_key_values)
    return original(module)(hidden_states, encoder_hidden_states, past_key_values, attention_mask, **kwargs)


def _umt5_bias(module: Any, query_length: int, key_length: int, device: Any = None, past_seen_tokens: Any = 0) -> Tensor:
    """Nothing that is looked at: `_umt5` hands over the table."""
    if _is_original(module, None):
        return original(module, "compute_bias")(query_length, key_length, device, past_seen_tokens)
    return module.relative_attention_bias.weight.new_empty(0)


_OF_BIAS: dict[str, Any] = dict(config=object, is_causal=bool, has_relative_attention_bias=bool)
_OF_BIAS |= dict(relative_attention_num_buckets=int, relative_attention_max_distance=int)
_ATTRIBUTES = _OF_BIAS | dict(is_decoder=bool)
_PARAMETERS = "hidden_states mask key_value_states position_bias past_key_values kwargs"


def _t5_plan(module: Any) -> list[Replacement]:
    attention = replacement(module, "forward", _t5, _PARAMETERS, module.has_relative_attention_bias, **_ATTRIBUTES)
    return [attention, *_with_compact_masks(module)]


def _pix2struct_plan(module: Any) -> list[Replacement]:
    attention = replacement(module, "forward", _pix2struct, _PARAMETERS, module.has_relative_attention_bias, **_OF_BIAS)
    return [attention, *_with_compact_masks(module)]


def _umt5_plan(module: Any) -> list[Replacement]:
    parameters = "hidden_states encoder_hidden_states past_key_values attention_mask kwargs"
    planned = [replacement(module, "forward", _umt5, parameters, module.has_relative_attention_bias, **_ATTRIBUTES)]
    parameters = "query_length key_length device past_seen_tokens"
    return [*planned, replacement(module, "compute_bias", _umt5_bias, parameters, False), *_with_compact_masks(module)]


def _udop_plan(module: Any) -> list[Replacement] | str:
    if not getattr(module, "is_decoder", None):
        return "the biases of its encoder are by where boxes lie on the page, which is no function of the distance of tokens"
    return _t5_plan(module)


def _udop_stack_plan(module: Any) -> list[Replacement]:
    return _with_compact_masks(module) if getattr(module, "is_decoder", None) else []


def _with_compact_masks(module: Any) -> list[Replacement]:
    return [Replacement(module, "config", CompactMasks, False)]


_LIKE_T5 = ("T5", "MT5", "LongT5", "Pop2Piano", "SwitchTransformers")  # LongT5's decoder is T5's

PLANS: dict[str, Plan] = {f"{name}Attention": _t5_plan for name in _LIKE_T5} | {"UMT5Attention": _umt5_plan}
PLANS |= {f"{name}Stack": _with_compact_masks for name in (*_LIKE_T5, "UMT5")}
PLANS |= {"Pix2StructTextAttention": _pix2struct_plan, "Pix2StructTextModel": _with_compact_masks}
PLANS |= {"UdopAttention": _udop_plan, "UdopStack": _udop_stack_plan}
