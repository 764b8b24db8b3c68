"""`convert` and `revert`: what must stay as it was, what is refused, and what they say."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import logging
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from transformers.models.deberta_v2 import modeling_deberta_v2
from transformers.models.fastspeech2_conformer import modeling_fastspeech2_conformer
from transformers.models.gemma4 import modeling_gemma4
from transformers.models.seamless_m4t_v2 import modeling_seamless_m4t_v2
from transformers.models.swin import modeling_swin
from transformers.models.vits import modeling_vits
from transformers.models.wav2vec2_bert import modeling_wav2vec2_bert

from relattn.huggingface import convert, families, revert, unconverted
from relattn.huggingface.conversion import is_bound
from tests.huggingface.models import COMMON, HEADS, HIDDEN, built, close, every_case, given, gradients, seen

# ---- what must stay as it was ----


@every_case
def test_revert_is_exact_and_nothing_is_left(name: str) -> None:
    model, inputs = built(name, torch.float32), given(name, torch.float32)
    original = model(**inputs)[0]
    before = {module: dict(vars(module)) for module in model.modules()}
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    convert(convert(model))
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    assert revert(model) is model
    for module, attributes in before.items():
        assert vars(module).keys() == attributes.keys()
        assert vars(module).get("config") is attributes.get("config")
    assert torch.equal(model(**inputs)[0], original)
    revert(model)


@every_case
def test_signatures_stay(name: str) -> None:
    """transformers reads in them what a model takes: its tests of `output_attentions` skipped a converted Parakeet."""
    model = built(name, torch.float32)
    before = {module: inspect.signature(module.forward) for module in model.modules()}
    twins = [convert(model), copy.deepcopy(model)]
    if name == "parakeet":  # others hold what torch does not pickle
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        for module, (original, signature) in zip(twin.modules(), before.items(), strict=True):
            assert type(module) is type(original)
            assert inspect.signature(module.forward) == signature


BIASES = ("t5", "umt5", "mpnet", "wavlm")
TRACED = ("wav2vec2-bert", "parakeet", "speecht5", "xlnet", "vits", "deberta", "deberta-long", "deberta-v2", "granite5", *BIASES)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", TRACED)
def test_traced_and_saved(name: str, tmp_path) -> None:
    """Under torch.jit.trace sizes are tensors: "max_relative_position: got tensor(7)", which no user had given."""
    model, inputs = convert(built(name, torch.float32)).requires_grad_(False), given(name, torch.float32)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return model(**dict(zip(inputs, tensors, strict=True)))[0]

    with torch.no_grad():
        torch.jit.save(torch.jit.trace(run, tuple(inputs.values()), check_trace=False), str(tmp_path / "traced.pt"))
        loaded = torch.jit.load(str(tmp_path / "traced.pt"))
        for length in (17, 29):  # traced at 23
            others = given(name, torch.float32, length)
            torch.testing.assert_close(loaded(*others.values()), run(*others.values()))


@pytest.mark.parametrize("name", ["wav2vec2-bert", "parakeet", "nemotron", "deberta-v2", "t5", "mpnet", "wavlm"])
def test_files_are_unchanged(name: str, tmp_path) -> None:
    model, inputs = built(name, torch.float32), given(name, torch.float32)
    model.save_pretrained(tmp_path / "before")
    original = model(**inputs)[0]
    convert(model).save_pretrained(tmp_path / "after")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()
    loaded = type(model).from_pretrained(tmp_path / "after").eval()
    assert torch.equal(loaded(**inputs)[0], original)


@pytest.mark.parametrize("name", ["wav2vec2-bert", "nemotron", "vits", "deberta", "t5", "umt5", "mpnet"])
def test_copies_pickles_and_replicas(name: str) -> None:
    model, inputs = convert(built(name)), given(name)
    output = model(**inputs)[0]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        assert torch.equal(twin(**inputs)[0], output)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.div_(1.5)
        assert vars(revert(twin)).keys() == vars(revert(copy.deepcopy(model))).keys()
    for module in model.modules():
        if "forward" in vars(module):
            replica = module._replicate_for_data_parallel()
            assert replica.forward.args == (replica,)
            assert module.forward.args == (module,)


@pytest.mark.parametrize("name", ["wav2vec2-bert", "parakeet", "nemotron", "vits", "deberta-v2", "t5", "umt5", "wavlm"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_replays_dropout(name: str, reentrant: bool) -> None:
    if reentrant and name == "deberta-v2":
        pytest.skip("the original fails: its layers share the embeddings of positions")
    if reentrant and name == "wavlm":
        pytest.skip("the original never ends: its layers share the bias of positions")
    settings = {"attention_probs_dropout_prob": 0.3} if name.startswith("deberta") else {"attention_dropout": 0.3}
    settings = {"dropout_rate": 0.3} if name in ("t5", "umt5") else settings
    found = []
    for checkpointing in (False, True):
        model, inputs = convert(built(name, **settings)).train(), given(name)
        if checkpointing and hasattr(model, "gradient_checkpointing_enable"):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        elif checkpointing:
            checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=reentrant)
            for layer in model.encoder.layers:
                layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, checkpoint
        torch.manual_seed(5)
        found.append(gradients(model, model(**inputs)[0], True))
    for key, right in found[0].items():
        close(found[1][key], right)


@pytest.mark.parametrize("name", ["wav2vec2-bert", "xlnet", "fastspeech2"])
def test_dropout_in_training_only(name: str) -> None:
    settings = {"xlnet": {"dropout": 0.5}, "fastspeech2": {"encoder_attention_dropout_rate": 0.5}}.get(
        name, {"attention_dropout": 0.5}
    )
    model, inputs = convert(built(name, **settings)), given(name)
    assert torch.equal(model(**inputs)[0], model(**inputs)[0])
    model.train()
    assert not torch.equal(model(**inputs)[0], model(**inputs)[0])
    torch.manual_seed(3)
    output = model(**inputs)[0]
    torch.manual_seed(3)
    assert torch.equal(model(**inputs)[0], output)


COMPILED = ("wav2vec2-bert", "seamless-v1", "parakeet", "speecht5", "vits", "deberta-v2", "xlnet", "granite5", *BIASES)


@pytest.mark.parametrize("name", COMPILED)
def test_compiles(name: str) -> None:
    model, inputs = convert(built(name, torch.float32)), given(name, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(
        model, backend="aot_eager", fullgraph=name not in ("vits",)
    )  # VitsEncoder calls numpy's generator
    with torch.no_grad():
        expected = model(**inputs)[0]
        close(compiled(**inputs)[0], expected, 1e-5)
    torch._dynamo.reset()


# ---- heads, messages ----


def test_heads_and_logs(caplog) -> None:
    settings = dict(num_mel_bins=16, subsampling_factor=4, subsampling_conv_channels=4, conv_kernel_size=5) | COMMON
    encoder = transformers.ParakeetEncoderConfig(**settings)
    heads = [
        transformers.ParakeetForCTC(
            transformers.ParakeetCTCConfig(encoder_config=encoder.to_dict(), vocab_size=11, pad_token_id=10)
        )
    ]
    tdt = transformers.ParakeetTDTConfig(
        encoder_config=encoder.to_dict(),
        vocab_size=11,
        decoder_hidden_size=8,
        num_decoder_layers=1,
        pad_token_id=2,
        blank_token_id=10,
    )
    heads.append(transformers.ParakeetForTDT(tdt))
    with caplog.at_level(logging.INFO, "relattn.huggingface.conversion"):
        for model in heads:
            convert(model)
            assert sum("forward" in vars(module) for module in model.modules()) == 3  # with the encoder's
    assert caplog.messages == ["converted 2 ParakeetEncoderAttention"] * 2
    logits = heads[0].eval()(**given("parakeet", torch.float32)).logits
    expected = revert(heads[0])(**given("parakeet", torch.float32)).logits
    where = seen(logits, True)
    close(logits[where], expected[where], 1e-4)


def test_whole_seamless_model() -> None:
    """The text models beside the speech encoder are left alone, and share its configuration."""
    settings = dict(
        hidden_size=HIDDEN,
        speech_encoder_layers=1,
        speech_encoder_attention_heads=HEADS,
        speech_encoder_intermediate_size=32,
    )
    settings |= dict(
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16
    )
    settings |= dict(
        decoder_ffn_dim=16, vocab_size=29, feature_projection_input_dim=10, adaptor_kernel_size=2, adaptor_stride=2
    )
    model = transformers.SeamlessM4Tv2ForSpeechToText(transformers.SeamlessM4Tv2Config(**settings)).eval()
    inputs = given("seamless-v2", torch.float32) | {"decoder_input_ids": torch.randint(3, 29, (2, 5))}
    before = model.config.to_dict()
    expected = model(**inputs).logits
    close(convert(model)(**inputs).logits, expected, 1e-4)
    assert model.config.to_dict() == before
    assert sum("forward" in vars(module) for module in model.modules()) == 1


def test_nothing_to_convert(caplog) -> None:
    long = transformers.LongT5EncoderModel(
        transformers.LongT5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=29)
    )
    for model, message in (
        (long, "LongT5LocalAttention: its encoder attends within neighbouring blocks"),
        (built("wav2vec2-bert", kind="rotary"), "position_embeddings_type='rotary' has no relative term"),
        (built("deberta-v2", relative_attention=False), "relative_attention=False"),
        (built("deberta", talking_head=True), "talking_head=True"),
        (built("xlnet", bi_data=True), "bi_data=True"),
        (nn.Linear(2, 2), "no layer of a class that relattn knows"),
    ):
        with pytest.raises(ValueError, match=f"model: nothing to convert in this {type(model).__name__} .*{message}"):
            convert(model)
        with caplog.at_level(logging.INFO, "relattn.huggingface.conversion"):
            assert convert(model, strict=False) is model
        assert message in caplog.messages[-1]
        assert not any(is_bound(value) for module in model.modules() for value in vars(module).values())


def test_every_plan_is_of_a_class_of_transformers() -> None:
    """A name that is misspelt in a table would leave its models as they are, without a word."""
    named: dict[str, set[str]] = {}  # by file: classes that transformers has
    for folder, file in families.FAMILIES.items():
        plans = importlib.import_module(f"{families.__name__}.{file}").PLANS
        modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        present = {name for name in plans if hasattr(modeling, name)}
        assert present, folder
        named.setdefault(file, set()).update(present)
    for file in Path(families.__file__).parent.glob("[!_]*.py"):
        plans = importlib.import_module(f"{families.__name__}.{file.stem}").PLANS
        assert named[file.stem] == plans.keys()


def test_the_kernel_hub_has_no_place_for_relative_attention() -> None:
    """`use_kernels` puts kernels into classes that transformers marks for it. Were one of ours among them, a mapping could name relattn."""
    for folder, file in families.FAMILIES.items():
        modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        marked = set(re.findall(r"@use_kernel_forward_from_hub\([^)]*\)\nclass (\w+)", Path(modeling.__file__).read_text()))
        assert not marked & importlib.import_module(f"{families.__name__}.{file}").PLANS.keys()


def test_every_class_that_is_left_is_one_of_transformers() -> None:
    """Named by itself, and no class with a plan; of models that this version has."""
    for folder, reasons in unconverted.REASONS.items():
        for name, reason in reasons.items():
            files = list(Path(transformers.__file__).parent.glob(f"models/{folder}/modeling_*.py"))
            assert not files or any(f"class {name}(" in file.read_text() for file in files), name
            plans = families.FAMILIES.get(folder)
            assert plans is None or name not in importlib.import_module(f"{families.__name__}.{plans}").PLANS
            assert len(reason) > 40
    for layer, message in (
        (modeling_gemma4.Gemma4AudioAttention, "soft cap"),
        (type("Own", (modeling_gemma4.Gemma4AudioAttention,), {}), "soft cap"),
        (modeling_swin.SwinAttention, "two-dimensional"),
    ):
        model = nn.Sequential(layer.__new__(layer))
        nn.Module.__init__(model[0])
        with pytest.raises(ValueError, match=f"nothing to convert in this Sequential .{layer.__name__}: .*{message}"):
            convert(model)


def test_the_page_names_every_model() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    for folder in unconverted.REASONS:
        assert f"`{folder}`" in page, folder
    for file in set(families.FAMILIES.values()):
        for name in importlib.import_module(f"{families.__name__}.{file}").PLANS:
            if name.endswith("Attention"):
                assert f"`{name}`" in page, name


def _other_forward(self, hidden_states, attention_mask=None, relative_position_embeddings=None, tables=None, **kwargs):
    raise NotImplementedError


class _Subclass(modeling_wav2vec2_bert.Wav2Vec2BertSelfAttention):
    def forward(self, hidden_states, attention_mask=None, relative_position_embeddings=None, **kwargs):
        raise NotImplementedError


def test_unknown_layouts_raise_and_change_nothing(monkeypatch) -> None:
    def refused(model: nn.Module, message: str) -> None:
        known = rf"model: transformers\.models\..* of transformers {transformers.__version__} .*"
        with pytest.raises(ValueError, match=rf"{known}{message}.*nothing was converted"):
            convert(model)
        assert not any(is_bound(value) for module in model.modules() for value in vars(module).values())

    model = built("wav2vec2-bert")
    with monkeypatch.context() as patch:
        patch.setattr(modeling_wav2vec2_bert.Wav2Vec2BertSelfAttention, "forward", _other_forward)
        refused(model, r"forward\(self hidden_states .*tables kwargs\)")
    last = model.encoder.layers[1].self_attn  # the first is fine
    with monkeypatch.context() as patch:
        patch.setattr(last, "scaling", None)
        refused(model, "its attribute scaling is NoneType")
    with monkeypatch.context() as patch:
        patch.setattr(last, "position_embeddings_type", "alibi")
        refused(model, "position_embeddings_type='alibi'")
    last.__class__ = _Subclass
    with pytest.raises(
        ValueError,
        match=r"test_conversion\._Subclass .*a subclass of Wav2Vec2BertSelfAttention with a forward of its own",
    ):
        convert(model)
    assert "forward" not in vars(model.encoder.layers[0].self_attn)
    # A helper that the replacement does without is as good as a forward.
    for name, owner, method in (
        ("fastspeech2", modeling_fastspeech2_conformer.FastSpeech2ConformerAttention, "shift_relative_position_tensor"),
        ("vits", modeling_vits.VitsAttention, "_get_relative_embeddings"),
        ("deberta-v2", modeling_deberta_v2.DebertaV2Encoder, "get_attention_mask"),
        ("seamless-v2", modeling_seamless_m4t_v2.SeamlessM4Tv2ConformerEncoder, "_apply_chunk_attention"),
    ):
        model = built(name)
        module = next(module for module in model.modules() if type(module) is owner)
        module.__class__ = type(f"Own{owner.__name__}", (owner,), {method: lambda self, *args: None})
        with pytest.raises(ValueError, match=rf"a subclass of {owner.__name__} with a {method} of its own"):
            convert(model)
        module.__class__ = type(f"Own{owner.__name__}", (owner,), {"more": lambda self: None})
        assert convert(model) is model
    model = built("deberta-v2")
    with monkeypatch.context() as patch:
        patch.setattr(modeling_deberta_v2.DebertaV2Encoder, "get_rel_pos", lambda self, hidden_states: None)
        refused(model, r"get_rel_pos\(self hidden_states\)")
    model.encoder.layer[0].attention.self = nn.Identity()
    refused(model, "its self is Identity, expected DisentangledSelfAttention")
    model.encoder.layer[0] = nn.Identity()
    with pytest.raises(
        ValueError,
        match=f"of transformers {transformers.__version__} .*its attention is NoneType, expected DebertaV2Att",
    ):
        convert(model)
    model = built("wav2vec2-bert")
    model.encoder.layers[0].self_attn.forward = _other_forward
    with pytest.raises(ValueError, match="forward of a Wav2Vec2BertSelfAttention was replaced already"):
        convert(model)


def test_revert_sees_what_wrapped_a_layer_since() -> None:
    model = convert(built("wav2vec2-bert"))
    layer = model.encoder.layers[0].self_attn
    layer._old_forward, layer.forward = layer.forward, lambda *args, **kwargs: layer._old_forward(*args, **kwargs)
    with pytest.raises(RuntimeError, match="a converted Wav2Vec2BertSelfAttention was wrapped since"):
        revert(model)


def test_a_model_without_the_interface_is_told_its_remedy() -> None:
    """Falcon's attn_implementation="relattn" ends in a bare KeyError of transformers."""
    settings = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(KeyError, match="relattn"):
        transformers.FalconModel(transformers.FalconConfig(**settings, attn_implementation="relattn"))
    with pytest.raises(ValueError, match=r"KeyError: 'relattn'.* keep 'sdpa' or 'eager'"):
        convert(transformers.FalconModel(transformers.FalconConfig(**settings)))
    with pytest.raises(ValueError, match=r"relattn knows\)$"):
        convert(transformers.LlamaModel(transformers.LlamaConfig(**settings, intermediate_size=32)))
