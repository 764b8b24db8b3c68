"""relattn.huggingface: BERT-like models with relative positions, against transformers 4's formula; their files."""

import copy
import inspect
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    MistralConfig,
    MistralForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    StaticCache,
)
from transformers.masking_utils import eager_mask

from relattn import huggingface
from relattn.huggingface import add_relative_positions, from_pretrained, relattn_attention, relattn_mask

SMALL = dict(vocab_size=53, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
SMALL |= dict(
    max_position_embeddings=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2
)
HIDDEN = slice(9, None)  # padded keys of the second row of `batch`


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(kind=BertForMaskedLM, *, relative=True, dtype=None, seed=0, config=None, **settings):
    torch.manual_seed(seed)
    names = inspect.signature(add_relative_positions).parameters
    options = {name: settings.pop(name) for name in list(settings) if name in names}
    model = kind(kind.config_class(**(SMALL | settings)) if config is None else config).to(dtype).eval()
    return add_relative_positions(model, **({"max_relative_position": 5} | options)) if relative else model


def batch(length: int = 14) -> dict[str, torch.Tensor]:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, HIDDEN] = 0
    return {"input_ids": torch.randint(3, 53, (2, length)), "attention_mask": mask}


# ---- the oracle: attention as BertSelfAttention of transformers 4 computed it ----


def old_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **_):
    """`position_embedding_type="relative_key_query"` of transformers 4: tables by query minus key; terms optional."""
    length = query.shape[2]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    left, right = module.clip  # of key minus query
    rows = distance.clamp(-right, left) + right
    scores = query @ key.transpose(-1, -2)
    for name, equation in (("rel_k", "bhld,{}lrd->bhlr"), ("rel_q", "bhrd,{}lrd->bhlr")):
        if name in module.distance_embedding:
            table = module.distance_embedding[name][..., rows, :]
            operands = (query if name == "rel_k" else key), table
            scores = scores + torch.einsum(equation.format("h" if table.dim() == 4 else ""), *operands)
    scores = scores / math.sqrt(query.shape[-1])
    if "rel_bias" in module.distance_embedding:
        scores = scores + module.distance_embedding["rel_bias"][..., rows]
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1)
    output = weights @ value
    if "rel_v" in module.distance_embedding:  # Shaw et al. 2018, equation 3
        table = module.distance_embedding["rel_v"][..., rows, :]
        output = output + torch.einsum("bhlr,hlrd->bhld" if table.dim() == 4 else "bhlr,lrd->bhld", weights, table)
    return output.transpose(1, 2).contiguous(), weights


AttentionInterface.register("old_relative_key", old_attention)
AttentionMaskInterface.register("old_relative_key", eager_mask)


def oracle_of(model):
    """A plain model with the same weights, tables flipped to query minus key, zeros where positions were removed."""
    kind = type(model).__mro__[2]
    sizes = SMALL if model.config.relative_attention["keep_absolute"] else SMALL | {"max_position_embeddings": 60}
    config = kind.config_class(**sizes, is_decoder=model.config.is_decoder, attn_implementation="old_relative_key")
    oracle = kind(config).to(model.dtype).eval()
    weights = model.state_dict()
    position = f"{kind.base_model_prefix}.embeddings.position_embeddings.weight"
    weights.setdefault(position, torch.zeros_like(oracle.state_dict()[position]))
    oracle.load_state_dict({name: tensor for name, tensor in weights.items() if "relative_tables" not in name})
    for name, module in model.named_modules():
        if hasattr(module, "relative_tables"):
            twin = oracle.get_submodule(name)
            twin.clip = module.relative_tables.max_relative_position
            twin.distance_embedding = nn.ParameterDict(
                {
                    term: nn.Parameter(table.detach().flip(-1 if term == "rel_bias" else -2))
                    for term, table in module.relative_tables.named_parameters()
                }
            )  # fmt: skip
    return oracle


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (BertForMaskedLM, dict(max_relative_position=23)),  # relative_key: a row for every distance
        (BertForMaskedLM, dict(max_relative_position=3, keep_absolute=True)),  # clamped, and the paper's own both
        (BertForMaskedLM, dict(max_relative_position=(2, 6), terms=("rel_k", "rel_q"))),  # relative_key_query, lopsided
        (BertForMaskedLM, dict(max_relative_position=4, per_head=True, terms=huggingface.TERMS[::-1])),
        (BertForMaskedLM, dict(max_relative_position=4, terms=("rel_v", "rel_bias"))),
        (BertLMHeadModel, dict(max_relative_position=(4, 0), is_decoder=True)),  # causal, with padding as (B, L)
        (RobertaForMaskedLM, dict(max_relative_position=4)),
    ],
)
def test_equals_the_formula_of_transformers_4(kind, settings) -> None:
    model = build(kind, dtype=torch.float64, **settings)
    oracle = oracle_of(model)
    inputs = batch()
    seen = inputs["attention_mask"].bool()
    ours, theirs = (m(**inputs, output_attentions=True) for m in (model, oracle))
    for left, right in zip(ours.attentions, theirs.attentions, strict=True):
        torch.testing.assert_close(left, right, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-12, rtol=1e-12)
    ours = model(**inputs)  # the path without weights
    torch.testing.assert_close(ours.logits[seen], theirs.logits[seen], atol=1e-12, rtol=1e-12)

    factor = torch.randn_like(ours.logits) * seen[..., None]
    for outputs in (ours, theirs):
        (outputs.logits * factor).sum().backward()
    twins = dict(oracle.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        expected = twins[name.replace("relative_tables", "distance_embedding")].grad
        if "relative_tables" in name:
            expected = expected.flip(-1 if name.endswith("rel_bias") else -2)
            compared += 1
        torch.testing.assert_close(parameter.grad, expected, atol=1e-11, rtol=1e-10)
    assert compared == 2 * len(settings.get("terms", ("rel_k",)))


# ---- size, length ----


def parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameter_counts_of_the_notebooks_model() -> None:
    sizes = dict(vocab_size=53, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512)
    sizes |= dict(max_position_embeddings=128)
    absolute = BertForMaskedLM(BertConfig(**sizes))
    assert parameters(absolute) == 437_045
    tables = 2 * 257 * 32
    model = add_relative_positions(absolute, max_relative_position=128)
    assert model is absolute
    assert parameters(model) == 437_045 - 128 * 128 + tables
    assert parameters(build(**sizes, max_relative_position=128, keep_absolute=True)) == 437_045 + tables
    assert (
        parameters(build(**sizes, max_relative_position=(128, 0), per_head=True))
        == 437_045 - 128 * 128 + 2 * 4 * 129 * 32
    )


def test_tables_start_small() -> None:
    table = (
        build(max_relative_position=200, initializer_range=0.02)
        .bert.encoder.layer[0]
        .attention.self.relative_tables.rel_k
    )
    assert table.shape == (401, 8)
    assert 0.018 < table.std() < 0.022


@pytest.mark.parametrize("keep_absolute", [False, True])
@pytest.mark.parametrize("terms", [("rel_k",), huggingface.TERMS])
def test_no_parameter_is_dead(keep_absolute: bool, terms: tuple[str, ...]) -> None:
    model = build(keep_absolute=keep_absolute, terms=terms, max_position_embeddings=14)
    inputs = batch()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    dead = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert dead == []


@pytest.mark.parametrize("kind", [BertForMaskedLM, RobertaForMaskedLM])
def test_longer_than_max_position_embeddings(kind) -> None:
    model = build(kind, dtype=torch.float64)
    inputs = batch(50)
    assert model.config.max_position_embeddings == 24
    expected = oracle_of(model)(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-12, rtol=1e-12)
    embedded = model.get_input_embeddings()(inputs.pop("input_ids"))
    torch.testing.assert_close(model(inputs_embeds=embedded, **inputs).logits, expected, atol=1e-12, rtol=1e-12)


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


# ---- what a model is used with ----


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


def test_dropout_of_attention_weights_in_training_only() -> None:
    model = build(attention_probs_dropout_prob=0.5)
    inputs = batch()
    torch.testing.assert_close(model(**inputs).logits, model(**inputs).logits, atol=0, rtol=0)
    model.train()
    assert (model(**inputs).logits - model(**inputs).logits).abs().max() > 0.01
    weights = model(**inputs, output_attentions=True).attentions[0][0]
    assert 0.35 < (weights == 0).double().mean() < 0.65
    # The same generator state drops the same weights on both paths.
    torch.manual_seed(3)
    plain = model(**inputs).logits
    torch.manual_seed(3)
    torch.testing.assert_close(model(**inputs, output_attentions=True).logits, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_replays_dropout(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build(attention_probs_dropout_prob=0.3, terms=huggingface.TERMS).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
        torch.manual_seed(1)
        inputs = batch()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right)


def test_autocast_and_bfloat16_weights() -> None:
    model = build(terms=huggingface.TERMS)
    inputs = batch()
    seen = inputs["attention_mask"].bool()
    expected = model(**inputs).logits[seen]
    with torch.autocast("cpu", torch.bfloat16):
        for options in ({}, {"output_attentions": True}):
            output = model(**inputs, labels=inputs["input_ids"], **options)
            assert (output.logits[seen] - expected).abs().max() < 0.03 * expected.abs().max()
    output.loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    half = copy.deepcopy(model).to(torch.bfloat16)(**inputs).logits[seen]
    assert half.dtype == torch.bfloat16
    assert (half - expected).abs().max() < 0.06 * expected.abs().max()


@pytest.mark.parametrize("kind", [BertForMaskedLM, RobertaForMaskedLM])
def test_compiles_into_one_graph(kind) -> None:
    model = build(kind)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for length in (14, 30):
        inputs = batch(length)
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    compiled(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.get_submodule(kind.base_model_prefix).encoder.layer[0].attention.self.relative_tables.rel_k.grad.any()
    torch._dynamo.reset()


def test_models_that_share_a_configuration_are_left_alone() -> None:
    config = BertConfig(**SMALL)
    other, model = BertForMaskedLM(config), BertForMaskedLM(config)
    before = config.to_dict()
    add_relative_positions(model, max_relative_position=3)
    assert other.config is config
    assert config.to_dict() == before
    assert config._attn_implementation == "sdpa"
    assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))


# ---- files ----


@pytest.mark.parametrize(
    ("kind", "auto", "settings"),
    [
        (
            BertForMaskedLM,
            AutoModelForMaskedLM,
            dict(max_relative_position=(3, 5), terms=("rel_k", "rel_v"), per_head=True),
        ),
        (BertForMaskedLM, AutoModelForMaskedLM, dict(keep_absolute=True)),
        (BertModel, AutoModel, {}),
        (RobertaForMaskedLM, AutoModelForMaskedLM, dict(terms=huggingface.TERMS)),
    ],
)
def test_saved_models_come_back_exactly(kind, auto, settings, tmp_path: Path) -> None:
    model = build(kind, **settings)
    inputs = batch()
    expected = model(**inputs)[0]
    model.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    clip = settings.get("max_relative_position", (5, 5))
    assert found["relative_attention"] == {
        "max_relative_position": list(clip),
        "keep_absolute": settings.get("keep_absolute", False),
        "per_head": settings.get("per_head", False),
        "terms": list(settings.get("terms", ("rel_k",))),
    }
    for load in (from_pretrained, auto.from_pretrained, type(model).from_pretrained):
        loaded = load(tmp_path)
        assert type(loaded) is type(model)
        assert isinstance(loaded, kind)
        torch.testing.assert_close(loaded(**inputs)[0], expected, atol=0, rtol=0)
        assert {k: v.shape for k, v in loaded.state_dict().items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }
    assert len(from_pretrained(tmp_path, output_loading_info=True)) == 2
    assert from_pretrained(tmp_path, dtype=torch.float64).dtype == torch.float64
    # An encoder out of a model with a head, and a new head on an encoder.
    assert AutoModel.from_pretrained(tmp_path)(**inputs)[0].shape == (2, 14, 32)


def test_copies_pickles_and_state_dicts(tmp_path: Path) -> None:
    model = build(terms=huggingface.TERMS, keep_absolute=True)
    inputs = batch()
    expected = model(**inputs).logits
    other = build(terms=huggingface.TERMS, keep_absolute=True, seed=5)
    assert not torch.equal(other(**inputs).logits, expected)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        torch.testing.assert_close(twin(**inputs).logits, expected, atol=0, rtol=0)
    config = model.config
    for twin in (type(config).from_dict(config.to_dict()), pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert twin.to_dict() == config.to_dict()
        assert twin.relative_attention == config.relative_attention
        assert twin._attn_implementation == "relattn"
        assert parameters(type(model)(twin)) == parameters(model)


WITHOUT_RELATTN = """
import json, sys
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertModel
folder = sys.argv[1]
attempts = {
    "AutoConfig": lambda: AutoConfig.from_pretrained(folder),
    "AutoModel": lambda: AutoModel.from_pretrained(folder),
    "AutoModelForMaskedLM": lambda: AutoModelForMaskedLM.from_pretrained(folder),
    "BertForMaskedLM": lambda: BertForMaskedLM.from_pretrained(folder),
    "BertModel": lambda: BertModel.from_pretrained(folder),
    "BertConfig": lambda: BertForMaskedLM(BertConfig.from_pretrained(folder)),
    "eager": lambda: BertForMaskedLM.from_pretrained(folder, attn_implementation="eager"),
}
found = {}
for name, attempt in attempts.items():
    try:
        attempt()
        found[name] = None
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
assert "relattn" not in sys.modules
print(json.dumps(found))
"""


@pytest.mark.parametrize("keep_absolute", [False, True])
def test_plain_transformers_does_not_load_it_silently(keep_absolute: bool, tmp_path: Path) -> None:
    build(keep_absolute=keep_absolute).save_pretrained(tmp_path)
    command = [sys.executable, "-c", WITHOUT_RELATTN, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("AutoConfig", "AutoModel", "AutoModelForMaskedLM"):
        assert found[name].startswith("ValueError")
        assert "relattn-bert" in found[name]
    for name in ("BertForMaskedLM", "BertModel", "BertConfig"):
        assert found[name].startswith("ValueError")
        assert 'attn_implementation="relattn"' in found[name]
    # Not preventable: the caller overrules the configuration. transformers says so, twice.
    assert found["eager"] is None
    assert "model of type `relattn-bert` to instantiate a model of type `bert`" in done.stderr
    assert "relative_tables.rel_k" in done.stderr


def test_a_loaded_model_captures_attentions_in_a_fresh_process(tmp_path: Path) -> None:
    # transformers notes what can be captured when a class is first constructed, and the inner encoder never is.
    build().save_pretrained(tmp_path)
    program = """
import sys, torch
from relattn.huggingface import from_pretrained
output = from_pretrained(sys.argv[1])(torch.arange(3, 9)[None], output_attentions=True, output_hidden_states=True)
print([tuple(weights.shape) for weights in output.attentions], len(output.hidden_states))
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[(1, 4, 6, 6), (1, 4, 6, 6)] 3"


def test_a_plain_class_beside_relattn_does_not_run(tmp_path: Path) -> None:
    build(keep_absolute=True).save_pretrained(tmp_path)
    plain = BertForMaskedLM.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="built without the relative tables"):
        plain(**batch())


def test_a_checkpoint_without_its_tables_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    build().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["bert.encoder.layer.1.attention.self.relative_tables.rel_k"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks bert.encoder.layer.1.attention.self.relative_tables.rel_k"):
        from_pretrained(tmp_path)
    # The Auto class warns and initialises them; small, not as torch.empty left them.
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).bert.encoder.layer[1].attention.self.relative_tables.rel_k
    assert 0.1 < loaded.std() < 0.3

    build(relative=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is not of a model that add_relative_positions made; .*model_type='bert'"):
        from_pretrained(tmp_path)


class Windows(torch.utils.data.Dataset):
    """Tokens to be copied: learnable at once."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 53, (10,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def test_trainer_trains_saves_and_loads_the_best(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

    def trainer(model, steps: int, callbacks=()) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=4, learning_rate=3e-3,
            lr_scheduler_type="constant", eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
            logging_steps=2, load_best_model_at_end=True, metric_for_best_model="loss", report_to=[], use_cpu=True,
            seed=0, disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        set_seed(0)
        return Trainer(
            model=model, args=arguments, train_dataset=Windows(), eval_dataset=Windows(), callbacks=list(callbacks)
        )

    class Spoil(TrainerCallback):
        """After step 4 the tables are ruined, so that the best checkpoint is not the last."""

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5:
                for name, parameter in model.named_parameters():
                    if "relative_tables" in name or name == "cls.predictions.bias":
                        parameter.data.normal_(std=30.0)

    model = build()
    start = [p.detach().clone() for n, p in model.named_parameters() if "rel_k" in n]
    first = trainer(model, 6, [Spoil()])
    first.train()
    assert Path(first.state.best_model_checkpoint).name == "checkpoint-4"
    best = from_pretrained(first.state.best_model_checkpoint)
    tables = [p for n, p in model.named_parameters() if "rel_k" in n]
    assert len(tables) == 2
    for table, before in zip(tables, start, strict=True):
        assert not torch.equal(table, before)
        assert table.abs().max() < 2
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), best.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
    # A killed run goes on from a checkpoint, in a model made anew.
    resumed = build(seed=9)
    trainer(resumed, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, ours), (_, theirs) in zip(resumed.state_dict().items(), best.state_dict().items(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


# ---- other families, checkpoints of transformers 4, models with a position bias ----


@pytest.mark.parametrize("family", [family for family in huggingface._FAMILIES if family not in ("Bert", "Roberta")])
def test_other_families(family: str, tmp_path: Path) -> None:
    """Zero tables change nothing; with others, the formula of transformers 4; saved and loaded."""
    kind = getattr(transformers, f"{family}ForMaskedLM")
    own = {"Ernie": dict(use_task_id=True), "Xmod": dict(default_language="en_XX")}.get(family, {})
    model = build(kind, keep_absolute=True, dtype=torch.float64, max_position_embeddings=40, **own)
    plain = build(kind, relative=False, dtype=torch.float64, max_position_embeddings=40, **own)
    inputs = batch()
    seen = inputs["attention_mask"].bool()
    tables = {name: table for name, table in model.named_parameters() if "relative_tables" in name}
    assert len(tables) == 2
    found = model(**inputs)[0]
    model.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path, dtype=torch.float64)(**inputs)[0], found)
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name not in tables})
    oracle = copy.deepcopy(plain)
    oracle.config._attn_implementation = "old_relative_key"
    for layer, module in model.named_modules():
        if hasattr(module, "relative_tables"):
            twin = oracle.get_submodule(layer)
            twin.clip = module.relative_tables.max_relative_position
            twin.distance_embedding = nn.ParameterDict({"rel_k": nn.Parameter(module.relative_tables.rel_k.detach().flip(0))})
    torch.testing.assert_close(found[seen], oracle(**inputs)[0][seen], atol=1e-12, rtol=1e-12)
    for table in tables.values():
        nn.init.zeros_(table)
    torch.testing.assert_close(model(**inputs)[0][seen], plain(**inputs)[0][seen], atol=1e-12, rtol=1e-12)
    nn.init.zeros_(next(parameter for name, parameter in plain.named_parameters() if "position_embeddings" in name))
    without = build(kind, dtype=torch.float64, **own)
    missing, unexpected = without.load_state_dict(plain.state_dict(), strict=False)
    assert {name.rpartition(".")[2] for name in missing} == {"rel_k"}
    assert all("position_embeddings" in name for name in unexpected)
    for module in without.modules():
        if hasattr(module, "relative_tables"):
            nn.init.zeros_(module.relative_tables.rel_k)
    torch.testing.assert_close(without(**inputs)[0][seen], plain(**inputs)[0][seen], atol=1e-12, rtol=1e-12)
    without(**batch(50))[0].sum().backward()  # longer than max_position_embeddings
    assert not any("position_embeddings" in name for name, _ in without.named_parameters())


def old_checkpoint(folder: Path, kind: str, reach: int = 24) -> tuple[BertForMaskedLM, BertForMaskedLM]:
    """Files as transformers 4 wrote them, and a model of today that computes what that one did."""
    torch.manual_seed(4)
    oracle = BertForMaskedLM(BertConfig(**SMALL, attn_implementation="old_relative_key")).double().eval()
    weights = {name: tensor.clone() for name, tensor in oracle.state_dict().items()}
    for name, module in oracle.named_modules():
        if name.endswith("attention.self"):
            table = torch.randn(2 * reach - 1, 8, dtype=torch.float64)
            weights[f"{name}.distance_embedding.weight"] = table
            module.clip = (reach - 1, reach - 1)
            terms = ("rel_k",) if kind == "relative_key" else ("rel_k", "rel_q")
            module.distance_embedding = nn.ParameterDict({term: nn.Parameter(table) for term in terms})
    # It had absolute positions as parameters and did not add them.
    nn.init.zeros_(oracle.bert.embeddings.position_embeddings.weight)
    config = oracle.config.to_dict() | {"position_embedding_type": kind, "architectures": ["BertForMaskedLM"]}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if name != "dtype"}))
    return oracle, weights


@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_checkpoints_of_transformers_4(kind: str, file: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    oracle, weights = old_checkpoint(tmp_path, kind)
    if file == "model.safetensors":
        weights = {name: tensor for name, tensor in weights.items() if name != "cls.predictions.decoder.weight"}  # tied
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / file, metadata={"format": "pt"})
    else:
        torch.save(weights, tmp_path / file)
    model = from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(model, huggingface.RelativeBertForMaskedLM)
    assert not model.training
    assert model.config.relative_attention["terms"] == (["rel_k"] if kind == "relative_key" else ["rel_k", "rel_q"])
    inputs = batch()
    seen = inputs["attention_mask"].bool()
    expected = oracle(**inputs).logits[seen]
    torch.testing.assert_close(model(**inputs).logits[seen], expected, atol=1e-12, rtol=1e-12)
    model.save_pretrained(tmp_path / "new")
    again = from_pretrained(tmp_path / "new", dtype=torch.float64)
    torch.testing.assert_close(again(**inputs).logits[seen], expected, atol=1e-12, rtol=1e-12)

    # By hand, into a model that was made for it.
    terms = tuple(model.config.relative_attention["terms"])
    other = build(max_relative_position=23, terms=terms, dtype=torch.float64)
    missing, unexpected = other.load_state_dict(huggingface.from_old_state_dict(weights, kind), strict=False)
    assert unexpected == []
    assert set(missing) <= {"cls.predictions.decoder.weight"}
    torch.testing.assert_close(other(**inputs).logits[seen], expected, atol=1e-12, rtol=1e-12)


def test_what_is_no_checkpoint_of_transformers_4(tmp_path: Path) -> None:
    _, weights = old_checkpoint(tmp_path, "relative_key")
    with pytest.raises(ValueError, match=r"folder: .* has neither model.safetensors nor pytorch_model.bin"):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="position_embedding_type: expected one of 'relative_key', 'relative_key_query', got 'absolute'"):
        huggingface.from_old_state_dict(weights, "absolute")
    with pytest.raises(ValueError, match=r"state_dict: it has no distance_embedding.weight"):
        huggingface.from_old_state_dict({"a": torch.zeros(2)}, "relative_key")


@pytest.mark.parametrize("causal", [False, True])
def test_a_position_bias_falls_through(causal: bool, caplog) -> None:
    huggingface._log_position_bias.cache_clear()
    sizes = dict(d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, vocab_size=53, dropout_rate=0.0)
    eager, model = (
        transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, attn_implementation=name)).double().eval()
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


# ---- bad input ----


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, TypeError, "max_relative_position"),
        ({"max_relative_position": -1}, ValueError, "max_relative_position: expected numbers of at least 0, got -1"),
        ({"max_relative_position": (3, -2)}, ValueError, r"max_relative_position: .*got \(3, -2\)"),
        (
            {"max_relative_position": 2.5},
            TypeError,
            r"max_relative_position: expected an int or \(left, right\), got 2.5",
        ),
        ({"max_relative_position": True}, TypeError, "max_relative_position"),
        ({"max_relative_position": (1, 2, 3)}, TypeError, "max_relative_position"),
        ({"max_relative_position": 2, "terms": "rel_k"}, TypeError, "terms: .*'rel_k'"),
        ({"max_relative_position": 2, "terms": ()}, ValueError, "terms"),
        ({"max_relative_position": 2, "terms": ("rel_k", "rel_k")}, ValueError, "terms"),
        ({"max_relative_position": 2, "terms": ("rel_x",)}, ValueError, r"terms: .*got \('rel_x',\)"),
        ({"max_relative_position": 2, "keep_absolute": 1}, TypeError, "keep_absolute"),
        ({"max_relative_position": 2, "per_head": None}, TypeError, "per_head"),
    ],
)
def test_bad_settings_change_nothing(settings, error, message) -> None:
    model = build(relative=False)
    with pytest.raises(error, match=message):
        add_relative_positions(model, **settings)
    assert type(model) is BertForMaskedLM
    assert type(model.config) is BertConfig
    assert not any("relative" in name for name, _ in model.named_parameters())


def test_models_that_cannot_take_it() -> None:
    with pytest.raises(
        TypeError, match=r"model: expected one of BertModel, .*RobertaForMaskedLM.*; got DistilBertModel"
    ):
        add_relative_positions(
            DistilBertModel(DistilBertConfig(dim=8, n_layers=1, n_heads=2, hidden_dim=8)), max_relative_position=2
        )
    with pytest.raises(TypeError, match="got Linear"):
        add_relative_positions(nn.Linear(2, 2), max_relative_position=2)
    with pytest.raises(ValueError, match="model: this RelativeBertForMaskedLM already has relative positions"):
        add_relative_positions(build(), max_relative_position=2)
    with pytest.raises(ValueError, match="model: a BertModel with cross-attention"):
        build(BertModel, is_decoder=True, add_cross_attention=True)
    with pytest.raises(ValueError, match="relative_attention is not set"):
        huggingface.RelativeBertModel(huggingface.RelativeBertConfig(**SMALL))


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


def test_every_architecture_is_registered() -> None:
    assert len(huggingface._MODELS) == 75
    for plain, relative in huggingface._MODELS.items():
        assert relative is getattr(huggingface, f"Relative{plain.__name__}")
        assert pickle.loads(pickle.dumps(relative)) is relative
    families = {relative.config_class for relative in huggingface._MODELS.values()}
    assert len(families) == len(huggingface._FAMILIES) == 10
    for config in families:
        assert AutoConfig.for_model(config.model_type).__class__ is config
    assert build(BertForPreTraining).bert.__class__ is huggingface.RelativeBertModel
    assert issubclass(huggingface.RelativeRobertaConfig, RobertaConfig)


def test_transformers_is_imported_only_when_asked_for_and_named_when_missing() -> None:
    program = """
import sys
import relattn
assert "transformers" not in sys.modules
sys.modules["transformers"] = None  # what an absent package looks like
try:
    import relattn.huggingface
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert (
        done.stdout.strip()
        == 'relattn.huggingface needs transformers; install it with: pip install "relattn[huggingface]"'
    )
