"""Many devices, on torch.distributed: one sequence over the ranks of a process group, or heads over the devices of a mesh.

`import relattn` does not import it.
"""

from relattn.distributed.context import context_parallel
from relattn.distributed.convolution import halo
from relattn.distributed.function import relative_attention, relative_attention_varlen
from relattn.distributed.layout import shard, unshard
from relattn.distributed.tensor_parallel import HeadsParallel, tensor_parallel_plan
from relattn.sharding import heads_from

__all__ = [
    "HeadsParallel", "context_parallel", "halo", "heads_from", "relative_attention", "relative_attention_varlen", "shard",
    "tensor_parallel_plan", "unshard",
]  # fmt: skip
