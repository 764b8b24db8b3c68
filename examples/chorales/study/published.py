"""The published skew: a faithful copy of the seed notebook's bug, to be measured and not to be used.

It lives here, not in relattn.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

PUBLISHED = "published_skew"


def published_skew(relative: Tensor) -> Tensor:
    """The seed notebook's `_skewing`: relative logits (B, H, L, 2 L - 1) to what it took for (B, H, L, L).

    It pads on the left, reads the rows as L numbers each and keeps the last L of 2 L rows. Row i of the result holds
    logits of query L / 2 + i // 2 at distances that depend on i and j in another way than j - i. The right step drops
    the first row instead, reads rows of 2 L - 1 and keeps the first L columns.
    """
    batch, heads, length, _ = relative.shape
    return F.pad(relative, (1, 0)).reshape(batch, heads, 2 * length, length)[:, :, length:]


def published_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout=0.0,
    scaling=None,
    **_,
) -> tuple[Tensor, Tensor]:
    """The notebook's relative attention as a function for transformers' `AttentionInterface`.

    query, key, value: (B, H, L, D); attention_mask: added to the scores, broadcastable to (B, H, L, L), or None.
    `module.published_table`, (2 k + 1, D), holds distances -k to k; farther ones are clamped to them.

    Returns:
        The output, (B, L, H, D), and the weights, (B, H, L, L).
    """
    table = module.get_parameter("published_table")
    length, clip = query.shape[-2], len(table) // 2
    distances = torch.arange(-(length - 1), length, device=query.device).clamp(-clip, clip) + clip
    scores = query @ key.transpose(-2, -1) + published_skew(query @ table[distances].T)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(PUBLISHED, published_attention)
AttentionMaskInterface.register(PUBLISHED, eager_mask)
