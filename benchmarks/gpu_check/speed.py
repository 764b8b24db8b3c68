"""Stage `speed`: how fast is what is shipped, what would be faster, and what do others take?

Figures of one job are of one process, steps taking turns; kernels by themselves are timed by torch's profiler. TFLOP/s
count what attention without a relative term needs (`benchmarks.trial.flops`), so that all sides' compare.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

import relattn
from benchmarks.gpu_check.common import (
    OWN,
    by_kernel,
    device,
    emit,
    is_dry,
    launcher,
    problem,
    reason,
    synchronize,
    timed,
    verdict,
)
from benchmarks.gpu_check.running import Group, Job
from benchmarks.measure import Step, matrix_ceiling
from benchmarks.peers import PEERS, Problem, step
from benchmarks.trial import flops

_TORCH = ("sdpa-flash", "sdpa-cudnn")
_PASSES = ("forward", "train")
_MIB = 2**20


def _steps(given: Problem, sides: Iterable[str]) -> dict[str, Step]:
    inputs = given.inputs()
    return {side: step(PEERS[side].make(given), inputs, given.passed == "train") for side in sides}


def _able(given: Problem, sides: Iterable[str]) -> list[str]:
    """Those that can take part; in a dry run relattn's own always does."""
    return [side for side in sides if side == OWN or PEERS[side].refusal(given) is None]


def _compared(given: Problem, sides: Iterable[str], seconds: float, passes: Iterable[str] = _PASSES) -> dict[str, Any]:
    """Forward and training by side: milliseconds and TFLOP/s; relattn's speed as a part of each other's."""
    found: dict[str, Any] = {}
    for passed in passes:
        given = given._replace(passed=passed)
        times = timed(_steps(given, _able(given, sides)), seconds)
        operations = flops(given, relative=False)
        rows: dict[str, Any] = {}
        for side, milliseconds in times.items():
            rows[side] = milliseconds
            if isinstance(milliseconds, float):
                rows[side] = {"ms": milliseconds, "TFLOP/s": round(operations / milliseconds / 1e9, 1)}
                if side != OWN and isinstance(times.get(OWN), float):
                    rows[side]["relattn's speed"] = float(f"{milliseconds / float(times[OWN]):.3g}")
        found[passed] = rows
    return found


def torch_alone(length: int, head_dims: list[int], seconds: float) -> dict[str, Any]:
    """The two ceilings: torch's attention without a relative term, and its product of matrices."""
    found: dict[str, Any] = {"matrix TFLOP/s": round(matrix_ceiling("bfloat16", device(), seconds), 1)}
    for size in head_dims:
        found[f"D {size}"] = _compared(problem(length, size), _able_torch(problem(length, size)), seconds)
        emit(found)
    return found


def _able_torch(given: Problem) -> list[str]:
    return [side for side in (*_TORCH, "sdpa") if PEERS[side].refusal(given) is None]


def shipped(
    length: int, head_dims: list[int], clips: list[int | None], seconds: float, causal: bool = False
) -> dict[str, Any]:
    """relattn as it is, beside torch's attention; then its kernels one by one."""
    found: dict[str, Any] = {}
    for size, clip in itertools.product(head_dims, clips):
        given = problem(length, size, clip, causal=causal)
        row = found[f"D {size}, clip {clip}"] = _compared(given, (OWN, *_able_torch(given)), seconds)
        emit(found)
        for passed in _PASSES:
            row[f"{passed}, by kernel"] = _kernels(_steps(given._replace(passed=passed), [OWN])[OWN])
        emit(found)
    return found


def _kernels(call: Step) -> dict[str, float] | str:
    try:
        return by_kernel(call)
    except Exception as error:
        return reason(error)


# ---- every configuration ----


def _parts(given: Problem) -> dict[str, Step]:
    """The forward pass, and backward passes that run one kernel each besides the preparation."""
    attention = PEERS[OWN].make(given)
    parts: dict[str, Step] = {"forward": step(attention, given.inputs(), False)}
    for name, wanted in {"query": (0,), "key": (1, 2), "table": (3,)}.items():
        tensors = [tensor.requires_grad_(place in wanted) for place, tensor in enumerate(given.inputs())]
        output = attention(*tensors)
        parts[name] = functools.partial(
            torch.autograd.grad,
            output,
            [tensors[place] for place in wanted],
            torch.randn_like(output),
            retain_graph=True,
        )
    return parts


def configurations() -> list[tuple[int, int, int]]:
    """All candidates of the kernels' table: (queries and keys of a tile, warps, stages)."""
    return [tuple(candidate) for candidate in launcher()._kernels().configs.CANDIDATES]


def sweep(
    length: int,
    head_dim: int,
    clip: int | None,
    candidates: list[tuple[int, int, int] | None],
    compile_only: bool = False,
) -> dict[str, Any]:
    """Milliseconds by kernel and configuration ("shipped": the table's own); what fails has its reason."""
    times: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    seconds: dict[str, float] = {}
    found = {"times": times, "failed": failed, "seconds to compile": seconds}
    given = problem(length, head_dim, clip)
    parts = _parts(given)
    for candidate in candidates:
        name = "shipped" if candidate is None else str(tuple(candidate))
        launcher()._CONFIGURATION = None if candidate is None else tuple(candidate)
        for part, call in parts.items():
            began = time.monotonic()
            try:
                call()
                synchronize()
                seconds[f"{part} {name}"] = round(time.monotonic() - began, 1)
                for kernel, milliseconds in ({} if compile_only else by_kernel(call, 3)).items():
                    known = times.setdefault(part if is_dry() else kernel, {})
                    known[name] = min(milliseconds, known.get(name, milliseconds))
            except Exception as error:  # no room, or the compiler gives up: the next one
                failed[f"{part} {name}"] = reason(error)
            emit(found)
    launcher()._CONFIGURATION = None
    fastest = {kernel: min(known, key=lambda name: known[name]) for kernel, known in times.items()}
    return found | {"fastest": fastest}


# ---- beside the kernels ----


def against_peers(length: int, head_dim: int, seconds: float) -> dict[str, Any]:
    """All peers that are installed, in one process; how many times as fast as the best of them relattn is."""
    # What is compiled for minutes is no part of a dry run.
    others = [name for name, peer in PEERS.items() if peer.relative and not (is_dry() and peer.compiled)]
    names = [OWN, *(name for name in others if not name.startswith("relattn-"))]
    found: dict[str, Any] = {}
    for passed in _PASSES:
        found |= _compared(problem(length, head_dim, batch=1), names, seconds, [passed])
        factors = [row["relattn's speed"] for row in found[passed].values() if "relattn's speed" in row]
        found[passed]["speed over the best peer"] = min(factors, default=None)
        emit(found)
    return found


def memory(lengths: list[int], clips: list[int | None], head_dim: int = 64, heads: int = 2) -> dict[str, Any]:
    """MiB at the peak beyond the inputs, forward with its output, training with its gradients, beside the query's."""
    found: dict[str, Any] = {}
    for length, clip in itertools.product(lengths, clips):
        given = problem(length, head_dim, clip, heads=heads)
        inputs = given.inputs()
        row: dict[str, Any] = {
            name: tensor.nbytes / _MIB for name, tensor in zip(("query", "table"), inputs[::3], strict=True)
        }
        for passed in _PASSES:
            call = step(PEERS[OWN].make(given), inputs, passed == "train")
            try:
                call()
                row[passed] = _peak(call)
            except Exception as error:
                row[passed] = reason(error)
        found[f"L {length}, clip {clip}"] = row
        emit(found)
    return found


def _peak(call: Step) -> float | None:
    if is_dry():  # the interpreter's memory says nothing
        return None
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    synchronize()
    del results
    return round((torch.cuda.max_memory_allocated() - before) / _MIB, 2)


def decoding(keys: int, head_dim: int, batch: int, key_heads: int, seconds: float) -> dict[str, Any]:
    """Few queries, four heads to a key head, behind a long cache: milliseconds, and the speed at which it is read."""
    found: dict[str, Any] = {}
    options: dict[str, Any] = dict(dtype=torch.bfloat16, device=device())
    key, value = (torch.randn(batch, key_heads, keys, head_dim, **options) for _ in range(2))
    table = torch.randn(129, head_dim, **options)
    for queries in (1, 16):
        query = torch.randn(batch, 4 * key_heads, queries, head_dim, **options)
        call = functools.partial(
            relattn.relative_attention, query, key, value, table, max_relative_position=64, query_offset=keys - queries,
            is_causal=True, enable_gqa=True,
        )  # fmt: skip
        with torch.no_grad():
            times = timed(
                {backend: functools.partial(call, backend=backend) for backend in ("triton", "blocked")}, seconds
            )
        row = found[f"{queries} queries"] = dict(times)
        if isinstance(times["triton"], float):
            row["GB/s of the cache"] = round(2 * key.nbytes / times["triton"] / 1e6, 1)
        emit(found)
    return found


def packed(count: int, longest: int, clip: int, seconds: float, heads: int = 8, head_dim: int = 64) -> dict[str, Any]:
    """Sequences of log-normal lengths: packed, padded with key_lengths, and one call each. Milliseconds by pass."""
    torch.manual_seed(0)
    lengths = (torch.randn(count) * 0.6).exp()
    lengths = (lengths * (longest / lengths.max())).clamp(min=1).long()
    total, own = int(lengths.sum()), lengths.to(device())
    ends = torch.nn.functional.pad(own.cumsum(0), (1, 0)).int()
    options: dict[str, Any] = dict(dtype=torch.bfloat16, device=device(), requires_grad=True)
    table = torch.randn(2 * clip + 1, head_dim, **options)
    tokens = [torch.randn(total, heads, head_dim, **options) for _ in range(3)] + [table]
    padded = [torch.randn(count, heads, longest, head_dim, **options) for _ in range(3)] + [table]
    attend: Any = functools.partial(relattn.relative_attention, backend="triton")

    def one_by_one(query: Any, key: Any, value: Any, rel_k: Any) -> Any:
        parts = zip(*(tensor.split(lengths.tolist()) for tensor in (query, key, value)), strict=True)
        outputs: list[Any] = [attend(*(tensor.transpose(0, 1)[None] for tensor in part), rel_k) for part in parts]
        return torch.cat(outputs, 2)[0].transpose(0, 1)

    sides: dict[str, tuple[Callable[..., Any], Any]] = {
        OWN: (functools.partial(relattn.relative_attention_varlen, cu_seqlens_q=ends, backend="triton"), tokens),
        "with max_seqlen": (
            functools.partial(relattn.relative_attention_varlen, cu_seqlens_q=ends, max_seqlen_q=longest, backend="triton"), tokens
        ),
        "padded": (functools.partial(attend, key_lengths=own), padded),
        "one call a sequence": (one_by_one, tokens),
    }  # fmt: skip
    found: dict[str, Any] = {"tokens": total, "mean / longest": round(total / count / longest, 2)}
    for passed in _PASSES:
        found[passed] = timed({name: step(side, inputs, passed == "train") for name, (side, inputs) in sides.items()}, seconds)
        emit(found)
    return found


def chunks(length: int, head_dim: int, chunk: tuple[int, int], seconds: float) -> dict[str, Any]:
    """A query sees its chunk and some before it, against all keys. Milliseconds by pass."""
    given = problem(length, head_dim)
    found: dict[str, Any] = {}
    attend: Any = functools.partial(relattn.relative_attention, backend="triton")
    calls = {OWN: functools.partial(attend, chunk=tuple(chunk)), "all keys": attend}
    for passed in _PASSES:
        found[passed] = timed({name: step(call, given.inputs(), passed == "train") for name, call in calls.items()}, seconds)
        emit(found)
    return found


def launches(length: int, calls: int) -> dict[str, Any]:
    """What a call costs the host when the GPU has next to nothing to do: microseconds, queued and not waited for."""
    given = problem(length, 64, batch=1, heads=2)
    found: dict[str, Any] = {}
    for passed, side in itertools.product(_PASSES, (OWN, "sdpa")):
        call = _steps(given._replace(passed=passed), [side])[side]
        call()
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found[f"{side}, {passed}"] = round(1e6 * (time.perf_counter() - start) / calls, 1)
        synchronize()
        emit(found)
    return found


def graphs(length: int) -> dict[str, Any]:
    """A CUDA graph of the forward pass and of a training step: the same bits as eager, and their milliseconds."""
    given = problem(length, 64, heads=4)
    found: dict[str, Any] = {}
    wrong = []
    for passed in _PASSES:
        call = step(PEERS[OWN].make(given), given.inputs(), passed == "train")
        expected = call()
        if is_dry():
            continue
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        graph.replay()
        torch.cuda.synchronize()
        alike = all(torch.equal(one, two) for one, two in zip(captured, expected, strict=True))
        wrong += [] if alike else [passed]
        found[passed] = {"same bits": alike} | timed({"eager": call, "graph": graph.replay}, 0.3)
        emit(found)
    return verdict(found, wrong)


def compiled(length: int, backend: str = "inductor") -> dict[str, Any]:
    """torch.compile(fullgraph=True), forward and backward: the same bits as eager; under autocast, bfloat16."""
    given = problem(length, 64, heads=4)
    attention: Callable[..., Any] = PEERS[OWN].make(given)
    inputs = given.inputs()
    grad_output = torch.randn_like(inputs[0])
    eager = step(attention, inputs, True, grad_output)
    whole = step(torch.compile(attention, fullgraph=True, backend=backend), inputs, True, grad_output)
    alike = all(torch.equal(one, two) for one, two in zip(whole(), eager(), strict=True))
    found: dict[str, Any] = {"same bits": alike} | timed({"eager": eager, "compiled": whole}, 0.3)
    with torch.autocast(device(), torch.bfloat16):
        found["autocast gives"] = str(attention(*(tensor.detach().float() for tensor in inputs)).dtype)
    return verdict(found, [] if alike else ["other bits"])


def plan(dry: bool) -> list[Group]:
    if dry:
        return _dry()
    sizes, clips = (64, 128), (None, 64)
    settings = [dict(length=8192, head_dim=size, clip=clip) for clip in clips for size in sizes]
    warm = [
        Job(_name(setting, candidate), sweep, setting | dict(candidates=[candidate], compile_only=True), 130.0)
        for setting in settings for candidate in (None, *configurations())
    ]  # fmt: skip
    warm.sort(key=lambda job: job.arguments["candidates"] != [None])  # what is shipped first

    def alone(name: str, function: Callable[..., Any], limit: float, **arguments: Any) -> Job:
        return Job(name, function, arguments, limit)

    ours = dict(head_dims=list(sizes), clips=list(clips), seconds=0.4)
    timings = [
        alone("torch alone", torch_alone, 60.0, length=8192, head_dims=list(sizes), seconds=0.4),
        alone("shipped L 8192", shipped, 90.0, length=8192, **ours),
        alone("shipped L 8192, causal", shipped, 90.0, length=8192, causal=True, **ours),
        *(
            Job("sweep " + _name(setting), sweep, setting | dict(candidates=[None, *configurations()]), 60.0)
            for setting in settings
        ),
        alone("shipped L 2048", shipped, 60.0, length=2048, **ours),
        alone("shipped L 32768", shipped, 90.0, length=32768, **ours),
        alone("peers", against_peers, 90.0, length=8192, head_dim=64, seconds=0.3),
        alone("memory", memory, 60.0, lengths=[8192, 131072], clips=list(clips)),
        alone("launches", launches, 40.0, length=128, calls=200),
        alone("CUDA graphs", graphs, 40.0, length=512),
        alone("torch.compile", compiled, 60.0, length=512),
        *(alone(f"packed, clip {clip}", packed, 40.0, count=32, longest=4096, clip=clip, seconds=0.3) for clip in (64, 4095)),
        alone("chunks", chunks, 40.0, length=8192, head_dim=64, chunk=(64, 4), seconds=0.3),
        alone("decoding", decoding, 40.0, keys=32768, head_dim=128, batch=8, key_heads=8, seconds=0.3),
    ]  # fmt: skip
    return [Group(warm, 16, limit=150.0), Group(timings)]


def _name(setting: dict[str, Any], candidate: object = "") -> str:
    which = "" if candidate == "" else f", {'shipped' if candidate is None else candidate}"
    return f"D {setting['head_dim']}, clip {setting['clip']}{which}"


def _dry() -> list[Group]:
    small = dict(length=9, head_dim=16)
    jobs = [
        Job("torch alone", torch_alone, dict(length=9, head_dims=[16], seconds=0.0)),
        Job("shipped", shipped, dict(length=9, head_dims=[16], clips=[3], seconds=0.0)),
        Job("shipped, causal", shipped, dict(length=9, head_dims=[16], clips=[None], seconds=0.0, causal=True)),
        Job("sweep", sweep, small | dict(clip=3, candidates=[(32, 4, 1)])),
        Job("peers", against_peers, small | dict(seconds=0.0)),
        Job("memory", memory, dict(lengths=[9], clips=[3], head_dim=16)),
        Job("launches", launches, dict(length=16, calls=1)),
        Job("CUDA graphs", graphs, dict(length=16)),
        Job("torch.compile", compiled, dict(length=16, backend="eager")),
        Job("packed", packed, dict(count=2, longest=9, clip=3, seconds=0.0, heads=1, head_dim=16)),
        Job("chunks", chunks, dict(length=9, head_dim=16, chunk=(4, 1), seconds=0.0)),
        Job("decoding", decoding, dict(keys=20, head_dim=16, batch=1, key_heads=1, seconds=0.0)),
    ]
    return [Group(jobs)]
