"""Training and testing one decoder."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from ..storage import read_json, write_json
from ..trainer import (
    ChoraleTrainer,
    Clock,
    EpochSetter,
    Progress,
    parameter_count,
    record,
    train_on,
    training_arguments,
)
from .model import MusicTransformer, MusicTransformerConfig
from .passages import Music, ScoredCollator, ScoredWindows, TrainingCollator, TrainingWindows
from .settings import DecoderSettings


def build_model(positions: str, settings: DecoderSettings, music: Music) -> MusicTransformer:
    """A new model; equal seeds start all kinds of positions from the same weights where they share them."""
    torch.manual_seed(settings.seed)
    config = MusicTransformerConfig(
        vocab_size=music.language.size,
        positions=positions,
        language=music.language.name,
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=settings.feed_forward,
        max_relative_position=settings.max_relative_position,
        training_length=settings.window,
        dropout=settings.dropout,
    )
    return MusicTransformer(config)


def train_one(
    positions: str, music: Music, settings: DecoderSettings, folder: Path, state, workers: int = 0, context: int = 1, tensor: int = 1
) -> dict:
    """Train and test one model in `folder`, or continue, or return the result that is already there.

    `context` processes share a window, `tensor` processes the heads of each layer.

    `folder` gets the checkpoints while training, then `model/` (the one with the best validation loss) and
    `result.json`.
    """
    finished = folder / "result.json"
    if finished.is_file():
        return read_json(finished)
    unit, checkpoints = music.language.unit, folder / "checkpoints"
    windows = TrainingWindows(music.splits["train"], settings.window, unit, settings.seed)
    scored = {
        name: ScoredCollator(ScoredWindows(music.splits[name], settings.window, unit)) for name in ("valid", "test")
    }
    model = build_model(positions, settings, music)
    parameters = parameter_count(model)
    if state.is_main_process:
        print(f"{positions}: {parameters:,} parameters", flush=True)
    clock = Clock()
    precision = {"bf16": settings.precision == "bf16", "fp16": settings.precision == "fp16"}
    trainer = _trainer_class(context, tensor)(
        model=model,
        args=training_arguments(settings, checkpoints, len(windows), state.num_processes, workers, context * tensor, **precision),
        train_dataset=windows,
        eval_dataset=scored["valid"].windows,
        data_collator=TrainingCollator(windows, music.language, settings.transpose),
        callbacks=[EpochSetter(windows), clock, Progress(positions)],
        evaluation=scored,
    )
    train_on(trainer, checkpoints, state, positions)
    saved_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.saved_precision]
    # What is scored is what is saved: rounded as the file, and not under autocast.
    trainer.model = model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model.to(saved_dtype).float()
    whole = trainer.whole_state()
    result = {
        "positions": positions,
        "parameters": parameters,
        **{name: _score(trainer, scored[name]) for name in ("valid", "test")},
        **record(trainer, clock),
    }
    if state.is_main_process:
        model.config.use_cache = True  # the Trainer turns it off, and it would be saved so
        saved = {name: tensor.to(saved_dtype) for name, tensor in whole.items()}
        model.to(saved_dtype).save_pretrained(folder / "model", state_dict=saved)
        music.language.save(folder / "model")
        write_json(finished, result)
        shutil.rmtree(checkpoints, ignore_errors=True)
    state.wait_for_everyone()
    return result


def _trainer_class(context: int, tensor: int) -> Callable[..., ChoraleTrainer]:
    if context == tensor == 1:
        return ChoraleTrainer
    from .parallel import ParallelTrainer  # it needs torch.distributed

    return functools.partial(ParallelTrainer, context=context, tensor=tensor)


def _score(trainer: ChoraleTrainer, collator: ScoredCollator) -> dict:
    """Nats per note token (per event of a MIDI performance), and the share that is predicted right."""
    score = trainer.score(collator)
    return {"nll": score["loss"], "accuracy": score["accuracy"], "tokens": score["masked_tokens"]}
