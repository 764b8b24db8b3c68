"""Relative attention a strip of queries at a time, in plain PyTorch: any device, no compiler, O(strip x L) extra memory.

A strip is a block of queries of a group of heads against all the keys they may see. Its scores never leave the strip: the forward pass
keeps only the output and its log-sum-exp, the backward pass computes the strip again (Dao et al. 2022, FlashAttention's recomputation).

Inside a group the heads come before the batch where tables differ by head, so that theirs is one batched product over heads; else the
inputs' own order stays and contiguous ones are not copied. Shapes below say (P, Q, ...) for (H, B, ...) or (B, H, ...).

What a query may not see makes no difference, whatever it holds, nor does a query whose output nobody asked for. But 0 * NaN is NaN, so a
careful pass keeps the one from the other (`only_seen`). On a CPU it follows only where the plain pass's results are not finite: what is
hidden cannot change them in another way. Elsewhere looking at a result would synchronise, and all passes are careful.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from relattn.arguments import (
    DIFFERENTIABLE,
    Settings,
    Tensors,
    empty_gradient,
    empty_with_layout,
    hidden_from,
    lse_dtype,
)
from relattn.backends.sequences import Sequence, sequences
from relattn.backends.strip import (
    Strip,
    clear_gaps,
    finite,
    fold_edges,
    masked,
    merge,
    only_seen,
    skewed,
    skewed_keys,
    table_columns,
    times_table,
)
from relattn.philox import dropout_keep

# Scores of a strip. On a CPU a strip and its gradient should stay in the caches; elsewhere launches should be large.
_STRIP_SCORES_CPU = 2**20
_STRIP_SCORES = 2**25
_STRIP_ROWS = 128  # queries of a strip
_COPIED = 2**12  # scores of a strip of one head up to which copying them costs less than torch's loop over the heads
_TORCH_KERNEL = 2**14  # ... and up to which torch's fused attention is the faster forward pass
# Scores are kept in units of ln 2, so that weights are powers of two: torch's exp is up to 60 times slower where the result underflows
# (MKL's vector exp), as it does for hidden keys, and its exp2 is not.
_LOG2_E = 1.0 / math.log(2.0)
_KEY_CHUNK = 64  # keys of a tile of the rel_q term

# The fused kernel under torch's scaled_dot_product_attention on CPUs, which alone also returns the log-sum-exp.
_torch_attention: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def forward(tensors: Tensors, settings: Settings, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, Lq, Dv) and log-sum-exp (B, Hq, Lq)."""
    batch, heads, length, _ = tensors.query.shape
    output = empty_with_layout(tensors.query, (batch, heads, length, tensors.value.shape[3]), settings.output_dtype(tensors.query.dtype))
    lse = tensors.query.new_empty((batch, heads, length), dtype=lse_dtype(tensors.query.dtype))

    def attend(careful: bool) -> list[Tensor]:
        for part in sequences(tensors):
            part_output, part_lse = part.of_queries(output), part.of_queries(lse)
            if part.tensors.key.numel() == 0:
                part_output.zero_()
                part_lse.fill_(-torch.inf)
            for group in _groups(part, settings, seed, careful):
                for strip in group.strips():
                    group.forward(strip, group.of_strip(part_output, strip), group.of_strip(part_lse, strip))
        return [output]

    _carefully(attend, output.device)
    return output, lse


def _carefully(compute: Callable[[bool], list[Tensor]], device: torch.device) -> list[Tensor]:
    """What `compute(careful)` gives, careful where need be."""
    if device.type == "cpu":
        results = compute(False)
        sums = (result.sum(dtype=lse_dtype(result.dtype)).item() for result in results)
        if all(map(math.isfinite, sums)):
            return results
    return compute(True)


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    tensors: Tensors,
    settings: Settings,
    output: Tensor,
    lse: Tensor,
    seed: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the differentiable tensors for which `needs` is True, in the order of `DIFFERENTIABLE`. One deterministic pass."""

    def compute(careful: bool) -> list[Tensor]:
        return _gradients(grad_output, grad_lse, tensors, settings, output, lse, seed, needs, careful)

    return _carefully(compute, output.device)


def _gradients(
    grad_output: Tensor, grad_lse: Tensor | None, tensors: Tensors, settings: Settings, output: Tensor, lse: Tensor, seed: Tensor,
    needs: list[bool], careful: bool,
) -> list[Tensor]:  # fmt: skip
    accumulate = lse_dtype(tensors.query.dtype)
    differentiable = zip(DIFFERENTIABLE, tensors, needs, strict=False)
    needed = {name: tensor for name, tensor, need in differentiable if need and tensor is not None}
    sums = {}  # gradients to which several strips or groups contribute: summed in the dtype of accumulation
    results = {}
    for name, tensor in needed.items():
        grouped = name in ("key", "value") and tensor.shape[1] != tensors.query.shape[1]
        if name in ("query", "key", "value") and not grouped:
            results[name] = empty_gradient(tensor)
        else:
            sums[name] = torch.zeros(tensor.shape, dtype=accumulate, device=tensor.device)
    for part in sequences(tensors):
        of_part = {name: part.of(name, total) for name, total in (results | sums).items()}
        if part.tensors.query.numel() == 0 or part.tensors.key.numel() == 0:  # nothing attends to anything: no groups
            for name in results:
                of_part[name].zero_()
        slope, lse_slope = part.of_queries(grad_output), None if grad_lse is None else part.of_queries(grad_lse)
        for group in _groups(part, settings, seed, careful):
            group.backward(slope, lse_slope, part.of_queries(output), part.of_queries(lse), of_part)
    for name, total in sums.items():
        same = total.dtype == needed[name].dtype and name not in ("key", "value")
        results[name] = total if same else empty_gradient(needed[name]).copy_(total)
    return [results[name] for name in needed]


def _groups(part: Sequence, settings: Settings, seed: Tensor, careful: bool) -> Iterator[_Group]:
    """Cut the heads and the batch into groups whose strips fit the budget."""
    tensors = part.tensors
    batch, heads, length, _ = tensors.query.shape
    keys = tensors.key.shape[2]
    if tensors.query.numel() == 0 or tensors.key.numel() == 0:
        return
    if tensors.query_offsets is not None:
        starts = []  # runs of batch elements with one offset
        for offset, run in itertools.groupby(enumerate(tensors.query_offsets.tolist()), key=lambda item: item[1]):
            indices = [index for index, _ in run]
            starts.append((indices[0], len(indices), settings.query_offset + offset))
    else:
        starts = [(0, batch, settings.query_offset)]
    if settings.window_left is not None and (settings.is_causal or settings.window_right is not None):
        keys = min(keys, settings.window_left + _STRIP_ROWS + (0 if settings.is_causal else settings.window_right or 0))
    if settings.chunk_size is not None and settings.chunk_left is not None:
        keys = min(keys, (settings.chunk_left + 2) * settings.chunk_size + _STRIP_ROWS)
    budget = _STRIP_SCORES_CPU if tensors.query.device.type == "cpu" else _STRIP_SCORES
    size = max(1, budget // (min(length, _STRIP_ROWS) * keys))  # pairs of a head and a batch element
    # Heads before batch elements: the latter may have padding of their own, which their group then skips.
    head_step, batch_step = min(heads, size), max(1, size // heads)
    for first_batch, count, offset in starts:
        settings = settings._replace(query_offset=offset)
        for start in range(first_batch, first_batch + count, batch_step):
            batch_range = slice(start, min(first_batch + count, start + batch_step))
            for head in range(0, heads, head_step):
                yield _Group(part, settings, seed, careful, slice(head, min(heads, head + head_step)), batch_range)


class _Group:
    """Some heads of some batch elements: their inputs in the dtype of accumulation, and what is done with a strip of them.

    G = P x Q = number of heads x batch elements. T = 1 where the heads share a table, else the number of heads.
    """

    def __init__(self, part: Sequence, settings: Settings, seed: Tensor, careful: bool, heads: slice, batch: slice) -> None:
        tensors = part.tensors
        self.tensors, self.settings, self.seed, self.heads, self.batch = tensors, settings, seed, heads, batch
        self.first_batch, self.careful = part.number, careful
        self.dtype, self.device = lse_dtype(tensors.query.dtype), tensors.query.device
        self.rel_k, self.rel_q, self.rel_v = (self._table(table, 3) for table in (tensors.rel_k, tensors.rel_q, tensors.rel_v))
        self.rel_bias = self._table(tensors.rel_bias, 2)
        tables = (self.rel_k, self.rel_q, self.rel_v, self.rel_bias)
        self.heads_first = any(table is not None and table.shape[0] > 1 for table in tables)
        self.query = self._order(tensors.query[batch, heads])  # (P, Q, Lq, D)
        self.shape = self.query.shape[:2]
        self.ratio = tensors.query.shape[1] // tensors.key.shape[1]  # query heads that share a key head
        self.kept_share = (1.0 - settings.dropout_p) or 1.0  # nothing is kept where this is 0
        self.hidden = self._hidden_keys()
        self.key_stop = tensors.key.shape[2]  # the keys from there on are hidden from all: padding costs no products
        if self.hidden is not None and self.device.type == "cpu":  # elsewhere looking would synchronise
            seen = (~self.hidden).sum((0, 1, 2))
            self.key_stop = int(seen.nonzero()[-1]) + 1 if seen.any() else 0
            if not self.hidden[..., : self.key_stop].any():
                self.hidden = None
        self.may_hide_all = (
            settings.is_causal or settings.window_left is not None or settings.window_right is not None
            or settings.chunk_size is not None or tensors.attn_mask is not None or self.rel_bias is not None or self.hidden is not None
        )  # fmt: skip
        # A row whose scores share a large constant (a mask of -1e9) has an lse that no longer holds the logarithm of its sum.
        moderate = self.rel_bias is None and (tensors.attn_mask is None or tensors.attn_mask.dtype == torch.bool)
        self.lse_is_exact = settings.is_part or moderate

    @functools.cached_property
    def key(self) -> Tensor:
        """(G, Lk, D)"""
        return self._flat(self._for_query_heads(self.tensors.key[self.batch]))

    @functools.cached_property
    def value(self) -> Tensor:
        """(G, Lk, Dv)"""
        return self._flat(self._for_query_heads(self.tensors.value[self.batch]))

    def _for_query_heads(self, tensor: Tensor) -> Tensor:
        """From (B, Hkv, L, D) with all key heads to (B, H, L, D) with the one that each query head of the group reads."""
        if self.ratio == 1:
            return tensor[:, self.heads]
        first, last = self.heads.start // self.ratio, (self.heads.stop - 1) // self.ratio + 1
        repeated = tensor[:, first:last, None].expand(-1, -1, self.ratio, -1, -1).flatten(1, 2)
        return repeated[:, self.heads.start - first * self.ratio : self.heads.stop - first * self.ratio]

    def _order(self, tensor: Tensor) -> Tensor:
        """From (B, H, ...) to (P, Q, ...), or back."""
        return tensor.transpose(0, 1) if self.heads_first else tensor

    def _flat(self, tensor: Tensor) -> Tensor:
        """(B, H, L, D) of this group as (G, L, D)."""
        return self._order(tensor).to(self.dtype).reshape(-1, *tensor.shape[2:])

    def _table(self, table: Tensor | None, dims: int) -> Tensor | None:
        """(T, R, ...)"""
        if table is None:
            return None
        return (table[None] if table.dim() < dims else table[self.heads]).to(self.dtype)

    def _hidden_keys(self) -> Tensor | None:
        """True where key_mask or key_lengths hide a key: (P, Q, 1, Lk) with a 1 for the heads."""
        hidden = None
        if self.tensors.key_mask is not None:
            hidden = ~self.tensors.key_mask[self.batch]
        if self.tensors.key_lengths is not None:
            beyond = torch.arange(self.tensors.key.shape[2], device=self.device) >= self.tensors.key_lengths[self.batch, None]
            hidden = beyond if hidden is None else hidden | beyond
        return None if hidden is None else self._order(hidden[:, None, None, :])

    def strips(self) -> Iterator[Strip]:
        settings = self.settings
        length, keys = self.query.shape[2], self.key_stop
        ahead = 0 if settings.is_causal else settings.window_right
        for start in range(0, length, _STRIP_ROWS):
            stop = min(length, start + _STRIP_ROWS)
            lowest_position, highest_position = start + settings.query_offset, stop - 1 + settings.query_offset
            first = 0 if settings.window_left is None else max(0, lowest_position - settings.window_left)
            last = keys if ahead is None else min(keys, highest_position + ahead + 1)
            if settings.chunk_size is not None:
                first = max(first, settings.chunk_start(lowest_position) or 0)
                last = min(last, settings.chunk_stop(highest_position))
            if first >= last:
                yield Strip(start, stop, 0, 0, 0, 0, 0)
                continue
            lowest, highest = first - highest_position, last - 1 - lowest_position
            low, high = (min(max(end, -settings.left), settings.right) for end in (lowest, highest))
            left = min(max(low - lowest, 0), highest - lowest)
            yield Strip(start, stop, first, last, low + settings.left, high + settings.left + 1, left)

    def of_strip(self, tensor: Tensor, strip: Strip) -> Tensor:
        """The view (P, Q, rows, ...) of a (B, H, Lq, ...) tensor."""
        return self._order(tensor[self.batch, self.heads, strip.start : strip.stop])

    def flat_strip(self, tensor: Tensor, strip: Strip) -> Tensor:
        """(G, rows, D) in the dtype of accumulation from a (B, H, Lq, D) tensor."""
        return self.of_strip(tensor, strip).to(self.dtype).contiguous().view(-1, strip.rows, tensor.shape[3])

    def scaled_query(self, strip: Strip, unit: float) -> tuple[Tensor, Tensor]:
        """unit * scale * (q + u) and unit * scale * (q + v), each (G, rows, D)."""
        query = self.query[:, :, strip.start : strip.stop].to(self.dtype)

        def plus(bias: Tensor | None) -> Tensor:
            total = query if bias is None else query + self._order(bias[None, self.heads, None].to(self.dtype))
            scaled = torch.mul(total, unit * self.settings.scale, out=torch.empty(total.shape, dtype=self.dtype, device=total.device))
            return scaled.view(-1, *total.shape[2:])

        content = plus(self.tensors.pos_bias_u)
        same = self.tensors.pos_bias_u is None and self.tensors.pos_bias_v is None
        return content, content if same or self.rel_k is None else plus(self.tensors.pos_bias_v)

    def forward(self, strip: Strip, output: Tensor, lse: Tensor) -> None:
        """Write the strip's output (P, Q, rows, Dv) and log-sum-exp (P, Q, rows)."""
        if strip.keys == 0:
            output.zero_()
            lse.fill_(-torch.inf)
            return
        if strip.rows * strip.keys <= _TORCH_KERNEL and self._fits_torch_attention():
            self._forward_small(strip, output, lse)
        else:
            self._forward_plain(strip, output, lse)

    def _forward_plain(self, strip: Strip, output: Tensor, lse: Tensor) -> None:
        scores, buffer = self.scores(strip, *self.scaled_query(strip, _LOG2_E))
        highest = scores.amax(-1, keepdim=True)
        if self.may_hide_all:
            highest.masked_fill_(highest == -torch.inf, 0.0)
        total = scores.sub_(highest).exp2_().sum(-1, keepdim=True)
        lse.copy_(highest.div_(_LOG2_E).add_(total.log()).view(lse.shape))
        if self.may_hide_all:
            total.masked_fill_(total == 0.0, 1.0)
        if self.settings.dropout_p > 0.0:
            scores.mul_(self.keep(strip))
            total.mul_(self.kept_share)
        result = torch.bmm(*self._only_seen(scores, self.value[:, strip.first : strip.last]))
        if self.rel_v is not None:
            by_row = self._only_seen(self._table_sums(strip, scores, buffer), self.rel_v[:, strip.row : strip.last_row])
            result += times_table(*by_row).view(result.shape)
        torch.div(result.view(output.shape), total.view(*output.shape[:-1], 1), out=output)

    def _only_seen(self, weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return only_seen(weights, rows) if self.careful else (weights, rows)

    def _finite(self, rows: Tensor) -> Tensor:
        """Rows for a product with gradients of scores, which are 0 or not finite themselves where the rows are not."""
        return finite(rows) if self.careful else rows

    def _fits_torch_attention(self) -> bool:
        query, key, value = self.tensors[:3]
        return (
            _torch_attention is not None and self.device.type == "cpu" and query.dtype == self.dtype
            and self.rel_q is None and self.rel_v is None and self.settings.dropout_p == 0.0 and query.shape[3] == value.shape[3]
            and query.stride(3) == key.stride(3) == value.stride(3) == 1
        )  # fmt: skip

    def _forward_small(self, strip: Strip, output: Tensor, lse: Tensor) -> None:
        """As `forward`, by torch's fused attention, which saves copies and calls: what is relative is its mask, a strip at a time.

        (For long strips reading such a mask costs more than the products of `scores` do.)
        """
        query = self._order(self.of_strip(self.tensors.query, strip))  # (B, H, rows, D)
        all_keys, all_values, unusable = *self.tensors[1:3], None
        if self.careful and self.may_hide_all:  # the kernel adds -inf, which does not hide these
            unusable = ~((all_keys.abs().amax(-1) < torch.finfo(self.dtype).max ** 0.5) & all_values.isfinite().all(-1))
            all_keys, all_values = (masked(tensor, unusable[..., None]) for tensor in (all_keys, all_values))
        bias = None
        if self.rel_k is not None or self.rel_bias is not None:
            position = self.scaled_query(strip, 1.0)[1]
            bias = skewed(self._by_distance(strip, position, self.rel_k, self.rel_bias), strip)
        elif self.may_hide_all:
            bias = torch.zeros((self.shape[0] * self.shape[1], strip.rows, strip.keys), dtype=self.dtype, device=self.device)
        if bias is not None:
            self._hide(bias, strip, 1.0)
            bias = self._order(bias.view(*self.shape, strip.rows, strip.keys))
        if self.tensors.pos_bias_u is not None:
            query = query + self.tensors.pos_bias_u[self.heads, None].to(self.dtype)
        output, lse_out = self._order(output), self._order(lse)  # (B, H, rows, ...)
        first, stop = self.heads.start, self.heads.stop
        while first < stop:  # one call, or one for each key head that query heads share
            last = stop if self.ratio == 1 else min(stop, (first // self.ratio + 1) * self.ratio)
            index = (self.batch, slice(first // self.ratio, (last - 1) // self.ratio + 1), slice(strip.first, strip.last))
            key, value = (tensor[index].expand(-1, last - first, -1, -1) for tensor in (all_keys, all_values))
            part = slice(first - self.heads.start, last - self.heads.start)
            mask = None if bias is None else bias[:, part]
            result, result_lse = _torch_attention(query[:, part], key, value, 0.0, False, attn_mask=mask, scale=self.settings.scale)
            output[:, part] = result
            lse_out[:, part] = result_lse
            first = last
        if self.may_hide_all and bias is not None:
            lse.masked_fill_(self._order(bias.amax(-1)) == -torch.inf, -torch.inf)
        if unusable is None:
            return
        # Queries that see such a key get what it makes of them elsewhere.
        by_head = self._for_query_heads(unusable[self.batch, ..., None])[:, :, strip.first : strip.last, 0]
        sees = ((bias != -torch.inf) & by_head[:, :, None]).any(-1) | ~output.isfinite().all(-1)
        plain_output, plain_lse = torch.empty_like(output), torch.empty_like(lse_out)
        self._forward_plain(strip, self._order(plain_output), self._order(plain_lse))
        output.copy_(torch.where(sees[..., None], plain_output, output))
        lse_out.copy_(torch.where(sees, plain_lse, lse_out))

    def backward(
        self, grad_output: Tensor, grad_lse: Tensor | None, output: Tensor, lse: Tensor, grads: dict[str, Tensor]
    ) -> None:
        """Write this group's part of the gradients in `grads`, or add it where other groups share them."""
        strips = list(self.strips())
        # Only the first strip writes, the others add; what it does not reach starts from zero.
        start = torch.empty_like if strips[0].keys == self.key.shape[1] else torch.zeros_like
        grad_key, grad_value = start(self.key), start(self.value)
        for strip in strips:
            if strip.keys > 0:
                upstream = self.flat_strip(grad_output, strip)  # (G, rows, Dv)
                lse_strip = self.of_strip(lse, strip).reshape(-1, strip.rows, 1)
                lse_slope = None if grad_lse is None else self.of_strip(grad_lse, strip).reshape(lse_strip.shape)
                # do_i.o_i, which is sum_j w_ij dw_ij; but a rounded output would not cancel against the unrounded weights.
                row_sum = None
                if output.dtype == self.dtype:  # as it always is of a part, whose own sum is another
                    product = self.of_strip(grad_output, strip) * self.of_strip(output, strip)
                    row_sum = product.sum(-1).reshape(lse_strip.shape)
                self._backward_strip(strip, upstream, row_sum, lse_strip, lse_slope, grad_key, grad_value, grads)
            elif "query" in grads:
                self.of_strip(grads["query"], strip).zero_()
        for name, gradient in (("key", grad_key), ("value", grad_value)):
            if name in grads:
                gradient = self._order(gradient.view(*self.shape, *gradient.shape[1:]))
                if self.ratio == 1:
                    grads[name][self.batch, self.heads].copy_(gradient)
                else:
                    for index, head in enumerate(range(self.heads.start, self.heads.stop)):
                        grads[name][self.batch, head // self.ratio] += gradient[:, index]

    def _backward_strip(
        self,
        strip: Strip,
        upstream: Tensor,  # gradient of the output, (G, rows, Dv)
        row_sum: Tensor | None,  # sum_j w_ij dw_ij, (G, rows, 1); None = not known yet
        lse: Tensor,  # (G, rows, 1)
        lse_slope: Tensor | None,  # gradient of lse, (G, rows, 1)
        grad_key: Tensor,
        grad_value: Tensor,
        grads: dict[str, Tensor],
    ) -> None:
        settings, keys = self.settings, slice(strip.first, strip.last)
        if self.may_hide_all:  # rows that see nothing have weight 0 everywhere, whatever the slope of their lse
            nothing = lse == -torch.inf
            lse = lse.masked_fill(nothing, torch.inf)
            upstream = masked(upstream, nothing) if self.careful else upstream
            lse_slope = None if lse_slope is None else lse_slope.masked_fill(nothing, 0.0)
        content, position = self.scaled_query(strip, _LOG2_E)
        weights, buffer = self.scores(strip, content, position)
        hidden = None
        if self.careful:  # and all that queries see whose output nobody asked for
            idle = (upstream == 0.0).all(-1, keepdim=True)
            hidden = (weights == -torch.inf) | (idle if lse_slope is None else idle & (lse_slope == 0.0))
        if self.lse_is_exact:
            weights.sub_(lse * _LOG2_E).exp2_()
        else:
            highest = weights.amax(-1, keepdim=True)
            weights.sub_(highest.masked_fill_(highest == -torch.inf, 0.0)).exp2_()
            total = weights.sum(-1, keepdim=True)
            weights.div_(total.masked_fill_(total == 0.0, 1.0))
        if hidden is not None:
            hidden = weights.masked_fill_(hidden, 0.0) == 0.0
        dropped = weights
        if settings.dropout_p > 0.0:
            keep = self.keep(strip).to(self.dtype).div_(self.kept_share)
            dropped = weights * keep
        by_key, rows = self._only_seen(dropped.transpose(1, 2), upstream)
        if "value" in grads:
            grad_value[:, keys].baddbmm_(by_key, rows, beta=0 if strip.start == 0 else 1)
        if "rel_v" in grads:
            self._add_table_gradient(grads["rel_v"], self._table_sums(strip, dropped), rows, strip)

        value = self.value[:, keys].transpose(1, 2)
        if self.rel_v is None:
            grad_weights = torch.bmm(upstream, value)
        else:
            grad_weights = skewed(self._by_distance(strip, upstream, self.rel_v), strip).baddbmm_(upstream, value)
        if settings.dropout_p > 0.0:
            grad_weights.mul_(keep)
        if hidden is not None:
            grad_weights.masked_fill_(hidden, 0.0)
        if row_sum is None:
            row_sum = (weights * grad_weights).sum(-1, keepdim=True)
        if lse_slope is not None:
            row_sum = row_sum - lse_slope
        grad_scores = weights.mul_(grad_weights.sub_(row_sum))
        if hidden is not None:
            grad_scores.masked_fill_(hidden, 0.0)
            content, position = self._finite(content), self._finite(position)

        if "attn_mask" in grads:
            target = self.mask_strip(grads["attn_mask"], strip)
            target += grad_scores.view(*self.shape, strip.rows, strip.keys).sum_to_size(target.shape)
        grad_content = torch.bmm(grad_scores, self._finite(self.key[:, keys]))
        if "key" in grads:
            grad_key[:, keys].baddbmm_(grad_scores.transpose(1, 2), content, beta=0 if strip.start == 0 else 1, alpha=1 / _LOG2_E)
        if self.rel_q is not None:
            self._rel_q_gradients(strip, grad_scores, grad_key, grads)
        if "pos_bias_u" in grads:
            grads["pos_bias_u"][self.heads].add_(self._sum_rows(grad_content), alpha=settings.scale)
        if self.rel_k is not None or self.rel_bias is not None:
            band = self._table_sums(strip, grad_scores, buffer)
            if "rel_bias" in grads:
                target = grads["rel_bias"][..., strip.row : strip.last_row]
                if target.dim() == 1:
                    target += band.sum((0, 1, 2))
                else:
                    target[self.heads] += self._order(band).sum((0, 2))
            if self.rel_k is not None:
                if "rel_k" in grads:
                    self._add_table_gradient(grads["rel_k"], band, position, strip, 1 / _LOG2_E)
                grad_position = times_table(band, self._finite(self.rel_k[:, strip.row : strip.last_row])).view(content.shape)
                grad_content += grad_position
                if "pos_bias_v" in grads:
                    grads["pos_bias_v"][self.heads].add_(self._sum_rows(grad_position), alpha=settings.scale)
        if "query" in grads:
            target = self.of_strip(grads["query"], strip)
            torch.mul(grad_content.view(target.shape), settings.scale, out=target)

    def _sum_rows(self, tensor: Tensor) -> Tensor:
        """(G, rows, D) summed to (H, D)."""
        return self._order(tensor.view(*self.shape, *tensor.shape[1:])).sum((0, 2))

    def _add_table_gradient(self, grad: Tensor, band: Tensor, rows: Tensor, strip: Strip, factor: float = 1.0) -> None:
        """Add factor * band^T rows to the band's rows of a table's gradient: band (P, Q, rows, band), rows (G, rows, D)."""
        grad = grad[None] if grad.dim() == 2 else grad[self.heads]
        target, band = grad[:, strip.row : strip.last_row], merge(band, grad)
        rows = rows.view(grad.shape[0], -1, rows.shape[-1])
        if grad.shape[0] == 1:
            target[0].addmm_(band[0].T, rows[0], alpha=factor)
        else:
            target.baddbmm_(band.transpose(1, 2), rows, alpha=factor)

    def scores(self, strip: Strip, content: Tensor, position: Tensor) -> tuple[Tensor, Tensor | None]:
        """The strip's scores in units of ln 2, (G, rows, keys), hidden ones -inf.

        And, if they are its skewed view, the buffer (P, Q, rows, columns) with one column per distance.
        """
        key = self.key[:, strip.first : strip.last].transpose(1, 2)
        buffer = None
        if self.rel_k is None and self.rel_bias is None:
            scores = torch.bmm(content, key)
        else:
            bias = None if self.rel_bias is None else self.rel_bias * _LOG2_E
            buffer = self._by_distance(strip, position, self.rel_k, bias)
            if strip.rows * strip.keys > _COPIED:
                scores = skewed(buffer, strip).baddbmm_(content, key)
            else:  # torch's batched product into a strided result is a loop: for many small matrices an addition is faster
                scores, buffer = torch.bmm(content, key).add_(skewed(buffer, strip)), None
        if self.rel_q is not None:
            table = self._descending(strip).transpose(1, 2)
            for chunk, window, keys in self._key_chunks(strip):
                product = times_table(keys, table[..., window])
                scores.view(*self.shape, strip.rows, -1)[..., chunk].add_(skewed_keys(product, strip), alpha=_LOG2_E * self.settings.scale)
        self._hide(scores, strip, _LOG2_E)
        return scores, buffer

    def _by_distance(self, strip: Strip, rows: Tensor, table: Tensor | None, bias: Tensor | None = None) -> Tensor:
        """rows.table + bias with one column per distance, (P, Q, rows, columns), from rows (G, rows, D), table (T, R, D), bias (T, R).

        Columns beyond the table are copies of its edge rows': clipping saves their product.
        """
        buffer = torch.empty((*self.shape, strip.rows, strip.columns), dtype=self.dtype, device=self.device)
        band = table_columns(buffer, strip)
        if table is not None:
            times_table(rows.view(*self.shape, strip.rows, -1), table[:, strip.row : strip.last_row].transpose(1, 2), band)
        if bias is not None:
            bias = bias[:, None, None, strip.row : strip.last_row]
            band.copy_(bias) if table is None else band.add_(bias)
        if strip.left:
            buffer[..., : strip.left] = band[..., :1]
        if strip.right:
            buffer[..., -strip.right :] = band[..., -1:]
        return buffer

    def _table_sums(self, strip: Strip, scores: Tensor, buffer: Tensor | None = None) -> Tensor:
        """Scores or their gradients summed over the keys of each table row, (P, Q, rows, band).

        With the buffer that they are the skewed view of this happens in place, and consumes them.
        """
        if buffer is None:
            buffer = torch.zeros((*self.shape, strip.rows, strip.columns), dtype=self.dtype, device=self.device)
            skewed(buffer, strip).copy_(scores)
        else:
            clear_gaps(buffer, strip)
        return fold_edges(buffer, strip)

    def _rel_q_gradients(self, strip: Strip, grad_scores: Tensor, grad_key: Tensor, grads: dict[str, Tensor]) -> None:
        table = self._finite(self._descending(strip))
        grad_table = torch.zeros_like(table)
        grad_scores = grad_scores.view(*self.shape, strip.rows, -1)
        for chunk, window, keys in self._key_chunks(strip):
            product = keys.new_zeros((*self.shape, keys.shape[2], keys.shape[2] + strip.rows - 1))
            skewed_keys(product, strip).copy_(grad_scores[..., chunk]).mul_(self.settings.scale)
            if "key" in grads:
                target = grad_key[:, strip.first + chunk.start : strip.first + chunk.stop]
                target += times_table(product, table[:, window]).view(target.shape)
            grad_table[:, window].baddbmm_(merge(product, table).transpose(1, 2), merge(self._finite(keys), table))
        if "rel_q" in grads:
            # The table's rows beyond the edges are copies of the edge rows.
            folded = fold_edges(grad_table.flip(1).transpose(1, 2), strip).transpose(1, 2)
            target = grads["rel_q"] if grads["rel_q"].dim() == 3 else grads["rel_q"][None]
            target[self.heads if target.shape[0] > 1 else slice(None), strip.row : strip.last_row] += folded

    def _key_chunks(self, strip: Strip) -> Iterator[tuple[slice, slice, Tensor]]:
        """Tiles of the rel_q term. Their rows are keys, and their columns distances from high to low (torch has no negative strides).

        Yields the chunk within the strip's keys, its window within the columns of `_descending`, and its keys (P, Q, chunk, D).
        """
        for start in range(0, strip.keys, _KEY_CHUNK):
            stop = min(strip.keys, start + _KEY_CHUNK)
            keys = self.key[:, strip.first + start : strip.first + stop].reshape(*self.shape, stop - start, -1)
            yield slice(start, stop), slice(strip.keys - stop, strip.keys - start + strip.rows - 1), keys

    def _descending(self, strip: Strip) -> Tensor:
        """rel_q with one row per distance of the strip, the highest first: (T, columns, D)."""
        rows = torch.arange(strip.columns - 1, -1, -1, device=self.device) - strip.left
        assert self.rel_q is not None
        return self.rel_q.index_select(1, rows.clamp_(0, strip.last_row - strip.row - 1).add_(strip.row))

    def _hide(self, scores: Tensor, strip: Strip, unit: float) -> None:
        """Add a floating mask times `unit` and set what may not be seen to -inf, in place."""
        settings, rows, keys = self.settings, strip.rows, strip.keys
        if self.tensors.attn_mask is not None:
            mask = self.mask_strip(self.tensors.attn_mask, strip)
            scores = scores.view(*self.shape, rows, keys)
            if mask.dtype == torch.bool:
                scores.masked_fill_(~mask, -torch.inf)
            else:
                scores.add_(mask, alpha=unit).masked_fill_(mask <= hidden_from(mask.dtype), -torch.inf)
        if self.hidden is not None:
            scores.view(*self.shape, rows, keys).masked_fill_(self.hidden[..., strip.first : strip.last], -torch.inf)
        # Only keys near an edge of what may be seen need the comparison: the others are seen by every query of the strip.
        ahead = 0 if settings.is_causal else settings.window_right
        if ahead is None and settings.window_left is None and settings.chunk_size is None:
            return
        query = torch.arange(strip.start, strip.stop, device=scores.device)[:, None] + settings.query_offset
        if ahead is not None:
            safe = min(max(strip.start + settings.query_offset + ahead + 1, strip.first), strip.last)
            key = torch.arange(safe, strip.last, device=scores.device)
            scores[..., safe - strip.first :].masked_fill_(key - query > ahead, -torch.inf)
        if settings.window_left is not None:
            safe = min(max(strip.stop - 1 + settings.query_offset - settings.window_left, strip.first), strip.last)
            key = torch.arange(strip.first, safe, device=scores.device)
            scores[..., : safe - strip.first].masked_fill_(key - query < -settings.window_left, -torch.inf)
        stop, start = settings.chunk_stop(strip.start + settings.query_offset), settings.chunk_start(strip.stop - 1 + settings.query_offset)
        if stop is not None:
            safe = min(max(stop, strip.first), strip.last)
            key = torch.arange(safe, strip.last, device=scores.device)
            scores[..., safe - strip.first :].masked_fill_(key >= settings.chunk_stop(query), -torch.inf)
        if start is not None:
            safe = min(max(start, strip.first), strip.last)
            key = torch.arange(strip.first, safe, device=scores.device)
            scores[..., : safe - strip.first].masked_fill_(key < settings.chunk_start(query), -torch.inf)

    def mask_strip(self, mask: Tensor, strip: Strip) -> Tensor:
        """The part of a mask broadcastable to (B, Hq, Lq, Lk), or of its gradient, as (P, Q, rows, keys) with its sizes of 1 kept."""
        mask = mask[(None,) * (4 - mask.dim())]
        index = (self.batch, self.heads, slice(strip.start, strip.stop), slice(strip.first, strip.last))
        full = slice(None)
        return self._order(mask[tuple(full if size == 1 else part for size, part in zip(mask.shape, index, strict=True))])

    def keep(self, strip: Strip) -> Tensor:
        """Which weights survive dropout, (G, rows, keys)."""
        device = self.device
        settings = self.settings
        head = self._order((torch.arange(self.heads.start, self.heads.stop, device=device) + settings.first_head)[None, :, None])
        batch = self._order((torch.arange(self.batch.start, self.batch.stop, device=device) + self.first_batch)[:, None, None])
        query = torch.arange(strip.start, strip.stop, device=device) + settings.first_query
        seed = int(self.seed) if self.device.type == "cpu" else self.seed
        first, last = strip.first + settings.first_key, strip.last + settings.first_key
        keep = dropout_keep(seed, settings.dropout_p, batch, head, query, first, last)
        return keep.reshape(-1, strip.rows, strip.keys)
