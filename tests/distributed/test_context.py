"""`context_parallel`: layers and models that know nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import relattn
from relattn import sharding
from tests.distributed.processes import Failure

pytestmark = pytest.mark.xdist_group("distributed")

LENGTH = 30


class Model(nn.Module):
    """Two layers, of which one can be checkpointed."""

    def __init__(self, checkpointed: bool, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        options: dict[str, Any] = dict(batch_first=True, dropout=dropout, is_causal=True, terms=("rel_k", "rel_bias"), dtype=torch.float64)
        self.layers = nn.ModuleList(relattn.RelativeMultiheadAttention(16, 4, max_relative_position=(9, 0), **options) for _ in range(2))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:

            def attend(x: Tensor, layer: nn.Module = layer) -> Tensor:
                return layer(x, x, x, need_weights=False)[0]

            x = x + (checkpoint(attend, x, use_reentrant=False) if self.checkpointed else attend(x))
        return x


def _inputs() -> Tensor:
    return torch.randn(2, LENGTH, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def trained(group: Any, options: dict[str, Any], checkpointed: bool, dropout: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and all gradients, summed over ranks; without a group of one process."""
    model, inputs = Model(checkpointed, dropout), _inputs()
    torch.manual_seed(5)
    if group is None:
        loss = model(inputs).square().sum()
        loss.backward()
    else:
        import relattn.distributed as parallel

        with parallel.context_parallel(group, **options):
            loss = model(parallel.shard(inputs, 1, group=group, layout=options.get("layout", "contiguous"))).square().sum()
            loss.backward()
        assert not sharding.active
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    if group is not None:
        loss = loss.detach()
        dist.all_reduce(loss, group=group)
        for name, gradient in gradients.items():
            if options.get("table_gradients") != "sum" or "rel_" not in name:
                dist.all_reduce(gradient, group=group)
    return loss.detach(), gradients


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    "options",
    [dict(), dict(layout="zigzag", table_gradients="sum"), dict(method="all_to_all"), dict(method="gather", layout="zigzag")],
    ids=str,
)
def test_layers_train_as_on_one_process(pool, options: dict[str, Any], checkpointed: bool) -> None:
    """With dropout too, whose masks a checkpointed layer sees again."""
    loss, gradients = trained(None, {}, False, 0.25)
    for found, others in pool.values(2, trained, options, checkpointed, 0.25):
        torch.testing.assert_close(found, loss, rtol=1e-12, atol=0.0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=0.0, atol=1e-11 * float(gradient.abs().max()))


def _bert(group: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of a model of transformers, trained with padding and dropout; without a group of one process."""
    from transformers import BertConfig, BertModel

    import relattn.distributed as parallel
    from relattn.huggingface import add_relative_positions

    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    config = BertConfig(**sizes, max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.2)
    model = add_relative_positions(BertModel(config), max_relative_position=9, terms=("rel_k", "rel_bias")).double().train()
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, -7:] = 0
    ids = torch.randint(0, 50, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=torch.arange(LENGTH).expand(2, -1))
    torch.manual_seed(4)
    if group is None:
        output = model(**inputs).last_hidden_state * mask[..., None]
        output.square().sum().backward()
    else:
        inputs = {name: parallel.shard(tensor, 1, group=group, layout="zigzag") for name, tensor in inputs.items()}
        with parallel.context_parallel(group, layout="zigzag"):
            output = model(**inputs).last_hidden_state * inputs["attention_mask"][..., None]
            output.square().sum().backward()
        output = parallel.unshard(output, 1, LENGTH, group=group, layout="zigzag")
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return output.detach(), gradients


def test_a_model_of_transformers_runs_as_it_is(pool) -> None:
    output, gradients = _bert(None)
    results = pool.values(2, _bert)
    for found, _ in results:
        torch.testing.assert_close(found, output, rtol=0.0, atol=1e-12)
    for name, gradient in gradients.items():
        total = sum(found[name] for _, found in results)
        torch.testing.assert_close(total, gradient, rtol=0.0, atol=1e-11)


def _under_ddp(group: Any) -> dict[str, Tensor]:
    import relattn.distributed as parallel

    model = nn.parallel.DistributedDataParallel(Model(False, 0.0), process_group=group)
    with parallel.context_parallel(group):
        model(parallel.shard(_inputs()[:, :24], 1, group=group)).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.module.named_parameters()}


def test_ddp_over_the_same_ranks_takes_local_gradients(pool) -> None:
    """The mean of the ranks' means: what DDP averages, tables' gradients among them."""
    model = Model(False, 0.0)
    model(_inputs()[:, :24]).square().mean().backward()
    for found in pool.values(2, _under_ddp):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=0.0, atol=1e-12)


def _compiled(group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A compiled layer before, within and after."""
    import relattn.distributed as parallel

    torch.manual_seed(1)
    layer = relattn.RelativeMultiheadAttention(16, 4, max_relative_position=9, batch_first=True, dtype=torch.float64)
    attend = torch.compile(lambda x: layer(x, x, x, need_weights=False)[0], backend="eager")
    x = parallel.shard(_inputs(), 1, group=group)
    before = attend(x)
    with parallel.context_parallel(group):
        within = attend(x)
    return before.detach(), within.detach(), attend(x).detach()


def test_a_compiled_layer_notices(pool) -> None:
    torch.manual_seed(1)
    layer = relattn.RelativeMultiheadAttention(16, 4, max_relative_position=9, batch_first=True, dtype=torch.float64)
    x = _inputs()
    right = layer(x, x, x, need_weights=False)[0]
    parts = pool.values(2, _compiled)
    torch.testing.assert_close(torch.cat([within for _, within, _ in parts], 1), right, rtol=0.0, atol=1e-12)
    for before, within, after in parts:
        assert torch.equal(before, after)
        assert not torch.allclose(before, within)


def _within(group: Any, call: Callable[[], Any]) -> Any:
    import relattn.distributed as parallel

    with parallel.context_parallel(group):
        return call()


def _weights() -> None:
    x = torch.zeros(4, 1, 16)
    relattn.RelativeMultiheadAttention(16, 4, max_relative_position=3)(x, x, x)


def _packed() -> None:
    x = torch.zeros(8, 2, 4)
    relattn.relative_attention_varlen(x, x, x, cu_seqlens_q=torch.tensor([0, 8]))


def _short_table(**arguments: Any) -> None:
    x = torch.zeros(1, 2, 8, 4)
    relattn.relative_attention(x, x, x, torch.zeros(15, 4), **arguments)


def _clipped_table() -> None:
    _short_table(max_relative_position=7)
    _short_table(window=(7, 7))  # the rows reach all that is seen


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (_weights, "weights (need_weights, output_attentions) are not supported under relattn.distributed.context_parallel"),
        (_packed, "packed sequences (cu_seqlens) are not supported under relattn.distributed.context_parallel"),
        (_short_table, "rel_k: its rows reach the distances -7 ... 7, and under context_parallel the whole sequences have -15 ... 15"),
    ],
)
def test_what_would_see_one_shard_only_is_refused(pool, call: Callable[[], Any], message: str) -> None:
    for result in pool.outcomes(2, _within, call):
        assert isinstance(result, Failure)
        assert message in result.message


def test_a_table_that_is_clipped_or_reaches_all_that_is_seen_goes(pool) -> None:
    pool.values(2, _within, _clipped_table)
    pool.values(2, _within_mesh)


def _within_mesh(group: Any) -> None:
    """A mesh in place of a group."""
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh.from_group(group, "cpu")
    _within(mesh, _clipped_table)
