"""Timed tests for regressions: `pytest benchmarks/ --benchmark-only`, half a minute. --benchmark-autosave keeps the figures and
--benchmark-compare shows them beside later ones.

Each also asserts that what it timed is right, in shape and finite; tests/ holds the comparisons with the reference.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import relattn
from benchmarks.peers import PEERS, Problem, own_fastest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = "bfloat16" if DEVICE == "cuda" else "float32"
SIDES = (own_fastest(DEVICE), "relattn-blocked", "sdpa")
BASE = Problem(1024, device=DEVICE, dtype=DTYPE)


def timed(benchmark, function, *arguments):
    """The last result; on a GPU each call is waited for."""

    def call():
        result = function(*arguments)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    return benchmark(call)


@pytest.mark.parametrize("peer", SIDES)
@pytest.mark.parametrize("length", [128, 1024])
def test_forward(benchmark, peer, length):
    benchmark.group = f"forward, L = {length}"
    problem = BASE._replace(length=length)
    inputs, attention = problem.inputs(), PEERS[peer].make(problem)
    with torch.no_grad():
        output = timed(benchmark, attention, *inputs)
    assert output.shape == inputs[0].shape
    assert output.isfinite().all()


@pytest.mark.parametrize("peer", SIDES)
@pytest.mark.parametrize("length", [128, 1024])
def test_training_step(benchmark, peer, length):
    benchmark.group = f"forward + backward, L = {length}"
    problem = BASE._replace(length=length, passed="train")
    inputs, attention = problem.inputs(), PEERS[peer].make(problem)
    wanted = inputs if PEERS[peer].relative else inputs[:3]
    grad_output = torch.randn_like(inputs[0])
    gradients = timed(benchmark, lambda: torch.autograd.grad(attention(*inputs), wanted, grad_output))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    "setting",
    [{"clip": 64}, {"causal": True}, {"head_dim": 128}, {"dtype": "bfloat16"}],
    ids=lambda setting: "-".join(map(str, setting)),
)
def test_variants(benchmark, setting):
    benchmark.group = "forward, L = 1024, one setting changed"
    problem = BASE._replace(**setting)
    inputs, attention = problem.inputs(), PEERS[own_fastest(DEVICE)].make(problem)
    with torch.no_grad():
        assert timed(benchmark, attention, *inputs).isfinite().all()


@pytest.mark.parametrize("peer", SIDES)
def test_decoding(benchmark, peer):
    benchmark.group = "one query, 4096 keys"
    problem = BASE._replace(length=4096, passed="decode")
    inputs, attention = problem.inputs(), PEERS[peer].make(problem)
    with torch.no_grad():
        assert timed(benchmark, attention, *inputs).shape == inputs[0].shape


@pytest.mark.parametrize("kind", ["RelativeMultiheadAttention", "nn.MultiheadAttention"])
def test_layer(benchmark, kind):
    benchmark.group = "layer, training step, L = 128, batch 8, embed 256, 4 heads"
    options: dict[str, Any] = dict(embed_dim=256, num_heads=4, batch_first=True, device=DEVICE)
    own = kind == "RelativeMultiheadAttention"
    layer: torch.nn.Module = torch.nn.MultiheadAttention(**options)
    if own:
        layer = relattn.RelativeMultiheadAttention(**options, max_relative_position=127)
    x = torch.randn(8, 128, 256, device=DEVICE, requires_grad=True)

    def step():
        layer.zero_grad()
        layer(x, x, x, need_weights=False)[0].sum().backward()

    timed(benchmark, step)
    gradients = [parameter.grad for parameter in layer.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
