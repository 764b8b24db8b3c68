"""Every converted model against itself before, and what its family has of its own."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

from relattn.huggingface import convert
from relattn.huggingface.families import nemotron_asr_streaming as nemotron
from tests.huggingface.models import CASES, HEADS, HIDDEN, LENGTH, built, close, every_case, given, gradients, seen


@every_case
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
def test_equals_the_original(name: str, padded: bool) -> None:
    model, inputs = built(name), given(name, padded=padded)
    original = model(**inputs)[0]
    assert convert(model) is model
    assert sum("forward" in vars(module) for module in model.modules()) >= 2
    output = model(**inputs)[0]
    where = seen(output, padded)
    close(output[where], original[where], CASES[name].tolerance)


CONFORMERS = [name for name in CASES if name.startswith(("wav2vec2", "seamless"))]


@pytest.mark.parametrize("name", CONFORMERS)
def test_equals_the_original_under_eager(name: str) -> None:
    """Whose masks of padding are added to the scores; SeamlessM4T v2's boolean ones as they are, which is kept."""
    model, inputs = built(name), given(name)
    model.set_attn_implementation("eager")
    original = model(**inputs)[0]
    output = convert(model)(**inputs)[0]
    where = seen(output, True)
    close(output[where], original[where], CASES[name].tolerance)


@pytest.mark.parametrize(("buckets", "most"), [(3, 8), (4, 8), (5, 8), (7, 12), (9, 16), (16, 16), (8, 100)])
def test_deberta_beyond_its_buckets(buckets: int, most: int) -> None:
    model = built("deberta-v2", position_buckets=buckets, max_relative_positions=most)
    inputs = given("deberta-v2", length=150, padded=False)
    original = model(**inputs)[0]
    close(convert(model)(**inputs)[0], original, CASES["deberta-v2"].tolerance)


def test_parakeet_layers_take_other_masks() -> None:
    """As where a hook gives a layer a mask of its own, for local attention."""
    model, inputs = built("parakeet"), given("parakeet", padded=False)
    frames = torch.arange(model(**inputs)[0].shape[1])
    local = ((frames - frames[:, None]).abs() <= 1)[None, None]

    def narrow(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        return args, kwargs | {"attention_mask": local}

    encoder = next(module for module in model.modules() if type(module).__name__ == "ParakeetEncoder")
    for layer in encoder.layers:
        layer.register_forward_pre_hook(narrow, with_kwargs=True)
    original = model(**inputs)[0]
    close(convert(model)(**inputs)[0], original, CASES["parakeet"].tolerance)


def test_table_of_another_dtype() -> None:
    model, inputs = built("wav2vec2-bert", torch.float32), given("wav2vec2-bert", torch.float32)
    for layer in model.encoder.layers:
        layer.self_attn.distance_embedding.bfloat16()
    original = model(**inputs)[0]
    where = seen(original, True)
    close(convert(model)(**inputs)[0][where], original[where], 1e-4)


def test_settings_of_a_converted_encoder_are_the_models() -> None:
    model = convert(built("wav2vec2-bert"))
    model.encoder.config.layerdrop = 0.25
    assert model.config.layerdrop == 0.25
    model.encoder.config._attn_implementation = "eager"
    assert model.config._attn_implementation == "eager"


@every_case
def test_gradients_in_training_equal_the_original(name: str) -> None:
    model, inputs = built(name).train(), given(name)
    twin = convert(copy.deepcopy(model))
    expected = gradients(model, model(**inputs)[0], True)
    found = gradients(twin, twin(**inputs)[0], True)
    assert found.keys() == expected.keys()
    for parameter in expected:
        close(found[parameter], expected[parameter], 10 * CASES[name].tolerance)


@every_case
def test_native_kernel_and_autocast(name: str) -> None:
    model, inputs = built(name, torch.float32), given(name, torch.float32)
    original = model(**inputs)[0]
    where = seen(original, True)
    scale, usual = original[where].abs().max(), 0.05
    with (
        torch.autocast("cpu", torch.bfloat16),
        contextlib.suppress(RuntimeError),
    ):  # DeBERTa fails under autocast: a mask overflows
        usual = (model(**inputs)[0][where] - original[where]).abs().max() / scale
    convert(model)
    close(model(**inputs)[0][where], original[where], 2e-4)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs)[0]
        assert (output[where] - original[where]).abs().max() / scale < 2 * usual + 0.02
    output.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(
    "name", ["wav2vec2-bert", "wav2vec2-conformer", "parakeet", "xlnet", "deberta-v2", "fastspeech2"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(name: str, dtype: torch.dtype) -> None:
    exact = built(name, torch.float32)
    model, inputs = copy.deepcopy(exact).to(dtype), given(name, dtype)
    precise = {
        key: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    expected = exact(**precise)[0]
    where = seen(expected, True)
    usual = (model(**inputs)[0].float() - expected)[where].abs().max()
    output = convert(model)(**inputs)[0]
    assert output.dtype == dtype
    assert (output.float() - expected)[where].abs().max() < 2 * usual + 0.02 * expected[where].abs().max()


@every_case
def test_attention_weights(name: str) -> None:
    """Also where the original, with "sdpa", gives none: then as its "eager" has them."""
    if name.startswith("nemotron"):
        pytest.skip("its eager attention hides what its mask shows")
    if name in (*WITHOUT_WEIGHTS, "funnel"):
        pytest.skip("the original gives none, or of other shapes: test_funnel.py")
    # Beside "eager", SeamlessM4T v2 adds its boolean mask to the scores as ones, and Parakeet's padding becomes NaN.
    model, inputs = built(name), given(name, padded=not name.startswith(("seamless-v2", "parakeet")))
    if name == "seamless-v2-chunks":
        model.config.speech_encoder_chunk_size = LENGTH
    if not CASES[name].eager:
        model.set_attn_implementation("eager")
    expected = model(**inputs, output_attentions=True).attentions
    if name == "umt5" and not expected:
        pytest.skip("the original of this transformers (5.17) gives none")
    if not CASES[name].eager:
        model.set_attn_implementation("sdpa")
    output = convert(model)(**inputs, output_attentions=True)
    assert len(output.attentions) == len(expected) == 2
    for weights, right in zip(output.attentions, expected, strict=True):
        length = output[0].shape[1]
        assert weights.shape == right.shape == (2, HEADS, length, length)
        where = seen(output[0], True)
        close(weights.transpose(1, 2)[where], right.transpose(1, 2)[where], 1e-6)
    assert not model(**inputs).get("attentions")


def chunk_mask(length: int, chunk: tuple[int, int]) -> Tensor:
    """bool (L, L): keys of the query's own chunk and of so many before it."""
    chunks = torch.arange(length) // chunk[0]
    behind = chunks[:, None] - chunks
    return (behind >= 0) & (behind <= chunk[1])


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
def test_attention_weights_of_chunks(padded: bool) -> None:
    model, inputs = convert(built("nemotron")), given("nemotron", padded=padded)
    output = model(**inputs, output_attentions=True)
    close(output[0], model(**inputs)[0])
    length = output[0].shape[1]
    allowed = chunk_mask(length, (2, 2))[None] & seen(output[0], padded)[:, None, :]
    for weights in output.attentions:
        assert torch.equal(weights > 0, allowed[:, None].expand_as(weights))
        close(weights.sum(-1), allowed.any(-1)[:, None].expand(-1, HEADS, -1).double())


class Largest(TorchDispatchMode):
    """Notes the shapes of tensors that are large in two dimensions, in their own memory."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.found = length, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and sum(size >= self.length for size in tensor.shape) >= 2:
                own = tensor.untyped_storage().nbytes() // tensor.element_size()
                if own >= self.length**2:
                    self.found.add((str(function), tuple(tensor.shape)))
        return result


WITHOUT_WEIGHTS = ("granite", "granite5")  # whose originals, which attend within blocks, hold no tensor of length by length either
# Of the originals' own making, one for all heads: XLNet's mask, chunks of several.
WITH_A_MASK = {"xlnet"}


@every_case
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
def test_holds_no_tensor_of_length_by_length(name: str, padded: bool) -> None:
    length = 100
    model, inputs = built(name, torch.float32), given(name, torch.float32, length, padded)
    if (padded and name in WITH_A_MASK) or name in ("xlnet-uni", "seamless-v2-chunks"):
        pytest.skip("the model makes a mask of length by length")
    if name in WITHOUT_WEIGHTS:
        pytest.skip("nor does the original")
    with torch.no_grad():
        length = model(**inputs)[0].shape[1]
        with Largest(length) as before:
            model(**inputs)
        convert(model)
        with Largest(length) as after:
            model(**inputs)
    assert before.found
    assert not after.found


@pytest.mark.parametrize("size", [0, 1, 3])
@pytest.mark.parametrize("left", [0, 4, 40])
def test_chunks(size: int, left: int) -> None:
    """Nemotron's chunks of size + 1 frames against its own mask."""
    model, inputs = built("nemotron", sliding_window=left + 1), given("nemotron")
    original = model(**inputs, num_lookahead_tokens=size)[0]
    output = convert(model)(**inputs, num_lookahead_tokens=size)[0]
    where = seen(output, True)
    close(output[where], original[where])
    frames = torch.arange(12) < torch.tensor([[12], [3]])
    dense = chunk_mask(12, (size + 1, left // (size + 1)))
    expected = ~(dense & frames[:, None]).any(-1)
    assert torch.equal(nemotron._sees_none(frames, (size + 1, left // (size + 1))), expected)


def test_nemotron_streams_as_before() -> None:
    model = built("nemotron")
    inputs = given("nemotron", padded=False)["input_features"]

    def stream() -> Tensor:
        cache: dict[str, Any] = {}
        outputs = []
        for start in range(0, inputs.shape[1], 16):
            output = model(inputs[:, start : start + 16], use_cache=True, **cache)
            cache = {"past_key_values": output.past_key_values, "padding_cache": output.padding_cache}
            outputs.append(output.last_hidden_state)
        return torch.cat(outputs, 1)

    expected = stream()
    convert(model)
    close(stream(), expected)


@pytest.mark.parametrize("kind", ["bi", "uni"])
def test_xlnet_with_memory(kind: str) -> None:
    model, inputs = (
        built("xlnet", attn_type=kind),
        given("xlnet", padded=kind == "bi"),
    )  # it cannot join a causal mask and padding
    memory = model(**given("xlnet", padded=False)).mems
    expected = model(**inputs, mems=memory)[0]
    found = convert(model)(**inputs, mems=memory)[0]
    where = seen(found, kind == "bi")
    close(found[where], expected[where])
    assert not torch.equal(found, expected)


def test_xlnet_with_segments_or_two_streams_is_the_original() -> None:
    model, inputs = built("xlnet", torch.float32), given("xlnet", torch.float32)
    segments = {"token_type_ids": (torch.arange(LENGTH) > 11).long().expand(2, -1)}
    target = torch.zeros(2, 1, LENGTH)
    target[:, 0, -1] = 1.0
    hidden = torch.zeros(2, LENGTH, LENGTH)
    hidden[:, :, -1] = 1.0
    twin = convert(copy.deepcopy(model))
    for more in (segments, {"target_mapping": target, "perm_mask": hidden}):
        assert torch.equal(twin(**inputs, **more)[0], model(**inputs, **more)[0])


def test_deberta_with_states_of_its_own_is_the_original() -> None:
    """The enhanced mask decoder: queries that are not the keys."""
    for name in ("deberta-v2", "deberta-v2-c2p"):
        model, inputs = built(name), given(name)
        expected = model(**inputs, output_hidden_states=True)
        layer = model.encoder.layer[-1]
        states = expected.hidden_states[-1]
        arguments = dict(query_states=states, rel_embeddings=model.encoder.get_rel_embedding())
        mask = model.encoder.get_attention_mask(inputs["attention_mask"])
        right = layer(states, mask, relative_pos=model.encoder.get_rel_pos(states), **arguments)[0]
        convert(model)
        mask = model.encoder.get_attention_mask(inputs["attention_mask"])
        assert torch.equal(layer(states, mask, relative_pos=model.encoder.get_rel_pos(states), **arguments)[0], right)


def test_positions_of_another_length_are_refused() -> None:
    model = convert(built("parakeet"))
    with pytest.raises(ValueError, match="position_embeddings: expected 17 rows for 9 keys, got 19"):
        model.layers[0].self_attn(torch.randn(1, 9, HIDDEN).double(), torch.randn(1, 19, HIDDEN).double())
