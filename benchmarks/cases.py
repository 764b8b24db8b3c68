"""Cases that compare `relative_attention` on the native CPU kernel with other attention. Each runs in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import relattn
from benchmarks.measure import TensorStep, interleave
from benchmarks.peers import causal_sdpa, materialising_skew, sdpa
from benchmarks.report import Table, costs, speeds

HEADS = 8
OWN, BLOCKED, TORCH, SKEW = "relattn cpu", "relattn blocked", "torch, no relative term", "materialising skew"
FORWARD, BOTH = "forward", "forward + backward"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Side = Callable[..., Any]  # (query, key, value, rel_k) to output


def relative(backend: str, **options: Any) -> Side:
    return lambda query, key, value, rel_k: relattn.relative_attention(query, key, value, rel_k, backend=backend, **options)


def make_inputs(length: int, size: int, rows: int, heads: int = HEADS, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """query, key, value (1, heads, length, size) and rel_k (rows, size), all with a gradient."""
    torch.manual_seed(0)
    shapes = [(1, heads, length, size)] * 3 + [(rows, size)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def forward_step(side: Side, inputs: list[Tensor]) -> TensorStep:
    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (side(*inputs),)

    return step


def training_step(side: Side, inputs: list[Tensor]) -> TensorStep:
    grad_output = torch.randn_like(inputs[0])

    def step() -> tuple[Tensor, ...]:
        output = side(*inputs)
        # Unused: rel_k, by a side that has no relative term.
        return (output.detach(), *torch.autograd.grad(output, inputs, grad_output, allow_unused=True))

    return step


STEPS = {FORWARD: forward_step, BOTH: training_step}


def attention(
    length: int,
    size: int,
    seconds: float,
    sides: Sequence[str],
    goals: Mapping[str, Mapping[str, float]] | None = None,
    limits: Mapping[str, int] | None = None,
    heads: int = HEADS,
    dtype: str = "float32",
    clip: int | None = None,
    causal: bool = False,
) -> list[Table]:
    """Forward and forward + backward against `sides`; `limits`: rounds at most, of slow ones; `seconds` for each pass."""

    def functions(length: int) -> dict[str, Side]:
        options: dict[str, Any] = {"max_relative_position": (length - 1, 0), "is_causal": True} if causal else {}
        if clip is not None:
            options = {"max_relative_position": clip}
        known: dict[str, Side] = {OWN: relative("cpu", **options), BLOCKED: relative("blocked", **options), SKEW: materialising_skew}
        known[TORCH] = causal_sdpa if causal else sdpa
        return {name: known[name] for name in sides}

    def rows(length: int) -> int:
        return 2 * clip + 1 if clip is not None else length if causal else 2 * length - 1

    # On a short sequence all sides warm up, and those that compute the same are compared.
    small = make_inputs(256, size, rows(256), dtype=DTYPES[dtype])
    outputs = {name: training_step(side, small)()[0].float() for name, side in functions(256).items()}
    differences = [(output - outputs[OWN]).abs().max().item() for name, output in outputs.items() if name not in (OWN, TORCH)]

    inputs = make_inputs(length, size, rows(length), heads, DTYPES[dtype])
    setting = f"L = {length}, D = {size}" + (f", B * H = {heads}" if heads != HEADS else "")
    setting += ", clip 64" * (clip == 64) + ", causal" * causal + f", {dtype}" * (dtype != "float32")
    tables = []
    for kind, make_step in STEPS.items():
        steps = {name: make_step(side, inputs) for name, side in functions(length).items()}
        timings = interleave(steps, seconds, limits=limits, warm=length <= 4096)
        tables.append(speeds(f"{kind}, {setting}", OWN, timings, (goals or {}).get(kind)))
    if differences:
        tables[0]["largest_difference"] = max(differences)
    return tables


def decoding(dtype: str, seconds: float, keys: int = 4096, size: int = 64) -> list[Table]:
    """One and four new queries behind a cache of keys; torch's attention sees all keys, with neither mask nor relative term."""
    tables = []
    for queries in (1, 4):
        query, key, value, rel_k = make_inputs(keys, size, keys, dtype=DTYPES[dtype])
        inputs = [query[:, :, -queries:].contiguous(), key, value, rel_k]
        options = dict(max_relative_position=(keys - 1, 0), is_causal=True, query_offset=keys - queries)
        sides = {OWN: relative("cpu", **options), TORCH: sdpa, BLOCKED: relative("blocked", **options)}
        timings = interleave({name: forward_step(side, inputs) for name, side in sides.items()}, seconds)
        tables.append(speeds(f"decoding, Lq = {queries}, {keys} keys, D = {size}, {dtype}", OWN, timings))
    return tables


def layer(lengths: list[int], seconds: float, goals: Mapping[str, float]) -> list[Table]:
    """A training step of the layer against torch's; `goals` by length: at most so many times torch's time."""
    tables = []
    for length in lengths:
        torch.manual_seed(0)
        options: dict[str, Any] = dict(embed_dim=128, num_heads=4, batch_first=True)
        layers = {
            "nn.MultiheadAttention": torch.nn.MultiheadAttention(**options),
            "RelativeMultiheadAttention": relattn.RelativeMultiheadAttention(**options, max_relative_position=length - 1),
        }
        x = torch.randn(32, length, 128, requires_grad=True)
        steps = {name: lambda layer=layer, x=x: layer(x, x, x, need_weights=False)[0].sum().backward() for name, layer in layers.items()}
        title = f"layer, training step, L = {length}, batch 32, embed 128, 4 heads"
        goal = {"RelativeMultiheadAttention": goals[str(length)]} if str(length) in goals else None
        tables.append(costs(title, "nn.MultiheadAttention", interleave(steps, seconds), goal))
    return tables


def overhead(seconds: float) -> list[Table]:
    """Microseconds of a call that has next to nothing to compute."""
    tables = []
    for length in (1, 16, 64):
        inputs = make_inputs(length, 32, 2 * length - 1, heads=1)
        sides = {TORCH: sdpa, OWN: relative("cpu")}
        for kind, make_step in STEPS.items():
            timings = interleave({name: make_step(side, inputs) for name, side in sides.items()}, seconds)
            tables.append(costs(f"one call, {kind}, L = {length}, D = 32, B * H = 1", TORCH, timings, unit="us"))
    return tables


def variants(seconds: float, length: int = 1024, size: int = 64) -> list[Table]:
    """The instruction sets that the library is built for and this processor has."""
    default = str(relattn.backends.cpu.variant())
    tables = []
    for dtype in DTYPES:
        side = forward_step(relative("cpu"), make_inputs(length, size, 2 * length - 1, dtype=DTYPES[dtype]))
        steps = {name: _with_variant(name, side) for name in ("amx", "avx512", "avx2", "portable") if _has_variant(name)}
        tables.append(costs(f"{FORWARD}, L = {length}, D = {size}, {dtype}", default, interleave(steps, seconds)))
    return tables


def _has_variant(name: str) -> bool:
    try:
        relattn.backends.cpu.use_variant(name)
    except ValueError:
        return False
    return True


def _with_variant(name: str, step: TensorStep) -> TensorStep:
    def with_variant() -> tuple[Tensor, ...]:
        relattn.backends.cpu.use_variant(name)
        return step()

    return with_variant


def features(seconds: float, length: int = 1024, size: int = 64) -> list[Table]:
    """Training steps with one more argument each, beside the plain call."""
    inputs = make_inputs(length, size, 2 * length - 1)
    table = torch.randn_like(inputs[3]).requires_grad_()
    padding = (torch.arange(length) < 3 * length // 4)[None]
    options: dict[str, dict[str, Any]] = {
        "plain (rel_k)": {},
        "dropout 0.1": {"dropout_p": 0.1},
        "rel_q": {"rel_q": table},
        "rel_v": {"rel_v": table},
        "window of 64 to both sides": {"window": (64, 64)},
        "boolean mask, 10 % hidden": {"attn_mask": torch.rand(length, length) > 0.1},
        "key padding, last quarter": {"key_mask": padding},
    }
    steps = {}
    for name, more in options.items():
        extra = [tensor for tensor in more.values() if isinstance(tensor, Tensor) and tensor.requires_grad]
        steps[name] = _step_with(more, inputs + extra)
    return [costs(f"{BOTH}, L = {length}, D = {size}", "plain (rel_k)", interleave(steps, seconds))]


def _step_with(options: dict[str, Any], inputs: list[Tensor]) -> TensorStep:
    side = relative("cpu", **options)
    return training_step(lambda query, key, value, rel_k, *_: side(query, key, value, rel_k), inputs)
