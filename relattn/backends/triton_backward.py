"""The Triton backend's backward pass: which kernels, in which parts, and what becomes of what they sum."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from relattn.arguments import Settings
from relattn.backends import triton as launcher
from relattn.backends.tape import Slot

_MATRICES = 8  # of a table: so many `table_sum_kernel` adds up itself
_SMALL = 64  # tiles for each of the GPU's processors: of parts up to that size all products are one launch


class Backward(launcher.Call):
    """One call's gradients: `named` has those that are `wanted`, as grad_<name>, to be filled; beside them grad_output, grad_lse (or not),
    output and lse."""

    def __init__(self, named: dict[str, Tensor], settings: Settings, kind: tuple[Any, ...], wanted: Collection[str]) -> None:
        super().__init__(named, settings, kind)
        self.wanted = frozenset(wanted)
        self.group = self.heads // self.key_heads
        self.any_clipped = self._clipped(16)  # with larger tiles fewer are far
        per_query, new = self.per_query, self.tape.new
        hides = self.hides or "key_lengths" in self.names
        saved = launcher._kernels().operands.Saved(
            new("delta", per_query), new("base", per_query), None if self.exact else new("inverse", per_query),
            new("edges", (2, *per_query)) if self.any_clipped else None,
            new("wild", (self._programs(16, self.queries, self.heads),), torch.uint8) if hides else None,
        )  # fmt: skip
        self.arguments |= dict(
            HIDES=hides, saved=self.tape.group("saved", saved), grad_output=self.tape.group("slopes", self._operand("grad_output"))
        )
        self.want_sums = bool(self.wanted & {"rel_bias", "pos_bias_v"})
        # Where rel_k wants a gradient, score gradients go to memory, since distances and queries sum them differently. Of large heads all
        # gradients are products of what is there: registers do not hold their sums.
        diagonals = self.packed or self.any_clipped or {"offsets", "rel_q", "rel_v"} & self.names  # tables.py serves
        self.by_tiles = not diagonals and "rel_k" in self.wanted
        self.products = self.by_tiles and self.size > 64 and self.dtype.itemsize == 2
        self.key_sums = new("key_sums", (*self.per_query[:2], self.keys)) if "pos_bias_u" in wanted else None
        self.sums = new("sums", (self.heads, self.table_rows, 1)) if self.want_sums else None  # of score gradients, by table row
        self.summed = False  # whether that and rel_k's gradient are there
        # What far tiles owe to the tables' edges: score gradients per query (2, B, H, Lq), and these times the queries
        # (2, programs, D).
        self.edge_sums: Slot | None = None
        self.edge_owed: Slot | None = None

    def backward(self) -> None:
        self._run("prepare", self._prepare)
        wanted, by_table, far_block = self.wanted, bool(self.wanted & {"rel_k", "rel_bias", "pos_bias_v"}), 0
        if "query" in wanted or self.by_tiles or (self.any_clipped and by_table):
            far_block = self._run("query_gradient", self._query_gradient)
        if wanted & {"key", "value", "pos_bias_u"} and not (self.products and self.summed):
            self._run("key_gradient", self._key_gradient)
        if self.key_sums is not None:
            biases = functools.partial(_pos_bias_u, groups=self.key_heads, scale=self.settings.scale)
            self.tape.torch(biases, self.key_sums, Slot("key"), Slot("grad_pos_bias_u"))
        if by_table and not self.summed:
            # With offsets by batch element the diagonals' tiles are not those whose edge sums are known: all are walked.
            known = far_block > 0 and self._clipped(far_block) and "offsets" not in self.names
            self._table_gradient("rel_k" if "rel_k" in wanted else None, self.sums, far_block if known else 0)
        if "rel_bias" in wanted:
            assert self.sums is not None
            self.tape.torch(_rel_bias, self.sums, Slot("grad_rel_bias"))
        if "pos_bias_v" in wanted:
            assert self.sums is not None
            self.tape.torch(functools.partial(_pos_bias_v, scale=self.settings.scale), self.sums, Slot("rel_k"), Slot("grad_pos_bias_v"))
        for name in ("rel_q", "rel_v"):
            if name in wanted:
                self._table_gradient(name, None, 0)

    def _gradient(self, name: str) -> Any:
        """Where one of query, key and value gets its gradient, or what nobody wants of it."""
        if name in self.wanted:
            return self._operand(f"grad_{name}")
        tensor = self.tape.live["query_u" if name == "query" else name]
        return self._operand(self.tape.new(f"unwanted_{name}", tuple(tensor.shape), tensor.dtype))

    def _prepare(self, configuration: Any) -> None:
        programs = self._programs(configuration.block, self.queries, self.heads)
        grad_lse = Slot("grad_lse") if "grad_lse" in self.names else None
        rows = dict(output=self._operand("output"), lse=Slot("lse"), grad_lse=grad_lse)
        self._launch("prepare", (programs,), configuration, self.any_clipped, **rows)

    def _query_gradient(self, configuration: Any) -> None:
        block, clipped = configuration.block, self._clipped(configuration.block)
        programs = self._programs(block, self.queries, self.heads)
        self.summed = False
        self.edge_sums = self.tape.new("edge_sums", (2, *self.per_query)) if self.any_clipped else None
        owed = clipped and "rel_k" in self.wanted
        self.edge_owed = self.tape.new("edge_owed", (2, programs, self.size)) if owed else None
        launch = functools.partial(
            self._launch, "query_gradient", configuration=configuration, clipped=clipped,
            edge_sums=self.edge_sums, edge_owed=self.edge_owed,
        )  # fmt: skip
        if self.by_tiles and block >= 32:
            self._parts(launch, block)
        else:
            launch(
                grid=(programs,), kept_tiles=None, grad_tiles=None, owed_tiles=None, running=None, ADD=True,
                grad_query=self._gradient("query"), first_pair=0, columns=0, key_begin=0, key_end=self.keys,
            )  # fmt: skip

    def _key_gradient(self, configuration: Any) -> None:
        block = configuration.block
        self._launch(
            "key_gradient", (self._programs(block, self.keys, self.key_heads),), configuration, self._clipped(block),
            grad_key=self._gradient("key"), grad_value=self._gradient("value"), key_sums=self.key_sums,
        )  # fmt: skip

    def _parts(self, launch: Callable[..., None], block: int) -> None:
        """Gradients by way of tiles in memory, one part of the heads and the keys at a time: of queries; of keys and values if `products`;
        of rel_k, and `sums` where they are wanted. The order of the parts is fixed, and so are the bits of the sums."""
        pairs, new = self.batch * self.heads, self.tape.new
        rows, all_columns = -(-self.queries // block), -(-self.keys // block)
        at_once, columns = self._part(rows, all_columns, block)
        whole = at_once == pairs and columns == all_columns

        def tiles(name: str, wanted: bool) -> Slot | None:  # one column more: what the last one owes
            return new(name, (at_once * rows, columns + 1, block, block), self.dtype) if wanted else None

        kept, grad, owed = tiles("kept", self.products and "value" in self.wanted), tiles("grad", self.products), tiles("owed", True)
        running = new("running", (at_once * rows, block, self.size)) if self.products or columns < all_columns else None
        partial = new("partial", (at_once, rows + columns, block, self.size))
        partial_sums = new("partial_sums", (at_once, rows + columns, block)) if self.want_sums else None
        grad_query, total = self._gradient("query"), None
        if not whole:
            total = new("total", (self._tables("rel_k"), self.table_rows, self.size))
            for slot in (total, self.sums):
                if slot is not None:
                    self.tape.torch(torch.Tensor.zero_, slot)
        for pair, column in itertools.product(range(0, pairs, at_once), range(0, all_columns, columns)):
            here, some = min(at_once, pairs - pair), min(columns, all_columns - column)
            begin, end = column * block, min((column + some) * block, self.keys)
            numbers: dict[str, Any] = dict(first_pair=pair, columns=columns + 1, key_begin=begin, key_end=end)
            tiles_there = dict(kept_tiles=kept, grad_tiles=grad, owed_tiles=owed, running=running, grad_query=grad_query)
            launch(grid=(here * rows,), ADD=not self.products, **tiles_there, **numbers)
            self._product(block, some, partial=partial, partial_sums=partial_sums, pairs=here, **tiles_there, **numbers)
            distances: dict[str, Any] = dict(count=here, first_pair=pair, distances=(rows + some) * block)
            first_row = (column - rows + 1) * block - (block - 1) - self.table_start
            self._table_sum("rel_k", partial, first_row, total, HALVES=1, **distances)
            if partial_sums is not None:
                self._table_sum(None, partial_sums, first_row, None if whole else self.sums, HALVES=1, **distances)
        if total is not None:
            self.tape.torch(functools.partial(_scaled, scale=self.settings.scale), total, Slot("grad_rel_k"))
        self.summed = True

    def _part(self, rows: int, columns: int, block: int) -> tuple[int, int]:
        """Heads (of batch elements) and columns of tiles at once: enough programs to fill the chip, a few times over where some have less
        to do than others, and as many keys as there is room for. Short sequences: as many heads as there is room for."""
        group = self.group
        units = self.batch * self.key_heads  # heads that share a key head stay together
        budget = self._budget()
        slots = 2 * launcher._processors(self.device)
        slots *= 1 if self.first == -launcher._UNBOUNDED and self.last == launcher._UNBOUNDED else 4
        count = max(1, slots // (rows * group))
        column = group * rows * block * block * self.dtype.itemsize * (3 if self.products else 1)
        whole = budget // max(column * (columns + 1), group * (rows + columns) * block * self.size * 4)  # and its `partial`
        count = min(units, whole if whole >= min(units, 3 * count) else count)
        count = -(-units // -(-units // count))
        room = max(2, budget // (count * column)) - 1
        return count * group, -(-columns // -(-columns // room))

    def _budget(self) -> int:
        return launcher._TILE_BYTES or launcher._tile_bytes(self.device)

    def _product(self, block: int, some: int, pairs: int, first_pair: int, **arguments: Any) -> None:
        """All products of a part of `some` blocks of keys; of keys and values only those that are wanted."""
        rows, new = -(-self.queries // block), self.tape.new
        key_pairs, begin = pairs // self.group, arguments["key_begin"]
        values = self.products and "value" in self.wanted
        keys = self.products and bool({"key", "pos_bias_u"} & self.wanted)
        # Where few keys leave the chip idle, the queries are cut.
        enough = 2 * launcher._processors(self.device)
        splits = max(1, min(enough // (some * key_pairs), rows // 8)) if values or keys else 1
        chunk = -(-rows // splits) * block
        splits = -(-self.queries // chunk)
        shape = (splits, key_pairs, some * block)
        key_partial = new("key_splits", (*shape, self.size)) if keys and splits > 1 else None
        value_partial = new("value_splits", (*shape, self.value_size)) if values and splits > 1 else None
        key_sums = None if self.key_sums is None or not self.products else new("key_sum_splits", (splits, pairs, some * block))
        to = {f"grad_{name}": self._gradient(name) if self.products else None for name in ("key", "value")}
        arguments |= dict(key_partial=key_partial, value_partial=value_partial, first_pair=first_pair, **to)
        by_key = some * key_pairs * splits
        programs = dict(VALUES=by_key * values, KEYS=by_key * keys, QUERIES=pairs * rows * self.products, DISTANCES=(rows + some) * pairs)
        together = rows * some * pairs <= _SMALL * launcher._processors(self.device)

        def product(jobs: tuple[str, ...], configuration: Any) -> None:
            here = {job: programs[job] if job in jobs else 0 for job in programs}
            numbers: dict[str, Any] = dict(zip(("value_programs", "key_programs", "query_programs"), here.values(), strict=False))
            compiled = {job: count > 0 for job, count in here.items()}
            self._launch(
                "product", (sum(here.values()),), configuration, key_sums=key_sums, chunk=chunk, pairs=pairs,
                **numbers, **compiled, **arguments,
            )  # fmt: skip

        if together or not (values or keys):
            self._run("product", functools.partial(product, tuple(programs)), block=block)
        else:
            self._run("product_by_key", functools.partial(product, ("VALUES", "KEYS")), block=block)
            self._run("product", functools.partial(product, ("QUERIES", "DISTANCES")), block=block)
        if splits > 1:
            join = functools.partial(self._launch, "join", (some, key_pairs, 1 + values), splits=splits, **arguments)
            self._run("join", join, block=block)
        if key_sums is not None and self.key_sums is not None:
            self.tape.torch(functools.partial(_key_sums, pairs=slice(first_pair, first_pair + pairs), start=begin), key_sums, self.key_sums)

    def _tables(self, name: str) -> int:
        """Of how many tables a gradient is: one for each head, or one."""
        return self.heads if self.tape.live[f"grad_{name}"].dim() == 3 else 1

    def _table_sum(
        self, name: str | None, partial: Slot, first_row: int, total: Slot | None, tables: range | None = None, step: int | None = None,
        edges: Slot | None = None, **numbers: Any,
    ) -> None:  # fmt: skip
        """Fold what is there by distance into a table's gradient, or without a name into `sums`; into `total` float32, unscaled, where
        there are more parts of it. The first distance is that of table row first_row."""
        size = 1 if name is None else self.value_size if name == "rel_v" else self.size
        gradient, count, factor = self.sums, self.heads, 1.0
        if name is not None:
            gradient, count = Slot(f"grad_{name}"), self._tables(name)
            factor = 1.0 if total is not None else self.keep_scale if name == "rel_v" else float(self.settings.scale)
        tables, block = tables or range(count), min(256, 4096 // launcher._columns(size))
        numbers = {"chunk": 0, "first_pair": 0, **numbers, "step": step or count}  # a matrix for each head of a batch element
        distances = numbers["distances"]
        held = distances if numbers["HALVES"] == 1 else 2 * (distances - numbers["chunk"])
        if numbers["count"] > _MATRICES * numbers["step"]:
            partial = self._matrix_sum(partial, held * size, tables, 1, numbers["count"], numbers["step"], numbers["first_pair"])
            numbers |= dict(count=len(tables), step=len(tables), first_pair=tables.start)
        seen = 0, distances
        if numbers["HALVES"] == 1:  # a causal mask hides half of the distances: they lie beyond the table's last row, and hold zeros
            begin, end = (bound - first_row - self.table_start for bound in (self.first, self.last + 1))
            seen = max(0, min(begin, distances)), max(0, min(end, distances))
        edge_rows = 0 if edges is None else self.tape.live[edges].numel() // (2 * self.pairs * size)
        edge_numbers: dict[str, Any] = dict(edge_rows=edge_rows, pairs=self.pairs, pair_step=count, first_edge=0)
        if edges is not None and self.pairs > _MATRICES * count:
            edges = self._matrix_sum(edges, edge_rows * size, tables, 2, self.pairs, count, 0)
            edge_numbers |= dict(pairs=len(tables), pair_step=len(tables), first_edge=tables.start)
        self._launch(
            "table_sum", (2 + -(-max(0, self.table_rows - 2) // block), len(tables)),
            launcher._kernels().configs.Configuration(block, 4, 1), size=size,
            partial=partial, gradient=self._operand(total or gradient, "hrc"),
            scale=factor, first_row=max(-distances, min(first_row, self.table_rows)),  # 32 bits, wherever the table lies
            seen_begin=seen[0], seen_end=seen[1],
            first_table=tables.start, edges=edges, ADD=total is not None, **edge_numbers, **numbers,
        )  # fmt: skip

    def _matrix_sum(self, partial: Slot, numbers: int, tables: range, sides: int, count: int, step: int, first_pair: int) -> Slot:
        """Of (sides, count, numbers) the sums of each table's matrices, (sides, tables, numbers)."""
        block = 512
        total = self.tape.new("matrix_sums", (sides, len(tables), numbers))
        self._launch(
            "matrix_sum", (-(-numbers // block), len(tables), sides), launcher._kernels().configs.Configuration(block, 4, 1),
            partial=partial, total=total, numbers=numbers, count=count, step=step, first_pair=first_pair, first_table=tables.start,
        )  # fmt: skip
        return total

    def _table_gradient(self, name: str | None, sums: Slot | None, far_block: int) -> None:
        """The gradient of a table (None: of none), and `sums`, by `table_gradient_kernel`.

        far_block: pairs in tiles of that size that are far from the tables are left out, what they owe is known; 0 = none are.
        """
        count = 1 if name is None else self._tables(name)
        size = self.value_size if name == "rel_v" else self.size

        def table_gradient(configuration: Any) -> None:
            block = configuration.block
            lowest, highest = self._diagonals(block)
            absorb = not far_block and ("offsets" in self.names or self._beyond(block))
            # Diagonals with a distance of the tables' own, t * block + block - 1 > table_start and t * block - (block - 1) < its last row.
            near = far_block or block
            first = -((near - 2 - self.table_start) // near)
            last = (self.table_start + self.table_rows - 2 + near - 1) // near
            if absorb:
                lowest, highest = first - 1, max(last, first) + 1
            else:  # a tile of far_block has those of the diagonals from one above its own to one below
                ratio = near // block
                lowest, highest = max(lowest, first * ratio - (ratio - 1)), min(highest, last * ratio + ratio - 1)
            # All that is visible may be far: then the kernel finds one diagonal without work.
            diagonals = max(1, highest - lowest + 1)
            groups, batches, chunk = self._cut(diagonals, count, block, near)
            splits = -(-self.batch // batches) * -(-self.longest // chunk)
            # As many heads at once as there is room for.
            some = groups if count == 1 else max(1, min(count, self._budget() // (splits * diagonals * 2 * block * size * 4)))
            shared = self.heads // groups
            numbers = dict(distances=(diagonals + 1) * block, chunk=block, HALVES=2)
            row = lowest * block - (block - 1) - self.table_start
            for head in range(0, groups, some):
                here = min(some, groups - head)
                partial, partial_sums = None, None
                if name is not None:
                    partial = self.tape.new("diagonals", (splits, here, diagonals, 2, block, size))
                if sums is not None:
                    partial_sums = self.tape.new("diagonal_sums", (splits, here * shared, diagonals, 2, block))
                self._launch(
                    "table_gradient", (diagonals, here, splits), configuration, partial=partial, partial_sums=partial_sums,
                    diagonals=diagonals, first_diagonal=lowest, first_head=head, shared_heads=shared, chunk_batches=batches, chunk=chunk,
                    TABLE=name or "sums", ABSORB=absorb, FAR=far_block > 0, FAR_BLOCK=near,
                )  # fmt: skip
                if name is not None and partial is not None:
                    one = count == 1
                    self._table_sum(
                        name, partial, row, None, range(1) if one else range(head, head + here), 1 if one else here,
                        self.edge_owed if far_block else None, count=splits * here, first_pair=0 if one else head, **numbers,
                    )  # fmt: skip
                if partial_sums is not None:
                    own = here * shared
                    self._table_sum(
                        None, partial_sums, row, None, range(head, head + own), own, self.edge_sums if far_block else None,
                        count=splits * own, first_pair=head, **numbers,
                    )  # fmt: skip

        self._run("table_gradient", table_gradient, far_block or 2**30)

    def _cut(self, diagonals: int, tables: int, block: int, near: int) -> tuple[int, int, int]:
        """How a table's gradient is divided among programs: groups of heads, batch elements and queries of a program."""
        wanted = launcher._TABLE_PROGRAMS or 4 * launcher._processors(self.device)
        wanted = max(1, wanted // diagonals)
        head_groups = tables
        if tables == 1:
            head_groups = max(count for count in range(1, self.heads + 1) if self.heads % count == 0 and count <= wanted)
        wanted = -(-wanted // head_groups)
        batches = -(-self.batch // min(wanted, self.batch))
        wanted = -(-wanted // -(-self.batch // batches))
        blocks = -(-self.longest // near)
        return head_groups, batches, -(-blocks // min(wanted, blocks)) * near


# What is left to torch: these run on each call's own tensors, and write into the last one.


def _scaled(total: Tensor, gradient: Tensor, scale: float) -> None:
    gradient.copy_((total * scale).view(gradient.shape))


def _key_sums(partial: Tensor, key_sums: Tensor, pairs: slice, start: int) -> None:
    """A part's sums over the queries (splits, pairs, keys) into (B, H, Lk)."""
    stop = min(start + partial.shape[2], key_sums.shape[2])
    key_sums.flatten(0, 1)[pairs, start:stop] = partial.sum(0)[:, : stop - start]


def _counted(equation: str, sums: Tensor, rows: Tensor) -> Tensor:
    """The einsum, of which a sum of 0 leaves out the row that it meets, whatever that holds."""
    wrong = ~rows.isfinite().all(-1, keepdim=True)
    spoiled = torch.einsum(equation, (sums != 0).float(), wrong.float()) > 0
    return torch.einsum(equation, sums, rows.masked_fill(wrong, 0.0)).masked_fill(spoiled, torch.nan)


def _pos_bias_u(key_sums: Tensor, key: Tensor, gradient: Tensor, groups: int, scale: float) -> None:
    total = _counted("bngj,bnjd->ngd", key_sums.unflatten(1, (groups, -1)), key.float())
    gradient.copy_(total.flatten(0, 1) * scale)


def _pos_bias_v(sums: Tensor, rel_k: Tensor, gradient: Tensor, scale: float) -> None:
    table = rel_k.float().expand(sums.shape[0], -1, -1)
    gradient.copy_(_counted("hrx,hrd->hxd", sums, table)[:, 0] * scale)


def _rel_bias(sums: Tensor, gradient: Tensor) -> None:
    gradient.copy_(sums[..., 0] if gradient.dim() == 2 else sums[..., 0].sum(0))
