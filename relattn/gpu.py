"""The Triton backend: kernels/gpu, compiled when first called. Triton is imported then, and not before."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import itertools
import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from relattn import autotune, blocked
from relattn.arguments import DIFFERENTIABLE, Settings, Tensors, empty_gradient, empty_with_layout
from relattn.reference import hidden_from

_LOG2_E = 1.0 / math.log(2.0)
_UNBOUNDED = 2**62 + 1
_TABLES = ("rel_k", "rel_q", "rel_v", "rel_bias")

# Triton's interpreter runs the kernels on CPU tensors, very slowly: for tests. Triton reads the variable when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
# (queries and keys of a tile, warps, stages) instead of the table's; None = the table's. Splits of the keys; 0 = by the size of the call.
# Programs that the gradient of a table is cut into; 0 = by the size of the machine. Tests cut finer.
_CONFIGURATION: tuple[int, int, int] | None = None
_SPLITS = 0
_TABLE_PROGRAMS = 0


def _why_missing() -> str | None:
    if not INTERPRETED and not torch.backends.cuda.is_built():  # True of builds for ROCm too
        return "torch sees no GPU"
    try:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
    except Exception as error:  # a broken installation must not break `import relattn`
        return f"Triton cannot be found: {error}"
    if importlib.util.find_spec("relattn.kernels") is None:
        return "this is a source tree without relattn.kernels: pip install -e ."
    return None


_missing = _why_missing()  # at import: what torch.compile traces then sees a constant


def unavailable() -> str | None:
    if _missing is not None or INTERPRETED:
        return _missing
    # Not at import: asking starts the driver, and a process forked afterwards cannot use the GPU.
    return None if torch.cuda.is_available() else "torch sees no GPU"


def unsupported(tensors: Tensors, settings: Settings) -> str | None:
    query = tensors.query
    if not INTERPRETED:
        if query.device.type != "cuda":
            return f"it runs on GPU tensors, and these are on {query.device}"
        if torch.version.hip is None and torch.cuda.get_device_properties(query.device).major < 8:
            return "it needs compute capability 8.0 or newer (Ampere)"
    elif query.device.type != "cpu":
        return f"TRITON_INTERPRET is set, and these are on {query.device}"
    if query.dtype == torch.float64:
        return "it computes in float32, and these are torch.float64"
    if max(query.shape[3], tensors.value.shape[3]) > 256:
        return f"head sizes go to 256, and these are {query.shape[3]} and {tensors.value.shape[3]}"
    if tensors.attn_mask is not None and tensors.attn_mask.requires_grad:
        return "attn_mask requires a gradient"
    return None


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("relattn.kernels.gpu")


def forward(tensors: Tensors, settings: Settings, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, Lq, Dv) and log-sum-exp (B, Hq, Lq)."""
    query = tensors.query
    batch, heads, length, _ = query.shape
    output = empty_with_layout(query, (batch, heads, length, tensors.value.shape[3]))
    lse = query.new_empty((batch, heads, length), dtype=torch.float32)
    if output.numel() == 0 or tensors.key.numel() == 0:
        return output.zero_(), lse.fill_(-torch.inf)
    call = _Call(tensors, settings, seed)
    call.forward(output, lse)
    return output, lse


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
    """Gradients of the differentiable tensors for which `needs` is True, in the order of `DIFFERENTIABLE`."""
    if needs[DIFFERENTIABLE.index("attn_mask")]:  # not through `unsupported`, but the operator can be called by itself
        return blocked.backward(grad_output, grad_lse, tensors, settings, output, lse, seed, needs)
    differentiable = zip(DIFFERENTIABLE, tensors, needs, strict=False)
    gradients = {name: empty_gradient(tensor) for name, tensor, need in differentiable if need and tensor is not None}
    if output.numel() == 0 or tensors.key.numel() == 0:
        return [gradient.zero_() for gradient in gradients.values()]
    call = _Call(tensors, settings, seed)
    call.backward(grad_output, grad_lse, output, lse, gradients)
    return list(gradients.values())


def _operand(tensor: Tensor | None, dims: str = "bhrc") -> Any:
    """An Operand of some of the dimensions batch, head, row and column, with stride 0 where it broadcasts."""
    if tensor is None:
        return None
    operands = _kernels().operands
    strides = dict.fromkeys("bhrc", operands.LACKING) | dict.fromkeys(dims, 0)
    own = dims[len(dims) - tensor.dim() :]
    strides |= {dim: 0 if size == 1 else stride for dim, size, stride in zip(own, tensor.shape, tensor.stride(), strict=True)}
    return operands.Operand(tensor, *strides.values())


def _whole(tensor: Tensor) -> Any:
    """The Operand of a tensor (B, H, rows, columns)."""
    return _kernels().operands.Operand(tensor, *tensor.stride())


def _near(tensor: Tensor) -> Tensor:
    """A copy of what lies so far apart in memory that offsets inside a tile overflow 32 bits."""
    return tensor.contiguous() if any(abs(stride) >= 2**23 for stride in tensor.stride()[-2:]) else tensor


class _Call:
    """One call's tensors as the kernels take them, and the launches."""

    def __init__(self, tensors: Tensors, settings: Settings, seed: Tensor) -> None:
        query = tensors.query
        self.dtype = query.dtype
        self.batch, self.heads, self.queries, self.size = query.shape
        self.key_heads, self.keys, self.value_size = *tensors.key.shape[1:3], tensors.value.shape[3]
        self.key, self.value, self.seed, self.settings = _near(tensors.key), _near(tensors.value), seed, settings
        self.pos_bias_u, self.pos_bias_v = tensors.pos_bias_u, tensors.pos_bias_v
        self.query_u, self.query_v = _near(query), None
        if self.pos_bias_u is not None or self.pos_bias_v is not None:
            self.query_u = self._plus(query, self.pos_bias_u)
            self.query_v = self._plus(query, self.pos_bias_v) if tensors.rel_k is not None else None
        tables = (tensors.rel_k, tensors.rel_q, tensors.rel_v)
        self.rel_k, self.rel_q, self.rel_v = (None if table is None else table.to(self.dtype) for table in tables)
        self.rel_bias = tensors.rel_bias
        self.table_rows = settings.left + settings.right + 1
        self.key_mask = None if tensors.key_mask is None else tensors.key_mask.view(torch.uint8)
        mask = tensors.attn_mask
        self.hidden_from = 0.0 if mask is None or mask.dtype == torch.bool else hidden_from(mask.dtype)
        self.mask = mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask
        # Only a mask or a bias that is added makes scores so large that the log-sum-exp does not hold what it should.
        self.exact = self.rel_bias is None and (self.mask is None or self.mask.dtype == torch.uint8)
        self.keep_scale = 1.0 / (1.0 - settings.dropout_p) if settings.dropout_p < 1.0 else 0.0
        self.key_lengths, self.offsets = tensors.key_lengths, tensors.query_offsets
        self.first, self.last = -_UNBOUNDED, _UNBOUNDED
        if settings.window_left is not None:
            self.first = max(settings.query_offset - settings.window_left, 1 - _UNBOUNDED)
        right = 0 if settings.is_causal else settings.window_right
        if right is not None:
            self.last = min(settings.query_offset + right, _UNBOUNDED - 1)
        self.table_start = settings.query_offset - settings.left  # the tables' first row, as key index minus query index

    def _plus(self, query: Tensor, bias: Tensor | None) -> Tensor:
        result = empty_with_layout(query, query.shape)
        return result.copy_(query) if bias is None else torch.add(query, bias[:, None, :], out=result)

    def _run(self, kernel: str, launch: Callable[[Any], None], largest_block: int = 2**30) -> int:
        """Launch with the best configuration, with a smaller one where the chip lacks the room; the block size that it was."""
        if _CONFIGURATION is not None:
            candidates = [_kernels().configs.Configuration(*_CONFIGURATION)]
        else:
            size, extra = max(self.size, self.value_size), self.rel_q is not None or self.rel_v is not None
            target, clipped = _target(self.query_u.device), self._clipped(16)
            candidates = _kernels().configs.configurations(kernel, target, size, self.dtype.itemsize, clipped, extra)
        candidates = [candidate for candidate in candidates if candidate.block <= largest_block]
        if len(candidates) > 1 and autotune.wanted():
            device = self.query_u.device
            candidates = autotune.by_speed(kernel, self._key(), candidates, launch, _kernels().OutOfResources, device)
        for candidate, smaller in itertools.zip_longest(candidates, candidates[1:]):
            try:
                launch(candidate)
            except (_kernels().OutOfResources, RuntimeError) as error:
                compiler = not isinstance(error, _kernels().OutOfResources)  # some pipelines are beyond some versions of it
                if smaller is None or (compiler and "PassManager" not in str(error)):
                    raise
                _warn_once(f"relattn: the {kernel} kernel falls from {candidate} to {smaller}: {error}")
            else:
                break
        return candidate.block

    def _key(self) -> str:
        """What decides which configuration is fastest, for autotuning: lengths and the number of heads by powers of two."""
        terms = [name for name in _TABLES if getattr(self, name) is not None]
        sizes = [1 << (size - 1).bit_length() for size in (self.batch * self.heads, self.queries, self.keys)]
        causal = "causal" if self.last < _UNBOUNDED else "both ways"
        return " ".join(map(str, (self.dtype, self.size, self.value_size, *sizes, causal, *terms, "clipped" * self._clipped(16))))

    def _diagonals(self, block: int) -> tuple[int, int]:
        """Of the tiles' first key minus first query, in blocks: the lowest and the highest that some query sees."""
        lowest, highest = -((self.queries - 1) // block), (self.keys - 1) // block
        if self.offsets is None:  # seen: t * block + block - 1 >= first, t * block - (block - 1) <= last
            lowest = max(lowest, -((block - 1 - self.first) // block))
            highest = min(highest, (self.last + block - 1) // block)
        return lowest, highest

    def _clipped(self, block: int) -> bool:
        """Whether tiles may lie beyond the tables, where one row stands for all their distances."""
        if (self.rel_k is None and self.rel_bias is None) or self.rel_q is not None or self.rel_v is not None:
            return False
        return self.offsets is not None or self._beyond(block)

    def _beyond(self, block: int) -> bool:
        lowest, highest = self._diagonals(block)
        return lowest * block + block - 1 <= self.table_start or highest * block - block + 1 >= self.table_start + self.table_rows - 1

    def _constants(self, configuration) -> dict[str, Any]:
        block, warps, stages = configuration
        precision = "interpreter" if INTERPRETED else "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
        power = _kernels().next_power_of_2
        return dict(
            BLOCK=block, SIZE=self.size, COLUMNS=max(16, power(self.size)), VALUE_SIZE=self.value_size,
            VALUE_COLUMNS=max(16, power(self.value_size)), LATE=self.exact and self.settings.scale > 0.0,
            DROPOUT=self.settings.dropout_p > 0.0, PRECISION=precision, num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip

    @functools.cached_property
    def _shared(self) -> dict[str, Any]:
        """Arguments that most kernels take."""
        settings, operands = self.settings, _kernels().operands
        tables = (_operand(table, "hrc") for table in (self.rel_k, self.rel_q, self.rel_v))
        threshold = min(round(settings.dropout_p * 2**32), 2**32 - 1)  # at p = 1 what is kept all the same is multiplied by 0
        return dict(
            inputs=operands.Inputs(
                _whole(self.query_u), None if self.query_v is None else _whole(self.query_v), _whole(self.key), _whole(self.value),
                *tables, _operand(self.rel_bias, "hr"), _operand(self.key_mask, "bc"), _operand(self.mask),
                self.key_lengths, self.offsets, self.seed,
            ),
            units=operands.Units(float(settings.scale), settings.scale * _LOG2_E, self.hidden_from, self.keep_scale),
            heads=self.heads, group=self.heads // self.key_heads, queries=self.queries, keys=self.keys, batches=self.batch,
            table_rows=self.table_rows, table_start=self.table_start, first=self.first, last=self.last,
            threshold=threshold - 2**32 if threshold >= 2**31 else threshold,
        )  # fmt: skip

    def _launch(self, kernel: str, grid: tuple[int, ...], configuration, clipped: bool = False, **arguments) -> None:
        function, names = _kernels().kernel(kernel)
        constants = self._constants(configuration) | {"CLIPPED": clipped}
        tile = _kernels().operands.Tile(**{name: constants[name] for name in _kernels().operands.Tile._fields})
        arguments = self._shared | constants | arguments | {"TILE": tile}
        device = self.query_u.device
        with contextlib.nullcontext() if INTERPRETED else torch.cuda.device(device):  # Triton launches on the current device
            function[grid](**{name: arguments[name] for name in names})

    def _splits(self, programs: int, block: int) -> int:
        """How many parts the keys are cut into, where queries alone leave the chip idle."""
        tiles = -(-self.keys // block)
        if _SPLITS:
            return min(_SPLITS, tiles)
        if INTERPRETED:
            return 1
        room = 2 * _processors(self.query_u.device) // programs
        return max(1, min(room, tiles // 4, 128))

    def forward(self, output: Tensor, lse: Tensor) -> None:
        self._run("forward", functools.partial(self._forward, output, lse))

    def _forward(self, output: Tensor, lse: Tensor, configuration) -> None:
        block = configuration.block
        query_blocks = -(-self.queries // block)
        programs = query_blocks * self.batch * self.heads
        splits = self._splits(programs, block)
        split_keys = -(-self.keys // splits // block) * block
        splits = -(-self.keys // split_keys)
        parts, part_lse = output, lse
        if splits > 1:
            parts = torch.empty((splits, *output.shape), dtype=torch.float32, device=output.device)
            part_lse = torch.empty((splits, *lse.shape), dtype=torch.float32, device=output.device)
        self._launch(
            "forward", (programs, splits), configuration, clipped=self._clipped(block), lse=part_lse, split_keys=split_keys,
            output=_whole(parts if splits == 1 else parts[0]),
        )  # fmt: skip
        if splits > 1:
            rows = self.batch * self.heads * self.queries
            self._launch(
                "combine", (-(-rows // 4),), configuration._replace(block=4, num_warps=4), partial=parts, partial_lse=part_lse,
                output=_whole(output), lse=lse, splits=splits, rows=rows,
            )  # fmt: skip

    def backward(
        self, grad_output: Tensor, grad_lse: Tensor | None, output: Tensor, lse: Tensor, gradients: dict[str, Tensor]
    ) -> None:  # fmt: skip
        need = gradients.keys()
        grad_output = _near(grad_output)
        any_clipped = self._clipped(16)  # with larger tiles fewer are far

        def per_query(*sizes: int) -> Tensor:
            return torch.empty((*sizes, *lse.shape), dtype=torch.float32, device=lse.device)

        saved = _kernels().operands.Saved(
            per_query(), per_query(), None if self.exact else per_query(), per_query(2) if any_clipped else None
        )
        common = dict(grad_output=_whole(grad_output), saved=saved)
        grad_lse = None if grad_lse is None else grad_lse.contiguous()

        def grid(block: int, length: int, heads: int) -> tuple[int]:
            return (-(-length // block) * self.batch * heads,)

        def prepare(configuration) -> None:
            programs = grid(configuration.block, self.queries, self.heads)
            self._launch(
                "prepare", programs, configuration, clipped=any_clipped, **common, output=_whole(output), lse=lse, grad_lse=grad_lse
            )  # fmt: skip

        def query_gradient(configuration) -> None:
            programs, clipped = grid(configuration.block, self.queries, self.heads), self._clipped(configuration.block)
            self._launch(
                "query_gradient", programs, configuration, clipped=clipped, **common, grad_query=_whole(grad_query), edge_sums=edge_sums
            )  # fmt: skip

        def key_gradient(configuration) -> None:
            programs, clipped = grid(configuration.block, self.keys, self.key_heads), self._clipped(configuration.block)
            self._launch(
                "key_gradient", programs, configuration, clipped=clipped, **common,
                grad_key=_whole(grad_key), grad_value=_whole(grad_value), key_sums=key_sums,
            )  # fmt: skip

        self._run("prepare", prepare)
        by_table = need & {"rel_k", "rel_bias", "pos_bias_v"}
        edge_sums, far_block = None, 0
        if "query" in need or (any_clipped and by_table):
            edge_sums = per_query(2) if any_clipped else None
            grad_query = gradients["query"] if "query" in need else torch.empty_like(self.query_u)
            far_block = self._run("query_gradient", query_gradient)
        if need & {"key", "value", "pos_bias_u"}:
            grad_key = gradients["key"] if "key" in need else torch.empty_like(self.key)
            grad_value = gradients["value"] if "value" in need else torch.empty_like(self.value)
            key_sums = None
            if "pos_bias_u" in need:
                key_sums = torch.empty((self.batch, self.heads, self.keys), dtype=torch.float32, device=lse.device)
            self._run("key_gradient", key_gradient)
            if key_sums is not None:
                sums = key_sums.unflatten(1, (self.key_heads, -1))
                total = torch.einsum("bngj,bnjd->ngd", sums, self.key.float()).flatten(0, 1)
                gradients["pos_bias_u"].copy_(total * self.settings.scale)
        if by_table:
            # With offsets by batch element the diagonals' tiles are not those whose edge sums are known: all are walked.
            far = edge_sums if far_block and self._clipped(far_block) and self.offsets is None else None
            self._content_gradients(gradients, common, far, far_block)
        for name in ("rel_q", "rel_v"):
            if name in need:
                found, _ = self._table_gradient(name, gradients[name], False, common, 0)
                assert found is not None
                factor = self.settings.scale if name == "rel_q" else self.keep_scale
                gradients[name].copy_((found * factor).view(gradients[name].shape))

    def _content_gradients(self, gradients: dict[str, Tensor], common: dict[str, Any], far: Tensor | None, far_block: int) -> None:
        """Gradients of rel_k, rel_bias and pos_bias_v. `far` (2, B, H, Lq): what tiles of far_block far from the tables owe their edges."""
        want_sums = bool(gradients.keys() & {"rel_bias", "pos_bias_v"})
        total, sums = self._table_gradient("rel_k", gradients.get("rel_k"), want_sums, common, 0 if far is None else far_block)
        if far is not None:
            content = self.query_u if self.query_v is None else self.query_v
            if total is not None:
                owed = torch.einsum("sbhi,bhid->hsd", far, content.float())
                owed = owed.sum(0, keepdim=True) if total.shape[0] == 1 else owed
                total[:, 0] += owed[:, 0]
                total[:, -1] += owed[:, 1]
            if sums is not None:
                left, right = far.sum((1, 3))
                sums[:, 0] += left
                sums[:, -1] += right
        if total is not None:
            gradients["rel_k"].copy_((total * self.settings.scale).view(gradients["rel_k"].shape))
        if sums is not None and "rel_bias" in gradients:
            gradients["rel_bias"].copy_(sums if gradients["rel_bias"].dim() == 2 else sums.sum(0))
        if sums is not None and "pos_bias_v" in gradients:
            assert self.rel_k is not None
            table = self.rel_k.float().expand(self.heads, -1, -1)
            gradients["pos_bias_v"].copy_(torch.bmm(sums[:, None], table)[:, 0] * self.settings.scale)

    def _table_gradient(
        self, name: str, gradient: Tensor | None, want_sums: bool, common: dict[str, Any], far_block: int
    ) -> tuple[Tensor | None, Tensor | None]:
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
                "table_gradient", (diagonals, head_groups, splits), configuration, **common,
                partial=partial, partial_sums=partial_sums, diagonals=diagonals, first_diagonal=lowest,
                shared_heads=self.heads // head_groups, chunk_batches=batches, chunk=chunk,
                TABLE="sums" if total is None else name, ABSORB=absorb, FAR=far_block > 0, FAR_BLOCK=near,
            )  # fmt: skip
            row = lowest * block - (block - 1) - self.table_start
            if total is not None and partial is not None:
                windows = partial.sum(0)
                _fold(windows.sum(0, keepdim=True) if groups == 1 else windows, row, total)
            if sums is not None and partial_sums is not None:
                _fold(partial_sums.sum(0), row, sums)

        self._run("table_gradient", table_gradient, far_block or 2**30)
        return total, sums

    def _cut(self, diagonals: int, groups: int, block: int, near: int) -> tuple[int, int, int]:
        """How a table's gradient is divided among programs: groups of heads, batch elements and queries of a program."""
        wanted = _TABLE_PROGRAMS or (4 if INTERPRETED else 4 * _processors(self.query_u.device))
        wanted = max(1, wanted // diagonals)
        head_groups = groups
        if groups == 1:
            head_groups = max(count for count in range(1, self.heads + 1) if self.heads % count == 0 and count <= wanted)
        wanted = -(-wanted // head_groups)
        batches = -(-self.batch // min(wanted, self.batch))
        wanted = -(-wanted // -(-self.batch // batches))
        blocks = -(-self.queries // near)
        return head_groups, batches, -(-blocks // min(wanted, blocks)) * near


def _fold(windows: Tensor, row: int, total: Tensor) -> None:
    """Add windows (T, diagonals, 2, block, ...) to a table's gradient (T, R, ...): neighbours overlap by a block, the first begins at
    `row`, and what lies beyond the table belongs to its edge rows."""
    diagonals, block, rows = windows.shape[1], windows.shape[3], total.shape[1]
    by_distance = windows.new_zeros((windows.shape[0], (diagonals + 1) * block, *windows.shape[4:]))
    by_distance[:, :-block] += windows[:, :, 0].flatten(1, 2)
    by_distance[:, block:] += windows[:, :, 1].flatten(1, 2)
    below = min(max(-row, 0), by_distance.shape[1])
    inside = min(max(rows - row, below), by_distance.shape[1])
    if inside > below:
        total[:, row + below : row + inside] += by_distance[:, below:inside]
    total[:, 0] += by_distance[:, :below].sum(1)
    total[:, -1] += by_distance[:, inside:].sum(1)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _target(device: torch.device) -> str:
    """"sm_90", "gfx942"; "interpreter"."""
    if INTERPRETED:
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
