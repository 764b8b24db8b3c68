"""icefall (k2): the conformers' Transformer-XL form, in its three versions; recipes are folders of modules, no package."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from relattn.conversion import Plan, Replacement, original, replacement, unknown
from relattn.toolkits.attend import attend, by_head, check_shift, dropout_of, is_table


def _rel_position(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_emb: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool | None = None,
    attn_mask: Tensor | None = None,
    **context: int,
) -> tuple[Tensor, Tensor | None]:
    """(L, B, E). Masks: True where hidden, or numbers that are added; attn_mask (L, Lk) or (B H, L, Lk)."""
    (queries, batch), keys, heads = query.shape[:2], key.shape[0], module.num_heads
    left = next(iter(context.values()), 0)
    masks = [mask for mask in (key_padding_mask, attn_mask) if mask is not None]
    rows = 2 * keys - 1 if "offset" in context else keys + queries - 1
    strange = keys != queries + left or not is_table(pos_emb, rows)
    if need_weights or strange or any(mask.dtype == torch.uint8 for mask in masks):
        given = {} if need_weights is None else {"need_weights": need_weights}
        return original(module)(query, key, value, pos_emb, key_padding_mask, attn_mask=attn_mask, **given, **context)
    q, k, v = (x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for x in _projected(module, query, key, value))
    u, v_bias = module.pos_bias_u, module.pos_bias_v
    if _is_scaled(module):  # they are added after the query was scaled
        u, v_bias = (bias * module.head_dim**0.5 for bias in (module._pos_bias_u(), module._pos_bias_v()))
    arguments: dict[str, Any] = {}
    if attn_mask is not None:
        mask = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.view(batch, heads, queries, keys)
        arguments["attn_mask"] = ~mask if mask.dtype == torch.bool else mask
    seen = None if key_padding_mask is None else ~key_padding_mask[:, None]
    output, _ = attend(
        q, k, v, seen, dropout_of(module, module.dropout), rel_k=by_head(module.linear_pos(pos_emb), heads), pos_bias_u=u,
        pos_bias_v=v_bias, max_relative_position=(keys - 1, rows - keys), **arguments,
    )  # fmt: skip
    return module.out_proj(output.transpose(0, 1)), None


def _projected(module: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    if query is key is value:
        return module.in_proj(query).chunk(3, dim=-1)
    scaled = hasattr(module.in_proj, "get_weight")  # icefall's ScaledLinear
    weight = module.in_proj.get_weight() if scaled else module.in_proj.weight
    bias = module.in_proj.get_bias() if scaled else module.in_proj.bias
    parts = zip((query, key, value), weight.chunk(3), bias.chunk(3), strict=True)
    return tuple(nn.functional.linear(*part) for part in parts)


def _is_scaled(module: Any) -> bool:
    return hasattr(module, "_pos_bias_u")


def _plan(module: Any) -> list[Replacement] | str:
    if hasattr(module, "forward2"):
        return _SHARED
    attributes: dict[str, Any] = dict(
        in_proj=nn.Linear, out_proj=nn.Linear, linear_pos=nn.Linear, pos_bias_u=Tensor, pos_bias_v=Tensor, num_heads=int,
        head_dim=int, dropout=float,
    )  # fmt: skip
    parameters = "query key value pos_emb key_padding_mask need_weights attn_mask"
    last = list(inspect.signature(type(module).forward).parameters)[-1]  # frames before the queries, by one of two names, or none
    if last in ("left_context", "offset"):
        parameters += f" {last}"
    planned = replacement(module, "forward", _rel_position, parameters, **attributes)
    scaled = hasattr(module, "pos_bias_u_scale")
    if scaled != _is_scaled(module) or scaled != hasattr(module.in_proj, "get_weight"):
        raise unknown(module, "it is scaled in part")
    check_shift(module, lengths=(3,))
    return [planned]


_SHARED = "Zipformer makes its weights once and uses them in several places, so there is no attention to compute in one go"

PLANS: dict[str, Plan | str] = {
    "RelPositionMultiheadAttention": _plan,
    "RelPositionMultiheadAttentionWeights": _SHARED,
}
