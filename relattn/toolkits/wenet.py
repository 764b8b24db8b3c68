"""wenet: Shaw's tables, FireRed's Transformer-XL form, and Squeezeformer's with the shift of old.

Its plain ``RelPositionMultiHeadedAttention`` defines `rel_shift` and never calls it: embeddings of a key's place, not of
distances.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from relattn.conversion import Plan, Replacement, original, replacement
from relattn.toolkits.attend import attend, by_head, check_shift, dropout_of, is_table, legacy_arguments, legacy_pays

_ANY = torch.ones((0, 0, 0), dtype=torch.bool)  # wenet's mask that hides nothing
_NONE = (torch.zeros(0, 0, 0, 0), torch.zeros(0, 0, 0, 0))


def _shaw(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor = _ANY,
    pos_emb: Tensor = _ANY,
    cache: tuple[Tensor, Tensor] = _NONE,
) -> Any:
    q, k, v = module.forward_qkv(query, key, value)
    k, v, new_cache = module._update_kv_and_cache(k, v, cache)
    if k.shape[2] < q.shape[2]:
        return original(module)(query, key, value, mask, pos_emb, cache)
    sides = (module.max_left_rel_pos, module.max_right_rel_pos)
    # By a call of the embedding, not its weight: hooks and adapters on it keep working.
    rel_k = module.rel_k_embed(torch.arange(sum(sides) + 1, device=q.device))
    output = _attended(module, q, k, v, mask, rel_k=rel_k, max_relative_position=sides)
    return module.linear_out(output), new_cache


def _fired(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor = _ANY,
    pos_emb: Tensor = _ANY,
    cache: tuple[Tensor, Tensor] = _NONE,
) -> Any:
    if cache[0].shape[0] > 0 or key.shape[1] != query.shape[1] or not is_table(pos_emb, 2 * key.shape[1] - 1):
        return original(module)(query, key, value, mask, pos_emb, cache)
    q, k, v = module.forward_qkv(module.layer_norm_q(query), module.layer_norm_k(key), module.layer_norm_v(value))
    k, v, new_cache = module._update_kv_and_cache(k, v, cache)
    rel_k = by_head(module.linear_pos(pos_emb), module.h)
    output = _attended(module, q, k, v, mask, rel_k=rel_k, pos_bias_u=module.pos_bias_u, pos_bias_v=module.pos_bias_v)
    return module.linear_out(output), new_cache


def _squeezeformer(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor = _ANY,
    pos_emb: Tensor = _ANY,
    cache: Tensor = _NONE[0],
) -> Any:
    cached = cache.shape[2] if cache.shape[0] > 0 else 0
    keys = cached + key.shape[1]
    if not legacy_pays(keys) or keys < query.shape[1] or not is_table(pos_emb, keys):
        return original(module)(query, key, value, mask, pos_emb, cache)
    if module.adaptive_scale:
        query, key, value = (module.ada_scale * given + module.ada_bias for given in (query, key, value))
    q, k, v = module.forward_qkv(query, key, value)
    if cached:
        key_cache, value_cache = cache.chunk(2, dim=-1)
        k, v = torch.cat([key_cache, k], dim=2), torch.cat([value_cache, v], dim=2)
    new_cache = torch.cat((k, v), dim=-1)
    rel_k = by_head(module.linear_pos(pos_emb), module.h)
    arguments = legacy_arguments(q, k, rel_k, module.pos_bias_u, module.pos_bias_v)
    return module.linear_out(_attended(module, value=v, mask=mask, **arguments)), new_cache


def _attended(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **arguments: Any) -> Tensor:
    seen, dropout = None, module.dropout.p
    if getattr(module, "use_sdpa", False):
        # Here the mask is added, (B, 1 or Lq, Lk), and before the scale; the rate is another attribute.
        dropout = module.dropout_rate
        arguments["attn_mask"] = (mask[:, None] * module.d_k**-0.5).to(query.dtype)
    elif mask.shape[-1] > 0:
        seen = mask[..., : key.shape[2]] != 0
    grouped = query.shape[1] != key.shape[1]
    return attend(query, key, value, seen, dropout_of(module, dropout), enable_gqa=grouped, **arguments)[0]


_ATTRIBUTES: dict[str, Any] = dict(linear_out=nn.Module, dropout=nn.Dropout, h=int, d_k=int, forward_qkv=Callable)
_BIASES: dict[str, Any] = dict(linear_pos=nn.Module, pos_bias_u=Tensor, pos_bias_v=Tensor)
_PARAMETERS = "query key value mask pos_emb cache"
_NEVER_SHIFTS = (
    "it defines rel_shift and never applies it: its scores are of a key's place in the sequence, not of a distance, so "
    "there is no relative term"
)


def _shaw_plan(module: Any) -> list[Replacement]:
    attributes = _ATTRIBUTES | dict(
        rel_k_embed=nn.Module,
        max_left_rel_pos=int,
        max_right_rel_pos=int,
        use_sdpa=bool,
        dropout_rate=(int, float),
        _update_kv_and_cache=Callable,
    )
    return [replacement(module, "forward", _shaw, _PARAMETERS, **attributes)]


def _fired_plan(module: Any) -> list[Replacement]:
    norms = dict(layer_norm_q=nn.Module, layer_norm_k=nn.Module, layer_norm_v=nn.Module)
    attributes = _ATTRIBUTES | _BIASES | norms | dict(use_sdpa=bool, dropout_rate=(int, float), _update_kv_and_cache=Callable)
    planned = replacement(module, "forward", _fired, _PARAMETERS, **attributes)
    check_shift(module)
    return [planned]


def _plain_plan(module: Any) -> list[Replacement] | str:
    """Squeezeformer's and the encoder's have one name."""
    if not hasattr(module, "do_rel_shift"):
        if "rel_shift" in inspect.unwrap(type(module).forward).__code__.co_names:
            return "it applies rel_shift, which no version of wenet known here does"
        return _NEVER_SHIFTS
    attributes = _ATTRIBUTES | _BIASES | dict(ada_scale=Tensor, ada_bias=Tensor, adaptive_scale=bool)
    planned = replacement(module, "forward", _squeezeformer, _PARAMETERS, **attributes)
    if not module.do_rel_shift:
        return _NEVER_SHIFTS
    check_shift(module, legacy=True)
    return [planned]


PLANS: dict[str, Plan | str] = {
    "FiredRelPositionMultiHeadedAttention": _fired_plan,
    "GroupedRelPositionMultiHeadedAttention": _NEVER_SHIFTS,
    "RelPositionMultiHeadedAttention": _plain_plan,
    "ShawRelPositionMultiHeadedAttention": _shaw_plan,
}
