"""The Triton kernels, by name. Importing this imports triton."""

from triton.runtime.errors import OutOfResources

from . import backward, configs, decode, forward, operands, products, tables, tile

__all__ = ["KERNELS", "OutOfResources", "configs", "decode", "operands", "tile"]

KERNELS = {
    "forward": forward.forward_kernel,
    "decode": decode.decode_kernel,
    "combine": forward.combine_kernel,
    "prepare": backward.prepare_kernel,
    "query_gradient": backward.query_gradient_kernel,
    "key_gradient": backward.key_gradient_kernel,
    "table_gradient": tables.table_gradient_kernel,
    "product": products.product_kernel,
    "join": products.join_kernel,
    "matrix_sum": tables.matrix_sum_kernel,
    "table_sum": tables.table_sum_kernel,
}
