"""What the layers of transformers hold and are handed, as arguments of `relattn.relative_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from relattn.functional import attention_with_weights, relative_attention


def split_heads(projected: Tensor, size: int) -> Tensor:
    """(B, L, H D) as (B, H, L, D)."""
    return projected.view(*projected.shape[:-1], -1, size).transpose(1, 2)


def projected(hidden_states: Tensor, size: int, *projections: nn.Module) -> list[Tensor]:
    """(B, H, L, D) by each of the projections."""
    return [split_heads(projection(hidden_states), size) for projection in projections]


def table_by_head(projected: Tensor, size: int) -> Tensor:
    """(R, H D) as (H, R, D)."""
    return projected.view(projected.shape[0], -1, size).transpose(0, 1)


def mask_arguments(mask: Tensor | None, batch: int) -> dict[str, Tensor]:
    """`key_mask` or `attn_mask` from the mask that a layer of transformers is handed.

    Where it is the same for every query (its stride says so: transformers expands a mask of padding) only one row is
    looked at.
    """
    if mask is None:
        return {}
    if mask.dim() == 2:
        return {"key_mask": mask.bool()}
    if mask.shape[2] == 1 or mask.stride(2) == 0:
        mask = mask[:, :, :1]
        if mask.dtype == torch.bool and (mask.shape[1] == 1 or mask.stride(1) == 0):
            return {"key_mask": mask[:, 0, 0].expand(batch, -1)}
    return {"attn_mask": mask}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    weights: bool = False,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    """(B, L, H D) from (B, H, L, D), and the weights (B, H, L, Lk) if asked for."""
    arguments |= mask_arguments(mask, query.shape[0]) | {"dropout_p": dropout if module.training else 0.0}
    if weights:
        output, _, given = attention_with_weights(query, key, value, **arguments)
        return output.transpose(1, 2).flatten(2), given
    output = relative_attention(query, key, value, **arguments)  # type: ignore[assignment]
    return output.transpose(1, 2).flatten(2), None


def wants_weights(module: Any, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("output_attentions", getattr(module.config, "output_attentions", False)))


def is_foreign(module: Any, mask: Any) -> bool:
    """Flex attention's BlockMask, or SeamlessM4T v2's boolean mask under "eager", which adds it to the scores as it is.

    A mask (B, L) is `CompactMasks`'s, not the original's.
    """
    if mask is None:
        return False
    if not isinstance(mask, Tensor):
        return True
    return mask.dim() == 4 and mask.dtype == torch.bool and module.config._attn_implementation == "eager"


def expanded_mask(module: Any, attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The additive mask that transformers makes from (B, L), with one row in memory for all queries.

    Its mask function takes 4-D ones as they are.
    """
    if attention_mask is None or attention_mask.dim() != 2 or module.config._attn_implementation != "eager":
        return attention_mask
    mask = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    mask = mask.masked_fill(~attention_mask.bool(), torch.finfo(dtype).min)
    return mask[:, None, None, :].expand(-1, 1, attention_mask.shape[1], -1)
