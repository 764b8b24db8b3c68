"""The Triton backend: kernels/gpu, compiled when first called. Triton is imported then, and not before."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from relattn.arguments import DIFFERENTIABLE, Settings, Tensors, empty_gradient, empty_with_layout, hidden_from
from relattn.backends import autotune, blocked, machine_code
from relattn.backends.tape import Slot, Tape

# Of 16-bit heads that Hopper gets, whatever ptxas is: a smaller one was wrong on an H200, and nobody knows why (docs/gpus.md).
_SMALLEST_HALF = 16
_LOG2_E = 1.0 / math.log(2.0)
_UNBOUNDED = 2**62 + 1
_TABLES = ("rel_k", "rel_q", "rel_v", "rel_bias")
_MOST_STEPS = 2**14  # of all tapes, a kilobyte or two each
_CONFIRMED, _EMULATED = ("sm_90",), ("sm_80",)  # by benchmarks/gpu_check.sh on an H200; by tests/ptx_emulator

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


class KernelError(RuntimeError):
    """A kernel that does not compile or launch, in no configuration."""


# Tapes of the last signatures; why a kind of call has no kernels here (`_kind`); configurations that found no room.
_TAPES: dict[tuple[Any, ...], Tape] = {}
_FAILED: dict[tuple[Any, ...], str] = {}
_WITHOUT_ROOM: set[tuple[Any, ...]] = set()


def forget() -> None:
    """Everything that earlier calls left behind."""
    for kept in (_TAPES, _FAILED, _WITHOUT_ROOM):
        kept.clear()
    warn_once.cache_clear()


def confirmed() -> str:
    """What is known of the kernels on this machine's GPU."""
    target = _target(torch.device("cuda", 0))
    if target in _CONFIRMED:
        return f"usable; on {target} checked and timed"
    tried = "compiled and emulated" if target in _EMULATED else "compiled"
    return f"usable; for {target} {tried}, not yet run on such a GPU: check with benchmarks/gpu_check.sh"


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
    if is_doubtful(query.device, query.dtype, query.shape[3], tensors.value.shape[3]):
        return f"16-bit heads below {_SMALLEST_HALF} gave wrong results on an H200 with this version of Triton's compiler"
    return _FAILED.get(_kind(tensors, settings)) if _FAILED else None


def forward(tensors: Tensors, settings: Settings, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, Lq, Dv) and log-sum-exp (B, Hq, Lq).

    Raises:
        KernelError: a kernel does not compile or launch.
    """
    query = tensors.query
    batch, heads, length, _ = query.shape
    output = empty_with_layout(query, (batch, heads, length, tensors.value.shape[3]), settings.output_dtype(query.dtype))
    lse = query.new_empty((batch, heads, length), dtype=torch.float32)
    if output.numel() == 0 or tensors.key.numel() == 0:
        return output.zero_(), lse.fill_(-torch.inf)
    signature = _signature(tensors, settings)
    named = _named(tensors) | dict(output=output, lse=lse, seed=seed)
    tape = _TAPES.get(signature)
    if tape is not None:
        tape.run(named)
    else:
        call = Call(named, settings, _usable(tensors, settings))
        call.forward()
        _keep(signature, call.tape)
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
    """Gradients of the differentiable tensors for which `needs` is True, in the order of `DIFFERENTIABLE`.

    Raises:
        KernelError: a kernel does not compile or launch.
    """
    if needs[DIFFERENTIABLE.index("attn_mask")]:  # not through `unsupported`, but the operator can be called by itself
        return blocked.backward(grad_output, grad_lse, tensors, settings, output, lse, seed, needs)
    differentiable = zip(DIFFERENTIABLE, tensors, needs, strict=False)
    gradients = {name: empty_gradient(tensor) for name, tensor, need in differentiable if need and tensor is not None}
    if output.numel() == 0 or tensors.key.numel() == 0:
        return [gradient.zero_() for gradient in gradients.values()]
    signature = _signature(tensors, settings, (grad_output, grad_lse, output, lse), needs)
    # One number for many rows, as `output.sum().backward()` gives it: not worth kernels of its own.
    grad_output = _near(grad_output if grad_output.stride(3) == 1 else grad_output.contiguous())
    named = _named(tensors) | dict(grad_output=grad_output, output=output, lse=lse.contiguous(), seed=seed)
    if grad_lse is not None:
        named["grad_lse"] = grad_lse.contiguous()
    named |= {f"grad_{name}": gradient for name, gradient in gradients.items()}
    tape = _TAPES.get(signature)
    if tape is not None:
        tape.run(named)
    else:
        from relattn.backends.triton_backward import Backward  # it needs what is defined here

        call = Backward(named, settings, _usable(tensors, settings), gradients.keys())
        call.backward()
        _keep(signature, call.tape)
    return list(gradients.values())


def _signature(
    tensors: Tensors, settings: Settings, others: Sequence[Tensor | None] = (), needs: Sequence[bool] = ()
) -> tuple[Any, ...]:  # fmt: skip
    """All that decides which kernels are launched, with which numbers: calls of which it is the same share a tape."""
    return (
        *[
            None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16)
            for tensor in (*tensors, *others)
        ],
        settings, tensors.query.device, *needs, _CONFIGURATION, _SPLITS, _TABLE_PROGRAMS, _TILE_BYTES,
        tensors.query.dtype == torch.float32 and _tf32(), autotune.wanted(),
    )  # fmt: skip


def _kind(tensors: Tensors, settings: Settings) -> tuple[Any, ...]:
    """What decides whether kernels compile: dtypes and which terms there are, not lengths."""
    dtypes = (None if tensor is None else tensor.dtype for tensor in tensors)
    return (tensors.query.device, tensors.query.shape[3], tensors.value.shape[3], settings.dropout_p > 0.0, *dtypes)


def _usable(tensors: Tensors, settings: Settings) -> tuple[Any, ...]:
    """`_kind`, if its kernels did not fail before: a compiler takes its time to fail."""
    kind = _kind(tensors, settings)
    if kind in _FAILED:
        raise KernelError(f"relattn: backend 'triton': {_FAILED[kind]}")
    return kind


def _keep(signature: tuple[Any, ...], tape: Tape) -> None:
    tape.close()
    if autotune.wanted() and tape.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return  # nothing was timed
    _TAPES[signature] = tape
    while len(_TAPES) > 1 and sum(map(len, list(_TAPES.values()))) > _MOST_STEPS:
        _TAPES.pop(next(iter(_TAPES)), None)


def _named(tensors: Tensors) -> dict[str, Tensor]:
    """The tensors that kernels read, as they take them, by the names of `Inputs`."""
    query, rel_k = _near(tensors.query), tensors.rel_k
    named = dict(query_u=query, key=_near(tensors.key), value=_near(tensors.value))
    if tensors.pos_bias_u is not None or tensors.pos_bias_v is not None:
        named["query_u"] = _plus(query, tensors.pos_bias_u)
        if rel_k is not None:
            named["query_v"] = _plus(query, tensors.pos_bias_v)
    for name, table in (("rel_k", rel_k), ("rel_q", tensors.rel_q), ("rel_v", tensors.rel_v)):
        if table is not None:
            named[name] = table if table.dtype == query.dtype else table.to(query.dtype)
    for name, mask in (("key_mask", tensors.key_mask), ("mask", tensors.attn_mask)):
        if mask is not None:
            named[name] = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    for name, tensor in (("rel_bias", tensors.rel_bias), ("key_lengths", tensors.key_lengths), ("offsets", tensors.query_offsets)):
        if tensor is not None:
            named[name] = tensor
    for name, ends in (("query_ends", tensors.cu_seqlens_q), ("key_ends", tensors.cu_seqlens_k)):
        if ends is not None:
            named[name] = ends.contiguous()
    return named


def _plus(query: Tensor, bias: Tensor | None) -> Tensor:
    result = empty_with_layout(query, query.shape)
    return result.copy_(query) if bias is None else torch.add(query, bias[:, None, :], out=result)


def _near(tensor: Tensor) -> Tensor:
    """A copy of what lies so far apart in memory that offsets inside a tile overflow 32 bits."""
    _, _, row, column = tensor.stride()
    return tensor.contiguous() if abs(row) >= 2**23 or abs(column) >= 2**23 else tensor


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("relattn.kernels.gpu")


class Call:
    """The first call of a signature: chooses and launches, and leaves a tape. `named`: the tensors by name (`_named`)."""

    def __init__(self, named: dict[str, Tensor], settings: Settings, kind: tuple[Any, ...]) -> None:
        query = named["query_u"]
        self.tape, self.settings, self.kind, self.names = Tape(named), settings, kind, named.keys()
        self.dtype, self.device = query.dtype, query.device
        self.batch, self.heads, self.queries, self.size = query.shape
        self.key_heads, self.keys, self.value_size = *named["key"].shape[1:3], named["value"].shape[3]
        self.longest, self.longest_keys = self.queries, self.keys  # of a batch element, or at most of a packed sequence
        self.pairs = self.batch * self.heads
        self.per_query = (self.batch, self.heads, self.queries)
        self.packed = "query_ends" in named
        if self.packed:
            self.batch = named["query_ends"].shape[0] - 1
            self.longest = min(self.queries, self.queries if settings.max_seqlen_q is None else settings.max_seqlen_q)
            self.longest_keys = min(self.keys, self.keys if settings.max_seqlen_k is None else settings.max_seqlen_k)
        self.table_rows = settings.left + settings.right + 1
        self.first, self.last = -_UNBOUNDED, _UNBOUNDED
        if settings.window_left is not None:
            self.first = max(settings.query_offset - settings.window_left, 1 - _UNBOUNDED)
        right = 0 if settings.is_causal else settings.window_right
        if right is not None:
            self.last = min(settings.query_offset + right, _UNBOUNDED - 1)
        if settings.chunk_size is not None:  # the distances that chunks allow; the kernels bound each query's keys beside
            size, left = settings.chunk_size, settings.chunk_left
            self.last = min(self.last, settings.query_offset + size - 1, _UNBOUNDED - 1)
            if left is not None:
                self.first = max(self.first, settings.query_offset - left * size - (size - 1), 1 - _UNBOUNDED)
        self.table_start = settings.query_offset - settings.left  # the tables' first row, as key index minus query index
        # Only a mask or a bias that is added makes scores so large that the log-sum-exp does not hold what it should. That of a whole call
        # cannot be found anew by a part of it.
        mask = named.get("mask")
        self.plain = "rel_bias" not in named and (mask is None or mask.dtype == torch.uint8)
        self.exact = self.plain or settings.is_part
        # Whether a key that one query sees may be hidden from another, or from all.
        self.hides = bool({"key_mask", "mask"} & self.names) or self.first > -_UNBOUNDED or self.last < _UNBOUNDED
        self.hides |= "rel_v" in self.names  # whose rows may be hidden
        self.keep_scale = 1.0 / (1.0 - settings.dropout_p) if settings.dropout_p < 1.0 else 0.0
        self.arguments = self._arguments(mask)

    def _arguments(self, mask: Tensor | None) -> dict[str, Any]:
        """Those that most kernels take."""
        settings, operands, names = self.settings, _kernels().operands, self.names
        hidden = 0.0 if mask is None or mask.dtype == torch.uint8 else hidden_from(mask.dtype)
        inputs = operands.Inputs(
            *(self._operand(name, "bhrc") for name in ("query_u", "query_v", "key", "value")),
            *(self._operand(name, "hrc") for name in ("rel_k", "rel_q", "rel_v")),
            self._operand("rel_bias", "hr"), self._operand("key_mask", "br"), self._operand("mask", "bhrc"),
            *(Slot(name) if name in names else None for name in ("key_lengths", "offsets", "seed")),
            self._chunk(), self._origin(), *(Slot(name) if name in names else None for name in ("query_ends", "key_ends")),
        )  # fmt: skip
        threshold = min(round(settings.dropout_p * 2**32), 2**32 - 1)  # at p = 1 what is kept all the same is multiplied by 0
        return dict(
            inputs=self.tape.group("inputs", inputs),
            HIDES=self.hides, units=operands.Units(float(settings.scale), settings.scale * _LOG2_E, hidden, self.keep_scale),
            heads=self.heads, group=self.heads // self.key_heads, queries=self.queries, keys=self.keys, batches=self.batch,
            table_rows=self.table_rows, table_start=self.table_start, first=self.first, last=self.last,
            threshold=threshold - 2**32 if threshold >= 2**31 else threshold,
        )  # fmt: skip

    def _chunk(self) -> Any:
        size, left = self.settings.chunk_size, self.settings.chunk_left
        left = -1 if left is None else left
        return None if size is None else _kernels().operands.Chunk(size, left, self.settings.query_offset, self.settings.first_key)

    def _origin(self) -> Any:
        first = (self.settings.first_head, self.settings.first_query, self.settings.first_key)
        return _kernels().operands.Origin(*first) if self.settings.dropout_p > 0.0 and any(first) else None

    def _operand(self, name: str | None, dims: str = "bhrc") -> Any:
        """An Operand of some of the dimensions batch, head, row and column, with stride 0 where a tensor broadcasts. Of none it is None."""
        tensor = None if name is None else self.tape.live.get(name)
        if name is None or tensor is None:
            return None
        operands = _kernels().operands
        strides = dict.fromkeys("bhrc", operands.LACKING) | dict.fromkeys(dims, 0)
        own = dims[len(dims) - tensor.dim() :]
        broadcasts = name in ("rel_k", "rel_q", "rel_v", "rel_bias", "key_mask", "mask")
        for dim, size, stride in zip(own, tensor.shape, tensor.stride(), strict=True):
            strides[dim] = 0 if size == 1 and broadcasts else stride
        if self.packed:
            strides["b"] = operands.LACKING
        return operands.Operand(Slot(name), *strides.values())

    def _run(self, kernel: str, launch: Callable[[Any], None], largest_block: int = 2**30, block: int | None = None) -> int:
        """Launch with the best configuration, with a smaller one where the chip lacks the room; the block size that it was."""
        candidates = self._candidates(kernel, largest_block, block)
        tape = self.tape
        attempts: dict[Any, list[Any]] = {}

        def attempt(candidate: Any) -> None:
            """What is timed launches the same again, many times."""
            if candidate in attempts:
                tape.again(attempts[candidate])
                return
            mark = tape.mark()
            try:
                launch(candidate)
            finally:
                attempts[candidate] = tape.cut(mark)

        if len(candidates) > 1 and autotune.wanted() and _CONFIGURATION is None:
            candidates = autotune.by_speed(kernel, self._key(), candidates, attempt, _does_not_go, self.device)
        for candidate, smaller in itertools.zip_longest(candidates, candidates[1:]):
            mark = tape.mark()
            try:
                launch(candidate)
                return candidate.block
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                tape.cut(mark)
                if smaller is None or not _does_not_go(error):
                    raise self._failure(kernel, error) from error
                _WITHOUT_ROOM.add((kernel, candidate, *self.kind))
                warn_once(f"relattn: the {kernel} kernel falls from {candidate} to {smaller}: {error}")
        raise AssertionError("no candidates")

    def _candidates(self, kernel: str, largest_block: int, block: int | None) -> list[Any]:
        configs = _kernels().configs
        if _CONFIGURATION is not None:
            return [configs.Configuration(*_CONFIGURATION)]
        size, extra = max(self.size, self.value_size), bool({"rel_q", "rel_v"} & self.names)
        candidates = configs.configurations(kernel, _target(self.device), size, self.dtype.itemsize, self._clipped(16), extra)
        if autotune.wanted() and block is None:  # a block that is given comes with its few configurations
            candidates = configs.alternatives(candidates)
        candidates = [one for one in candidates if one.block <= largest_block and block in (None, one.block)]
        return [one for one in candidates if (kernel, one, *self.kind) not in _WITHOUT_ROOM] or candidates[-1:]

    def _failure(self, kernel: str, error: Exception) -> KernelError:
        first_line = next(iter(str(error).splitlines()), "")
        reason = f"its {kernel} kernel does not compile or launch on {_target(self.device)}: {type(error).__name__}: {first_line}"
        if _CONFIGURATION is None:  # of a sweep's candidates the next one may do better
            _FAILED[self.kind] = reason
        return KernelError(f"relattn: backend 'triton': {reason}")

    def _key(self) -> str:
        """What decides which configuration is fastest, for autotuning: lengths and the number of heads by powers of two."""
        terms = [name for name in _TABLES if name in self.names]
        sizes = [1 << (size - 1).bit_length() for size in (self.batch * self.heads, self.queries, self.keys)]
        causal = "causal" if self.last < _UNBOUNDED else "both ways"
        return " ".join(map(str, (self.dtype, self.size, self.value_size, *sizes, causal, *terms, "clipped" * self._clipped(16))))

    def _diagonals(self, block: int) -> tuple[int, int]:
        """Of the tiles' first key minus first query, in blocks: the lowest and the highest that some query sees."""
        lowest, highest = -((self.longest - 1) // block), (self.longest_keys - 1) // block
        if "offsets" not in self.names:  # seen: t * block + block - 1 >= first, t * block - (block - 1) <= last
            lowest = max(lowest, -((block - 1 - self.first) // block))
            highest = min(highest, (self.last + block - 1) // block)
        return lowest, highest

    def _clipped(self, block: int) -> bool:
        """Whether tiles may lie beyond the tables, where one row stands for all their distances."""
        if not {"rel_k", "rel_bias"} & self.names or {"rel_q", "rel_v"} & self.names:
            return False
        return "offsets" in self.names or self._beyond(block)

    def _beyond(self, block: int) -> bool:
        lowest, highest = self._diagonals(block)
        return lowest * block + block - 1 <= self.table_start or highest * block - block + 1 >= self.table_start + self.table_rows - 1

    def _constants(self, configuration: Any) -> dict[str, Any]:
        precision = "interpreter" if INTERPRETED else "tf32" if self.dtype == torch.float32 and _tf32() else "ieee"
        return dict(
            BLOCK=configuration.block, SIZE=self.size, COLUMNS=_columns(self.size), VALUE_SIZE=self.value_size,
            VALUE_COLUMNS=_columns(self.value_size), LATE=self.plain and self.settings.scale > 0.0,
            DROPOUT=self.settings.dropout_p > 0.0, PRECISION=precision,
        )  # fmt: skip

    def _launch(
        self, kernel: str, grid: tuple[int, ...], configuration: Any, clipped: bool = False, size: int | None = None, **arguments: Any
    ) -> None:  # fmt: skip
        """`arguments`: those that `self.arguments` has not, by name, Slots in place of tensors. size: of the tile's rows, if not D."""
        function = _kernels().KERNELS[kernel]
        tile = _kernels().operands.Tile(**self._constants(configuration), CLIPPED=clipped)
        if size is not None:
            tile = tile._replace(SIZE=size, COLUMNS=_columns(size))
        if kernel == "decode":  # its tiles are small: scores are scaled at once
            tile = tile._replace(LATE=False)
        arguments = self.arguments | arguments | {"TILE": tile}
        options: dict[str, Any] = dict(num_warps=configuration.num_warps, num_stages=configuration.num_stages, enable_fp_fusion=True)
        if configuration.registers is not None:
            options["maxnreg"] = configuration.registers
        check = machine_code.check if _is_suspected(self.device) else None
        self.tape.launch(function, grid, tuple(arguments[name] for name in function.arg_names), options, check)

    def _splits(self, programs: int, block: int) -> int:
        """How many parts the keys are cut into, where queries alone leave the chip idle."""
        tiles = -(-self.longest_keys // block)
        if _SPLITS:
            return min(_SPLITS, tiles)
        if INTERPRETED:
            return 1
        if self.packed and self.settings.max_seqlen_k is None:
            return 1  # parts of all tokens are none of a sequence's
        room = 2 * _processors(self.device) // programs
        return max(1, min(room, tiles // 4, 128))

    def forward(self) -> None:
        if self._packs():
            self._run("decode", self._decode)
        else:
            self._run("forward", self._forward)

    def _packs(self) -> bool:
        """Whether the heads that share a key head fit into one tile: with one query each, and one table for all of them."""
        if self.queries > 1 or self.settings.dropout_p > 0.0 or self.packed:
            return False
        tables = [self._operand(name, "hrc") for name in ("rel_k", "rel_q", "rel_v")]
        return self.heads == self.key_heads or all(table is None or table.head == 0 for table in tables)

    def _decode(self, configuration: Any) -> None:
        blocks = -(-(self.heads // self.key_heads) // _kernels().decode.ROWS.value)
        self._attend("decode", blocks * self.batch * self.key_heads, configuration)

    def _forward(self, configuration: Any) -> None:
        self._attend("forward", self._programs(configuration.block, self.queries, self.heads), configuration)

    def _programs(self, block: int, length: int, heads: int) -> int:
        """One for each block of each head (of batch elements); of packed sequences as many as there may be of their lengths."""
        return (length // block + self.batch if self.packed else -(-length // block) * self.batch) * heads

    def _attend(self, kernel: str, programs: int, configuration: Any) -> None:
        """Launch one of the kernels that make the output, and what joins its splits."""
        block = configuration.block
        splits = self._splits(programs, block)
        split_keys = -(-self.longest_keys // splits // block) * block
        splits = -(-self.longest_keys // split_keys)
        to, lse = self._operand("output"), Slot("lse")
        if splits > 1:
            shape = (splits, *self.per_query)
            parts, lse = self.tape.new("parts", (*shape, self.value_size)), self.tape.new("part_lse", shape)
            strides = self.tape.live[parts].stride()[1:]
            to = to._replace(base=parts, batch=to.batch if self.packed else strides[0], head=strides[1], row=strides[2], column=1)
        self._launch(kernel, (programs, splits), configuration, self._clipped(block), output=to, lse=lse, split_keys=split_keys)
        if splits > 1:
            rows = self.pairs * self.queries
            self._launch(
                "combine", (-(-rows // 4),), configuration._replace(block=4, num_warps=4), partial=parts, partial_lse=lse,
                output=self._operand("output"), lse=Slot("lse"), splits=splits, rows=rows,
            )  # fmt: skip


def _columns(size: int) -> int:
    """Of a tile, for rows of this many numbers."""
    return max(16, 1 << (size - 1).bit_length())


def _does_not_go(error: Exception) -> bool:
    """Whether a configuration failed for want of room, or because it is beyond this version of the compilers."""
    refused = (_kernels().OutOfResources, machine_code.MiscompiledError)
    return isinstance(error, refused) or (isinstance(error, RuntimeError) and "PassManager" in str(error))


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
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _target(device: torch.device) -> str:
    """"sm_90", "gfx942"; "interpreter"."""
    if INTERPRETED:
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _is_suspected(device: torch.device) -> bool:
    """Whether the compiler for a GPU makes mistakes that are known."""
    return not INTERPRETED and machine_code.suspected(_target(device))


def is_doubtful(device: torch.device, dtype: torch.dtype, *sizes: int) -> bool:
    """Whether heads are too small for what is known of the GPU: then the backend leaves them to others."""
    return dtype.itemsize == 2 and min(sizes) < _SMALLEST_HALF and _is_suspected(device)


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
