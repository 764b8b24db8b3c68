"""Parakeet (FastConformer): Transformer-XL's form, rows of the embeddings for every distance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from relattn.huggingface.attend import attend, projected, table_by_head, wants_weights
from relattn.huggingface.conversion import Plan, Replacement, check_parameters, part, replacement


def position_arguments(module: Any, position_embeddings: Tensor, keys: int) -> dict[str, Any]:
    """Arguments of the position term, from embeddings with a row for each distance -(Lk - 1) ... Lk - 1.

    A batch shares them but for dropout: the first element's serve all.
    """
    if position_embeddings.shape[1] != 2 * keys - 1:
        raise ValueError(
            f"position_embeddings: expected {2 * keys - 1} rows for {keys} keys, got {position_embeddings.shape[1]}"
        )
    rel_k = table_by_head(module.relative_k_proj(position_embeddings[0]), module.head_dim)
    grouped = module.num_key_value_groups != 1
    return dict(
        rel_k=rel_k, pos_bias_u=module.bias_u, pos_bias_v=module.bias_v, scale=module.scaling, enable_gqa=grouped
    )


def _parakeet(
    module: Any, hidden_states: Tensor, position_embeddings: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    query, key, value = projected(hidden_states, module.head_dim, module.q_proj, module.k_proj, module.v_proj)
    arguments = position_arguments(module, position_embeddings, key.shape[2])
    weights = wants_weights(module, kwargs)
    output, given = attend(module, query, key, value, attention_mask, module.attention_dropout, weights, **arguments)
    return module.o_proj(output), given


@merge_with_config_defaults
@capture_outputs
def _parakeet_encoder(
    module: Any,
    input_features: Tensor,
    attention_mask: Tensor | None = None,
    output_attention_mask: bool = True,
    **kwargs: Any,
) -> Any:
    """ParakeetEncoder.forward with a mask (B, 1, 1, L) instead of (B, 1, L, L); the convolutions need no more."""
    from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderModelOutput

    hidden = module.subsampling(input_features, attention_mask)
    hidden = hidden * module.input_scale
    positions = module.encode_positions(hidden)
    hidden = nn.functional.dropout(hidden, p=module.dropout, training=module.training)
    positions = nn.functional.dropout(positions, p=module.dropout_positions, training=module.training)
    frames = None
    if attention_mask is not None:
        frames = module._get_output_attention_mask(attention_mask, target_length=hidden.shape[1])
    mask = None if frames is None else frames[:, None, None, :]
    for layer in module.layers:
        if module.training and module.layerdrop > 0.0 and torch.rand([]) < module.layerdrop:
            continue
        hidden = layer(hidden, attention_mask=mask, position_embeddings=positions, **kwargs)
    output_mask = frames.int() if frames is not None and output_attention_mask else None
    return ParakeetEncoderModelOutput(last_hidden_state=hidden, attention_mask=output_mask)


ATTENTION: dict[str, Any] = dict(
    q_proj=nn.Module, k_proj=nn.Module, v_proj=nn.Module, o_proj=nn.Module, relative_k_proj=nn.Module,
    bias_u=Tensor, bias_v=Tensor, scaling=float, head_dim=int, num_key_value_groups=int,
    attention_dropout=(int, float), config=object,
)  # fmt: skip

ENCODER: dict[str, Any] = dict(
    subsampling=nn.Module, encode_positions=nn.Module, input_scale=float, dropout=(int, float),
    dropout_positions=(int, float), layerdrop=(int, float), _get_output_attention_mask=Callable,
)  # fmt: skip


def _parakeet_plan(module: Any) -> list[Replacement]:
    encoder = "input_features attention_mask output_attention_mask kwargs"
    block = "hidden_states attention_mask position_embeddings kwargs"
    attention = "hidden_states position_embeddings attention_mask kwargs"
    planned = [replacement(module, "forward", _parakeet_encoder, encoder, False, **ENCODER)]
    for layer in part(module, "layers"):
        check_parameters(layer, "forward", block)
        layer_attention = part(layer, "self_attn", "ParakeetEncoderAttention")
        planned.append(replacement(layer_attention, "forward", _parakeet, attention, **ATTENTION))
    return planned


PLANS: dict[str, Plan] = {"ParakeetEncoder": _parakeet_plan}
