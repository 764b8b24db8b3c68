"""How layers of other packages come to be computed by `relattn.relative_attention`, and back; no package is known here.

For each class that has relative attention there is a plan: which methods to replace, and what they must look like
before. Here is how plans are checked and carried out; `relattn.huggingface` and `relattn.toolkits` have the plans. A
replacement is set on the instance (``module.forward``), so that classes, parameters, buffers and state dicts stay what
they are; it reads the module's own parameters at every call, and calls the original for what the kernel does not give.
"""

from __future__ import annotations

import collections
import functools
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from relattn._version import __version__


class Replacement(NamedTuple):
    module: nn.Module
    method: str
    function: Callable
    is_attention: bool = True


# What a module's class has: its replacements, also in the modules below it, or why there is nothing to replace.
Plan = Callable[[Any], list[Replacement] | str]


# ---- carrying plans out ----


def carry_out(
    model: nn.Module,
    plan_of: Callable[[nn.Module], Plan | str | None],
    strict: bool,
    nothing_known: Callable[[], str],
    logger: logging.Logger,
    bind: Callable[[Replacement], None] | None = None,
) -> None:
    """Plan for every module of `model`, then replace: a plan that raises leaves all as it was.

    `plan_of` gives a class's plan, or why it has none, or None: nothing is to be said of it.
    """
    planned: list[Replacement] = []
    reasons: dict[str, str] = {}
    for module in model.modules():
        try:
            plan = plan_of(module)
            if plan is None:
                continue
            found = plan if isinstance(plan, str) else plan(module)
        except UnknownLayout as error:
            raise ValueError(error.told_of(_package_of(module))) from None
        if isinstance(found, str):
            reasons.setdefault(type(module).__name__, found)
        else:
            planned += found
    counts = collections.Counter(type(item.module).__name__ for item in planned if item.is_attention)
    reasons = {name: reason for name, reason in reasons.items() if name not in counts}
    if not counts:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or nothing_known()
        if strict:
            raise ValueError(f"model: nothing to convert in this {type(model).__name__} ({why})")
        logger.info("nothing to convert in %s (%s)", type(model).__name__, why)
        return
    for item in planned:
        (bind or bind_replacement)(item)
    logger.info("converted %s", ", ".join(f"{count} {name}" for name, count in counts.items()))
    for name, reason in reasons.items():
        logger.info("left as it is: %s (%s)", name, reason)


def undo(model: nn.Module, package: str) -> None:
    """Take away the replacements that `package` made; raise before the first of them if they can't be."""
    for module in model.modules():
        if any(is_bound(value, package) for name, value in vars(module).items() if name == "_old_forward"):
            raise RuntimeError(f"model: a converted {type(module).__name__} was wrapped since; remove accelerate's hooks first")
    for module in model.modules():
        names = [name for name, value in vars(module).items() if is_bound(value, package)]
        for name in [*names, "_replicate_for_data_parallel"] if names else []:
            delattr(module, name)


# ---- what plans are made with ----


def known_class(module: nn.Module, plans: Callable[[type], Mapping[str, Any] | None]) -> Any:
    """What `plans` has for the class of `module` or the nearest one above it, None if for none of them.

    `plans` gives a class's namespace of plans by name. A subclass may not have methods of its own for those that the known
    class has: a plan would pass them over.
    """
    for known in type(module).__mro__:
        named = plans(known)
        if named is None or known.__name__ not in named:
            continue
        for base in known.__mro__[: known.__mro__.index(nn.Module)]:
            for name, value in vars(base).items():
                if inspect.isfunction(value) and name != "__init__" and getattr(type(module), name) is not getattr(known, name):
                    raise unknown(module, f"a subclass of {known.__name__} with a {name} of its own")
        return named[known.__name__]
    return None


class UnknownLayout(Exception):
    """What `carry_out` makes a ValueError of, with the package's version."""

    def told_of(self, package: str) -> str:
        module, what = self.args
        return (
            f"model: {type(module).__module__}.{type(module).__qualname__} of {package} is "
            f"laid out in a way that relattn {__version__} does not know ({what}); nothing was converted"
        )


def unknown(module: nn.Module, what: str) -> UnknownLayout:
    return UnknownLayout(module, what)


def _package_of(module: nn.Module) -> str:
    """Name and version of the package that a class comes from: of the farthest base below torch, as users derive classes from it."""
    bases = [known.__module__.split(".")[0] for known in type(module).__mro__ if issubclass(known, nn.Module)]
    package = [name for name in bases if name != "torch"][-1]
    return f"{package} {getattr(sys.modules.get(package), '__version__', '(of unknown version)')}"


# Newer names of parameters, and those by which plans know them: of transformers 5.24. To other packages' plans the newer one is known.
_RENAMED = {"cache": "past_key_values"}


class _Renamed:
    """A replacement of a method that has newer names of parameters; no closure, since it is pickled together with its module."""

    def __init__(self, function: Callable, renamed: Mapping[str, str]) -> None:
        self.function, self.renamed, self.__module__ = function, renamed, function.__module__

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.function(*arguments, **{self.renamed.get(name, name): value for name, value in keywords.items()})


def check_parameters(module: nn.Module, method: str, parameters: str) -> dict[str, str]:
    """Raise if the method has others than `parameters`; newer names of these, if it has such."""
    given = getattr(type(module), method, None)
    renamed = {newer: known for newer, known in _RENAMED.items() if known in parameters.split()}
    own = () if given is None else inspect.signature(given).parameters
    names = None if given is None else " ".join(renamed.get(name, name) for name in own)
    if names != f"self {parameters}":
        raise unknown(module, f"{method}({names}), expected {method}(self {parameters})")
    return {newer: known for newer, known in renamed.items() if newer in own}


def part(module: nn.Module, name: str, kind: str = "ModuleList") -> Any:
    part = getattr(module, name, None)
    if type(part).__name__ != kind:
        raise unknown(module, f"its {name} is {type(part).__name__}, expected {kind}")
    return part


def replacement(
    module: nn.Module, method: str, function: Callable, parameters: str, is_attention: bool = True, **attributes: Any
) -> Replacement:
    """A replacement, after a look at the parameters of the method and at the attributes that `function` reads."""
    for name, kind in attributes.items():
        value = getattr(module, name, None)
        if not isinstance(value, kind):
            raise unknown(module, f"its attribute {name} is {type(value).__name__}")
    renamed = check_parameters(module, method, parameters)
    present = vars(module).get(method)
    if present is not None and not is_bound(present):
        raise ValueError(
            f"model: {method} of a {type(module).__name__} was replaced already (by accelerate's hooks?); convert the model before that"
        )
    return Replacement(module, method, _Renamed(function, renamed) if renamed else function, is_attention)


# ---- putting methods in place ----


class _Bound(functools.partial):
    """A replacement on its module; not a bound method: a partial is copied and pickled together with its module."""

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the original, in which transformers (and its tests) look for what a model takes: `output_attentions` in kwargs."""
        return inspect.signature(original(self.args[0], self.method))

    method: str


def original(module: nn.Module, method: str = "forward") -> Callable:
    return functools.partial(getattr(type(module), method), module)


def bind_replacement(item: Replacement) -> None:
    module = item.module
    setattr(module, item.method, _bound(*item[:3]))
    module._replicate_for_data_parallel = functools.partial(_replicate, module)  # type: ignore[assignment]


def _bound(module: nn.Module, method: str, function: Callable) -> _Bound:
    bound = _Bound(function, module)
    bound.method = method
    return bound


def is_bound(value: object, package: str = "relattn") -> bool:
    """Whether an attribute of a module is a replacement that `package` made."""
    defined_in = getattr(value.func, "__module__", None) if isinstance(value, functools.partial) else None
    return (defined_in or "").startswith(f"{package}.")


def _replicate(module: nn.Module) -> nn.Module:
    """nn.DataParallel's copy of a module for another device: bound to itself, not to what it was copied from."""
    replica = type(module)._replicate_for_data_parallel(module)
    for name, value in vars(module).items():
        if is_bound(value):
            replica.__dict__[name] = bound = type(value)(value.func, replica)
            vars(bound).update(vars(value))
    return replica
