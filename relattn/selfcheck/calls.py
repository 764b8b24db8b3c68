"""Small calls with each feature of `relative_attention`, what can be asked of them, and the comparison with the float64 reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from relattn import export, relative_attention, relative_attention_varlen
from relattn.arguments import DIFFERENTIABLE

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HALVES = ("bfloat16", "float16")

Results = dict[str, Tensor]


class Wrong(Exception):
    """A result is not the reference's."""


@dataclass
class Call:
    """A call under construction: its sizes, random numbers, and arguments; floating tensors are float64 and on the CPU."""

    generator: torch.Generator
    batch: int = 2
    heads: int = 2
    key_heads: int = 2
    queries: int = 9
    keys: int = 9
    size: int = 8
    value_size: int = 8
    tensors: dict[str, Tensor] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    mask_gradient: bool = False

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def chance(self, *shape: int) -> Tensor:
        """Booleans, two thirds of them True."""
        return torch.rand(*shape, generator=self.generator) < 2 / 3

    def table(self, name: str, *size: int, heads: int | None = None) -> None:
        left, right = self.arguments.setdefault("max_relative_position", (3, 3))
        self.tensors[name] = self.normal(*(() if heads is None else (heads,)), left + right + 1, *size)

    def on(self, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Its tensors, rounded to the dtype, and its other arguments."""
        tensors = {name: tensor.to(device, dtype).detach() for name, tensor in self.tensors.items()}
        return tensors, {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.arguments.items()}

    def rounded(self, dtype: torch.dtype) -> Call:
        """The same call of what its tensors are in the dtype, in float64."""
        tensors = {name: tensor.to(dtype).double() for name, tensor in self.tensors.items()}
        return Call(self.generator, tensors=tensors, arguments=self.arguments, mask_gradient=self.mask_gradient)


class Feature(NamedTuple):
    """Sizes that differ from a `Call`'s, arguments that it adds, what is asked of the call, and what of the reference, to compare."""

    name: str
    add: Callable[[Call], None] = lambda call: None
    sizes: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    probe: Callable[[Call, str, torch.dtype, str], Results] | None = None  # None: `values`
    expected: Callable[[Call, str, torch.dtype, str], Results] | None = None  # None: `values`
    dtypes: tuple[str, ...] = tuple(DTYPES)  # in which it means something
    slow: bool = False  # seconds, not milliseconds


# ---- what a call may have ----


def rel_k(call: Call) -> None:
    call.table("rel_k", call.size)


def rel_k_per_head(call: Call) -> None:
    call.table("rel_k", call.size, heads=call.heads)


def one_sided(call: Call) -> None:
    call.arguments |= {"max_relative_position": (6, 0)}
    rel_k(call)


def rel_q(call: Call) -> None:
    call.table("rel_q", call.size)


def rel_v(call: Call) -> None:
    call.table("rel_v", call.value_size)


def rel_bias(call: Call) -> None:
    call.table("rel_bias", heads=call.heads)


def pos_bias_u(call: Call) -> None:
    call.tensors["pos_bias_u"] = call.normal(call.heads, call.size)


def pos_bias_v(call: Call) -> None:
    rel_k(call)
    call.tensors["pos_bias_v"] = call.normal(call.heads, call.size)


def all_terms(call: Call) -> None:
    for add in (rel_k_per_head, rel_q, rel_v, rel_bias, pos_bias_u):
        add(call)


def key_mask(call: Call) -> None:
    call.arguments["key_mask"] = call.chance(call.batch, call.keys)


def key_lengths(call: Call) -> None:
    call.arguments["key_lengths"] = torch.randint(0, call.keys + 1, (call.batch,), generator=call.generator)


def bool_mask(call: Call) -> None:
    call.arguments["attn_mask"] = call.chance(call.batch, 1, call.queries, call.keys)


def float_mask(call: Call) -> None:
    shape = (call.heads, call.queries, call.keys)
    call.tensors["attn_mask"] = call.normal(*shape).masked_fill_(~call.chance(*shape), -torch.inf)


def mask_gradient(call: Call) -> None:
    call.mask_gradient = True
    float_mask(call)


def causal(call: Call) -> None:
    call.arguments["is_causal"] = True
    call.arguments.setdefault("query_offset", call.keys - call.queries)


def window(call: Call) -> None:
    call.arguments["window"] = (4, 0 if call.arguments.get("is_causal") else 2)


def chunk(call: Call) -> None:
    call.arguments["chunk"] = (3, 1)
    call.arguments.setdefault("query_offset", call.keys - call.queries)


def offset(call: Call) -> None:
    call.arguments["query_offset"] = 2


def offsets(call: Call) -> None:
    call.arguments["query_offset"] = torch.randint(-2, 5, (call.batch,), generator=call.generator)


def dropout(call: Call) -> None:
    call.arguments["dropout_p"] = 0.3


def scale(call: Call) -> None:
    call.arguments["scale"] = 0.7


def nothing_seen(call: Call) -> None:
    call.arguments["key_mask"] = torch.zeros(call.batch, call.keys, dtype=torch.bool)


def hidden_nan(call: Call) -> None:
    call.arguments["key_lengths"] = torch.full((call.batch,), call.keys - 3)
    for name in ("key", "value"):
        call.tensors[name][:, :, -3:] = torch.nan


def _lengths(call: Call, longest: int) -> list[int]:
    return torch.randint(0, longest + 1, (call.batch,), generator=call.generator).tolist()


def packed(call: Call) -> None:
    """The batch's elements one after the other, each cut to a length."""
    queries = _lengths(call, call.queries)
    pack(call, queries, queries if call.queries == call.keys else _lengths(call, call.keys))


def pack(call: Call, queries: Sequence[int], keys: Sequence[int]) -> None:
    """As `relative_attention_varlen` takes it; `queries is keys`: one list of lengths says both."""
    for name, lengths in (("query", queries), ("key", keys), ("value", keys)):
        parts = [one[:, :length].transpose(0, 1) for one, length in zip(call.tensors[name], lengths, strict=True)]
        call.tensors[name] = torch.cat(parts)
    call.tensors.pop("attn_mask", None)
    call.arguments.pop("attn_mask", None)
    if (mask := call.arguments.get("key_mask")) is not None:
        call.arguments["key_mask"] = torch.cat([row[:length] for row, length in zip(mask, keys, strict=True)])
    call.arguments["cu_seqlens_q"] = torch.tensor([0, *queries]).cumsum(0).int()
    if queries is not keys:
        call.arguments.setdefault("query_offset", 0)
        call.arguments["cu_seqlens_k"] = torch.tensor([0, *keys]).cumsum(0).int()


def make(generator: torch.Generator, sizes: dict[str, Any], *features: Callable[[Call], None]) -> Call:
    """A call with these features, added in this order."""
    call = Call(generator, **sizes)
    heads_last = (0, 2, 1, 3)  # in memory, as projections leave them
    call.tensors["query"] = call.normal(call.batch, call.queries, call.heads, call.size).permute(heads_last)
    call.tensors["key"] = call.normal(call.batch, call.key_heads, call.keys, call.size)
    call.tensors["value"] = call.normal(call.batch, call.keys, call.key_heads, call.value_size).permute(heads_last)
    call.arguments["enable_gqa"] = call.heads != call.key_heads
    for feature in features:
        feature(call)
    return call


# ---- what can be asked of a call ----


def attend(tensors: dict[str, Tensor], arguments: dict[str, Any], backend: str) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    attention: Callable[..., Any] = relative_attention_varlen if "cu_seqlens_q" in arguments else relative_attention
    return attention(**tensors, **arguments, return_lse=True, backend=backend)


def _differentiable(call: Call, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name in DIFFERENTIABLE and (name != "attn_mask" or call.mask_gradient)}


def _weights(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers to sum a result with, the same for a shape, rounded to the dtype of the inputs."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(dtype).to(like.device, like.dtype)


def values(call: Call, backend: str, dtype: torch.dtype, device: str, attention: Callable[..., Any] = attend) -> Results:
    """Output, log-sum-exp, and the gradients of both."""
    tensors, arguments = call.on(dtype, device)
    leaves = {name: tensor.requires_grad_() for name, tensor in _differentiable(call, tensors).items()}
    torch.manual_seed(0)  # dropout's seed comes from torch's generator
    output, lse = attention(tensors, arguments, backend)
    loss = (output * _weights(output, dtype)).sum() + (lse * _weights(lse, dtype)).masked_fill(lse.isinf(), 0.0).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {"output": output.detach(), "lse": lse.detach()} | {
        f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def _function(call: Call, backend: str, dtype: torch.dtype, device: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The output as a function of the query, and a query."""
    tensors, arguments = call.on(dtype, device)
    query = tensors.pop("query")
    return lambda query: attend({"query": query, **tensors}, arguments, backend)[0], query


def second_derivative(call: Call, backend: str, dtype: torch.dtype, device: str) -> Results:
    """Of a gradient penalty."""
    function, query = _function(call, backend, dtype, device)
    query.requires_grad_()
    output = function(query)
    (gradient,) = torch.autograd.grad((output * _weights(output, dtype)).sum(), query, create_graph=True)
    return {"second": torch.autograd.grad(gradient.square().sum(), query)[0]}


def forward_mode(call: Call, backend: str, dtype: torch.dtype, device: str) -> Results:
    function, query = _function(call, backend, dtype, device)
    return {"tangent": torch.func.jvp(function, (query,), (_weights(query, dtype),))[1]}


def per_sample_gradients(call: Call, backend: str, dtype: torch.dtype, device: str) -> Results:
    """vmap of grad."""
    function, query = _function(call, backend, dtype, device)
    queries = torch.stack((query, 2 * query))
    return {"gradients": torch.func.vmap(torch.func.grad(lambda query: function(query).square().sum()))(queries)}


def compiled(call: Call, backend: str, dtype: torch.dtype, device: str) -> Results:
    """torch.compile, without a graph break, forward and backward."""
    values(call, backend, dtype, device)  # what is refused is refused here, in relattn's words and not in the compiler's
    torch.compiler.reset()
    return values(call, backend, dtype, device, torch.compile(attend, fullgraph=True, dynamic=False))


class _Module(torch.nn.Module):
    def __init__(self, others: dict[str, Any], arguments: dict[str, Any], backend: str) -> None:
        super().__init__()
        self.others, self.arguments, self.backend = others, arguments, backend

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend({"query": query, "key": key, "value": value, **self.others}, self.arguments, self.backend)[0]


def _module(call: Call, backend: str, dtype: torch.dtype, device: str) -> tuple[_Module, tuple[Tensor, ...]]:
    tensors, arguments = call.on(dtype, device)
    inputs = tuple(tensors.pop(name) for name in ("query", "key", "value"))
    return _Module(tensors, arguments, backend), inputs


def exported(call: Call, backend: str, dtype: torch.dtype, device: str) -> Results:
    """torch.export; the program holds relattn's operator, or what it consists of where the backend has none."""
    module, inputs = _module(call, backend, dtype, device)
    return {"output": torch.export.export(module, inputs).module()(*inputs)}


def decomposed(call: Call, backend: str, dtype: torch.dtype, device: str) -> Results:
    """torch.export as plain ATen operations, for AOTInductor and ONNX."""
    module, inputs = _module(call, backend, dtype, device)
    program = torch.export.export(module, inputs).run_decompositions(export.decompositions())
    if any("relattn" in str(node.target) for node in program.graph.nodes):
        raise Wrong("an operator of relattn is left")
    return {"output": program.module()(*inputs)}


def traced(call: Call, backend: str, dtype: torch.dtype, device: str) -> Results:
    """torch.jit.trace."""
    module, inputs = _module(call, backend, dtype, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its deprecation and of constants
        return {"output": torch.jit.trace(module, inputs, check_trace=False)(*inputs)}


def repeated(call: Call, backend: str, dtype: torch.dtype, device: str) -> Results:
    """Two runs have the same bits."""
    first, second = (values(call, backend, dtype, device) for _ in range(2))
    for name, result in first.items():
        if not torch.equal(result, second[name]):
            raise Wrong(f"{name}: other bits in a second run")
    return first


def autocast(call: Call, backend: str, dtype: torch.dtype, device: str) -> Results:
    """Tensors of float32 under autocast to the dtype."""
    tensors, arguments = call.rounded(dtype).on(torch.float32, device)
    with torch.autocast(torch.device(device).type, dtype=dtype):
        output = attend(tensors, arguments, backend)[0]
    if output.dtype != dtype:
        raise Wrong(f"output of {output.dtype}")
    return {"output": output}


def float32_tables(call: Call, backend: str, dtype: torch.dtype, device: str) -> Results:
    """Tables and biases of float32 beside query, key and value of the dtype."""
    rounded = call.rounded(dtype)

    def mixed(tensors: dict[str, Tensor], arguments: dict[str, Any], backend: str) -> tuple[Tensor, Tensor]:
        tables = {name: tensor.float() for name, tensor in tensors.items() if name.startswith(("rel_", "pos_"))}
        return attend(tensors | tables, arguments, backend)

    return values(rounded, backend, dtype, device, mixed)


FEATURES: dict[str, tuple[Feature, ...]] = {
    "terms, with gradients": (
        Feature("content alone"),
        Feature("`rel_k`", rel_k),
        Feature("`rel_k` of every head", rel_k_per_head),
        Feature("`rel_k`, `max_relative_position=(left, 0)`", one_sided),
        Feature("`rel_q`", rel_q),
        Feature("`rel_v`", rel_v),
        Feature("`rel_bias`", rel_bias),
        Feature("`pos_bias_u`", pos_bias_u),
        Feature("`rel_k` and `pos_bias_v`", pos_bias_v),
        Feature("all terms", all_terms),
    ),
    "masks and positions, with gradients": (
        Feature("`key_mask`", key_mask),
        Feature("`key_lengths`", key_lengths),
        Feature("boolean `attn_mask`", bool_mask),
        Feature("floating `attn_mask`", float_mask),
        Feature("gradient of `attn_mask`", mask_gradient),
        Feature("`is_causal`", causal),
        Feature("`window`", window),
        Feature("`chunk`", chunk),
        Feature("`query_offset`, a number", offset),
        Feature("`query_offset`, a tensor", offsets),
        Feature("a query that sees nothing", nothing_seen),
        Feature("NaN in what is hidden", hidden_nan),
    ),
    "shapes and settings, with gradients": (
        Feature("more keys than queries", sizes={"keys": 21}),
        Feature("one query (decoding)", sizes={"queries": 1, "keys": 21}),
        Feature("`enable_gqa`", sizes={"heads": 4}),
        Feature("values of another size", sizes={"value_size": 12}),
        Feature("heads of 320", sizes={"size": 320, "value_size": 320}),
        Feature("`dropout_p`", dropout),
        Feature("`scale`", scale),
        Feature("packed sequences", packed, {"batch": 3}),
        Feature("packed, other lengths of keys", packed, {"batch": 3, "keys": 21}),
        Feature("float32 tables beside it", rel_k, probe=float32_tables, dtypes=_HALVES),
        Feature("autocast to it", rel_k, probe=autocast, dtypes=_HALVES),
    ),
    "transformations": (
        Feature("equal bits in every run", rel_k, probe=repeated),
        Feature("`torch.func.vmap` of `grad`", rel_k, probe=per_sample_gradients, expected=per_sample_gradients),
        Feature("second derivative", rel_k, probe=second_derivative, expected=second_derivative),
        Feature("forward mode (`jvp`)", rel_k, probe=forward_mode, expected=forward_mode),
        Feature("`torch.compile(fullgraph=True)`, with gradients", rel_k, probe=compiled, slow=True),
        Feature("`torch.export`", rel_k, probe=exported, slow=True),
        Feature("`torch.export`, decomposed", rel_k, probe=decomposed, slow=True),
        Feature("`torch.jit.trace`", rel_k, probe=traced),
    ),
}  # fmt: skip


# ---- the comparison ----


def refused(call: Call, backend: str, dtype: torch.dtype, device: str, feature: Feature) -> str | None:
    """Compare what the backend makes of a call with what the reference makes of it in float64.

    The error allowed is twice that of the reference in the same dtype and a little, since the backend sums in another order; of the
    reference itself, some units in the last place.

    Returns:
        why the backend refuses it; None: it takes it, and is right.

    Raises:
        Wrong: it is not right.
    """
    expected = feature.expected or values
    exact = expected(call.rounded(dtype), "reference", torch.float64, device)
    plain = None if backend == "reference" else expected(call, "reference", dtype, device)
    try:
        actual = (feature.probe or values)(call, backend, dtype, device)
    except (ValueError, RuntimeError) as error:
        reason = _reason(str(error))
        if reason is None:
            raise
        return reason
    scores = call.batch * call.heads * call.queries * call.keys
    for name, result in actual.items():
        compare(name, result.double(), exact[name], None if plain is None else plain[name].double(), dtype, scores)
    return None


def _reason(message: str) -> str | None:
    """Of a refusal's message, what a table of backends needs; None: it is none of relattn's."""
    for start in ("relattn: ", "backend: "):
        if message.startswith(start):
            return message.removeprefix(start).split(" cannot take this call: ")[-1].split("; ")[0]
    return None


def compare(name: str, actual: Tensor, exact: Tensor, plain: Tensor | None, dtype: torch.dtype, scores: int) -> None:
    """Raise `Wrong` where the error is above its bound."""
    if actual.shape != exact.shape or not torch.equal(actual.isinf(), exact.isinf()):
        raise Wrong(f"{name}: of another shape, or infinite elsewhere")
    finite = exact.isfinite()
    if not finite.any():
        return
    largest = exact[finite].abs().max()
    summed = max(1.0, scores / exact.numel())  # products that one number of a gradient is the sum of, but for the head size
    sums = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * 64 * (1 + largest) * (8 * summed) ** 0.5
    unit = torch.finfo(dtype).eps * largest
    bound = sums + (16 * unit if plain is None else 2 * unit + 2 * (plain - exact)[finite].abs().max())
    error = (actual - exact)[finite].abs().max()
    if not error <= bound:  # NaN too
        raise Wrong(f"{name}: error {float(error):.3g} above {float(bound):.3g}")
