"""Context parallelism: one sequence over the ranks of a torch.distributed process group.

`import relattn` does not import it.
"""

from relattn.distributed.context import context_parallel
from relattn.distributed.function import relative_attention
from relattn.distributed.layout import shard, unshard

__all__ = ["context_parallel", "relative_attention", "shard", "unshard"]
