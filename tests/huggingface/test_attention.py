"""The attention implementation "relattn": masks, weights, decoders, models without tables, what it refuses."""

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from transformers import (
    AttentionInterface,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    RobertaForMaskedLM,
    StaticCache,
)

from relattn.huggingface import attention, from_pretrained, relattn_attention, relattn_mask
from tests.huggingface.bert import HIDDEN, SMALL, batch, build

# ---- masks ----


@pytest.mark.parametrize("kind", [BertForMaskedLM, RobertaForMaskedLM])
def test_padding_is_not_attended_to(kind) -> None:
    model = build(kind)
    inputs = batch()
    before = model(**inputs).logits
    inputs["input_ids"][1, HIDDEN] = 7  # not RoBERTa's padding token: only the mask hides these
    after = model(**inputs).logits
    torch.testing.assert_close(after[0], before[0], atol=0, rtol=0)
    torch.testing.assert_close(after[1, :9], before[1, :9], atol=0, rtol=0)
    inputs["attention_mask"][1, HIDDEN] = 1
    assert (model(**inputs).logits[1, :9] - before[1, :9]).abs().max() > 0.01


@pytest.mark.parametrize(("kind", "causal"), [(BertForMaskedLM, False), (BertLMHeadModel, True)])
def test_padding_stays_a_row_per_sequence(kind, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind, is_decoder=causal)
    calls = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        calls.append(attention_mask)
        return relattn_attention(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "relattn", spy)
    inputs = batch()
    model(**inputs)
    assert [tuple(mask.shape) for mask in calls] == [(2, 14)] * 2
    assert all(torch.equal(mask, inputs["attention_mask"].bool()) for mask in calls)
    calls.clear()
    model(inputs["input_ids"])
    assert calls == [None, None]


LENGTHS = (5, 1, 7, 3)


def packed(kwargs: bool) -> tuple[dict, list[torch.Tensor]]:
    """What transformers' flattening collator makes of some sequences, without what needs a particular model, and each of them."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randint(5, 40, (length,), generator=generator) for length in LENGTHS]
    features = [{"input_ids": part.tolist()} for part in parts]
    made = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=kwargs)(features)
    return {name: value for name, value in made.items() if name != "labels"}, [part[None] for part in parts]


def assert_one_at_a_time(model: nn.Module, inputs: dict, parts: list[torch.Tensor]) -> None:
    model.double()  # some gradients are zero only because their terms cancel
    together = model(**inputs).logits
    alone = torch.cat([model(part).logits for part in parts], 1)
    torch.testing.assert_close(together, alone)
    model.zero_grad()
    together.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone.square().sum().backward()
    assert gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertLMHeadModel])
def test_packed_sequences_of_models_with_tables(kind) -> None:
    """Which are computed one by one, so that distances are those of each."""
    model = build(kind, is_decoder=kind is BertLMHeadModel)
    assert_one_at_a_time(model, *packed(kwargs=True))


@pytest.mark.parametrize("kwargs", [False, True])
def test_packed_sequences_of_decoders(kwargs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only position_ids that start anew say that they are: without an L x L mask."""
    masks = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return relattn_attention(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "relattn", spy)
    model = MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=1, sliding_window=None, use_cache=False)).eval()
    model.set_attn_implementation("relattn")
    inputs, parts = packed(kwargs)
    assert_one_at_a_time(model, inputs, parts)
    assert masks[0].tolist() == [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    # Two rows at a time: what is packed lies one row after the other.
    rows = {name: inputs[name].expand(2, -1) for name in ("input_ids", "position_ids")}
    torch.testing.assert_close(model(**rows).logits, model(**inputs).logits.expand(2, -1, -1))
    # With weights, which come from a whole mask.
    output = model(**inputs, output_attentions=True)
    torch.testing.assert_close(output.logits, model(**inputs).logits)
    assert output.attentions[0][0, 0, 8, :6].abs().max() == 0


def test_packed_sequences_by_positions_alone() -> None:
    """An encoder's, which gets position_ids: as transformers' FlashAttention takes them."""
    module = nn.Module()
    module.is_causal = False
    query, key, value = (torch.randn(1, 2, sum(LENGTHS), 8) for _ in range(3))
    positions = torch.cat([torch.arange(length) + 2 for length in LENGTHS])[None]
    output, _ = relattn_attention(module, query, key, value, None, position_ids=positions)
    start = 0
    for length in LENGTHS:
        part = (tensor[:, :, start : start + length] for tensor in (query, key, value))
        torch.testing.assert_close(output[:, start : start + length], relattn_attention(module, *part, None)[0])
        start += length


def test_a_mask_of_every_query_is_honoured() -> None:
    model = build(dtype=torch.float64)
    ids = batch()["input_ids"]
    window = (torch.arange(14)[:, None] - torch.arange(14)).abs() <= 2
    boolean = model(ids, attention_mask=window.expand(2, 1, 14, 14)).logits
    added = torch.zeros(2, 1, 14, 14, dtype=torch.float64).masked_fill(~window, torch.finfo(torch.float64).min)
    torch.testing.assert_close(model(ids, attention_mask=added).logits, boolean)
    ids[:, 13] = 5
    changed = model(ids, attention_mask=window.expand(2, 1, 14, 14)).logits != boolean
    assert changed.any(-1).any(0).tolist() == [False] * 9 + [True] * 5  # two layers of reach 2
    with pytest.raises(ValueError, match=r"attention_mask: .*\(2, 14, 14\)"):
        model(ids, attention_mask=window.expand(2, 14, 14))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_without_tables_it_is_sdpa(causal: bool, padded: bool) -> None:
    model = build(BertLMHeadModel, relative=False, is_decoder=causal, dtype=torch.float64)
    inputs = batch() if padded else {"input_ids": batch()["input_ids"]}
    expected = model(**inputs).logits
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("relattn")
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("window", [None, 4])
def test_without_tables_it_is_sdpa_in_grouped_query_decoders(window: int | None) -> None:
    sizes = dict(vocab_size=53, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = MistralConfig(**sizes, intermediate_size=48, sliding_window=window, max_position_embeddings=64)
    model = MistralForCausalLM(config).double().eval()
    inputs = batch()
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)  # left padding, as for generation
    seen = inputs["attention_mask"].bool()
    expected = model(**inputs).logits[seen]
    continued = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
    static = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0, cache_implementation="static")
    model.set_attn_implementation("relattn")
    torch.testing.assert_close(model(**inputs).logits[seen], expected, atol=1e-12, rtol=1e-12)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0), continued)
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, cache_implementation="static")
    assert torch.equal(model.generate(**inputs, **options), static)


# ---- a causal decoder ----


def test_decoding_with_a_cache_equals_the_full_pass() -> None:
    model = build(BertLMHeadModel, is_decoder=True, max_relative_position=(4, 0), dtype=torch.float64)
    ids = batch(40)["input_ids"]  # also longer than max_position_embeddings
    full = model(ids, use_cache=False).logits
    cache, pieces = None, []
    for start, stop in ((0, 10), (10, 11), (11, 17), (17, 40)):  # a prefix, one step, several steps
        out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), full, atol=1e-12, rtol=1e-12)

    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert expected.shape == (2, 48)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)


def test_a_cache_with_room_at_its_end_is_refused() -> None:
    model = build(BertLMHeadModel, is_decoder=True, max_relative_position=(4, 0))
    cache = StaticCache(config=model.config, max_cache_len=30)
    with pytest.raises(ValueError, match=r"past_key_values: .*DynamicCache"):
        model(batch()["input_ids"], past_key_values=cache, use_cache=True)


# ---- weights, biases of positions, what is refused ----


@pytest.mark.parametrize("by_config", [False, True])
def test_attention_weights_are_real(by_config: bool) -> None:
    # A class that no other test makes: transformers knows which outputs to capture only for classes it saw constructed.
    kind = BertForSequenceClassification if by_config else BertForTokenClassification
    model = build(kind, config=kind.config_class(**SMALL, output_attentions=by_config))
    inputs = batch()
    output = model(**inputs) if by_config else model(**inputs, output_attentions=True)
    assert len(output.attentions) == 2
    for weights in output.attentions:
        assert weights.shape == (2, 4, 14, 14)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 14))
        assert not weights[1, :, :, HIDDEN].any()
    torch.testing.assert_close(model(**inputs, output_attentions=False).logits, output.logits)


@pytest.mark.parametrize("causal", [False, True])
def test_a_position_bias_falls_through(causal: bool, caplog) -> None:
    attention._log_position_bias.cache_clear()
    sizes = dict(d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, vocab_size=53, dropout_rate=0.0)
    eager, model = (
        transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, attn_implementation=name))
        .double()
        .eval()
        for name in ("eager", "relattn")
    )
    model.load_state_dict(eager.state_dict())
    if not causal:
        eager, model = eager.encoder, model.encoder
    inputs = batch()
    if causal:
        inputs["decoder_input_ids"] = torch.randint(3, 53, (2, 6))
    seen = slice(None) if causal else inputs["attention_mask"].bool()
    expected = eager(**inputs, output_attentions=True)
    found = model(**inputs)
    torch.testing.assert_close(found[0][seen], expected[0][seen], atol=1e-9, rtol=1e-9)
    weights = model(**inputs, output_attentions=True)
    name = "decoder_attentions" if causal else "attentions"
    torch.testing.assert_close(weights[name][0], expected[name][0], atol=1e-6, rtol=1e-6)
    assert sum("hands over a position_bias" in message for message in caplog.messages) >= 1


def test_another_attention_is_refused(tmp_path: Path) -> None:
    model = build()
    for name in ("sdpa", "eager", "flex_attention"):
        with pytest.raises(ValueError, match=rf"attn_implementation: .*got '{name}'"):
            model.set_attn_implementation(name)
    model.set_attn_implementation("relattn")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"attn_implementation: .*got 'eager'"):
        from_pretrained(tmp_path, attn_implementation="eager")


@pytest.mark.parametrize("name", ["softcap", "s_aux", "cache"])
def test_what_it_cannot_honour_is_refused(name: str) -> None:
    query = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match=f"{name}: attn_implementation='relattn' "):
        relattn_attention(nn.Identity(), query, query, query, None, **{name: torch.zeros(1, 2, 3, 3)})
    assert relattn_attention(nn.Identity(), query, query, query, None, **{name: None})[0].shape == (1, 3, 2, 4)


def test_mask_of_padding_is_cut_and_filled_to_the_keys() -> None:
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    assert relattn_mask(2, 6, 6, attention_mask=mask).shape == (2, 6)
    assert relattn_mask(2, 2, 4, q_offset=4, kv_offset=2, attention_mask=mask)[1].tolist() == [True, True, False, False]
    assert relattn_mask(2, 2, 8, q_offset=6, attention_mask=mask)[0].tolist() == [True] * 6 + [False] * 2
    assert relattn_mask(2, 2, 8, q_offset=0).shape == (2, 1, 2, 8)  # room at the end: no shortcut
