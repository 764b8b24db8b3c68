"""Attention over many devices, on torch.distributed."""

from relattn.distributed.tensor_parallel import HeadsParallel, tensor_parallel_plan

__all__ = ["HeadsParallel", "tensor_parallel_plan"]
