"""The figures that the native CPU kernel is held to: `python -m benchmarks.speed [--out DIR] [--only NAME ...] [--quick]`.

Every case runs in a process of its own; what is compared takes turns within it, with equal threads. Medians, quartiles and (rounds).
"torch, no relative term" is F.scaled_dot_product_attention on the same query, key and value: less work, so a bound, not a peer.
float32, B * H = 8, torch's default threads and one table row per distance unless said. About five minutes; --quick, under one, stays at
L = 1024, and shows no goals that are set for longer sequences.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import relattn
from benchmarks.cases import BLOCKED, BOTH, FORWARD, OWN, SKEW, TORCH, attention, decoding, features, layer, overhead, variants
from benchmarks.memory import growth, memory
from benchmarks.processes import Watch, in_fresh_process
from benchmarks.report import Table, goals, text


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
    listed.append(Case("layer", layer, dict(lengths=[16, 64, 128], seconds=0.7 if quick else 3.0, goals={"16": 1.0}), threads=1))
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
    parser.add_argument("--only", nargs="+", choices=list(NAMES), metavar="NAME", help=f"only these: {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="L = 1024, few rounds")
    options = parser.parse_args()
    reason = relattn.cpu.unavailable()
    if reason is not None:
        raise SystemExit(f"No native CPU kernel to measure: {reason}")

    results: dict[str, Any] = {"torch": torch.__version__, "relattn": relattn.__version__, "variant": relattn.cpu.variant()}
    results |= {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "quick": options.quick, "cases": []}
    print(f"relattn {relattn.__version__} ({results['variant']}), torch {torch.__version__}, {results['threads']} threads")
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
        results["cases"].append({"name": case.name, "threads": case.threads or results["threads"], **watch.seen, "tables": measured})
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
