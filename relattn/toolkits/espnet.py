"""ESPnet 1 and 2: Transformer-XL's form, new and legacy; the transducers' layer, which has its own code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from relattn.conversion import Plan, Replacement, original, replacement, unknown
from relattn.toolkits.attend import attend, by_head, check_shift, dropout_of, is_table, legacy_arguments, legacy_pays, without_future


def _rel_position(module: Any, query: Tensor, key: Tensor, value: Tensor, pos_emb: Tensor, mask: Tensor | None) -> Tensor:
    """mask: (B, 1 or Lq, Lk), zero where hidden."""
    keys = key.shape[1]
    legacy = type(module).__name__.startswith("Legacy")
    short = legacy and not module.zero_triu and not legacy_pays(keys)
    if short or keys < query.shape[1] or not is_table(pos_emb, keys if legacy else 2 * keys - 1):
        return original(module)(query, key, value, pos_emb, mask)
    q, k, v = module.forward_qkv(query, key, value)
    rel_k = by_head(module.linear_pos(pos_emb), module.h)
    arguments: dict[str, Any]
    if legacy and not module.zero_triu:
        arguments = legacy_arguments(q, k, rel_k, module.pos_bias_u, module.pos_bias_v)
    else:
        if legacy:
            rel_k = nn.functional.pad(rel_k, (0, 0, 0, keys - 1))
        elif module.zero_triu:
            rel_k = without_future(rel_k)
        arguments = dict(query=q, key=k, rel_k=rel_k, pos_bias_u=module.pos_bias_u, pos_bias_v=module.pos_bias_v)
    output, module.attn = attend(
        value=v, mask=None if mask is None else mask != 0, dropout=dropout_of(module, module.dropout.p),
        weights=bool(module._forward_hooks),  # plots of attention read `attn` in a hook
        **arguments,
    )  # fmt: skip
    return module.linear_out(output)


def _transducer(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_enc: Tensor,
    mask: Tensor,
    chunk_mask: Tensor | None = None,
    left_context: int = 0,
) -> Tensor:
    """mask: (B, Lk), chunk_mask: (Lq, Lk), True where hidden."""
    queries, keys = query.shape[1], key.shape[1]
    if keys != queries + left_context or not is_table(pos_enc, keys + queries - 1):
        return original(module)(query, key, value, pos_enc, mask, chunk_mask, left_context)
    q, k, v = module.forward_qkv(query, key, value)
    table = by_head(module.linear_pos(pos_enc), module.num_heads)
    arguments: dict[str, Any]
    if _is_simplified(module):  # a number for each distance and head, whatever the query
        arguments = dict(rel_bias=table[..., 0] * module.d_k**-0.5)
    else:
        arguments = dict(rel_k=table, pos_bias_u=module.pos_bias_u, pos_bias_v=module.pos_bias_v)
    if chunk_mask is not None:
        arguments["attn_mask"] = ~chunk_mask
    output, module.attn = attend(
        q, k, v, ~mask[:, None], dropout_of(module, module.dropout.p), bool(module._forward_hooks),
        max_relative_position=(keys - 1, queries - 1), **arguments,
    )  # fmt: skip
    return module.linear_out(output)


def _is_simplified(module: Any) -> bool:
    return module.linear_pos.out_features == module.num_heads != module.num_heads * module.d_k


_LINEAR: dict[str, Any] = dict(
    linear_q=nn.Module, linear_k=nn.Module, linear_v=nn.Module, linear_out=nn.Module, linear_pos=nn.Module,
    dropout=nn.Module, d_k=int,
)  # fmt: skip
_BIASES: dict[str, Any] = dict(pos_bias_u=Tensor, pos_bias_v=Tensor)


def _plan(legacy: bool) -> Callable[[Any], list[Replacement]]:
    def plan(module: Any) -> list[Replacement]:
        attributes = _LINEAR | _BIASES | dict(h=int, zero_triu=bool, dropout=nn.Dropout)
        planned = replacement(module, "forward", _rel_position, "query key value pos_emb mask", **attributes)
        check_shift(module, legacy, module.zero_triu)
        return [planned]

    return plan


def _transducer_plan(module: Any) -> list[Replacement]:
    parameters = "query key value pos_enc mask chunk_mask left_context"
    attributes = _LINEAR | dict(num_heads=int, dropout=nn.Dropout)
    planned = replacement(module, "forward", _transducer, parameters, **attributes)
    score = getattr(getattr(module, "compute_att_score", None), "__name__", None)
    expected = "compute_simplified_attention_score" if _is_simplified(module) else "compute_attention_score"
    if score != expected:
        raise unknown(module, f"its score is {score}, expected {expected}")
    if not _is_simplified(module):
        replacement(module, "forward", _transducer, parameters, **_BIASES)
    check_shift(module, lengths=(3,))
    return [planned]


def _rel_position_plan(module: Any) -> list[Replacement]:
    return _transducer_plan(module) if hasattr(module, "compute_att_score") else _plan(legacy=False)(module)


PLANS: dict[str, Plan | str] = {
    "RelPositionMultiHeadedAttention": _rel_position_plan,
    "LegacyRelPositionMultiHeadedAttention": _plan(legacy=True),
}
