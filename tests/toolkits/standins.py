"""Layers as the toolkits have them, written from their formulas, under their names: `make test` needs no toolkit.

Names of classes, methods, parameters and attributes are the toolkits', whose forward passes these compute with gathered
products instead of shifts: s_ij = ((q_i + u) . k_j + (q_i + v) . p_r) * scale with r the row of distance i - j. What is
particular to one is said at its class. `tests/toolkits/real.py` finds the real ones where they are installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask


def gathered(products: Tensor, keys: int) -> Tensor:
    """(..., Lq, rows) by row as (..., Lq, keys) by key: rows from the distance farthest to the left on, the last query at the last key."""
    queries = products.shape[-2]
    rows = torch.arange(keys) - torch.arange(queries)[:, None] + queries - 1
    return products.gather(-1, rows.expand(*products.shape[:-1], keys))


def gathered_of_old(products: Tensor) -> Tensor:
    """With a row per key, as pad, view and cut leave it: right to the left, ahead of the query the next query's (espnet#2816)."""
    queries, keys = products.shape[-2:]
    flat = nn.functional.pad(products, (1, 0)).flatten(-2)[..., queries:]
    return flat.unflatten(-1, (queries, keys))


def weighted(scores: Tensor, value: Tensor, hidden: Tensor | None, dropout: nn.Module) -> tuple[Tensor, Tensor]:
    """(B, L, H D) and the weights; a query that sees nothing gets zeros."""
    if hidden is not None:
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    if hidden is not None:
        weights = weights.masked_fill(hidden, 0.0)
    return (dropout(weights) @ value).transpose(1, 2).flatten(2), weights


def known_as(module: str, name: str | None = None) -> Callable[[type], type]:
    """The names by which a conversion knows a class."""

    def named(layer: type) -> type:
        layer.__module__, layer.__name__ = module, name or layer.__name__
        layer.__qualname__ = layer.__name__
        return layer

    return named


class _Layer(nn.Module):
    def __init__(self, heads: int, size: int, dropout: float, positions: bool = True) -> None:
        super().__init__()
        self.h, self.d_k = heads, size // heads
        self.linear_q, self.linear_k, self.linear_v, self.linear_out = (nn.Linear(size, size) for _ in range(4))
        self.dropout = nn.Dropout(dropout)
        if positions:
            self.linear_pos = nn.Linear(size, size, bias=False)
            self.pos_bias_u, self.pos_bias_v = (nn.Parameter(torch.randn(heads, self.d_k)) for _ in range(2))

    def forward_qkv(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        pairs = ((self.linear_q, query), (self.linear_k, key), (self.linear_v, value))
        return tuple(linear(given).unflatten(-1, (-1, self.d_k)).transpose(1, 2) for linear, given in pairs)

    def products(self, query: Tensor, key: Tensor, pos_emb: Tensor) -> tuple[Tensor, Tensor]:
        table = self.linear_pos(pos_emb).unflatten(-1, (-1, self.d_k)).transpose(1, 2)
        return (query + self.pos_bias_u[:, None]) @ key.mT, (query + self.pos_bias_v[:, None]) @ table.mT

    def rel_shift(self, x: Tensor) -> Tensor:
        return gathered(x, x.shape[-1] // 2 + 1)


# ---- NeMo ----

_NEMO = "nemo.collections.asr.parts.submodules.multi_head_attention"


@known_as(_NEMO)
class RelPositionMultiHeadAttention(_Layer):
    def __init__(self, n_head: int, n_feat: int, dropout_rate: float, pos_bias_u: Any, pos_bias_v: Any) -> None:
        super().__init__(n_head, n_feat, dropout_rate)
        self.dropout_rate = dropout_rate
        self.cache_drop_size: Any = None  # its encoder sets it

    def update_cache(self, key: Tensor, value: Tensor, query: Tensor, cache: Tensor | None) -> tuple:
        if cache is not None:
            key = value = torch.cat([cache, key], dim=1)
            kept = query.shape[1] - self.cache_drop_size
            cache = torch.cat([cache[:, kept:], query[:, :kept]], dim=1)
        return key, value, query, cache

    def forward(self, query, key, value, mask, pos_emb, cache=None):
        key, value, query, cache = self.update_cache(key, value, query, cache)
        q, k, v = self.forward_qkv(query, key, value)
        content, position = self.products(q, k, pos_emb)
        scores = (content + self.rel_shift(position)) / math.sqrt(self.d_k)
        output, _ = weighted(scores, v, None if mask is None else mask[:, None], self.dropout)
        output = self.linear_out(output)
        return output if cache is None else (output, cache)


@known_as(_NEMO)
class RelPositionMultiHeadAttentionLongformer(RelPositionMultiHeadAttention):
    """Scores in max(left, right) columns to each side. The first `left` rows are added from the left edge on, the others
    up to the right edge; then what is beyond left and right is hidden. Padded queries get zeros."""

    def __init__(self, n_head, n_feat, dropout_rate, pos_bias_u, pos_bias_v, att_context_size, global_tokens=0) -> None:
        super().__init__(n_head, n_feat, dropout_rate, pos_bias_u, pos_bias_v)
        self.att_context_size, self.global_tokens = att_context_size, global_tokens

    def forward(self, query, key, value, pad_mask, pos_emb, cache=None):
        q, k, v = self.forward_qkv(query, key, value)
        content, position = self.products(q, k, pos_emb)
        left, right = self.att_context_size
        side, length = max(left, right), query.shape[1]
        columns = position.new_zeros(*position.shape[:-1], 2 * side + 1)
        columns[..., :left] += position[..., :left]
        columns[..., 2 * side - right :] += position[..., left:]
        distance = torch.arange(length) - torch.arange(length)[:, None]
        index = (distance + side).clamp(0, 2 * side).expand(content.shape)
        scores = (content + columns.gather(-1, index)) / math.sqrt(self.d_k)
        hidden = (distance < -left) | (distance > right) | pad_mask[:, None, None] | pad_mask[:, None, :, None]
        return self.linear_out(weighted(scores, v, hidden, self.dropout)[0])


@known_as("nemo.collections.asr.modules.transformer_encoder", "MultiHeadAttention")
class NemoTransformer(nn.Module):
    """On FlexAttention, which has a mask by blocks."""

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.n_heads, self.head_dim, self.d_model = cfg.n_heads, cfg.d_model // cfg.n_heads, cfg.d_model
        self._uses_rel_pos, self.qk_norm = cfg.self_attention_model == "rel_pos", cfg.qk_norm
        self.w_qkv, self.out_proj = nn.Linear(cfg.d_model, 3 * cfg.d_model, bias=cfg.qkv_bias), nn.Linear(cfg.d_model, cfg.d_model)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = nn.LayerNorm(self.head_dim), nn.LayerNorm(self.head_dim)
        if self._uses_rel_pos:
            self.linear_pos = nn.Linear(cfg.d_model, cfg.d_model, bias=False)
            self.pos_bias_u, self.pos_bias_v = (nn.Parameter(torch.zeros(self.n_heads, self.head_dim)) for _ in range(2))

    def _rel_shift(self, x):
        return gathered(x, x.shape[-1] // 2 + 1)

    def forward(self, x, block_mask=None, pos_emb=None):
        q, k, v = self.w_qkv(x).unflatten(-1, (3, self.n_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        table = self.linear_pos(pos_emb).unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)
        position = self._rel_shift((q + self.pos_bias_v[:, None]) @ table.mT)
        scores = ((q + self.pos_bias_u[:, None]) @ k.mT + position) * self.head_dim**-0.5
        hidden = None
        if block_mask is not None:
            hidden = ~create_mask(block_mask.mask_mod, x.shape[0], 1, x.shape[1], x.shape[1], device="cpu")
        return self.out_proj(weighted(scores, v, hidden, nn.Identity())[0])


# ---- ESPnet ----

_ESPNET = "espnet.nets.pytorch_backend.transformer.attention"


@known_as(_ESPNET)
class RelPositionMultiHeadedAttention(_Layer):
    """With `zero_triu` there is no position term ahead of the query. `attn` are the weights. mask: zero where hidden."""

    def __init__(self, n_head: int, n_feat: int, dropout_rate: float, zero_triu: bool = False) -> None:
        super().__init__(n_head, n_feat, dropout_rate)
        self.zero_triu = zero_triu
        self.attn: Tensor | None = None

    def rel_shift(self, x):
        shifted = gathered(x, x.shape[-1] // 2 + 1)
        return shifted.tril(shifted.shape[-1] - shifted.shape[-2]) if self.zero_triu else shifted

    def forward(self, query, key, value, pos_emb, mask):
        q, k, v = self.forward_qkv(query, key, value)
        content, position = self.products(q, k, pos_emb)
        scores = (content + self.rel_shift(position)) / math.sqrt(self.d_k)
        output, self.attn = weighted(scores, v, None if mask is None else mask[:, None] == 0, self.dropout)
        return self.linear_out(output)


@known_as(_ESPNET)
class LegacyRelPositionMultiHeadedAttention(RelPositionMultiHeadedAttention):
    def rel_shift(self, x):
        shifted = gathered_of_old(x)
        return shifted.tril(shifted.shape[-1] - shifted.shape[-2]) if self.zero_triu else shifted

    def forward(self, query, key, value, pos_emb, mask):
        return RelPositionMultiHeadedAttention.forward(self, query, key, value, pos_emb, mask)


@known_as("espnet2.asr_transducer.encoder.modules.attention", "RelPositionMultiHeadedAttention")
class TransducerAttention(_Layer):
    """The simplified score's position term is a number for each distance and head."""

    def __init__(self, num_heads, embed_size, dropout_rate=0.0, simplified_attention_score=False) -> None:
        super().__init__(num_heads, embed_size, dropout_rate, positions=not simplified_attention_score)
        self.num_heads = num_heads
        self.attn: Tensor | None = None
        if simplified_attention_score:
            self.linear_pos = nn.Linear(embed_size, num_heads)
            self.compute_att_score = self.compute_simplified_attention_score
        else:
            self.compute_att_score = self.compute_attention_score

    def rel_shift(self, x, left_context=0):
        return gathered(x, x.shape[-2] + left_context)

    def compute_simplified_attention_score(self, query, key, pos_enc, left_context=0):
        position = self.linear_pos(pos_enc).mT[:, :, None].expand(-1, -1, query.shape[2], -1)
        return (query @ key.mT + self.rel_shift(position, left_context)) / math.sqrt(self.d_k)

    def compute_attention_score(self, query, key, pos_enc, left_context=0):
        content, position = self.products(query, key, pos_enc)
        return (content + self.rel_shift(position, left_context)) / math.sqrt(self.d_k)

    def forward(self, query, key, value, pos_enc, mask, chunk_mask=None, left_context=0):
        q, k, v = self.forward_qkv(query, key, value)
        hidden = mask[:, None, None] if chunk_mask is None else mask[:, None, None] | chunk_mask
        output, self.attn = weighted(self.compute_att_score(q, k, pos_enc, left_context), v, hidden, self.dropout)
        return self.linear_out(output)


# ---- wenet ----

_NO_MASK, _NO_CACHE = torch.ones((0, 0, 0), dtype=torch.bool), (torch.zeros(0, 0, 0, 0), torch.zeros(0, 0, 0, 0))


class _Wenet(_Layer):
    """mask: zero where hidden, or of no length; added before the scale with `use_sdpa`. Returns keys and values as a cache too."""

    def __init__(self, n_head: int, n_feat: int, dropout_rate: float, use_sdpa: bool = False, positions: bool = True) -> None:
        super().__init__(n_head, n_feat, dropout_rate, positions)
        self.use_sdpa, self.dropout_rate = use_sdpa, dropout_rate

    def _update_kv_and_cache(self, k, v, cache):
        if self.training:
            return k, v, cache
        k, v = (torch.cat([old, new], dim=2) if old.shape[0] > 0 else new for old, new in zip(cache, (k, v), strict=True))
        return k, v, (k, v)

    def attended(self, content: Tensor, position: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        hidden = None
        if self.use_sdpa:
            position = position + mask[:, None]
        elif mask.shape[-1] > 0:
            hidden = mask[:, None, :, : v.shape[2]] == 0
        return self.linear_out(weighted((content + position) / math.sqrt(self.d_k), v, hidden, self.dropout)[0])


@known_as("wenet.models.transformer.attention")
class ShawRelPositionMultiHeadedAttention(_Wenet):
    def __init__(self, n_head: int, n_feat: int, dropout_rate: float, use_sdpa: bool = False) -> None:
        super().__init__(n_head, n_feat, dropout_rate, use_sdpa, positions=False)
        self.max_left_rel_pos, self.max_right_rel_pos = 64, 8
        self.rel_k_embed = nn.Embedding(73, self.d_k)

    def forward(self, query, key, value, mask=_NO_MASK, pos_emb=None, cache=_NO_CACHE):
        q, k, v = self.forward_qkv(query, key, value)
        k, v, new_cache = self._update_kv_and_cache(k, v, cache)
        places = torch.arange(k.shape[2])
        rows = (places - places[-q.shape[2] :, None]).clamp(-self.max_left_rel_pos, self.max_right_rel_pos) + self.max_left_rel_pos
        position = torch.einsum("bhid,ijd->bhij", q, self.rel_k_embed(rows))
        return self.attended(q @ k.mT, position, v, mask), new_cache


@known_as("wenet.models.firered.attention")
class FiredRelPositionMultiHeadedAttention(_Wenet):
    def __init__(self, n_head: int, n_feat: int, dropout_rate: float, use_sdpa: bool = False) -> None:
        super().__init__(n_head, n_feat, dropout_rate, use_sdpa)
        self.layer_norm_q, self.layer_norm_k, self.layer_norm_v = (nn.LayerNorm(n_feat) for _ in range(3))

    def forward(self, query, key, value, mask=_NO_MASK, pos_emb=None, cache=_NO_CACHE):
        q, k, v = self.forward_qkv(self.layer_norm_q(query), self.layer_norm_k(key), self.layer_norm_v(value))
        k, v, new_cache = self._update_kv_and_cache(k, v, cache)
        content, position = self.products(q, k, pos_emb)
        return self.attended(content, self.rel_shift(position), v, mask), new_cache


@known_as("wenet.models.transformer.attention", "RelPositionMultiHeadedAttention")
class PlainWenet(_Wenet):
    """No shift: pos_emb has a row per key."""

    def forward(self, query, key, value, mask=_NO_MASK, pos_emb=None, cache=_NO_CACHE):
        q, k, v = self.forward_qkv(query, key, value)
        k, v, new_cache = self._update_kv_and_cache(k, v, cache)
        return self.attended(*self.products(q, k, pos_emb), v, mask), new_cache


@known_as("wenet.models.squeezeformer.attention", "RelPositionMultiHeadedAttention")
class Squeezeformer(_Layer):
    """The shift of old, if any; one tensor of keys and values as a cache."""

    def __init__(self, n_head, n_feat, dropout_rate, do_rel_shift=False, adaptive_scale=False) -> None:
        super().__init__(n_head, n_feat, dropout_rate)
        self.do_rel_shift, self.adaptive_scale = do_rel_shift, adaptive_scale
        self.ada_scale, self.ada_bias = nn.Parameter(torch.ones(1, 1, n_feat)), nn.Parameter(torch.zeros(1, 1, n_feat))

    def rel_shift(self, x, zero_triu=False):
        return gathered_of_old(x)

    def forward(self, query, key, value, mask=_NO_MASK, pos_emb=None, cache=_NO_CACHE[0]):
        if self.adaptive_scale:
            query, key, value = (self.ada_scale * given + self.ada_bias for given in (query, key, value))
        q, k, v = self.forward_qkv(query, key, value)
        if cache.shape[0] > 0:
            k, v = (torch.cat([old, new], dim=2) for old, new in zip(cache.chunk(2, dim=-1), (k, v), strict=True))
        content, position = self.products(q, k, pos_emb)
        scores = (content + (self.rel_shift(position) if self.do_rel_shift else position)) / math.sqrt(self.d_k)
        hidden = mask[:, None, :, : k.shape[2]] == 0 if mask.shape[-1] > 0 else None
        return self.linear_out(weighted(scores, v, hidden, self.dropout)[0]), torch.cat((k, v), dim=-1)


# ---- SpeechBrain ----


@known_as("speechbrain.nnet.attention")
class RelPosMHAXL(nn.Module):
    """Scaled by the whole size; biases are (D, H), looked at as (H, D); the weight is head by head where one input is all three."""

    def __init__(self, embed_dim, num_heads, dropout=0.0, vbias=False, vdim=None, mask_pos_future=False) -> None:
        super().__init__()
        self._qkv_same_embed_dim = vdim in (None, embed_dim)
        self.num_heads, self.mask_pos_future, self.scale = num_heads, mask_pos_future, 1 / math.sqrt(embed_dim)
        self.head_dim = self.vhead_dim = embed_dim // num_heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * embed_dim, embed_dim) / math.sqrt(embed_dim))
        self.vbias = vbias or None
        if vbias:
            self.value_bias_weight = nn.Parameter(torch.randn(embed_dim))
        self.dropout_att, self.out_proj = nn.Dropout(dropout), nn.Linear(embed_dim, embed_dim)
        self.linear_pos = nn.Linear(embed_dim, embed_dim, bias=False)
        self.pos_bias_u, self.pos_bias_v = (nn.Parameter(torch.randn(self.head_dim, num_heads)) for _ in range(2))

    def rel_shift(self, x):
        return gathered(x, x.shape[-1] // 2 + 1)

    def forward(self, query, key, value, pos_embs, key_padding_mask=None, attn_mask=None, return_attn_weights=True):
        heads, size = self.num_heads, self.head_dim
        if torch.equal(query, key) and torch.equal(key, value):
            q, k, v = (query @ self.in_proj_weight.mT).unflatten(-1, (heads, 3 * size)).chunk(3, dim=-1)
        else:
            pairs = zip((query, key, value), self.in_proj_weight.chunk(3), strict=True)
            q, k, v = ((given @ weight.mT).unflatten(-1, (heads, size)) for given, weight in pairs)
        if self.vbias:
            v = v + self.value_bias_weight.view(heads, size)
        q, k, v, p = (x.transpose(1, 2) for x in (q, k, v, self.linear_pos(pos_embs).unflatten(-1, (heads, size))))
        content = (q + self.pos_bias_u.view(heads, 1, size)) @ k.mT
        position = (q + self.pos_bias_v.view(heads, 1, size)) @ p.mT
        scores = (content + self.rel_shift(position)) * self.scale
        hidden = torch.zeros(scores.shape, dtype=torch.bool)
        if attn_mask is not None:
            mask = attn_mask if attn_mask.dim() == 2 else attn_mask.view(scores.shape)
            scores, hidden = (scores, hidden | mask) if mask.dtype == torch.bool else (scores + mask, hidden)
        if key_padding_mask is not None:
            hidden = hidden | key_padding_mask[:, None, None]
        output, weights = weighted(scores, v, hidden, self.dropout_att)
        output = self.out_proj(output)
        return (output, weights) if return_attn_weights else output


# ---- icefall ----


class ScaledLinear(nn.Linear):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.weight_scale, self.bias_scale = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(-0.2))

    def get_weight(self):
        return self.weight * self.weight_scale.exp()

    def get_bias(self):
        return None if self.bias is None else self.bias * self.bias_scale.exp()

    def forward(self, x):
        return nn.functional.linear(x, self.get_weight(), self.get_bias())


@known_as("conformer", "RelPositionMultiheadAttention")
class IcefallAttention(nn.Module):
    """(L, B, E). The newer form scales the query before it adds u and v, and has parameters with scales of their own."""

    linear: type[nn.Linear] = ScaledLinear

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout, self.head_dim = num_heads, dropout, embed_dim // num_heads
        self.in_proj, self.out_proj = self.linear(embed_dim, 3 * embed_dim), self.linear(embed_dim, embed_dim)
        self.linear_pos = self.linear(embed_dim, embed_dim, bias=False)
        self.pos_bias_u, self.pos_bias_v = (nn.Parameter(torch.randn(num_heads, self.head_dim)) for _ in range(2))
        self.pos_bias_u_scale, self.pos_bias_v_scale = (nn.Parameter(torch.tensor(0.1)) for _ in range(2))

    def _pos_bias_u(self):
        return self.pos_bias_u * self.pos_bias_u_scale.exp()

    def _pos_bias_v(self):
        return self.pos_bias_v * self.pos_bias_v_scale.exp()

    def rel_shift(self, x, left_context=0):
        return gathered(x, x.shape[-2] + left_context)

    def forward(
        self, query, key, value, pos_emb, key_padding_mask=None, need_weights=False, attn_mask=None, left_context=0
    ):  # fmt: skip
        return self.attended(query, key, value, pos_emb, key_padding_mask, need_weights, attn_mask, left_context)

    def biased(self, q: Tensor) -> tuple[Tensor, Tensor]:
        q = q * self.head_dim**-0.5
        return q + self._pos_bias_u()[:, None], q + self._pos_bias_v()[:, None]

    def attended(self, query, key, value, pos_emb, key_padding_mask, need_weights, attn_mask, left_context):
        projected = (self.in_proj(given).chunk(3, dim=-1)[n] for n, given in enumerate((query, key, value)))
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0, 3) for x in projected)
        p = self.linear_pos(pos_emb).unflatten(-1, (self.num_heads, -1)).permute(0, 2, 3, 1)
        with_u, with_v = self.biased(q)
        scores = with_u @ k.mT + self.rel_shift(with_v @ p, left_context)
        hidden = torch.zeros(scores.shape, dtype=torch.bool)
        if attn_mask is not None:
            mask = attn_mask if attn_mask.dim() == 2 else attn_mask.view(scores.shape)
            scores, hidden = (scores, hidden | mask) if mask.dtype == torch.bool else (scores + mask, hidden)
        if key_padding_mask is not None:
            hidden = hidden | key_padding_mask[:, None, None]
        dropout = nn.Dropout(self.dropout).train(self.training)
        output, weights = weighted(scores, v, hidden, dropout)
        return self.out_proj(output.transpose(0, 1)), weights.mean(1) if need_weights else None


@known_as("conformer", "RelPositionMultiheadAttention")
class OldIcefallAttention(IcefallAttention):
    """Scaled after the sum; `streaming_conformer_ctc` calls the frames before the queries `offset`."""

    linear = nn.Linear

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__(embed_dim, num_heads, dropout)
        del self.pos_bias_u_scale, self.pos_bias_v_scale

    _pos_bias_u = property()  # type: ignore[assignment]  # as if it were not there
    _pos_bias_v = property()  # type: ignore[assignment]

    def biased(self, q):
        scale = self.head_dim**-0.5
        return (q + self.pos_bias_u[:, None]) * scale, (q + self.pos_bias_v[:, None]) * scale

    def forward(self, query, key, value, pos_emb, key_padding_mask=None, need_weights=True, attn_mask=None, offset=0):
        return self.attended(query, key, value, pos_emb, key_padding_mask, need_weights, attn_mask, offset)


@known_as("zipformer", "RelPositionMultiheadAttentionWeights")
class Zipformer(nn.Module):
    pass


@known_as("torchaudio.models.conformer")
class ConformerLayer(nn.Module):
    pass
