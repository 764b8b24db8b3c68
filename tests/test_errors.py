"""Bad input: every message names the argument, what was given and what is accepted, from the function and from `explain` alike."""

import inspect
import re
import warnings
from typing import NamedTuple

import pytest
import torch

import relattn
from relattn import backends, relative_attention
from relattn.backends import Backend
from tests.oracles import USABLE

BATCH, HEADS, LENGTH, SIZE = 2, 4, 5, 8  # all different, so that a message with two of them mixed up does not match


def f(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(shape, **options)


def good() -> dict:
    tensors = {name: f(BATCH, HEADS, LENGTH, SIZE) for name in ("query", "key", "value")}
    return tensors | dict(rel_k=f(3, SIZE))


def every(dtype: torch.dtype, **more) -> dict:
    """The call in another dtype."""
    return {name: value.to(dtype) for name, value in good().items()} | more


class Case(NamedTuple):
    argument: str
    error: type[Exception]
    accepted: str  # what the message says is accepted, literally
    given: str  # and what was given
    changes: dict  # to the good call


FOUR = "4 dimensions (batch, heads, length, head size)"
FLOATS = "torch.float32, torch.float64, torch.bfloat16, torch.float16"
MASK = "a shape broadcastable to (2, 4, 5, 5)"
CLIP = "an int or (left, right)"
WINDOW = "(left, right), each a number or None"
BACKENDS = f"None or one of {', '.join(map(repr, relattn.available_backends()))}"
with warnings.catch_warnings():  # torch calls them a prototype
    warnings.simplefilter("ignore")
    nested = torch.nested.nested_tensor([f(HEADS, LENGTH, SIZE), f(HEADS, 3, SIZE)])
jagged = torch.nested.nested_tensor([f(LENGTH, HEADS, SIZE), f(3, HEADS, SIZE)], layout=torch.jagged)
NO_NESTED = "nested tensors are not supported; pad them and give key_lengths"

# fmt: off
CASES = [
    # What is no tensor; rank. A packed (tokens, heads, size) tensor has the wrong rank too.
    *(Case(name, TypeError, "expected a tensor", "got NoneType", {name: None}) for name in ("query", "key", "value")),
    *(
        Case(name, TypeError, "expected a tensor", "got list", {name: [1.0]})
        for name in (
            "query", "key", "value", "rel_k", "rel_q", "rel_v", "rel_bias", "pos_bias_u", "pos_bias_v", "attn_mask", "key_mask",
            "key_lengths",
        )
    ),
    *(Case(name, ValueError, FOUR, "(4, 5, 8)", {name: f(HEADS, LENGTH, SIZE)}) for name in ("query", "key", "value")),
    Case("query", ValueError, FOUR, "(1, 2, 4, 5, 8)", dict(query=f(1, BATCH, HEADS, LENGTH, SIZE))),
    Case("query", ValueError, FOUR, "(10, 4, 8)", {name: f(10, HEADS, SIZE) for name in ("query", "key", "value")}),
    *(Case(name, TypeError, NO_NESTED, "nested", {name: nested}) for name in ("query", "key", "value", "rel_k", "attn_mask")),
    Case("query", TypeError, NO_NESTED, "nested", dict(query=jagged)),
    # Sizes of query, key, value
    Case("query", ValueError, "a head size of at least 1", "(2, 4, 5, 0)", dict(query=f(2, 4, 5, 0), key=f(2, 4, 5, 0), rel_k=None)),
    Case("key", ValueError, "(2, heads, length, 8)", "got (2, 4, 5, 7)", dict(key=f(2, 4, 5, 7))),
    Case("key", ValueError, "(2, heads, length, 8)", "got (1, 4, 5, 8)", dict(key=f(1, 4, 5, 8))),
    Case("value", ValueError, "(2, 4, 5, size)", "got (2, 4, 6, 8)", dict(value=f(2, 4, 6, 8))),
    Case("value", ValueError, "(2, 4, 5, size)", "got (2, 2, 5, 8)", dict(value=f(2, 2, 5, 8))),
    Case("value", ValueError, "(2, 4, 5, size)", "got (1, 4, 5, 8)", dict(value=f(1, 4, 5, 8))),
    Case("key", ValueError, "4 heads as query has", "got 2 (enable_gqa=True allows fewer)", dict(key=f(2, 2, 5, 8), value=f(2, 2, 5, 8))),
    *(
        Case("key", ValueError, "divides query's 4", f"got {heads}", dict(key=f(2, heads, 5, 8), value=f(2, heads, 5, 8), enable_gqa=True))
        for heads in (3, 8, 0)
    ),
    # Tables
    *(Case(name, ValueError, "(R, 8) or (4, R, 8)", "(3, 7)", {name: f(3, 7)}) for name in ("rel_k", "rel_q", "rel_v")),
    *(Case(name, ValueError, "(R, 8) or (4, R, 8)", "(2, 3, 8)", {name: f(2, 3, SIZE)}) for name in ("rel_k", "rel_q", "rel_v")),
    *(Case(name, ValueError, "(R, 8) or (4, R, 8)", "(1, 3, 8)", {name: f(1, 3, SIZE)}) for name in ("rel_k", "rel_q", "rel_v")),
    *(Case(name, ValueError, "(R, 8) or (4, R, 8)", "got (8,)", {name: f(SIZE)}) for name in ("rel_k", "rel_q", "rel_v")),
    Case("rel_v", ValueError, "(R, 6) or (4, R, 6)", "got (3, 8)", dict(value=f(2, 4, 5, 6), rel_v=f(3, 8))),
    *(Case("rel_bias", ValueError, "(R,) or (4, R)", f"got {got}", dict(rel_bias=f(*shape)))
      for shape, got in (((3, 3), "(3, 3)"), ((), "()"), ((4, 3, 1), "(4, 3, 1)"))),
    *(Case(name, ValueError, "3 rows as the other tables have", "got 5", {name: f(5, SIZE)}) for name in ("rel_q", "rel_v")),
    Case("rel_bias", ValueError, "3 rows as the other tables have", "got 5", dict(rel_bias=f(HEADS, 5))),
    *(Case(name, ValueError, "at least one row", "got 0", {"rel_k": None, name: f(0, SIZE)}) for name in ("rel_k", "rel_q", "rel_v")),
    Case("rel_bias", ValueError, "at least one row", "got 0", dict(rel_k=None, rel_bias=f(0))),
    *(Case(name, ValueError, "expected (4, 8)", f"got {got}", {name: f(*shape)})
      for name in ("pos_bias_u", "pos_bias_v") for shape, got in (((8,), "(8,)"), ((1, 8), "(1, 8)"), ((4, 7), "(4, 7)"))),
    # The clip
    Case("max_relative_position", ValueError, "left + right + 1 = 4", "tables of 4 rows", dict(rel_k=f(4, SIZE))),
    Case("max_relative_position", ValueError, "= 5 rows", "got 3", dict(max_relative_position=2)),
    Case("max_relative_position", ValueError, "2 + 2 + 1 = 5 rows", "got 4", dict(rel_k=f(4, SIZE), max_relative_position=2)),
    Case("max_relative_position", ValueError, "0 + 3 + 1 = 4 rows", "got 3", dict(max_relative_position=(0, 3))),
    Case("max_relative_position", ValueError, "at least 0", "got -1", dict(max_relative_position=-1)),
    Case("max_relative_position", ValueError, "at least 0", "got (3, -1)", dict(max_relative_position=(3, -1))),
    Case("max_relative_position", ValueError, "no table", "given as 3", dict(rel_k=None, max_relative_position=3)),
    *(Case("max_relative_position", TypeError, CLIP, f"got {given!r}", dict(max_relative_position=given))
      for given in (1.0, True, "1", (1, 1, 1), (1,), (0.5, 0.5), (None, 1), (True, True))),
    # Masks
    *(Case("attn_mask", ValueError, MASK, f"got ({', '.join(map(str, shape))})", dict(attn_mask=f(*shape)))
      for shape in ((5, 4), (3, 1, 5, 5), (2, 2, 5, 5), (1, 1, 1, 5, 5))),
    Case("attn_mask", TypeError, "torch.float32 or torch.bool", "got torch.int64", dict(attn_mask=f(5, 5, dtype=torch.int64))),
    Case("attn_mask", TypeError, "torch.float32 or torch.bool", "got torch.uint8", dict(attn_mask=f(5, 5, dtype=torch.uint8))),
    Case("attn_mask", TypeError, "torch.float32 or torch.bool", "got torch.float16", dict(attn_mask=f(5, 5, dtype=torch.float16))),
    Case("attn_mask", TypeError, "torch.float32 or torch.bool", "got torch.complex64", dict(attn_mask=f(5, 5, dtype=torch.complex64))),
    Case("key_mask", TypeError, "torch.bool", "got torch.float32", dict(key_mask=f(2, 5))),
    Case("key_mask", TypeError, "torch.bool", "got torch.int64", dict(key_mask=f(2, 5).long())),
    *(Case("key_mask", ValueError, "(2, 5)", f"got {got}", dict(key_mask=f(*shape).bool()))
      for shape, got in (((2, 4), "(2, 4)"), ((5,), "(5,)"), ((1, 5), "(1, 5)"), ((2, 1, 1, 5), "(2, 1, 1, 5)"))),
    Case("key_lengths", TypeError, "an integer dtype", "got torch.float32", dict(key_lengths=f(2))),
    Case("key_lengths", TypeError, "an integer dtype", "got torch.bool", dict(key_lengths=f(2).bool())),
    *(Case("key_lengths", ValueError, "(2,)", f"got {got}", dict(key_lengths=f(*shape).long()))
      for shape, got in (((3,), "(3,)"), ((1,), "(1,)"), ((), "()"), ((2, 1), "(2, 1)"))),
    # Causal, window, offset. Conflicting causal settings: a window that looks ahead, lengths that leave the diagonal open.
    *(Case("window", TypeError, WINDOW, f"got {given!r}", dict(window=given))
      for given in (3, "12", (1, 2, 3), (1.0, 2), (True, 2), (None,), torch.tensor([1, 2]))),
    Case("window", ValueError, "at least 0", "got (-1, 2)", dict(window=(-1, 2))),
    Case("window", ValueError, "at least 0", "got (None, -2)", dict(window=(None, -2))),
    Case("window", ValueError, "(left, 0) or (left, None)", "(2, 1)", dict(window=(2, 1), is_causal=True)),
    Case("query_offset", ValueError, "give 2 if the last query stands at the last key, 0 if", "is_causal with 5 queries and 7 keys",
         dict(key=f(2, 4, 7, 8), value=f(2, 4, 7, 8), is_causal=True)),
    *(Case("chunk", TypeError, "(size, left_chunks)", f"got {given!r}", dict(chunk=given))
      for given in (3, (1,), (1, 2, 3), (None, 1), (1.0, 1), (2, True), "12")),
    *(Case("chunk", ValueError, "a size of at least 1 and at least 0 chunks", f"got {given}", dict(chunk=given))
      for given in ((0, 1), (-1, None), (2, -1))),
    *(Case("chunk", ValueError, "at most 2**30", f"got {given}", dict(chunk=given)) for given in ((2**30 + 1, 1), (2, 2**31))),
    Case("query_offset", ValueError, "give 2 if the last query stands at the last key, 0 if", "chunk with 5 queries and 7 keys",
         dict(key=f(2, 4, 7, 8), value=f(2, 4, 7, 8), chunk=(2, 1))),
    Case("query_offset", ValueError, "give -4 if", "is_causal with 5 queries and 1 keys",
         dict(key=f(2, 4, 1, 8), value=f(2, 4, 1, 8), is_causal=True)),
    *(Case("query_offset", TypeError, "an int or an integer tensor", f"got {type(given).__name__}", dict(query_offset=given))
      for given in (1.0, True, "1", [0, 1])),
    Case("query_offset", TypeError, "an integer dtype", "got torch.float32", dict(query_offset=f(2))),
    Case("query_offset", TypeError, "an integer dtype", "got torch.bool", dict(query_offset=torch.tensor(True))),
    *(Case("query_offset", ValueError, "(2,)", f"got {got}", dict(query_offset=f(*shape).long()))
      for shape, got in (((3,), "(3,)"), ((1,), "(1,)"), ((2, 1), "(2, 1)"))),
    # Numbers
    *(Case("dropout_p", ValueError, "a probability in [0, 1]", f"got {given}", dict(dropout_p=given))
      for given in (-0.1, 1.5, float("nan"), float("inf"))),
    *(Case("backend", ValueError, BACKENDS, f"got {given!r}", dict(backend=given))
      for given in ("flash", "", 3)),
    # Dtypes
    *(Case("query", TypeError, FLOATS, f"got {dtype}", every(dtype))
      for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)),
    Case("key", TypeError, "torch.float16 as query", "got torch.float32", dict(query=f(2, 4, 5, 8).half())),
    Case("value", TypeError, "torch.float32 as query", "got torch.float64", dict(value=f(2, 4, 5, 8).double())),
    *(
        Case(name, TypeError, accepted, f"got {given}", every(dtype) | {"rel_k": None, name: f(*shape, dtype=given)})
        for name, shape in (
            ("rel_k", (3, 8)), ("rel_q", (3, 8)), ("rel_v", (3, 8)), ("rel_bias", (3,)), ("pos_bias_u", (4, 8)), ("pos_bias_v", (4, 8)),
            ("attn_mask", (5, 5)),
        )
        for dtype, given, accepted in (
            (torch.float32, torch.float64, "torch.float32"),
            (torch.float32, torch.bfloat16, "torch.float32"),
            (torch.float64, torch.float32, "torch.float64"),
            (torch.float16, torch.bfloat16, "torch.float16 or torch.float32"),
            (torch.bfloat16, torch.int64, "torch.bfloat16 or torch.float32"),
        )
    ),
    # Devices: the meta device stands for another one on any machine
    *(Case(name, ValueError, "device cpu as query", "got meta", {name: value.to("meta")}) for name, value in (
        ("key", f(2, 4, 5, 8)), ("value", f(2, 4, 5, 8)), ("rel_k", f(3, 8)), ("rel_q", f(3, 8)), ("rel_v", f(3, 8)), ("rel_bias", f(3)),
        ("pos_bias_u", f(4, 8)), ("pos_bias_v", f(4, 8)), ("attn_mask", f(5, 5)), ("key_mask", f(2, 5).bool()),
        ("key_lengths", f(2).long()),
    )),
    # Found by looking for what slipped through
    Case("pos_bias_v", ValueError, "rel_k's product", "rel_k is None", dict(pos_bias_v=f(4, 8), rel_k=None)),
    Case("scale", ValueError, "a finite number", "got a larger one", dict(scale=10**400)),
    *(Case("scale", TypeError, "a number", f"got {given!r}", dict(scale=given)) for given in ("1", 1j)),
    *(Case("scale", ValueError, "a finite number", f"got {given}", dict(scale=given)) for given in (float("nan"), float("inf"))),
    *(Case("dropout_p", TypeError, "a probability in [0, 1]", f"got {given!r}", dict(dropout_p=given)) for given in ("0.1", None)),
    Case("is_causal", TypeError, "a bool", "got str", dict(is_causal="no")),
    Case("is_causal", TypeError, "a bool", "got Tensor", dict(is_causal=f(5, 5).bool())),  # a mask where a flag belongs
    Case("backend", ValueError, BACKENDS, "got ['cpu']", dict(backend=["cpu"])),
    Case("query_offset", ValueError, "device cpu as query", "got meta", dict(query_offset=f(2, dtype=torch.int64, device="meta"))),
    Case("query_offset", ValueError, "64-bit", "got 1180591620717411303424", dict(query_offset=2**70)),
    Case("value", ValueError, "a size of at least 1", "got (2, 4, 5, 0)", dict(value=f(2, 4, 5, 0))),
    Case("query", TypeError, "strided", "sparse", dict(query=f(2, 4, 5, 8).to_sparse())),
]
# fmt: on

# Any truth value means the same here as anywhere in Python.
CANNOT_BE_WRONG = {"return_lse", "enable_gqa"}


def names(case: Case) -> str:
    return f"{case.argument}: {case.given}"


all_cases = pytest.mark.parametrize("case", CASES, ids=names)


@pytest.mark.parametrize("function", [relative_attention, relattn.explain])
@all_cases
def test_bad_input_is_named(case: Case, function) -> None:
    with pytest.raises(case.error) as caught:
        function(**(good() | case.changes))
    assert type(caught.value) is case.error
    message = str(caught.value)
    assert message.startswith(f"{case.argument}: "), message
    assert case.accepted in message, message
    assert case.given in message, message


def test_the_call_that_all_cases_change_is_good() -> None:
    """Else a case could pass for another case's reason."""
    assert relative_attention(**good()).shape == (BATCH, HEADS, LENGTH, SIZE)


def test_every_parameter_is_covered() -> None:
    """A parameter added later needs a bad example, or a reason why it has none."""
    parameters = set(inspect.signature(relative_attention).parameters)
    assert {case.argument for case in CASES} | CANNOT_BE_WRONG == parameters


@pytest.mark.parametrize("function", [relative_attention, relattn.explain])
@pytest.mark.parametrize("name", ["cu_seqlens", "positions", "need_weights"])
def test_unknown_arguments_are_refused_by_name(function, name: str) -> None:
    """Packed sequences have a function of their own; positions in two dimensions are out of scope."""
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\) got .*unexpected .*{name}"):
        function(**good(), **{name: torch.tensor([0, 5])})


def test_masks_cannot_be_given_by_position() -> None:
    """SDPA's fourth argument is attn_mask, ours is rel_k: beyond it everything is by keyword."""
    with pytest.raises(TypeError, match="positional"):
        relative_attention(*good().values(), f(3, SIZE))


def test_sdpas_call_with_a_mask_in_fourth_place_is_refused() -> None:
    """A mask passed as to SDPA lands in rel_k. With as many keys as D even its shape (7, 8) is a table's; its dtype gives it away."""
    query, key = f(2, 4, 7, 8), f(2, 4, 8, 8)
    with pytest.raises(TypeError, match=r"^rel_k: expected torch.float32 beside .*, got torch.bool"):
        relative_attention(query, key, key, torch.ones(7, 8, dtype=torch.bool))


@pytest.mark.parametrize("value", [f(2, 4, 5, 8), f(2, 4, 5, 8).double()], ids=["float32", "float64"])
def test_autocast_decides_dtypes_before_they_are_checked(value: torch.Tensor) -> None:
    """Under autocast a half-precision query beside float32 keys is fine, as for torch's attention; float64, never cast, is not."""
    with torch.autocast("cpu", torch.bfloat16):
        if value.dtype == torch.float32:
            assert relative_attention(value.bfloat16(), value, value).dtype == torch.bfloat16
        else:
            with pytest.raises(TypeError, match=r"^value: expected torch.bfloat16 as query, got torch.float64"):
                relative_attention(value.float(), value.float(), value)


# Choice of a backend


def fake_backend(monkeypatch: pytest.MonkeyPatch, unavailable: str | None = None, unsupported: str | None = None) -> list:
    """A backend "fake", the fastest of all; the list fills with its calls."""
    done = []

    def forward(tensors, settings, seed):
        done.append((tensors, settings))
        return backends.BACKENDS["blocked"].forward(tensors, settings, seed)

    fake = Backend(lambda: unavailable, lambda tensors, settings: unsupported, forward, backends.BACKENDS["blocked"].backward)
    monkeypatch.setattr(backends, "BACKENDS", {"fake": fake} | backends.BACKENDS)
    return done


def test_the_fastest_backend_that_can_is_used_and_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    before = relattn.explain(**good()).backend
    done = fake_backend(monkeypatch)
    assert relattn.explain(**good()).backend == "fake"
    assert "fake" not in relattn.explain(**good()).reasons
    assert done == []  # explain computes nothing
    relative_attention(**good())
    assert len(done) == 1
    relative_attention(**good(), backend=before)  # the choice by name wins
    assert len(done) == 1
    assert relattn.explain(**good(), backend="reference").backend == "reference"


@pytest.mark.parametrize("how", ["unavailable", "unsupported"])
def test_a_backend_that_cannot_is_passed_over_but_raises_when_named(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    reason = "no tables of more than 2 rows on a Tuesday"
    before = relattn.explain(**good())
    done = fake_backend(monkeypatch, **{how: reason})
    after = relattn.explain(**good())
    assert after.backend == before.backend
    assert after.reasons == {"fake": reason} | before.reasons
    assert str(after).splitlines()[:2] == [f"backend: {before.backend}", f"  not fake: {reason}"]
    relative_attention(**good())
    for function in (relative_attention, relattn.explain):
        with pytest.raises(ValueError, match=re.escape(f"backend: 'fake' cannot take this call: {reason}")):
            function(**good(), backend="fake")
    assert done == []
    assert relattn.available_backends()["fake"] == (reason if how == "unavailable" else None)


@pytest.mark.parametrize("backend", [name for name in relattn.available_backends() if name not in USABLE])
@pytest.mark.parametrize("function", [relative_attention, relattn.explain])
def test_backends_that_this_machine_lacks_say_why(backend: str, function) -> None:
    reason = relattn.available_backends()[backend]
    assert len(reason) > 10
    with pytest.raises(ValueError, match=re.escape(f"backend: '{backend}' cannot take this call: {reason}")):
        function(**good(), backend=backend)
    assert relattn.explain(**good()).reasons[backend] == reason


def test_explain_takes_what_the_function_takes() -> None:
    parameters = inspect.signature(relative_attention).parameters
    arguments = {name: parameter.default for name, parameter in parameters.items() if parameter.default is not parameter.empty}
    explanation = relattn.explain(**(arguments | good()))
    assert explanation == relattn.explain(**good())
    assert str(explanation).startswith(f"backend: {explanation.backend}")
    assert set(explanation.reasons) | {explanation.backend} <= set(relattn.available_backends())


def test_bad_arguments_come_before_the_choice_of_a_backend() -> None:
    """A wrong shape is the caller's first problem, whatever backend was named."""
    for backend in relattn.available_backends():
        with pytest.raises(ValueError, match=r"^rel_k: "):
            relative_attention(**(good() | dict(rel_k=f(3, 7))), backend=backend)


def test_nothing_is_changed_or_drawn_by_a_refused_call() -> None:
    """A call that raises leaves torch's generator alone."""
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"^window: "):
        relative_attention(**good(), dropout_p=0.5, window=(-1, 0))
    relattn.explain(**good(), dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), state)
