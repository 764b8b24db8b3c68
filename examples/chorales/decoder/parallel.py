"""Training what is too large for one device: groups of processes share each window, by relattn.distributed, and the heads of each layer.

Each process of a group computes some tokens of the group's batch, or some heads, or both.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import DistributedDataParallelKwargs
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from relattn.distributed import context_parallel, shard

from ..data.tokens import IGNORED
from ..trainer import ChoraleTrainer
from .heads import cut_of, joined, part, spread_heads
from .model import MusicTransformer

LAYOUT = "zigzag"  # as attention is causal


class _Replicas(DistributedDataParallelKwargs):
    """DistributedDataParallel among the processes that have the same parameters, not among all."""

    group: Any = None

    def to_kwargs(self) -> dict[str, Any]:
        return {"process_group": self.group}


class ParallelTrainer(ChoraleTrainer):
    """`context` x `tensor` processes, one after the other in number, share each batch: its tokens over `context`, heads over `tensor`."""

    def __init__(self, *args, context: int, tensor: int, **kwargs):
        super().__init__(*args, **kwargs)
        world = self.args.world_size
        sizes = (world // (context * tensor), context, tensor)
        mesh = init_device_mesh(self.args.device.type, sizes, mesh_dim_names=("dp_replicate", "cp", "tp"))
        self.accelerator.state.device_mesh = mesh  # it knows these names, and deals a group the same batch
        self.context, self.tensor = mesh["cp"], mesh["tp"]
        self.readers = world // tensor
        replicas = [list(range(first, world, tensor)) for first in range(tensor)]
        self.accelerator.ddp_handler = handler = _Replicas()
        handler.group, _ = dist.new_subgroups_by_enumeration(replicas)
        if tensor > 1:
            spread_heads(self._decoder, self.tensor)

    @property
    def _decoder(self) -> MusicTransformer:
        assert isinstance(self.model, MusicTransformer)
        return self.model

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        whole = inputs | {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}
        own: dict[str, Any] = {name: shard(tensor, 1, mesh=self.context, layout=LAYOUT) for name, tensor in whole.items()}
        labels = own.pop("labels")
        with context_parallel(self.context, layout=LAYOUT):
            logits = model(**own).logits
        wanted = labels != IGNORED
        # Gradients are averaged over all replicas: those of a group have a part of one mean each.
        total = (inputs["labels"] != IGNORED).sum().clamp(min=1)
        loss = F.cross_entropy(logits[wanted], labels[wanted], reduction="sum") * (self.context.size() / total)
        if self.tensor.get_local_rank() == 0:
            self.tokens_seen += own["attention_mask"].sum()
        return (loss, {"logits": logits}) if return_outputs else loss

    def whole_state(self) -> dict[str, torch.Tensor]:
        return {name: joined(name, tensor, self.tensor) for name, tensor in super().whole_state().items()}

    def _clip_grad_norm(self, model):
        """Of parameters that are cut each process has a share of the norm."""
        self.accelerator.unscale_gradients()
        gradients = [(name, parameter.grad) for name, parameter in self._decoder.named_parameters() if parameter.grad is not None]
        whole = [gradient for name, gradient in gradients if cut_of(name) is None]
        parts = [gradient for name, gradient in gradients if cut_of(name) is not None]
        of_whole, of_parts = (get_total_norm(some).square() for some in (whole, parts))
        dist.all_reduce(of_parts, group=self.tensor.get_group())
        total = (of_whole + of_parts).sqrt()
        clip_grads_with_norm_(self._decoder.parameters(), self.args.max_grad_norm, total)
        return total

    # Checkpoints are whole, as those of one process: any number of processes continues from them.

    def save_model(self, output_dir=None, _internal_call=False):
        state = self.whole_state()
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        names = {parameter: name for name, parameter in self._decoder.named_parameters()}
        self.optimized = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]  # in its order

        def take_parts(_, saved):
            return saved | {"state": self._each(part, saved["state"])}

        optimizer.register_load_state_dict_pre_hook(take_parts)
        return optimizer

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        assert self.optimizer is not None
        saved = self.optimizer.state_dict()
        saved["state"] = self._each(joined, saved["state"])
        if self.args.should_save:
            torch.save(saved, Path(output_dir) / "optimizer.pt")

    def _each(self, change, state: dict[int, dict]) -> dict[int, dict]:
        """`change`, `part` or `joined`, of all that an optimizer keeps of each parameter."""
        return {
            index: {what: change(self.optimized[index], tensor, self.tensor) for what, tensor in kept.items()}
            for index, kept in sorted(state.items())
        }
