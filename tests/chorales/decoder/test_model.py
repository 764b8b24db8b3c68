"""The decoder's model: caching, padding, sampling, tables, what is saved."""

# ruff: noqa: E402 (what cannot be imported is skipped first)

import pytest

from tests.chorales.helpers import require

require("transformers", "accelerate", "tqdm")

import torch

from examples.chorales.data.tokens import IGNORED
from examples.chorales.decoder.languages import END, PAD
from examples.chorales.decoder.model import POSITIONS, MusicTransformer, MusicTransformerConfig

CLIP, TRAINED = 6, 16  # far below the lengths that are tried


@pytest.fixture(scope="module", params=POSITIONS)
def model(request):
    """A small model whose tables are large enough to matter."""
    torch.manual_seed(0)
    config = MusicTransformerConfig(
        vocab_size=40, positions=request.param, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_relative_position=CLIP, training_length=TRAINED,
    )  # fmt: skip
    model = MusicTransformer(config).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.project_in.weight.mul_(5)  # else all attention is nearly even, and nothing here could go wrong
            if layer.attention.rel_k is not None:
                layer.attention.rel_k.normal_(std=1)
    return model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 40, (2, 50), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_decoding_with_the_cache_equals_recomputation(model, tokens):
    """Beyond training length and clip, token by token and in chunks."""
    expected = model(tokens).logits
    for sizes in ([1] * 50, [20, 1, 1, 7, 1, 20]):
        cache, parts = None, []
        for part in tokens.split(sizes, dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_later_tokens_change_nothing(model, tokens):
    other = tokens.clone()
    other[:, 30:] = 3
    torch.testing.assert_close(model(other).logits[:, :30], model(tokens).logits[:, :30])
    assert not torch.allclose(model(other).logits[:, 30:], model(tokens).logits[:, 30:], atol=1e-2)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(model, tokens):
    """Also while decoding, where the cache holds the padding."""
    padded = torch.cat((torch.full((2, 9), PAD), tokens), dim=1)
    mask = (padded != PAD).long()
    expected = model(tokens).logits
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 9:], expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model(padded).logits[:, 9:], expected, atol=1e-2)  # without the mask it does
    first = model(padded[:, :20], attention_mask=mask[:, :20], use_cache=True)
    rest = model(padded[:, 20:], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, expected[:, 11:], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"attention_mask: expected \(2, 59\)"):
        model(padded, attention_mask=mask[:, 1:])


def test_the_cache_by_its_newer_name(model, tokens):
    """As generate() passes it on since transformers 5.24."""
    first = model(tokens[:, :20], use_cache=True)
    rest = model(tokens[:, 20:], cache=first.past_key_values)
    torch.testing.assert_close(rest.logits, model(tokens).logits[:, 20:])


@pytest.mark.parametrize("drawing", [dict(top_k=3), dict(top_p=0.6), dict(temperature=0.5), dict(num_beams=3, do_sample=False)])
def test_generate_is_the_same_with_and_without_cache(model, tokens, drawing):
    lengths = [20, 31]  # primes of two lengths in one batch, padded on the left
    prime = torch.full((2, 31), PAD)
    for row, length in enumerate(lengths):
        prime[row, 31 - length :] = tokens[row, :length]
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        options = dict(do_sample=True, suppress_tokens=[PAD, END], use_cache=use_cache) | drawing
        drawn.append(model.generate(prime, attention_mask=(prime != PAD).long(), max_new_tokens=25, **options))
    assert drawn[0].shape == (2, 56)
    assert torch.equal(*drawn)
    assert torch.equal(drawn[0][:, :31], prime)


@torch.no_grad()
def test_top_k_and_top_p_draw_what_they_promise(model, tokens):
    prime = tokens[:1, :8]
    torch.manual_seed(0)
    drawn = model.generate(prime, do_sample=True, top_k=3, max_length=60, eos_token_id=None)
    logits = model(drawn).logits[:, 7:-1]
    rank = (logits > logits.gather(-1, drawn[:, 8:, None])).sum(-1)
    assert rank.max() == 2
    torch.manual_seed(0)
    drawn = model.generate(prime, do_sample=True, top_k=0, top_p=0.5, max_length=60, eos_token_id=None)
    probability = model(drawn).logits[:, 7:-1].softmax(-1)
    before = torch.where(probability > probability.gather(-1, drawn[:, 8:, None]), probability, 0).sum(-1)
    assert 0.2 < before.max() < 0.5  # the likelier tokens alone do not make half
    greedy = model.generate(prime, do_sample=False, max_length=60, eos_token_id=None)
    torch.manual_seed(0)
    assert torch.equal(model.generate(prime, do_sample=True, top_k=1, max_length=60, eos_token_id=None), greedy)


@torch.no_grad()
def test_beams_find_likelier_music_than_greed(model, tokens):
    def log_likelihood(ids):
        return model(ids).logits[:, 7:-1].log_softmax(-1).gather(-1, ids[:, 8:, None]).sum()

    options = dict(do_sample=False, max_length=20, eos_token_id=None, use_cache=True)
    greedy, beams = (model.generate(tokens[:1, :8], num_beams=beams, **options) for beams in (1, 8))
    assert log_likelihood(beams) >= log_likelihood(greedy)


def test_other_caches_are_refused(model, tokens):
    with pytest.raises(TypeError, match="past_key_values: expected a DynamicCache, got StaticCache"):
        model.generate(tokens[:, :8], max_new_tokens=3, cache_implementation="static")


@torch.no_grad()
def test_tables_are_read_by_distance_back(tokens):
    """A row that outweighs the content draws all attention to its distance, the first row to all beyond the clip."""
    config = MusicTransformerConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, max_relative_position=CLIP
    )
    model = MusicTransformer(config).eval()
    attention = model.layers[0].attention
    attention.project_in.weight.zero_()
    attention.project_in.bias.zero_()
    attention.project_in.bias[:32] = 1  # every query is the same
    attention.rel_k.zero_()
    attention.rel_k[0, CLIP - 3] = 10
    attention.rel_k[1, 0] = 10
    near, far = model(tokens[:1], output_attentions=True).attentions[0][0]
    assert (near[torch.arange(3, 50), torch.arange(47)] > 0.99).all()
    assert (far[20, : 21 - CLIP].sum() > 0.99).all()
    torch.testing.assert_close(far[20, : 21 - CLIP], torch.full((21 - CLIP,), 1 / (21 - CLIP)))
    assert (far.triu(1) == 0).all()


def test_loss_is_that_of_the_next_token(model, tokens):
    labels = tokens.clone()
    labels[:, :10] = IGNORED
    output = model(tokens, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, 9:-1].flatten(0, 1), tokens[:, 10:].flatten())
    torch.testing.assert_close(output.loss, expected)
    with pytest.raises(ValueError, match="logits_to_keep: expected 0 beside labels"):
        model(tokens, labels=labels, logits_to_keep=1)


def test_saved_in_half_precision_and_loaded(model, tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    half = MusicTransformer(model.config).half()
    half.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(loaded) is MusicTransformer
    assert loaded.head.weight is loaded.embedding.weight
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded.eval()(tokens).logits, half.float().eval()(tokens).logits)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(positions="rotary"), "positions: expected one of relative, absolute, both, got 'rotary'"),
        (dict(hidden_size=30), "width: expected a multiple of twice the 4 heads, got 30"),
        (dict(max_relative_position=0), "max-relative-position: expected at least 1, got 0"),
    ],
)
def test_impossible_models_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        MusicTransformerConfig(**setting)
