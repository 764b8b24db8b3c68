"""The attention implementation "relattn" of transformers: an attention function, its mask function, and their
registration.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from relattn import sharding
from relattn.functional import attention_with_weights, relative_attention
from relattn.varlen import relative_attention_varlen

IMPLEMENTATION = "relattn"
_logger = logging.getLogger(__name__)

# What transformers hands to some attention functions and this one cannot honour: to ignore it would change the result.
_REFUSED = {
    "softcap": "does not cap scores; use attn_implementation='eager'",
    "s_aux": "has no attention sinks; use attn_implementation='eager'",
    "cache": "does not read a paged cache; use attn_implementation='sdpa'",
}


def relattn_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs,
) -> Tensor | None:
    """The mask that transformers builds for "relattn": compact where only padding hides keys, also in a causal model.

    Called as every function of ``AttentionMaskInterface``. `attention_mask` is bool (batch_size, number of keys ever
    seen), True for a token.

    Returns:
        None or bool (batch_size, kv_length), True = may be attended to, if the pattern is plain bidirectional or plain
        causal (`relattn_attention` applies the module's `is_causal`); int32 (N + 1,), where packed sequences begin and end
        among all batch_size * q_length tokens, if it is that of causal sequences whose `position_ids` start anew; else what
        "sdpa" gets, bool (batch_size, 1, q_length, kv_length).

    Raises:
        ValueError: `attention_mask` is neither 2-D nor the 4-D one that transformers passes through; or a model with
            relative tables has a cache whose last key is not the last query (a StaticCache), so that distances would be
            wrong.
    """
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            "attention_mask: expected (batch, keys) or (batch, 1 or heads, queries, keys), "
            f"got {tuple(attention_mask.shape)}"
        )
    # relattn_attention knows only lengths: it takes the last query to stand at the last key, as in a DynamicCache.
    aligned = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    if mask_function is bidirectional_mask_function or (mask_function is causal_mask_function and aligned):
        if attention_mask is None:
            return None
        seen = attention_mask[:, kv_offset : kv_offset + kv_length]
        return nn.functional.pad(seen, (0, kv_length - seen.shape[1])).expand(batch_size, -1)
    if not aligned and getattr(kwargs.get("config"), "relative_attention", None) is not None:
        raise ValueError(
            "past_key_values: relative positions need a cache that ends with the newest token (a DynamicCache), got "
            f"{kv_length} keys for {q_length} queries from position {q_offset}"
        )
    # A program of torch.export cannot look where sequences begin: transformers then takes any positions for packed ones.
    numbers = None if torch.compiler.is_exporting() else _packed_numbers(mask_function)
    if numbers is not None and attention_mask is None and aligned and q_length == kv_length:
        return _ends(numbers)
    # "None, and let the attention be causal" is a shortcut that needs the alignment.
    kwargs["allow_is_causal_skip"] = kwargs.get("allow_is_causal_skip", True) and aligned
    given: Any = (batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask)
    return sdpa_mask(*given, **kwargs)


def _packed_numbers(mask_function: Any) -> Tensor | None:
    """(B, L), which sequence each token is of, where transformers made this mask for causal packed sequences, and nothing else."""

    def closed(function: Any, name: str, variable: str) -> Any:
        if getattr(function, "__qualname__", "") != name:
            return None
        return inspect.getclosurevars(function).nonlocals.get(variable)

    parts = closed(mask_function, "and_masks.<locals>.and_mask", "mask_functions")
    if not isinstance(parts, tuple) or len(parts) != 2:
        return None
    inner = [closed(part, "remap_positions_for_packed_sequence.<locals>.inner_mask", "mask_function") or part for part in parts]
    numbers = [closed(part, "packed_sequence_mask_function.<locals>.inner_mask", "packed_sequence_mask") for part in parts]
    if not any(part is causal_mask_function for part in inner):
        return None
    return next((found for found in numbers if found is not None), None)


def _ends(numbers: Tensor) -> Tensor:
    """cu_seqlens of what lies one after the other in (B, L): a sequence ends where its number does, and with its row."""
    starts = torch.ones_like(numbers, dtype=torch.bool)
    starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    first = starts.flatten().nonzero().flatten().to(torch.int32)
    return nn.functional.pad(first, (0, 1), value=numbers.numel())


class _Packing(NamedTuple):
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None


def _packing(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, kwargs: dict[str, Any]) -> _Packing | None:
    """Of a call whose sequences are packed, as transformers' FlashAttention finds it."""
    ends, key_ends = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if ends is not None and key_ends is not None:
        longest, longest_key = kwargs.get("max_length_q"), kwargs.get("max_length_k")
        return _Packing(ends, key_ends, None if longest is None else int(longest), None if longest_key is None else int(longest_key))
    if mask is not None and mask.dim() == 1:
        return _Packing(mask, None, None, None)
    positions = kwargs.get("position_ids")  # of causal models relattn_mask has looked at them
    if mask is not None or is_causal or not isinstance(positions, Tensor) or torch.compiler.is_compiling():
        return None
    if query.shape[2] != key.shape[2] or key.shape[2] < 2 or positions.shape != (1, key.shape[2]) or query.shape[0] != 1:
        return None
    ends = _ends((positions.diff(prepend=positions[:, :1] - 1) != 1).cumsum(-1))
    return _Packing(ends, None, None, None) if len(ends) > 2 else None


def _packed(query: Tensor, key: Tensor, value: Tensor, packing: _Packing, weights: bool, arguments: dict) -> tuple[Tensor, Tensor | None]:
    """Output (B, L, H, D) of packed sequences, and, computed from a whole mask, the weights if asked for."""
    batch, _, length, _ = query.shape
    if packing.cu_seqlens_k is not None:  # the last query of a sequence stands at its last key
        arguments |= {"query_offset": packing.cu_seqlens_k.diff() - packing.cu_seqlens_q.diff()}
    if weights:
        of_query, of_key = (
            torch.searchsorted(ends, torch.arange(ends[-1].item(), device=ends.device), right=True)
            for ends in (packing.cu_seqlens_q, packing.cu_seqlens_q if packing.cu_seqlens_k is None else packing.cu_seqlens_k)
        )
        if len(of_query) != len(of_key):
            raise ValueError("output_attentions: packed queries and keys of different lengths have no weights")
        mask = (of_query.view(batch, length, 1) == of_key.view(batch, 1, length))[:, None]
        output, _, given = attention_with_weights(query, key, value, **(arguments | {"attn_mask": mask, "query_offset": 0}))
        return output.transpose(1, 2).contiguous(), given
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    packed: Any = relative_attention_varlen(query, key, value, **packing._asdict(), **arguments)
    return packed.unflatten(0, (batch, length)), None


def relattn_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """`relattn.relative_attention` as an attention function of transformers, with the tables of `module` if it has any.

    Args:
        module: the calling layer; read are `relative_tables`, `is_causal` and `config`.
        query: (B, Hq, Lq, D).
        key, value: (B, Hkv, Lk, D), Hq a multiple of Hkv. The last query stands at the last key.
        attention_mask: as `relattn_mask` makes it: (B, Lk), True = may be attended to; or broadcastable to (B, Hq, Lq,
            Lk), boolean or added to the scores, and then the whole mask (`is_causal` is ignored, as by "sdpa"); or (N + 1,).
        dropout, scaling: probability of dropping a weight; None = 1 / sqrt(D).
        is_causal: None = the module's, True if it has none (as in "sdpa").
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed sequences, as a flattening collator has them: computed one by
            one in one call (`relattn.relative_attention_varlen`), whatever the mask. Without them `position_ids` that start anew say the
            same: of causal models through their mask, of others of batch size 1.
        by_distance: arguments of `relattn.relative_attention` that stand for a `position_bias`, from a converted layer; or a function of
            query, key and `position_bias` that returns query, key and these.

    Returns:
        The output (B, Lq, Hq, D), and with `output_attentions` (an argument, or the configuration's) the weights
        (B, Hq, Lq, Lk) after dropout, computed by the materialising definition; else None.

    Raises:
        ValueError: an argument that would change the result and is not supported, such as `softcap`. A `position_bias`
            (T5, WavLM and their like) is computed by torch's scaled_dot_product_attention, with a warning once that
            says so.
        RuntimeError: the configuration promises relative tables and the module has none.
    """
    for name, reason in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: attn_implementation='relattn' {reason}")
    tables, by_distance = getattr(module, "relative_tables", None), kwargs.get("by_distance")
    if tables is None and by_distance is None and kwargs.get("position_bias") is not None:
        return _with_position_bias(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    if by_distance is not None and not isinstance(by_distance, dict):
        query, key, by_distance = by_distance(query, key, kwargs["position_bias"])
    config = getattr(module, "config", None)
    if tables is None and getattr(config, "relative_attention", None) is not None:
        raise RuntimeError(
            f"{type(module).__name__} was built without the relative tables that its configuration lists; "
            "load this checkpoint with relattn.huggingface.from_pretrained or an Auto class"
        )
    masks: dict[str, Any] = {}
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    packing = _packing(query, key, attention_mask, bool(is_causal), kwargs)
    if attention_mask is not None and packing is None:
        masks = {"key_mask": attention_mask.bool()} if attention_mask.dim() == 2 else {"attn_mask": attention_mask}
    is_causal = bool(is_causal) and "attn_mask" not in masks
    arguments: dict[str, Any] = dict(
        max_relative_position=None if tables is None else tables.max_relative_position,
        is_causal=is_causal,
        query_offset=0 if packing is not None else key.shape[2] - query.shape[2],
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    arguments |= masks | ({} if tables is None else tables()) | (by_distance or {})
    output: Any
    weights = None
    wanted = bool(kwargs.get("output_attentions") or getattr(config, "output_attentions", False))
    if packing is not None:
        return _packed(query, key, value, packing, wanted, arguments)
    if wanted:
        output, _, weights = attention_with_weights(query, key, value, **arguments)
    else:
        output = relative_attention(query, key, value, **arguments)
    return output.transpose(1, 2).contiguous(), weights


def _with_position_bias(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    position_bias: Tensor,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """What "sdpa" computes where a model (T5, WavLM, ...) hands over a bias (B or 1, Hq, Lq, Lk); the weights too if
    asked for.
    """
    sharding.refuse("models that hand over a position_bias (T5, WavLM and their like) are")
    _log_position_bias(type(module).__name__)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    seen = attention_mask
    if seen is not None and seen.dim() == 2:
        seen = seen.bool()[:, None, None, :]
    if is_causal and (attention_mask is None or attention_mask.dim() == 2):
        queries, keys = query.shape[2], key.shape[2]
        causal = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        seen = causal if seen is None else causal & seen
    if seen is not None:
        lowest = torch.finfo(position_bias.dtype).min
        position_bias = position_bias.masked_fill(~seen, lowest) if seen.dtype == torch.bool else position_bias + seen
    if kwargs.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        grouped = query.shape[1] != key.shape[1]
        options: dict[str, Any] = dict(attn_mask=position_bias, dropout_p=dropout, scale=scaling, enable_gqa=grouped)
        output, _, weights = attention_with_weights(query, key, value, **options)
        return output.transpose(1, 2).contiguous(), weights
    return sdpa_attention_forward(module, query, key, value, position_bias, dropout, scaling, is_causal=False)


@functools.cache
def _log_position_bias(name: str) -> None:
    _logger.warning(
        "%s hands over a position_bias, which was made outside the attention: attn_implementation='relattn' saves "
        "nothing there, and torch's scaled_dot_product_attention computes it, as with 'sdpa'. "
        "relattn.huggingface.convert(model) spares it, where it knows the model",
        name,
    )


AttentionInterface.register(IMPLEMENTATION, relattn_attention)
# Without this transformers passes no mask at all to an attention it does not know: padding would be attended to.
AttentionMaskInterface.register(IMPLEMENTATION, relattn_mask)
