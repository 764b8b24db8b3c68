"""Calls at the edges of what `relative_attention` takes, too rare for tests/fuzz.py to draw: `python -m tests.edges --backend cpu`.

Each is checked as a random call is. `edges(seed)` gives all of them with other numbers, and other sizes of tiles (see tests.fuzz.cut).
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from tests.fuzz import Call, check_all

FAR = 2**62


def call(
    seed: int, batch=1, heads=2, queries=21, keys=37, size=20, *, value_size=None, key_heads=None, clip=(5, 7), tables=None, **arguments
) -> Call:
    """`tables`: which there are, and whether they differ by head; None = all four, of both kinds, and the biases."""
    generator = torch.Generator().manual_seed(seed)
    value_size = value_size or size
    key_heads = heads if key_heads is None else key_heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {
        "query": normal(batch, heads, queries, size),
        "key": normal(batch, key_heads, keys, size),
        "value": normal(batch, key_heads, keys, value_size),
    }
    if tables is None:
        tables = {"rel_k": False, "rel_q": True, "rel_v": False, "rel_bias": True}
        tensors |= {name: normal(heads, size) for name in ("pos_bias_u", "pos_bias_v")}
    shapes = {"rel_k": (size,), "rel_q": (size,), "rel_v": (value_size,), "rel_bias": ()}
    for name, per_head in tables.items():
        tensors[name] = normal(*((heads,) if per_head else ()), sum(clip) + 1, *shapes[name])
    if tables:
        arguments["max_relative_position"] = clip
    return Call(seed, tensors, {"enable_gqa": key_heads != heads} | arguments)


def with_layout(made: Call, change) -> Call:
    """The call with each of its tensors laid out anew."""
    return Call(made.seed, {name: change(tensor) for name, tensor in made.tensors.items()}, made.arguments)


def misaligned(tensor: Tensor) -> Tensor:
    """In a storage of one element more, at whose start it does not begin."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def spread(tensor: Tensor) -> Tensor:
    """Every third element of the last dimension of a larger tensor, and every second of the one before."""
    larger = tensor.new_full((*tensor.shape[:-1], 2, tensor.shape[-1], 3), torch.nan)
    larger[..., 1, :, 2] = tensor
    return larger[..., 1, :, 2]


def repeated(tensor: Tensor) -> Tensor:
    """One row, head and batch element for all: strides of 0. Tables keep their rows."""
    return tensor[:1, :1, :1].expand(tensor.shape) if tensor.dim() == 4 else tensor


def edges(seed: int) -> dict[str, Call]:
    def made(*sizes: int, **arguments) -> Call:
        return call(seed, *sizes, **arguments)

    found = {f"heads of {size}": made(size=size) for size in (1, 2, 15, 16, 17, 31, 33, 48, 63, 65, 100, 129, 300)}
    found |= {f"values of {size}": made(value_size=size) for size in (1, 16, 77)}
    # Whole panels of 16 are read where they are, others are copied; 512 keys are the most of a tile, 96 queries of a block.
    lengths = ((1, 513), (97, 16), (193, 1), (95, 527))
    found |= {f"{queries} queries, {keys} keys": made(1, 1, queries, keys, 16) for queries, keys in lengths}
    found["nothing in the batch"] = made(batch=0)
    found["no heads"] = made(heads=0)
    found["tables of one row"] = made(clip=(0, 0))
    found["tables longer than all distances"] = made(clip=(500, 400))
    found["nothing relative"] = made(tables={})
    found["tables only to the right"] = made(clip=(0, 9), is_causal=True, query_offset=0)
    for sign in (-1, 1):
        found[f"offset of {sign} * 2^62"] = made(query_offset=sign * FAR)
        found[f"offset of {sign} * 2^62 by sequence"] = made(batch=2, query_offset=torch.tensor([sign * FAR, 3]))
        found[f"causal with an offset of {sign} * 2^62"] = made(query_offset=sign * FAR, is_causal=True)
        found[f"window of 2^62 and an offset of {sign} * 2^62"] = made(query_offset=sign * FAR, window=(FAR, FAR))
    found["window of 2^62"] = made(window=(FAR, FAR))
    found["window of 2^62 behind"] = made(window=(FAR, 0))
    found["window of one key"] = made(window=(0, 0), query_offset=9)
    found["no keys by length"] = made(batch=2, key_lengths=torch.tensor([0, 0]))
    found["no keys for one sequence"] = made(batch=2, key_lengths=torch.tensor([37, 0]), is_causal=True, query_offset=16)
    found["no keys by mask"] = made(key_mask=torch.zeros(1, 37, dtype=torch.bool))
    found["one key by mask"] = made(key_mask=torch.arange(37)[None] == 17)
    found["nothing seen"] = made(attn_mask=torch.zeros(21, 37, dtype=torch.bool))
    found["a mask of one element"] = made(attn_mask=torch.ones(1, 1, dtype=torch.bool))
    found["a transposed mask"] = made(attn_mask=(torch.rand(37, 21, generator=torch.Generator().manual_seed(seed)) > 0.5).T)
    mask = torch.zeros(2, 1, 1, 37, dtype=torch.float64)
    mask[0, ..., 3:9] = -torch.inf
    mask[1] = -torch.inf
    infinite = made(batch=2)
    infinite.tensors["attn_mask"] = mask
    found["a mask of infinities"] = infinite
    for p in (1.0, 2.0**-33, 1 - 2.0**-33):
        found[f"dropout of {p}"] = made(dropout_p=p)
    for scale in (0.0, -0.3):
        found[f"scale of {scale}"] = made(scale=scale)
        found[f"scale of {scale}, causal"] = made(scale=scale, is_causal=True, query_offset=16, tables={"rel_k": False})
        found[f"scale of {scale}, nothing relative"] = made(scale=scale, key_lengths=torch.tensor([9]), tables={})
    huge = made(is_causal=True, query_offset=16)
    huge.tensors["query"] *= 1e4
    found["scores of tens of thousands"] = huge
    for name, arguments in {"": {}, ", whole panels": {"size": 32}, ", causal": {"is_causal": True, "query_offset": 16}}.items():
        for change in (misaligned, spread, repeated):
            found[f"{change.__name__}{name}"] = with_layout(made(batch=2, **arguments), change)
    found["grouped queries, shared tables"] = made(2, 6, key_heads=2, tables={"rel_k": False, "rel_bias": False})
    found["grouped queries, tables by head"] = made(2, 6, key_heads=3, tables={"rel_k": True, "rel_q": True, "rel_v": True})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="blocked")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16", "float16"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    calls = ((name, lambda made=made: made) for name, made in edges(options.seed).items())
    check_all(calls, options.backend, options.dtype, f"at the edges of seed {options.seed}")


if __name__ == "__main__":
    main()
