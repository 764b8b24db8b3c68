"""What `bash benchmarks/gpu_check.sh OUT` runs: every part in a process of its own, with a limit of time, so that one that fails or hangs
costs only itself. Writes OUT/gpu_check.json after every part, logs beside it, and prints a short table last.

Speeds are ratios within one process: each step timed by CUDA events in turn with the others, medians. FLOPs of attention without relative
term: 4 B H Lq Lk D forward, 3.5 times that with the backward pass; TFLOP/s of relattn are given in those same FLOPs, its own products
being 1.5 times as many.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import relattn
from benchmarks.peers import PEERS, Problem

LIMIT = 520.0  # seconds in all
BATCH, HEADS = 2, 12
DTYPES = ("float32", "bfloat16", "float16")

Step = Callable[[], Any]


def inputs(length: int, size: int, rows: int, batch: int = BATCH, heads: int = HEADS, dtype=torch.bfloat16) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(batch, heads, length, size)] * 3 + [(rows, size)]
    tensors = [torch.randn(shape, device="cuda", dtype=dtype) * (1.0 if index < 3 else 0.1) for index, shape in enumerate(shapes)]
    return [tensor.requires_grad_() for tensor in tensors]


def sdpa(backend: str) -> Callable[..., Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attention(query: Tensor, key: Tensor, value: Tensor, *_) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(query, key, value)

    return attention


def fused(clip: int | None, **options) -> Callable[..., Tensor]:
    def attention(query: Tensor, key: Tensor, value: Tensor, rel_k: Tensor) -> Tensor:
        return relattn.relative_attention(query, key, value, rel_k, max_relative_position=clip, backend="triton", **options)

    return attention


def training(attention: Callable[..., Tensor], tensors: list[Tensor]) -> Step:
    grad = torch.randn_like(tensors[0])

    def step() -> None:
        output = attention(*tensors)
        torch.autograd.grad(output, [tensor for tensor in tensors if tensor.requires_grad], grad, allow_unused=True)

    return step


def forward(attention: Callable[..., Tensor], tensors: list[Tensor]) -> Step:
    def step() -> None:
        with torch.no_grad():
            attention(*tensors)

    return step


def timed(steps: dict[str, Step], seconds: float = 0.6) -> dict[str, Any]:
    """Milliseconds by name, or why there are none. Steps take turns, so that clocks and neighbours trouble them alike."""
    found: dict[str, Any] = {}
    counts = {}
    for name, step in steps.items():
        try:
            step()
            torch.cuda.synchronize()
            once = _milliseconds(step, 1)
            counts[name] = max(1, min(200, int(seconds * 1e3 / 8 / max(once, 1e-3))))
        except Exception as error:  # out of memory, or a library that refuses: a row, not the end
            found[name] = f"{type(error).__name__}: {str(error)[:300]}"
            torch.cuda.empty_cache()
    samples: dict[str, list[float]] = {name: [] for name in counts}
    for _ in range(7):
        for name, count in counts.items():
            samples[name].append(_milliseconds(steps[name], count))
    return found | {name: statistics.median(values) for name, values in samples.items()}


def _milliseconds(step: Step, count: int) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        step()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / count


def speed(length: int, size: int, clip: int | None) -> dict[str, Any]:
    rows = 2 * (length - 1 if clip is None else clip) + 1
    batch = max(1, BATCH * 8192 // length) if length > 8192 else BATCH
    tensors = inputs(length, size, rows, batch)
    sides = {"relattn": fused(clip), "SDPA flash": sdpa("FLASH_ATTENTION"), "SDPA cuDNN": sdpa("CUDNN_ATTENTION")}
    flops = 4 * batch * HEADS * length**2 * size
    result: dict[str, Any] = {"length": length, "size": size, "clip": clip, "batch": batch, "heads": HEADS}
    for what, make, factor in (("forward", forward, 1.0), ("training", training, 3.5)):
        times = timed({name: make(side, tensors) for name, side in sides.items()})
        result[what] = {
            name: {"ms": value, "TFLOP/s": flops * factor / value / 1e9} if isinstance(value, float) else value
            for name, value in times.items()
        }
        own, flash = times["relattn"], times["SDPA flash"]
        if isinstance(own, float) and isinstance(flash, float):
            result[what]["speed against flash"] = flash / own
    return result


def peers(length: int, size: int) -> dict[str, Any]:
    """Times by peer of `python -m benchmarks`, in one process."""
    problem = Problem(length, "train", 1, HEADS, size, "bfloat16", "cuda")
    tensors = problem.inputs()
    names = ("relattn-triton", "skew", "skew-compiled", "sdpa-bias", "flex", "flash-deberta", "disentangled-flash")
    sides = {name: PEERS[name].make(problem) for name in names if PEERS[name].refusal(problem) is None}
    result: dict[str, Any] = {"length": length, "size": size, "batch": 1, "heads": HEADS}
    for what, make in (("forward", forward), ("training", training)):
        times = timed({name: make(side, tensors) for name, side in sides.items()})
        others = [value for name, value in times.items() if name != "relattn-triton" and isinstance(value, float)]
        result[what] = dict(times)
        if others and isinstance(times["relattn-triton"], float):
            result[what]["best peer / relattn"] = min(others) / times["relattn-triton"]
    return result


def memory(length: int = 131072, size: int = 64) -> dict[str, Any]:
    """Peak memory beyond the inputs and what is returned, in units of the query's bytes."""
    result = {}
    for clip in (64, None):
        tensors = inputs(length, size, 2 * (clip or length - 1) + 1, 1, 2)
        query = tensors[0].numel() * tensors[0].element_size()
        table = tensors[3].numel() * tensors[3].element_size()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = fused(clip)(*tensors)
        torch.cuda.synchronize()
        ahead = torch.cuda.max_memory_allocated() - before
        torch.autograd.grad(output, tensors, torch.ones_like(output))
        torch.cuda.synchronize()
        result[f"clip {clip}"] = {
            "query MiB": query / 2**20, "table MiB": table / 2**20, "forward MiB": ahead / 2**20,
            "training MiB": (torch.cuda.max_memory_allocated() - before) / 2**20,
        }  # fmt: skip
        del output, tensors
    return result


def decoding(keys: int = 32768, size: int = 128) -> dict[str, Any]:
    result = {}
    key, value = (torch.randn(8, 8, keys, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    table = torch.randn(129, size, device="cuda", dtype=torch.bfloat16)
    for queries in (1, 16):
        query = torch.randn(8, 32, queries, size, device="cuda", dtype=torch.bfloat16)
        call = functools.partial(
            relattn.relative_attention, query, key, value, table, max_relative_position=64, query_offset=keys - queries, is_causal=True,
            enable_gqa=True,
        )  # fmt: skip
        with torch.no_grad():
            times = timed({backend: functools.partial(call, backend=backend) for backend in ("triton", "blocked")})
        if isinstance(times["triton"], float):
            times["GB/s of the cache"] = 2 * key.numel() * 2 / times["triton"] / 1e6
        result[f"{queries} queries"] = times
    return result


def determinism() -> dict[str, bool]:
    found = {}
    for clip in (None, 64):
        tensors = inputs(1000, 64, 2 * (999 if clip is None else clip) + 1)
        runs = []
        for _ in range(2):
            output = fused(clip, dropout_p=0.0)(*tensors)
            runs.append([output, *torch.autograd.grad(output.float().square().sum(), tensors)])
        found[f"clip {clip}"] = all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    return found


def against_float64() -> dict[str, Any]:
    """Errors of a large call relative to the plain implementation's in the same dtype, forward and gradients: at most 2 is wanted."""
    found = {}
    for size in (64, 128):
        for clip in (None, 64):
            tensors = inputs(1111, size, 2 * (1110 if clip is None else clip) + 1, 1, 3)
            grad = torch.randn_like(tensors[0])

            def run(backend: str, dtype: torch.dtype, tensors=tensors, grad=grad, clip=clip) -> list[Tensor]:
                cast = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
                output = relattn.relative_attention(*cast, max_relative_position=clip, backend=backend)
                return [output, *torch.autograd.grad(output, cast, grad.to(dtype))]

            exact, plain, own = run("reference", torch.float64), run("reference", torch.bfloat16), run("triton", torch.bfloat16)
            names = ("output", "query", "key", "value", "rel_k")
            for name, a, b, c in zip(names, exact, plain, own, strict=True):
                ratio = (c.double() - a).abs().max() / (b.double() - a).abs().max().clamp(min=1e-30)
                found[f"D {size}, clip {clip}, {name}"] = round(ratio.item(), 3)
    return found


def graphs_and_compile() -> dict[str, Any]:
    tensors = inputs(512, 64, 1023, 1, 4)
    attention = fused(None)
    expected = attention(*tensors)
    found: dict[str, Any] = {}
    compiled = torch.compile(attention, fullgraph=True)(*tensors)
    found["torch.compile equals eager"] = torch.equal(compiled, expected)
    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = attention(*tensors)
        graph.replay()
        torch.cuda.synchronize()
    found["CUDA graph equals eager"] = torch.equal(captured, expected)
    with torch.autocast("cuda", torch.bfloat16):
        single = [tensor.detach().float() for tensor in tensors]
        found["autocast gives"] = str(attention(*single).dtype)
    return found


def sweep() -> dict[str, Any]:
    """Milliseconds of every candidate configuration of every kernel."""
    os.environ["RELATTN_AUTOTUNE"] = "1"
    for size in (64, 128):
        for clip in (None, 64):
            tensors = inputs(8192, size, 2 * (8191 if clip is None else clip) + 1)
            training(fused(clip), tensors)()
    from relattn.backends import autotune

    return json.loads(autotune.cache_file().read_text(encoding="utf-8"))


PARTS: dict[str, Callable[..., Any]] = {
    "against float64": against_float64, "determinism": determinism, "graphs": graphs_and_compile, "speed": speed, "peers": peers,
    "memory": memory, "decoding": decoding, "sweep": sweep,
}  # fmt: skip


def plan() -> list[tuple[str, list[str], float]]:
    """(name, command, seconds at most), what matters most first."""
    python = sys.executable

    def part(name: str, *arguments: Any) -> list[str]:
        return [python, "-m", "benchmarks.gpu_check", "--part", name, json.dumps(arguments)]

    fuzz = [python, "-m", "tests.fuzz", "--backend", "triton", "--count", "8", "--dtype"]
    steps = [(f"fuzz {dtype}", [*fuzz, dtype], 150.0) for dtype in DTYPES]
    steps += [
        ("against float64", part("against float64"), 60.0), ("determinism", part("determinism"), 30.0), ("graphs", part("graphs"), 60.0)
    ]  # fmt: skip
    for size, clip in ((64, None), (64, 64), (128, None), (128, 64)):
        for length in (8192, 2048, 32768):
            steps.append((f"speed L {length} D {size} clip {clip}", part("speed", length, size, clip), 45.0))
    steps += [
        ("peers", part("peers", 8192, 64), 90.0), ("memory", part("memory"), 40.0), ("decoding", part("decoding"), 30.0),
        ("sweep", part("sweep"), 150.0),
    ]  # fmt: skip
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer:
        small = [python, "-m", "tests.fuzz", "--backend", "triton", "--count", "2", "--seed", "4"]
        steps += [(tool, [sanitizer, "--tool", tool, "--error-exitcode", "9", *small], 60.0) for tool in ("memcheck", "racecheck")]
    return steps


def environment() -> dict[str, Any]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "GPU": properties.name, "capability": f"{properties.major}.{properties.minor}", "processors": properties.multi_processor_count,
        "torch": torch.__version__, "CUDA": torch.version.cuda, "triton": triton.__version__, "python": sys.version.split()[0],
        "relattn": relattn.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def run_all(folder: Path) -> dict[str, Any]:
    began, report = time.monotonic(), {"environment": environment(), "parts": {}}
    path = folder / "gpu_check.json"
    # The comparisons run side by side, since they wait for the compiler most of the time; what is timed runs alone.
    steps = plan()
    together = [step for step in steps if step[0].startswith("fuzz")]
    for group in ([together] if together else []) + [[step] for step in steps if step not in together]:
        left = LIMIT - (time.monotonic() - began)
        if left < 10:
            report["parts"] |= {name: {"status": "no time left"} for name, *_ in group}
            continue
        with contextlib.ExitStack() as stack:
            running = [(name, limit, *_start(stack, folder, name, command)) for name, command, limit in group]
            for name, limit, process, log in running:
                report["parts"][name] = _finish(process, log, min(limit, left))
                print(f"{time.monotonic() - began:6.0f} s  {name}: {report['parts'][name]['status']}", flush=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(report, indent=1), encoding="utf-8")
        temporary.replace(path)
    return report


def _start(stack: contextlib.ExitStack, folder: Path, name: str, command: list[str]) -> tuple[subprocess.Popen, Path]:
    log = folder / f"{name.replace(' ', '_')}.log"
    file = stack.enter_context(log.open("w", encoding="utf-8"))
    variables = os.environ | {"RELATTN_CACHE": str(folder)}
    return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=variables), log


def _finish(process: subprocess.Popen, log: Path, limit: float) -> dict[str, Any]:
    try:
        code = process.wait(limit)
        status = "ok" if code == 0 else f"exit status {code}"
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        status = f"stopped after {limit:.0f} s"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found: dict[str, Any] = {"status": status}
    with contextlib.suppress(ValueError, IndexError):
        found["result"] = json.loads(lines[-1])
    if "result" not in found:
        found["log"] = lines[-12:]
    return found


def lines(report: dict[str, Any]) -> Iterator[str]:
    yield " ".join(f"{name} {value}" for name, value in report["environment"].items())
    for name, part in report["parts"].items():
        result = part.get("result")
        if name.startswith("speed") and result:
            for what in ("forward", "training"):
                sides = result[what]
                known = {side: value for side, value in sides.items() if isinstance(value, dict)}
                times = ", ".join(f"{side} {value['ms']:.2f} ms {value['TFLOP/s']:.0f} TFLOP/s" for side, value in known.items())
                yield f"{name:32} {what:9} {sides.get('speed against flash', float('nan')):.2f} of flash: {times}"
        elif name == "sweep" and result:
            for key, times in result.items():
                best = sorted(times.items(), key=lambda item: item[1])[:4]
                yield f"sweep {key.split(' | ', 1)[1]}: " + ", ".join(f"{candidate} {ms:.2f}" for candidate, ms in best)
        elif result is not None:
            yield f"{name:32} {part['status']}: {json.dumps(result)}"
        else:
            yield f"{name:32} {part['status']}: {' / '.join(part.get('log', [])[-3:])[:600]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check"))
    parser.add_argument("--part", nargs=2, metavar=("NAME", "ARGUMENTS"), help="one part by itself, its arguments as JSON")
    options = parser.parse_args()
    if options.part:
        result = PARTS[options.part[0]](*json.loads(options.part[1]))
        print(json.dumps(result))
        return
    reason = relattn.available_backends()["triton"]
    if reason is not None:
        raise SystemExit(f"no GPU check: {reason}")
    options.out.mkdir(parents=True, exist_ok=True)
    report = run_all(options.out)
    print("\n".join(lines(report)))
    raise SystemExit(any(part["status"] != "ok" for part in report["parts"].values()))


if __name__ == "__main__":
    main()
