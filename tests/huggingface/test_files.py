"""Files of models with relative positions: saved, loaded, trained from, those of transformers 4 too."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    RobertaForMaskedLM,
)

from relattn import huggingface
from relattn.huggingface import from_pretrained
from tests.huggingface.bert import SMALL, batch, build, parameters


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
        save_file(
            {name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / file, metadata={"format": "pt"}
        )
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
    with pytest.raises(
        ValueError,
        match="position_embedding_type: expected one of 'relative_key', 'relative_key_query', got 'absolute'",
    ):
        huggingface.from_old_state_dict(weights, "absolute")
    with pytest.raises(ValueError, match=r"state_dict: it has no distance_embedding.weight"):
        huggingface.from_old_state_dict({"a": torch.zeros(2)}, "relative_key")
