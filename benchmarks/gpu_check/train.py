"""Stage `train`: whole models, a minute each, beside what they replace: steps per second, memory, first losses."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import relattn
from benchmarks.gpu_check.common import device, emit, is_dry, synchronize, verdict
from benchmarks.gpu_check.running import Group, Job
from benchmarks.peers import materialising_causal_skew

_APART = 0.02  # that the two sides' first losses may be, relative: bfloat16


def _trained(model: nn.Module, loss: Callable[[nn.Module], Tensor], seconds: float) -> dict[str, Any]:
    """Steps of AdamW for so many seconds: the first loss and the last, steps per second, MiB at the peak."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    if not is_dry():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    losses: list[float] = []
    warm, least = (0, 1) if is_dry() else (3, 5)  # steps: what is compiled and chosen is known after the first
    began = start = time.perf_counter()
    while len(losses) < least or time.perf_counter() - began < seconds:
        optimizer.zero_grad()
        found = loss(model)
        found.backward()
        optimizer.step()
        losses.append(found.item())
        if len(losses) == warm:
            start = time.perf_counter()
    synchronize()
    speed = (len(losses) - warm) / (time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() / 2**20 if not is_dry() else None
    return {
        "first loss": losses[0],
        "last loss": losses[-1],
        "steps": len(losses),
        "steps per second": round(speed, 3),
        "MiB": memory,
    }


def _compared(sides: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, run in sides.items():
        try:
            found[name] = run()
        except torch.OutOfMemoryError as error:
            found[name] = f"out of memory: {error}"[:200]
        emit(found)
    pair = [found[name] for name in ("original", "relattn")]
    failures = []
    if all(isinstance(side, dict) for side in pair):
        original, ours = pair
        found["speed over the original"] = round(ours["steps per second"] / original["steps per second"], 3)
        found["first losses apart"] = abs(ours["first loss"] / original["first loss"] - 1)
        if not found["first losses apart"] <= _APART:  # NaN is wrong too
            failures.append("the first losses differ")
    elif not isinstance(pair[1], dict):
        failures.append("relattn ran out of memory")
    return verdict(found, failures)


# ---- the chorale decoder ----


def _materialising(
    query: Tensor, key: Tensor, value: Tensor, *, rel_k: Tensor, max_relative_position, **_: Any
) -> Tensor:
    """Attention as the Music Transformer's ports compute it, the table clipped; without dropout and masks."""
    length, left = query.shape[2], max_relative_position[0]
    rows = torch.arange(1 - length, 1, device=query.device).clamp(min=-left) + left
    return materialising_causal_skew(query, key, value, rel_k[..., rows, :])


@contextlib.contextmanager
def _attention(model: nn.Module, attention: Callable[..., Any]) -> Iterator[None]:
    """The decoder with another function in the place of relattn's."""
    module = sys.modules[type(model).__module__]
    kept = module.relative_attention  # type: ignore[attr-defined]
    try:
        module.relative_attention = attention  # type: ignore[attr-defined]
        yield
    finally:
        module.relative_attention = kept  # type: ignore[attr-defined]


def decoder(preset: str, seconds: float, **changed: Any) -> dict[str, Any]:
    """Random tokens, since how long a step takes does not depend on them."""
    from examples.chorales.decoder.languages import ChoraleLanguage
    from examples.chorales.decoder.passages import Music
    from examples.chorales.decoder.settings import PRESETS
    from examples.chorales.decoder.training import build_model

    usual = dataclasses.replace(PRESETS[preset], **changed)
    settings = dataclasses.replace(usual, dropout=0.0)
    music = Music(ChoraleLanguage(), {})
    size = (settings.batch, settings.window + 1)
    tokens = torch.randint(3, music.language.size, size, generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(device())

    def loss(model: nn.Module) -> Tensor:
        with torch.autocast(device(), torch.bfloat16, enabled=settings.precision == "bf16"):
            logits = model(input_ids=tokens[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def side(attention: Callable[..., Any], dropout: float = 0.0) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            chosen = dataclasses.replace(settings, dropout=dropout)
            model: nn.Module = build_model("relative", chosen, music)
            model.to(device()).train()
            with _attention(model, attention):
                return _trained(model, loss, seconds)

        return run

    sides = {"relattn": side(_own()), "original": side(_materialising)}
    return _compared(sides | {f"relattn, dropout {usual.dropout}": side(_own(), usual.dropout)})


def _own() -> Callable[..., Any]:
    """By name, so that nothing else takes over unseen; in a dry run whatever is fastest."""
    return functools.partial(relattn.relative_attention, backend=None if is_dry() else "triton")


def command(preset: str, pieces: int, options: list[str]) -> dict[str, Any]:
    """`python -m examples.chorales.train_decoder` itself, from a file of made-up chorales to results.json."""
    from examples.chorales import train_decoder

    drawn = random.Random(0)
    splits = {
        split: [[[drawn.randint(low, low + 20) for low in (60, 53, 48, 40)] for _ in range(256)] for _ in range(count)]
        for split, count in (("train", pieces), ("valid", 4), ("test", 4))
    }
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "made_up.json"
        data.write_text(json.dumps(splits))
        out = Path(folder) / "out"
        start = time.perf_counter()
        status = train_decoder.main(
            ["--data", str(data), "--preset", preset, "--positions", "relative", "--out", str(out), *options]
        )
        found: dict[str, Any] = {"status": status, "seconds": round(time.perf_counter() - start, 1)}
        if status == 0:
            results = json.loads((out / "results.json").read_text())["models"]["relative"]
            found |= {"tokens per second": results["tokens_per_second"], "valid": results["valid"]["nll"]}
    return verdict(found, [] if status == 0 else [f"status {status}"])


# ---- a converted encoder ----


def encoder(model: str, layers: int, audio: float, batch: int, seconds: float) -> dict[str, Any]:
    """A Hugging Face model of random weights in bfloat16, as it is and converted; the loss is a distance to noise."""
    from benchmarks.huggingface import MODELS
    from relattn.huggingface import convert

    spec = MODELS[model]

    def side(converted: bool) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            torch.manual_seed(0)
            # In evaluation mode: what dropout draws is not compared.
            with torch.device(device()):
                chosen = spec.build(layers).to(torch.bfloat16).eval()
            inputs = {
                name: torch.cat([tensor] * batch).to(device(), torch.bfloat16)
                for name, tensor in spec.inputs(audio).items()
            }
            chosen = convert(chosen) if converted else chosen
            noise: list[Tensor] = []

            def loss(model: nn.Module) -> Tensor:
                output = model(**inputs)[0].float()
                if not noise:
                    noise.append(
                        torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.device)
                    )
                return F.mse_loss(output, noise[0])

            return _trained(chosen, loss, seconds)

        return run

    return _compared({"relattn": side(True), "original": side(False)})


def plan(dry: bool) -> list[Group]:
    if dry:
        options = ["--epochs", "1", "--evaluations", "1", "--window", "16", "--batch", "8"]
        jobs = [
            Job("decoder", decoder, dict(preset="tiny", seconds=0.0, batch=1, window=16)),
            Job("command", command, dict(preset="tiny", pieces=2, options=options)),
            Job("w2v-BERT", encoder, dict(model="w2v-bert", layers=1, audio=0.5, batch=1, seconds=0.0)),
        ]
        return [Group(jobs)]
    few = ["--epochs", "2", "--evaluations", "1", "--warmup", "10"]
    return [
        Group(
            [
                Job("decoder", decoder, dict(preset="paper", seconds=25.0), 150.0),
                Job(
                    "w2v-BERT, 30 s of audio",
                    encoder,
                    dict(model="w2v-bert", layers=24, audio=30, batch=4, seconds=25.0),
                    130.0,
                ),
                Job(
                    "w2v-BERT, 2 minutes",
                    encoder,
                    dict(model="w2v-bert", layers=24, audio=120, batch=1, seconds=20.0),
                    110.0,
                ),
                Job("train_decoder", command, dict(preset="paper", pieces=64, options=few), 110.0),
            ]
        )
    ]
