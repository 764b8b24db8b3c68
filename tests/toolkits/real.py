"""The toolkits' own layers, of those that are installed (`make test-toolkits`; wenet from a clone on PYTHONPATH).

Their packages bring half of PyPI when they are imported. Packages are taken here without their `__init__`, so that the
files of the layers load with torch alone: their code is what runs, unchanged.
"""

from __future__ import annotations

import importlib
import sys
import types
from importlib import metadata
from importlib.machinery import PathFinder
from types import SimpleNamespace

from torch import nn


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
    return {name: getattr(module, name) for name in names}


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
