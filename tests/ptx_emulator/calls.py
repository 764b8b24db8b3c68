"""Calls for the emulator, each with something of its own, and what becomes of them there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from relattn.backends import triton as gpu
from relattn.backends import triton_backward
from tests import fuzz
from tests.fuzz import Call

from .harness import Session, emulated


class Outcome(NamedTuple):
    session: Session
    errors: dict[str, tuple[float, float]]  # of each result, and its bound

    @property
    def worst(self) -> tuple[str, float]:
        """The result nearest to its bound (or beyond), and the share of the bound."""
        shares = {name: error / bound if error else 0.0 for name, (error, bound) in self.errors.items()}
        return max(shares.items(), key=lambda item: float("inf") if item[1] != item[1] else item[1])

    @property
    def right(self) -> bool:
        return all(error <= bound for error, bound in self.errors.values())


def outcome(name: str, target: str, dtype: torch.dtype, **options: Any) -> Outcome:
    """Of one of `cases`, or of the random call with a seed; options: of harness.emulated."""
    call = fuzz.random_call(int(name)) if name.isdigit() else cases()[name]
    cut = {"split": _split, "packed split": _split, "decoding clipped": _split, "parts 128": _parts}
    sizes = fuzz.cut if name.isdigit() else cut.get(name, contextlib.nullcontext)
    with emulated(target, **options) as session:
        return Outcome(session, fuzz.errors(call, "triton", dtype, sizes))


def _split(seed: int) -> contextlib.AbstractContextManager:
    """The keys in two parts, which a GPU's number of processors decides."""
    return mock.patch.object(gpu, "_SPLITS", 2)


@contextlib.contextmanager
def _parts(seed: int) -> Iterator[None]:
    """Tiles of score gradients in parts, each with the launches of a large one."""
    with mock.patch.object(gpu, "_TILE_BYTES", 150_000), mock.patch.object(triton_backward, "_SMALL", 0):
        yield


def _call(seed: int, batch=1, heads=2, key_heads=None, queries=130, keys=None, size=64, value_size=None, clip=None, per_head=False,
          tables=("rel_k",), biases=(), **arguments) -> Call:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    key_heads, keys, value_size = key_heads or heads, keys or queries, value_size or size
    tensors = {"query": normal(batch, heads, queries, size), "key": normal(batch, key_heads, keys, size)}
    tensors["value"] = normal(batch, key_heads, keys, value_size)
    left, right = (queries + keys, queries + keys) if clip is None else clip
    for name in tables:
        width = {"rel_k": (size,), "rel_q": (size,), "rel_v": (value_size,), "rel_bias": ()}[name]
        tensors[name] = normal(*([heads] * per_head), left + right + 1, *width)
    for name in biases:
        tensors[name] = normal(heads, size)
    if tables:
        arguments["max_relative_position"] = (left, right)
    return Call(seed, tensors, {"enable_gqa": key_heads != heads} | arguments)


def _packed(seed: int, lengths: tuple[int, ...], keys: tuple[int, ...] | None = None, **arguments) -> Call:
    """`_call` of sequences of these lengths."""
    longest = max(*lengths, *(keys or ()))
    call = _call(seed, batch=len(lengths), queries=longest, **arguments)
    for name, lengths_of in (("query", lengths), ("key", keys or lengths), ("value", keys or lengths)):
        rows = [call.tensors[name][batch, :, :length].transpose(0, 1) for batch, length in enumerate(lengths_of)]
        call.tensors[name] = torch.cat(rows)
    for name, lengths_of in (("cu_seqlens_q", lengths), ("cu_seqlens_k", keys)):
        if lengths_of is not None:
            call.arguments[name] = torch.tensor([0, *lengths_of]).cumsum(0).to(torch.int32)
    return call


def cases() -> dict[str, Call]:
    """By what is new in each; odd seeds also take a gradient through the log-sum-exp."""
    def boolean(*shape: int, share: float = 0.4) -> torch.Tensor:
        return torch.rand(*shape, generator=torch.Generator().manual_seed(5)) > share

    float_mask = _call(31, heads=1, queries=70, window=(40, 30))
    float_mask.tensors["attn_mask"] = torch.randn(70, 70, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    decoding = _call(35, batch=2, heads=17, key_heads=1, queries=1, keys=150, clip=(9, 0), query_offset=torch.tensor([149, 110]),
                     is_causal=True, key_lengths=torch.tensor([140, 150]), attn_mask=boolean(17, 1, 150))  # fmt: skip
    decoding.tensors["rel_bias"] = torch.randn(17, 10, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return {
        "plain": _call(1, heads=1),
        "plain 128": _call(2, heads=1, size=128),
        "no table": _call(3, heads=1, tables=()),
        "causal": _call(4, heads=1, is_causal=True),
        "causal 128": _call(5, heads=1, size=128, is_causal=True),
        "clipped": _call(6, heads=1, queries=200, clip=(9, 9)),
        "clipped 128": _call(7, heads=1, queries=200, size=128, clip=(9, 9)),
        "clipped causal": _call(8, heads=1, queries=200, clip=(20, 0), is_causal=True),
        "window": _call(9, heads=1, queries=200, window=(40, 30)),
        "odd size": _call(10, queries=70, size=48),
        "odd sizes": _call(11, queries=70, keys=45, size=48, value_size=33),
        "short queries": _call(12, queries=20, keys=200, query_offset=180, is_causal=True),
        "long queries": _call(13, queries=150, keys=40),
        "grouped": _call(14, heads=4, key_heads=2, queries=70, per_head=True),
        "lengths": _call(15, batch=2, heads=1, queries=100, key_lengths=torch.tensor([100, 37])),
        "offsets": _call(16, batch=2, heads=1, queries=70, keys=90, query_offset=torch.tensor([3, 20]), is_causal=True, clip=(30, 0)),
        "biases": _call(17, queries=70, biases=("pos_bias_u", "pos_bias_v"), clip=(64, 64)),
        "rel_bias": _call(18, heads=2, queries=100, tables=("rel_bias",), clip=(20, 20), per_head=True),
        "rel_k, rel_bias": _call(19, heads=1, queries=100, tables=("rel_k", "rel_bias")),
        "dropout": _call(20, heads=1, queries=100, dropout_p=0.3),
        "dropout 128": _call(21, heads=1, queries=100, size=128, dropout_p=0.3),
        "rel_q": _call(22, heads=1, queries=100, tables=("rel_k", "rel_q")),
        "rel_v": _call(23, heads=1, queries=100, tables=("rel_k", "rel_v")),
        "all tables": _call(24, heads=1, queries=100, tables=("rel_k", "rel_q", "rel_v", "rel_bias"), dropout_p=0.2),
        "all tables 128": _call(25, heads=1, queries=100, size=128, tables=("rel_k", "rel_q", "rel_v")),
        "key mask": _call(26, heads=1, queries=100, key_mask=boolean(1, 100)),
        "mask": _call(27, heads=2, queries=70, attn_mask=boolean(2, 70, 70, share=0.3)),
        "256": _call(28, heads=1, queries=40, size=256),
        "negative offset": _call(29, heads=1, queries=70, query_offset=-4, clip=(70, 70)),
        "causal rel_bias": _call(30, heads=1, queries=70, tables=("rel_k", "rel_bias"), is_causal=True),
        "float mask": float_mask,
        "split": _call(32, heads=1, queries=70, keys=150),
        "join": _call(33, heads=1, queries=1000, keys=60, size=72),
        "parts 128": _call(37, batch=2, heads=2, size=128),
        "chunks": _call(39, heads=1, queries=150, chunk=(40, 1)),
        "chunks clipped": _call(40, heads=1, queries=150, keys=200, clip=(9, 9), query_offset=37, chunk=(25, None)),
        "packed": _packed(41, (70, 0, 45, 1), heads=1, is_causal=True, dropout_p=0.2),
        "packed clipped": _packed(42, (40, 130, 20), heads=2, key_heads=1, clip=(9, 9), max_seqlen_q=140, chunk=(50, 1)),
        "packed, all tables": _packed(43, (40, 0, 20), (30, 10, 70), heads=1, tables=("rel_k", "rel_q", "rel_v", "rel_bias"),
                                      biases=("pos_bias_u", "pos_bias_v"), query_offset=torch.tensor([-3, 0, 50]), clip=(60, 60),
                                      key_lengths=torch.tensor([30, 5, 66]), chunk=(20, 2)),
        "packed split": _packed(44, (3, 1, 20), (70, 0, 150), heads=1, query_offset=20, max_seqlen_k=160, is_causal=True),
        "decoding": _call(34, batch=2, heads=6, key_heads=2, queries=1, keys=200, query_offset=199, clip=(199, 0), is_causal=True),
        "decoding 128": _call(36, heads=3, key_heads=1, queries=1, keys=200, size=128, query_offset=150, window=(120, 30)),
        "decoding clipped": decoding,
    }  # fmt: skip
