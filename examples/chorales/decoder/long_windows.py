"""Training on windows that are too long for one device: groups of processes share each window, by relattn.distributed.

Batches are dealt to all processes as always; a group puts its own together again, and each process computes some tokens of all of them.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from relattn.distributed import context_parallel, shard

from ..data.tokens import IGNORED
from ..trainer import ChoraleTrainer

LAYOUT = "zigzag"  # as attention is causal


class LongWindowsTrainer(ChoraleTrainer):
    """`ranks` processes, one after the other in number, share each window."""

    def __init__(self, *args, ranks: int, **kwargs):
        super().__init__(*args, **kwargs)
        numbers = torch.arange(self.args.world_size).view(-1, ranks).tolist()
        groups = [dist.new_group(group) for group in numbers]  # every process makes all of them
        self.group = groups[self.args.process_index // ranks]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        whole = {name: self._joined(tensor) for name, tensor in inputs.items()}
        whole["position_ids"] = (whole["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        part: dict[str, Any] = {name: shard(tensor, 1, group=self.group, layout=LAYOUT) for name, tensor in whole.items()}
        labels = part.pop("labels")
        with context_parallel(self.group, layout=LAYOUT):
            logits = model(**part).logits
        wanted = labels != IGNORED
        # Gradients are averaged over all processes: those of a group have a part of one mean each.
        total = (whole["labels"] != IGNORED).sum().clamp(min=1)
        loss = F.cross_entropy(logits[wanted], labels[wanted], reduction="sum") * (dist.get_world_size(self.group) / total)
        self.tokens_seen += part["attention_mask"].sum()
        return (loss, {"logits": logits}) if return_outputs else loss

    def _joined(self, tensor: torch.Tensor) -> torch.Tensor:
        """The group's batches as one."""
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.cat(parts)
