"""The reference backend against attention layers of Hugging Face models and formulas of papers and old code.

Their own module computes, relative_attention gets its projections and its tables.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from relattn import relative_attention
from tests.oracles import close, inputs, random

HIDDEN, HEADS, LENGTH = 12, 3, 9
PADDING = torch.arange(LENGTH) < torch.tensor([[LENGTH], [6]])  # the second sequence has 6 tokens


def additive(seen: Tensor) -> Tensor:
    """(B, L) True = may attend, as the (B, 1, 1, L) mask that transformers adds to scores."""
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)[
        :, None, None, :
    ]


def randomised(module):
    """Double precision and every parameter random: biases that start at zero would hide u, v and their places."""
    with torch.no_grad():
        for index, parameter in enumerate(module.double().eval().parameters()):
            parameter.copy_(random(*parameter.shape, seed=100 + index) * 0.5)
    return module


def split(projected: Tensor, heads: int = HEADS) -> Tensor:
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


def merged(output: Tensor) -> Tensor:
    return output.transpose(1, 2).flatten(2)


def conformer_oracle(attention, **more) -> None:
    """wav2vec 2.0's layers: additive masks, linear_q/k/v/out."""
    x = random(2, LENGTH, HIDDEN)
    options = dict(attention_mask=additive(PADDING))
    if "relative_position_embeddings" in more:
        positions = options["relative_position_embeddings"] = more.pop("relative_position_embeddings").double()
        more["rel_k"] = split(attention.linear_pos(positions))[0]
        more |= dict(pos_bias_u=attention.pos_bias_u, pos_bias_v=attention.pos_bias_v)
    expected = attention(x, **options)[0]
    query, key, value = split(attention.linear_q(x)), split(attention.linear_k(x)), split(attention.linear_v(x))
    output = relative_attention(query, key, value, **more, key_mask=PADDING, backend="reference")
    close(attention.linear_out(merged(output)), expected, 1e-10)


@pytest.mark.parametrize("clip", [(3, 2), (0, 4), (64, 8)], ids=str)
def test_wav2vec2_bert_relative_key(clip) -> None:
    """w2v-BERT 2.0, Shaw's rel_k with a range of its own on each side; (64, 8) is the released model's, wider than the
    9 tokens.
    """
    modeling = pytest.importorskip("transformers.models.wav2vec2_bert.modeling_wav2vec2_bert")
    config = modeling.Wav2Vec2BertConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, position_embeddings_type="relative_key",
        left_max_position_embeddings=clip[0], right_max_position_embeddings=clip[1], attn_implementation="eager",
    )  # fmt: skip
    attention = randomised(modeling.Wav2Vec2BertSelfAttention(config))
    conformer_oracle(attention, rel_k=attention.distance_embedding.weight, max_relative_position=clip)


@pytest.mark.parametrize("model", ["wav2vec2_bert.Wav2Vec2Bert", "wav2vec2_conformer.Wav2Vec2Conformer"])
def test_wav2vec2_relative(model: str) -> None:
    """Transformer-XL's form: a projected sinusoid per distance, u in the content and v in the position product."""
    folder, name = model.split(".")
    modeling = pytest.importorskip(f"transformers.models.{folder}.modeling_{folder}")
    config = getattr(modeling, f"{name}Config")(
        hidden_size=HIDDEN, num_attention_heads=HEADS, position_embeddings_type="relative", max_source_positions=20,
        attn_implementation="eager",
    )  # fmt: skip
    attention = randomised(getattr(modeling, f"{name}SelfAttention")(config))
    positions = getattr(modeling, f"{name}RelPositionalEmbedding")(config)(torch.zeros(2, LENGTH, HIDDEN))
    conformer_oracle(attention, relative_position_embeddings=positions)


@pytest.mark.parametrize("key_heads", [3, 1])
def test_parakeet(key_heads: int) -> None:
    """FastConformer in Parakeet: as above by `_rel_shift`, the position term folded into a mask filled with finfo.min.
    """
    modeling = pytest.importorskip("transformers.models.parakeet.modeling_parakeet")
    # Its eager path takes the softmax in float32; sdpa keeps float64.
    config = modeling.ParakeetEncoderConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, attn_implementation="sdpa")
    config.num_key_value_heads = key_heads
    attention = randomised(modeling.ParakeetEncoderAttention(config, layer_idx=0))
    x = random(2, LENGTH, HIDDEN)
    positions = modeling.ParakeetEncoderRelPositionalEncoding(config)(x)
    expected = attention(x, positions, attention_mask=PADDING[:, None, None, :])[0]
    output = relative_attention(
        split(attention.q_proj(x)),
        split(attention.k_proj(x), key_heads),
        split(attention.v_proj(x), key_heads),
        split(attention.relative_k_proj(positions))[0],
        pos_bias_u=attention.bias_u,
        pos_bias_v=attention.bias_v,
        key_mask=PADDING,
        enable_gqa=True,
        backend="reference",
    )
    close(attention.o_proj(merged(output)), expected, 1e-10)


def test_vits() -> None:
    """VITS has Shaw's rel_v too; its tables are zero outside their range, which is one more row of zeros at each end.
    """
    modeling = pytest.importorskip("transformers.models.vits.modeling_vits")
    config = modeling.VitsConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, window_size=2, attention_dropout=0.0)
    attention = randomised(modeling.VitsAttention(config))
    x = random(2, LENGTH, HIDDEN)
    expected = attention(x, attention_mask=additive(PADDING).expand(2, 1, LENGTH, LENGTH))[0]
    rel_k, rel_v = (F.pad(table[0], (0, 0, 1, 1)) for table in (attention.emb_rel_k, attention.emb_rel_v))
    output = relative_attention(
        split(attention.q_proj(x)), split(attention.k_proj(x)), split(attention.v_proj(x)), rel_k, rel_v=rel_v,
        max_relative_position=3, key_mask=PADDING, backend="reference",
    )  # fmt: skip
    close(attention.out_proj(merged(output)), expected, 1e-10)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5s_buckets_as_a_table(bidirectional: bool) -> None:
    """T5's bucketed bias, one row per distance: added after the scale (T5's scale is 1)."""
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = modeling.T5Config(
        num_heads=HEADS, relative_attention_num_buckets=8, relative_attention_max_distance=6, is_decoder=False
    )
    attention = randomised(modeling.T5Attention(config, has_relative_attention_bias=True))
    attention.is_decoder = not bidirectional
    distances = torch.arange(-(LENGTH - 1), LENGTH)
    buckets = attention._relative_position_bucket(distances, bidirectional, 8, 6)
    query, key, value = inputs(2, HEADS, LENGTH, LENGTH, 4)
    expected = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention.compute_bias(LENGTH, LENGTH), scale=1.0
    )
    rel_bias = attention.relative_attention_bias.weight[buckets].T
    close(relative_attention(query, key, value, rel_bias=rel_bias, scale=1.0, backend="reference"), expected, 1e-10)


@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query"])
@pytest.mark.parametrize("decoding", [False, True])
def test_old_bert(kind: str, decoding: bool) -> None:
    """transformers 4's BertSelfAttention.forward, written out: rows by query - key, all terms divided by sqrt(D) after
    the sum.

    In decoding one query stands at the end of the cache.
    """
    limit = 7  # max_position_embeddings; the 6 tokens do not reach it (old BERT raises beyond)
    query, key, value = inputs(2, 3, 1 if decoding else 6, 6, 4)
    distance_embedding = random(2 * limit - 1, 4, seed=4)
    mask = additive(torch.arange(6) < torch.tensor([[6], [4]]))

    position_ids_l = torch.tensor([[5]]) if decoding else torch.arange(6).view(-1, 1)
    distance = position_ids_l - torch.arange(6).view(1, -1)
    positional_embedding = distance_embedding[distance + limit - 1]
    scores = query @ key.transpose(-1, -2) + torch.einsum("bhld,lrd->bhlr", query, positional_embedding)
    if kind == "relative_key_query":
        scores = scores + torch.einsum("bhrd,lrd->bhlr", key, positional_embedding)
    expected = (scores / math.sqrt(4) + mask).softmax(-1) @ value

    table = distance_embedding.flip(0)
    output = relative_attention(
        query, key, value, table, rel_q=table if kind == "relative_key_query" else None, attn_mask=mask,
        query_offset=5 if decoding else 0, backend="reference",
    )  # fmt: skip
    close(output, expected, 1e-10)
