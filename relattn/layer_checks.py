"""What the layer's constructor and call accept.

Each check raises ValueError or TypeError and names the argument, what was given and what is accepted.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from relattn.arguments import autocast_enabled, shape_text
from relattn.cache import KeyValueCache

TERMS = ("rel_k", "rel_q", "rel_v", "rel_bias", "pos_bias")
Window = tuple[int | None, int | None] | None  # the layer's `window`, or its `chunk`


def check_sizes(embed_dim, num_heads, dropout, kdim, vdim, dtype) -> None:
    for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads)):
        if not isinstance(size, int):
            raise TypeError(f"{name}: expected an int, got {type(size).__name__}")
        if size <= 0:
            raise ValueError(f"{name}: expected a number of at least 1, got {size}")
    if embed_dim % num_heads:
        raise ValueError(f"embed_dim: expected a multiple of num_heads = {num_heads}, got {embed_dim}")
    for name, size in (("kdim", kdim), ("vdim", vdim)):
        if size is not None and not isinstance(size, int):
            raise TypeError(f"{name}: expected None or an int, got {type(size).__name__}")
        if size is not None and size < 0:
            raise ValueError(f"{name}: expected a number of at least 0, got {size}")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1], got {dropout}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")


def chosen(terms) -> tuple[str, ...]:
    accepted = f"any of {', '.join(map(repr, TERMS))}"
    if isinstance(terms, str) or not isinstance(terms, Sequence):
        raise TypeError(f"terms: expected a tuple of {accepted}, got {terms!r}")
    for term in terms:
        if term not in TERMS:
            raise ValueError(f"terms: expected {accepted}, got {term!r}")
    return tuple(dict.fromkeys(terms))


def check_parameters(own: Mapping[str, Tensor | None], of_out_proj: Mapping[str, Tensor | None], weight: Tensor) -> None:
    """That what stands in one product has one dtype. What a module in the place of `out_proj` makes of its weights is its own affair."""
    given = [(name, own.get(name)) for name in ("in_proj_bias", "k_proj_weight", "v_proj_weight")]
    given += [(f"out_proj.{name}", of_out_proj.get(name)) for name in ("weight", "bias")]
    for name, parameter in given:
        if parameter is None or parameter.dtype == weight.dtype or not parameter.is_floating_point():
            continue
        if not autocast_enabled(weight.device.type) or torch.float64 in (parameter.dtype, weight.dtype):
            raise TypeError(f"{name}: expected {weight.dtype} as the projection of the query, got {parameter.dtype}")


def check_mask(name: str, mask, shapes: list[tuple[int, ...]], query: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(mask).__name__}")
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{name}: expected {' or '.join(map(str, shapes))}, got {shape_text(mask)}")
    if mask.device != query.device:
        raise ValueError(f"{name}: expected device {query.device} as query, got {mask.device}")


def dtype_of_masks(attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor) -> torch.dtype:
    """What float masks are to be added in.

    As in torch, a boolean mask counts as one of the query's dtype, and the dtype of the sum decides: it must be the
    query's or float32. So a mask of lower precision is taken beside another that brings the sum there, not alone.
    """
    masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
    dtypes = {name: mask.dtype for name, mask in masks.items() if mask is not None}
    added = functools.reduce(torch.promote_types, (query.dtype if of == torch.bool else of for of in dtypes.values()))
    casts = autocast_enabled(query.device.type) and query.dtype != torch.float64
    accepted = list(dict.fromkeys((torch.bool, query.dtype, torch.float32)))
    for name, of in dtypes.items():
        allowed = of.is_floating_point and (casts or added in accepted)
        if of != torch.bool and not allowed:
            beside = "".join(f" beside {other} of {dtypes[other]}" for other in dtypes if other != name)
            raise TypeError(f"{name}: expected {' or '.join(map(str, accepted))}, got {of}{beside}")
    return torch.promote_types(added, query.dtype) if query.dtype == torch.float64 else added


def raised(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A float mask in `dtype`, of at least its precision. What its lowest numbers hide stays hidden: there they may be small."""
    if mask.dtype == dtype:
        return mask
    return mask.to(dtype).masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf)


def beside(arguments: Mapping[str, object], what: str) -> None:
    """That none of these is given together with `what`."""
    for name, argument in arguments.items():
        if argument is not None:
            raise ValueError(f"{name}: expected None beside {what}, got {type(argument).__name__}")


def check_cache(cache, is_causal: bool, query_offset, length: int, keys: int, window: Window, chunk: Window) -> None:
    if not isinstance(cache, KeyValueCache):
        raise TypeError(f"cache: expected a relattn.KeyValueCache, got {type(cache).__name__}")
    if not is_causal and chunk is None:
        raise ValueError("cache: expected a causal layer or call (is_causal=True), or a layer with chunks, got neither")
    if not is_causal and chunk is not None and chunk[0] is not None and cache.seen % chunk[0]:
        raise ValueError(
            f"cache: expected whole chunks of {chunk[0]} positions, which see one another, got {cache.seen} positions before this call"
        )
    if query_offset is not None:
        raise ValueError(f"query_offset: expected None beside a cache, whose length it is, got {query_offset!r}")
    if length != keys:
        raise ValueError(f"key: expected the {length} positions of query beside a cache, got {keys}")
    if cache.sliding and (window is None or window[0] is None) and (chunk is None or chunk[1] is None):
        raise ValueError(
            f"cache: a sliding one needs a layer that bounds what is seen to the left, got window={window!r} and chunk={chunk!r}"
        )


def first_seen(position: int, window: Window, chunk: Window) -> int:
    """The first key that queries from `position` on may see; of chunks the first one of its chunk, so that chunks begin at key 0 still."""
    first = 0 if window is None or window[0] is None else position - window[0]
    if chunk is not None and chunk[0] is not None:
        if chunk[1] is not None:
            first = max(first, (position // chunk[0] - chunk[1]) * chunk[0])
        first = first // chunk[0] * chunk[0]
    return max(0, first)
