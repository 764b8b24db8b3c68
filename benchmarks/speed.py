"""Speed and memory of the blocked backend and of the layer, against what the field does today.

    python -m benchmarks.speed [--out DIR]

- time: forward + backward at L = 2048 (float32, B * H = 8, D = 64, unclipped), relattn's blocked backend, the materialising skew and, as a
  ceiling, torch's attention with no relative term. The sides take turns in one process; medians.
- memory: extra memory of forward + backward, each in a fresh process: its high-water resident set less that before the call, inputs and
  their gradients already allocated; at L = 2048 both, at L = 16384 blocked alone (Q E^T by itself is 16 GiB there).
- layer: a training step at L = 16 (embed 128, 4 heads, batch 32, need_weights=False) on one thread against nn.MultiheadAttention.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import relattn
from benchmarks.peers import materialising_skew, sdpa

HEADS, HEAD_SIZE = 8, 64


def relattn_blocked(query: Tensor, key: Tensor, value: Tensor, rel_k: Tensor) -> Tensor:
    return relattn.relative_attention(query, key, value, rel_k, backend="blocked")


PEERS = {"relattn blocked": relattn_blocked, "materialising skew": materialising_skew, "sdpa, no relative term": sdpa}


def make_inputs(length: int) -> list[Tensor]:
    torch.manual_seed(0)
    inputs = [torch.randn(1, HEADS, length, HEAD_SIZE, requires_grad=True) for _ in range(3)]
    inputs.append(torch.randn(2 * length - 1, HEAD_SIZE, requires_grad=True))
    for tensor in inputs:
        tensor.grad = torch.zeros_like(tensor)
    return inputs


def interleave(steps: dict, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds: the median, and the quartiles, of `repeats` rounds in which every step runs once; one more warms up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if round_number > 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    results = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        results[name] = {"median_ms": round(median, 3), "quartiles_ms": [round(low, 3), round(high, 3)]}
    return results


def measure_time(length: int = 2048, repeats: int = 11) -> dict:
    inputs = make_inputs(length)
    outputs = {name: peer(*inputs).detach() for name, peer in PEERS.items() if peer is not sdpa}
    difference = (outputs["relattn blocked"] - outputs["materialising skew"]).abs().max().item()
    steps = {name: lambda peer=peer: peer(*inputs).sum().backward() for name, peer in PEERS.items()}
    return {"length": length, "largest_difference": difference, "steps": interleave(steps, repeats)}


def measure_layer(repeats: int = 400) -> dict:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = dict(embed_dim=128, num_heads=4, batch_first=True)
    layers = {
        "RelativeMultiheadAttention": relattn.RelativeMultiheadAttention(**options, max_relative_position=15),
        "nn.MultiheadAttention": torch.nn.MultiheadAttention(**options),
    }
    x = torch.randn(32, 16, 128, requires_grad=True)
    steps = {name: lambda layer=layer: layer(x, x, x, need_weights=False)[0].sum().backward() for name, layer in layers.items()}
    return {"length": 16, "steps": interleave(steps, repeats)}


def resident_kib(field: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def measure_memory(peer: str, length: int) -> dict:
    inputs = make_inputs(length)
    small = make_inputs(64)
    PEERS[peer](*small).sum().backward()  # what is loaded and started at the first use
    before = resident_kib("VmRSS")
    start = time.perf_counter()
    PEERS[peer](*inputs).sum().backward()
    seconds = time.perf_counter() - start
    return {"length": length, "extra_mib": round((resident_kib("VmHWM") - before) / 1024, 1), "seconds": round(seconds, 2)}


def in_fresh_process(*arguments: str, threads: int | None = None) -> dict:
    environment = dict(os.environ) if threads is None else os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "benchmarks.speed", "--measure", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr}")
    return json.loads(result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for speed.json")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)  # one measurement in this process, as JSON
    options = parser.parse_args()
    if options.measure:
        kind, *rest = options.measure
        measured = {"time": measure_time, "layer": measure_layer, "memory": lambda: measure_memory(rest[0], int(rest[1]))}[kind]()
        print(json.dumps(measured))
        return

    results: dict = {"torch": torch.__version__, "relattn": relattn.__version__, "threads": torch.get_num_threads()}
    versions = f"relattn {relattn.__version__}, torch {torch.__version__}"
    print(f"{versions}, {results['threads']} threads, float32, B * H = {HEADS}, D = {HEAD_SIZE}")
    results["load_before"] = os.getloadavg()

    results["time"] = timing = in_fresh_process("time")
    print(f"\nforward + backward, L = {timing['length']} (largest difference of the outputs {timing['largest_difference']:.1e})")
    own = timing["steps"]["relattn blocked"]["median_ms"]
    for name, step in timing["steps"].items():
        print(f"  {name:30} {step['median_ms']:9.1f} ms   {step['median_ms'] / own:5.2f} x relattn's time")

    print("\nextra memory, forward + backward")
    results["memory"] = {}
    for name, length in (("relattn blocked", 2048), ("materialising skew", 2048), ("relattn blocked", 16384)):
        measured = results["memory"][f"{name}, L = {length}"] = in_fresh_process("memory", name, str(length))
        print(f"  {name:30} L = {length:5}  {measured['extra_mib']:9.1f} MiB   ({measured['seconds']} s)")
    least, most = (results["memory"][f"{name}, L = 2048"]["extra_mib"] for name in ("relattn blocked", "materialising skew"))
    print(f"  at L = 2048 relattn takes {least / most:.3f} of the materialising skew's")

    results["layer"] = layer = in_fresh_process("layer", threads=1)
    print("\nlayer, training step, L = 16, embed 128, 4 heads, batch 32, need_weights=False, one thread")
    for name, step in layer["steps"].items():
        print(f"  {name:30} {step['median_ms']:9.3f} ms")
    own, peer = (layer["steps"][name]["median_ms"] for name in ("RelativeMultiheadAttention", "nn.MultiheadAttention"))
    print(f"  relattn's layer takes {own / peer:.2f} of nn.MultiheadAttention's time")

    results["load_after"] = os.getloadavg()
    print(f"\nload before {results['load_before'][0]:.2f}, after {results['load_after'][0]:.2f}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / "speed.json"
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
