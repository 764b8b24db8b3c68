"""Packed sequences over gloo processes against one call in one process, in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import relattn
from relattn.distributed.layout import Layout
from tests.distributed.cases import SEED
from tests.distributed.processes import Failure

pytestmark = pytest.mark.xdist_group("distributed")

WAYS = [("ring", "contiguous"), ("ring", "zigzag"), ("gather", "contiguous"), ("gather", "zigzag"), ("all_to_all", "zigzag")]
TERMS = ("rel_k", "rel_q", "rel_v", "rel_bias", "pos_bias_u", "pos_bias_v")


@dataclass(frozen=True)
class Packed:
    """Lengths of sequences, and settings; `key_lengths` and `query_offset` are one number for each sequence."""

    queries: tuple[int, ...]
    keys: tuple[int, ...] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    clip: tuple[int, int] = (4, 3)
    key_lengths: tuple[int, ...] | None = None
    query_offset: int | tuple[int, ...] | None = None
    key_mask: bool = False
    key_heads: int = 4
    shared_tables: bool = False

    def call(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Differentiable tensors and key_mask, whole, and other arguments."""
        generator = torch.Generator().manual_seed(1)
        total, total_keys, heads, size, rows = sum(self.queries), sum(self.keys or self.queries), 4, 8, sum(self.clip) + 1

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        each = () if self.shared_tables else (heads,)
        tensors = dict(
            query=normal(total, heads, size), key=normal(total_keys, self.key_heads, size), value=normal(total_keys, self.key_heads, size),
            rel_k=normal(*each, rows, size), rel_q=normal(*each, rows, size), rel_v=normal(*each, rows, size), rel_bias=normal(*each, rows),
            pos_bias_u=normal(heads, size), pos_bias_v=normal(heads, size),
        )  # fmt: skip
        if self.key_mask:
            tensors["key_mask"] = torch.rand(total_keys, generator=generator) < 0.7
        others: dict[str, Any] = dict(self.settings, max_relative_position=self.clip, enable_gqa=self.key_heads != heads)
        others["cu_seqlens_q"] = torch.tensor((0, *self.queries)).cumsum(0)
        if self.keys is not None:
            others["cu_seqlens_k"] = torch.tensor((0, *self.keys)).cumsum(0).int()
        if self.key_lengths is not None:
            others["key_lengths"] = torch.tensor(self.key_lengths)
        offset = self.query_offset
        others["query_offset"] = torch.tensor(offset) if isinstance(offset, tuple) else offset
        return tensors, others


CASES = {
    "plain": Packed((7, 30, 1, 0, 12, 19)),
    "causal": Packed((40, 3, 26), settings=dict(is_causal=True), shared_tables=True),
    "window": Packed((5, 50, 14), settings=dict(window=(6, 2)), key_heads=2),
    "other keys": Packed(
        (9, 20, 0, 31), (30, 2, 7, 11), dict(is_causal=True), key_lengths=(25, 2, 7, 0), query_offset=(21, -3, 0, 4), key_mask=True
    ),
    "one offset, window": Packed((33, 18), (11, 40), dict(window=(9, None), max_seqlen_q=33, max_seqlen_k=64), query_offset=5),
    "fewer tokens than ranks": Packed((1, 2), key_heads=4),
}
CUT = {  # what may not begin anywhere in a sequence
    "dropout": Packed((7, 30, 1, 0, 12, 19), settings=dict(dropout_p=0.4)),
    "chunks": Packed((40, 3, 26), settings=dict(chunk=(5, 1), is_causal=True)),
}


def _results(output: Tensor, lse: Tensor, slopes: tuple[Tensor, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    gradients = torch.autograd.grad((output, lse), list(wanted.values()), slopes)
    return dict(output=output.detach(), lse=lse.detach()) | {f"grad_{name}": of for name, of in zip(wanted, gradients, strict=True)}


def _leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for name, tensor in tensors.items()}


def _slopes(case: Packed) -> tuple[Tensor, Tensor]:
    generator, total = torch.Generator().manual_seed(2), sum(case.queries)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((total, 4, 8), (4, total)))  # type: ignore[return-value]


def _whole(case: Packed) -> dict[str, Tensor]:
    tensors, others = case.call()
    tensors = _leaves(tensors)
    torch.manual_seed(SEED)
    output, lse = relattn.relative_attention_varlen(**tensors, **others, return_lse=True, backend="reference")
    return _results(output, lse, _slopes(case), tensors)


def _sharded(group: Any, case: Packed, options: dict[str, Any]) -> dict[str, Tensor]:
    import relattn.distributed as parallel

    def part(tensor: Tensor, dim: int) -> Tensor:
        return parallel.shard(tensor, dim, group=group, layout=options["layout"])

    tensors, others = case.call()
    tensors = _leaves({name: tensor if name in TERMS else part(tensor, 0) for name, tensor in tensors.items()})
    slopes = _slopes(case)
    torch.manual_seed(SEED + dist.get_rank(group))
    output, lse = parallel.relative_attention_varlen(**tensors, **others, return_lse=True, group=group, **options)
    return _results(output, lse, (part(slopes[0], 0), part(slopes[1], 1)), tensors)


def _compare(pool, case: Packed, ranks: int, method: str, layout: str, expected: dict[str, Tensor]) -> None:
    results = pool.values(ranks, _sharded, case, dict(method=method, layout=layout))
    for name, right in expected.items():
        parts = [result[name] for result in results]
        keys = name in ("grad_key", "grad_value")
        if keys or name in ("output", "lse", "grad_query"):
            whole = Layout(layout, sum(case.keys or case.queries) if keys else sum(case.queries), ranks)
            found = [whole.joined(parts, 1 if name == "lse" else 0)]
        else:
            found = parts  # of a table: whole on every rank
        for one in found:
            torch.testing.assert_close(one, right, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", [*CASES, *CUT])
def test_the_result_is_that_of_one_call(pool, name: str) -> None:
    case = (CASES | CUT)[name]
    expected = _whole(case)
    for ranks in (3, 4):
        for method, layout in WAYS:
            if not (method == "all_to_all" and case.key_heads % ranks) and not (method == "ring" and name in CUT):
                _compare(pool, case, ranks, method, layout, expected)


def _sent(group: Any, case: Packed) -> tuple[int, int]:
    """Bytes of keys and values that this rank sends, and how many blocks it computes."""
    import relattn.distributed as parallel
    from relattn.distributed import ring

    tensors, others = case.call()
    tensors = {name: tensor if name in TERMS else parallel.shard(tensor, 0, group=group) for name, tensor in tensors.items()}
    sent, blocks = [], []
    with pytest.MonkeyPatch.context() as patch:
        send, block = dist.batch_isend_irecv, ring.block_of

        def count(operations: list[Any]) -> Any:
            sent.extend(one.tensor.nbytes for one in operations if one.op is dist.isend)
            return send(operations)

        patch.setattr(dist, "batch_isend_irecv", count)
        patch.setattr(ring, "block_of", lambda *given: (blocks.append(1), block(*given))[1])
        parallel.relative_attention_varlen(**tensors, **others, group=group)
    return sum(sent), len(blocks)


@pytest.mark.parametrize(
    ("settings", "senders", "blocks"),
    [({}, [0, 1, 1, 0], [1, 2, 2, 1]), (dict(is_causal=True), [0, 1, 0, 0], [1, 1, 2, 1]), (dict(window=(0, 0)), [0] * 4, [1] * 4)],
)
def test_parts_without_a_common_sequence_are_neither_sent_nor_computed(pool, settings, senders: list[int], blocks: list[int]) -> None:
    """Of 16 tokens a rank, one sequence lies on two: the second and the third."""
    case = Packed((16, 8, 16, 8, 16), settings=settings)
    piece = 16 * 4 * (8 + 8) * 8
    assert pool.values(4, _sent, case) == [(piece * count, computed) for count, computed in zip(senders, blocks, strict=True)]


def _refused(group: Any, arguments: dict[str, Any]) -> None:
    import relattn.distributed as parallel

    tensor = torch.zeros(8, 2, 8)
    given = dict(group=group, cu_seqlens_q=torch.tensor([0, 4, 16])) | arguments
    parallel.relative_attention_varlen(tensor, tensor, tensor, **given)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (dict(cu_seqlens_q=torch.tensor([0, 4, 8])), "ValueError", "cu_seqlens_q: expected to begin at 0 and end at 16"),
        (dict(max_seqlen_q=5), "ValueError", "max_seqlen_q: a sequence has 12 tokens"),
        (dict(dropout_p=0.1), "ValueError", "dropout_p: packed sequences have none in method 'ring'"),
        (dict(chunk=(4, 1)), "ValueError", "chunk: packed sequences have none in method 'ring'"),
        (dict(method="tree"), "ValueError", "method: expected one of"),
        (dict(attn_mask=None), "TypeError", "relative_attention_varlen: got an unexpected argument 'attn_mask'"),
    ],
)
def test_every_rank_says_what_is_wrong(pool, arguments: dict[str, Any], kind: str, message: str) -> None:
    for found in pool.outcomes(2, _refused, arguments):
        assert isinstance(found, Failure)
        assert found.kind == kind
        assert found.message.startswith(message)
