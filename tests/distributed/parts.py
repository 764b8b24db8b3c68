"""A ring without processes: what a backend makes of the blocks of a call, joined, against the whole call in float64.

    python -m tests.distributed.parts --backend cpu --dtype bfloat16

TRITON_INTERPRET=1 and `--backend triton` for the GPU kernels; tests/kernels/test_software_amx.py runs it for AMX.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from relattn import backends, functional
from relattn.arguments import DIFFERENTIABLE, Tensors, lse_dtype
from relattn.distributed import ring
from relattn.distributed.layout import Layout
from relattn.philox import draw_seed
from tests.distributed.cases import SEED, Case, exact, joined, replace, whole
from tests.oracles import device_of

ALL = ("rel_k", "rel_q", "rel_v", "rel_bias", "pos_bias_u", "pos_bias_v")
BASE = Case(queries=50, terms=("rel_k",))
CASES = {
    "no table": replace(BASE, terms=(), key_mask=True, mask="rows"),
    "causal": replace(BASE, settings=(("is_causal", True),), clip=(49, 0)),
    "window and clip": replace(BASE, settings=(("window", (9, 3)),), clip=(4, 2)),
    "far blocks": replace(BASE, queries=120, clip=(3, 3), terms=("rel_k", "rel_bias")),
    "all terms": replace(BASE, terms=ALL, per_head=True, key_heads=2, clip=(7, 20)),
    "float mask": replace(BASE, mask="float"),
    "offsets": replace(BASE, offset=(3, -20), key_lengths=(40, 13)),
    "large scores": replace(BASE, terms=("rel_k", "rel_bias"), settings=(("scale", 12.0),)),
    "dropout": replace(BASE, settings=(("dropout_p", 0.5), ("is_causal", True))),
    "chunks": replace(BASE, settings=(("chunk", (7, 1)),)),
}


class _Present:
    """All ranks' pieces at once, and gradients where they belong."""

    home = ()

    def __init__(self, call: ring.Call, whole: Tensors, gradients: dict[str, Tensor]) -> None:
        self.call, self.whole, self.gradients = call, whole, gradients

    def steps(self) -> Iterator[tuple[int, list[ring.Piece]]]:
        for step in range(self.call.keys.ranks):
            self.needed = self.call.needed(self.call.rank, (self.call.rank - step) % self.call.keys.ranks)
            pieces = []
            for tokens in self.call.keys.pieces(self.call.rank) if step == 0 else self.needed:
                where = slice(tokens.start, tokens.stop)
                mask = None if self.whole.key_mask is None else self.whole.key_mask[:, where]
                pieces.append(ring.Piece(tokens, self.whole.key[:, :, where], self.whole.value[:, :, where], mask))
            yield step, pieces

    def send_home(self, step: int, owed: list[Tensor]) -> None:
        for tokens, both in zip(self.needed, owed, strict=True):
            start = 0
            for name in ("key", "value"):
                total = self.gradients[f"grad_{name}"][:, :, tokens.start : tokens.stop]
                total += both[start : start + total.numel()].view(total.shape)
                start += total.numel()

    def arrived(self) -> Iterator[Any]:
        return iter(())


def by_parts(case: Case, ranks: int, layout: str, backend: str) -> dict[str, Tensor]:
    """Results and gradients as `cases.whole` gives them."""
    device = device_of(backend)
    given = {name: tensor.to(device) for name, tensor in case.tensors().items()}
    arguments = {name: value for name, value in case.arguments().items() if name not in ("backend", "return_lse")}
    arguments = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    absent = {name: None for name in Tensors._fields[3:12] if name not in given and name not in arguments}
    numbers: dict[str, Any] = dict(max_relative_position=None, is_causal=False, window=None, chunk=None, dropout_p=0.0, scale=None)
    tensors, settings = functional.validated(**numbers | absent | given | arguments)
    queries, keys = (Layout(layout, tensor.shape[2], ranks) for tensor in tensors[:2])
    torch.manual_seed(SEED)
    seed = draw_seed(torch.device("cpu")).to(device)
    offsets = [0] if tensors.query_offsets is None else tensors.query_offsets.tolist()
    reach = settings.query_offset + min(offsets), settings.query_offset + max(offsets)
    longest = keys.length if tensors.key_lengths is None else max(tensors.key_lengths.tolist())
    accumulate = lse_dtype(case.dtype)
    of_keys = {f"grad_{name}": torch.zeros(getattr(tensors, name).shape, dtype=accumulate, device=device) for name in ("key", "value")}
    needs = [tensor is not None and tensor.is_floating_point() for tensor in tensors[: len(DIFFERENTIABLE)]]
    needs[DIFFERENTIABLE.index("attn_mask")] &= backend == "blocked"
    results: list[dict[str, Tensor]] = []
    for rank in range(ranks):
        mask = tensors.attn_mask
        parts: dict[str, Any] = dict(
            query=queries.part(tensors.query, 2, rank), key=keys.part(tensors.key, 2, rank), value=keys.part(tensors.value, 2, rank),
            attn_mask=queries.part(mask, mask.dim() - 2, rank) if mask is not None and mask.shape[-2] > 1 else mask,
            key_mask=None if tensors.key_mask is None else keys.part(tensors.key_mask, 1, rank),
        )  # fmt: skip
        local = tensors._replace(**parts)
        chosen = backends.select(local, settings._replace(is_part=True, first_key=4 if settings.dropout_p > 0.0 else 0), backend)
        call = ring.Call(chosen, settings, queries, keys, rank, reach, longest)
        output, lse = ring.forward(call, _Present(call, tensors, of_keys), local, seed)  # type: ignore[arg-type]
        slope, lse_slope = (queries.part(of.to(device), 2, rank) for of in case.slopes())
        travel: Any = _Present(call, tensors, of_keys)
        found = ring.backward(call, travel, local, seed, output, lse, slope, lse_slope, needs)
        names = [f"grad_{name}" for name, need in zip(DIFFERENTIABLE, needs, strict=True) if need]
        results.append(dict(output=output, lse=lse) | dict(zip(names, found, strict=True)))
    for result in results[1:]:  # as all_reduce does
        for name in result:
            if name[5:] in ALL:
                results[0][name] = results[0][name] + result[name]
    for result in results:
        result |= {name: results[0][name] for name in result if name[5:] in ALL}
    whole = joined(case, results, layout)
    whole |= {name: whole[name].to(accumulate) + total for name, total in of_keys.items()}
    return {name: tensor.cpu() for name, tensor in whole.items()}


def error(case: Case, found: dict[str, Tensor], plain: dict[str, Tensor], right: dict[str, Tensor]) -> str:
    """What is wrong with `found`: empty, or which result is how far from `right`. As far as twice what one call in the same dtype is,
    and a little more, is rounding."""
    little = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[case.dtype]
    for name, expected in right.items():
        if name not in found:
            continue
        finite = expected.isfinite()
        if not torch.equal(found[name].isfinite(), finite) or found[name].isnan().any():
            return f"{name}: finite elsewhere"
        if not finite.any():
            continue
        off, allowed = ((of[name].double() - expected)[finite].abs().max() for of in (found, plain))
        if off > 2 * allowed + little * max(1.0, float(expected[finite].abs().max())):
            return f"{name}: off by {off:.2e}, one call by {allowed:.2e}"
    return ""


def check(case: Case, backend: str, dtype: torch.dtype) -> str:
    case = replace(case, dtype=dtype)
    plain, right = whole(replace(case, backend="blocked")), exact(case)
    for ranks, layout in ((3, "contiguous"), (2, "zigzag")):
        wrong = error(case, by_parts(case, ranks, layout, backend), plain, right)
        if wrong:
            return f"{ranks} ranks, {layout}: {wrong}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    failed = False
    for name, case in CASES.items():
        try:
            wrong = check(case, options.backend, getattr(torch, options.dtype))
        except ValueError as reason:  # it does not take such calls
            print(f"{name}: {reason}")
            continue
        print(f"{name}: {wrong or 'good'}")
        failed |= bool(wrong)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
