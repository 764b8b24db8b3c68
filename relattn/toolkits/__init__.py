"""relattn in speech toolkits: the relative attention of NeMo, ESPnet, wenet, SpeechBrain and icefall.

Importing this module imports none of them: classes are recognised by the name of their module and their own.
"""

from __future__ import annotations

import importlib
import logging

from torch import nn

from relattn.conversion import Plan, carry_out, known_class, undo

__all__ = ["convert", "revert"]

_logger = logging.getLogger(__name__)

# A package, or a module's last name where a toolkit has no package -> the module here that has its `PLANS`.
_TOOLKITS = {
    "espnet": "espnet",
    "espnet2": "espnet",
    "nemo": "nemo",
    "speechbrain": "speechbrain",
    "torchaudio": "torchaudio",
    "wenet": "wenet",
    "conformer": "icefall",
    "zipformer": "icefall",
}


def convert(model: nn.Module, strict: bool = True) -> nn.Module:
    """Let `relattn.relative_attention` compute the relative attention of a speech toolkit's model, in place.

    Converted are, wherever they stand in `model`,

    - NeMo: ``RelPositionMultiHeadAttention`` (with caches and chunked masks), its local form
      ``RelPositionMultiHeadAttentionLongformer`` without global tokens, as a window, and the newer Transformer encoder's
      ``MultiHeadAttention`` with ``rel_pos``;
    - ESPnet 1 and 2: ``RelPositionMultiHeadedAttention``, ``LegacyRelPositionMultiHeadedAttention``, and the
      transducers' own, its simplified score too;
    - wenet: ``ShawRelPositionMultiHeadedAttention``, ``FiredRelPositionMultiHeadedAttention``, Squeezeformer's with
      ``do_rel_shift``;
    - SpeechBrain: ``RelPosMHAXL``;
    - icefall: the conformers' ``RelPositionMultiheadAttention``.

    Parameters, state dicts and files stay as they are; results change by rounding only, in training and evaluation,
    with padding, caches, autocast and half precision. Except that

    - dropout draws other numbers;
    - weights are made where a call says so and where a forward hook is on an ESPnet layer, whose `attn` its plots read.
      SpeechBrain's callers never say so, and drop what they get: the layer returns None in the place of weights unless
      `return_attn_weights` is given as an argument; there, and in icefall, the original makes them;
    - a query that may see nothing gets zeros where icefall's gives NaN.

    The original runs where a call does not have the shapes of relative attention, and for fewer than 512 keys with the
    shift of old (ESPnet's legacy form, Squeezeformer), which costs twice. `revert` before torch.jit.script.

    Args:
        model: any module.
        strict: False = return quietly where there is nothing to convert.

    Returns:
        `model` itself. Converting twice is the same as once. How many layers of which class were converted is logged
        (INFO).

    Raises:
        ValueError: nothing was converted (the message says why), unless ``strict=False``; or a class is laid out in an
            unknown way (the message names it and the toolkit's version). Then nothing has been changed.
    """
    carry_out(model, _plan_of, strict, lambda: "it has no layer of a class that relattn knows", _logger)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert`: every layer of `model` computes as before. Returns `model`."""
    undo(model, __name__)
    return model


def _plan_of(module: nn.Module) -> Plan | str | None:
    return known_class(module, _plans_by_name)


def _plans_by_name(known: type) -> dict[str, Plan | str] | None:
    names = known.__module__.split(".")
    toolkit = _TOOLKITS.get(names[0]) or _TOOLKITS.get(names[-1])
    if toolkit is None:
        return None
    return importlib.import_module(f"{__name__}.{toolkit}").PLANS
