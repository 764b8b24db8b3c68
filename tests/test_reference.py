"""The reference backend, on which every other one is tested, against oracles that share nothing with it: the definition in loops,
torch's own attention, the attention layers of Hugging Face models, the formulas of papers and old code, known answers of Philox."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import relattn
from relattn import philox, relative_attention
from tests import draws
from tests.oracles import FLOATS, attend, calls, close, definition, every_backend, everything, precision


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(batch: int, heads: int, query_length: int, key_length: int, size: int, key_heads: int | None = None) -> tuple:
    key_heads = heads if key_heads is None else key_heads
    return (
        random(batch, heads, query_length, size, seed=1),
        random(batch, key_heads, key_length, size, seed=2),
        random(batch, key_heads, key_length, size, seed=3),
    )


# The definition


@settings(max_examples=300)
@draws.given
def test_equals_the_definition_in_loops(draw) -> None:
    call = calls(draw)
    output, lse = relative_attention(**call, return_lse=True, backend="reference")
    expected, expected_lse = definition(**call)
    close(output, expected, 1e-12)
    close(lse, expected_lse, 1e-12)


@pytest.mark.parametrize("term", ["rel_k", "rel_q", "rel_v", "rel_bias", "pos_bias_u", "pos_bias_v"])
def test_every_term_reaches_the_definition(term: str) -> None:
    """Guards the oracle: without a term the definition in loops gives another result, so the comparison above can see it."""
    call = everything()
    whole, without = definition(**call)[0], definition(**{name: value for name, value in call.items() if name != term})[0]
    assert (whole - without).abs().max() > 0.01
    close(relative_attention(**call, backend="reference"), whole, 1e-12)


def test_by_hand() -> None:
    """One query, two keys, numbers small enough for paper: d = -1, 0 at offset 1; scores 0.5 * (2 * 1 + 2 * 3) + 0.25 and 0.5 * 2 * 2."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    key, value = torch.tensor([1.0, 2.0]).double().view(1, 1, 2, 1), torch.tensor([10.0, 20.0]).double().view(1, 1, 2, 1)
    output, lse = relative_attention(
        2 * one, key, value, torch.tensor([[3.0], [0.0]]).double(), rel_bias=torch.tensor([0.25, 0.0]).double(),
        max_relative_position=(1, 0), query_offset=1, scale=0.5, return_lse=True, backend="reference",
    )  # fmt: skip
    first, second = math.exp(4.25), math.exp(2.0)
    assert output.item() == pytest.approx((10 * first + 20 * second) / (first + second), abs=1e-13)
    assert lse.item() == pytest.approx(math.log(first + second), abs=1e-13)


# torch's attention. 5 x 9 and 9 x 5: either length the longer one; 4 heads of 2 key heads.


@every_backend
@pytest.mark.parametrize("lengths", [(7, 7), (5, 9), (9, 5)], ids=str)
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_without_relative_terms_it_is_sdpa(backend: str, lengths, mask: str, key_heads: int) -> None:
    query, key, value = inputs(2, 4, *lengths, 6, key_heads)
    options = {}
    if mask == "causal":
        options = dict(is_causal=True)
    elif mask == "bool":
        options = dict(attn_mask=(random(2, 1, *lengths) > 0) | torch.eye(*lengths, dtype=torch.bool).cumsum(-1).bool())
        options["attn_mask"][..., 0] = True  # SDPA gives NaN or 0 by version where nothing is seen
    elif mask == "float":
        options = dict(attn_mask=random(4, *lengths, seed=5))
    expected = F.scaled_dot_product_attention(query, key, value, scale=0.3, enable_gqa=True, **options)
    if mask == "causal":
        options["query_offset"] = 0  # SDPA's is_causal aligns the first query with the first key
    close(attend(backend, query=query, key=key, value=value, scale=0.3, enable_gqa=True, **options), expected, precision(backend))


@every_backend
def test_the_default_scale_is_sdpas(backend: str) -> None:
    query, key, value = inputs(1, 2, 4, 4, 5)  # 5: no power of two, so that 1 / sqrt(D) is told from 1 / D and 1
    close(attend(backend, query=query, key=key, value=value), F.scaled_dot_product_attention(query, key, value), precision(backend))


@every_backend
@pytest.mark.parametrize("lengths", [(6, 6), (4, 9), (9, 4), (1, 7)], ids=str)
@pytest.mark.parametrize("clip", [(2, 2), (0, 3), (3, 0), (12, 12)], ids=str)
@pytest.mark.parametrize("offset", [0, 3, -2])
def test_relative_terms_as_a_dense_mask_of_sdpa(backend: str, lengths, clip, offset: int) -> None:
    """rel_k, rel_q and rel_bias looked up entry by entry and handed to SDPA. (12, 12) is wider than any distance."""
    query, key, value = inputs(2, 3, *lengths, 4)
    rows = sum(clip) + 1
    rel_k, rel_q, rel_bias = random(3, rows, 4, seed=5), random(rows, 4, seed=6), random(3, rows, seed=7)
    dense = torch.empty(2, 3, *lengths, dtype=torch.float64)
    for i in range(lengths[0]):
        for j in range(lengths[1]):
            row = min(max(j - i - offset, -clip[0]), clip[1]) + clip[0]
            products = (query[:, :, i] * rel_k[:, row]).sum(-1) + (key[:, :, j] * rel_q[row]).sum(-1)
            dense[:, :, i, j] = products / 2 + rel_bias[:, row]  # 2 = sqrt(D); the bias is not scaled
    call = dict(query=query, key=key, value=value, rel_k=rel_k, rel_q=rel_q, rel_bias=rel_bias)
    result = attend(backend, **call, max_relative_position=clip, query_offset=offset)
    close(result, F.scaled_dot_product_attention(query, key, value, attn_mask=dense), precision(backend))


def test_the_log_sum_exp_joins_two_halves_of_the_keys() -> None:
    """What lse is for: attention over all keys from that over each half. float32 for float32 and below, float64 for float64."""
    call = everything(key_length=8)
    key, value = call.pop("key"), call.pop("value")
    whole, whole_lse = relative_attention(key=key, value=value, **call, return_lse=True, backend="reference")
    parts = []
    for start in (0, 4):  # key 4 of the whole is key 0 of the second half: the queries stand 4 earlier there
        half = dict(key=key[:, :, start : start + 4], value=value[:, :, start : start + 4])
        parts.append(relative_attention(**half, **call, query_offset=-start, return_lse=True, backend="reference"))
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    close(lse, whole_lse, 1e-12)
    close(sum(output * (part - lse).exp()[..., None] for output, part in parts), whole, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    """Output of query's dtype, lse float32, float32 tables beside half precision with float32 gradients; errors of rounding's size."""
    call = everything(dtype=dtype, grad=True)
    call["rel_k"], call["rel_bias"] = (call[name].detach().float().requires_grad_() for name in ("rel_k", "rel_bias"))
    output, lse = relative_attention(**call, return_lse=True, backend="reference")
    assert (output.dtype, lse.dtype) == (dtype, torch.float32)
    (output.float().sum() + lse.sum()).backward()
    assert {call[name].grad.dtype for name in ("rel_k", "rel_bias")} == {torch.float32}
    expected, expected_lse = definition(**call)
    tolerance = 40 * torch.finfo(dtype).eps  # sums of a dozen products, each a few times 1
    close(output.double(), expected, tolerance)
    close(lse.double(), expected_lse, tolerance)


# Shaw's form and the skew


@pytest.mark.parametrize(("queries", "keys", "clip", "offset"), [(6, None, 2, 0), (4, 7, 3, 3), (7, 4, 9, -2), (1, 5, 1, 4)])
def test_shaws_form(queries: int, keys: int | None, clip: int, offset: int) -> None:
    query, rel_k = random(2, 3, queries, 4), random(2 * clip + 1, 4, seed=1)
    scores = relattn.shaw_relative_scores(query, rel_k, keys, max_relative_position=clip, query_offset=offset)
    keys = queries if keys is None else keys
    assert scores.shape == (2, 3, queries, keys)
    for i in range(queries):
        for j in range(keys):
            row = max(0, min(2 * clip, j - i - offset + clip))
            close(scores[:, :, i, j], query[:, :, i] @ rel_k[row], 1e-13)


@pytest.mark.parametrize("length", [1, 6, 7])
def test_shaws_form_the_skew_and_the_operator_agree(length: int) -> None:
    """Three ways to one term: Shaw's (L, L, D) tensor, Music Transformer's Q E^T and skew, and the operator's own."""
    query, key, value = inputs(2, 2, length, length, 4)
    rel_k = random(2 * length - 1, 4, seed=4)
    shaw = relattn.shaw_relative_scores(query, rel_k, max_relative_position=length - 1)
    close(relattn.skew(query @ rel_k.T), shaw, 1e-13)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=shaw / 2)
    close(relative_attention(query, key, value, rel_k, backend="reference"), expected, 1e-13)


# Even, odd and single lengths; more keys and fewer keys than queries. A skew that is right for one parity only is a known bug.
SKEWS = [(1, 1), (2, 2), (3, 3), (6, 6), (7, 7), (1, 5), (5, 1), (4, 9), (9, 4), (2, 3), (3, 2)]
sizes = pytest.mark.parametrize(("queries", "keys"), SKEWS, ids=str)
causal_sizes = pytest.mark.parametrize(("queries", "keys"), [pair for pair in SKEWS if pair[0] <= pair[1]], ids=str)


def numbered(*shape: int) -> Tensor:
    """1, 2, 3, ...: every entry tells where it came from, and none is a padding's 0."""
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).view(shape)


@sizes
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)], ids=str)
def test_skew_by_index_arithmetic(queries: int, keys: int, leading) -> None:
    scores = numbered(*leading, queries, queries + keys - 1)
    skewed = relattn.skew(scores)
    assert skewed.shape == (*leading, queries, keys)
    for i in range(queries):
        for j in range(keys):
            assert torch.equal(skewed[..., i, j], scores[..., i, j - i + queries - 1])


@causal_sizes
def test_causal_skew_by_index_arithmetic(queries: int, keys: int) -> None:
    """The last column is distance 0 and the last query stands at the last key: query i stands at key i + Lk - Lq."""
    scores = numbered(2, queries, keys)
    skewed = relattn.skew(scores, is_causal=True)
    assert skewed.shape == scores.shape
    for i in range(queries):
        for j in range(keys):
            distance = j - (i + keys - queries)
            expected = scores[:, i, keys - 1 + distance] if distance <= 0 else torch.zeros(2, dtype=torch.float64)
            assert torch.equal(skewed[:, i, j], expected)


@sizes
def test_unskew_is_the_inverse_and_the_transpose_of_skew(queries: int, keys: int) -> None:
    by_key, by_distance = random(2, queries, keys), random(2, queries, queries + keys - 1, seed=1)
    spread = relattn.unskew(by_key)
    assert spread.shape == by_distance.shape
    assert torch.equal(relattn.skew(spread), by_key)
    # <skew(a), b> = <a, unskew(b)>: so the two are each other's gradients, and unskew is zero where no key has the distance.
    close((relattn.skew(by_distance) * by_key).sum(), (by_distance * spread).sum(), 1e-12)
    assert (spread != 0).sum() == by_key.numel()


@causal_sizes
def test_causal_unskew_is_the_inverse_and_the_transpose(queries: int, keys: int) -> None:
    by_key, by_distance = random(2, queries, keys), random(2, queries, keys, seed=1)
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    spread = relattn.unskew(by_key, is_causal=True)
    assert spread.shape == by_distance.shape
    assert torch.equal(relattn.skew(spread, is_causal=True), by_key * seen)
    close((relattn.skew(by_distance, is_causal=True) * by_key).sum(), (by_distance * spread).sum(), 1e-12)


@pytest.mark.parametrize("function", [relattn.skew, relattn.unskew])
@pytest.mark.parametrize(("shape", "is_causal"), [((2, 3, 7), False), ((1, 4), False), ((3, 5), True)])
def test_skew_and_unskew_are_differentiable_twice(function, shape, is_causal: bool) -> None:
    scores = random(*shape).requires_grad_()
    assert gradcheck(lambda x: function(x, is_causal=is_causal), scores)
    assert gradgradcheck(lambda x: function(x, is_causal=is_causal).square(), scores)


def test_skew_takes_any_memory_layout() -> None:
    scores = numbered(9, 2, 5).permute(1, 2, 0)
    assert not scores.is_contiguous()
    assert torch.equal(relattn.skew(scores), relattn.skew(scores.contiguous()))
    by_key = scores[..., :6]
    assert torch.equal(relattn.unskew(by_key), relattn.unskew(by_key.contiguous()))


class OnlyFloats(TorchDispatchMode):
    """Fails on any operation that yields something else than floating point: an index tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        assert result.is_floating_point(), f"{function} made {result.dtype} {tuple(result.shape)}"
        return result


def test_skew_needs_no_index_and_copies_nothing() -> None:
    scores = random(6, 11)
    with OnlyFloats():
        skewed = relattn.skew(scores)
        for result in (relattn.skew(scores, is_causal=True), relattn.unskew(skewed), relattn.unskew(skewed, is_causal=True)):
            assert result.dtype == scores.dtype
    assert skewed.untyped_storage().data_ptr() == scores.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("function", "shape", "is_causal", "message"),
    [
        (relattn.skew, (2, 5, 4), False, r"^scores: expected \(..., 5, 5 \+ Lk - 1\), got \(2, 5, 4\)"),
        (relattn.skew, (5, 4), True, r"^scores: expected \(..., 5, Lk\) with Lk >= 5, got \(5, 4\)"),
        (relattn.unskew, (5, 4), True, r"^scores: expected \(..., 5, Lk\) with Lk >= 5, got \(5, 4\)"),
    ],
)
def test_skew_refuses_too_few_columns(function, shape, is_causal: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(shape), is_causal=is_causal)


@pytest.mark.parametrize("keys", [1, 5])
def test_skew_of_no_queries(keys: int) -> None:
    assert relattn.skew(torch.zeros(2, 0, keys - 1)).shape == (2, 0, keys)
    assert relattn.unskew(torch.zeros(2, 0, keys)).shape == (2, 0, keys - 1)


@pytest.mark.parametrize("function", [relattn.skew, relattn.unskew])
def test_skew_refuses_one_dimension(function) -> None:
    with pytest.raises(ValueError, match=r"^scores: .*\(5,\)"):
        function(torch.zeros(5))


@pytest.mark.parametrize("rows", [4, 7])
def test_shaws_form_refuses_a_table_that_does_not_fit(rows: int) -> None:
    with pytest.raises(ValueError, match=rf"^rel_k: .*5.*{rows}"):
        relattn.shaw_relative_scores(random(1, 1, 3, 2), random(rows, 2), max_relative_position=2)


def published_skew(scores: Tensor) -> Tensor:
    """Huang et al. 2018, section 3.4.1: pad a column on the left, reshape to (L + 1, L), drop the first row."""
    *leading, length, _ = scores.shape
    return F.pad(scores, (1, 0)).reshape(*leading, length + 1, length)[..., 1:, :]


@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_music_transformers_published_skew_agrees_below_the_diagonal(length: int) -> None:
    query, key, value = inputs(2, 2, length, length, 4)
    rel_k = random(length, 4, seed=4)  # distances -(L - 1) ... 0
    published = published_skew(query @ rel_k.T)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    assert torch.equal(relattn.skew(query @ rel_k.T, is_causal=True)[..., seen], published[..., seen])
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=(published / 2).masked_fill(~seen, -math.inf))
    call = dict(max_relative_position=(length - 1, 0), is_causal=True, backend="reference")
    close(relative_attention(query, key, value, rel_k, **call), expected, 1e-13)


# Hugging Face layers: their own module computes, relative_attention gets its projections and its tables

HIDDEN, HEADS, LENGTH = 12, 3, 9
PADDING = torch.arange(LENGTH) < torch.tensor([[LENGTH], [6]])  # the second sequence has 6 tokens


def additive(seen: Tensor) -> Tensor:
    """(B, L) True = may attend, as the (B, 1, 1, L) mask that transformers adds to scores."""
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)[:, None, None, :]


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
    """w2v-BERT 2.0, Shaw's rel_k with a range of its own on each side; (64, 8) is the released model's, wider than the 9 tokens."""
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
    """FastConformer in Parakeet: as above by `_rel_shift`, the position term folded into a mask filled with finfo.min."""
    modeling = pytest.importorskip("transformers.models.parakeet.modeling_parakeet")
    # Its eager path takes the softmax in float32; sdpa keeps float64.
    config = modeling.ParakeetEncoderConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, attn_implementation="sdpa")
    config.num_key_value_heads = key_heads
    attention = randomised(modeling.ParakeetEncoderAttention(config, layer_idx=0))
    x = random(2, LENGTH, HIDDEN)
    positions = modeling.ParakeetEncoderRelPositionalEncoding(config)(x)
    expected = attention(x, positions, attention_mask=PADDING[:, None, None, :])[0]
    output = relative_attention(
        split(attention.q_proj(x)), split(attention.k_proj(x), key_heads), split(attention.v_proj(x), key_heads),
        split(attention.relative_k_proj(positions))[0],
        pos_bias_u=attention.bias_u, pos_bias_v=attention.bias_v, key_mask=PADDING, enable_gqa=True, backend="reference",
    )  # fmt: skip
    close(attention.o_proj(merged(output)), expected, 1e-10)


def test_vits() -> None:
    """VITS has Shaw's rel_v too; its tables are zero outside their range, which is one more row of zeros at each end."""
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
    config = modeling.T5Config(num_heads=HEADS, relative_attention_num_buckets=8, relative_attention_max_distance=6, is_decoder=False)
    attention = randomised(modeling.T5Attention(config, has_relative_attention_bias=True))
    attention.is_decoder = not bidirectional
    distances = torch.arange(-(LENGTH - 1), LENGTH)
    buckets = attention._relative_position_bucket(distances, bidirectional, 8, 6)
    query, key, value = inputs(2, HEADS, LENGTH, LENGTH, 4)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=attention.compute_bias(LENGTH, LENGTH), scale=1.0)
    rel_bias = attention.relative_attention_bias.weight[buckets].T
    close(relative_attention(query, key, value, rel_bias=rel_bias, scale=1.0, backend="reference"), expected, 1e-10)


@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query"])
@pytest.mark.parametrize("decoding", [False, True])
def test_old_bert(kind: str, decoding: bool) -> None:
    """transformers 4's BertSelfAttention.forward, written out: rows by query - key, all terms divided by sqrt(D) after the sum.

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


# Dropout's generator

PI = ((0xA4093822, 0x299F31D0), (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344))
ONES = 0xFFFFFFFF
# Random123's kat_vectors for philox4x32, of 7 rounds (dropout's) and 10.
KNOWN_ANSWERS = [
    (7, (0, 0), (0, 0, 0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (ONES, ONES), (ONES,) * 4, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, *PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, (0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (ONES, ONES), (ONES,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, *PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("rounds", "key", "counter", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(rounds, key, counter, answer) -> None:
    counter = tuple(torch.tensor(word) for word in counter)
    assert tuple(map(int, philox.philox_4x32(key, counter, rounds))) == answer
    assert tuple(map(int, philox.philox_4x32(tuple(map(torch.tensor, key)), counter, rounds))) == answer


def plain_philox(key: list[int], counter: list[int]) -> list[int]:
    """Salmon et al. 2011 in Python integers, which do not wrap."""
    for _ in range(7):
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def keep(seed: int, dropout_p: float, batch: int, heads: int, queries: int, start: int, stop: int) -> Tensor:
    """(batch, heads, queries, stop - start)"""
    index = torch.arange(batch)[:, None, None], torch.arange(heads)[:, None], torch.arange(queries)
    return philox.dropout_keep(torch.tensor(seed), dropout_p, *index, start, stop)


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 + 5, 2**63 - 2], ids=hex)
def test_a_weight_survives_by_its_seed_and_place(seed: int) -> None:
    """The contract between backends: key = the seed's halves, low first; counter = (b, h, i, j // 4), word j % 4; kept if >= p * 2^32."""
    kept = keep(seed, 0.4, 2, 3, 5, 0, 11)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, kept.shape)).tolist():
        word = plain_philox([seed % 2**32, seed >> 32], [b, h, i, j // 4])[j % 4]
        assert kept[b, h, i, j] == (word >= round(0.4 * 2**32))


@settings(max_examples=150)
@draws.given
def test_dropout_does_not_depend_on_how_keys_are_cut(draw) -> None:
    """Ranges that start and end anywhere in a group of four."""
    start, stop = sorted(draw(st.integers(0, 37)) for _ in range(2))
    seed, dropout_p = draw(st.integers(0, 2**63 - 2)), draw(st.sampled_from((0.1, 0.5)))
    assert torch.equal(keep(seed, dropout_p, 2, 2, 3, start, stop), keep(seed, dropout_p, 2, 2, 3, 0, 37)[..., start:stop])


@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.5, 0.9])
def test_dropout_keeps_the_right_share_independently(dropout_p: float) -> None:
    """2 * 4 * 128 * 512 = 2^19 draws of a fixed seed, within five standard deviations; and no two neighbours in any direction move
    together (a word used twice, or a counter that misses an index, gives a correlation of 1)."""
    kept = keep(1234567890123456789, dropout_p, 2, 4, 128, 0, 512).double()
    deviation = math.sqrt(dropout_p * (1 - dropout_p))
    assert abs(kept.mean() - (1 - dropout_p)) < 5 * deviation / math.sqrt(kept.numel())
    centred = (kept - (1 - dropout_p)) / deviation
    for dim in range(4):
        for step in {1, 2, 3, 4} if dim == 3 else {1}:
            product = centred.narrow(dim, step, kept.shape[dim] - step) * centred.narrow(dim, 0, kept.shape[dim] - step)
            assert abs(product.mean()) < 5 / math.sqrt(product.numel())
    for other in (1234567890123456789 + 1, 1234567890123456789 + 2**32):  # the low and the high half of the seed
        product = centred * (keep(other, dropout_p, 2, 4, 128, 0, 512).double() - (1 - dropout_p)) / deviation
        assert abs(product.mean()) < 5 / math.sqrt(product.numel())


def test_dropout_of_nothing_and_of_everything() -> None:
    assert keep(7, 0.0, 2, 2, 8, 0, 64).all()
    assert not keep(7, 1.0, 2, 2, 8, 0, 64).any()


@every_backend
def test_dropout_of_nothing_and_of_everything_in_attention(backend: str) -> None:
    call = everything()
    plain, lse = attend(backend, **call, return_lse=True)
    assert torch.equal(attend(backend, **call, dropout_p=0.0), plain)
    for value in call.values():
        value.requires_grad_()
    nothing, nothing_lse = attend(backend, **call, dropout_p=1.0, return_lse=True)
    assert torch.equal(nothing, torch.zeros_like(plain))  # and no NaN from 0 / (1 - p)
    close(nothing_lse, lse, precision(backend))  # before dropout
    nothing.sum().backward()
    assert all(not value.grad.any() for value in call.values())


@every_backend
def test_dropout_scales_the_weights_that_survive(backend: str) -> None:
    """Weights read off with an identity for values: each is 0 or the plain one / (1 - p), as Philox says for the seed drawn."""
    call = everything(key_length=6, value_size=6)
    call["value"] = torch.eye(6, dtype=torch.float64).expand(2, 2, 6, 6)
    del call["rel_v"]
    plain = attend(backend, **call)
    torch.manual_seed(3)
    dropped = attend(backend, **call, dropout_p=0.4)
    if backend != "triton":  # CUDA draws from a generator of its own
        torch.manual_seed(3)
        kept = keep(int(philox.draw_seed(torch.device("cpu"))), 0.4, 2, 2, 5, 0, 6)
        close(dropped, plain * kept / 0.6, precision(backend))
    assert 0 < (dropped == 0).sum() < dropped.numel()
    assert not torch.equal(attend(backend, **call, dropout_p=0.4), dropped)  # a new call draws a new seed


def test_dropout_drops_value_and_rel_v_alike() -> None:
    """w_ij multiplies v_j + rel_v: with rel_v = -v (all equal) nothing is left, whatever is dropped."""
    call = everything()
    call["value"], call["rel_v"] = torch.ones_like(call["value"]), -torch.ones_like(call["rel_v"])
    close(relative_attention(**call, dropout_p=0.5, backend="reference"), torch.zeros(2, 2, 5, 3, dtype=torch.float64), 1e-14)


def test_dropout_keeps_the_mean() -> None:
    """Over 400 seeds, within five of the mean's own standard deviations: without the 1 / (1 - p) half the entries are more than 10 off."""
    call = everything()
    torch.manual_seed(0)
    samples = torch.stack([relative_attention(**call, dropout_p=0.3, backend="reference") for _ in range(400)])
    deviations = (samples.mean(0) - relative_attention(**call, backend="reference")) / (samples.std(0) / 20)
    assert deviations.abs().max() < 5


# Derivatives

SETTINGS = {
    "plain": dict(),
    "causal": dict(is_causal=True, query_offset=1),
    "window": dict(window=(1, 1), query_offset=torch.tensor([2, -4])),  # the second sequence's last queries see nothing
    "masked": dict(key_mask=torch.tensor([[True, False, True, True], [False] * 4]), key_lengths=torch.tensor([3, 2])),
    "dropout": dict(dropout_p=0.4),
    "scale": dict(scale=0.3),
}


def differentiate(check, names, options) -> bool:
    call = everything(2, 2, 3, 4, 2, 2, clip=1, grad=True)
    if "attn_mask" in names:
        call["attn_mask"] = random(2, 1, 3, 4, seed=9).requires_grad_()

    def function(*tensors):
        torch.manual_seed(0)  # the same dropout at every evaluation
        changed = call | dict(zip(names, tensors, strict=True))
        output, lse = relative_attention(**changed, **options, return_lse=True, backend="reference")
        return output, lse.masked_fill(lse == -math.inf, 0.0)

    return check(function, tuple(call[name] for name in names))


@pytest.mark.parametrize("term", [*FLOATS, "attn_mask"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_gradients_by_differences(term: str, setting: str) -> None:
    assert differentiate(gradcheck, [term], SETTINGS[setting])


@pytest.mark.parametrize("term", [*FLOATS, "attn_mask"])
def test_second_derivatives_by_differences(term: str) -> None:
    """Each term against the query, so that mixed derivatives count too."""
    names = ["query"] if term == "query" else ["query", term]
    assert differentiate(gradgradcheck, names, SETTINGS["causal"])


def test_second_derivatives_where_rows_see_nothing() -> None:
    assert differentiate(gradgradcheck, ["query", "key", "rel_k"], SETTINGS["window"])


def test_gradients_of_grouped_queries() -> None:
    """4 query heads, 2 key heads: a key head's gradient is the sum over its two query heads."""
    query, key, value = (tensor.requires_grad_() for tensor in inputs(1, 4, 3, 3, 2, 2))
    rel_k = random(4, 3, 2, seed=4).requires_grad_()
    assert gradcheck(lambda *tensors: relative_attention(*tensors, enable_gqa=True, backend="reference"), (query, key, value, rel_k))


# Nothing to compute. Every term is there: reductions over nothing are where shapes go wrong.


@every_backend
@pytest.mark.parametrize(
    "sizes",
    [dict(query_length=0), dict(key_length=0), dict(batch=0), dict(heads=0), dict(query_length=0, key_length=0)],
    ids=lambda sizes: ", ".join(sizes),
)
def test_empty(backend: str, sizes) -> None:
    call = everything(**sizes, grad=True)
    output, lse = attend(backend, **call, return_lse=True)
    assert output.shape == (*call["query"].shape[:3], call["value"].shape[3])
    assert lse.shape == call["query"].shape[:3]
    assert torch.equal(output, torch.zeros_like(output))
    assert torch.equal(lse, torch.full_like(lse, -math.inf))
    (output.sum() + lse.sum()).backward()
    for name, value in call.items():
        assert value.grad is not None, name
        assert torch.equal(value.grad, torch.zeros_like(value)), name
