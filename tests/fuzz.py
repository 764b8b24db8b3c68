"""Random calls of `relative_attention`, and the comparison of a backend with the float64 reference.

As a command it runs as many as wanted: `python -m tests.fuzz --backend blocked --count 2000 --seed 0`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from unittest import SkipTest

import torch
from torch import Tensor

import relattn
from relattn.backends import blocked, cpu
from relattn.backends import triton as gpu

# Lengths: empty and single ones, odd ones, one below and above the sizes of a block (64, 128), more than one block.
QUERY_LENGTHS = (1, 2, 5, 16, 17, 63, 127, 128, 129, 200, 260)
KEY_LENGTHS = (1, 3, 8, 17, 64, 65, 128, 131, 200, 300)
HEAD_SIZES = (1, 3, 8, 16, 20, 33, 48, 64, 130)
WITHOUT_MASK_GRADIENT = ("cpu", "triton")  # backends that leave calls whose attn_mask requires a gradient to the next one
# Where calls run: on a GPU only for the backend that needs one (dropout's seed is drawn from the device's generator, so all run there).
DEVICE = "cpu"
FOUND = Path(__file__).with_name("found.txt")  # what `make explore` found


@dataclass
class Call:
    """A call in float64; `cast` gives it in another dtype and the same places in memory, rounded once for every backend."""

    seed: int
    tensors: dict[str, Tensor]  # floating tensors that require a gradient
    arguments: dict[str, Any] = field(default_factory=dict)

    def cast(self, dtype: torch.dtype, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {}
        for name, tensor in self.tensors.items():
            # Tensor.to alone would pack what has gaps or repeats.
            whole = tensor.new_empty(0).set_(tensor.untyped_storage()).to(device, dtype)
            cast = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            if name == "attn_mask":  # what was hidden stays hidden at the new dtype's lowest number
                cast = torch.where((tensor <= torch.finfo(tensor.dtype).min / 2).to(device), torch.finfo(dtype).min, cast)
            tensors[name] = cast.requires_grad_()
        others = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.arguments.items()}
        return tensors, others

    def __str__(self) -> str:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        others = {name: tuple(value.shape) if isinstance(value, Tensor) else value for name, value in self.arguments.items()}
        return f"seed {self.seed}: {shapes} {others}"


def random_call(seed: int) -> Call:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def chance(probability: float) -> bool:
        return rng.random() < probability

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch, heads = rng.choice((1, 1, 2, 3)), rng.choice((1, 2, 4))
    queries, keys = rng.choice(QUERY_LENGTHS), rng.choice(KEY_LENGTHS)
    if chance(0.5):
        keys = queries
    size = rng.choice(HEAD_SIZES)
    value_size = size if chance(0.7) else rng.choice(HEAD_SIZES)
    key_heads = rng.choice([n for n in (1, 2, 4) if heads % n == 0]) if chance(0.3) else heads

    def strided(heads: int, length: int, size: int) -> Tensor:
        """(batch, heads, length, size) in one of the layouts that models produce."""
        layout = rng.choice(("plain", "heads last", "packed", "last dimension strided"))
        if layout == "heads last":
            return normal(batch, length, heads, size).transpose(1, 2)
        if layout == "packed":
            return normal(batch, length, 3 * heads * size)[..., : heads * size].view(batch, length, heads, size).transpose(1, 2)
        if layout == "last dimension strided":
            return normal(batch, heads, size, length).transpose(2, 3)
        return normal(batch, heads, length, size)

    tensors = {"query": strided(heads, queries, size), "key": strided(key_heads, keys, size), "value": strided(key_heads, keys, value_size)}
    arguments: dict[str, object] = {"enable_gqa": key_heads != heads}
    left, right = rng.choice(((queries + keys, queries + keys), (0, 0), (3, 5), (64, 8), (300, 0), (1, 130), (70, 70)))
    rows = left + right + 1

    def table(*size: int) -> Tensor:
        return normal(heads, rows, *size) if chance(0.5) else normal(rows, *size)

    if chance(0.7):
        tensors["rel_k"] = table(size)
    if chance(0.3):
        tensors["rel_q"] = table(size)
    if chance(0.3):
        tensors["rel_v"] = table(value_size)
    if chance(0.3):
        tensors["rel_bias"] = table()
    if any(name.startswith("rel_") for name in tensors):
        arguments["max_relative_position"] = (left, right)
    if "rel_bias" in tensors and chance(0.2):  # a table that hides: causal, or a window, or everything
        tensors["rel_bias"][..., rng.choice((0, left, left + 1)) :] = -torch.inf
    for name in ("pos_bias_u", "pos_bias_v"):
        if chance(0.3) and (name == "pos_bias_u" or "rel_k" in tensors):
            tensors[name] = normal(heads, size)
    causal = arguments["is_causal"] = chance(0.4)
    if chance(0.3):
        arguments["window"] = (rng.choice((None, 0, 5, 100)), 0 if causal else rng.choice((None, 0, 7, 90)))
    if chance(0.3):
        arguments["query_offset"] = torch.randint(-5, 20, (batch,), generator=generator)
    elif causal or chance(0.5):
        arguments["query_offset"] = rng.choice((0, keys - queries, 3, -4))
    if chance(0.3):
        arguments["key_mask"] = torch.rand(batch, keys, generator=generator) > 0.4
    if chance(0.3):
        arguments["key_lengths"] = torch.randint(0, keys + 1, (batch,), generator=generator)
    kind = rng.choice(("none", "none", "bool", "float"))
    shape = [rng.choice((1, full)) for full in (batch, heads, queries, keys)][rng.choice((0, 0, 2)) :]
    if kind == "bool":
        arguments["attn_mask"] = torch.rand(*shape, generator=generator) > 0.3
    elif kind == "float":
        mask = torch.where(torch.rand(*shape, generator=generator) > 0.8, torch.finfo(torch.float64).min, normal(*shape))
        if chance(0.3):  # a row of one large number, as "hidden" is often written: softmax does not mind it
            mask[..., :1, :] = -1e3
        tensors["attn_mask"] = mask
    if chance(0.2):
        arguments["scale"] = rng.choice((0.1, 1.0))
    if chance(0.3):
        arguments["dropout_p"] = rng.choice((0.1, 0.5, 1.0))
    if chance(0.15):
        arguments["chunk"] = (rng.choice((1, 3, 16, 50)), rng.choice((None, 0, 1, 4)))
        arguments.setdefault("query_offset", keys - queries)
    return Call(seed, tensors, arguments)


def packed_call(seed: int) -> Call:
    """Sequences of some of a random call's batch elements, also none and empty ones, one after the other."""
    call, rng = random_call(seed), random.Random(seed + 1)
    padded, arguments = call.tensors, call.arguments
    order = [rng.randrange(padded["query"].shape[0]) for _ in range(rng.choice((0, 1, 2, 3, 7)))]
    longest_q, longest_k = (padded[name].shape[2] for name in ("query", "key"))
    lengths_q, lengths_k = ([rng.choice((0, 1, rng.randint(0, n), n)) for _ in order] for n in (longest_q, longest_k))
    same = longest_q == longest_k and rng.random() < 0.5
    if same:
        lengths_k = lengths_q

    def packed(tensor: Tensor, lengths: list[int]) -> Tensor:
        """(B, H, L, D) as (T, H, D), alone in memory or as a projection's part."""
        parts = [tensor[batch, :, :length].transpose(0, 1) for batch, length in zip(order, lengths, strict=True)]
        joined = torch.cat([tensor.new_zeros(0, tensor.shape[1], tensor.shape[3]), *parts])
        return joined if rng.random() < 0.5 else torch.cat((joined, joined), dim=2)[..., : joined.shape[2]]

    tensors = {name: tensor for name, tensor in padded.items() if name not in ("query", "key", "value", "attn_mask")}
    tensors |= {name: packed(padded[name], lengths_q if name == "query" else lengths_k) for name in ("query", "key", "value")}
    arguments.pop("attn_mask", None)
    for name, lengths in (("cu_seqlens_q", lengths_q), ("cu_seqlens_k", lengths_k)):
        if name == "cu_seqlens_q" or not same:
            ends = torch.tensor([0, *lengths]).cumsum(0)
            arguments[name] = ends.to(rng.choice((torch.int32, torch.int32, torch.int64)))
            if rng.random() < 0.3:
                arguments[name.replace("cu_seqlens", "max_seqlen")] = max(lengths, default=0)
    if not same:
        arguments.setdefault("query_offset", 0)
    if "key_mask" in arguments:
        rows = [arguments["key_mask"][batch, :length] for batch, length in zip(order, lengths_k, strict=True)]
        arguments["key_mask"] = torch.cat([torch.zeros(0, dtype=torch.bool), *rows])
    for name in ("key_lengths", "query_offset"):
        if isinstance(arguments.get(name), Tensor):
            arguments[name] = arguments[name][torch.tensor(order, dtype=torch.int64)]
    return Call(seed, tensors, arguments)


def decoding_call(seed: int) -> Call:
    """One or two queries and up to eight heads of a key head, what kernels/cpu/decoding.h takes: keys in several parts, every option."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    queries, ratio, key_heads, batch = rng.choice((1, 1, 2)), rng.choice((1, 2, 3, 4)), rng.choice((1, 2)), rng.choice((1, 2))
    keys, size = rng.choice((1, 15, 300, 1024, 1025, 2600)), rng.choice((16, 48, 64, 80, 128))
    value_size = rng.choice((size, 16, 112))
    heads = ratio * key_heads
    tensors = {"query": normal(batch, heads, queries, size)}
    tensors["key"] = normal(batch, keys + 9, key_heads, size).transpose(1, 2)[:, :, :keys]  # a cache with room
    tensors["value"] = normal(batch, key_heads, keys, value_size)
    left, right = rng.choice(((keys, 0), (64, 8), (0, 0), (2000, 3)))
    for name, width, chance in (("rel_k", (size,), 0.8), ("rel_v", (value_size,), 0.3), ("rel_bias", (), 0.3)):
        if rng.random() < chance:
            tensors[name] = normal(*([heads] * rng.choice((0, 1))), left + right + 1, *width)
    arguments: dict[str, object] = {"enable_gqa": ratio > 1, "is_causal": rng.random() < 0.7}
    arguments["query_offset"] = rng.choice((keys - queries, keys // 2, torch.arange(batch) + keys - 3))
    if any(name.startswith("rel_") for name in tensors):
        arguments["max_relative_position"] = (left, right)
    for name in ("pos_bias_u", "pos_bias_v"):
        if rng.random() < 0.3 and (name == "pos_bias_u" or "rel_k" in tensors):
            tensors[name] = normal(heads, size)
    if rng.random() < 0.3:
        arguments["window"] = (rng.choice((0, 100, 1500)), None)
    if rng.random() < 0.3:
        arguments["key_mask"] = torch.rand(batch, keys, generator=generator) > 0.4
    if rng.random() < 0.3:
        arguments["key_lengths"] = torch.randint(0, keys + 1, (batch,), generator=generator)
    if rng.random() < 0.3:
        arguments["attn_mask"] = torch.rand(queries, keys, generator=generator) > 0.2
    if rng.random() < 0.3:
        arguments["dropout_p"] = 0.3
    return Call(seed, tensors, arguments)


def call_of(seed: int, backend: str) -> Call:
    if seed % 5 == 1:
        return packed_call(seed)
    return decoding_call(seed) if backend == "cpu" and seed % 5 == 0 else random_call(seed)


def failed_once(backend: str) -> list[tuple[int, torch.dtype]]:
    """Seeds and dtypes of the calls that this backend once failed."""
    lines = [line.split() for line in FOUND.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return [(int(seed), getattr(torch, dtype)) for name, dtype, seed in lines if name == backend]


def run(call: Call, backend: str, dtype: torch.dtype, rounded_to: torch.dtype | None = None) -> dict[str, Tensor]:
    """Output, log-sum-exp and gradients, in float64, of one backend in one dtype. The output's gradient is rounded to `rounded_to`."""
    tensors, arguments = call.cast(dtype, DEVICE)
    if "attn_mask" in tensors and backend in WITHOUT_MASK_GRADIENT:
        tensors["attn_mask"].requires_grad_(False)
    torch.manual_seed(call.seed)  # dropout's seed is drawn from torch's generator
    given: dict[str, Any] = tensors | arguments
    attention = relattn.relative_attention_varlen if "cu_seqlens_q" in given else relattn.relative_attention
    output, lse = attention(**given, return_lse=True, backend=backend)
    generator = torch.Generator().manual_seed(call.seed)
    loss = (output * torch.randn(output.shape, generator=generator, dtype=torch.float64).to(rounded_to or dtype).to(DEVICE, dtype)).sum()
    if call.seed % 2:
        weight = torch.randn(lse.shape, generator=generator, dtype=torch.float64).to(DEVICE, lse.dtype)
        loss = loss + (lse * weight).sum()  # also of -inf: nothing may flow back from a query that sees no key
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    results = {"output": output, "lse": lse}
    for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True):
        results[f"gradient of {name}"] = torch.zeros_like(tensor) if gradient is None else gradient
    return {name: result.detach().to("cpu", torch.float64) for name, result in results.items()}


@contextlib.contextmanager
def cut(seed: int):
    """Sizes of blocks drawn at random for two thirds of the calls: lengths here are too short to be cut by the real ones.

    And the native kernel's number of threads, and the GPU kernels' number of programs, which they would not use for so little.
    """
    rng = random.Random(seed)
    drawn = {
        "_STRIP_SCORES_CPU": rng.choice((1, 1000, 20000)), "_STRIP_ROWS": rng.choice((1, 3, 64)), "_KEY_CHUNK": rng.choice((1, 5, 64)),
        "_COPIED": rng.choice((0, 500)), "_TORCH_KERNEL": rng.choice((0, 500)),
    }  # fmt: skip
    drawn_cpu = {"_TILE": (rng.choice((0, 1, 7, 20, 60)), rng.choice((0, 16, 64, 128))), "_ALONE": 0}
    drawn_gpu = {
        "_CONFIGURATION": rng.choice((None, (16, 4, 1), (32, 4, 1))), "_SPLITS": rng.choice((0, 1, 2, 5)),
        "_TABLE_PROGRAMS": rng.choice((0, 1, 100)), "_TILE_BYTES": rng.choice((0, 1, 200000)),
    }  # fmt: skip
    modules = ((blocked, drawn), (cpu, drawn_cpu), (gpu, drawn_gpu))
    kept = [(module, {name: vars(module)[name] for name in names}) for module, names in modules]
    threads = torch.get_num_threads()
    try:
        if seed % 3:
            for module, names in modules:
                vars(module).update(names)
            torch.set_num_threads(rng.choice((1, 2, 3, 5)))
        yield
    finally:
        for module, names in kept:
            vars(module).update(names)
        torch.set_num_threads(threads)


def native_variants() -> list[str]:
    """The native kernel's instruction sets that this processor has, fastest first."""
    if cpu.unavailable() is not None:
        return []
    chosen, found = str(cpu.variant()), []
    for name in ("amx", "avx512", "avx2", "portable"):
        with contextlib.suppress(ValueError):
            cpu.use_variant(name)
            found.append(name)
    cpu.use_variant(chosen)
    return found


def check(call: Call, backend: str, dtype: torch.dtype) -> None:
    """Assert that the backend is about as close to the float64 reference as the reference in `dtype` is."""
    for name, (error, bound) in errors(call, backend, dtype, cut).items():
        assert error <= bound, f"{name}: error {error:.3g} above {bound:.3g}; {call}"


def errors(
    call: Call, backend: str, dtype: torch.dtype, sizes: Callable[[int], contextlib.AbstractContextManager] = contextlib.nullcontext
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """The largest error of every result, and its bound. `sizes` of blocks, such as `cut`, are those of the backend's run.

    The bound is relative to what the plain implementation does in the same dtype: |out - exact| <= 2 max|plain - exact| + tiny.
    """
    global DEVICE
    DEVICE = "cuda" if backend == "triton" and not gpu.INTERPRETED else "cpu"
    sizes_of_heads = [call.tensors[name].shape[-1] for name in ("query", "value")]
    if DEVICE == "cuda" and gpu.is_doubtful(torch.device("cuda", 0), dtype, *sizes_of_heads):
        raise SkipTest("16-bit heads that the backend leaves to others on this GPU")
    rounded = Call(call.seed, {name: tensor.double() for name, tensor in call.cast(dtype)[0].items()}, call.arguments)
    if "attn_mask" in call.tensors:
        rounded.tensors["attn_mask"] = call.tensors["attn_mask"].to(dtype).double().clamp(min=torch.finfo(torch.float64).min)
    exact = run(rounded, "reference", torch.float64, dtype)
    with sizes(call.seed):
        actual = run(call, backend, dtype)
    plain = exact if dtype == torch.float64 else run(call, "reference", dtype)
    precision = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    size = max(call.tensors["key"].shape[-1], call.tensors["value"].shape[-1])
    scores = exact["lse"].numel() * max((keys for _, keys, _ in lengths(call)), default=0)
    finite = exact["lse"][exact["lse"].isfinite()].abs()
    spacing = precision * (1 + finite.max().item() / 16 if finite.numel() else 1)  # of the scores, where a mask makes them large
    # FlashAttention's backward pass, which the GPU kernels follow, takes sum_j w_j dw_j from the output as it was rounded.
    rounding = 0.0
    if backend == "triton" and dtype in (torch.bfloat16, torch.float16) and exact["output"].numel():
        inputs = (tensor for name, tensor in rounded.tensors.items() if name not in ("attn_mask", "rel_bias") and tensor.numel())
        largest_input = max(tensor.abs().max().item() for tensor in inputs)
        scale = call.arguments.get("scale") or call.tensors["query"].shape[-1] ** -0.5
        rounding = torch.finfo(dtype).eps * exact["output"].norm(dim=-1).max().item() * abs(scale) * largest_input
    result = {}
    for name, expected in exact.items():
        if name == "gradient of attn_mask" and backend in WITHOUT_MASK_GRADIENT:
            continue
        found = actual[name]
        assert found.shape == expected.shape, f"{name}: shape {found.shape} instead of {expected.shape}; {call}"
        infinite = expected.isinf()
        assert torch.equal(found.isinf(), infinite), f"{name}: infinite elsewhere; {call}"
        if expected.numel() == 0 or infinite.all():
            continue
        # Above the plain error: rounding the result, and the longest sum (some gradients are zero only because their terms cancel).
        largest = expected[~infinite].abs().max()
        summed = 1.0
        if name.startswith("gradient of rel_"):
            summed = float(fullest_row(call, name.removeprefix("gradient of ")))
        elif name.startswith("gradient"):
            summed = max(1.0, scores / expected.numel())
        tiny = torch.finfo(dtype).eps * largest + 32 * spacing * (1 + largest) * (summed * size) ** 0.5
        if name.startswith("gradient"):
            tiny += 4 * rounding * summed**0.5  # 4: how far a normal number strays
        bound = 2 * (plain[name] - expected)[~infinite].abs().max() + tiny
        result[name] = (found - expected)[~infinite].abs().max().item(), float(bound)
    return result


def lengths(call: Call) -> list[tuple[int, int, int]]:
    """Queries, keys and offset of every sequence."""
    query, key, offsets = call.tensors["query"], call.tensors["key"], call.arguments.get("query_offset")
    if "cu_seqlens_q" in call.arguments:
        ends = call.arguments["cu_seqlens_q"]
        queries, keys = (end.diff().tolist() for end in (ends, call.arguments.get("cu_seqlens_k", ends)))
    else:
        queries, keys = [query.shape[2]] * query.shape[0], [key.shape[2]] * query.shape[0]
    starts = offsets.tolist() if isinstance(offsets, Tensor) else [offsets or 0] * len(keys)
    return list(zip(queries, keys, starts, strict=True))


def fullest_row(call: Call, name: str) -> int:
    """The most scores that one row of a table belongs to, of all heads that share it: clamping gathers most of them in the edge rows."""
    table, heads = call.tensors[name], call.tensors["query"].shape[1]
    rows = table.shape[-1] if name == "rel_bias" else table.shape[-2]
    sides = call.arguments.get("max_relative_position")
    left = rows // 2 if sides is None else sides if isinstance(sides, int) else sides[0]
    counts = torch.zeros(rows, dtype=torch.int64)
    for queries, keys, offset in lengths(call):
        distance = torch.arange(keys) - (torch.arange(queries) + offset)[:, None]
        counts += torch.bincount((distance.clamp(-left, rows - 1 - left) + left).flatten(), minlength=rows)
    per_head = table.dim() == (2 if name == "rel_bias" else 3)
    return max(1, int(counts.max())) * (1 if per_head else heads)


def check_all(
    calls: Iterable[tuple[str, Callable[[], Call]]], backend: str, dtype: str, which: str,
    checked: Callable[[Call, str, torch.dtype], None] = check,
) -> NoReturn:  # fmt: skip
    """Make and check each named call, print those that fail, and exit with status 1 if any did."""
    count = failures = 0
    for name, make in calls:
        count += 1
        try:
            checked(make(), backend, getattr(torch, dtype))
        except Exception as error:  # report it and go on: a fuzz run tells most when it finishes
            failures += 1
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
    print(f"{backend} {dtype}: {count} calls {which}, {failures} failed")
    raise SystemExit(failures > 0)


def in_time(calls: Iterable[tuple[str, Callable[[], Call]]], seconds: float, trace: bool) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Calls that begin within so many seconds; with `trace` each is named before it runs, for those that end the process."""
    end = time.monotonic() + seconds
    for name, make in calls:
        if time.monotonic() > end:
            return
        if trace:
            print(f"{name} ...", flush=True)
        yield name, make


def command(
    about: str | None, call: Callable[[int, str], Call], kind: str = "",
    checked: Callable[[Call, str, torch.dtype], None] = check, count: int = 1000, backend: str = "blocked",
) -> NoReturn:  # fmt: skip
    """The command line of random calls, `call(seed, backend)`: `checked` for as many seeds as asked."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default=backend)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16", "float16"))
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first call")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop before --count where that takes longer")
    parser.add_argument("--trace", action="store_true", help="name each call before it runs")
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + options.count)
    calls = in_time(((f"seed {seed}", functools.partial(call, seed, options.backend)) for seed in seeds), options.seconds, options.trace)
    check_all(calls, options.backend, options.dtype, f"{kind}from seed {options.seed}", checked)


if __name__ == "__main__":
    command(__doc__, call_of)
