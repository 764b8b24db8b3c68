"""`convert` and `revert`: the attention layers of Hugging Face models, computed by `relattn.relative_attention`.

For each class of transformers that has relative attention there is a plan: which methods to replace, and what they must
look like before. Here is how plans are looked up; which there are is in `families`, and no model is known here.
`relattn.conversion` carries them out: a replacement is set on the instance (``module.forward``), and calls the original
for what the kernel does not give.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from typing import Any

import transformers
from torch import nn

from relattn.conversion import (  # noqa: F401  what families import from here
    Plan,
    Replacement,
    bind_replacement,
    carry_out,
    check_parameters,
    is_bound,
    known_class,
    original,
    part,
    replacement,
    undo,
    unknown,
)
from relattn.huggingface import families
from relattn.huggingface.unconverted import reason_of

_logger = logging.getLogger(__name__)

# ---- what users call ----


def convert(model: nn.Module, strict: bool = True) -> nn.Module:
    """Let `relattn.relative_attention` compute the relative attention of a transformers model, in place.

    Converted are the self-attention layers of Wav2Vec2-BERT, Wav2Vec2-Conformer and SeamlessM4T v1
    (``position_embeddings_type`` "relative" and "relative_key"), SeamlessM4T v2, Parakeet, Nemotron ASR streaming,
    FastSpeech2-Conformer, SpeechT5's encoder, XLNet, Funnel, VITS, DeBERTa, DeBERTa v2 and SEW-D, WavLM, Granite Speech,
    Inkling, MPNet, and T5, mT5, UMT5, Switch Transformers, Pop2Piano and the decoders of LongT5, UDOP and Pix2Struct, wherever they
    stand in `model`. What else has relative positions, and why it is left, is in `relattn.huggingface.unconverted`.
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
    DeBERTa with `query_states`, Funnel's factorized form with dropout of its positions or with token types beyond 2,
    `output_attentions` of the models whose only implementation is eager, flex attention's block masks.

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
    carry_out(model, _plan_of, strict, lambda: _nothing_known(model), _logger, _bind)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert`: every layer of `model` computes as before. Returns `model`.

    Give it a whole encoder or more: an encoder's replaced parts and its layers' belong together, and a single layer
    cannot be reverted.

    Raises:
        RuntimeError: something (accelerate's hooks) has wrapped a converted layer since; remove it first. Nothing has
            been changed.
    """
    undo(model, __package__)
    for module in model.modules():
        if isinstance(vars(module).get("config"), CompactMasks):
            module.config = module.config.config  # type: ignore[assignment,union-attr]
    return model


# ---- which class has which plan ----

_POSITION_BIAS = (
    "its position_bias is made outside the attention, and relattn has no plan for this class; attn_implementation='sdpa' "
    "takes it, where the model has that"
)


def _plan_of(module: nn.Module) -> Plan | str | None:
    plan = known_class(module, _plans_by_name)
    if plan is None:
        return reason_of(type(module)) or (_POSITION_BIAS if _has_position_bias(module) else None)
    return plan


def _plans_by_name(known: type) -> dict[str, Plan] | None:
    folder = known.__module__.removeprefix("transformers.models.").split(".")[0]
    if known.__module__ != f"transformers.models.{folder}.modeling_{folder}" or folder not in families.FAMILIES:
        return None
    return importlib.import_module(f"{families.__name__}.{families.FAMILIES[folder]}").PLANS


def _has_position_bias(module: nn.Module) -> bool:
    """What T5's like hands from layer to layer."""
    if not type(module).__module__.startswith("transformers.models.") or "Attention" not in type(module).__name__:
        return False
    return "position_bias" in inspect.signature(type(module).forward).parameters


def _nothing_known(model: nn.Module) -> str:
    return "it has no layer of a class that relattn knows" + _without_interface(model)


def _without_interface(model: nn.Module) -> str:
    """Falcon and its like choose their attention from a dict of their own: transformers' bare KeyError: 'relattn'."""
    if not isinstance(model, transformers.PreTrainedModel) or model._supports_attention_backend:
        return ""
    return (
        ", and as its attention is not transformers' interface, attn_implementation='relattn' (KeyError: 'relattn') is not for "
        "it either: keep 'sdpa' or 'eager'"
    )


# ---- what plans are made with, beside `relattn.conversion` ----


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


def _bind(item: Replacement) -> None:
    if item.function is not CompactMasks:
        bind_replacement(item)
    elif not isinstance(item.module.config, CompactMasks):
        item.module.config = CompactMasks(item.module.config)  # type: ignore[assignment]
