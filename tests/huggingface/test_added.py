"""BERT-like models with relative positions, against transformers 4's formula; what they are used with; bad input."""

import copy
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
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertLMHeadModel,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from relattn import huggingface
from relattn.huggingface import add_relative_positions, added, from_pretrained
from tests.huggingface.bert import SMALL, batch, build, oracle_of, parameters


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


# ---- other families ----


@pytest.mark.parametrize("family", [family for family in added._FAMILIES if family not in ("Bert", "Roberta")])
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
            twin.distance_embedding = nn.ParameterDict(
                {"rel_k": nn.Parameter(module.relative_tables.rel_k.detach().flip(0))}
            )
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


def test_every_architecture_is_registered() -> None:
    assert len(added._MODELS) == 75
    for plain, relative in added._MODELS.items():
        assert relative is getattr(huggingface, f"Relative{plain.__name__}")
        assert pickle.loads(pickle.dumps(relative)) is relative
    families = {relative.config_class for relative in added._MODELS.values()}
    assert len(families) == len(added._FAMILIES) == 10
    for config in families:
        assert AutoConfig.for_model(config.model_type).__class__ is config
    assert build(BertForPreTraining).bert.__class__ is huggingface.RelativeBertModel
    assert issubclass(huggingface.RelativeRobertaConfig, RobertaConfig)
    assert huggingface.RelativeTables is added.RelativeTables  # where pickles of whole models look for it


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
