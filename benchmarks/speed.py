"""The figures that the native CPU kernel is held to: `python -m benchmarks.speed [--out DIR] [--only NAME ...] [--quick]`.

Every case runs in a process of its own; what is compared takes turns within it, with equal threads. Medians, quartiles
and (rounds). "torch, no relative term" is F.scaled_dot_product_attention on the same query, key and value: less work, so
a bound, not a peer. float32, B * H = 8, torch's default threads and one table row per distance unless said. About five
minutes; --quick, under one, stays at L = 1024, and shows no goals that are set for longer sequences.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import relattn
from benchmarks.measure import Step, TensorStep, extra_memory, interleave
from benchmarks.peers import PEERS, Problem, step
from benchmarks.processes import Watch, in_fresh_process
from benchmarks.report import Table, costs, goals, judged, speeds, text

# Sixteenths in 32 of the 376 chorales of examples/chorales: sorted by length and cut into 32 parts, the middle of each.
CHORALES = [
    132, 132, 148, 164, 164, 176, 180, 192, 196, 196, 196, 196, 208, 212, 224, 228,
    228, 240, 244, 256, 256, 260, 260, 260, 276, 288, 304, 320, 340, 388, 432, 472,
]  # fmt: skip

OWN, BLOCKED, TORCH, SKEW = "relattn cpu", "relattn blocked", "torch, no relative term", "materialising skew"
_PEERS = {OWN: "relattn-cpu", BLOCKED: "relattn-blocked", TORCH: "sdpa", SKEW: "skew"}
FORWARD, BOTH = "forward", "forward + backward"
_PASSES = {FORWARD: "forward", BOTH: "train"}
_MIB = 2**20


def _steps(problem: Problem, sides: Sequence[str], inputs: Sequence[Tensor] | None = None) -> dict[str, TensorStep]:
    inputs = problem.inputs() if inputs is None else inputs
    return {name: step(PEERS[_PEERS[name]].make(problem), inputs, problem.passed == "train") for name in sides}


# ---- time ----


def attention(
    length: int,
    size: int,
    seconds: float,
    sides: Sequence[str],
    goals: Mapping[str, Mapping[str, float]] | None = None,
    limits: Mapping[str, int] | None = None,
    heads: int = 8,
    dtype: str = "float32",
    clip: int | None = None,
    causal: bool = False,
) -> list[Table]:
    """Forward and forward + backward against `sides`; `limits`: rounds at most, of slow ones; `seconds` for each pass."""
    problem = Problem(length, "train", 1, heads, size, dtype, causal=causal, clip=clip)
    # On a short sequence all sides warm up, and those that compute the same are compared.
    outputs = {name: call()[0].float() for name, call in _steps(problem._replace(length=256, heads=8), sides).items()}
    differences = [
        (output - outputs[OWN]).abs().max().item() for name, output in outputs.items() if name not in (OWN, TORCH)
    ]

    inputs = problem.inputs()
    setting = f"L = {length}, D = {size}" + (f", B * H = {heads}" if heads != 8 else "")
    setting += ", clip 64" * (clip == 64) + ", causal" * causal + f", {dtype}" * (dtype != "float32")
    tables = []
    for kind, passed in _PASSES.items():
        steps = _steps(problem._replace(passed=passed), sides, inputs)
        timings = interleave(steps, seconds, limits=limits, warm=length <= 4096)
        tables.append(speeds(f"{kind}, {setting}", OWN, timings, (goals or {}).get(kind)))
    if differences:
        tables[0]["largest_difference"] = max(differences)
    return tables


def short(seconds: float, goals: Sequence[tuple[Sequence[int], float]]) -> list[Table]:
    """Batches of short sequences, what BERT-like models and chorales are made of. `goals`: (B, H, L, D), and so many times torch's time."""
    tables = []
    for (batch, heads, length, size), goal in goals:
        for kind, passed in _PASSES.items():
            steps = _steps(Problem(length, passed, batch, heads, size), [OWN, TORCH, SKEW])
            title = f"{kind}, B = {batch}, H = {heads}, L = {length}, D = {size}"
            tables.append(speeds(title, OWN, interleave(steps, seconds), {TORCH: round(1 / goal, 2)}))
    return tables


def log_normal(largest: int) -> list[int]:
    torch.manual_seed(0)
    lengths = (torch.randn(32) * 0.6).exp()
    return (lengths * (largest / lengths.max())).clamp(min=10).long().tolist()


def packed(seconds: float, numbers: list[int], heads: int = 8, size: int = 64, clip: int = 128) -> list[Table]:
    """Sequences of these lengths: packed, padded with key_lengths, and one call each."""
    torch.manual_seed(0)
    lengths, largest = torch.tensor(numbers), max(numbers)
    ends, total = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.sum())
    table = torch.randn(2 * clip + 1, size, requires_grad=True)
    inputs = [torch.randn(total, heads, size, requires_grad=True) for _ in range(3)] + [table]
    real = torch.arange(largest) < lengths[:, None]
    padded = [torch.zeros(len(numbers), largest, heads, size) for _ in range(3)]
    for whole, tensor in zip(padded, inputs, strict=False):
        whole[real] = tensor.detach()
    padded_inputs = [whole.requires_grad_() for whole in padded] + [table]

    def as_padded(query: Tensor, key: Tensor, value: Tensor, rel_k: Tensor) -> Any:
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        output: Any = relattn.relative_attention(query, key, value, rel_k, key_lengths=lengths, backend="cpu")
        return output.transpose(1, 2)

    def one_by_one(query: Tensor, key: Tensor, value: Tensor, rel_k: Tensor) -> Any:
        parts = zip(*(tensor.split(lengths.tolist()) for tensor in (query, key, value)), strict=True)
        each = [[tensor.transpose(0, 1)[None] for tensor in part] for part in parts]
        outputs: list[Any] = [relattn.relative_attention(q, k, v, rel_k, backend="cpu") for q, k, v in each]
        return torch.cat(outputs, 2)[0].transpose(0, 1)

    together: Any = functools.partial(relattn.relative_attention_varlen, cu_seqlens_q=ends, backend="cpu")
    tables = []
    for kind, passed in _PASSES.items():
        train = passed == "train"
        steps = {
            OWN: step(together, inputs, train), "padded, key_lengths": step(as_padded, padded_inputs, train),
            "one call a sequence": step(one_by_one, inputs, train),
        }  # fmt: skip
        share = lengths.float().mean() / largest
        title = f"{kind}, {len(numbers)} packed sequences, {min(numbers)} to {largest} tokens, mean / longest {share:.2f}"
        wanted = {"one call a sequence": 0.9} | ({"padded, key_lengths": 1.8} if share < 0.4 else {})
        tables.append(speeds(title, OWN, interleave(steps, seconds), wanted))
    return tables


def chunked(seconds: float, length: int, size: int = 64, chunk: tuple[int, int] = (64, 4)) -> list[Table]:
    """A query sees its chunk and some before it, against all keys."""
    inputs = Problem(length, "train", head_dim=size).inputs()
    tables = []
    for kind, passed in _PASSES.items():
        calls: dict[str, Any] = {OWN: dict(chunk=chunk), "the same, all keys": {}}
        sides: dict[str, Any] = {name: functools.partial(relattn.relative_attention, backend="cpu", **more) for name, more in calls.items()}
        whole = {name: step(side, inputs, passed == "train") for name, side in sides.items()}
        title = f"{kind}, L = {length}, D = {size}, chunks of {chunk[0]} with {chunk[1]} before"
        goal = {"the same, all keys": 20.0} if length >= 8192 else None
        tables.append(speeds(title, OWN, interleave(whole, seconds), goal))
        call = dict(kind=kind, length=length, heads=8, size=size)
        (part, _), (all_keys, _) = (in_fresh_process(one_call, call | more) for more in ({"chunk": chunk}, {}))
        row = {"name": kind, "value": round(part / _MIB, 2), "unit": "MiB"} | judged(part / max(all_keys, 1), 1.05, at_most=True)
        title = f"extra memory, L = {length}, chunks of {chunk[0]} with {chunk[1]} before"
        tables.append({"title": title, "figure": "times that of the same with all keys", "rows": [row]})
    return tables


def decoding(
    dtype: str, seconds: float, keys: int = 4096, size: int = 64, counts: Sequence[int] = (1, 4), goal: float | None = None
) -> list[Table]:
    """New queries behind a cache of keys; torch's attention sees all keys, with neither mask nor relative term. `goal`: times its time."""
    tables = []
    query, key, value, rel_k = Problem(keys, head_dim=size, dtype=dtype, causal=True).inputs()
    for queries in counts:
        inputs = [query[:, :, -queries:].contiguous(), key, value, rel_k]
        call = functools.partial(
            relattn.relative_attention, max_relative_position=(keys - 1, 0), is_causal=True, query_offset=keys - queries
        )
        sides: dict[str, Callable[..., Any]] = {
            OWN: functools.partial(call, backend="cpu"),
            TORCH: PEERS["sdpa"].make(Problem(keys)),
            BLOCKED: functools.partial(call, backend="blocked"),
        }
        timings = interleave({name: step(side, inputs, False) for name, side in sides.items()}, seconds)
        goals = None if goal is None else {TORCH: round(1 / goal, 2)}
        tables.append(speeds(f"decoding, Lq = {queries}, {keys} keys, D = {size}, {dtype}", OWN, timings, goals))
    return tables


def layer(lengths: list[int], seconds: float, goals: Mapping[str, float]) -> list[Table]:
    """A training step of the layer against torch's; `goals` by length: at most so many times torch's time."""
    tables = []
    for length in lengths:
        torch.manual_seed(0)
        options: dict[str, Any] = dict(embed_dim=128, num_heads=4, batch_first=True)
        layers = {
            "nn.MultiheadAttention": torch.nn.MultiheadAttention(**options),
            "RelativeMultiheadAttention": relattn.RelativeMultiheadAttention(
                **options, max_relative_position=length - 1
            ),
        }
        x = torch.randn(32, length, 128, requires_grad=True)
        steps = {name: functools.partial(_train_layer, layer, x) for name, layer in layers.items()}
        title = f"layer, training step, L = {length}, batch 32, embed 128, 4 heads"
        goal = {"RelativeMultiheadAttention": goals[str(length)]} if str(length) in goals else None
        tables.append(costs(title, "nn.MultiheadAttention", interleave(steps, seconds), goal))
    return tables


def _train_layer(layer: torch.nn.Module, x: Tensor) -> None:
    layer(x, x, x, need_weights=False)[0].sum().backward()


def overhead(seconds: float) -> list[Table]:
    """Microseconds of a call that has next to nothing to compute."""
    tables = []
    for length in (1, 16, 64):
        for kind, passed in _PASSES.items():
            problem = Problem(length, passed, heads=1, head_dim=32)
            timings = interleave(_steps(problem, (TORCH, OWN)), seconds)
            tables.append(costs(f"one call, {kind}, L = {length}, D = 32, B * H = 1", TORCH, timings, unit="us"))
    return tables


def variants(seconds: float, length: int = 1024, size: int = 64) -> list[Table]:
    """The instruction sets that the library is built for and this processor has."""
    default = str(relattn.backends.cpu.variant())
    tables = []
    for dtype in ("float32", "bfloat16"):
        call = _steps(Problem(length, head_dim=size, dtype=dtype), [OWN])[OWN]
        steps = {
            name: _with_variant(name, call) for name in ("amx", "avx512", "avx2", "portable") if _has_variant(name)
        }
        tables.append(costs(f"{FORWARD}, L = {length}, D = {size}, {dtype}", default, interleave(steps, seconds)))
    return tables


def _has_variant(name: str) -> bool:
    try:
        relattn.backends.cpu.use_variant(name)
    except ValueError:
        return False
    return True


def _with_variant(name: str, call: Step) -> Step:
    def with_variant() -> object:
        relattn.backends.cpu.use_variant(name)
        return call()

    return with_variant


def features(seconds: float, length: int = 1024, size: int = 64) -> list[Table]:
    """Training steps with one more argument each, beside the plain call."""
    inputs = Problem(length, "train", head_dim=size).inputs()
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
    """`inputs`: query, key, value and rel_k, then tensors among the options that get gradients too."""

    def attention(query: Tensor, key: Tensor, value: Tensor, rel_k: Tensor, *_: Tensor) -> Any:
        return relattn.relative_attention(query, key, value, rel_k, backend="cpu", **options)

    return step(attention, inputs, True)


# ---- memory, of a process's first call ----


def one_call(kind: str, length: int, heads: int, size: int, chunk: tuple[int, int] | None = None) -> tuple[int, int]:
    """Bytes at the peak beyond inputs and results, and bytes of the results (output, gradients)."""
    # What any first use loads and starts; by another backend, for this one's may keep memory for the next call.
    problem = Problem(length, _PASSES[kind], heads=heads, head_dim=size)
    _steps(problem._replace(length=64, heads=8), [BLOCKED])[BLOCKED]()
    attention: Any = functools.partial(relattn.relative_attention, chunk=chunk, backend="cpu")
    return extra_memory(step(attention, problem.inputs(), problem.passed == "train"))


def memory(length: int, heads: int, size: int = 64) -> list[Table]:
    """Peak memory beyond inputs, outputs and gradients, in multiples of the query's size.

    The goal is 4 of them, a float32 table for each thread and 8 MB.
    """
    query, table = 4 * heads * length * size, 4 * (2 * length - 1) * size
    allowed = 4 * query + torch.get_num_threads() * table + 8e6
    rows = []
    for kind in _PASSES:
        extra, _ = in_fresh_process(one_call, dict(kind=kind, length=length, heads=heads, size=size))
        rows.append(
            {"name": kind, "value": round(extra / _MIB, 2), "unit": "MiB"}
            | judged(extra / query, allowed / query, at_most=True)
        )
    title = f"extra memory, L = {length}, D = {size}, B * H = {heads} (query: {query / _MIB:.1f} MiB)"
    return [{"title": title, "figure": "times the query's size", "rows": rows}]


def growth(longest: int, seconds: float, size: int = 64) -> list[Table]:
    """Time and memory of the forward pass of one head, lengths doubling; memory beyond the inputs, with the output."""
    lengths = [2**power for power in range(9, longest.bit_length())]
    rows: list[dict[str, Any]] = []
    for length in lengths:
        timing = interleave(_steps(Problem(length, heads=1, head_dim=size), [OWN]), seconds)[OWN]
        extra, output = in_fresh_process(one_call, dict(kind=FORWARD, length=length, heads=1, size=size))
        rows.append(
            {"name": f"L = {length}", "value": timing["median_ms"], "unit": "ms", "quartiles": timing["quartiles_ms"]}
        )
        rows[-1] |= {"rounds": timing["rounds"], "figure": round((extra + output) / _MIB, 3)}
    exponents = {}
    for name, field in (("time", "value"), ("memory", "figure")):
        points = [
            (math.log(length), math.log(max(row[field], 1e-3))) for length, row in zip(lengths, rows, strict=True)
        ]
        exponents[name] = [_slope(points), _slope(points[len(points) // 2 :])]
    notes = [
        f"{name} grows as L^{whole:.2f}; over the longer half of the lengths, L^{half:.2f}"
        for name, (whole, half) in exponents.items()
    ]
    title = f"growth, forward, D = {size}, B * H = 1"
    return [{"title": title, "figure": "MiB, output included", "rows": rows, "exponents": exponents, "notes": notes}]


def _slope(points: list[tuple[float, float]]) -> float:
    return round(statistics.linear_regression(*zip(*points, strict=True)).slope, 3)


# ---- all cases, and the command ----


class Case(NamedTuple):
    name: str  # for --only; several cases may share it
    function: Callable[..., list[Table]]
    arguments: dict[str, Any]
    threads: int | None = None


NAMES = {
    "attention": "unclipped relative attention against torch's attention without a relative term, and the materialising skew",
    "clip": "distances clipped at 64",
    "causal": "causal, with one table row for each distance to the left",
    "bfloat16": "in bfloat16, both sides",
    "decoding": "new queries behind a cache of keys",
    "short": "batches of short sequences",
    "packed": "packed sequences against padded ones",
    "chunk": "chunks of keys",
    "layer": "the layer, without weights, on one thread",
    "overhead": "what a call costs, on one thread",
    "memory": "peak memory of a call beyond its inputs, outputs and gradients",
    "growth": "growth with the length",
    "variants": "instruction sets",
    "features": "what a feature costs",
}


def cases(quick: bool) -> list[Case]:
    unclipped = {FORWARD: {TORCH: 0.70, SKEW: 6.0}, BOTH: {TORCH: 0.62, SKEW: 4.0}}
    with_skew = [OWN, TORCH, SKEW, BLOCKED]
    pair = [OWN, TORCH]
    lengths = [1024] if quick else [1024, 4096, 16384]
    listed = []
    for length in lengths:
        for size in (64, 128):
            arguments: dict[str, Any] = dict(length=length, size=size, goals=unclipped, sides=with_skew)
            if length == 1024:
                arguments |= dict(seconds=1.0 if quick else 4.0, limits={SKEW: 5, BLOCKED: 8})
            elif length == 4096:
                arguments |= dict(seconds=8.0, limits={SKEW: 2, BLOCKED: 3})  # the skew takes about 2 GiB here
            else:  # fewer heads, for time's sake
                arguments |= dict(seconds=8.0, limits={BLOCKED: 1}, sides=[OWN, TORCH, BLOCKED], heads=4)
            listed.append(Case("attention", attention, arguments))
    long = dict(length=1024 if quick else 4096, seconds=0.7 if quick else 5.0, sides=pair)
    for name, setting, goal in (
        ("clip", dict(clip=64, size=64), {FORWARD: {TORCH: 0.9}, BOTH: {TORCH: 0.9}}),
        ("causal", dict(causal=True, size=64), {FORWARD: {TORCH: 0.65}, BOTH: {TORCH: 0.65}}),
        ("bfloat16", dict(dtype="bfloat16", size=64), {FORWARD: {TORCH: 0.6}}),
        ("bfloat16", dict(dtype="bfloat16", size=128), {FORWARD: {TORCH: 0.6}}),
    ):
        listed.append(Case(name, attention, long | setting | {"goals": {} if quick else goal}))
    few = 0.3 if quick else 1.0
    listed += [Case("decoding", decoding, dict(dtype=dtype, seconds=few)) for dtype in ("float32", "bfloat16")]
    for keys, most in ((256, 1.3), (1024, 1.3), (4096, 1.0), (16384, 1.0)):
        listed.append(Case("decoding", decoding, dict(dtype="float32", seconds=few, keys=keys, counts=(1,), goal=most)))
    listed.append(Case("short", short, dict(seconds=few, goals=[((8, 4, 16, 32), 1.3), ((4, 8, 64, 64), 1.4), ((1, 16, 125, 64), 1.0)])))
    listed.append(Case("packed", packed, dict(seconds=1.0 if quick else 8.0, numbers=log_normal(300 if quick else 1000))))
    listed += [] if quick else [Case("packed", packed, dict(seconds=8.0, numbers=CHORALES))]
    listed.append(Case("chunk", chunked, dict(seconds=1.0 if quick else 8.0, length=1024 if quick else 8192)))
    listed.append(
        Case("layer", layer, dict(lengths=[16, 64, 128], seconds=0.7 if quick else 3.0, goals={"16": 1.0}), threads=1)
    )
    listed.append(Case("overhead", overhead, dict(seconds=few), threads=1))
    listed += [Case("memory", memory, dict(length=length, heads=8)) for length in lengths]
    listed += [] if quick else [Case("memory", memory, dict(length=16384, heads=1))]
    listed.append(Case("growth", growth, dict(longest=4096 if quick else 32768, seconds=0.2 if quick else 1.0)))
    listed.append(Case("variants", variants, dict(seconds=1.0 if quick else 4.0)))
    listed.append(Case("features", features, dict(seconds=2.0 if quick else 8.0)))
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for speed.json")
    parser.add_argument(
        "--only", nargs="+", choices=list(NAMES), metavar="NAME", help=f"only these: {', '.join(NAMES)}"
    )
    parser.add_argument("--quick", action="store_true", help="L = 1024, few rounds")
    options = parser.parse_args()
    reason = relattn.backends.cpu.unavailable()
    if reason is not None:
        raise SystemExit(f"No native CPU kernel to measure: {reason}")

    results: dict[str, Any] = {
        "torch": torch.__version__,
        "relattn": relattn.__version__,
        "variant": relattn.backends.cpu.variant(),
    }
    results |= {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "quick": options.quick, "cases": []}
    print(
        f"relattn {relattn.__version__} ({results['variant']}), torch {torch.__version__}, {results['threads']} threads"
    )
    tables: list[Table] = []
    heading = None
    for case in cases(options.quick):
        if options.only and case.name not in options.only:
            continue
        if case.name != heading:
            heading = case.name
            print(f"\n== {heading}: {NAMES[heading]}", flush=True)
        with Watch() as watch:
            measured = in_fresh_process(case.function, case.arguments, case.threads)
        tables += measured
        results["cases"].append(
            {"name": case.name, "threads": case.threads or results["threads"], **watch.seen, "tables": measured}
        )
        print("\n".join(text(table) for table in measured))
        print(f"  [{_conditions(watch.seen)}]", flush=True)

    missed, count = goals(tables)
    results["goals"] = {"set": count, "missed": missed}
    print(f"\n{count - len(missed)} of {count} goals met" + "".join(f"\n  missed: {line}" for line in missed))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / "speed.json"
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"wrote {path}")


def _conditions(seen: dict[str, Any]) -> str:
    before, after = seen["load"]
    others = seen["other_processes_cores"]
    busy = "" if others is None else f", other processes used {others:.2f} cores"
    return f"{seen['seconds']:.0f} s, load {before:.2f} before, {after:.2f} after{busy}"


if __name__ == "__main__":
    main()
