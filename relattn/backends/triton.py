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

from relattn.arguments import DIFFERENTIABLE, Settings, Tensors, empty_gradient, empty_with_layout, hidden_from
from relattn.backends import autotune, blocked

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
# Bytes of the tiles of weights and of score gradients in memory; 0 = by the size of the device.
_TILE_BYTES = 0


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
    from relattn.backends import triton_backward  # it needs what is defined here

    triton_backward.Backward(tensors, settings, seed, gradients, grad_output, lse).run(grad_lse, output)
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
        self._prepared: dict[tuple[str, ...] | None, tuple[Any, Any, dict[str, Any]]] = {}

    def _plus(self, query: Tensor, bias: Tensor | None) -> Tensor:
        result = empty_with_layout(query, query.shape)
        return result.copy_(query) if bias is None else torch.add(query, bias[:, None, :], out=result)

    def _run(self, kernel: str, launch: Callable[[Any], None], largest_block: int = 2**30, block: int | None = None) -> int:
        """Launch with the best configuration, with a smaller one where the chip lacks the room; the block size that it was."""
        if _CONFIGURATION is not None:
            candidates = [_kernels().configs.Configuration(*_CONFIGURATION)]
        else:
            size, extra = max(self.size, self.value_size), self.rel_q is not None or self.rel_v is not None
            target, clipped = _target(self.query_u.device), self._clipped(16)
            candidates = _kernels().configs.configurations(kernel, target, size, self.dtype.itemsize, clipped, extra)
        tuned = autotune.wanted() and _CONFIGURATION is None
        if tuned and block is None:  # a block that is given comes with its few configurations
            candidates = _kernels().configs.alternatives(candidates)
        candidates = [candidate for candidate in candidates if candidate.block <= largest_block and block in (None, candidate.block)]
        if len(candidates) > 1 and tuned:
            candidates = autotune.by_speed(kernel, self._key(), candidates, launch, _does_not_go, self.query_u.device)
        for candidate, smaller in itertools.zip_longest(candidates, candidates[1:]):
            try:
                launch(candidate)
            except Exception as error:
                if smaller is None or not _does_not_go(error):
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
        precision = "interpreter" if INTERPRETED else "tf32" if self.dtype == torch.float32 and _tf32() else "ieee"
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

    def _launch(
        self, kernel: str, grid: tuple[int, ...], configuration, clipped: bool = False, again: tuple[str, ...] | None = None,
        **arguments: Any,
    ) -> None:  # fmt: skip
        """`again`: a name for this call's launches that differ in sizes and new tensors only; Triton prepares the first of them."""
        # Triton launches on the current device.
        on_device = contextlib.nullcontext() if INTERPRETED else torch.cuda.device(self.query_u.device)
        if again in self._prepared:
            compiled, names, known = self._prepared[again]
            known = known | arguments
            with on_device:
                compiled[(*grid, 1, 1)[:3]](*(known[name] for name in names))
            return
        function, names = _kernels().kernel(kernel)
        constants = self._constants(configuration) | {"CLIPPED": clipped}
        tile = _kernels().operands.Tile(**{name: constants[name] for name in _kernels().operands.Tile._fields})
        arguments = self._shared | constants | arguments | {"TILE": tile}
        with on_device:
            compiled = function[grid](**{name: arguments[name] for name in names})
        if again is not None and isinstance(compiled, _kernels().CompiledKernel):
            self._prepared[again] = compiled, function.arg_names, arguments

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


def _does_not_go(error: Exception) -> bool:
    """Whether a configuration failed for want of room, or because its pipeline is beyond this version of Triton's compiler."""
    return isinstance(error, _kernels().OutOfResources) or (isinstance(error, RuntimeError) and "PassManager" in str(error))


def _tf32() -> bool:
    """Whether float32 products may run as tf32, by torch's switch; asking the old one raises where the new one was used."""
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    return torch.backends.cuda.matmul.allow_tf32 if precision == "none" else precision == "tf32"


@functools.cache
def _tile_bytes(device: torch.device) -> int:
    """Of the tiles of weights and score gradients that the backward pass keeps in memory at once, whatever the lengths: a 128th of the
    device's memory, 512 MiB at most."""
    return 2**29 if INTERPRETED else min(2**29, torch.cuda.get_device_properties(device).total_memory // 128)


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
