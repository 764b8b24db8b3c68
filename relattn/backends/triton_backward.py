"""The Triton backend's backward pass: which kernels, in which parts, and what becomes of what they sum."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from relattn.arguments import Settings, Tensors
from relattn.backends import triton as launcher


class Part:
    """What of the scores has its tiles in memory at once: `here` heads (of batch elements) from number `pair` on, and `some` blocks of keys
    from number `column` on."""

    def __init__(self, pair: int, here: int, column: int, some: int, block: int, keys: int) -> None:
        self.pair, self.here, self.column, self.some = pair, here, column, some
        self.keys = slice(column * block, min((column + some) * block, keys))


class Backward(launcher._Call):
    """One call's gradients. `gradients` holds those that are wanted, by name, to be filled."""

    def __init__(
        self, tensors: Tensors, settings: Settings, seed: Tensor, gradients: dict[str, Tensor], grad_output: Tensor, lse: Tensor
    ) -> None:  # fmt: skip
        super().__init__(tensors, settings, seed)
        self.gradients, self.lse = gradients, lse
        self.new = functools.partial(torch.empty, dtype=torch.float32, device=lse.device)
        self.any_clipped = self._clipped(16)  # with larger tiles fewer are far
        per_query = (self.batch, self.heads, self.queries)
        self.saved = launcher._kernels().operands.Saved(
            self.new(per_query), self.new(per_query), None if self.exact else self.new(per_query),
            self.new((2, *per_query)) if self.any_clipped else None,
        )  # fmt: skip
        self.grad_output = launcher._whole(launcher._near(grad_output))
        self.grad_query = launcher._whole(gradients["query"] if "query" in gradients else torch.empty_like(self.query_u))
        self.common = dict(grad_output=self.grad_output, saved=self.saved)
        self.want_sums = bool(gradients.keys() & {"rel_bias", "pos_bias_v"})
        # Where rel_k wants a gradient, score gradients go to memory, since distances and queries sum them differently. Of large heads all
        # gradients are products of what is there: registers do not hold their sums.
        plain = not self.any_clipped and self.offsets is None and self.rel_q is None and self.rel_v is None
        self.by_tiles = plain and "rel_k" in gradients
        self.products = self.by_tiles and self.size > 64 and self.dtype.itemsize == 2
        # By table row, unscaled: rel_k's gradient (T, R, D), and the sums of the score gradients (H, R).
        self.total: Tensor | None = None
        self.sums: Tensor | None = None
        self.key_sums = self.new((self.batch, self.heads, self.keys)) if "pos_bias_u" in gradients else None
        # What far tiles owe to the tables' edges: score gradients per query (2, B, H, Lq), and these times the queries (2, programs, D).
        self.edge_sums: Tensor | None = None
        self.edge_owed: Tensor | None = None

    def run(self, grad_lse: Tensor | None, output: Tensor) -> None:
        """grad_lse and output as `relattn.operators` hands them over."""
        rows = dict(output=launcher._whole(output), lse=self.lse, grad_lse=None if grad_lse is None else grad_lse.contiguous())
        self._run("prepare", lambda configuration: self._prepare(configuration, rows))
        need = self.gradients.keys()
        by_table, far_block = bool(need & {"rel_k", "rel_bias", "pos_bias_v"}), 0
        if "query" in need or self.by_tiles or (self.any_clipped and by_table):
            far_block = self._run("query_gradient", self._query_gradient)
        if need & {"key", "value", "pos_bias_u"} and not (self.products and self.total is not None):
            self._run("key_gradient", self._key_gradient)
        if self.key_sums is not None:
            sums = self.key_sums.unflatten(1, (self.key_heads, -1))
            total = torch.einsum("bngj,bnjd->ngd", sums, self.key.float()).flatten(0, 1)
            self.gradients["pos_bias_u"].copy_(total * self.settings.scale)
        if by_table:
            if self.total is None:
                self._walk_diagonals(far_block)
            self._give()
        for name in ("rel_q", "rel_v"):
            if name in need:
                found, _ = self._table_gradient(name, self.gradients[name], False, 0)
                assert found is not None
                factor = self.settings.scale if name == "rel_q" else self.keep_scale
                self.gradients[name].copy_((found * factor).view(self.gradients[name].shape))

    def _programs(self, block: int, length: int, heads: int) -> tuple[int]:
        return (-(-length // block) * self.batch * heads,)

    def _prepare(self, configuration, rows: dict[str, Any]) -> None:
        programs = self._programs(configuration.block, self.queries, self.heads)
        self._launch("prepare", programs, configuration, clipped=self.any_clipped, **self.common, **rows)

    def _query_gradient(self, configuration) -> None:
        block, clipped = configuration.block, self._clipped(configuration.block)
        programs = self._programs(block, self.queries, self.heads)
        if self.any_clipped:
            self.edge_sums = self.new((2, self.batch, self.heads, self.queries))
        self.edge_owed = self.new((2, *programs, self.size)) if clipped and "rel_k" in self.gradients else None
        launch = functools.partial(
            self._launch, "query_gradient", configuration=configuration, clipped=clipped, **self.common,
            grad_query=self.grad_query, edge_sums=self.edge_sums, edge_owed=self.edge_owed,
        )  # fmt: skip
        if self.by_tiles and block >= 32:
            self._parts(launch, block)
        else:
            launch(
                grid=programs, kept_tiles=None, grad_tiles=None, owed_tiles=None, running=None, ADD=True,
                first_pair=0, columns=0, key_begin=0, key_end=self.keys,
            )  # fmt: skip

    def _key_gradient(self, configuration) -> None:
        programs, clipped = self._programs(configuration.block, self.keys, self.key_heads), self._clipped(configuration.block)
        key, value = (self._wanted(name, tensor) for name, tensor in (("key", self.key), ("value", self.value)))
        self._launch(
            "key_gradient", programs, configuration, clipped=clipped, **self.common,
            grad_key=launcher._whole(key), grad_value=launcher._whole(value), key_sums=self.key_sums,
        )  # fmt: skip

    def _wanted(self, name: str, like: Tensor) -> Tensor:
        """The gradient to be filled, or one that nobody wants."""
        return self.gradients[name] if name in self.gradients else torch.empty_like(like)

    def _walk_diagonals(self, far_block: int) -> None:
        """`total` and `sums` by `table_gradient_kernel`, but for what far tiles of far_block owe: that is known."""
        # With offsets by batch element the diagonals' tiles are not those whose edge sums are known: all are walked.
        far = self.edge_sums if far_block and self._clipped(far_block) and self.offsets is None else None
        gradient = self.gradients.get("rel_k")
        self.total, self.sums = self._table_gradient("rel_k", gradient, self.want_sums, 0 if far is None else far_block)
        if far is None:
            return
        if self.total is not None:
            assert self.edge_owed is not None
            for row, owed in zip((0, -1), self.edge_owed.view(2, self.batch, self.heads, -1, self.size).sum((1, 3)), strict=True):
                self.total[:, row] += owed if self.total.shape[0] > 1 else owed.sum(0)
        if self.sums is not None:
            left, right = far.sum((1, 3))
            self.sums[:, 0] += left
            self.sums[:, -1] += right

    def _give(self) -> None:
        """Gradients of rel_k, rel_bias and pos_bias_v, from `total` and `sums`."""
        gradients, total, sums = self.gradients, self.total, self.sums
        if total is not None and "rel_k" in gradients:
            gradients["rel_k"].copy_((total * self.settings.scale).view(gradients["rel_k"].shape))
        if sums is not None and "rel_bias" in gradients:
            gradients["rel_bias"].copy_(sums if gradients["rel_bias"].dim() == 2 else sums.sum(0))
        if sums is not None and "pos_bias_v" in gradients:
            assert self.rel_k is not None
            table = self.rel_k.float().expand(self.heads, -1, -1)
            gradients["pos_bias_v"].copy_(torch.bmm(sums[:, None], table)[:, 0] * self.settings.scale)

    def _parts(self, launch: Callable[..., None], block: int) -> None:
        """Gradients by way of tiles in memory, one part of the heads and the keys at a time: of queries; of keys and values if `products`;
        `total`, and `sums` where they are wanted. The order of the parts is fixed, and so are the bits of the sums."""
        self._prepared.clear()  # of another block size
        pairs = self.batch * self.heads
        rows, all_columns = -(-self.queries // block), -(-self.keys // block)
        at_once, columns = self._part(rows, all_columns, block)

        def tiles(wanted: bool) -> Tensor | None:  # one column more: what the last one owes
            return self.new((at_once * rows, columns + 1, block, block), dtype=self.dtype) if wanted else None

        kept, grad, owed = tiles(self.products), tiles(self.products), tiles(True)
        running = self.new((at_once * rows, block, self.size)) if self.products or columns < all_columns else None
        groups, distances = self.heads if self.gradients["rel_k"].dim() == 3 else 1, (rows + all_columns) * block
        total = self.new((groups, distances, self.size)).zero_()
        sums = self.new((self.heads, distances)).zero_() if self.want_sums else None
        for pair, column in itertools.product(range(0, pairs, at_once), range(0, all_columns, columns)):
            part = Part(pair, min(at_once, pairs - pair), column, min(columns, all_columns - column), block, self.keys)
            numbers: dict[str, Any] = dict(first_pair=pair, columns=columns + 1, key_begin=part.keys.start, key_end=part.keys.stop)
            launch(
                grid=(part.here * rows,), again=("query_gradient",), kept_tiles=kept, grad_tiles=grad, owed_tiles=owed, running=running,
                ADD=not self.products, **numbers,
            )  # fmt: skip
            product = functools.partial(self._product, block, **numbers)
            if self.products:
                self._key_product(product, part, "value", kept, block)
                self._key_product(product, part, "key", grad, block)
                arguments = dict(grad_tiles=grad, owed_tiles=owed, running=running, grad_query=self.grad_query)
                product("query_product", grid=(part.here * rows,), **arguments)
            partial = self.new((part.here, rows + part.some, block, self.size))
            partial_sums = self.new((part.here, rows + part.some, block)) if self.want_sums else None
            grid = (rows + part.some, part.here)
            product("table_product", grid=grid, owed_tiles=owed, partial=partial, partial_sums=partial_sums)
            place = slice(column * block, (column + rows + part.some) * block)
            _add_pairs(total[:, place], partial.flatten(1, 2), pair)
            if sums is not None and partial_sums is not None:
                _add_pairs(sums[:, place], partial_sums.flatten(1, 2), pair)
        first_row = -(rows - 1) * block - (block - 1) - self.table_start
        self.total = self.new((groups, self.table_rows, self.size)).zero_()
        _fold(total, first_row, self.total)
        if sums is not None:
            self.sums = self.new((self.heads, self.table_rows)).zero_()
            _fold(sums, first_row, self.sums)

    def _part(self, rows: int, columns: int, block: int) -> tuple[int, int]:
        """Heads (of batch elements) and columns of tiles at once: enough programs to fill the chip, a few times over where some have less
        to do than others, and as many keys as there is room for. Short sequences: as many heads as there is room for."""
        group = self.heads // self.key_heads
        units = self.batch * self.key_heads  # heads that share a key head stay together
        budget = launcher._TILE_BYTES or launcher._tile_bytes(self.key.device)
        slots = 2 * (4 if launcher.INTERPRETED else launcher._processors(self.key.device))
        slots *= 1 if self.first == -launcher._UNBOUNDED and self.last == launcher._UNBOUNDED else 4
        count = max(1, slots // (rows * group))
        column = group * rows * block * block * self.dtype.itemsize * (3 if self.products else 1)
        whole = budget // max(column * (columns + 1), group * (rows + columns) * block * self.size * 4)  # and its `partial`
        count = min(units, whole if whole >= min(units, 3 * count) else count)
        count = -(-units // -(-units // count))
        room = max(2, budget // (count * column)) - 1
        return count * group, -(-columns // -(-columns // room))

    def _product(self, block: int, *again: str, grid: tuple[int, ...], **arguments: Any) -> None:
        """Launch the kernel again[0], the first time with all that it takes."""
        if again in self._prepared:
            self._launch(again[0], grid, None, again=again, **arguments)
        else:
            arguments |= dict(self.common, again=again)
            self._run(again[0], functools.partial(self._launch, again[0], grid, **arguments), block=block)

    def _key_product(self, product: Callable[..., None], part: Part, name: str, tiles: Tensor | None, block: int) -> None:
        """One part's gradient of values or keys, and its key_sums."""
        values = name == "value"
        key_sums = None if values else self.key_sums
        if name not in self.gradients and key_sums is None:
            return
        size, scale = (self.value_size, self.keep_scale) if values else (self.size, float(self.settings.scale))
        key_heads, rows = part.here // (self.heads // self.key_heads), -(-self.queries // block)
        # Where few keys leave the chip idle, the queries are cut.
        wanted = 4 if launcher.INTERPRETED else 2 * launcher._processors(self.key.device)
        splits = max(1, min(wanted // (part.some * key_heads), rows // 8))
        chunk = -(-rows // splits) * block
        splits = -(-self.queries // chunk)
        partial = self.new((splits, key_heads, part.some * block, size)) if splits > 1 else None
        partial_sums = None if key_sums is None else self.new((splits, part.here, part.some * block))
        gradient = launcher._whole(self._wanted(name, self.value if values else self.key))
        sizes = dict(scale=scale, SIZE=size, COLUMNS=max(16, launcher._kernels().next_power_of_2(size)))
        product(
            "key_product", name, str(splits > 1), grid=(part.some, key_heads, splits), tiles=tiles, gradient=gradient, partial=partial,
            content=self.grad_output if values else launcher._whole(self.query_u), partial_sums=partial_sums, chunk=chunk, **sizes,
        )  # fmt: skip
        if partial is not None:
            product("join", name, grid=(part.some, key_heads), gradient=gradient, partial=partial, splits=splits, **sizes)
        if key_sums is not None and partial_sums is not None:
            length = part.keys.stop - part.keys.start
            key_sums.flatten(0, 1)[part.pair : part.pair + part.here, part.keys] = partial_sums.sum(0)[:, :length]

    def _table_gradient(self, name: str, gradient: Tensor | None, want_sums: bool, far_block: int) -> tuple[Tensor | None, Tensor | None]:
        """By table row, unscaled, float32: the gradient of a table (T, R, D), and the sums of the score gradients (H, R).

        far_block: pairs in tiles of that size that are far from the tables are left out; 0 = none are.
        """
        groups = self.heads if gradient is not None and gradient.dim() == 3 else 1
        size, device = self.value_size if name == "rel_v" else self.size, self.query_u.device
        total, sums = None, None
        if gradient is not None:
            total = torch.empty((groups, self.table_rows, size), dtype=torch.float32, device=device)
        if want_sums:
            sums = torch.empty((self.heads, self.table_rows), dtype=torch.float32, device=device)

        def table_gradient(configuration) -> None:  # may run more than once
            block = configuration.block
            for result in (total, sums):
                if result is not None:
                    result.zero_()
            lowest, highest = self._diagonals(block)
            absorb = not far_block and (self.offsets is not None or self._beyond(block))
            # Diagonals with a distance of the tables' own, t * block + block - 1 > table_start and t * block - (block - 1) < its last row.
            near = far_block or block
            first = -((near - 2 - self.table_start) // near)
            last = (self.table_start + self.table_rows - 2 + near - 1) // near
            if absorb:
                lowest, highest = first - 1, max(last, first) + 1
            else:  # a tile of far_block has those of the diagonals from one above its own to one below
                ratio = near // block
                lowest, highest = max(lowest, first * ratio - (ratio - 1)), min(highest, last * ratio + ratio - 1)
            diagonals = highest - lowest + 1
            if diagonals <= 0:
                return
            head_groups, batches, chunk = self._cut(diagonals, groups, block, near)
            splits = -(-self.batch // batches) * -(-self.queries // chunk)
            partial, partial_sums = None, None
            if total is not None:
                partial = torch.empty((splits, head_groups, diagonals, 2, block, size), dtype=torch.float32, device=device)
            if sums is not None:
                partial_sums = torch.empty((splits, self.heads, diagonals, 2, block), dtype=torch.float32, device=device)
            self._launch(
                "table_gradient", (diagonals, head_groups, splits), configuration, **self.common,
                partial=partial, partial_sums=partial_sums, diagonals=diagonals, first_diagonal=lowest,
                shared_heads=self.heads // head_groups, chunk_batches=batches, chunk=chunk,
                TABLE="sums" if total is None else name, ABSORB=absorb, FAR=far_block > 0, FAR_BLOCK=near,
            )  # fmt: skip
            row = lowest * block - (block - 1) - self.table_start
            if total is not None and partial is not None:
                windows = partial.sum(0)
                _fold(_overlap(windows.sum(0, keepdim=True) if groups == 1 else windows), row, total)
            if sums is not None and partial_sums is not None:
                _fold(_overlap(partial_sums.sum(0)), row, sums)

        self._run("table_gradient", table_gradient, far_block or 2**30)
        return total, sums

    def _cut(self, diagonals: int, groups: int, block: int, near: int) -> tuple[int, int, int]:
        """How a table's gradient is divided among programs: groups of heads, batch elements and queries of a program."""
        wanted = launcher._TABLE_PROGRAMS or (4 if launcher.INTERPRETED else 4 * launcher._processors(self.query_u.device))
        wanted = max(1, wanted // diagonals)
        head_groups = groups
        if groups == 1:
            head_groups = max(count for count in range(1, self.heads + 1) if self.heads % count == 0 and count <= wanted)
        wanted = -(-wanted // head_groups)
        batches = -(-self.batch // min(wanted, self.batch))
        wanted = -(-wanted // -(-self.batch // batches))
        blocks = -(-self.queries // near)
        return head_groups, batches, -(-blocks // min(wanted, blocks)) * near


def _add_pairs(total: Tensor, partial: Tensor, first_pair: int) -> None:
    """Add (pairs, ...), of which the first is pair number first_pair of all batch elements' heads, to (H, ...) or (1, ...), in order."""
    if total.shape[0] == 1:
        total[0] += partial.sum(0)
        return
    for index, part in enumerate(partial, first_pair):
        total[index % total.shape[0]] += part


def _overlap(windows: Tensor) -> Tensor:
    """(T, diagonals, 2, block, ...), of which neighbours overlap by a block, by distance: (T, (diagonals + 1) block, ...)."""
    block = windows.shape[3]
    by_distance = windows.new_zeros((windows.shape[0], (windows.shape[1] + 1) * block, *windows.shape[4:]))
    by_distance[:, :-block] += windows[:, :, 0].flatten(1, 2)
    by_distance[:, block:] += windows[:, :, 1].flatten(1, 2)
    return by_distance


def _fold(by_distance: Tensor, row: int, total: Tensor) -> None:
    """Add (T, distances, ...), of which the first is that of table row `row`, to (T, R, ...): what lies beyond belongs to the edge rows."""
    rows = total.shape[1]
    below = min(max(-row, 0), by_distance.shape[1])
    inside = min(max(rows - row, below), by_distance.shape[1])
    if inside > below:
        total[:, row + below : row + inside] += by_distance[:, below:inside]
    total[:, 0] += by_distance[:, :below].sum(1)
    total[:, -1] += by_distance[:, inside:].sum(1)
