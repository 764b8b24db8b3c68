"""The layer: `torch.nn.MultiheadAttention` with relative positions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relattn import backends, functional
from relattn.arguments import autocast_enabled, shape_text
from relattn.cache import KeyValueCache
from relattn.layer_checks import (
    beside,
    check_cache,
    check_mask,
    check_parameters,
    check_sizes,
    chosen,
    dtype_of_masks,
    first_seen,
    raised,
)
from relattn.varlen import relative_attention_varlen

_PARAMETERS = ("rel_k", "rel_q", "rel_v", "rel_bias", "pos_bias_u", "pos_bias_v")
_TABLE_STD = 0.02  # small beside the content's scores: tables that start at N(0, 1) drown them
_LONG = 1024  # queries from which on a materialised (L, S) matrix is worth a warning
_warned_of_weights = False


class RelativeMultiheadAttention(nn.MultiheadAttention):
    r"""`torch.nn.MultiheadAttention` whose scores also depend on the distance from query to key; exact.

    Constructor and call are those of `torch.nn.MultiheadAttention`, argument by argument, plus keyword arguments. Its
    state dicts load with only the relative parameters missing (``strict=False``), and with these at zero the results
    are the same. The mathematics is that of `relattn.relative_attention`, in O(L D) memory without weights. E is
    `embed_dim`, H `num_heads`, D = E / H, R = left + right + 1.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            `torch.nn.MultiheadAttention`.
        max_relative_position: k for (k, k), or (left, right): distances beyond clamp to the edge rows of the tables
            (Shaw et al. 2018). Independent of `is_causal`; a causal layer may use (left, 0).
        terms: which relative terms, any of "rel_k", "rel_q", "rel_v" (tables (R, D), normal with standard deviation
            0.02), "rel_bias" ((H, R), or (R,) where shared; zeros) and "pos_bias" (`pos_bias_u` and, beside "rel_k",
            `pos_bias_v`, each (H, D); zeros). The parameters have these names; absent ones are None.
        per_head: tables of their own for each head, (H, R, D), instead of shared ones.
        is_causal: queries never see keys ahead of them, whatever a call says.
        window: (left, right), only keys with -left <= key - query <= right are seen; None on a side = unbounded.
        chunk: (size, left_chunks), only keys of the query's own chunk of `size` positions and of so many before it are seen;
            None = of all before it.
        backend: as in `relattn.relative_attention`; used where weights are not asked for.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what was given and what is accepted.

    Where it differs from `torch.nn.MultiheadAttention`:

    - A query with nothing to attend to (all keys masked) gets weights 0 and an attention output of 0 before `out_proj`,
      not NaN.
    - ``is_causal=True`` (argument or default of the layer) means causal, also without `attn_mask` (torch raises or
      ignores it); given together with one, both apply. Where L and S differ it needs `query_offset`.
    - ``need_weights=True``, the default, materialises (N, H, L, S) by the reference backend, and warns once when
      L >= 1024.
    - Keys added by `add_bias_kv` and `add_zero_attn` have no position: always visible, no relative term, neither causal
      nor windowed (torch's `is_causal` hides them from all but the last query where it replaces the mask).
    - A float mask's entry at or below half of its dtype's lowest finite number hides the key, as -inf does.
    - Boolean and float masks mix freely; float32 masks may stand beside inputs of any precision, with and without
      weights (torch: without).
    - Errors are ValueError or TypeError, never AssertionError.
    - Nested tensors (both layouts) are accepted also in training, with `batch_first` and without masks; jagged ones are computed as they
      are, without padding, unless weights are asked for.
    - Packed sequences, (T, E) and `cu_seqlens`, are taken too; `key` and `value` may be left out.
    - The fused inference paths of torch, which read the weights and would leave out the relative terms, are never
      taken.
    - Opacus has no sampler for it and its validator, which asks for the exact class, does not say so: per-sample gradients
      are `torch.func.vmap`'s of `torch.func.grad`.
    - It cannot be compiled by `torch.jit.script`; `torch.compile`, `torch.export`, `torch.jit.trace` (a loaded trace needs
      ``import relattn``) and `torch.fx.symbolic_trace` (as a leaf) work; for ONNX and AOTInductor see `relattn.export`.
    - torch.ao's dynamic quantisation leaves it as it is, as it does torch's: `in_proj_weight` is no module, and `out_proj` is of a class
      that has to be named. torchao's `quantize_` takes both by their names (`FqnToConfig`).
    """

    rel_k: Tensor | None
    rel_q: Tensor | None
    rel_v: Tensor | None
    rel_bias: Tensor | None
    pos_bias_u: Tensor | None
    pos_bias_v: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_relative_position: int | tuple[int, int],
        terms: Sequence[str] = ("rel_k",),
        per_head: bool = False,
        is_causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
        chunk: tuple[int, int | None] | None = None,
        backend: str | None = None,
    ) -> None:
        check_sizes(embed_dim, num_heads, dropout, kdim, vdim, dtype)
        left, right = functional.clip_sides(max_relative_position)
        terms = chosen(terms)
        functional.window_sides(window, is_causal)
        functional.chunk_sides(chunk)
        if backend is not None and backend not in backends.BACKENDS:
            names = ", ".join(map(repr, backends.BACKENDS))
            raise ValueError(f"backend: expected None or one of {names}, got {backend!r}")
        super().__init__(embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype)
        self.max_relative_position = (left, right)
        self.terms = terms
        self.per_head = bool(per_head)
        self.is_causal = bool(is_causal)
        self.window = None if window is None else (window[0], window[1])
        self.chunk = None if chunk is None else (chunk[0], chunk[1])
        self.backend = backend
        rows = (num_heads, left + right + 1) if per_head else (left + right + 1,)
        shapes: dict[str, tuple[int, ...]]
        shapes = {name: (*rows, self.head_dim) for name in ("rel_k", "rel_q", "rel_v") if name in terms}
        if "rel_bias" in terms:
            shapes["rel_bias"] = rows
        if "pos_bias" in terms:
            shapes["pos_bias_u"] = (num_heads, self.head_dim)
        if "pos_bias" in terms and "rel_k" in terms:  # v stands in rel_k's product only
            shapes["pos_bias_v"] = (num_heads, self.head_dim)
        for name in _PARAMETERS:
            values = torch.empty(shapes[name], device=device, dtype=dtype) if name in shapes else None
            self.register_parameter(name, None if values is None else nn.Parameter(values))
        self._reset_relative_parameters()
        self.register_forward_pre_hook(_nothing)

    @classmethod
    def from_multihead_attention(
        cls, mha: nn.MultiheadAttention, *, max_relative_position: int | tuple[int, int], **options
    ) -> RelativeMultiheadAttention:
        """A layer with the settings and a copy of the weights of `mha`.

        `options` are the constructor's other keyword arguments (`terms`, `per_head`, ...).
        """
        if not isinstance(mha, nn.MultiheadAttention):
            raise TypeError(f"mha: expected a torch.nn.MultiheadAttention, got {type(mha).__name__}")
        layer = cls(
            mha.embed_dim,
            mha.num_heads,
            mha.dropout,
            bias=mha.in_proj_bias is not None,
            add_bias_kv=mha.bias_k is not None,
            add_zero_attn=mha.add_zero_attn,
            kdim=mha.kdim,
            vdim=mha.vdim,
            batch_first=mha.batch_first,
            device=mha.out_proj.weight.device,
            dtype=mha.out_proj.weight.dtype,
            max_relative_position=max_relative_position,
            **options,
        )
        layer.load_state_dict(mha.state_dict(), strict=False)
        for name, parameter in mha.named_parameters():
            layer.get_parameter(name).requires_grad_(parameter.requires_grad)
        return layer.train(mha.training)

    def _reset_parameters(self) -> None:
        super()._reset_parameters()
        self._reset_relative_parameters()

    def _reset_relative_parameters(self) -> None:
        for name in _PARAMETERS:
            parameter = getattr(self, name, None)  # absent while torch's constructor runs
            if parameter is not None and name in ("rel_k", "rel_q", "rel_v"):
                nn.init.normal_(parameter, std=_TABLE_STD)
            elif parameter is not None:
                nn.init.zeros_(parameter)

    def extra_repr(self) -> str:
        shown = f"{self.embed_dim}, {self.num_heads}, terms={self.terms}"
        shown += f", max_relative_position={self.max_relative_position}"
        defaults = dict(
            dropout=0.0,
            batch_first=False,
            add_zero_attn=False,
            per_head=False,
            is_causal=False,
            window=None,
            chunk=None,
            backend=None,
        )
        changed = (f", {name}={getattr(self, name)!r}" for name, default in defaults.items() if getattr(self, name) != default)
        return shown + "".join(changed)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cache: KeyValueCache | None = None,
        query_offset: int | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend. N is the batch, L and S the numbers of queries and keys.

        Args:
            query: (L, N, E), (N, L, E) with `batch_first`, or (L, E); of the parameters' dtype (or any but float64
                under autocast).
            key: (S, N, kdim), (N, S, kdim) or (S, kdim); None = `query`.
            value: (S, N, vdim), (N, S, vdim) or (S, vdim); None = `key`.
            key_padding_mask: (N, S), or (S,) for unbatched input. Boolean: True = ignore the key. Floating: added to
                the scores.
            need_weights: also return the weights. Give False wherever they are not used: they need O(L S) memory. (Beside
                `cu_seqlens` there are none.)
            attn_mask: (L, S) or (N * H, L, S). Boolean: True = may not attend. Floating: added to the scores.
            average_attn_weights: average the weights over the heads.
            is_causal: keys ahead of the query are not seen, also without `attn_mask`.
            cache: decode: `query`, `key` and `value` are the next positions (one or many), which are appended to the
                cache and attend to everything in it that the layer lets them. The layer or the call must be causal; or the
                layer has a `chunk`, of which a call then begins a new one. Masks cover all keys that are held, and the new.
            query_offset: position of query 0 relative to key 0, an int or an integer tensor (N,); needed where L != S
                and causal. With a cache it is the cache's length.
            cu_seqlens: packed sequences, one after the other: `query` is (T, E), sequence n its rows from cu_seqlens[n] to
                cu_seqlens[n + 1], int32 or int64 (N + 1,). No `attn_mask`, no cache; `key_padding_mask` is (S,). See
                `relattn.relative_attention_varlen`.
            cu_seqlens_k: the same of `key` and `value`, where they are not as long as `query`; None = `cu_seqlens`.
            max_seqlen: no sequence is longer; None = unknown.

        Returns:
            The output, shaped like `query`, and the weights (after dropout, as in torch) or None: (N, L, S), with
            ``average_attn_weights=False`` (N, H, L, S), for unbatched input without N. The columns of `add_bias_kv` and
            `add_zero_attn` come last, in this order.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it, what was given and what is accepted.
        """
        if isinstance(query, torch.fx.Proxy):  # a leaf of the graph, as torch's own layer is by its address
            call = dict(cache=cache, query_offset=query_offset)
            masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            path = query.tracer.path_of_module(self)
            return query.tracer.create_proxy("call_module", path, (query, key, value, *masks), call)  # type: ignore[return-value]
        key = query if key is None else key
        value = key if value is None else value
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        settings: dict[str, Any] = dict(
            need_weights=need_weights,
            average_attn_weights=average_attn_weights,
            is_causal=self.is_causal or bool(is_causal),
            query_offset=query_offset,
        )
        others = dict(attn_mask=attn_mask, cache=cache)
        packing = dict(cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, max_seqlen=max_seqlen)
        if query.is_nested or key.is_nested or value.is_nested:
            beside(others | packing | dict(key_padding_mask=key_padding_mask), "nested tensors")
            return self._forward_nested(query, key, value, **settings)
        if cu_seqlens is not None:
            beside(others, "cu_seqlens")
            settings |= dict(need_weights=False, packing=Packing(cu_seqlens, cu_seqlens_k, max_seqlen))
        elif cu_seqlens_k is not None or max_seqlen is not None:
            raise ValueError(f"{'max_seqlen' if cu_seqlens_k is None else 'cu_seqlens_k'}: expected cu_seqlens beside it, got None")
        return self._forward(query, key, value, key_padding_mask=key_padding_mask, **others, **settings)

    def _forward_nested(self, query: Tensor, key: Tensor, value: Tensor, **call) -> tuple[Tensor, Tensor | None]:
        """Jagged tensors as they are; strided ones, and where weights are asked for, padded, computed, and packed again as `query` was."""
        if not self.batch_first:
            raise ValueError("query: nested tensors need a layer with batch_first=True, got batch_first=False")
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if not tensor.is_nested or tensor.dim() != 3:
                raise ValueError(f"{name}: expected a nested tensor of 3 dimensions as the other inputs, got {tensor.dim()}-D")
            if tensor.layout == torch.jagged and tensor.lengths() is not None:  # type: ignore[attr-defined]
                raise ValueError(f"{name}: expected a contiguous jagged tensor, got one with gaps")
        jagged = query.layout == key.layout == value.layout == torch.jagged
        if value is not key and not (jagged and value.offsets() is key.offsets()):  # type: ignore[attr-defined]
            of_key, of_value = _nested_lengths(key), _nested_lengths(value)
            if not torch.equal(of_key, of_value):
                raise ValueError(f"value: expected the lengths {of_key.tolist()} of key, got {of_value.tolist()}")
        if jagged and not call["need_weights"]:
            return self._forward_jagged(query, key, value, **call), None
        lengths, key_lengths = _nested_lengths(query), _nested_lengths(key)
        padded = torch.nested.to_padded_tensor(query, 0.0)
        padded_key = padded if key is query else torch.nested.to_padded_tensor(key, 0.0)
        padded_value = padded_key if value is key else torch.nested.to_padded_tensor(value, 0.0)
        masks: dict[str, Any] = dict(key_padding_mask=None, attn_mask=None, cache=None, key_lengths=key_lengths)
        output, weights = self._forward(padded, padded_key, padded_value, **masks, **call)
        if query.layout == torch.jagged:
            # The same offsets tensor, not an equal one: it is what tells torch that two jagged tensors have the same
            # lengths.
            real = torch.arange(output.shape[1], device=output.device) < lengths[:, None]
            offsets = query.offsets()  # type: ignore[attr-defined]
            return torch.nested.nested_tensor_from_jagged(output[real], offsets), weights
        rows = [row[:length] for row, length in zip(output, lengths.tolist(), strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=torch.strided), weights

    def _forward_jagged(self, query: Any, key: Any, value: Any, **call) -> Tensor:
        if len(query.offsets()) != len(key.offsets()):
            raise ValueError(f"key: expected the batch size {query.shape[0]} of query, got {key.shape[0]}")
        packing = Packing(query.offsets(), None if key.offsets() is query.offsets() else key.offsets(), None)
        rows = query.values()
        key_rows = rows if key is query else key.values()
        value_rows = key_rows if value is key else value.values()
        masks = dict(key_padding_mask=None, attn_mask=None, cache=None)
        output, _ = self._forward(rows, key_rows, value_rows, **masks, **call, packing=packing)
        # The same offsets tensor, not an equal one: it is what tells torch that two jagged tensors have the same lengths.
        return torch.nested.nested_tensor_from_jagged(output, packing.cu_seqlens)

    def _forward(
        self, query, key, value, *, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal, cache,
        query_offset, key_lengths=None, packing=None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        self._check_inputs(query, key, value)
        batched = query.dim() == 3
        if batched and packing is not None:
            raise ValueError(f"query: expected (tokens, {self.embed_dim}) beside cu_seqlens, got shape {shape_text(query)}")
        batch, length, keys = 1, query.shape[0], key.shape[0]
        if batched:
            time = 1 if self.batch_first else 0
            batch, length, keys = query.shape[1 - time], query.shape[time], key.shape[time]
        if cache is not None:
            check_cache(cache, is_causal, query_offset, length, keys, self.window, self.chunk)
            functional.window_sides(self.window, is_causal)  # now, not after the cache has grown
            query_offset = cache.length
            keys = keys + query_offset
        mask, key_mask = self._masks(attn_mask, key_padding_mask, query, batch, length, keys)
        if need_weights and not torch.compiler.is_compiling() and length >= _LONG:
            _warn_of_weights(length, keys)

        q, k, v = self._project(query, key, value)
        if cache is not None:
            k, v = cache.append(k, v)
        masks = dict(attn_mask=mask, key_mask=key_mask, key_lengths=key_lengths, is_causal=is_causal, query_offset=query_offset)
        output, weights = self._attend(q, k, v, masks, need_weights, packing)
        if cache is not None and cache.sliding:
            first = first_seen(cache.seen, self.window, self.chunk)
            cache.forget(max(0, first - (cache.seen - cache.length)))

        if not batched:
            output = output[0].transpose(0, 1).flatten(1)
        elif self.batch_first:
            output = output.transpose(1, 2).flatten(2)
        else:
            output = output.permute(2, 0, 1, 3).flatten(2)
        if weights is not None:
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        return self.out_proj(output), weights

    def _part(self, name: str) -> Any:
        """A parameter as this process computes with it: whole, or, of a layer whose heads are on many devices, its heads' part."""
        return getattr(self, name)

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        # The layer's own: hooks that fill parameters late (accelerate's offloading) fill out_proj's when that is called.
        weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight
        check_parameters(self._parameters, self.out_proj._parameters, weight)
        for name, tensor, size in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if tensor.dim() != query.dim() or tensor.dim() not in (2, 3):
                raise ValueError(f"{name}: expected 3 dimensions in each input, or 2 (unbatched) in each, got shape {shape_text(tensor)}")
            if tensor.shape[-1] != size:
                raise ValueError(f"{name}: expected a last size of {size}, got shape {shape_text(tensor)}")
            if tensor.device != weight.device:
                raise ValueError(f"{name}: expected device {weight.device} as the parameters, got {tensor.device}")
            if tensor.dtype != weight.dtype:
                casts = autocast_enabled(weight.device.type)
                if not casts or not tensor.is_floating_point() or torch.float64 in (tensor.dtype, weight.dtype):
                    raise TypeError(f"{name}: expected {weight.dtype} as the parameters, got {tensor.dtype}")
        if key is not query and query.dim() == 3:
            batch_dim = 0 if self.batch_first else 1
            if key.shape[batch_dim] != query.shape[batch_dim]:
                raise ValueError(f"key: expected the batch size of query {shape_text(query)}, got {shape_text(key)}")
        if value is not key and value.shape[:-1] != key.shape[:-1]:
            raise ValueError(f"value: expected the length and batch size of key {shape_text(key)}, got {shape_text(value)}")

    def _masks(
        self,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        query: Tensor,
        batch: int,
        length: int,
        keys: int,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The function's `attn_mask` and `key_mask`: True = may attend."""
        if attn_mask is not None:
            check_mask("attn_mask", attn_mask, [(length, keys), (batch * self.num_heads, length, keys)], query)
        if key_padding_mask is not None:
            check_mask("key_padding_mask", key_padding_mask, [(batch, keys) if query.dim() == 3 else (keys,)], query)
        if attn_mask is None and key_padding_mask is None:
            return None, None
        dtype = dtype_of_masks(attn_mask, key_padding_mask, query)
        if attn_mask is not None:
            attn_mask = ~attn_mask if attn_mask.dtype == torch.bool else raised(attn_mask, dtype)
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.reshape(batch, self.num_heads, length, keys)
        if key_padding_mask is None:
            return attn_mask, None
        padding = key_padding_mask.reshape(batch, keys)
        if padding.dtype == torch.bool:
            return attn_mask, ~padding
        padding = raised(padding, dtype)[:, None, None, :]
        if attn_mask is None:
            return padding, None
        if attn_mask.dtype == torch.bool:
            return torch.where(attn_mask, padding, -torch.inf), None
        return attn_mask + padding, None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value projected, (N, H, L, D) each: views of the results of as few products as possible."""
        size, weight, bias = self.embed_dim, self._part("in_proj_weight"), self._part("in_proj_bias")
        if weight is not None and key is query and value is key:
            return self._heads(F.linear(query, weight, bias), 3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        if weight is None:
            weights = tuple(self._part(name) for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"))
        elif value is key:
            (q,) = self._heads(F.linear(query, weight[:size], biases[0]), 1)
            return q, *self._heads(F.linear(key, weight[size:], None if bias is None else bias[size:]), 2)
        else:
            weights = weight.chunk(3)
        return tuple(self._heads(F.linear(*of), 1)[0] for of in zip((query, key, value), weights, biases, strict=True))

    def _heads(self, projected: Tensor, count: int) -> tuple[Tensor, ...]:
        """Split the last size, `count` * H * D, into `count` tensors (N, H, L, D)."""
        heads = projected.shape[-1] // (count * self.head_dim)
        split = projected.view(*projected.shape[:-1], count, heads, self.head_dim)
        parts = split.unbind(-3)  # first this, then the transpositions: its gradient then joins the parts in one copy
        if projected.dim() == 2:
            return tuple(part.transpose(0, 1).unsqueeze(0) for part in parts)
        if self.batch_first:
            return tuple(part.transpose(1, 2) for part in parts)
        return tuple(part.permute(1, 2, 0, 3) for part in parts)

    def _attend(self, q, k, v, masks, need_weights, packing) -> tuple[Tensor, Tensor | None]:
        """Attention of the projected heads: (N, H, L, D), and the weights (N, H, L, S) if needed. `masks`: the function's arguments."""
        arguments: dict[str, Any] = dict(
            **{name: self._part(name) for name in _PARAMETERS},
            max_relative_position=None if self.terms in ((), ("pos_bias",)) else self.max_relative_position,
            window=self.window, chunk=self.chunk, dropout_p=self.dropout if self.training else 0.0, **masks,
        )  # fmt: skip
        weights = None
        if packing is not None:
            output, lse = _packed_attention(q, k, v, packing, arguments | dict(backend=self.backend))
        elif need_weights:
            output, lse, weights = functional.attention_with_weights(q, k, v, **arguments)
        else:
            output, lse = functional.relative_attention(q, k, v, **arguments, return_lse=True, backend=self.backend)
        if self.bias_k is not None or self.add_zero_attn:
            return self._with_extra_keys(q, output, lse, weights)
        return output, weights

    def _with_extra_keys(self, q: Tensor, output: Tensor, lse: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Merge in the keys of `add_bias_kv` and `add_zero_attn`, which have no position, by their share of the
        softmax's denominator.

        Where a query sees no other key lse is -inf: their share is then 1, and no gradient flows to lse.
        """
        scores = []
        if self.bias_k is not None:
            pos_bias_u = self._part("pos_bias_u")
            content = q if pos_bias_u is None else q + pos_bias_u.to(q.dtype)[:, None, :]
            bias_key = self._part("bias_k").view(-1, self.head_dim, 1).to(q.dtype)
            scores.append((content @ bias_key).to(lse.dtype) * self.head_dim**-0.5)
        if self.add_zero_attn:
            scores.append(torch.zeros_like(lse)[..., None])  # a key of zeros and a value of zeros
        extra = torch.cat(scores, dim=-1)
        total = torch.logaddexp(lse, extra.logsumexp(-1))[..., None]
        share = (lse[..., None] - total).exp()
        extra_weights = F.dropout((extra - total).exp(), self.dropout, self.training)
        merged = output * share
        if self.bias_v is not None:
            merged = merged + extra_weights[..., :1] * self._part("bias_v").view(-1, 1, self.head_dim)
        if weights is not None:
            weights = torch.cat((weights * share, extra_weights), dim=-1).to(weights.dtype)
        return merged.to(output.dtype), weights


class Packing(NamedTuple):
    """Where packed sequences begin and end."""

    cu_seqlens: Tensor
    cu_seqlens_k: Tensor | None
    max_seqlen: int | None


def _packed_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Output (1, H, T, D) and log-sum-exp (1, H, T) of packed heads of that shape."""
    if arguments.pop("attn_mask") is not None:
        raise ValueError("key_padding_mask: expected a boolean one beside cu_seqlens, got one that is added")
    key_mask, (ends, key_ends, longest) = arguments.pop("key_mask"), packing
    output, lse = relative_attention_varlen(
        *(heads[0].transpose(0, 1) for heads in (q, k, v)), cu_seqlens_q=ends, cu_seqlens_k=key_ends, max_seqlen_q=longest,
        key_mask=None if key_mask is None else key_mask[0], return_lse=True, **arguments,
    )  # fmt: skip
    return output.transpose(0, 1)[None], lse[None]


def _nothing(module: nn.Module, inputs: tuple) -> None:
    """A hook for its presence: where a module has one nn.TransformerEncoderLayer leaves its fused inference path, which reads the weights,
    knows no relative terms and never calls the layer. (`_qkv_same_embed_dim`, its other condition, tells others where the weights lie.)
    """


def _nested_lengths(tensor: Tensor) -> Tensor:
    if tensor.layout == torch.jagged:
        return tensor.offsets().diff()  # type: ignore[attr-defined]
    return tensor._nested_tensor_size()[:, 0].to(tensor.device)


def _warn_of_weights(length: int, keys: int) -> None:
    global _warned_of_weights
    if not _warned_of_weights:
        _warned_of_weights = True
        warnings.warn(
            f"need_weights=True, the default of nn.MultiheadAttention, materialises {length} x {keys} weights for "
            "each head; give need_weights=False unless they are used",
            stacklevel=7,  # past _forward, forward and the three frames of a call of an nn.Module with a hook
        )
