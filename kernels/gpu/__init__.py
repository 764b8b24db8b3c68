"""The Triton kernels, by name. Importing this imports triton."""

from typing import Any

from triton import next_power_of_2
from triton.compiler import CompiledKernel
from triton.runtime.errors import OutOfResources

from . import backward, configs, forward, operands, products, tables, tile

__all__ = ["CompiledKernel", "OutOfResources", "configs", "kernel", "next_power_of_2", "operands", "tile"]

KERNELS = {
    "forward": forward.forward_kernel,
    "combine": forward.combine_kernel,
    "prepare": backward.prepare_kernel,
    "query_gradient": backward.query_gradient_kernel,
    "key_gradient": backward.key_gradient_kernel,
    "table_gradient": tables.table_gradient_kernel,
    "key_product": products.key_product_kernel,
    "join": products.join_kernel,
    "query_product": products.query_product_kernel,
    "table_product": products.table_product_kernel,
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def kernel(name: str) -> tuple[Any, tuple[str, ...]]:
    """A kernel, and the names of what it is launched with."""
    return KERNELS[name], (*KERNELS[name].arg_names, *_OPTIONS)
