"""Funnel's attention in all its settings: shifted and factorized, with the first token apart or not, pooled queries, types of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from relattn.huggingface import convert, revert
from relattn.huggingface.conversion import original
from relattn.huggingface.families import funnel
from tests.huggingface.models import LENGTH, PADDED, built, close, given, gradients, seen

SETTINGS: list[dict[str, Any]] = [
    {},
    dict(attention_type="factorized"),
    dict(separate_cls=False),
    dict(separate_cls=False, attention_type="factorized", pool_q_only=False),
    dict(pool_q_only=False),
    dict(truncate_seq=False),
    dict(truncate_seq=False, attention_type="factorized", block_sizes=[1, 1, 1]),
]


def typed(length: int = LENGTH, padded: bool = True) -> dict[str, Any]:
    """Two segments, and the first token of a type that is like both."""
    types = (torch.arange(length) > length // 2).long().repeat(2, 1)
    types[:, 0] = 2
    return given("funnel", length=length, padded=padded) | {"token_type_ids": types}


@pytest.fixture
def no_original(monkeypatch) -> None:
    def refuse(module: Any, method: str = "forward") -> Any:
        assert method != "forward", "the original ran"
        return original(module, method)

    monkeypatch.setattr(funnel, "original", refuse)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("length", [LENGTH, 16, 3])
def test_equals_the_original(settings: dict, length: int, no_original: None) -> None:
    """In positions and gradients; types are 0 where none are given."""
    model = built("funnel", **settings).train()
    for inputs in (typed(length, length > PADDED), given("funnel", length=length, padded=False)):
        padded = "attention_mask" in inputs
        expected = model(**inputs)[0]
        right = gradients(model, expected, padded)
        convert(model)
        output = model(**inputs)[0]
        where = seen(output, padded)
        close(output[where], expected[where], 1e-6)
        for name, gradient in gradients(model, output, padded).items():
            close(gradient, right[name], 1e-5)
        revert(model)


def test_other_types_and_weights_are_the_originals() -> None:
    model, inputs = built("funnel"), typed()
    expected = model(**inputs, output_attentions=True)
    found = convert(model)(**inputs, output_attentions=True)
    for weights, right in zip(found.attentions, expected.attentions, strict=True):
        assert torch.equal(weights, right)
    inputs["token_type_ids"][:, 5] = 3
    output = model(**inputs)[0]
    assert torch.equal(output, built("funnel")(**inputs)[0])


@pytest.mark.parametrize("kind", ["relative_shift", "factorized"])
def test_dropout(kind: str) -> None:
    """Of a weight with its mean: the average over many draws is the result without."""
    settings: dict[str, Any] = dict(attention_type=kind, block_sizes=[1, 1], num_decoder_layers=1, attention_dropout=0.3)
    model, inputs = convert(built("funnel", torch.float32, **settings)), given("funnel", torch.float32, 12, padded=False)
    module = model.encoder.blocks[0][0].attention
    found: list[torch.Tensor] = []
    module.post_proj.register_forward_hook(lambda _module, args, _output: found.append(args[0]))
    with torch.no_grad():
        model(**inputs)
        torch.manual_seed(0)
        module.train()
        many = {name: tensor.repeat(1500, *[1] * (tensor.dim() - 1)) for name, tensor in inputs.items()}
        model(**many)
    mean, spread = found[1].unflatten(0, (1500, 2)).mean(0), found[1].unflatten(0, (1500, 2)).std(0)
    assert spread.min() > 0
    assert ((mean - found[0]).abs() < 6 * spread / 1500**0.5 + 1e-5).all()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced_for_one_length() -> None:
    """The positions are Python's numbers: at another length it was silent and wrong, as the original is."""
    model, inputs = convert(built("funnel", torch.float32)).requires_grad_(False), given("funnel", torch.float32)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return model(**dict(zip(inputs, tensors, strict=True)))[0]

    traced = torch.jit.trace(run, tuple(inputs.values()), check_trace=False)
    others = {name: tensor.flip(0) for name, tensor in inputs.items()}
    close(traced(*others.values()), run(*others.values()), 1e-5)
    for length in (17, 29):
        with pytest.raises(RuntimeError, match="shape"):
            traced(*given("funnel", torch.float32, length).values())
