"""Layers and converted models on sharded sequences, without edits."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from relattn import sharding
from relattn.distributed import convolution
from relattn.distributed.collectives import group_of
from relattn.distributed.function import Sharding, attend


@contextlib.contextmanager
def context_parallel(
    group_or_mesh: Any = None, *, method: str = "ring", layout: str = "contiguous", table_gradients: str = "local",
    convolutions_of: nn.Module | None = None,
) -> Iterator[None]:
    """Within it, `relattn.relative_attention` is `relattn.distributed.relative_attention`, whoever calls it: layers
    (`RelativeMultiheadAttention`) and converted models run on sharded sequences as they are. It holds for the whole process, all threads::

        inputs, targets = (shard(tensor, 1, layout="zigzag") for tensor in (inputs, targets))
        with context_parallel(mesh, layout="zigzag"):
            loss = criterion(model(inputs), targets)
            loss.backward()

    Inputs are this rank's tokens; what else depends on their places (position embeddings, shifted targets) is made whole and sharded too.
    Only attention reaches across ranks, and the convolutions over time of the model that is named; what else mixes tokens (norms or pooling
    over the sequence, batch norm in training) sees its own part there. Keep the backward pass inside where layers are checkpointed: they
    are computed again.

    Args:
        group_or_mesh: a process group, a DeviceMesh of one dimension, or None = the default group.
        method, layout: as in `relative_attention`.
        table_gradients: "local" (unlike there the default), for models whose gradients DDP, FSDP or the caller's own all-reduce joins over
            these ranks, tables as all other parameters; "sum" where nothing else does.
        convolutions_of: a model whose nn.Conv1d of more than one frame read across the borders too (see `halo`): a conformer's encoder.
            They must keep the number of frames, and the layout be "contiguous".

    Raises:
        ValueError: an unknown name, or a convolution that changes the number of frames. Within it: weights that are asked for
            (need_weights, output_attentions), and packed sequences; and a table without max_relative_position whose rows do not reach
            all distances of the whole sequences, as where a model makes it for the length that it sees (a shard's; converted DeBERTa and
            XLNet, which do, are refused too). A model that makes such a
            table and says that it is clipped there cannot be told from one that means it: make its tables for the whole length. A mask
            that a model makes for its local length, l x l, is refused for its shape; `is_causal`, `window` and key padding masks go.
    """
    is_mesh = hasattr(group_or_mesh, "get_group")
    group = group_of(None if is_mesh else group_or_mesh, group_or_mesh if is_mesh else None)
    how = Sharding(group, method, layout, table_gradients)
    how.check()

    def attend_sharded(
        query: Tensor, key: Tensor, value: Tensor, rel_k: Tensor | None, *, attn_mask: Tensor | None, query_offset: Any, return_lse: bool,
        backend: str | None, **others: Any,
    ) -> Any:  # fmt: skip
        given = dict(rel_k=rel_k, **others)
        return attend(how, query, key, value, given, attn_mask, query_offset, (None, None), return_lse, backend, must_cover=True)

    call = attend_sharded
    if "torch._dynamo" in sys.modules:  # somebody compiles; what communicates is not traced
        call = torch.compiler.disable(attend_sharded)
    found = [] if convolutions_of is None else list(convolution.convolutions(convolutions_of))
    if found and layout != "contiguous":
        raise ValueError(f"layout: convolutions need 'contiguous', got {layout!r}")
    before = sharding.use(call)
    try:
        for module, left, right, is_padded in found:
            vars(module)["forward"] = convolution.with_neighbours(module, left, right, is_padded, group)
        yield
    finally:
        for module, *_ in found:
            vars(module).pop("forward", None)
        sharding.use(before)
