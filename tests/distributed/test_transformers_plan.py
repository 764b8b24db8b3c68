"""transformers' own tensor parallelism of models whose attention is relattn's: its plan of Llama, and one of ours for a relative BERT.

Of the families that `relattn.huggingface.convert` knows none has a plan of its attention in transformers.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.distributed.processes import Processes

pytest.importorskip("torch.distributed.tensor")
pytest.importorskip("transformers.distributed")
import transformers
from transformers.distributed import DistributedConfig

import relattn.huggingface
from relattn.huggingface.families import FAMILIES

pytestmark = pytest.mark.xdist_group("transformers_plan")  # whose processes they share

RANKS = 2
SIZES = dict(vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
LAYER = "bert.encoder.layer.*"
BERT_PLAN = {
    **{f"{LAYER}.attention.self.{name}": "colwise" for name in ("query", "key", "value")},
    f"{LAYER}.attention.self.relative_tables": "replicated_with_grad_allreduce",
    f"{LAYER}.attention.output.dense": "rowwise",
    f"{LAYER}.intermediate.dense": "colwise",
    f"{LAYER}.output.dense": "rowwise",
}


def _whole(name: str):
    torch.manual_seed(0)
    if name == "llama":
        config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
        return transformers.LlamaForCausalLM._from_config(config, attn_implementation="relattn", dtype=torch.float64)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).double().eval()
    return relattn.huggingface.add_relative_positions(model, max_relative_position=2, terms=relattn.huggingface.TERMS)


def _train(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and gradients of the whole parameters."""
    tokens = torch.arange(14).view(2, 7)
    padding = torch.ones_like(tokens)
    padding[1, 5:] = 0
    logits = model(tokens, attention_mask=padding).logits
    logits.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return logits.detach(), {name: getattr(of, "full_tensor", lambda of=of: of)() for name, of in gradients.items()}


def _over_ranks(folder: str, name: str):
    plan = DistributedConfig(tp_plan="auto" if name == "llama" else BERT_PLAN, tp_size=RANKS)
    given = dict(dtype=torch.float64, distributed_config=plan)
    if name == "llama":
        model = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="relattn", **given)
        assert model.model.layers[0].self_attn.q_proj.weight.to_local().shape == (16, 32)
    else:
        model = relattn.huggingface.RelativeBertForMaskedLM.from_pretrained(folder, **given)
        assert model.bert.encoder.layer[0].attention.self.query.weight.to_local().shape == (16, 32)
    return _train(model.eval())


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_families_have_no_plan_of_attention(family):
    """Where transformers writes one, its models want a test here. (Inkling has one of its experts, Granite Speech of its head.)"""
    configuration = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    for of in (*vars(configuration).values(), *vars(modeling).values()):
        if isinstance(of, type) and of.__module__ in (configuration.__name__, modeling.__name__):
            plans = (getattr(of, "base_model_tp_plan", None), getattr(of, "_tp_plan", None))
            assert not [part for plan in plans for part in plan or () if "att" in part], of


@pytest.fixture(scope="module")
def processes():
    with Processes(RANKS) as started:
        yield started


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_plan_of_transformers(processes, name, tmp_path):
    model = _whole(name)
    model.save_pretrained(tmp_path)
    logits, gradients = _train(model)
    for found_logits, found in processes.run(_over_ranks, str(tmp_path), name):
        torch.testing.assert_close(found_logits, logits)
        assert found.keys() == gradients.keys()
        for of, gradient in gradients.items():
            torch.testing.assert_close(found[of], gradient, msg=lambda text, of=of: f"{of}: {text}")
