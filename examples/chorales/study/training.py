"""Training and measuring one cell of the study: its masks, its run, and its score where copying fails."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertForMaskedLM

from ..compare.baseline import commonest_token, copy_neighbour
from ..compare.masking import EVALUATION_SEED, MaskingCollator
from ..compare.training import train_model
from ..data.files import VOICES
from ..data.tokens import IGNORED, PAD, Chorales, Tokens, Windows
from ..trainer import parameter_count
from .cells import Cell
from .model import build_cell_model, resize_positions

_TOKENS_PER_BATCH = 16_384


class StudyCollator(MaskingCollator):
    """Batches of masked windows, with each token's voice as `token_type_ids` where the cell gives it to the model."""

    def __init__(self, windows: Windows, mode: str, vocabulary_size: int, seed: int, voice: bool):
        super().__init__(windows, mode, vocabulary_size, seed)
        self.voice = voice

    def __call__(self, items: list[tuple[int, int]]) -> dict[str, Tensor]:
        batch = super().__call__(items)
        if self.voice:
            indices = np.array([index for _, index in items])
            batch["token_type_ids"] = torch.from_numpy(self.windows.gather(indices).voice + 1)
        return batch


def pitch_changes(tokens: Tokens) -> np.ndarray:
    """(N,) bool: notes that differ from the note before them in their voice, which copying it gets wrong.

    A voice's first note in a piece, start and end tokens count as no change; steps without the voice are passed over.
    """
    piece = np.repeat(np.arange(len(tokens.bounds) - 1), np.diff(tokens.bounds))
    changes = np.zeros(len(tokens.ids), dtype=bool)
    for voice in range(len(VOICES)):
        at = np.nonzero(tokens.voice == voice)[0]
        changes[at[1:]] = (tokens.ids[at[1:]] != tokens.ids[at[:-1]]) & (piece[at[1:]] == piece[at[:-1]])
    return changes


def real_tokens(windows: Windows) -> int:
    """Tokens of all windows without padding; one in several windows counts several times."""
    parts = np.array_split(np.arange(len(windows)), len(windows) * windows.size // 1_000_000 + 1)
    return sum(int((windows.gather(part).ids != PAD).sum()) for part in parts)


@torch.no_grad()
def score(model: BertForMaskedLM, collator: StudyCollator, train: Tokens) -> dict[str, float]:
    """Mean loss and accuracy over the masked tokens of the collator's windows: all, and those at a pitch change.

    Beside the model's stand those of copying the neighbour (baseline.py), on the same tokens.
    """
    model.eval()
    windows = collator.windows
    flagged = dataclasses.replace(windows.tokens, ids=pitch_changes(windows.tokens))
    flags = Windows(flagged, windows.size, windows.stride)
    fallback = commonest_token(train)
    sums = np.zeros((2, 4))  # all masked tokens, those at a change: loss, right, right by copying, count
    size = max(1, _TOKENS_PER_BATCH // windows.size)
    for first in range(0, len(windows), size):
        indices = np.arange(first, min(first + size, len(windows)))
        batch = collator([(0, int(index)) for index in indices])
        labels = batch.pop("labels")
        wanted = labels != IGNORED
        logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits
        logits = logits[wanted.to(model.device)]
        target = labels[wanted]
        loss = F.cross_entropy(logits.float().cpu(), target, reduction="none").double().numpy()
        right = (logits.argmax(-1).cpu() == target).numpy()
        copied = copy_neighbour(collator.masked(indices), fallback)[wanted.numpy()] == target.numpy()
        values = np.stack([loss, right, copied, np.ones_like(loss)])
        change = flags.gather(indices).ids[wanted.numpy()] == 1
        sums += np.stack([values.sum(axis=1), values[:, change].sum(axis=1)])
    names = ("loss", "accuracy", "copy_accuracy")
    every, changed = sums
    return {
        **{name: float(total / max(every[3], 1)) for name, total in zip(names, every, strict=False)},
        **{f"change_{name}": float(total / max(changed[3], 1)) for name, total in zip(names, changed, strict=False)},
        "masked_tokens": int(every[3]),
        "change_tokens": int(changed[3]),
    }


def run_cell(cell: Cell, chorales: Chorales, folder: Path, state, show_progress: bool = True) -> dict:
    """Train and measure one cell, continuing from the checkpoints in `folder`.

    Args:
        state: accelerate's PartialState, of one process.

    Returns:
        What the cell's JSON holds beside its configuration.
    """
    started = time.process_time()
    size, schedule = len(chorales.vocabulary), cell.settings
    train = chorales.tokens["train"]
    windows = {
        "train": Windows(train, cell.window, cell.stride).subset(schedule.train_windows),
        "valid": Windows(chorales.tokens["valid"], cell.window, cell.test_stride(cell.window)),
        "test": Windows(chorales.tokens["test"], cell.window, cell.test_stride(cell.window)),
    }
    settings = schedule.as_settings(cell, real_tokens(windows["train"]))
    windows["valid"] = windows["valid"].subset(settings.valid_windows)

    def collator(split: Windows, seed: int) -> StudyCollator:
        return StudyCollator(split, cell.masking, size, seed, cell.voice)

    model = build_cell_model(cell, size)
    parameters = parameter_count(model)
    trainer, _ = train_model(
        model,
        settings,
        windows,
        collator(windows["train"], cell.seed),
        {"valid": collator(windows["valid"], EVALUATION_SEED)},
        folder / "checkpoints",
        state,
        cell.name if show_progress else None,
    )
    result: dict[str, Any] = {
        "parameters": parameters,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "validation": [[e["step"], round(e["eval_loss"], 5)] for e in trainer.state.log_history if "eval_loss" in e],
        "train_windows": len(windows["train"]),
        "epochs": round(settings.epochs, 4),
        "test": _rounded(score(model, collator(windows["test"], EVALUATION_SEED + 1), train)),
    }
    if cell.longer_window:
        longer = Windows(chorales.tokens["test"], cell.longer_window, cell.test_stride(cell.longer_window))
        if hasattr(model.bert.embeddings, "position_embeddings"):
            resize_positions(model, cell.longer_window)
        scored = score(model, collator(longer, EVALUATION_SEED + 1), train)
        result["longer"] = {"window": cell.longer_window, **_rounded(scored)}
    # Processor time, which a stopped or shared machine does not stretch; of the last process where there were several.
    result["cpu_seconds"] = round(time.process_time() - started, 1)
    return result


def _rounded(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value if isinstance(value, int) else round(value, 6) for name, value in metrics.items()}
