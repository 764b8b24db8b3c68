"""XLNet: Transformer-XL's form, time first, with memories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from relattn import sharding
from relattn.functional import relative_attention
from relattn.huggingface.conversion import Plan, Replacement, original, part, replacement, unknown


def _xlnet(
    module: Any,
    h: Tensor,
    g: Tensor | None,
    attn_mask_h: Tensor | None,
    attn_mask_g: Tensor | None,
    r: Tensor,
    seg_mat: Tensor | None,
    mems: Tensor | None = None,
    target_mapping: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple:
    """Time first: h (L, B, E), r (rows, B, E); masks (L, Lk, B or 1, 1), 0 where seen.

    The rows of r go from distance -Lk, which no key has, to L - 1, or to 0 where attention is causal.
    """
    sharding.refuse("XLNet's tables, which are made for the length that a layer sees, are")
    seen = h if mems is None or mems.dim() <= 1 else torch.cat([mems, h], dim=0)
    queries, keys, rows = h.shape[0], seen.shape[0], r.shape[0]
    fits = rows == keys + queries or (rows == keys + 1 and attn_mask_h is not None)
    if g is not None or seg_mat is not None or output_attentions or not fits:
        return original(module)(h, g, attn_mask_h, attn_mask_g, r, seg_mat, mems, target_mapping, output_attentions)
    query, key, value = (
        torch.einsum("ibh,hnd->ibnd", of, by).permute(1, 2, 0, 3)
        for of, by in ((h, module.q), (seen, module.k), (seen, module.v))
    )
    table = torch.einsum("ih,hnd->nid", r[:, 0].type(module.r.dtype), module.r)
    mask = None if attn_mask_h is None else (attn_mask_h == 0).permute(2, 3, 0, 1)
    output = relative_attention(
        query,
        key,
        value,
        table[:, 1:],
        max_relative_position=(keys - 1, rows - 1 - keys),
        query_offset=keys - queries,
        scale=module.scale,
        pos_bias_u=module.r_w_bias,
        pos_bias_v=module.r_r_bias,
        dropout_p=module.dropout.p if module.training else 0.0,
        attn_mask=mask,
    )
    return module.post_attention(h, output.permute(2, 0, 1, 3)), None  # type: ignore[union-attr]


def _xlnet_plan(module: Any) -> list[Replacement] | str:
    if not isinstance(getattr(module, "bi_data", None), bool):
        raise unknown(module, "it has no bi_data")
    if module.bi_data:
        return "bi_data=True gives the halves of a batch positions of their own"
    parameters = "h g attn_mask_h attn_mask_g r seg_mat mems target_mapping output_attentions"
    attributes: dict[str, Any] = dict.fromkeys(("q", "k", "v", "r", "r_w_bias", "r_r_bias"), Tensor)
    attributes |= dict(scale=float, dropout=nn.Dropout, post_attention=Callable)
    return [
        replacement(part(layer, "rel_attn", "XLNetRelativeAttention"), "forward", _xlnet, parameters, **attributes)
        for layer in part(module, "layer")
    ]


PLANS: dict[str, Plan] = {"XLNetModel": _xlnet_plan}
