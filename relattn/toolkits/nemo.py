"""NeMo: Transformer-XL's form over all frames or chunks of them, and in a window; the newer Transformer encoder's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask

from relattn.conversion import Plan, Replacement, original, replacement
from relattn.toolkits.attend import attend, by_head, check_shift, dropout_of, is_table


def _rel_position(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    pos_emb: Tensor,
    cache: Tensor | None = None,
) -> Any:
    """mask: (B, Lq, Lk), True where hidden. cache: frames (B, L, size) before the keys."""
    keys = key.shape[1] + (0 if cache is None else cache.shape[1])
    if keys < query.shape[1] or not is_table(pos_emb, 2 * keys - 1) or _half_autocast(query):
        return original(module)(query, key, value, mask, pos_emb, cache)
    key, value, query, cache = module.update_cache(key=key, value=value, query=query, cache=cache)
    q, k, v = module.forward_qkv(query, key, value)
    output, _ = attend(
        q, k, v, None if mask is None else ~mask, _dropout(module),
        rel_k=by_head(module.linear_pos(pos_emb), module.h), pos_bias_u=module.pos_bias_u, pos_bias_v=module.pos_bias_v,
    )  # fmt: skip
    output = module.linear_out(output)
    return output if cache is None else (output, cache)


def _local(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pad_mask: Tensor,
    pos_emb: Tensor,
    cache: Tensor | None = None,
) -> Any:
    """pad_mask: (B, L), True where hidden. Rows of pos_emb: distance -left ... right."""
    left, right = module.att_context_size
    if cache is not None or key.shape[1] != query.shape[1] or not is_table(pos_emb, left + right + 1) or _half_autocast(query):
        return original(module)(query, key, value, pad_mask, pos_emb, cache)
    q, k, v = module.forward_qkv(query, key, value)
    rows = by_head(module.linear_pos(pos_emb), module.h)
    # NeMo lays out max(left, right) to each side, and counts the first `left` rows from the far left, the rest from the
    # far right: where the sides differ the rows of the smaller one are not those of its distances. So they are here.
    side = max(left, right)
    rel_k = torch.cat([rows[:, :left], rows.new_zeros(rows.shape[0], 2 * side - left - right, rows.shape[2]), rows[:, left:]], dim=1)
    output, _ = attend(
        q, k, v, ~pad_mask[:, None], _dropout(module), window=(left, right),
        rel_k=rel_k, pos_bias_u=module.pos_bias_u, pos_bias_v=module.pos_bias_v,
    )  # fmt: skip
    return module.linear_out(output.masked_fill(pad_mask[..., None], 0.0))


def _transformer(module: Any, x: Tensor, block_mask: Any = None, pos_emb: Tensor | None = None) -> Tensor:
    """block_mask: FlexAttention's, of which the function that made it is asked again."""
    batch, length, _ = x.shape
    if not is_table(pos_emb, 2 * length - 1):
        return original(module)(x, block_mask, pos_emb)
    q, k, v = module.w_qkv(x).view(batch, length, 3, module.n_heads, module.head_dim).permute(2, 0, 3, 1, 4)
    if module.qk_norm:
        q, k = module.q_norm(q).to(v.dtype), module.k_norm(k).to(v.dtype)
    seen = None
    if block_mask is not None:
        seen = create_mask(block_mask.mask_mod, batch, 1, length, length, device=x.device)[:, 0]
    output, _ = attend(
        q, k, v, seen, 0.0, rel_k=by_head(module.linear_pos(pos_emb), module.n_heads), pos_bias_u=module.pos_bias_u,
        pos_bias_v=module.pos_bias_v,
    )  # fmt: skip
    return module.out_proj(output)


def _dropout(module: Any) -> float:
    """NeMo has the rate twice, and takes it from where the implementation that is chosen looks."""
    return dropout_of(module, module.dropout_rate if getattr(module, "use_pytorch_sdpa", False) else module.dropout.p)


def _half_autocast(query: Tensor) -> bool:
    """NeMo leaves float16's autocast for another dtype, which it chooses."""
    kind = query.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16


_ATTRIBUTES: dict[str, Any] = dict(
    linear_q=nn.Module, linear_k=nn.Module, linear_v=nn.Module, linear_out=nn.Module, linear_pos=nn.Module,
    pos_bias_u=Tensor, pos_bias_v=Tensor, h=int, d_k=int, dropout=nn.Dropout, dropout_rate=(int, float), update_cache=Callable,
    forward_qkv=Callable,
)  # fmt: skip


def _plan(module: Any) -> list[Replacement]:
    planned = replacement(module, "forward", _rel_position, "query key value mask pos_emb cache", **_ATTRIBUTES)
    check_shift(module)
    return [planned]


def _local_plan(module: Any) -> list[Replacement] | str:
    attributes = _ATTRIBUTES | dict(att_context_size=(list, tuple), global_tokens=int)
    planned = replacement(module, "forward", _local, "query key value pad_mask pos_emb cache", **attributes)
    if module.global_tokens > 0:
        return "its global tokens are seen by all and see all, which is no window"
    if min(module.att_context_size) < 0 or max(module.att_context_size) == 0:
        return f"att_context_size={list(module.att_context_size)} is no window"
    return [planned]


def _transformer_plan(module: Any) -> list[Replacement] | str:
    """The conformers' absolute form has this name too."""
    if not getattr(module, "_uses_rel_pos", False):
        return "its positions are not relative"
    attributes: dict[str, Any] = dict(
        w_qkv=nn.Module, out_proj=nn.Module, linear_pos=nn.Module, pos_bias_u=Tensor, pos_bias_v=Tensor, n_heads=int,
        head_dim=int, qk_norm=bool,
    )  # fmt: skip
    planned = replacement(module, "forward", _transformer, "x block_mask pos_emb", **attributes)
    check_shift(module, method="_rel_shift")
    return [planned]


PLANS: dict[str, Plan | str] = {
    "MultiHeadAttention": _transformer_plan,
    "RelPositionMultiHeadAttention": _plan,
    "RelPositionMultiHeadAttentionLongformer": _local_plan,
    "RelPositionMultiHeadAttentionAdapter": "an adapter of NeMo's calls the class's own forward, not the layer's",
}
