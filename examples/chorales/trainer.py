"""Training with transformers' Trainer, as all commands do it: progress, checkpoints, one process or several."""

import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .data.tokens import IGNORED, EpochItems
from .settings import TrainingSettings
from .storage import read_json, write_json
from .terminal import progress_bar

_TOKENS_PER_EVALUATION_BATCH = 16_384


class Collator(Protocol):
    """Turns items (epoch, index) of its windows into a batch of `input_ids`, `attention_mask` and `labels`."""

    @property
    def windows(self) -> EpochItems: ...

    def __call__(self, items: list[tuple[int, int]]) -> dict[str, torch.Tensor]: ...


class ChoraleTrainer(Trainer):
    """The Trainer with a loss over masked tokens only and an evaluation that takes every window exactly once.

    The Trainer's own evaluation averages batch means and pads the last batch with repeated windows where there are
    several processes; sums over masked tokens have neither flaw.
    """

    def __init__(self, *args, evaluation: Mapping[str, Collator], **kwargs):
        super().__init__(*args, **kwargs)
        # compute_loss returns the mean of one micro-batch, as the notebook does; the Trainer then divides it by the
        # number of accumulated ones.
        self.model_accepts_loss_kwargs = False
        self.evaluation = evaluation
        self.tokens_seen = 0
        self.readers = self.args.world_size  # so many take turns with the windows of an evaluation; neighbours may be one together

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        logits = model(**{name: tensor for name, tensor in inputs.items() if name != "labels"}).logits
        wanted = labels != IGNORED
        # A sum over possibly no token (a window that holds only an end token): 0, where a mean would be NaN.
        loss = F.cross_entropy(logits[wanted], labels[wanted], reduction="sum") / wanted.sum().clamp(min=1)
        self.tokens_seen += inputs["attention_mask"].sum()
        return (loss, {"logits": logits}) if return_outputs else loss

    def whole_state(self) -> dict[str, torch.Tensor]:
        """The model's state dict, whole also where processes have parts of it. All processes call it."""
        assert self.model is not None
        return self.model.state_dict()

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        score = self.score(self.evaluation["valid"])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in score.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def score(self, collator: Collator) -> dict[str, float]:
        """Mean loss and accuracy over every masked token of the collator's windows, over all processes."""
        model = self.model
        assert model is not None  # as it may be only until a model_init has made one
        model.eval()
        windows, device = collator.windows, self.args.device
        together = self.args.world_size // self.readers
        mine = np.arange(self.args.process_index // together, len(windows), self.readers)
        batch_size = max(1, _TOKENS_PER_EVALUATION_BATCH // windows.size)
        totals = torch.zeros(3, dtype=torch.float64, device=device)
        for first in range(0, len(mine), batch_size):
            batch = collator([(0, index) for index in mine[first : first + batch_size]])
            labels = batch.pop("labels").to(device)
            logits = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
            wanted = labels != IGNORED
            logits, target = logits[wanted].float(), labels[wanted]
            loss = F.cross_entropy(logits, target, reduction="none")
            totals += torch.stack([loss.double().sum(), (logits.argmax(-1) == target).sum(), wanted.sum()])
        loss, right, count = (self.accelerator.reduce(totals, "sum") / together).tolist()
        return {"loss": loss / max(count, 1), "accuracy": right / max(count, 1), "masked_tokens": int(count)}


class Clock(TrainerCallback):
    """Seconds spent on training steps and their data, without evaluations and checkpoints."""

    def __init__(self):
        self.seconds, self._mark = 0.0, 0.0

    def _restart(self, *_, **__):
        self._mark = time.perf_counter()

    on_epoch_begin = on_evaluate = on_save = _restart

    def on_step_end(self, *_, **__):
        self.seconds += time.perf_counter() - self._mark
        self._restart()


class EpochSetter(TrainerCallback):
    """Tells the windows which epoch it is, so that masks are fresh (accelerate does not when batches are sharded)."""

    def __init__(self, windows: EpochItems):
        self.windows = windows

    def on_epoch_begin(self, args, state, control, **_):
        # state.epoch is whole here, but for the first epoch of a run that continues within one.
        self.windows.set_epoch(int((state.epoch or 0) + 1e-6))


class Progress(TrainerCallback):
    """One progress bar per arm, on the first process, with the latest losses beside it."""

    def __init__(self, arm: str):
        self.arm, self.bar = arm, None

    def on_train_begin(self, args, state, control, **_):
        if state.is_world_process_zero:
            self.bar = progress_bar(total=state.max_steps, initial=state.global_step, desc=self.arm, dynamic_ncols=True)
            self.shown = {}

    def on_step_end(self, args, state, control, **_):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **_):
        if self.bar is not None:
            names = {"loss": "train", "eval_loss": "valid", "eval_accuracy": "accuracy"}
            self.shown |= {short: f"{logs[name]:.3f}" for name, short in names.items() if name in logs}
            self.bar.set_postfix(self.shown, refresh=False)

    def on_train_end(self, args, state, control, **_):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def training_arguments(
    settings: TrainingSettings, folder: Path, train_windows: int, processes: int, workers: int, together: int = 1, **more
):
    """The settings in the Trainer's terms, and `more` of its arguments; nothing is reported or uploaded anywhere.

    So many processes `together` take the same windows.
    """
    shares = processes // together
    if settings.batch % shares:
        of = f"{shares} groups of the {processes} processes" if together > 1 else f"{processes} processes"
        raise ValueError(f"batch: expected a multiple of the {of}, got {settings.batch}")
    steps, interval = settings.update_steps(train_windows)
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch // shares,
        gradient_accumulation_steps=settings.accumulation,
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(settings.warmup, steps // 2),
        weight_decay=settings.weight_decay,
        max_grad_norm=1.0,
        optim="adamw_torch",
        eval_strategy="steps",
        eval_steps=interval,
        save_strategy="steps",
        save_steps=interval,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=max(1, interval // 10),
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=not on_gpu,
        ddp_backend="gloo" if processes > 1 and not on_gpu else None,
        dataloader_num_workers=workers,
        # Not forked: a fork of a process with gloo's threads sometimes inherits a lock that nobody releases, and hangs.
        dataloader_multiprocessing_context="spawn" if workers else None,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        report_to="none",
        push_to_hub=False,
        disable_tqdm=True,
        **more,
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint. A kill while one is written leaves its folder without the final state file."""
    steps = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*")}
    return next((path for _, path in sorted(steps.items(), reverse=True) if _is_complete(path)), None)


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def remove_incomplete_checkpoints(folder: Path) -> None:
    """Left in place, they would count among the checkpoints that the Trainer keeps."""
    for path in folder.glob("checkpoint-*"):
        if not _is_complete(path):
            print(f"chorales: {path.name} is incomplete and not used", file=sys.stderr)
            shutil.rmtree(path)


def adopt_checkpoint(checkpoint: Path) -> None:
    """Point a checkpoint at the best one beside it, wherever the folder lay when it was written.

    The Trainer stores that path, and would fall back to the last weights without an error if the folder has moved.
    """
    path = checkpoint / "trainer_state.json"
    saved = read_json(path)
    if saved.get("best_model_checkpoint"):
        saved["best_model_checkpoint"] = str(checkpoint.parent / Path(saved["best_model_checkpoint"]).name)
        write_json(path, saved)


def train_on(trainer: Trainer, checkpoints: Path, state, name: str | None) -> None:
    """Train, or continue from the last of the `checkpoints`; at the end `trainer.model` has the best weights.

    Args:
        state: accelerate's PartialState.
        name: what the message calls the model; None prints none.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if state.is_main_process:
        remove_incomplete_checkpoints(checkpoints)
    state.wait_for_everyone()
    resume = last_checkpoint(checkpoints)
    if resume is not None and state.is_main_process:
        adopt_checkpoint(resume)
        if name:
            print(f"{name}: continuing from {resume.name}", flush=True)
    state.wait_for_everyone()
    if resume is not None:
        trained = TrainerState.load_from_json(str(resume / "trainer_state.json"))
        if trained.global_step >= trainer.args.max_steps:  # the Trainer would take one step more
            trainer.state = trained
            trainer._load_best_model()
            return
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)


def parameter_count(model: nn.Module) -> int:
    """Number of trained numbers; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def record(trainer: ChoraleTrainer, clock: Clock) -> dict[str, Any]:
    """Curves and the best step, from the Trainer's log (it travels in checkpoints), and the training's speed."""
    log, seconds = trainer.state.log_history, clock.seconds
    tokens = trainer.accelerator.reduce(torch.as_tensor(trainer.tokens_seen, device=trainer.args.device), "sum")
    return {
        "training": [{"step": e["step"], "loss": e["loss"]} for e in log if "loss" in e],
        "validation": [
            {"step": e["step"], "loss": e["eval_loss"], "accuracy": e["eval_accuracy"]} for e in log if "eval_loss" in e
        ],
        "best_step": trainer.state.best_global_step,
        "steps": trainer.state.global_step,
        "train_seconds": round(seconds, 3),
        # Of this process only: a run continued after a kill does not know how fast the killed one was.
        "tokens_per_second": round(int(tokens) / seconds, 1) if seconds else None,
    }
