"""The layer against `torch.nn.MultiheadAttention` (equal with zero tables, errors included) and against the definition in loops."""

import contextlib
import copy
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn

import relattn
from relattn import RelativeMultiheadAttention, module
from tests import draws

ALL_TERMS = ("rel_k", "rel_q", "rel_v", "rel_bias", "pos_bias")
RELATIVE = ("rel_k", "rel_q", "rel_v", "rel_bias", "pos_bias_u", "pos_bias_v")
flag = st.booleans()


def relative_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in layer.named_parameters() if name in RELATIVE}


def randomise(layer: nn.Module, scale: float = 0.5) -> None:
    """Every parameter random: what starts at zero could hide a missing or swapped one."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=scale)


def calls(draw, same_lengths: bool = False):
    """Constructor arguments and a call that nn.MultiheadAttention takes, float64, with at least one key visible to each query."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    heads, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    embed = heads * head_dim
    sharing = draw(st.sampled_from(("self", "key is value", "query is value", "separate")))
    kdim = draw(st.sampled_from((None, 3, embed))) if sharing in ("separate", "query is value") else None
    vdim = draw(st.sampled_from((None, 5, embed))) if sharing == "separate" else None
    options = dict(bias=draw(flag), add_bias_kv=draw(flag), add_zero_attn=draw(flag), kdim=kdim, vdim=vdim, batch_first=draw(flag))
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    keys = length if sharing in ("self", "query is value") or same_lengths else draw(st.integers(1, 5))
    batched = draw(flag)
    batch = batch if batched else 1

    def inputs(steps: int, size: int) -> torch.Tensor:
        shape = (steps, size) if not batched else (batch, steps, size) if options["batch_first"] else (steps, batch, size)
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    query = inputs(length, embed)
    key = query if sharing == "self" else inputs(keys, kdim or embed)
    value = {"self": query, "query is value": query, "key is value": key}.get(sharing)
    value = inputs(keys, vdim or embed) if value is None else value

    def mask(kind: str | None, *shape: int) -> torch.Tensor | None:
        if kind is None:
            return None
        hidden = torch.rand(shape) < 0.4
        hidden[..., 0] = False
        return hidden if kind == "bool" else torch.randn(shape, dtype=torch.float64).masked_fill(hidden, -torch.inf)

    kinds = st.sampled_from((None, "bool", "float"))
    call = dict(
        key_padding_mask=mask(draw(kinds), *((batch, keys) if batched else (keys,))),
        attn_mask=mask(draw(kinds), *((batch * heads,) if draw(flag) else ()), length, keys),
        need_weights=draw(flag), average_attn_weights=draw(flag),
    )  # fmt: skip
    # torch wants the mask too, and where the flag replaces it hides added keys; `is_causal` alone is tested by the definition.
    if length == keys and not (options["add_bias_kv"] or options["add_zero_attn"]) and draw(flag):
        call |= dict(is_causal=True, attn_mask=nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64))
    return embed, heads, options, (query, key, value), call


@settings(max_examples=120)
@draws.given
def test_equals_torch_with_zero_tables(draw) -> None:
    embed, heads, options, inputs, call = calls(draw)
    training, per_head = draw(flag), draw(flag)
    theirs = nn.MultiheadAttention(embed, heads, dtype=torch.float64, **options)
    randomise(theirs)
    ours = RelativeMultiheadAttention(
        embed, heads, dtype=torch.float64, max_relative_position=(2, 1), terms=ALL_TERMS, per_head=per_head, **options
    )
    missing = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert set(missing.missing_keys) == set(RELATIVE)
    assert not missing.unexpected_keys
    for parameter in relative_parameters(ours).values():
        nn.init.zeros_(parameter)
    gradients = []
    for layer in (theirs, ours):
        layer.train(training)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # torch: masks of two types are deprecated
            output, weights = layer(*inputs, **call)
        direction = torch.sin(torch.arange(output.numel(), dtype=torch.float64)).view(output.shape)
        loss = (output * direction).sum() + (0 if weights is None else (weights * weights).sum())
        shared = [value for name, value in layer.named_parameters() if name not in RELATIVE]
        gradients.append((output, weights, torch.autograd.grad(loss, (*dict.fromkeys(inputs), *shared), allow_unused=True)))
    (expected, expected_weights, expected_grads), (output, weights, grads) = gradients
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights, expected_weights)
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other)


def by_loops(layer: RelativeMultiheadAttention, query, key, value, visible, additive, offset: int, is_causal: bool):
    """The definition, number by number, for one sequence: output (L, E) and weights (H, L, S + extra keys).

    `visible` and `additive` are (H, L, S).
    """
    length, keys, size = query.shape[0], key.shape[0], layer.head_dim
    if layer.in_proj_weight is None:
        weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    else:
        weights = layer.in_proj_weight.chunk(3)
    biases = (0.0, 0.0, 0.0) if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    q, k, v = (x @ w.T + b for x, w, b in zip((query, key, value), weights, biases, strict=True))
    left, right = layer.max_relative_position
    extras = []
    if layer.bias_k is not None:
        extras.append((layer.bias_k[0, 0], layer.bias_v[0, 0]))
    if layer.add_zero_attn:
        extras.append((torch.zeros_like(k[0]), torch.zeros_like(v[0])))
    merged = torch.zeros(length, layer.embed_dim, dtype=torch.float64)
    all_weights = torch.zeros(layer.num_heads, length, keys + len(extras), dtype=torch.float64)
    for h in range(layer.num_heads):
        of_head = slice(h * size, (h + 1) * size)

        def table(name, h=h):
            parameter = getattr(layer, name)
            return None if parameter is None else parameter[h] if layer.per_head else parameter

        for i in range(length):
            u = 0.0 if layer.pos_bias_u is None else layer.pos_bias_u[h]
            w = 0.0 if layer.pos_bias_v is None else layer.pos_bias_v[h]
            scores, values = {}, {}
            for j in range(keys):
                d = j - (i + offset)
                r = max(-left, min(right, d)) + left
                score = (q[i, of_head] + u) @ k[j, of_head]
                values[j] = v[j, of_head]
                if layer.rel_k is not None:
                    score = score + (q[i, of_head] + w) @ table("rel_k")[r]
                if layer.rel_q is not None:
                    score = score + k[j, of_head] @ table("rel_q")[r]
                score = score / math.sqrt(size)
                if layer.rel_bias is not None:
                    score = score + table("rel_bias")[r]
                if layer.rel_v is not None:
                    values[j] = values[j] + table("rel_v")[r]
                low, high = layer.window or (None, None)
                seen = visible[h, i, j] and additive[h, i, j] > -math.inf and (low is None or d >= -low) and (high is None or d <= high)
                if seen and not (is_causal and d > 0):
                    scores[j] = score + additive[h, i, j]
            for e, (extra_key, extra_value) in enumerate(extras):
                scores[keys + e] = (q[i, of_head] + u) @ extra_key[of_head] / math.sqrt(size)
                values[keys + e] = extra_value[of_head]
            total = sum(score.exp() for score in scores.values())
            for j, score in scores.items():
                all_weights[h, i, j] = score.exp() / total
                merged[i, of_head] += all_weights[h, i, j] * values[j]
    return merged @ layer.out_proj.weight.T + (0.0 if layer.out_proj.bias is None else layer.out_proj.bias), all_weights


@settings(max_examples=60)
@draws.given
@torch.no_grad()
def test_equals_the_definition(draw) -> None:
    embed, heads, options, inputs, call = calls(draw, same_lengths=True)
    ours = RelativeMultiheadAttention(
        embed, heads, dtype=torch.float64, **options,
        max_relative_position=draw(st.sampled_from((0, 1, 6, (2, 0), (0, 3)))),
        terms=draw(st.lists(st.sampled_from(ALL_TERMS))), per_head=draw(flag), is_causal=draw(flag),
        window=draw(st.sampled_from((None, (1, 0), (None, 0), (2, None)))),
    )  # fmt: skip
    randomise(ours)
    offset = draw(st.sampled_from((None, 0, 1, -1)))
    output, weights = ours(*inputs, **call, query_offset=offset)
    is_causal = ours.is_causal or call.get("is_causal", False)
    query, key, value = inputs if options["batch_first"] or inputs[0].dim() == 2 else (x.transpose(0, 1) for x in inputs)
    query, key, value = (x if x.dim() == 3 else x[None] for x in (query, key, value))
    for b in range(query.shape[0]):
        visible = torch.ones(heads, query.shape[1], key.shape[1], dtype=torch.bool)
        additive = torch.zeros(visible.shape, dtype=torch.float64)
        attn_mask, padding = call["attn_mask"], call["key_padding_mask"]
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (-1, heads))[b]
        if padding is not None and padding.dim() == 2:
            padding = padding[b]
        for mask in (attn_mask, padding):
            if mask is not None and mask.dtype == torch.bool:
                visible &= ~mask
            elif mask is not None:
                additive += mask
        expected, expected_weights = by_loops(ours, query[b], key[b], value[b], visible, additive, offset or 0, is_causal)
        found = output if inputs[0].dim() == 2 else output[b] if options["batch_first"] else output[:, b]
        torch.testing.assert_close(found, expected)
        if call["need_weights"]:
            found = weights if inputs[0].dim() == 2 else weights[b]
            torch.testing.assert_close(found, expected_weights.mean(0) if call["average_attn_weights"] else expected_weights)


@draws.example(
    False, False, True, True, False, ["attn_mask", "key_padding_mask"], "dtype", torch.bfloat16, "dtype", torch.bfloat16
)
@settings(max_examples=200)
@draws.given
def test_raises_where_torch_raises(draw) -> None:
    """One valid call with up to two arguments spoilt: torch is the judge of what is wrong, we say it as Value- or TypeError."""
    torch.manual_seed(0)
    batch_first, separate, batched, need_weights = (draw(flag) for _ in range(4))
    options = dict(batch_first=batch_first, add_bias_kv=draw(flag), kdim=3 if separate else None)
    ours, theirs = RelativeMultiheadAttention(4, 2, max_relative_position=2, **options), nn.MultiheadAttention(4, 2, **options)
    shape = (lambda length, size: (2, length, size)) if batch_first else (lambda length, size: (length, 2, size))
    if not batched:
        shape = lambda length, size: (length, size)  # noqa: E731
    arguments = dict(
        query=torch.randn(shape(3, 4)), key=torch.randn(shape(5, ours.kdim)), value=torch.randn(shape(5, 4)),
        attn_mask=torch.zeros(3, 5), key_padding_mask=torch.zeros((2, 5) if batched else 5),
    )  # fmt: skip
    sizes = st.lists(st.sampled_from((1, 2, 3, 4, 5)), min_size=1, max_size=4)
    for name in draw(st.lists(st.sampled_from(list(arguments)), max_size=2)):
        spoilt = draw(st.sampled_from(("shape", "size", "dtype", "device", "type", "none")))
        old = arguments[name]
        if not isinstance(old, torch.Tensor):
            continue
        if spoilt == "shape":
            arguments[name] = torch.zeros(draw(sizes))
        elif spoilt == "size":
            dim = draw(st.integers(0, old.dim() - 1))
            arguments[name] = old.narrow(dim, 0, old.shape[dim] - 1)
        elif spoilt == "dtype":
            arguments[name] = old.to(draw(st.sampled_from((torch.float64, torch.bfloat16, torch.int64, torch.bool))))
        elif spoilt == "device":
            arguments[name] = old.to("meta")
        elif spoilt == "type":
            arguments[name] = [0.0]
        else:
            arguments[name] = None
    arguments["need_weights"] = need_weights
    error = None
    with warnings.catch_warnings(action="ignore"):
        try:
            theirs(**arguments)
        except Exception as raised:
            error = raised
        # Torch lets a few mixtures with "meta" pass; real devices never mix.
        mixed = any(isinstance(x, torch.Tensor) and x.is_meta for x in arguments.values())
        if error is None and not mixed:
            ours(**arguments)
        else:
            with pytest.raises((ValueError, TypeError), match=r"^(query|key|value|attn_mask|key_padding_mask): expected .*, got "):
                ours(**arguments)


MASK_DTYPES = (None, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)


@pytest.mark.parametrize("padding_dtype", MASK_DTYPES)
@pytest.mark.parametrize("attn_dtype", MASK_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_takes_the_mask_dtypes_that_torch_takes(dtype, attn_dtype, padding_dtype) -> None:
    """Two float masks of lower precision, alike, beside a float32 layer once passed; torch refuses the dtype of their sum.

    Torch's two paths differ: with `need_weights` it wants a sum in the query's dtype, without it also takes float32. We
    take what either does.
    """
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, dtype=dtype)
    ours = RelativeMultiheadAttention.from_multihead_attention(theirs, max_relative_position=2, terms=())
    inputs = torch.randn(3, 2, 8, dtype=dtype)

    def mask(of: torch.dtype | None, hidden: torch.Tensor) -> torch.Tensor | None:
        if of in (None, torch.bool):
            return None if of is None else hidden
        return torch.randn(hidden.shape).masked_fill(hidden, -torch.inf if of.is_floating_point else 0).to(of)

    masks = dict(  # every query still sees a key
        attn_mask=mask(attn_dtype, torch.tensor([[0, 1, 0], [0, 0, 1], [0, 0, 0]]).bool()),
        key_padding_mask=mask(padding_dtype, torch.tensor([[0, 0, 0], [0, 0, 1]]).bool()),
    )
    expected = None
    for need_weights in (True, False):
        with warnings.catch_warnings(action="ignore", category=UserWarning), contextlib.suppress(RuntimeError, AssertionError):
            expected, _ = theirs(inputs, inputs, inputs, need_weights=need_weights, **masks)
    for need_weights in (True, False):
        if expected is None:
            with pytest.raises(TypeError, match=r"^(attn_mask|key_padding_mask): expected .*torch.bool.*, got torch\."):
                ours(inputs, inputs, inputs, need_weights=need_weights, **masks)
        else:
            found, _ = ours(inputs, inputs, inputs, need_weights=need_weights, **masks)
            coarsest = torch.float32 if torch.float32 in (attn_dtype, padding_dtype) else dtype  # torch adds two of them as such
            precision = max(torch.finfo(dtype).eps, torch.finfo(coarsest).eps)
            torch.testing.assert_close(found, expected, atol=4 * precision, rtol=0.0)


@pytest.mark.parametrize(
    ("dtype", "attn_dtype", "padding_dtype"),
    [
        (torch.float32, torch.float32, torch.float16),
        (torch.float32, torch.float16, torch.bfloat16),
        (torch.float32, torch.float16, torch.bool),
        (torch.bfloat16, torch.float32, torch.float16),
        (torch.float64, torch.float32, None),
    ],
    ids=str,
)
def test_what_a_mask_of_lower_precision_hides_stays_hidden(dtype, attn_dtype, padding_dtype) -> None:
    """float16's lowest number is no large one in float32, nor float32's in float64: added as such it would hide nothing."""
    layer = RelativeMultiheadAttention(8, 2, max_relative_position=2, dtype=dtype)
    inputs = torch.randn(3, 2, 8, dtype=dtype)
    hide_a_row = torch.zeros(3, 3, dtype=attn_dtype)
    hide_a_row[1] = torch.finfo(attn_dtype).min
    hide_all = None
    if padding_dtype is not None:
        lowest = True if padding_dtype == torch.bool else torch.finfo(padding_dtype).min
        hide_all = torch.zeros(2, 3, dtype=padding_dtype)
        hide_all[1] = lowest
    _, weights = layer(inputs, inputs, inputs, attn_mask=hide_a_row, key_padding_mask=hide_all)
    visible = torch.tensor([[1, 0, 1], [1, 0, 1] if hide_all is None else [0, 0, 0]])
    torch.testing.assert_close(weights.sum(-1), visible.to(dtype), atol=2 * torch.finfo(dtype).eps, rtol=0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(embed_dim=10, num_heads=4), r"embed_dim: expected a multiple of num_heads = 4, got 10"),
        (dict(embed_dim=0), r"embed_dim: expected a number of at least 1, got 0"),
        (dict(num_heads=-1), r"num_heads: expected a number of at least 1, got -1"),
        (dict(embed_dim=8.0), r"embed_dim: expected an int, got float"),
        (dict(kdim=-1), r"kdim: .* got -1"),
        (dict(dropout=1.5), r"dropout: .* got 1.5"),
        (dict(dtype=torch.int64), r"dtype: .* got torch.int64"),
        (dict(max_relative_position=-1), r"max_relative_position: expected numbers of at least 0, got -1"),
        (dict(max_relative_position=(1, -1)), r"max_relative_position: .* got \(1, -1\)"),
        (dict(max_relative_position=2.0), r"max_relative_position: expected an int or \(left, right\), got 2.0"),
        (dict(max_relative_position=(1, 2, 3)), r"max_relative_position: expected an int or \(left, right\)"),
        (dict(terms=("rel_k", "rel")), r"terms: expected any of 'rel_k', .* got 'rel'"),
        (dict(terms="rel_k"), r"terms: expected a tuple"),
        (dict(window=(1, 2), is_causal=True), r"window: \(1, 2\) looks ahead"),
        (dict(window=(-1, 0)), r"window: .* got \(-1, 0\)"),
        (dict(window=3), r"window: .* got 3"),
        (dict(backend="fast"), r"backend: expected None or one of .* got 'fast'"),
    ],
)
def test_constructor_refuses(arguments: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match="^" + message):
        RelativeMultiheadAttention(**(dict(embed_dim=8, num_heads=2, max_relative_position=2) | arguments))


def test_causal_with_two_lengths_needs_an_offset() -> None:
    layer = RelativeMultiheadAttention(8, 2, max_relative_position=2, batch_first=True)
    query, memory = torch.randn(1, 2, 8), torch.randn(1, 5, 8)
    for need_weights in (True, False):
        with pytest.raises(ValueError, match=r"^query_offset: .*2 queries and 5 keys"):
            layer(query, memory, memory, is_causal=True, need_weights=need_weights)
    _, weights = layer(query, memory, memory, is_causal=True, query_offset=torch.tensor([2]))
    assert (weights[0] > 0).tolist() == [[True] * 3 + [False] * 2, [True] * 4 + [False]]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("extra", [False, True])
def test_nothing_to_attend_to(need_weights: bool, extra: bool) -> None:
    """nn.MultiheadAttention gives NaN. With extra keys only these are left, and lse = -inf must not turn into NaN on the way."""
    torch.manual_seed(0)
    layer = RelativeMultiheadAttention(8, 2, max_relative_position=2, batch_first=True, add_bias_kv=extra, terms=ALL_TERMS)
    randomise(layer)
    inputs = torch.randn(2, 3, 8, requires_grad=True)
    padding = torch.tensor([[True] * 3, [False] * 3])
    output, weights = layer(inputs, inputs, inputs, padding, need_weights=need_weights)
    alone = layer.bias_v[0] if extra else torch.zeros(1, 8)
    torch.testing.assert_close(output[0], layer.out_proj(alone).expand(3, 8))
    if need_weights:
        torch.testing.assert_close(weights[0], torch.tensor([0.0, 0.0, 0.0] + [1.0] * extra).expand(3, -1))
    output.square().sum().backward()
    for tensor in (inputs, *layer.parameters()):
        assert torch.isfinite(tensor.grad).all()
    assert (inputs.grad[0] == 0).all()


@pytest.mark.parametrize("extra", [False, True])
def test_dropout_is_in_the_returned_weights(extra: bool) -> None:
    """Output = weights @ values with the very weights that are returned; the other path drops the same ones."""
    torch.manual_seed(0)
    layer = RelativeMultiheadAttention(8, 2, dropout=0.3, max_relative_position=2, batch_first=True, add_bias_kv=extra, bias=False)
    layer.out_proj.weight.data = torch.eye(8)
    inputs = torch.randn(4, 32, 8)
    torch.manual_seed(1)
    output, weights = layer(inputs, inputs, inputs, average_attn_weights=False)
    values = (inputs @ layer.in_proj_weight[16:].T).view(4, 32, 2, 4).transpose(1, 2)
    if extra:
        values = torch.cat((values, layer.bias_v.view(1, 2, 1, 4).expand(4, 2, 1, 4)), dim=2)
    torch.testing.assert_close(output.view(4, 32, 2, 4).transpose(1, 2), weights @ values)
    for dropped in (weights[..., :32] == 0, weights[..., 32:] == 0):
        assert dropped.numel() == 0 or abs(dropped.float().mean() - 0.3) < 0.09  # 256 extra weights: 3 standard deviations
    torch.manual_seed(1)
    torch.testing.assert_close(layer(inputs, inputs, inputs, need_weights=False)[0], output)
    layer.eval()
    whole = layer(inputs, inputs, inputs, average_attn_weights=False)[1]
    kept = weights != 0
    torch.testing.assert_close(weights[kept], whole[kept] / 0.7)


def test_weights_of_long_sequences_warn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_warned_of_weights", False)
    layer = RelativeMultiheadAttention(2, 1, max_relative_position=2)
    with warnings.catch_warnings(action="error"):
        layer(*[torch.randn(1023, 2)] * 3)
        layer(*[torch.randn(1024, 2)] * 3, need_weights=False)
    with pytest.warns(UserWarning, match="need_weights=False") as caught:
        layer(*[torch.randn(1024, 2)] * 3)
    assert caught[0].filename == __file__
    with warnings.catch_warnings(action="error"):
        layer(*[torch.randn(1024, 2)] * 3)


def test_parameters() -> None:
    """Names, shapes and start; the projections start as nn.MultiheadAttention's do from the same seed."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(64, 4, add_bias_kv=True)
    torch.manual_seed(0)
    ours = RelativeMultiheadAttention(64, 4, add_bias_kv=True, max_relative_position=(100, 3), terms=ALL_TERMS)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name)), name
    shapes = {name: tuple(value.shape) for name, value in relative_parameters(ours).items()}
    tables = dict.fromkeys(("rel_k", "rel_q", "rel_v"), (104, 16))
    assert shapes == tables | dict(rel_bias=(104,), pos_bias_u=(4, 16), pos_bias_v=(4, 16))
    for name, parameter in relative_parameters(ours).items():
        assert parameter.std().item() == pytest.approx(0.02 if name in tables else 0.0, rel=0.1)
    randomise(ours)
    ours._reset_parameters()
    assert ours.rel_k.std() < 0.03
    assert ours.in_proj_bias.abs().sum() == ours.rel_bias.abs().sum() == 0
    per_head = RelativeMultiheadAttention(64, 4, max_relative_position=3, terms=ALL_TERMS, per_head=True)
    assert per_head.rel_v.shape == (4, 7, 16)
    assert per_head.rel_bias.shape == (4, 7)
    assert list(relative_parameters(RelativeMultiheadAttention(64, 4, max_relative_position=3))) == ["rel_k"]
    without = RelativeMultiheadAttention(64, 4, max_relative_position=3, terms=("pos_bias", "rel_bias"))
    assert without.pos_bias_v is None  # it stands in rel_k's product only: no dead parameter
    assert "max_relative_position=(100, 3)" in repr(ours)
    assert {p.dtype for p in RelativeMultiheadAttention(4, 1, max_relative_position=1, dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16
    }
    assert RelativeMultiheadAttention(4, 1, max_relative_position=1, device="meta").rel_k.is_meta


@pytest.mark.parametrize("terms", [(term,) for term in ALL_TERMS] + [(), ALL_TERMS])
def test_every_parameter_gets_a_gradient(terms: tuple[str, ...]) -> None:
    layer = RelativeMultiheadAttention(8, 2, max_relative_position=2, terms=terms, add_bias_kv=True)
    inputs = torch.randn(4, 2, 8)
    layer(inputs, inputs, inputs, need_weights=False)[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_from_multihead_attention() -> None:
    theirs = nn.MultiheadAttention(8, 2, 0.1, False, True, True, 3, 5, True, dtype=torch.float64).eval()
    theirs.q_proj_weight.requires_grad_(False)
    ours = RelativeMultiheadAttention.from_multihead_attention(theirs, max_relative_position=4, terms=("rel_v",))
    nn.init.zeros_(ours.rel_v)
    query, key, value = (torch.randn(2, 3, size, dtype=torch.float64) for size in (8, 3, 5))
    for found, expected in zip(ours(query, key, value), theirs(query, key, value), strict=True):
        torch.testing.assert_close(found, expected)
    assert not ours.q_proj_weight.requires_grad
    assert ours.dropout == 0.1
    with pytest.raises(TypeError, match=r"^mha: expected a torch.nn.MultiheadAttention, got Linear"):
        RelativeMultiheadAttention.from_multihead_attention(nn.Linear(2, 2), max_relative_position=4)


def test_copies_and_state_dicts() -> None:
    torch.manual_seed(0)
    layer = RelativeMultiheadAttention(8, 2, max_relative_position=2, terms=ALL_TERMS, per_head=True, window=[2, None])
    randomise(layer)
    inputs = torch.randn(5, 2, 8)
    expected = layer(inputs, inputs, inputs)[0]
    other = RelativeMultiheadAttention(8, 2, max_relative_position=2, terms=ALL_TERMS, per_head=True, window=(2, None))
    assert str(other.load_state_dict(layer.state_dict())) == "<All keys matched successfully>"
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(inputs, inputs, inputs)[0], expected)
        assert twin._forward_pre_hooks  # or torch's fused path would take the twin
    parameters = {name: torch.zeros_like(value) for name, value in layer.named_parameters()} | {"out_proj.bias": torch.ones(8)}
    assert torch.equal(torch.func.functional_call(layer, parameters, (inputs,) * 3)[0], torch.ones(5, 2, 8))


def test_is_public() -> None:
    assert {"RelativeMultiheadAttention", "KeyValueCache"} <= set(relattn.__all__)
