"""What context parallelism costs a rank: bytes sent, memory and time, against the formulas: `python -m benchmarks.distributed [--out DIR]`.

Ranks are CPU processes of one thread each on this machine (gloo), so that times say how the work divides (as long as there are cores), and
nothing of a network; bytes are counted where they are handed to torch.distributed. Memory is a rank's peak beyond inputs and results. Then
a converted w2v-BERT (`--layers` of its layers, random weights) on `--minutes` of audio over ranks, and what the formulas say of GPUs.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.measure import extra_memory
from examples.chorales.storage import read_json, write_json
from relattn.arguments import Settings
from relattn.distributed import ring
from relattn.distributed.layout import Layout

METHODS = ("ring", "all_to_all", "gather")
_MIB = 2**20
# An H100: forward passes of relative attention, half-precision operations a second that count (benchmarks/results/h200), and bytes a second
# and direction over NVLink and over one 400 Gbit/s port.
_COMPUTE, _NETWORKS = 3.0e14, {"NVLink": 450e9, "InfiniBand": 50e9}


# ---- processes ----


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns on each of so many processes of a group."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(theirs, rank, ranks, f"{folder}/store", function, arguments), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        found = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
    return found


def _rank(pipe: Any, rank: int, ranks: int, store: str, function: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    pipe.send(function(*arguments))
    dist.destroy_process_group()


def _counted(sent: dict[str, int]) -> dict[str, Callable[..., Any]]:
    """Functions of torch.distributed that count what leaves this rank."""
    original = {name: getattr(dist, name) for name in ("batch_isend_irecv", "all_to_all_single", "all_reduce", "all_gather")}
    ranks, rank = dist.get_world_size(), dist.get_rank()

    def p2p(operations: list[Any]) -> Any:
        sent["blocks"] += sum(one.tensor.nbytes for one in operations if one.op is dist.isend)
        return original["batch_isend_irecv"](operations)

    def all_to_all(received: Tensor, given: Tensor, to: Any = None, sizes: Any = None, **others: Any) -> Any:
        own = given.numel() // ranks if sizes is None else sizes[rank]
        sent["blocks"] += (given.numel() - own) * given.element_size()
        return original["all_to_all_single"](received, given, to, sizes, **others)

    def all_reduce(tensor: Tensor, *others: Any, **more: Any) -> Any:
        sent["tables"] += tensor.nbytes
        return original["all_reduce"](tensor, *others, **more)

    def all_gather(received: list[Tensor], given: Tensor, *others: Any, **more: Any) -> Any:
        sent["blocks"] += (ranks - 1) * given.nbytes
        return original["all_gather"](received, given, *others, **more)

    return {"batch_isend_irecv": p2p, "all_to_all_single": all_to_all, "all_reduce": all_reduce, "all_gather": all_gather}


# ---- attention ----


def attention(method: str, length: int, heads: int, size: int, clip: int, layout: str, causal: bool) -> dict[str, Any]:
    """Of this rank: a training step."""
    import relattn.distributed as parallel

    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, heads, length, size, generator=generator) for _ in range(3)]
    part = [parallel.shard(tensor, 2, layout=layout).contiguous().requires_grad_() for tensor in tensors]
    del tensors
    table = (torch.randn(2 * clip + 1, size, generator=generator) * 0.1).requires_grad_()

    def step() -> tuple[Tensor, ...]:
        query, key, value = part
        output: Any = parallel.relative_attention(query, key, value, table, method=method, layout=layout, is_causal=causal)
        return (output.detach(), *torch.autograd.grad(output.sum(), (*part, table)))

    sent = dict(blocks=0, tables=0)
    hooks, original = _counted(sent), {}
    for name, hook in hooks.items():
        original[name] = getattr(dist, name)
        setattr(dist, name, hook)
    extra, _ = extra_memory(step)
    for name, function in original.items():
        setattr(dist, name, function)
    dist.barrier()
    began = time.perf_counter()
    step()
    dist.barrier()
    return {"seconds": time.perf_counter() - began, "MiB": extra / _MIB, "MiB sent": sent["blocks"] / _MIB}


def formula(method: str, length: int, ranks: int, heads: int, size: int, layout: str, causal: bool, itemsize: int = 4) -> float:
    """Bytes that a rank sends in a training step, the most of them: of keys, values, queries, outputs and their gradients."""
    token = heads * size * itemsize
    if method == "all_to_all":  # query, key, value and output, in both passes, and the log-sum-exp
        return (ranks - 1) / ranks * length / ranks * token * (2 * 4 + 1 / size)
    if method == "gather":  # key and value, and their gradients home
        return (ranks - 1) * length / ranks * token * (2 + 2)
    cut = Layout(layout, length, ranks)

    def needed(rank: int, source: int) -> int:
        last = max(piece.stop for piece in cut.pieces(rank))
        return sum(len(piece) for piece in cut.pieces(source) if not causal or piece.start < last)

    def sent(rank: int) -> int:  # key and value to those that see them, in both passes, and theirs home
        others = [other for other in range(ranks) if other != rank]
        return sum(4 * needed(other, rank) + 2 * needed(rank, other) for other in others)

    return max(map(sent, range(ranks))) * token


# ---- a model ----


def conformer(minutes: float, layers: int) -> dict[str, Any]:
    """Of this rank: the forward pass of a converted w2v-BERT."""
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

    import relattn.distributed as parallel
    from relattn.huggingface import convert

    torch.manual_seed(0)
    model = convert(Wav2Vec2BertModel(Wav2Vec2BertConfig(num_hidden_layers=layers)).eval())
    frames = round(minutes * 60 * 50)
    part = parallel.shard(torch.randn(1, frames, 160), 1)
    with torch.no_grad(), parallel.context_parallel(convolutions_of=model):
        model(input_features=part[:, :64])  # what a first use loads
        dist.barrier()
        began = time.perf_counter()
        extra, _ = extra_memory(lambda: (model(input_features=part).last_hidden_state,))
        dist.barrier()
    return {"frames": part.shape[1], "seconds": time.perf_counter() - began, "MiB": extra / _MIB}


# ---- GPUs, by the formulas ----


def predicted(length: int, ranks: int, size: int = 64, itemsize: int = 2) -> dict[str, Any]:
    """Of a forward pass on H100s, without a mask: seconds of a block of the ring and of its transfer, for one head; what all_to_all takes
    as a multiple of the ring; and what a window and a clip leave of the ring."""
    local = length / ranks
    found: dict[str, Any] = {"tokens per rank": round(local), "compute of a block": 4 * local**2 * size / _COMPUTE}
    for name, speed in _NETWORKS.items():
        found[f"{name}, a block"] = 2 * local * size * itemsize / speed
        found[f"{name}, ring hides it"] = found["compute of a block"] >= found[f"{name}, a block"]
        exposed = 4 * (ranks - 1) / ranks * local * size * itemsize / speed
        of_ring = max(found["compute of a block"], found[f"{name}, a block"]) * (ranks - 1) + found["compute of a block"]
        found[f"{name}, all_to_all over ring"] = (ranks * found["compute of a block"] + exposed) / of_ring
    return found | left(length, ranks)


def left(length: int, ranks: int, window: int = 4096, clip: int = 4096) -> dict[str, float]:
    """Shares of a ring's pairs of ranks, by its own rules: those of whom one sends the other something, if queries see so many keys before
    them; and the blocks that need a product with the table, if it is clipped at that distance on both sides."""
    cut = Layout("contiguous", length, ranks)

    def call(**settings: Any) -> ring.Call:
        whole = Settings(clip, clip, False, None, None, 0, 0.0, 1.0)._replace(**settings)
        return ring.Call("", whole, cut, cut, 0, (0, 0), length)

    windowed, clipped = call(is_causal=True, window_left=window), call()
    pairs = list(itertools.permutations(range(ranks), 2))
    rows = [clipped.block_settings(cut.piece(rank), cut.piece(source))[1] for rank, source in itertools.product(range(ranks), repeat=2)]
    return {
        f"sent, causal window of {window}": sum(bool(windowed.needed(*pair)) for pair in pairs) / len(pairs),
        f"with a table, clipped at {clip}": sum(one.stop - one.start > 1 for one in rows) / len(rows),
    }


# ---- the command ----


def _largest(results: list[dict[str, Any]]) -> dict[str, float]:
    return {name: round(max(result[name] for result in results), 3) for name in results[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for distributed.json; what is there of other lengths and ranks stays")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--length", type=int, default=8192, help="0: without attention alone")
    parser.add_argument("--minutes", type=float, nargs="*", default=[5.0], help="of audio; none: without the model")
    parser.add_argument("--layers", type=int, default=1)
    options = parser.parse_args()
    heads, size, clip = 4, 64, 128
    results: dict[str, Any] = {"attention": {}, "conformer": {}, "predicted": {}}
    if options.out is not None and (options.out / "distributed.json").is_file():
        results = read_json(options.out / "distributed.json") | {"predicted": {}}
    print(f"attention, L = {options.length}, H = {heads}, D = {size}, clipped at {clip}, float32, a training step; the most of any rank")
    for ranks in options.ranks if options.length else ():
        for method in METHODS if ranks > 1 else METHODS[:1]:
            if method == "all_to_all" and heads % ranks:
                continue
            for causal in (False, True):
                layout = "zigzag" if causal else "contiguous"
                call = functools.partial(attention, method, options.length, heads, size, clip, layout, causal)
                row = _largest(on_ranks(ranks, call))
                row["MiB by formula"] = round(formula(method, options.length, ranks, heads, size, layout, causal) / _MIB, 3)
                name = f"P = {ranks}, {method}{', causal, zigzag' * causal}"
                results["attention"][name] = row
                print(f"  {name:32}", "  ".join(f"{key} {value:g}" for key, value in row.items()), flush=True)
    for minutes in options.minutes:
        print(f"w2v-BERT, {options.layers} layers, {minutes:g} min of audio, forward; the most of any rank")
        for ranks in options.ranks:
            row = _largest(on_ranks(ranks, conformer, minutes, options.layers))
            results["conformer"][f"{minutes:g} min, P = {ranks}"] = row
            print(f"  P = {ranks:<28}", "  ".join(f"{key} {value:g}" for key, value in row.items()), flush=True)
    print(f"H100, forward, bfloat16, by the formulas at {_COMPUTE / 1e12:g} TFLOP/s, {_NETWORKS}; times of one head")
    for length in (2**15, 2**18, 2**20, 2**22):
        for ranks in (2, 4, 8, 16, 32, 64):
            row = predicted(length, ranks)
            results["predicted"][f"L = {length}, P = {ranks}"] = row
            shown = "  ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
            print(f"  L = {length}, P = {ranks}: {shown}")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "distributed.json", results)


if __name__ == "__main__":
    main()
