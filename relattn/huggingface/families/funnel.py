"""Funnel: Transformer-XL's form, shifted or factorized, whose first layer of a block has half as many queries as keys.

What its scores have besides a distance is taken apart:

- the first token (`separate_cls`) has no position: as a query it is computed by torch's attention; as a key it is a part of its own,
  and parts are put together by their log-sum-exp;
- queries two keys apart see even and odd keys, of which each is a sequence like their own: two parts;
- whether two tokens are of the same type is a product of columns that query and key get in addition, as many as there are types.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from relattn import sharding
from relattn.functional import relative_attention
from relattn.huggingface.attend import projected
from relattn.huggingface.conversion import Plan, Replacement, original, replacement

_TYPES = 3  # 0 and 1; 2 is the first token's, which counts as both


class _Types(NamedTuple):
    """(B, L) of the queries and of the keys, instead of a matrix that says which are alike."""

    queries: Tensor
    keys: Tensor


def _alike(one: Tensor, other: Tensor) -> Tensor:
    return (one == other) | (one == _TYPES - 1) | (other == _TYPES - 1)


# ---- what goes from layer to layer ----


def _inputs(module: Any, inputs_embeds: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> tuple:
    """Without matrices: types by token, no mask of the first token, which is told by the configuration."""
    looks = not (torch.compiler.is_compiling() or torch.jit.is_tracing())
    if looks and token_type_ids is not None and not 0 <= int(token_type_ids.min()) <= int(token_type_ids.max()) < _TYPES:
        return original(module, "init_attention_inputs")(inputs_embeds, attention_mask, token_type_ids)
    module.pooling_mult, module.seq_len = 1, inputs_embeds.shape[1]
    positions = module.get_position_embeds(module.seq_len, inputs_embeds.dtype, inputs_embeds.device)
    types = None if token_type_ids is None else _Types(token_type_ids, token_type_ids)
    return positions, types, attention_mask, None


def _stride_pool(module: Any, tensor: Any, axis: Any) -> Any:
    pool = original(module, "stride_pool")
    if not isinstance(tensor, _Types):
        return pool(tensor, axis)
    axes = axis if isinstance(axis, (list, tuple)) else [axis]
    return _Types(*(pool(types, 1) if place in axes else types for place, types in enumerate(tensor, 1)))


def _with_matrices(module: Any, attention_inputs: tuple, queries: int, keys: int) -> tuple:
    """As the original has them."""
    positions, types, mask, of_first = attention_inputs
    if not isinstance(types, Tensor) and module.config.separate_cls and of_first is None:
        of_first = nn.functional.pad(module.r_kernel.new_ones(queries - 1, keys - 1), (1, 0, 1, 0))
    if isinstance(types, _Types):
        types = _alike(types.queries[:, :, None], types.keys[:, None, :])
    return positions, types, mask, of_first


# ---- attention ----


def _table(module: Any, positions: Any, step: int, lengths: tuple[int, int], query: Tensor, key: Tensor) -> Tensor:
    """(H, R, D), the row of a distance by a query (R,) and a key (R,) that are so far apart."""
    queries, keys = lengths
    if module.config.attention_type == "factorized":
        phi, pi, psi, omega = positions
        rows = phi[query] * psi[key] + pi[query] * omega[key]
    else:
        # A traced model has rows for the length that it was traced with: it fails at others, where the original is wrong.
        of_block = positions[module.block_index][step - 1].view(step * queries + keys, -1)
        rows = of_block[step * queries + key - step * query]
    return torch.einsum("rd,dnh->nrh", rows.to(module.r_kernel.dtype), module.r_kernel)


def _with_types(module: Any, types: _Types | None, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key with a column for each type, in which the query has the score of a key of that type."""
    if types is None:
        return query, key
    each = torch.arange(_TYPES, device=query.device)
    alike = _alike(types.queries[..., None], each)[:, None]
    other, same = torch.einsum("bnih,snh->sbni", query + module.r_s_bias[:, None], module.seg_embed)[..., None]
    is_type = (types.keys[..., None] == each).to(key.dtype)[:, None].expand(-1, key.shape[1], -1, -1)
    return torch.cat((query, torch.where(alike, same, other)), -1), torch.cat((key, is_type), -1)


def _of_distance(module: Any, positions: Any, types: _Types | None, query: Tensor, key: Tensor, value: Tensor, seen: Any) -> list:
    """Output and log-sum-exp of each part of the keys that has positions; queries and keys without the first token, if that is apart."""
    skipped, queries, keys = int(module.config.separate_cls), query.shape[2], key.shape[2]
    step = 1 if queries == keys else 2
    query, key = _with_types(module, types, query, key)
    wider = query.shape[-1] - value.shape[-1]
    biases = [nn.functional.pad(bias, (0, wider)) for bias in (module.r_w_bias, module.r_r_bias)]
    query, parts = query[:, :, skipped:], []
    for first in range(skipped, min(skipped + step, keys)):
        of_key, of_value = (tensor[:, :, first::step] for tensor in (key, value))
        distance = torch.arange(1 - query.shape[2], of_key.shape[2], device=query.device)
        apart = (skipped + (-distance).clamp(min=0), first + step * distance.clamp(min=0))
        table = nn.functional.pad(_table(module, positions, step, (queries, keys), *apart), (0, wider))
        parts.append(
            relative_attention(
                query, of_key, of_value, table, max_relative_position=(query.shape[2] - 1, of_key.shape[2] - 1), query_offset=0,
                pos_bias_u=biases[0], pos_bias_v=biases[1], scale=module.scale, key_mask=None if seen is None else seen[:, first::step],
                dropout_p=module.attention_dropout.p if module.training else 0.0, return_lse=True,
            )
        )  # fmt: skip
    return parts


def _funnel(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_inputs: tuple, output_attentions: bool = False) -> tuple:
    positions, types, mask, of_first = attention_inputs
    queries, keys = query.shape[1], key.shape[1]
    # Dropout on what is factorized is not a function of the distance.
    dropped = module.training and module.config.attention_type == "factorized" and module.config.hidden_dropout > 0
    unlike = queries != keys and abs(2 * queries - keys) > 2
    if output_attentions or dropped or unlike or isinstance(types, Tensor) or of_first is not None:
        return original(module)(query, key, value, _with_matrices(module, attention_inputs, queries, keys), output_attentions)
    sharding.refuse("Funnel's tables, which are made for the length that a layer sees, are")
    size, seen = module.config.d_head, None if mask is None else mask.bool()
    states, (of_query,) = query, projected(query, size, module.q_head)
    (of_key,), (of_value,) = projected(key, size, module.k_head), projected(value, size, module.v_head)
    parts = _of_distance(module, positions, types, of_query, of_key, of_value, seen)
    if module.config.separate_cls:
        output = _with_first(module, parts, of_query, of_key, of_value, seen)
    else:
        output = _joined(parts)
    attended = module.hidden_dropout(module.post_proj(output.transpose(1, 2).flatten(2)))
    return (module.layer_norm(states + attended),)


def _with_first(module: Any, parts: list, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:
    """The first token, by content alone: as one more key of the others, and as a query."""
    by_content = query + module.r_w_bias[:, None]
    if query.shape[2] > 1:
        score = module.scale * (by_content[:, :, 1:] * key[:, :, :1]).sum(-1)
        score = score.to(parts[0][1].dtype) if parts else score
        if seen is not None:
            score = score.masked_fill(~seen[:, None, :1], -torch.inf)
        weight = module.attention_dropout(torch.ones_like(score)).to(value.dtype)[..., None]
        others = _joined([*parts, (weight * value[:, :, :1], score)])
    else:
        others = value[:, :, :0]
    mask, dropout = None if seen is None else seen[:, None, None, :], module.attention_dropout.p if module.training else 0.0
    first = nn.functional.scaled_dot_product_attention(by_content[:, :, :1], key, value, mask, dropout, scale=module.scale)
    return torch.cat((first, others), dim=2)


def _joined(parts: list) -> Tensor:
    """One softmax over the keys of all parts."""
    if len(parts) == 1:
        return parts[0][0]
    outputs, scores = zip(*parts, strict=True)
    lowest = torch.finfo(scores[0].dtype).min  # of a part of which nothing is seen
    shares = torch.stack(scores).clamp(min=lowest).softmax(0)
    return sum(share[..., None].to(output.dtype) * output for share, output in zip(shares, outputs, strict=True))  # type: ignore[return-value]


# ---- plans ----


def _plan(module: nn.Module) -> list[Replacement]:
    attributes: dict[str, Any] = dict.fromkeys(("r_w_bias", "r_r_bias", "r_s_bias", "r_kernel", "seg_embed"), Tensor)
    attributes |= dict.fromkeys(("q_head", "k_head", "v_head", "post_proj", "layer_norm", "hidden_dropout"), nn.Module)
    attributes |= dict(config=object, block_index=int, attention_dropout=nn.Dropout, scale=float)
    return [replacement(module, "forward", _funnel, "query key value attention_inputs output_attentions", **attributes)]


def _structure_plan(module: Any) -> list[Replacement]:
    return [
        replacement(module, "init_attention_inputs", _inputs, "inputs_embeds attention_mask token_type_ids", False, config=object),
        replacement(module, "stride_pool", _stride_pool, "tensor axis", False),
    ]


PLANS: dict[str, Plan] = {"FunnelRelMultiheadAttention": _plan, "FunnelAttentionStructure": _structure_plan}
