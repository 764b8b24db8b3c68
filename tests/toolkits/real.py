"""The toolkits' own layers, of those that are installed (`make test-toolkits`; wenet from a clone on PYTHONPATH).

Their packages bring half of PyPI when they are imported. Packages are taken here without their `__init__`, so that the
files of the layers load with torch alone: their code is what runs, unchanged.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from importlib import metadata
from importlib.machinery import PathFinder
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


def _bare(*names: str) -> None:
    """Packages whose `__init__` is not executed."""
    for name in names:
        if name in sys.modules:
            continue
        parent, _, last = name.rpartition(".")
        module = types.ModuleType(name)
        if parent:
            module.__path__ = [f"{folder}/{last}" for folder in sys.modules[parent].__path__]
            setattr(sys.modules[parent], last, module)
        else:
            spec = PathFinder.find_spec(name)
            assert spec is not None
            module.__path__ = list(spec.submodule_search_locations or [])
        sys.modules[name] = module


def _version(package: str, distribution: str) -> None:
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        version = "(a clone)"
    vars(sys.modules[package])["__version__"] = version


def _nemo() -> dict[str, type]:
    _bare("nemo", "nemo.utils")
    _version("nemo", "nemo_toolkit")
    casts = importlib.import_module("nemo.utils.cast_utils")
    vars(sys.modules["nemo.utils"])["avoid_float16_autocast_context"] = casts.avoid_float16_autocast_context
    folder = "nemo.collections.asr.parts.submodules"
    _bare("nemo.collections", "nemo.collections.asr", "nemo.collections.asr.parts", folder)
    module = importlib.import_module(f"{folder}.multi_head_attention")
    names = ("RelPositionMultiHeadAttention", "RelPositionMultiHeadAttentionLongformer")
    # The newer encoder's file, with stand-ins for what it takes from the rest of NeMo beside its attention.
    _of_names(f"{folder}.subsampling", "FeatureStacking", "StackingSubsampling")
    _of_names("nemo.utils.decorators", "experimental")
    _bare("nemo.core", "nemo.core.classes")
    _of_names("nemo.core.classes.module", "freeze", "unfreeze")
    _bare("nemo.collections.asr.modules")
    transformer = importlib.import_module("nemo.collections.asr.modules.transformer_encoder")
    vars(transformer)["flex_attention"] = _with_gradients(transformer.flex_attention)
    return {name: getattr(module, name) for name in names} | {"NemoTransformer": transformer.MultiHeadAttention}


def _with_gradients(flex_attention: Callable) -> Callable:
    """FlexAttention, which has no backward pass on CPUs: where one may come it is written out."""

    def attention(query: Tensor, key: Tensor, value: Tensor, block_mask: Any, score_mod: Callable) -> Tensor:
        if not torch.is_grad_enabled():
            return flex_attention(query, key, value, block_mask=block_mask, score_mod=score_mod)
        b, h, i, j = torch.meshgrid(*(torch.arange(size) for size in (*query.shape[:3], key.shape[2])), indexing="ij")
        scores = score_mod(query @ key.mT * query.shape[-1] ** -0.5, b, h, i, j)
        if block_mask is not None:
            scores = scores.masked_fill(~block_mask.mask_mod(b, h, i, j), float("-inf"))
        return scores.softmax(-1) @ value

    return attention


def _of_names(module: str, *names: str) -> None:
    """A module in which each of the names is a decorator that changes nothing."""
    if module not in sys.modules:
        sys.modules[module] = types.ModuleType(module)
        vars(sys.modules[module]).update(dict.fromkeys(names, lambda decorated: decorated))


def _espnet() -> dict[str, type]:
    module = importlib.import_module("espnet.nets.pytorch_backend.transformer.attention")
    names = ("RelPositionMultiHeadedAttention", "LegacyRelPositionMultiHeadedAttention")
    transducer = importlib.import_module("espnet2.asr_transducer.encoder.modules.attention")
    return {name: getattr(module, name) for name in names} | {"TransducerAttention": transducer.RelPositionMultiHeadedAttention}


def _wenet() -> dict[str, type]:
    _bare("wenet", "wenet.models", *(f"wenet.models.{name}" for name in ("transformer", "firered", "squeezeformer")))
    _version("wenet", "wenet")
    attention, fired, squeezeformer = (
        importlib.import_module(f"wenet.models.{name}.attention") for name in ("transformer", "firered", "squeezeformer")
    )
    return dict(
        PlainWenet=attention.RelPositionMultiHeadedAttention,
        ShawRelPositionMultiHeadedAttention=attention.ShawRelPositionMultiHeadedAttention,
        FiredRelPositionMultiHeadedAttention=fired.FiredRelPositionMultiHeadedAttention,
        Squeezeformer=squeezeformer.RelPositionMultiHeadedAttention,
    )


class _Functional:
    """torch.nn.functional, whose softmax keeps its input's dtype: SpeechBrain's float32 does not fit float64 values."""

    def __getattr__(self, name: str):
        return getattr(nn.functional, name)

    def softmax(self, scores, dim, dtype):
        return scores.softmax(dim)


def _speechbrain() -> dict[str, type]:
    _torchaudio()  # which it imports, and does not need for its layers
    module = importlib.import_module("speechbrain.nnet.attention")
    vars(module)["F"] = _Functional()
    return {"RelPosMHAXL": module.RelPosMHAXL}


def _torchaudio() -> dict[str, type]:
    _bare("torchaudio", "torchaudio.models")
    _version("torchaudio", "torchaudio")
    return {"ConformerLayer": importlib.import_module("torchaudio.models.conformer").ConformerLayer}


_TOOLKITS = dict(espnet=_espnet, nemo=_nemo, speechbrain=_speechbrain, torchaudio=_torchaudio, wenet=_wenet)


def layers() -> SimpleNamespace:
    found: dict[str, type] = {}
    for name, load in _TOOLKITS.items():
        if PathFinder.find_spec(name) is not None:
            found |= load()
    return SimpleNamespace(**found)
