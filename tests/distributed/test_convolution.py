"""Frames that convolutions read across the borders of ranks, and a conformer of transformers over several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.distributed.processes import Failure

pytestmark = pytest.mark.xdist_group("distributed")

LENGTH = 44


def _convolved(group: Any, options: dict[str, Any], kernel: int, dilation: int, padding: Any) -> list[Tensor]:
    import relattn.distributed as parallel

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 6, kernel, dilation=dilation, padding=padding, groups=3), nn.Conv1d(6, 2, 1)).double()
    x = torch.randn(2, 3, LENGTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slope = torch.linspace(-1, 1, LENGTH, dtype=torch.float64)
    if group is None:
        output = model(x.requires_grad_())
        return [output.detach(), *torch.autograd.grad((output * slope).sum(), (x, *model.parameters()))]
    part, slope = parallel.shard(x, 2, group=group).detach().requires_grad_(), parallel.shard(slope, 0, group=group)
    with parallel.context_parallel(group, convolutions_of=model, **options):
        output = model(part)
    assert not any("forward" in vars(module) for module in model.modules())
    gradients = torch.autograd.grad((output * slope).sum(), (part, *model.parameters()))
    whole = [parallel.unshard(tensor.contiguous(), 2, LENGTH, group=group).detach() for tensor in (output, gradients[0])]
    return [*whole, *gradients[1:]]


@pytest.mark.parametrize("ranks", [1, 3, 4])
@pytest.mark.parametrize(("kernel", "dilation", "padding"), [(5, 1, 2), (4, 1, "same"), (3, 3, 3)])
def test_convolutions_read_across_the_borders(pool, ranks: int, kernel: int, dilation: int, padding: Any) -> None:
    """With 4 ranks the last has fewer frames."""
    output, of_input, *of_weights = _convolved(None, {}, kernel, dilation, padding)
    results = pool.values(ranks, _convolved, {}, kernel, dilation, padding)
    for found in results:
        torch.testing.assert_close(found[0], output, rtol=0.0, atol=1e-12)
        torch.testing.assert_close(found[1], of_input, rtol=0.0, atol=1e-12)
    for place, expected in enumerate(of_weights, 2):
        torch.testing.assert_close(sum(found[place] for found in results), expected, rtol=0.0, atol=1e-10)


def test_refusals(pool) -> None:
    for options, kernel, padding, message in (
        (dict(length=96), 3, 1, "tensor: expected 24 frames of the layout 'contiguous' of 96 tokens over 4 ranks: [24, 24, 24, 24], got "),
        (dict(layout="zigzag"), 3, 1, "layout: convolutions need 'contiguous', got 'zigzag'"),
        ({}, 3, 0, "model: 0 pads by 0, which does not keep the number of frames: shard behind it"),
        ({}, 41, 20, "tensor: rank 0 has 12 frames, too few for the 20 frames before and 20 behind that a convolution reads"),
    ):
        for found in pool.outcomes(4, _convolved, options, kernel, 1, padding):
            assert isinstance(found, Failure)
            assert found.kind == "ValueError"
            assert found.message.startswith(message)


def _w2v_bert(group: Any, length: int | None = None) -> tuple[Tensor, dict[str, Tensor], int]:
    """Output and gradients of a converted conformer with causal convolutions and padding; how often ranks told all others something."""
    import relattn.distributed as parallel
    from relattn.huggingface import convert
    from tests.huggingface.models import built

    model, asked = convert(built("wav2vec2-bert")), []
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, -7:] = 0
    inputs = dict(input_features=torch.randn(2, LENGTH, 10, generator=torch.Generator().manual_seed(3)).double(), attention_mask=mask)
    if group is None:
        output = model(**inputs).last_hidden_state * mask[..., None]
        output.square().sum().backward()
    else:
        inputs = {name: parallel.shard(tensor, 1, group=group) for name, tensor in inputs.items()}
        with parallel.context_parallel(group, convolutions_of=model, length=length), pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_gather", lambda *given, real=dist.all_gather, **others: (asked.append(1), real(*given, **others))[1])
            output = model(**inputs).last_hidden_state * inputs["attention_mask"][..., None]
            output.square().sum().backward()
        output = parallel.unshard(output, 1, LENGTH, group=group)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return output.detach(), gradients, len(asked)


@pytest.mark.parametrize("length", [None, LENGTH])
def test_a_conformer_over_ranks(pool, length: int | None) -> None:
    """Who says how long the sequence is has no rank ask the others, but for a group's first time."""
    pytest.importorskip("transformers")
    output, gradients, _ = _w2v_bert(None)
    results = pool.values(3, _w2v_bert, length)
    for found, _, asked in results:
        torch.testing.assert_close(found, output, rtol=0.0, atol=1e-10)
        assert asked > 2 if length is None else asked <= 1
    for name, gradient in gradients.items():
        total = sum(found[name] for _, found, _ in results)
        torch.testing.assert_close(total, gradient, rtol=0.0, atol=1e-9 * max(1.0, float(gradient.abs().max())))
