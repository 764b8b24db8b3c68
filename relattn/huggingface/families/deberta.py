"""DeBERTa, DeBERTa v2 and SEW-D, whose attention is that of v2: content to position and position to content (He et al. 2021)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from relattn import sharding
from relattn.huggingface.attend import attend, projected, split_heads, table_by_head
from relattn.huggingface.conversion import Plan, Replacement, original, part, replacement, unknown


def _deberta_positions(
    module: Any, hidden_states: Any, query_states: Any = None, relative_pos: Tensor | None = None
) -> Tensor | None:
    """Instead of an (L, L) tensor of positions: None, from which a layer makes one row per distance."""
    return relative_pos


def _deberta_mask(module: Any, attention_mask: Tensor) -> Tensor:
    """(B, 1, 1, L) instead of its outer product (B, 1, L, L)."""
    if attention_mask.dim() <= 2:
        return attention_mask[:, None, None, :]
    return original(module, "get_attention_mask")(attention_mask)


def _deberta_by_original(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool,
    query_states: Tensor | None,
    relative_pos: Tensor | None,
    rel_embeddings: Tensor | None,
) -> tuple:
    """The original layer, with the tensors that `_deberta_positions` and `_deberta_mask` spared."""
    if attention_mask.shape[-2] == 1:
        attention_mask = attention_mask * attention_mask.transpose(-1, -2)
    if relative_pos is None:
        queries = hidden_states if query_states is None else query_states
        query, key = (torch.arange(states.shape[-2], device=states.device) for states in (queries, hidden_states))
        distance = query[:, None] - key
        bucket = _deberta_bucket(module)
        relative_pos = (distance if bucket is None else bucket(distance).to(torch.long))[None]
    return original(module)(
        hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
    )


def _deberta_bucket(module: Any) -> Callable[[Tensor], Tensor] | None:
    """The logarithmic buckets of DeBERTa v2, a function of query minus key; None = without."""
    if getattr(module, "position_buckets", -1) <= 0:
        return None
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    return functools.partial(
        make_log_bucket_position, bucket_size=module.position_buckets, max_position=module.max_relative_positions
    )


def _deberta_rows(
    length: int, span: int, device: torch.device, bucket: Callable | None, limit: int
) -> tuple[int, Tensor]:
    """k, and the row of the 2 * span embeddings for each distance from -k to k; farther ones share the last rows."""
    sharding.refuse("DeBERTa's tables, which are made for the length that a layer sees, are")
    k = min(length - 1, limit)
    distance = torch.arange(k, -k - 1, -1, device=device)  # DeBERTa counts query minus key
    position = distance if bucket is None else bucket(distance).to(torch.long)
    return k, (position + span).clamp(0, 2 * span - 1)


def _deberta(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> tuple:
    """c2p is rel_k, p2c is rel_q (He et al. 2021)."""
    if output_attentions or query_states is not None or relative_pos is not None or rel_embeddings is None:
        return _deberta_by_original(
            module, hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
        )
    size, length, most = module.attention_head_size, hidden_states.shape[1], module.max_relative_positions
    query, key, value = split_heads(module.in_proj(hidden_states), 3 * size).chunk(3, dim=-1)
    query = query + module.q_bias.view(1, -1, 1, size)
    value = value + module.v_bias.view(1, -1, 1, size)
    span = min(length, most)
    embeddings = module.pos_dropout(rel_embeddings)[most - span : most + span]
    k, rows = _deberta_rows(length, span, query.device, None, span)
    tables: dict[str, Any] = {}
    if "c2p" in module.pos_att_type:
        tables["rel_k"] = table_by_head(module.pos_proj(embeddings)[rows], size)
    if "p2c" in module.pos_att_type:
        tables["rel_q"] = table_by_head(module.pos_q_proj(embeddings)[rows], size)
    scale = (size * (1 + len(module.pos_att_type))) ** -0.5
    mask, dropout = attention_mask.bool(), module.dropout.p
    return attend(module, query, key, value, mask, dropout, max_relative_position=k, scale=scale, **tables)


def _deberta_v2(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> tuple:
    if output_attentions or query_states is not None or relative_pos is not None or rel_embeddings is None:
        return _deberta_by_original(
            module, hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
        )
    return _disentangled(module, hidden_states, attention_mask, rel_embeddings, module.dropout.p)


def _sew_d(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
    **kwargs: Any,
) -> tuple:
    if kwargs.get("output_attentions") or query_states is not None or relative_pos is not None or rel_embeddings is None:
        return original(module)(hidden_states, attention_mask, query_states, relative_pos, rel_embeddings, **kwargs)
    return _disentangled(module, hidden_states, attention_mask, rel_embeddings, module.dropout.drop_prob)


def _sew_d_encoder(module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """The layers hear here whether the configuration asks for weights."""
    kwargs.setdefault("output_attentions", bool(getattr(module.config, "output_attentions", False)))
    return original(module)(hidden_states, attention_mask, **kwargs)


def _disentangled(module: Any, hidden_states: Tensor, attention_mask: Tensor, rel_embeddings: Tensor, dropout: float) -> tuple:
    """c2p is rel_k, p2c is rel_q, the logarithmic buckets spread to one row per distance (He et al. 2021)."""
    size, length = module.attention_head_size, hidden_states.shape[1]
    span, most = module.pos_ebd_size, module.max_relative_positions
    query, key, value = projected(hidden_states, size, module.query_proj, module.key_proj, module.value_proj)
    embeddings = module.pos_dropout(rel_embeddings)[: 2 * span]
    bucket, limit = _deberta_bucket(module), span
    if bucket is not None:
        # Beyond max_relative_positions all share a bucket; where the settings leave no room for the logarithm nothing
        # is cut, and where their number is odd its rounding goes on.
        limit = most + 1 if most - 1 > module.position_buckets // 2 and module.position_buckets % 2 == 0 else length
    k, rows = _deberta_rows(length, span, query.device, bucket, limit)
    tables: dict[str, Any] = {}
    if "c2p" in module.pos_att_type:
        projection = module.key_proj if module.share_att_key else module.pos_key_proj
        tables["rel_k"] = table_by_head(projection(embeddings)[rows], size)
    if "p2c" in module.pos_att_type:
        projection = module.query_proj if module.share_att_key else module.pos_query_proj
        tables["rel_q"] = table_by_head(projection(embeddings)[rows], size)
    scale = (size * (1 + len(tables))) ** -0.5
    return attend(module, query, key, value, attention_mask.bool(), dropout, max_relative_position=k, scale=scale, **tables)


_TERMS: dict[str, Any] = dict(attention_head_size=int, pos_att_type=(list, tuple), max_relative_positions=int, pos_dropout=nn.Module)
_OF_V2: dict[str, Any] = dict.fromkeys(("query_proj", "key_proj", "value_proj"), nn.Module)
_OF_V2 |= dict(pos_ebd_size=int, position_buckets=int, share_att_key=bool)


def _deberta_plan(version: int) -> Plan:
    parameters = "hidden_states attention_mask output_attentions query_states relative_pos rel_embeddings"
    common = _TERMS | dict(dropout=nn.Dropout)
    outer = "DebertaAttention" if version == 1 else "DebertaV2Attention"
    if version == 1:
        function, names = _deberta, ("pos_proj", "pos_q_proj")
        common |= dict(in_proj=nn.Module, q_bias=Tensor, v_bias=Tensor, talking_head=bool)
    else:
        function, names = _deberta_v2, ("pos_key_proj", "pos_query_proj")
        common |= _OF_V2

    def plan(module: Any) -> list[Replacement] | str:
        if not isinstance(getattr(module, "relative_attention", None), bool):
            raise unknown(module, "it has no relative_attention")
        if not module.relative_attention:
            return "relative_attention=False"
        planned = [
            replacement(module, "get_rel_pos", _deberta_positions, "hidden_states query_states relative_pos", False),
            replacement(module, "get_attention_mask", _deberta_mask, "attention_mask", False),
        ]
        for layer in part(module, "layer"):
            attention = part(part(layer, "attention", outer), "self", "DisentangledSelfAttention")
            planned.append(replacement(attention, "forward", function, parameters, **common, **_projections(attention, names)))
            if reason := _without_term(attention):
                return reason
            if getattr(attention, "talking_head", False):
                return "talking_head=True mixes the scores of the heads"
        return planned

    return plan


def _projections(attention: Any, names: tuple[str, str]) -> dict[str, Any]:
    """Of the embeddings of positions, where they have their own."""
    if getattr(attention, "share_att_key", False):
        return {}
    terms = getattr(attention, "pos_att_type", ())
    return {name: nn.Module for term, name in zip(("c2p", "p2c"), names, strict=True) if term in terms}


def _without_term(attention: Any) -> str:
    terms = getattr(attention, "pos_att_type", ())
    return "" if {"c2p", "p2c"} & set(terms) else f"pos_att_type={terms!r} has no relative term"


def _sew_d_plan(module: Any) -> list[Replacement] | str:
    if not isinstance(getattr(module, "relative_attention", None), bool):
        raise unknown(module, "it has no relative_attention")
    if not module.relative_attention:
        return "relative_attention=False"
    planned = [replacement(module, "get_rel_pos", _deberta_positions, "hidden_states query_states relative_pos", False)]
    parameters = "hidden_states attention_mask query_states relative_pos rel_embeddings kwargs"
    for layer in part(module, "layer"):
        attention = part(part(layer, "attention", "SEWDAttention"), "self", "DisentangledSelfAttention")
        attributes = _TERMS | _OF_V2 | dict(dropout=nn.Module) | _projections(attention, ("pos_key_proj", "pos_query_proj"))
        planned.append(replacement(attention, "forward", _sew_d, parameters, **attributes))
        if not isinstance(getattr(attention.dropout, "drop_prob", None), (int, float)):
            raise unknown(module, "its dropout has no drop_prob")
        if reason := _without_term(attention):
            return reason
    return planned


def _sew_d_encoder_plan(module: Any) -> list[Replacement]:
    return [replacement(module, "forward", _sew_d_encoder, "hidden_states attention_mask kwargs", False, config=object)]


PLANS: dict[str, Plan] = {
    "DebertaEncoder": _deberta_plan(1),
    "DebertaV2Encoder": _deberta_plan(2),
    "SEWDEncoder": _sew_d_encoder_plan,
    "SEWDTransformerEncoder": _sew_d_plan,
}
