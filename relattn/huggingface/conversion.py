"""`convert` and `revert`: the attention layers of Hugging Face models, computed by `relattn.relative_attention`.

For each class of transformers that has relative attention there is a plan: which methods to replace, and what they must
look like before. Here is how plans are looked up, checked and carried out; which there are is in `families`, and no
model is known here. A replacement is set on the instance (``module.forward``), so that classes, parameters, buffers and
state dicts stay what they are; it reads the module's own parameters at every call, and calls the original for what the
kernel does not give.
"""

from __future__ import annotations

import collections
import functools
import importlib
import inspect
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import transformers
from torch import nn

from relattn._version import __version__
from relattn.huggingface import families

_logger = logging.getLogger(__name__)


class Replacement(NamedTuple):
    module: nn.Module
    method: str
    function: Callable
    is_attention: bool = True


# What a module's class has: its replacements, also in the modules below it, or why there is nothing to replace.
Plan = Callable[[Any], list[Replacement] | str]

# ---- what users call ----


def convert(model: nn.Module, strict: bool = True) -> nn.Module:
    """Let `relattn.relative_attention` compute the relative attention of a transformers model, in place.

    Converted are the self-attention layers of Wav2Vec2-BERT, Wav2Vec2-Conformer and SeamlessM4T v1
    (``position_embeddings_type`` "relative" and "relative_key"), SeamlessM4T v2, Parakeet, Nemotron ASR streaming,
    FastSpeech2-Conformer, SpeechT5's encoder, XLNet, VITS, DeBERTa and DeBERTa v2, WavLM, MPNet, and T5, mT5, UMT5,
    Switch Transformers, Pop2Piano and LongT5's decoder, wherever they stand in `model`.
    Parameters, state dicts and files stay as they are; results change by rounding only, in training and evaluation,
    with padding, under autocast, gradient checkpointing and torch.compile. Except that

    - positions that are padding, whose values mean nothing, may hold other values than before (they are never attended
      to);
    - dropout draws other numbers, and dropout on position embeddings once per batch instead of once per sequence;
    - ``output_attentions=True`` gives weights also where the configuration says "sdpa", and materialises them as
      before;
    - Nemotron ASR streaming under "eager" is as under "sdpa": transformers' eager attention hides there what its mask
      shows.

    The original runs where a call asks for what the kernel does not give: XLNet with segment ids or two streams,
    DeBERTa with `query_states`, `output_attentions` of the models whose only implementation is eager, flex attention's
    block masks.

    Args:
        model: any module. Convert before accelerate dispatches it.
        strict: False = return quietly where there is nothing to convert.

    Returns:
        `model` itself. Converting twice is the same as once. How many layers of which class were converted is logged
        (INFO).

    Raises:
        ValueError: nothing was converted (the message says why), unless ``strict=False``; or a class of the installed
            transformers is laid out in an unknown way (the message names both). Then nothing has been changed.
    """
    planned: list[Replacement] = []
    reasons: dict[str, str] = {}
    for module in model.modules():
        plan = _plan_of(module)
        if plan is None:
            if _has_position_bias(module):
                reasons.setdefault(type(module).__name__, _POSITION_BIAS)
            continue
        found = plan(module)
        if isinstance(found, str):
            reasons.setdefault(type(module).__name__, found)
        else:
            planned += found
    counts = collections.Counter(type(item.module).__name__ for item in planned if item.is_attention)
    reasons = {name: reason for name, reason in reasons.items() if name not in counts}
    if not counts:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        why = why or "it has no layer of a class that relattn knows" + _without_interface(model)
        if strict:
            raise ValueError(f"model: nothing to convert in this {type(model).__name__} ({why})")
        _logger.info("nothing to convert in %s (%s)", type(model).__name__, why)
        return model
    for item in planned:
        _bind(item.module, item.method, item.function)
    _logger.info("converted %s", ", ".join(f"{count} {name}" for name, count in counts.items()))
    for name, reason in reasons.items():
        _logger.info("left as it is: %s (%s)", name, reason)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert`: every layer of `model` computes as before. Returns `model`.

    Give it a whole encoder or more: an encoder's replaced parts and its layers' belong together, and a single layer
    cannot be reverted.

    Raises:
        RuntimeError: something (accelerate's hooks) has wrapped a converted layer since; remove it first. Nothing has
            been changed.
    """
    for module in model.modules():
        if any(is_bound(value) for name, value in vars(module).items() if name == "_old_forward"):
            raise RuntimeError(
                f"model: a converted {type(module).__name__} was wrapped since; remove accelerate's hooks first"
            )
    for module in model.modules():
        for name in [name for name, value in vars(module).items() if is_bound(value)]:
            delattr(module, name)
        if isinstance(vars(module).get("config"), CompactMasks):
            module.config = module.config.config  # type: ignore[assignment,union-attr]
    return model


# ---- which class has which plan ----

_POSITION_BIAS = (
    "its position_bias is made outside the attention, and relattn has no plan for this class; attn_implementation='sdpa' "
    "takes it, where the model has that"
)


def _plan_of(module: nn.Module) -> Plan | None:
    for known in type(module).__mro__:
        folder = known.__module__.removeprefix("transformers.models.").split(".")[0]
        if known.__module__ != f"transformers.models.{folder}.modeling_{folder}" or folder not in families.FAMILIES:
            continue
        family = importlib.import_module(f"{families.__name__}.{families.FAMILIES[folder]}")
        if known.__name__ in family.PLANS:
            for name, value in vars(known).items():
                if inspect.isfunction(value) and name != "__init__" and getattr(type(module), name) is not value:
                    raise unknown(module, f"a subclass of {known.__name__} with a {name} of its own")
            return family.PLANS[known.__name__]
    return None


def _has_position_bias(module: nn.Module) -> bool:
    """UDOP, LongT5's encoder and their like."""
    if not type(module).__module__.startswith("transformers.models.") or "Attention" not in type(module).__name__:
        return False
    return "position_bias" in inspect.signature(type(module).forward).parameters


def _without_interface(model: nn.Module) -> str:
    """Falcon and its like choose their attention from a dict of their own: transformers' bare KeyError: 'relattn'."""
    if not isinstance(model, transformers.PreTrainedModel) or model._supports_attention_backend:
        return ""
    return (
        ", and as its attention is not transformers' interface, attn_implementation='relattn' (KeyError: 'relattn') is not for "
        "it either: keep 'sdpa' or 'eager'"
    )


# ---- what plans are made with ----


def unknown(module: nn.Module, what: str) -> ValueError:
    return ValueError(
        f"model: {type(module).__module__}.{type(module).__qualname__} of transformers {transformers.__version__} is "
        f"laid out in a way that relattn {__version__} does not know ({what}); nothing was converted"
    )


def check_parameters(module: nn.Module, method: str, parameters: str) -> None:
    given = getattr(type(module), method, None)
    names = None if given is None else " ".join(inspect.signature(given).parameters)
    if names != f"self {parameters}":
        raise unknown(module, f"{method}({names}), expected {method}(self {parameters})")


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
    check_parameters(module, method, parameters)
    present = vars(module).get(method)
    if present is not None and not is_bound(present):
        raise ValueError(
            f"model: {method} of a {type(module).__name__} was replaced already (by accelerate's hooks?); "
            "convert the model before that"
        )
    return Replacement(module, method, function, is_attention)


class CompactMasks:
    """In the place of an encoder's configuration: the masks it asks for stay (B, L), all else is the original's."""

    def __init__(self, config: Any) -> None:
        object.__setattr__(self, "config", config)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.config, name, value)

    @property
    def _attn_implementation(self) -> str:
        asked = self.config._attn_implementation
        return "relattn" if asked in ("sdpa", "eager") else asked

    def __getattr__(self, name: str) -> Any:
        if name == "config" or name.startswith("__"):  # while a copy is being made
            raise AttributeError(name)
        return getattr(self.config, name)


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


def _bind(module: nn.Module, method: str, function: Callable) -> None:
    if function is CompactMasks:
        if not isinstance(module.config, CompactMasks):
            module.config = CompactMasks(module.config)  # type: ignore[assignment]
        return
    setattr(module, method, _bound(module, method, function))
    module._replicate_for_data_parallel = functools.partial(_replicate, module)  # type: ignore[assignment]


def _bound(module: nn.Module, method: str, function: Callable) -> _Bound:
    bound = _Bound(function, module)
    bound.method = method
    return bound


def is_bound(value: object) -> bool:
    """Whether an attribute of a module is a replacement from here."""
    defined_in = getattr(value.func, "__module__", None) if isinstance(value, functools.partial) else None
    return (defined_in or "").startswith(f"{__package__}.")


def _replicate(module: nn.Module) -> nn.Module:
    """nn.DataParallel's copy of a module for another device: bound to itself, not to what it was copied from."""
    replica = type(module)._replicate_for_data_parallel(module)
    for name, value in vars(module).items():
        if is_bound(value):
            replica.__dict__[name] = bound = type(value)(value.func, replica)
            vars(bound).update(vars(value))
    return replica
