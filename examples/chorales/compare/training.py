"""Training and testing one arm of the comparison."""

import shutil
from pathlib import Path
from typing import cast

from transformers import BertForMaskedLM

from ..data.tokens import Chorales, Windows
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
from .masking import EVALUATION_SEED, MaskingCollator
from .model import build_model
from .settings import Settings


def cut_windows(chorales: Chorales, settings: Settings) -> dict[str, Windows]:
    """The windows of each split that the settings ask for."""
    windows = chorales.windows(settings.window, settings.stride)
    return {
        "train": windows["train"].subset(settings.train_windows),
        "valid": windows["valid"].subset(settings.valid_windows),
        "test": windows["test"].subset(settings.test_windows),
    }


def evaluation_collators(
    windows: dict[str, Windows], settings: Settings, vocabulary_size: int
) -> dict[str, MaskingCollator]:
    """Fixed masks of the validation and test windows: those that every arm and the baseline are measured on."""
    return {
        name: MaskingCollator(windows[name], settings.masking, vocabulary_size, EVALUATION_SEED + offset)
        for offset, name in enumerate(("valid", "test"))
    }


def train_model(
    model,
    settings: Settings,
    windows: dict[str, Windows],
    collator: MaskingCollator,
    evaluation: dict[str, MaskingCollator],
    checkpoints: Path,
    state,
    name: str | None,
    workers: int = 0,
) -> tuple[ChoraleTrainer, Clock]:
    """Train `model`, or continue from the last of its `checkpoints`; the best validation loss chooses the weights.

    Args:
        collator: of the training windows; `evaluation` holds those of "valid" and perhaps others.
        state: accelerate's PartialState.
        name: what progress bar and messages call the model; None shows neither.
        workers: processes that prepare batches.
    """
    clock = Clock()
    trainer = ChoraleTrainer(
        model=model,
        args=training_arguments(settings, checkpoints, len(windows["train"]), state.num_processes, workers),
        train_dataset=windows["train"],
        eval_dataset=windows["valid"],
        data_collator=collator,
        callbacks=[EpochSetter(windows["train"]), clock, *([Progress(name)] if name else [])],
        evaluation=evaluation,
    )
    train_on(trainer, checkpoints, state, name)
    return trainer, clock


def run_arm(
    arm: str, chorales: Chorales, windows: dict[str, Windows], settings: Settings, folder: Path, state, workers: int = 0
) -> dict:
    """Train and test one arm in `folder`, or continue, or return the result that is already there.

    Args:
        folder: gets the checkpoints while training, then `model/` (the best model) and `result.json`.
        state: accelerate's PartialState.
        workers: processes that prepare batches.
    """
    finished = folder / "result.json"
    if finished.is_file():
        return read_json(finished)
    vocabulary_size = len(chorales.vocabulary)
    assert settings.max_relative_position is not None  # Settings has chosen it
    model = build_model(
        arm,
        vocabulary_size,
        settings.window,
        settings.max_relative_position,
        settings.seed,
        settings.layers,
        settings.dropout,
    )
    parameters = parameter_count(model)
    if state.is_main_process:
        print(f"{arm}: {parameters:,} parameters", flush=True)
    checkpoints = folder / "checkpoints"
    collator = MaskingCollator(
        windows["train"], settings.masking, vocabulary_size, settings.seed, settings.transpose, settings.easy_epochs
    )
    evaluation = evaluation_collators(windows, settings, vocabulary_size)
    trainer, clock = train_model(model, settings, windows, collator, evaluation, checkpoints, state, arm, workers)
    if settings.half:  # what is tested is what is saved
        cast(BertForMaskedLM, trainer.model).half().float()
    test = trainer.score(trainer.evaluation["test"])
    result = {"arm": arm, "parameters": parameters, "test": test, **record(trainer, clock)}
    if state.is_main_process:
        saved = cast(BertForMaskedLM, trainer.model)
        saved.config.pitches = chorales.vocabulary.pitches.tolist()  # what its ids mean
        saved.config.masking, saved.config.training_length = settings.masking, settings.window
        (saved.half() if settings.half else saved).save_pretrained(folder / "model")
        write_json(finished, result)
        shutil.rmtree(checkpoints, ignore_errors=True)
    state.wait_for_everyone()
    return result
