"""SpeechBrain's `RelPosMHAXL`: Transformer-XL's form, its scale by the whole embedding's size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from relattn.conversion import Plan, Replacement, original, replacement
from relattn.toolkits.attend import attend, by_head, check_shift, dropout_of, is_table

_NOT_ASKED = object()  # no caller of SpeechBrain's names `return_attn_weights`, whose default is True


def _rel_position(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_embs: Tensor,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    return_attn_weights: Any = _NOT_ASKED,
) -> Any:
    """Masks: True where hidden, or numbers that are added."""
    batch, queries = query.shape[:2]
    keys = key.shape[1]
    weights = return_attn_weights is not _NOT_ASKED and return_attn_weights
    strange = keys < queries or not is_table(pos_embs, 2 * keys - 1)
    strange = strange or (key_padding_mask is not None and key_padding_mask.dtype != torch.bool)
    strange = strange or (attn_mask is not None and attn_mask.dtype == torch.uint8)  # which SpeechBrain adds
    if weights or strange:
        asked = {} if return_attn_weights is _NOT_ASKED else {"return_attn_weights": return_attn_weights}
        return original(module)(query, key, value, pos_embs, key_padding_mask, attn_mask, **asked)
    q, k, v = (x.transpose(1, 2) for x in _projected(module, query, key, value))
    if module.vbias is not None:
        v = v + module.value_bias_weight.view(module.num_heads, 1, module.vhead_dim)
    rel_k = by_head(module.linear_pos(pos_embs), module.num_heads)
    arguments: dict[str, Any] = {}
    if attn_mask is not None:
        scores = (-1, module.num_heads, queries, keys)
        mask = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.view(scores)
        arguments["attn_mask"] = ~mask if mask.dtype == torch.bool else mask
    seen = None if key_padding_mask is None else ~key_padding_mask.view(batch, 1, keys)
    # Parameters of (D, H) that are looked at as (H, D): not their transpose.
    u, v_bias = (bias.view(module.num_heads, module.head_dim) for bias in (module.pos_bias_u, module.pos_bias_v))
    output, _ = attend(
        q, k, v, seen, dropout_of(module, module.dropout_att.p), rel_k=rel_k, pos_bias_u=u, pos_bias_v=v_bias,
        scale=module.scale, **arguments,
    )  # fmt: skip
    output = module.out_proj(output)
    return (output, None) if return_attn_weights is _NOT_ASKED else output


def _projected(module: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """(B, L, H, D) each. Of one and the same input the weight's rows are head by head, otherwise all queries' first."""
    heads, linear = module.num_heads, nn.functional.linear
    if (query is key or torch.equal(query, key)) and (key is value or torch.equal(key, value)):
        return linear(query, module.in_proj_weight).unflatten(-1, (heads, -1)).chunk(3, dim=-1)
    pairs = zip((query, key, value), module.in_proj_weight.chunk(3), strict=True)
    return tuple(linear(given, weight).unflatten(-1, (heads, -1)) for given, weight in pairs)


def _plan(module: Any) -> list[Replacement] | str:
    parameters = "query key value pos_embs key_padding_mask attn_mask return_attn_weights"
    attributes: dict[str, Any] = dict(
        linear_pos=nn.Module, out_proj=nn.Module, dropout_att=nn.Dropout, pos_bias_u=Tensor, pos_bias_v=Tensor, num_heads=int,
        head_dim=int, vhead_dim=int, scale=float, _qkv_same_embed_dim=bool,
    )  # fmt: skip
    planned = replacement(module, "forward", _rel_position, parameters, **attributes)
    if not module._qkv_same_embed_dim:
        return "vdim differs from embed_dim, which its own forward does not take either"
    replacement(module, "forward", _rel_position, parameters, in_proj_weight=Tensor)
    # Also with `mask_pos_future`: SpeechBrain's triangle is laid over 2 Lk - 1 columns, and ends beyond those that are kept.
    check_shift(module)
    return [planned]


PLANS: dict[str, Plan | str] = {"RelPosMHAXL": _plan}
