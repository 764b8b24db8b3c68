"""`relattn.distributed.relative_attention` on gloo processes against one call in one process, in float64."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import relattn
from relattn.distributed import ring
from relattn.distributed.layout import Layout
from tests.distributed.cases import Case, exact, joined, replace, sharded, whole
from tests.distributed.parts import ALL, CASES, check, error
from tests.distributed.processes import Failure
from tests.oracles import USABLE

pytestmark = pytest.mark.xdist_group("distributed")

WAYS = [("ring", "contiguous"), ("ring", "zigzag"), ("all_to_all", "contiguous"), ("all_to_all", "zigzag"), ("gather", "zigzag")]
MORE = {
    "window on both sides": replace(CASES["causal"], settings=(("window", (3, 11)),), clip=(5, 5)),
    "more keys": replace(CASES["causal"], queries=13, keys=41, offset=28, clip=(41, 12)),
    "more queries, ahead of the keys": replace(CASES["causal"], queries=41, keys=13, offset=-30, clip=(12, 80)),
    "bias": Case(queries=37, terms=("rel_bias",), per_head=True, clip=(36, 36), mask="heads", key_heads=2),
    "mask of keys": Case(queries=37, mask="keys", key_lengths=(30, 0)),
    "dropout and chunks": replace(CASES["chunks"], settings=(("chunk", (5, 0)), ("dropout_p", 0.3)), key_mask=True),
    "other value size": Case(queries=21, value_size=12, terms=("rel_k", "rel_v"), clip=(2, 9)),
}


def compare(pool, case: Case, ranks: int, method: str, layout: str, right: dict[str, Tensor] | None = None) -> None:
    found = joined(case, pool.values(ranks, sharded, case, dict(method=method, layout=layout)), layout)
    plain = whole(case)
    wrong = error(case, found, plain, plain if right is None else right)
    assert not wrong, wrong


@pytest.mark.parametrize("name", [*CASES, *MORE])
def test_the_result_is_that_of_one_call(pool, name: str) -> None:
    case = (CASES | MORE)[name]
    right = exact(case)
    for ranks, (method, layout) in itertools.product((2, 3, 4), WAYS):
        if method != "all_to_all" or case.key_heads % ranks == 0:
            compare(pool, case, ranks, method, layout, right)


@pytest.mark.parametrize("length", range(0, 18))
def test_any_length(pool, length: int) -> None:
    """Fewer tokens than ranks, than pieces, than a piece's multiple of four, and none."""
    case = Case(queries=length, batch=1, heads=2, key_heads=2, clip=(2, 1), settings=(("is_causal", True),))
    for ranks, (method, layout) in itertools.product((2, 4), (WAYS[0], WAYS[1], WAYS[4])):
        compare(pool, case, ranks, method, layout)


def drawn(seed: int) -> tuple[Case, int, str, str]:
    """Any call."""
    draw = random.Random(seed)
    queries, other = draw.choice([2, 5, 9, 17, 33, 64]), draw.choice([None, None, 1, 7, 30, 64])
    terms = tuple(name for name in ALL if draw.random() < 0.5)
    terms = terms if "rel_k" in terms else tuple(name for name in terms if name != "pos_bias_v")
    settings: dict[str, Any] = {}
    kind = draw.choice(["", "causal", "window", "chunk", "both"])
    if kind in ("causal", "both"):
        settings["is_causal"] = True
    if kind in ("window", "both"):
        settings["window"] = draw.choice([None, 0, 3, 10]), draw.choice([None, 0] if kind == "both" else [None, 0, 2, 9])
    if kind == "chunk":
        settings["chunk"] = draw.choice([1, 3, 5, 8]), draw.choice([None, 0, 1, 2])
    settings |= {name: value for name, value in (("dropout_p", 0.4), ("scale", -0.4)) if draw.random() < 0.2}
    offset = draw.choice([0, 3, -5, 20, (2, -7), (0, 11)]) if other is not None or draw.random() < 0.3 else None
    heads, key_heads = draw.choice([(4, 4), (4, 2), (12, 12), (4, 1)])
    ranks = draw.choice([2, 3, 4])
    method, layout = draw.choice(WAYS if key_heads % ranks == 0 else WAYS[:2])
    case = Case(
        queries=queries, keys=other, heads=heads, key_heads=key_heads, size=draw.choice([4, 8]), value_size=draw.choice([4, 12]),
        terms=terms, per_head=draw.random() < 0.5, clip=draw.choice([(40, 40), (3, 3), (5, 0), (0, 0), (0, 12)]),
        mask=draw.choice(["", "", "rows", "heads", "keys", "float"]), key_mask=draw.random() < 0.3,
        key_lengths=None if draw.random() < 0.7 else (draw.choice([0, 4, 20]), draw.choice([0, 9, 100])), offset=offset,
        settings=tuple(settings.items()), dtype=draw.choice([torch.float64, torch.float64, torch.float32, torch.bfloat16]),
    )  # fmt: skip
    return case, ranks, method, layout


@pytest.mark.parametrize("seed", range(60))
def test_random_calls(pool, seed: int) -> None:
    case, *way = drawn(seed)
    compare(pool, case, *way, exact(case))


@pytest.mark.parametrize("backend", [name for name in USABLE if name in ("cpu", "blocked")])
@pytest.mark.parametrize("name", CASES)
def test_blocks_of_every_backend_join(backend: str, name: str) -> None:
    """In float32 too the joined log-sum-exp, not the block's own, makes a block's weights: with large scores, and in half precision,
    backends of whole calls find it anew."""
    for dtype in (torch.float32, torch.bfloat16):
        assert check(CASES[name], backend, dtype) == ""


def _weights(group: Any, case: Case, options: dict[str, Any]) -> Tensor:
    """With values of 1 at one key each the output is the weights."""
    import relattn.distributed as parallel

    tensors = case.tensors()
    tensors["value"] = torch.eye(case.queries, dtype=case.dtype).expand(case.batch, case.heads, -1, -1)
    local = {name: parallel.shard(tensor, 2, group=group, layout=options["layout"]) for name, tensor in tensors.items() if name != "rel_k"}
    torch.manual_seed(3)
    output, _ = parallel.relative_attention(**local, rel_k=tensors["rel_k"], **case.arguments(), group=group, **options)
    return output


def test_dropout_drops_the_same_weights_on_any_number_of_ranks(pool) -> None:
    case = Case(queries=30, value_size=30, settings=(("dropout_p", 0.5),))
    one = pool.values(1, _weights, case, dict(method="gather", layout="contiguous"))[0]
    assert 0.4 < (one == 0.0).double().mean() < 0.6
    for ranks, (method, layout) in itertools.product((1, 2, 3), WAYS):
        if method != "all_to_all" or ranks != 3:
            parts = pool.values(ranks, _weights, case, dict(method=method, layout=layout))
            assert torch.equal(Layout(layout, 30, ranks).joined(parts, 2) == 0.0, one == 0.0)


def test_two_runs_give_the_same_bits(pool) -> None:
    case = Case(queries=61, terms=ALL, dtype=torch.float32, settings=(("dropout_p", 0.2),))
    for method, layout in WAYS:
        first, second = (pool.values(4, sharded, case, dict(method=method, layout=layout)) for _ in range(2))
        for one, other in zip(first, second, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_hidden_may_hold_anything(pool) -> None:
    case = replace(Case(queries=37, key_mask=True), settings=(("is_causal", True),))
    for method, layout in WAYS:
        options = dict(method=method, layout=layout)
        for one, other in zip(*(pool.values(2, _filled, case, options, filler) for filler in (0.0, float("nan"))), strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


def _filled(group: Any, case: Case, options: dict[str, Any], filler: float) -> dict[str, Tensor]:
    class Filled(Case):
        def tensors(self) -> dict[str, Tensor]:
            found = case.tensors()
            hidden = ~found["key_mask"][:, None, :, None]
            return found | {name: found[name].masked_fill(hidden, filler) for name in ("key", "value")}

    return sharded(group, Filled(**vars(case)), options)


def test_local_table_gradients_sum_to_those_of_the_whole(pool) -> None:
    case = Case(queries=37, terms=ALL, clip=(3, 3), dtype=torch.bfloat16)
    right = exact(case)
    for method, layout in WAYS:
        results = pool.values(2, sharded, case, dict(method=method, layout=layout, table_gradients="local"))
        for name in (f"grad_{name}" for name in ALL):
            total = sum(result[name].double() for result in results)
            assert not torch.equal(results[0][name], results[1][name])
            assert (total - right[name]).abs().max() < 0.02 * right[name].abs().max()


# What is sent


def _sent(group: Any, case: Case, options: dict[str, Any]) -> dict[str, int]:
    """Bytes that leave this rank by P2P, by all-to-all and by all-reduce, forward and with backward."""
    import relattn.distributed as parallel

    counted = dict(p2p=0, all_to_all=0, all_reduce=0)
    size = dist.get_world_size(group)
    rank = dist.get_rank(group)

    def p2p(operations: list[Any]) -> Any:
        counted["p2p"] += sum(one.tensor.nbytes for one in operations if one.op is dist.isend)
        return original["batch_isend_irecv"](operations)

    def all_to_all(received: Tensor, given: Tensor, to: Any, sizes: list[int], **others: Any) -> Any:
        counted["all_to_all"] += (given.numel() - sizes[rank]) * given.element_size()
        return original["all_to_all_single"](received, given, to, sizes, **others)

    def all_reduce(tensor: Tensor, **others: Any) -> Any:
        counted["all_reduce"] += tensor.nbytes
        return original["all_reduce"](tensor, **others)

    hooks = dict(batch_isend_irecv=p2p, all_to_all_single=all_to_all, all_reduce=all_reduce)
    original = {name: getattr(dist, name) for name in hooks}
    layout = options["layout"]
    tensors = case.tensors()
    local = {name: parallel.shard(tensors[name], 2, group=group, layout=layout).requires_grad_() for name in ("query", "key", "value")}
    tables = {name: tensor.requires_grad_() for name, tensor in tensors.items() if name in ALL}
    try:
        for name, hook in hooks.items():
            setattr(dist, name, hook)
        output, _ = parallel.relative_attention(**local, **tables, **case.arguments(), group=group, **options)
        forward = dict(counted)
        output.sum().backward()
    finally:
        for name, function in original.items():
            setattr(dist, name, function)
    assert size > 1
    return forward | {f"{name} with backward": count for name, count in counted.items()}


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("settings", [(), (("is_causal", True),), (("window", (8, 0)),), (("window", (8, 8)),)], ids=str)
def test_the_ring_sends_what_its_formula_says(pool, layout: str, settings: tuple) -> None:
    """Forward: every piece of keys and values once to each other rank of which a query may see it, so (P - 1) (K + V) where nothing is
    hidden; backward: the same, and as much of gradients home."""
    ranks, length = 4, 77
    case = Case(queries=length, key_heads=2, value_size=12, terms=("rel_k", "rel_bias"), clip=(5, 5), settings=settings)
    found = pool.values(ranks, _sent, case, dict(method="ring", layout=layout))
    cut = Layout(layout, length, ranks)
    position = torch.arange(length)
    distance = position - position[:, None]
    given = dict(settings)
    left, right = given.get("window", (length, length))
    seen = (distance >= -left) & (distance <= (0 if "is_causal" in given else right))
    of_token = case.batch * case.key_heads * (case.size + case.value_size) * 8

    def needed(rank: int, source: int) -> int:
        queries = torch.cat([torch.arange(piece.start, piece.stop) for piece in cut.pieces(rank)])
        return sum(len(piece) for piece in cut.pieces(source) if seen[queries][:, piece.start : piece.stop].any()) * of_token

    table = sum(tensor.numel() for name, tensor in case.tensors().items() if name in ALL) * 8
    for rank, sent in enumerate(found):
        there = sum(needed(other, rank) for other in range(ranks) if other != rank)
        home = sum(needed(rank, other) for other in range(ranks) if other != rank)
        if not settings:
            assert there == (ranks - 1) * cut.local_length(rank) * of_token
        assert sent["p2p"] == there
        assert sent["p2p with backward"] == 2 * there + home
        assert (sent["all_reduce"], sent["all_reduce with backward"]) == (0, table)
        assert sent["all_to_all with backward"] == 0
    if settings == (("is_causal", True),) and layout == "contiguous":
        assert found[-1]["p2p"] == 0  # nobody sees the last rank's keys
    if settings == (("window", (8, 0)),) and layout == "contiguous":
        assert found[0]["p2p"] == cut.local_length(0) * of_token  # to its neighbour


def test_padding_is_not_sent(pool) -> None:
    case = Case(queries=64, key_lengths=(16, 9))
    found = pool.values(4, _sent, case, dict(method="ring", layout="contiguous"))
    assert [sent["p2p"] > 0 for sent in found] == [True, False, False, False]


def test_all_to_all_sends_a_share_of_everything(pool) -> None:
    """(P - 1) / P of queries, keys, values and outputs, and of each output's log-sum-exp; backward the same of gradients."""
    case = Case(queries=64, value_size=12)
    for sent in pool.values(4, _sent, case, dict(method="all_to_all", layout="contiguous")):
        tokens = case.batch * case.heads * 16 * 8
        forward = tokens * (case.size * 2 + case.value_size * 2 + 1) * 3 // 4
        assert sent["all_to_all"] == forward
        assert sent["all_to_all with backward"] == 2 * forward - tokens * 3 // 4  # nobody asked for the log-sum-exp's
        assert sent["p2p with backward"] == 0


def test_a_far_block_has_a_table_of_one_row() -> None:
    settings = relattn.functional.Settings(3, 5, False, None, None, 0, 0.0, 1.0)
    layout = Layout("contiguous", 400, 4)
    call = ring.Call("blocked", settings, layout, layout, 0, (0, 0), 400)
    block, rows = call.block_settings(layout.piece(3), layout.piece(0))
    assert (block.left, block.right, rows) == (3, -3, slice(0, 1))  # all distances are -3's
    block, rows = call.block_settings(layout.piece(0), layout.piece(3))
    assert (block.left, block.right, rows) == (-5, 5, slice(8, 9))
    block, rows = call.block_settings(layout.piece(1), layout.piece(1))
    assert (block.left, block.right, rows, block.query_offset) == (3, 5, slice(0, 9), 0)


def _saved_bytes(group: Any, length: int) -> int:
    """Of what a call keeps for its backward pass, beside its inputs."""
    import relattn.distributed as parallel

    case = Case(queries=length, batch=1, clip=(2, 2), dtype=torch.float32)
    tensors = case.tensors()
    local = {name: parallel.shard(tensors[name], 2, group=group).requires_grad_() for name in ("query", "key", "value")}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        parallel.relative_attention(**local, rel_k=tensors["rel_k"].requires_grad_(), **case.arguments(), group=group)
    return sum(kept.values())


def test_the_ring_keeps_nothing_but_its_shard(pool) -> None:
    """The same on two ranks as on four with twice the length, and that is query, key, value, output and one number for each query."""
    kept = pool.values(2, _saved_bytes, 64) + pool.values(4, _saved_bytes, 128)
    table = 5 * 8 * 4
    assert set(kept) == {32 * 4 * (4 * 8 + 1) * 4 + table}


# Helpers and errors


def _round_trip(group: Any, layout: str, length: int) -> tuple[Tensor, Tensor, Tensor]:
    import relattn.distributed as parallel

    whole_tensor = torch.arange(2.0 * length).view(2, length).requires_grad_()
    part = parallel.shard(whole_tensor, 1, group=group, layout=layout)
    again = parallel.unshard(part, 1, length, group=group, layout=layout)
    weight = 1.0 + dist.get_rank(group)
    (gradient,) = torch.autograd.grad((again * weight).sum(), part)
    flags = parallel.shard(torch.arange(length) % 3 == 0, 0, group=group, layout=layout)
    return again.detach(), gradient, parallel.unshard(flags, 0, length, group=group, layout=layout)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("length", [0, 3, 21, 40])
def test_unshard_undoes_shard(pool, layout: str, length: int) -> None:
    for again, gradient, flags in pool.values(3, _round_trip, layout, length):
        assert torch.equal(again, torch.arange(2.0 * length).view(2, length))
        assert torch.equal(flags, torch.arange(length) % 3 == 0)
        assert (gradient == 6.0).all()  # what the three ranks owe: 1 + 2 + 3


def _attend(group: Any, lengths: list[int], heads: int = 4, options: dict[str, Any] | None = None, rank_options: Any = None) -> None:
    import relattn.distributed as parallel

    rank = dist.get_rank(group)
    query = torch.zeros(1, heads, lengths[rank], 8)
    given = dict(options or {}) | (rank_options[rank] if rank_options else {})
    parallel.relative_attention(query, query, query, **dict(group=group) | given)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("query: expected the lengths of layout 'contiguous' of 11 tokens over 2 ranks: [8, 3], got [5, 6]", ([5, 6],)),
        ("layout 'zigzag' of 16 tokens over 2 ranks: [8, 8], got [12, 4]", ([12, 4], 4, dict(layout="zigzag"))),
        ("query_length: expected 16, the sum of the ranks' lengths, got 15", ([8, 8], 4, dict(query_length=15))),
        ("query: method='all_to_all' needs heads that 2 ranks divide, got 3", ([8, 8], 3, dict(method="all_to_all"))),
        ("method: expected one of 'ring', 'all_to_all', 'gather', got 'tree'", ([8, 8], 4, dict(method="tree"))),
        ("layout: expected one of 'contiguous', 'zigzag', got 'striped'", ([8, 8], 4, dict(layout="striped"))),
        ("table_gradients: expected one of 'sum', 'local', got 'mean'", ([8, 8], 4, dict(table_gradients="mean"))),
        ("backend: 'reference' does not compute blocks of a ring", ([8, 8], 4, dict(backend="reference"))),
        ("relattn.distributed: expected the same settings on every rank", ([8, 8], 4, None, [{}, dict(is_causal=True)])),
        ("relattn.distributed: expected the same settings on every rank", ([8, 8], 4, None, [{}, dict(rel_k=torch.zeros(3, 8))])),
        ("attn_mask: expected a shape broadcastable to (1, 4, 8, 16), got (8, 8)", ([8, 8], 4, dict(attn_mask=torch.ones(8, 8).bool()))),
        ("mesh: expected group or mesh, got both", ([8, 8], 4, dict(mesh=3))),
    ],
    ids=str,
)
def test_every_rank_says_what_is_wrong(pool, message: str, arguments: tuple) -> None:
    for result in pool.outcomes(2, _attend, *arguments):
        assert isinstance(result, Failure)
        assert result.kind == "ValueError"
        assert message in result.message


def test_without_a_process_group() -> None:
    import relattn.distributed as parallel

    query = torch.zeros(1, 2, 8, 8)
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised"):
        parallel.relative_attention(query, query, query)


def _second_derivative(group: Any, options: dict[str, Any]) -> None:
    import relattn.distributed as parallel

    query, rel_k = torch.randn(1, 2, 8, 8, requires_grad=True), torch.randn(7, 8, requires_grad=True)
    output = parallel.relative_attention(query, query, query, rel_k, group=group, **options)
    gradients = torch.autograd.grad(output.square().sum(), (query, rel_k), create_graph=True)
    (gradients[0].sum() + gradients[1].sum()).backward()


@pytest.mark.parametrize("options", [{}, *(dict(method=method, backend="reference") for method in ("gather", "all_to_all"))], ids=str)
def test_a_second_derivative_is_refused(pool, options: dict[str, Any]) -> None:
    """Also where the reference has one: it would lack what went through other ranks."""
    for result in pool.outcomes(1, _second_derivative, options):
        assert isinstance(result, Failure)
        assert "second derivative" in result.message or "once_differentiable" in result.message


def test_given_lengths_need_no_exchange(pool) -> None:
    for count in pool.values(2, _exchanges):
        assert count == 0


def _small_integers(group: Any, case: Case) -> Tensor:
    import relattn.distributed as parallel

    local = {name: parallel.shard(tensor, 2, group=group) for name, tensor in case.tensors().items()}
    lengths = torch.tensor(case.key_lengths, dtype=torch.uint8)
    return parallel.relative_attention(**local, key_lengths=lengths, group=group)  # type: ignore[return-value]


def test_lengths_in_small_integers(pool) -> None:
    """Less a later rank's first key they wrapped."""
    case = Case(queries=400, batch=2, heads=1, key_heads=1, terms=(), key_lengths=(250, 3))
    parts = pool.values(2, _small_integers, case)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole(case)["output"], rtol=0.0, atol=1e-12)


def test_a_rank_with_one_query_and_a_mask(pool) -> None:
    """Whether its mask is one row or the row of its query the other ranks know; with given lengths they waited for each other."""
    case = Case(queries=9, mask="rows")
    for method, layout in WAYS:
        results = pool.values(2, sharded, case, dict(method=method, layout=layout, query_length=9, key_length=9))
        wrong = error(case, joined(case, results, layout), whole(case), exact(case))
        assert not wrong, wrong


def _autocast(group: Any, case: Case, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sharded(group, case, options)
    return found["output"], sharded(group, replace(case, dtype=torch.bfloat16), options)["output"]


def test_autocast_casts(pool) -> None:
    case = Case(queries=20, terms=ALL, mask="float", dtype=torch.float32)
    for method, layout in WAYS:
        for cast, half in pool.values(2, _autocast, case, dict(method=method, layout=layout)):
            assert cast.dtype == torch.bfloat16
            assert torch.equal(cast, half)


def _exchanges(group: Any) -> int:
    import relattn.distributed as parallel

    query, calls = torch.zeros(1, 2, 8, 8), []
    parallel.relative_attention(query, query, query, group=group)
    original, dist.all_gather = dist.all_gather, lambda *given, **others: calls.append(given)
    try:
        parallel.relative_attention(query, query, query, group=group, query_length=16, key_length=16)
    finally:
        dist.all_gather = original
    return len(calls)


def test_import_relattn_does_not_import_it() -> None:
    code = "import sys, relattn; assert not any(name.startswith('relattn.distributed') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
