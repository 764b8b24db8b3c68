"""`relattn.toolkits`: layers of speech toolkits give what they gave, and take back what was done to them.

Stand-ins always run; the real layers too where their package is installed (`make test-toolkits`).
"""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

from relattn.toolkits import attend, convert, revert
from tests.toolkits import real, standins

BATCH, LENGTH, SIZE, HEADS, CACHED, CHUNK = 2, 13, 64, 4, 5, 4
MODES = ("all", "padding", "chunks", "cached")
LAYERS = {"stand-in": standins, "real": real.layers()}


@pytest.fixture(autouse=True)
def _always(monkeypatch) -> None:
    """Also where the original is as fast."""
    monkeypatch.setattr(attend, "LEGACY_PAYS_FROM", 0)


class Inputs(NamedTuple):
    """A call's frames and masks, True = may attend; in "cached" the first frames come from a cache."""

    x: Tensor
    mode: str

    @property
    def start(self) -> int:
        return CACHED if self.mode == "cached" else 0

    @property
    def keys(self) -> Tensor | None:
        """(B, Lk)"""
        return None if self.mode == "all" else torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 4]])

    @property
    def chunks(self) -> Tensor | None:
        """(Lq, Lk)"""
        frames = torch.arange(LENGTH)
        return (frames[self.start :, None] // CHUNK >= frames // CHUNK) if self.mode in ("chunks", "cached") else None

    @property
    def both(self) -> Tensor | None:
        """(B, 1 or Lq, Lk)"""
        if self.keys is None or self.chunks is None:
            return None if self.keys is None else self.keys[:, None]
        return self.keys[:, None] & self.chunks

    def positions(self, rows: int) -> Tensor:
        return torch.randn(1, rows, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(self.x.dtype)


def _nemo(layer: Any, given: Inputs) -> Tensor:
    layer.cache_drop_size = 0
    mask = None if given.both is None else ~given.both.expand(BATCH, LENGTH - given.start, LENGTH)
    x = given.x[:, given.start :]
    cache = given.x[:, : given.start] if given.start else None
    output = layer(query=x, key=x, value=x, mask=mask, pos_emb=given.positions(2 * LENGTH - 1), cache=cache)
    return output[0] if given.start else output


def _nemo_local(layer: Any, given: Inputs) -> Tensor:
    hidden = torch.zeros(BATCH, LENGTH, dtype=torch.bool) if given.keys is None else ~given.keys
    return layer(given.x, given.x, given.x, pad_mask=hidden, pos_emb=given.positions(sum(layer.att_context_size) + 1))


def _nemo_transformer(layer: Any, given: Inputs) -> Tensor:
    seen = given.both
    blocks = None
    if seen is not None:
        seen = seen.expand(BATCH, LENGTH, LENGTH)
        blocks = create_block_mask(lambda b, h, q, k: seen[b, q, k], BATCH, 1, LENGTH, LENGTH, device="cpu")
    return layer(given.x, block_mask=blocks, pos_emb=given.positions(2 * LENGTH - 1))


def _espnet(layer: Any, given: Inputs, legacy: bool = False) -> Tensor:
    rows = LENGTH if legacy else 2 * LENGTH - 1
    return layer(given.x[:, given.start :], given.x, given.x, given.positions(rows), given.both)


def _transducer(layer: Any, given: Inputs) -> Tensor:
    hidden = torch.zeros(BATCH, LENGTH, dtype=torch.bool) if given.keys is None else ~given.keys
    chunks = None if given.chunks is None else ~given.chunks
    positions = given.positions(2 * LENGTH - given.start - 1)
    return layer(given.x[:, given.start :], given.x, given.x, positions, hidden, chunks, left_context=given.start)


def _wenet(layer: Any, given: Inputs, rows: int = 2 * LENGTH - 1) -> Tensor:
    x = given.x[:, given.start :]
    options: dict[str, Any] = {}
    if given.both is not None:
        # wenet's masks may be longer than the keys are
        options["mask"] = nn.functional.pad(given.both, (0, 3))
    if getattr(layer, "use_sdpa", False):
        seen = torch.ones(BATCH, 1, LENGTH, dtype=torch.bool) if given.both is None else given.both
        added = torch.linspace(-1, 1, seen.numel(), dtype=x.dtype).view(seen.shape)  # before the scale
        options["mask"] = added.masked_fill(~seen, -1e10)
    if given.start:
        _, keys, values = layer.forward_qkv(given.x, given.x, given.x)
        cache = (keys[:, :, : given.start], values[:, :, : given.start])
        options["cache"] = torch.cat(cache, dim=-1) if hasattr(layer, "do_rel_shift") else cache
    output, new_cache = layer(x, x, x, pos_emb=given.positions(rows), **options)
    if not layer.training:
        assert (new_cache if isinstance(new_cache, Tensor) else new_cache[0]).shape[2] == LENGTH
    return output


def _speechbrain(layer: Any, given: Inputs) -> Tensor:
    keys, chunks = (None if mask is None else ~mask for mask in (given.keys, given.chunks))
    x = given.x[:, given.start :] if given.start else given.x
    return layer(x, given.x, given.x, given.positions(2 * LENGTH - 1), keys, chunks)[0]


def _icefall(layer: Any, given: Inputs, name: str = "left_context") -> Tensor:
    keys, chunks = (None if mask is None else ~mask for mask in (given.keys, given.chunks))
    x = given.x.transpose(0, 1)
    rows = 2 * LENGTH - (1 if name == "offset" else given.start + 1)
    options: dict[str, Any] = {name: given.start} if given.start else {}
    output = layer(x[given.start :], x, x, given.positions(rows), key_padding_mask=keys, need_weights=False, attn_mask=chunks, **options)
    return output[0].transpose(0, 1)


class Case(NamedTuple):
    """A layer of a toolkit, and how its encoder calls it."""

    layer: str  # its name in `standins` and in `real`
    call: Callable[[Any, Inputs], Tensor]
    arguments: Callable[[float], tuple]  # from the rate of dropout
    options: dict[str, Any] = {}  # noqa: RUF012
    modes: tuple[str, ...] = MODES


def _sizes(rate: float) -> tuple:
    return (HEADS, SIZE, rate)


def _turned(rate: float) -> tuple:
    return (SIZE, HEADS, rate)


def _with_biases(rate: float) -> tuple:
    return (HEADS, SIZE, rate, None, None)


def _config(**more: Any) -> SimpleNamespace:
    settings = dict(d_model=64, n_heads=HEADS, qkv_bias=True, qk_norm=False, self_attention_model="rel_pos")  # heads of 16 at least
    return SimpleNamespace(**settings | more)


CASES = {
    "NeMo": Case("RelPositionMultiHeadAttention", _nemo, _with_biases),
    **{
        f"NeMo local {sides}": Case(
            "RelPositionMultiHeadAttentionLongformer", _nemo_local, _with_biases, {"att_context_size": sides}, MODES[:2]
        )
        for sides in ([3, 3], [4, 2], [1, 3], [0, 2], [20, 20])
    },
    "NeMo transformer": Case("NemoTransformer", _nemo_transformer, lambda rate: (_config(),), {}, MODES[:3]),
    "NeMo transformer qk_norm": Case("NemoTransformer", _nemo_transformer, lambda rate: (_config(qk_norm=True),), {}, MODES[:3]),
    "ESPnet": Case("RelPositionMultiHeadedAttention", _espnet, _sizes),
    "ESPnet zero_triu": Case("RelPositionMultiHeadedAttention", _espnet, _sizes, {"zero_triu": True}),
    "ESPnet legacy": Case("LegacyRelPositionMultiHeadedAttention", partial(_espnet, legacy=True), _sizes),
    "ESPnet legacy zero_triu": Case("LegacyRelPositionMultiHeadedAttention", partial(_espnet, legacy=True), _sizes, {"zero_triu": True}),
    "ESPnet transducer": Case("TransducerAttention", _transducer, _sizes),
    "ESPnet transducer simplified": Case("TransducerAttention", _transducer, _sizes, {"simplified_attention_score": True}),
    "wenet Shaw": Case("ShawRelPositionMultiHeadedAttention", _wenet, _sizes),
    "wenet Shaw sdpa": Case("ShawRelPositionMultiHeadedAttention", _wenet, _sizes, {"use_sdpa": True}),
    "wenet FireRed": Case("FiredRelPositionMultiHeadedAttention", _wenet, _sizes, {}, MODES[:3]),
    "wenet FireRed sdpa": Case("FiredRelPositionMultiHeadedAttention", _wenet, _sizes, {"use_sdpa": True}, MODES[:3]),
    "wenet Squeezeformer": Case("Squeezeformer", partial(_wenet, rows=LENGTH), _sizes, {"do_rel_shift": True, "adaptive_scale": True}),
    "SpeechBrain": Case("RelPosMHAXL", _speechbrain, _turned),
    "SpeechBrain vbias": Case("RelPosMHAXL", _speechbrain, _turned, {"vbias": True, "mask_pos_future": True}),
    "icefall": Case("IcefallAttention", _icefall, _turned),
    "icefall of old": Case("OldIcefallAttention", partial(_icefall, name="offset"), _turned),
}


def layer_of(case: Case, source: str, rate: float = 0.0) -> nn.Module:
    """In float64, every parameter random: biases that start at zero would hide u, v and their places."""
    torch.manual_seed(0)
    layer = getattr(LAYERS[source], case.layer)(*case.arguments(rate), **case.options).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return layer


def inputs(mode: str = "all", dtype: torch.dtype = torch.float64) -> Inputs:
    generator = torch.Generator().manual_seed(2)
    return Inputs(torch.randn(BATCH, LENGTH, SIZE, generator=generator, dtype=torch.float64).to(dtype), mode)


def results(case: Case, layer: nn.Module, mode: str) -> list[Tensor]:
    """Output, and gradients of the input and of every parameter."""
    given = inputs(mode)
    given.x.requires_grad_()
    layer.zero_grad()
    output = case.call(layer, given)
    factor = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
    (output * factor).sum().backward()
    return [output.detach(), given.x.grad, *(parameter.grad for parameter in layer.parameters() if parameter.grad is not None)]


def close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    assert len(ours) == len(theirs)
    largest = max(tensor.abs().max().item() for tensor in theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max().item() <= tolerance * largest


every = pytest.mark.parametrize(
    ("name", "source"),
    [
        pytest.param(name, source, id=f"{name}-{source}")
        for name, case in CASES.items()
        for source in LAYERS
        if hasattr(LAYERS[source], case.layer)
    ],
)


@every
def test_results_and_gradients_are_equal(name: str, source: str, monkeypatch) -> None:
    case = CASES[name]
    layer = layer_of(case, source)
    expected = {mode: results(case, layer, mode) for mode in case.modes}
    assert convert(layer) is layer
    assert convert(layer) is layer
    monkeypatch.setattr(type(layer), "forward", None)  # it is not called where relattn can compute
    # wenet's own softmax is in float32
    for mode in case.modes:
        close(results(case, layer, mode), expected[mode], 1e-6 if source == "real" and "wenet" in name else 1e-12)


@every
def test_revert_is_exact(name: str, source: str) -> None:
    case = CASES[name]
    layer = layer_of(case, source)
    before, attributes, state = case.call(layer, inputs()), set(vars(layer)), copy.deepcopy(layer.state_dict())
    convert(layer)
    converted = case.call(layer, inputs())
    twin = copy.deepcopy(layer)
    assert layer.state_dict().keys() == state.keys()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(case.call(twin, inputs()), converted)  # a copy is bound to itself
    assert revert(layer) is layer
    assert set(vars(layer)) - {"cache_drop_size"} == attributes - {"cache_drop_size"}
    assert torch.equal(case.call(layer, inputs()), before)


@every
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(name: str, source: str, autocast: bool) -> None:
    case = CASES[name]
    if source == "real" and (case.layer == "RelPosMHAXL" or "sdpa" in name or (not autocast and "zero_triu" in name)):
        pytest.skip("the original fails: its weights, mask or triangle are float32 beside values of half precision")
    layer = layer_of(case, source)
    exact = case.call(layer, inputs("padding"))
    layer, dtype = (layer.float(), torch.float32) if autocast else (layer.bfloat16(), torch.bfloat16)
    given = inputs("padding", dtype)
    found = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for change in (revert, convert):
            output = case.call(change(layer), given)
            found.append((output.double() - exact).abs().max().item())
            assert output.dtype == torch.bfloat16
    assert found[1] <= 1.5 * found[0] + 0.02 * exact.abs().max().item()


@every
def test_dropout(name: str, source: str) -> None:
    """Everything dropped is the same on both sides; in evaluation nothing is."""
    case = CASES[name]
    layer = layer_of(case, source, rate=1.0)
    mode = "padding"
    kept = case.call(layer, inputs(mode))
    expected = case.call(layer.train(), inputs(mode))
    convert(layer)
    close([case.call(layer, inputs(mode))], [expected], 1e-6)
    close([case.call(layer.eval(), inputs(mode))], [kept], 1e-6)


@pytest.mark.parametrize("source", [source for source in LAYERS if hasattr(LAYERS[source], "RelPositionMultiHeadAttention")])
def test_a_stream_is_the_whole(source: str) -> None:
    """NeMo's cache-aware streaming: chunks with cached frames give what the whole gives with its mask of chunks."""
    case = CASES["NeMo"]
    layer: Any = convert(layer_of(case, source))
    given = inputs("chunks")
    whole = layer(given.x, given.x, given.x, ~given.chunks[None].expand(BATCH, -1, -1), given.positions(2 * LENGTH - 1))
    layer.cache_drop_size, cache, parts = 0, given.x[:, :0], []
    table = given.positions(2 * LENGTH - 1)
    for part in given.x.split(CHUNK, dim=1):
        keys = cache.shape[1] + part.shape[1]
        frames = torch.arange(keys)
        mask = (frames[cache.shape[1] :, None] // CHUNK < frames // CHUNK).expand(BATCH, -1, -1)
        output, _ = layer(part, part, part, mask, table[:, LENGTH - keys : LENGTH + keys - 1], cache)
        cache = torch.cat([cache, part], dim=1)
        parts.append(output)
    close([torch.cat(parts, dim=1)], [whole], 1e-12)


def test_weights() -> None:
    given = inputs("padding")
    espnet: Any = layer_of(CASES["ESPnet"], "stand-in")
    plots: list[Tensor] = []
    espnet.register_forward_hook(lambda module, *_: plots.append(module.attn))
    for layer in (espnet, convert(espnet)):
        _espnet(layer, given)
    close(plots[1:], plots[:1], 1e-12)
    speechbrain: Any = convert(layer_of(CASES["SpeechBrain"], "stand-in"))
    arguments = (given.x, given.x, given.x, given.positions(2 * LENGTH - 1))
    assert speechbrain(*arguments)[1] is None
    assert speechbrain(*arguments, return_attn_weights=True)[1].shape == (BATCH, HEADS, LENGTH, LENGTH)
    close([speechbrain(*arguments, return_attn_weights=False)], [speechbrain(*arguments)[0]], 1e-12)
    icefall: Any = convert(layer_of(CASES["icefall"], "stand-in"))
    x = given.x.transpose(0, 1)
    assert icefall(x, x, x, given.positions(2 * LENGTH - 1), need_weights=True)[1].shape == (BATCH, LENGTH, LENGTH)


@pytest.mark.parametrize("shape", [(1, LENGTH), (1, 2 * LENGTH - 3), (2, 2 * LENGTH - 1)], ids=str)
def test_other_tables_are_the_originals(shape: tuple[int, int]) -> None:
    """What is no table of distances is not read as one: the original says what it has to say."""
    layer: Any = layer_of(CASES["ESPnet"], "stand-in")
    x, table = inputs().x, torch.randn(*shape, SIZE).double()

    def outcome() -> Any:
        try:
            return layer(x, x, x, table, None).tolist()
        except RuntimeError as error:
            return str(error)

    before = outcome()
    convert(layer)
    assert outcome() == before


def test_added_masks() -> None:
    """SpeechBrain's and icefall's masks may be numbers, for every head its own."""
    given = inputs("padding")
    mask = torch.randn(BATCH * HEADS, LENGTH, LENGTH, dtype=torch.float64)
    for name in ("SpeechBrain", "icefall"):
        layer: Any = layer_of(CASES[name], "stand-in")
        x = given.x.transpose(0, 1) if name == "icefall" else given.x
        expected, found = (
            change(layer)(x, x, x, given.positions(2 * LENGTH - 1), key_padding_mask=~given.keys, attn_mask=mask)[0]
            for change in (revert, convert)
        )
        close([found], [expected], 1e-12)


class _Renamed(standins.RelPositionMultiHeadedAttention):
    __module__ = standins._ESPNET

    def forward(self, query, key, value, positions, mask):
        return positions


class _Shifted(standins.RelPositionMultiHeadedAttention):
    def rel_shift(self, x):
        return super().rel_shift(x).flip(-1)


class _OfAUser(standins.RelPositionMultiHeadAttention):
    def forward_qkv(self, query, key, value):
        return super().forward_qkv(query, key, 2 * value)


_Renamed.__name__ = _Shifted.__name__ = "RelPositionMultiHeadedAttention"
_Shifted.__module__ = standins._ESPNET


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: _Renamed(HEADS, SIZE, 0.0), r"forward\(self query key value positions mask\), expected forward\(self query key value pos"),
        (lambda: _Shifted(HEADS, SIZE, 0.0), "its rel_shift is another one"),
        (lambda: _OfAUser(HEADS, SIZE, 0.0, None, None), r"_OfAUser of .*a subclass of RelPos.* with a forward_qkv of its own"),
    ],
    ids=["parameters", "shift", "subclass"],
)
def test_unknown_layouts_raise_and_change_nothing(layer: Callable[[], nn.Module], message: str) -> None:
    model = nn.Sequential(layer_of(CASES["ESPnet"], "stand-in"), layer())
    with pytest.raises(ValueError, match=f"^model: .*{message}.*nothing was converted$"):
        convert(model, strict=False)
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_version_is_named(monkeypatch) -> None:
    module = type(sys)("espnet")
    module.__version__ = "3.1"
    monkeypatch.setitem(sys.modules, "espnet", module)
    monkeypatch.setattr(standins._Layer, "__module__", "espnet.nets")
    layer = layer_of(CASES["ESPnet"], "stand-in")
    layer.h = 4.0
    with pytest.raises(ValueError, match=r"RelPositionMultiHeadedAttention of espnet 3\.1 is laid out .*its attribute h is float"):
        convert(layer)


REFUSED: dict[str, tuple[str, tuple, dict[str, Any], str]] = {
    "wenet's plain form": ("PlainWenet", (HEADS, SIZE, 0.0), {}, "defines rel_shift and never applies it"),
    "wenet's Squeezeformer": ("Squeezeformer", (HEADS, SIZE, 0.0), {}, "defines rel_shift and never applies it"),
    "NeMo's global tokens": (
        "RelPositionMultiHeadAttentionLongformer", (HEADS, SIZE, 0.0, None, None, [3, 3]), {"global_tokens": 1}, "global tokens"
    ),
    "NeMo's local form of any size": (
        "RelPositionMultiHeadAttentionLongformer", (HEADS, SIZE, 0.0, None, None, [-1, -1]), {}, r"\[-1, -1\] is no window"
    ),
    "NeMo's transformer without": ("NemoTransformer", (_config(self_attention_model="abs_pos"),), {}, "its positions are not relative"),
    "icefall's Zipformer": ("Zipformer", (), {}, "Zipformer makes its weights once"),
    "torchaudio": ("ConformerLayer", (SIZE, SIZE, HEADS, 3), {}, "torchaudio's Conformer has no relative term"),
}  # fmt: skip


@pytest.mark.parametrize("source", LAYERS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_relative_attention_is_refused(name: str, source: str, caplog) -> None:
    layer, arguments, options, message = REFUSED[name]
    if not hasattr(LAYERS[source], layer):
        pytest.skip("not installed")
    refused = getattr(LAYERS[source], layer)(*(arguments if source == "real" or layer != "ConformerLayer" else ()), **options)
    with pytest.raises(ValueError, match=f"^model: nothing to convert in this .*{message}"):
        convert(refused)
    model = nn.Sequential(refused, layer_of(CASES["ESPnet"], "stand-in"))
    with caplog.at_level(logging.INFO, "relattn.toolkits"):
        assert convert(refused, strict=False) is refused
        convert(model)
    assert "forward" not in vars(refused)
    assert caplog.messages[0].startswith("nothing to convert")
    assert "converted 1 RelPositionMultiHeadedAttention" in caplog.messages


def test_nothing_known() -> None:
    with pytest.raises(ValueError, match=r"nothing to convert in this Linear \(it has no layer of a class that relattn knows\)"):
        convert(nn.Linear(2, 2))


def test_no_toolkit_is_imported() -> None:
    program = "import sys, relattn.toolkits; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = set(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & {"transformers", "nemo", "espnet", "espnet2", "wenet", "speechbrain", "torchaudio", "conformer", "zipformer"}


# ---- whole encoders, where they are installed ----


def _espnet_encoder() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    module = pytest.importorskip("espnet2.asr.encoder.conformer_encoder")
    encoder = module.ConformerEncoder(20, output_size=16, attention_heads=4, linear_units=32, num_blocks=2)
    features = torch.randn(2, 90, 20)
    return encoder, lambda encoder: encoder(features, torch.tensor([90, 60]))[0]


def _speechbrain_encoder() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    real.layers()
    conformer = pytest.importorskip("speechbrain.lobes.models.transformer.Conformer")
    attention = sys.modules["speechbrain.nnet.attention"]
    encoder = conformer.ConformerEncoder(2, 16, 32, 4)
    x = torch.randn(2, 30, 16)
    positions = attention.RelPosEncXL(16)(x)
    hidden = torch.arange(30) >= torch.tensor([[30], [20]])
    return encoder, lambda encoder: encoder(x, src_key_padding_mask=hidden, pos_embs=positions)[0]


@pytest.mark.parametrize("build", [_espnet_encoder, _speechbrain_encoder])
def test_encoders(build: Callable[[], tuple[nn.Module, Callable[[Any], Tensor]]]) -> None:
    torch.manual_seed(0)
    encoder, run = build()
    encoder.eval()
    expected = run(encoder)
    close([run(convert(encoder))], [expected], 1e-5)
