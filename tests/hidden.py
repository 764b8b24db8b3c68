"""What may not be seen may hold anything: random calls whose hidden places are filled with NaN, infinities and the largest numbers.

As a command it runs as many as wanted: `python -m tests.hidden --backend blocked --count 2000 --seed 0`.
"""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

import relattn
from relattn.arguments import Settings, Tensors
from relattn.backends import reference
from relattn.backends import triton as gpu
from tests.fuzz import Call, command, cut, decoding_call, random_call


class Hostile:
    """Where a call's tensors may hold anything, and which queries the caller then ignores, drawn for its seed.

    Filled are all keys and values that no query sees, a few that some see, a few queries and all that see nothing, and the tables' rows
    that no visible pair reaches. Queries that are filled or see something filled are ignored: no gradient comes from them, and none may
    pass.
    """

    def __init__(self, call: Call) -> None:
        self.rng, self.generator = random.Random(call.seed), torch.Generator().manual_seed(call.seed)
        query, key = call.tensors["query"], call.tensors["key"]
        self.call, (_, heads, queries, _), (_, key_heads, keys, _) = call, query.shape, key.shape
        self.seen, distance = _seen(call)
        of_key_head = self.seen.unflatten(1, (key_heads, heads // max(key_heads, 1))) if heads else self.seen[:, :, None]
        hidden = ~of_key_head.any(3).any(2)  # (B, Hkv, Lk)
        self.rows = {name: hidden | self._few(hidden, keys) for name in ("key", "value")}
        met = (self.rows["key"] | self.rows["value"])[:, :, None, None]
        sees_filled = (of_key_head & met).any(-1).flatten(1, 2)  # (B, H, Lq)
        self.blind = ~self.seen.any(-1)
        self.rows["query"] = self.blind | self._few(sees_filled, queries)
        self.ignored = sees_filled | self.rows["query"]
        self.hidden = hidden
        for name in ("rel_k", "rel_q", "rel_v", "rel_bias"):
            if name in call.tensors:
                self.rows[name] = ~self._reached(name, distance)

    def _few(self, like: Tensor, length: int) -> Tensor:
        """Two in each row, for half of the calls."""
        chosen = torch.rand(like.shape, generator=self.generator) < 2 / max(length, 1)
        return chosen if self.rng.random() < 0.5 else torch.zeros_like(chosen)

    def _reached(self, name: str, distance: Tensor) -> Tensor:
        """Rows of a table, (R,) or (H, R), that the visible pairs' distances belong to."""
        table, heads = self.call.tensors[name], self.seen.shape[1]
        per_head = table.dim() == (2 if name == "rel_bias" else 3)
        rows = table.shape[1] if per_head else table.shape[0]
        sides = self.call.arguments.get("max_relative_position")
        left = rows // 2 if sides is None else sides if isinstance(sides, int) else sides[0]
        row = (distance.clamp(-left, rows - 1 - left) + left).expand(self.seen.shape)
        reached = torch.zeros(heads, rows, dtype=torch.bool)
        for head in range(heads):
            reached[head, row[:, head][self.seen[:, head]]] = True
        return reached if per_head else reached.any(0)

    def fill(self, tensors: dict[str, Tensor]) -> None:
        for name, rows in self.rows.items():
            tensor = tensors[name]
            largest = torch.finfo(tensor.dtype).max
            numbers = torch.tensor([math.nan, math.inf, -math.inf, largest * 0.9, -largest * 0.9], dtype=tensor.dtype)
            drawn = numbers[torch.randint(5, tensor.shape, generator=self.generator)].to(tensor.device)
            for_row = rows if name == "rel_bias" else rows[..., None]
            if self.rng.random() < 0.3 and tensor.dim() == 4:  # one element of a row is enough
                for_row = for_row & (torch.arange(tensor.shape[-1]) == tensor.shape[-1] // 2)
            with torch.no_grad():
                tensor.copy_(torch.where(for_row.to(tensor.device), drawn, tensor))

    def run(self, backend: str, dtype: torch.dtype, filled: bool) -> dict[str, Tensor]:
        """Output, log-sum-exp (of the queries that count) and all gradients."""
        device = "cuda" if backend == "triton" and not gpu.INTERPRETED else "cpu"
        tensors, arguments = self.call.cast(dtype, device)
        if "attn_mask" in tensors:
            tensors["attn_mask"].requires_grad_(False)
        if filled:
            self.fill(tensors)
        torch.manual_seed(self.call.seed)
        attend = _packed if is_packed(self.call) else relattn.relative_attention
        output, lse = attend(**tensors, **arguments, return_lse=True, backend=backend)
        generator = torch.Generator().manual_seed(self.call.seed)
        slopes = [torch.randn(result.shape, generator=generator) for result in (output, lse)]
        slopes[0].masked_fill_(self.ignored[..., None], 0.0)
        slopes[1].masked_fill_(self.ignored | (self.call.seed % 2 == 0), 0.0)
        if filled:  # nor does it matter what comes back to a query that sees nothing
            slopes[0].masked_fill_(self.blind[..., None], math.nan)
        wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
        slopes = [slope.to(device, result.dtype) for slope, result in zip(slopes, (output, lse), strict=True)]
        gradients = torch.autograd.grad((output, lse), list(wanted.values()), slopes, allow_unused=True)
        counts = ~self.ignored.to(device)
        results = {"output": torch.where(counts[..., None], output, 0.0), "lse": torch.where(counts, lse, 0.0)}
        for (name, tensor), gradient in zip(wanted.items(), gradients, strict=True):
            results[f"gradient of {name}"] = torch.zeros_like(tensor) if gradient is None else gradient
        return {name: result.detach().cpu() for name, result in results.items()}


def is_packed(call: Call) -> bool:
    return call.seed % 5 == 1 and "attn_mask" not in {*call.tensors, *call.arguments}


def _packed(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """`relative_attention` of batch elements that lie one after the other: what is hidden in one lies beside what is seen in the next."""
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    rows = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    ends = [(torch.arange(batch + 1) * length).to(query.device, torch.int32) for length in (queries, keys)]
    if queries != keys:
        arguments |= dict(cu_seqlens_k=ends[1], query_offset=arguments.get("query_offset", 0))
    if "key_mask" in arguments:
        arguments["key_mask"] = arguments["key_mask"].flatten()
    output, lse = relattn.relative_attention_varlen(*rows, cu_seqlens_q=ends[0], **arguments)
    return output.unflatten(0, (batch, queries)).transpose(1, 2), lse.unflatten(1, (batch, queries)).transpose(0, 1)


def _seen(call: Call) -> tuple[Tensor, Tensor]:
    """Which query sees which key, (B, H, Lq, Lk), and their distances, (1 or B, 1, Lq, Lk)."""
    given: dict[str, Any] = call.tensors | call.arguments
    offset, window = given.get("query_offset", 0), given.get("window")
    left, right = window if isinstance(window, tuple) else (window, window)
    mask, chunk = given.get("attn_mask"), given.get("chunk", (None, None))
    names = {name: given.get(name) for name in ("query", "key", "value", "key_mask", "key_lengths")}
    tensors = Tensors(**names, attn_mask=mask if mask is None or mask.dim() == 4 else mask[(None,) * (4 - mask.dim())],
                      query_offsets=offset if isinstance(offset, Tensor) else None)  # fmt: skip
    settings = Settings(
        scale=1.0, left=0, right=0, is_causal=bool(given.get("is_causal")), window_left=left, window_right=right, dropout_p=0.0,
        query_offset=0 if isinstance(offset, Tensor) else int(offset or 0), chunk_size=chunk[0], chunk_left=chunk[1],
    )  # fmt: skip
    distance = reference.relative_position(tensors, settings)
    seen = reference.visible(tensors, settings, distance)
    batch, heads, queries, _ = call.tensors["query"].shape
    whole = torch.ones((), dtype=torch.bool) if seen is None else seen
    return whole.expand(batch, heads, queries, call.tensors["key"].shape[2]), distance


def check_hidden(call: Call, backend: str, dtype: torch.dtype, cut: Any = cut) -> None:
    """Assert that what the call's hidden places hold makes no difference, bit for bit. cut: how the work is divided, by seed."""
    hostile = Hostile(call)
    with cut(call.seed):
        clean, found = (hostile.run(backend, dtype, filled) for filled in (False, True))
    for name, expected in clean.items():
        assert expected.isfinite().all() or name == "lse", f"{name} of the clean call is not finite; {call}"
        different = ~((found[name] == expected) | (found[name].isnan() & expected.isnan()))
        assert not different.any(), f"{name}: {int(different.sum())} of {different.numel()} differ; {call}"
    for name in ("key", "value"):
        assert not found[f"gradient of {name}"][hostile.hidden].any(), f"a gradient at hidden places of {name}; {call}"
    assert not found["gradient of query"][hostile.ignored].any(), f"a gradient of ignored queries; {call}"


def hidden_call(seed: int, backend: str) -> Call:
    """As tests.fuzz draws them, with something to hide in all of them; every fifth one is then packed."""
    call = decoding_call(seed) if backend == "cpu" and seed % 5 == 0 else random_call(seed)
    if seed % 5 == 1:
        for given in (call.tensors, call.arguments):
            given.pop("attn_mask", None)
    rng = random.Random(seed)
    batch, _, keys, _ = call.tensors["key"].shape
    if "rel_bias" in call.tensors:
        call.tensors["rel_bias"].clamp_(min=-100.0)  # infinities of its own are another matter
    if not {"key_mask", "key_lengths", "attn_mask", "window"} & {*call.arguments, *call.tensors} and not call.arguments.get("is_causal"):
        if rng.random() < 0.5:
            call.arguments["key_lengths"] = torch.tensor([rng.randrange(keys + 1) for _ in range(batch)])
        else:
            call.arguments["is_causal"] = True
            call.arguments.setdefault("query_offset", 0)
    return call


if __name__ == "__main__":
    command(__doc__, hidden_call, "with hostile places ", check_hidden, count=200)
