"""Nemotron ASR streaming: Parakeet's layers in chunks, each of which sees itself and some chunks before it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from relattn.huggingface.attend import attend, projected, wants_weights
from relattn.huggingface.conversion import Plan, Replacement, check_parameters, part, replacement
from relattn.huggingface.families.parakeet import ATTENTION, ENCODER, position_arguments


def _nemotron(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    chunk: tuple[int, int | None] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """With `chunk`, as `relative_attention` takes it, the mask is (B, L), of padding alone."""
    query, key, value = projected(hidden_states, module.head_dim, module.q_proj, module.k_proj, module.v_proj)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
    arguments = position_arguments(module, position_embeddings, key.shape[2])
    arguments |= {"query_offset": key.shape[2] - query.shape[2], "chunk": chunk}
    weights = wants_weights(module, kwargs)
    output, given = attend(module, query, key, value, attention_mask, module.attention_dropout, weights, **arguments)
    return module.o_proj(output), given


@merge_with_config_defaults
@capture_outputs
def _nemotron_encoder(
    module: Any,
    input_features: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    output_attention_mask: bool = True,
    use_cache: bool | None = None,
    padding_cache: Any = None,
    num_lookahead_tokens: int | None = None,
    **kwargs: Any,
) -> Any:
    """NemotronAsrStreamingEncoder.forward without its (B, 1, L, L) mask.

    Streaming, whose masks are small, stays with the original.
    """
    from transformers.models.nemotron_asr_streaming.modeling_nemotron_asr_streaming import (
        NemotronAsrStreamingEncoderModelOutput,
    )

    if use_cache or past_key_values is not None or padding_cache is not None:
        given: dict[str, Any] = dict(position_ids=position_ids, padding_cache=padding_cache, use_cache=use_cache)
        # Unwrapped, it does not take the name that it had before transformers 5.24.
        cache = "cache" if "cache" in inspect.signature(type(module).forward).parameters else "past_key_values"
        given |= {cache: past_key_values} | dict(output_attention_mask=output_attention_mask, num_lookahead_tokens=num_lookahead_tokens)
        return inspect.unwrap(type(module).forward)(module, input_features, attention_mask, **given, **kwargs)
    hidden = module.subsampling(input_features, attention_mask)
    hidden = hidden * module.input_scale
    frames = None
    if attention_mask is not None:
        frames = module._get_output_attention_mask(attention_mask, target_length=hidden.shape[1])
    left, right = module._resolve_attn_context(num_lookahead_tokens)
    chunk = (right + 1, left // (right + 1) if left >= 0 else hidden.shape[1])  # as its chunked_limited_mask_function
    positions = module.encode_positions(hidden, cached_frames=0)
    hidden = nn.functional.dropout(hidden, p=module.dropout, training=module.training)
    positions = nn.functional.dropout(positions, p=module.dropout_positions, training=module.training)
    all_masked_rows = None if frames is None else _sees_none(frames, chunk)[:, None, :]
    given = dict(position_embeddings=positions, chunk=chunk) | kwargs
    for layer in module.layers:
        if module.training and module.layerdrop > 0.0 and torch.rand([]) < module.layerdrop:
            continue
        hidden = layer(hidden, attention_mask=frames, all_masked_rows=all_masked_rows, **given)
    output_mask = frames.int() if frames is not None and output_attention_mask else None
    return NemotronAsrStreamingEncoderModelOutput(last_hidden_state=hidden, attention_mask=output_mask)


def _sees_none(frames: Tensor, chunk: tuple[int, int]) -> Tensor:
    """bool (B, L): every frame that the query may see is padding."""
    size, left = chunk
    length = frames.shape[1]
    start = torch.arange(length, device=frames.device) // size * size
    counts = nn.functional.pad(frames.cumsum(1), (1, 0))
    return counts[:, (start + size).clamp(max=length)] == counts[:, (start - left * size).clamp(min=0)]


def _nemotron_plan(module: Any) -> list[Replacement]:
    encoder = "input_features attention_mask position_ids past_key_values output_attention_mask use_cache padding_cache"
    encoder += " num_lookahead_tokens kwargs"
    block = "hidden_states attention_mask all_masked_rows position_embeddings past_key_values padding_cache kwargs"
    attention = "hidden_states position_embeddings attention_mask past_key_values kwargs"
    attributes = ENCODER | dict(_resolve_attn_context=Callable)
    planned = [replacement(module, "forward", _nemotron_encoder, encoder, False, **attributes)]
    for layer in part(module, "layers"):
        check_parameters(layer, "forward", block)
        layer_attention = part(layer, "self_attn", "NemotronAsrStreamingEncoderAttention")
        planned.append(replacement(layer_attention, "forward", _nemotron, attention, **ATTENTION, layer_idx=int))
    return planned


PLANS: dict[str, Plan] = {"NemotronAsrStreamingEncoder": _nemotron_plan}
