"""What the layers of speech toolkits are handed, as arguments of `relattn.relative_attention`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relattn.conversion import unknown
from relattn.functional import attention_with_weights, relative_attention


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, weights: bool = False, **arguments: Any
) -> tuple[Tensor, Tensor | None]:
    """(B, L, H D) from (B, H, L, D), and the weights (B, H, L, Lk) if asked for. `mask`: (B, 1 or L, Lk), True = may attend.

    The last query stands at the last key.
    """
    if mask is not None and mask.shape[1] == 1 != query.shape[2]:
        arguments["key_mask"] = mask[:, 0].expand(query.shape[0], -1)
    elif mask is not None:
        arguments["attn_mask"] = mask[:, None]
    arguments |= dict(dropout_p=dropout, query_offset=key.shape[2] - query.shape[2])
    given = None
    if weights:
        output, _, given = attention_with_weights(query, key, value, **arguments)
    else:
        output = relative_attention(query, key, value, **arguments)  # type: ignore[assignment]
    return output.transpose(1, 2).flatten(2), given


def by_head(projected: Tensor, heads: int) -> Tensor:
    """(1, R, H D) as (H, R, D)."""
    return projected[0].unflatten(-1, (heads, -1)).transpose(0, 1)


def is_table(positions: Any, rows: int) -> bool:
    """Whether they are embeddings of so many distances, the same for the whole batch."""
    return isinstance(positions, Tensor) and positions.dim() == 3 and positions.shape[:2] == (1, rows)


def without_future(rel_k: Tensor) -> Tensor:
    """Rows (H, 2 Lk - 1, D) without a position term ahead of the query: ESPnet's `zero_triu`."""
    rows = torch.arange(rel_k.shape[1], device=rel_k.device)
    return rel_k * (rows <= rel_k.shape[1] // 2)[:, None]


# The shift of old costs twice the products: with fewer keys the original is as fast, in training by a fifth faster.
LEGACY_PAYS_FROM = 512


def legacy_pays(keys: int) -> bool:
    return keys >= LEGACY_PAYS_FROM


def legacy_arguments(query: Tensor, key: Tensor, rel_k: Tensor, u: Tensor, v: Tensor) -> dict[str, Any]:
    """Query, key and tables of the shift of old: pad, view and cut of (Lq, Lk), for embeddings with a row per key.

    Up to the query it is right: row Lk - 1 + d for distance d <= 0. Beyond, it runs on into the next query's line: no
    term for d = 1, and for d >= 2 the *next* query's product with row d - 2. Two queries side by side, each with a table
    that is zero where the other's is not, give exactly that.
    """
    _, keys, size = rel_k.shape
    ahead = F.pad(rel_k[:, : max(keys - 2, 0)], (0, 0, min(keys + 1, 2 * keys - 1), 0))
    return dict(
        query=torch.cat([query, F.pad(query[:, :, 1:], (0, 0, 0, 1))], dim=-1),
        key=F.pad(key, (0, size)),
        rel_k=torch.cat([F.pad(rel_k, (0, 0, 0, keys - 1)), ahead], dim=-1),
        pos_bias_u=F.pad(u, (0, size)),
        pos_bias_v=torch.cat([v, v], dim=-1),
        scale=size**-0.5,
    )


def check_shift(
    module: Any, legacy: bool = False, zero_triu: bool = False, lengths: tuple[int, ...] = (2, 3), method: str = "rel_shift"
) -> None:
    """Raise unless its shift moves numbers as a plan has it: for so many queries, the last ones of 3 keys."""
    for queries in lengths:
        rows = 3 if legacy else 5
        probe = torch.arange(1.0, queries * rows + 1, device="cpu").view(1, 1, queries, rows)
        try:
            found = getattr(module, method)(probe)[0, 0, :, :3].tolist()
        except Exception as error:  # whatever it is, it is not the shift that is known
            raise unknown(module, f"its {method} raises {type(error).__name__}") from error
        expected = [[_shifted(probe[0, 0], i, j - i - (3 - queries), legacy, zero_triu) for j in range(3)] for i in range(queries)]
        if found != expected:
            raise unknown(module, f"its {method} is another one")


def _shifted(products: Tensor, i: int, distance: int, legacy: bool, zero_triu: bool) -> float:
    if distance > 0 and (zero_triu or (legacy and distance == 1)):
        return 0.0
    if legacy and distance > 1:
        return products[i + 1, distance - 2].item()
    return products[i, distance + 2].item()


def dropout_of(module: nn.Module, rate: float) -> float:
    return rate if module.training else 0.0
