"""Hypothesis tests whose failures can be written down.

A test under `@draws.given` gets an argument `draw`, with which it draws all that it needs. When it fails, what it drew is
printed as the explicit example that draws the same again, also with another hypothesis and other strategies:

    @draws.example(3, True, "bool")
    @draws.given
    def test_something(draw): ...

`make explore` writes that line itself (tests/conftest.py), `make test` runs it ever after.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import math
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

WIDTH = 120  # of the lines written

# Neither the clock nor the machine's load decides over a test.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
_new = (Phase.explicit, Phase.generate, Phase.shrink)  # no database: what it would remember becomes an explicit example
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow], phases=_new, database=None)
settings.load_profile("same")  # pytest --hypothesis-profile=explore loads the other one

# One number in twenty would be a constant from the sources of the modules imported by then, which differ between runs.
with contextlib.suppress(ImportError, AttributeError):  # not public; older hypothesis has none
    from hypothesis.internal.conjecture import providers

    providers.HypothesisProvider._local_constants = providers.Constants()  # type: ignore[assignment]


def exploring() -> bool:
    return settings.get_current_profile_name() == "explore"


class Drawn:
    """The values of a run: `draw` of a test where they are an explicit example, else recorded as the test draws."""

    def __init__(self, *values: Any, data: st.DataObject | None = None) -> None:
        self.values, self._data = list(values), data
        self._left: list[Any] = []  # of an explicit example

    def __repr__(self) -> str:
        return f"Drawn({', '.join(map(_text, self.values))})"

    def drawer(self) -> Callable[[st.SearchStrategy], Any]:
        if self._data is None:
            self._left = list(self.values)
            return self._repeat
        self.values.clear()
        return self._record

    def _repeat(self, strategy: st.SearchStrategy) -> Any:
        assert self._left, f"out of date: the test draws more than {self!r}"
        return self._left.pop(0)

    def check_used(self) -> None:
        assert not self._left, f"out of date: the test draws less than {self!r}"

    def _record(self, strategy: st.SearchStrategy) -> Any:
        assert self._data is not None
        value = self._data.draw(strategy)
        self.values.append(value)
        return value


def _text(value: Any) -> str:
    """As Python reads it: `inf` alone would be a name."""
    return f'float("{value}")' if isinstance(value, float) and not math.isfinite(value) else repr(value)


def given(test: Callable) -> Callable:
    @functools.wraps(test)
    def noted(*args: Any, draw: Drawn, **kwargs: Any) -> None:
        try:
            test(*args, draw=draw.drawer(), **kwargs)
            draw.check_used()
        except Exception:
            hypothesis.note(f"@draws.example({', '.join(map(_text, draw.values))})")
            raise

    return hypothesis.given(draw=st.builds(lambda data: Drawn(data=data), st.data()))(noted)


def example(*values: Any) -> Callable:
    return hypothesis.example(draw=Drawn(*values))


def keep(test: Callable, error: BaseException) -> Iterator[str]:
    """Write the examples that `error` came with above `test`, in its file, and yield them."""
    for inner in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
        yield from keep(test, inner)
    for line in getattr(error, "__notes__", ()):
        if line.startswith("@draws.example("):
            plain = inspect.unwrap(test.hypothesis.inner_test)  # type: ignore[attr-defined]
            path = Path(inspect.getfile(plain))
            path.write_text(with_decorator(path.read_text(encoding="utf-8"), plain.__name__, line), encoding="utf-8")
            yield line


def with_decorator(source: str, name: str, decorator: str) -> str:
    """`source` with one more decorator for the function of this name, unless it has it."""
    function = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.name == name)
    if ast.unparse(ast.parse(decorator[1:])) in map(ast.unparse, function.decorator_list):
        return source
    lines, first = source.splitlines(keepends=True), min(node.lineno for node in function.decorator_list) - 1
    indent = " " * function.col_offset
    text = indent + decorator
    if len(text) > WIDTH:
        start, values = decorator.split("(", 1)
        inside = textwrap.indent(textwrap.fill(values[:-1], WIDTH - len(indent) - 4, break_long_words=False), indent + "    ")
        text = f"{indent}{start}(\n{inside}\n{indent})"
    return "".join((*lines[:first], text + "\n", *lines[first:]))
