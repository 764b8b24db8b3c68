"""Training under DDP and FSDP2: losses and gradients of one process, checkpoints for other numbers of ranks, a rank that dies."""

from __future__ import annotations

import copy
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import relattn
from tests.distributed.processes import Processes

pytest.importorskip("torch.distributed.tensor")
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from relattn.distributed import tensor_parallel_plan

pytestmark = pytest.mark.xdist_group("sharded_training")  # whose processes they share

BATCH, LENGTH, SIZE, HEADS = 6, 7, 24, 6  # 2 and 3 ranks divide batch and heads; nothing divides the tables' 5 rows
SAVED_AFTER, STEPS = 2, 4


class Block(nn.Module):
    def __init__(self, per_head: bool, recomputed: bool) -> None:
        super().__init__()
        terms = ("rel_k", "rel_q", "rel_v", "rel_bias", "pos_bias")
        self.attention = relattn.RelativeMultiheadAttention(
            SIZE, HEADS, batch_first=True, max_relative_position=2, terms=terms, per_head=per_head, is_causal=True
        )
        self.linear = nn.Linear(SIZE, SIZE)
        self.recomputed = recomputed

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._forward, x, use_reentrant=False) if self.recomputed else self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, need_weights=False)[0]
        return x + self.linear(x).tanh()


def _model(dtype: torch.dtype = torch.float64, recomputed: bool = False, seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(Block(False, recomputed), Block(True, recomputed)).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def _batch(step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(BATCH, LENGTH, SIZE, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).double().square().mean()


def _here(batch: Tensor) -> Tensor:
    """This rank's part of the batch."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def _mean(loss: Tensor) -> float:
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


# ---- losses and gradients ----


def _one_step(how: str) -> tuple[float, dict[str, Tensor]]:
    """The loss, and gradients of the whole parameters, of this rank's part of the batch under `how`."""
    dtype = torch.float32 if "bf16" in how else torch.float64
    model: Any = _model(dtype, recomputed="recomputed" in how)
    if "compiled" in how:
        model[1].compile(backend="aot_eager")  # one tells as much as all
    if "ddp" in how:
        wrapped = DistributedDataParallel(model)
    else:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if "bf16" in how else MixedPrecisionPolicy()
        for block in model:
            fully_shard(block, mp_policy=policy)
        wrapped = fully_shard(model, mp_policy=policy)
    loss = _loss(wrapped, _here(_batch(0, dtype)))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return _mean(loss), {name: getattr(of, "full_tensor", lambda of=of: of)() for name, of in gradients.items()}


def _one_step_alone(bf16: bool) -> tuple[float, dict[str, Tensor]]:
    model = _model(torch.float32 if bf16 else torch.float64)
    if not bf16:
        loss = _loss(model, _batch(0))
        loss.backward()
        return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}
    copies = [copy.deepcopy(model).bfloat16() for _ in range(2)]  # one for each rank, whose gradients are averaged in float32
    losses = [_loss(one, part) for one, part in zip(copies, _batch(0, torch.bfloat16).chunk(2), strict=True)]
    sum(losses).backward()
    pairs = zip(*(one.named_parameters() for one in copies), strict=True)
    return sum(losses).item() / 2, {name: (one.grad.float() + other.grad.float()) / 2 for (name, one), (_, other) in pairs}


@pytest.fixture(scope="module")
def processes():
    with Processes(2) as started:
        yield started


@pytest.mark.parametrize(
    "how",
    ["ddp", "ddp recomputed", "fsdp", "fsdp compiled", "fsdp recomputed", "fsdp bf16", "fsdp bf16 recomputed"],
)  # fmt: skip
def test_gradients_are_those_of_one_process(processes, how):
    loss, gradients = _one_step_alone("bf16" in how)
    for found_loss, found in processes.run(_one_step, how):
        assert found_loss == pytest.approx(loss, rel=1e-6 if "bf16" in how else 1e-12)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


# ---- checkpoints ----


def _sharded(model: nn.Sequential, how: str) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if how == "heads":
        return parallelize_module(model, mesh, tensor_parallel_plan(model))
    for block in model:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, part) -> list[Tensor]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = _loss(model, part(_batch(step)))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def _train(folder: Path, how: str, first: int, last: int, dying: int | None = None, by: signal.Signals = signal.SIGKILL) -> list[float]:
    """Losses of steps `first` to `last`, from the folder's checkpoint (unless at the beginning) to a new one. Rank `dying` does so then."""
    model = _sharded(_model(seed=1 if first == 0 else 2), how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    part = _here if how == "fsdp" else lambda batch: batch

    def states() -> dict[str, Any]:
        of_model, of_optimizer = get_state_dict(model, optimizer)
        return {"model": of_model, "optimizer": of_optimizer}

    if first > 0:
        loaded = states()
        dcp.load(loaded, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    losses = _steps(model, optimizer, range(first, last), part)
    dcp.save(states(), checkpoint_id=folder)
    if dying is not None:
        if dist.get_rank() == dying:
            os.kill(os.getpid(), by)
        _steps(model, optimizer, range(last, last + 1), part)
    return [_mean(loss) for loss in losses]


@pytest.fixture(scope="module")
def losses() -> list[float]:
    """Of one process that nothing interrupts."""
    model = _model()
    return [loss.item() for loss in _steps(model, torch.optim.AdamW(model.parameters(), lr=0.01), range(STEPS), lambda batch: batch)]


@pytest.mark.parametrize("how", ["fsdp", "heads"])
def test_saved_on_two_ranks_resumed_on_three_and_one(processes, losses, how, tmp_path):
    for found in processes.run(_train, tmp_path / "saved", how, 0, SAVED_AFTER):
        assert found == pytest.approx(losses[:SAVED_AFTER], rel=1e-9)
    for ranks in (3, 1):
        folder = shutil.copytree(tmp_path / "saved", tmp_path / str(ranks))
        with Processes(ranks) as others:
            for found in others.run(_train, folder, how, SAVED_AFTER, STEPS):
                assert found == pytest.approx(losses[SAVED_AFTER:], rel=1e-9)


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_dies(processes, losses, by, tmp_path):
    """The others end with an error that says it: at once where the connection ends, else after the time-out. The run resumes."""
    message = r"Connection closed by peer|Connection reset by peer|[Tt]imed out"
    with Processes(3, wait=3) as three:
        three.start(_train, tmp_path, "fsdp", 0, SAVED_AFTER, 1, by)
        for rank in (0, 2):
            with pytest.raises(RuntimeError) as raised:
                three.answer(rank)
            assert re.search(message, str(raised.value)), raised.value
        three.processes[1].kill()
        with pytest.raises(RuntimeError, match="process 1 is gone"):
            three.answer(1)
    for found in processes.run(_train, tmp_path, "fsdp", SAVED_AFTER, STEPS):
        assert found == pytest.approx(losses[SAVED_AFTER:], rel=1e-9)
