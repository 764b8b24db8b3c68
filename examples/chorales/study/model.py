"""One cell of the study: its model, its masks, its training, and how it is measured.

Every cell starts from the notebook's BERT (model.py) and changes what its factors say. The published skew lives here,
not in relattn: it is a faithful copy of the seed notebook's bug, to be measured and not to be used.
"""

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, BertForMaskedLM
from transformers.masking_utils import eager_mask

from .baseline import commonest_token, copy_neighbour
from .data import PAD, Chorales, Tokens, Windows
from .masking import EVALUATION_SEED, IGNORED, MaskingCollator
from .model import build_model, parameter_count
from .study_cells import Cell
from .training import train_model

PUBLISHED = "published_skew"
_TOKENS_PER_BATCH = 16_384
_VOICES = 5  # voice labels: 0 for a token of no voice, 1 (soprano) to 4 (bass)


# ---- the published skew ----


def published_skew(relative: Tensor) -> Tensor:
    """The seed notebook's `_skewing`: relative logits (B, H, L, 2 L - 1) to what it took for (B, H, L, L).

    It pads on the left, reads the rows as L numbers each and keeps the last L of 2 L rows. Row i of the result holds
    logits of query L / 2 + i // 2 at distances that depend on i and j in another way than j - i. The right step drops
    the first row instead, reads rows of 2 L - 1 and keeps the first L columns.
    """
    batch, heads, length, _ = relative.shape
    return F.pad(relative, (1, 0)).reshape(batch, heads, 2 * length, length)[:, :, length:]


def published_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout=0.0, scaling=None, **_
) -> tuple[Tensor, Tensor]:
    """The notebook's relative attention as a function for transformers' `AttentionInterface`.

    query, key, value: (B, H, L, D); attention_mask: added to the scores, broadcastable to (B, H, L, L), or None.
    `module.published_table`, (2 k + 1, D), holds distances -k to k; farther ones are clamped to them.

    Returns:
        The output, (B, L, H, D), and the weights, (B, H, L, L).
    """
    table: Tensor = module.published_table
    length, clip = query.shape[-2], len(table) // 2
    distances = torch.arange(-(length - 1), length, device=query.device).clamp(-clip, clip) + clip
    scores = query @ key.transpose(-2, -1) + published_skew(query @ table[distances].T)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(PUBLISHED, published_attention)
AttentionMaskInterface.register(PUBLISHED, eager_mask)


# ---- models ----


def build_cell_model(cell: Cell, vocabulary_size: int) -> BertForMaskedLM:
    """The model of a cell.

    Arms with equal seeds start from the same weights where they share them, and relative arms with equal tables from
    the same tables. There are `cell.window` absolute positions and 2 window - 1 rows of a relative table, so that at 2
    layers and 4 heads of 32 the arms "absolute" and "relative" differ by 64 parameters. Arms without absolute positions
    by the published skew keep a table of zeros that is not trained.
    """
    published = cell.skew == "published"
    arm = "absolute" if published or cell.positions == "none" else cell.positions
    model = build_model(arm, vocabulary_size, cell.window, cell.window - 1, cell.seed)
    if hasattr(model.bert.embeddings, "position_embeddings"):
        resize_positions(model, cell.window)
        if cell.positions not in ("absolute", "both"):
            model.bert.embeddings.position_embeddings.weight.requires_grad_(False).zero_()
    if published:
        model.set_attn_implementation(PUBLISHED)
    generator = torch.Generator().manual_seed(cell.seed)
    std = model.config.initializer_range
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        if published:
            attention.published_table = nn.Parameter(torch.empty(2 * cell.window - 1, attention.attention_head_size))
        if cell.skew is not None:
            table = attention.published_table if published else attention.relative_tables.rel_k
            nn.init.normal_(table, std=1.0 if cell.tables == "normal" else std, generator=generator)
    if cell.voice:
        model.config.type_vocab_size = _VOICES
        embedding = nn.Embedding(_VOICES, model.config.hidden_size)
        # A generator of its own: `generator` has drawn tables, or none.
        nn.init.normal_(embedding.weight, std=std, generator=torch.Generator().manual_seed(cell.seed + 1))
        model.bert.embeddings.token_type_embeddings = embedding
    return model


def resize_positions(model: BertForMaskedLM, length: int) -> None:
    """Give a model with absolute positions `length` of them: fewer cuts the last, more adds fresh N(0, 0.02) ones.

    Fresh positions are what a model with `length` positions has where training never went (zeros stay zeros).
    """
    embeddings = model.bert.embeddings
    old = embeddings.position_embeddings.weight
    new = nn.Embedding(length, old.shape[1], device=old.device)
    with torch.no_grad():
        new.weight.normal_(std=model.config.initializer_range, generator=torch.Generator().manual_seed(0)).mul_(float(old.any()))
        new.weight[: len(old)] = old[:length]
    new.weight.requires_grad_(old.requires_grad)
    embeddings.position_embeddings = new
    embeddings.register_buffer("position_ids", torch.arange(length, device=old.device)[None], persistent=False)
    embeddings.register_buffer("token_type_ids", torch.zeros(1, length, dtype=torch.long, device=old.device), persistent=False)
    model.config.max_position_embeddings = length


# ---- data ----


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
    for voice in range(_VOICES - 1):
        at = np.nonzero(tokens.voice == voice)[0]
        changes[at[1:]] = (tokens.ids[at[1:]] != tokens.ids[at[:-1]]) & (piece[at[1:]] == piece[at[:-1]])
    return changes


def real_tokens(windows: Windows) -> int:
    """Tokens of all windows without padding; one in several windows counts several times."""
    parts = np.array_split(np.arange(len(windows)), len(windows) * windows.size // 1_000_000 + 1)
    return sum(int((windows.gather(part).ids != PAD).sum()) for part in parts)


# ---- training and measuring ----


@torch.no_grad()
def score(model: BertForMaskedLM, collator: StudyCollator, train: Tokens) -> dict[str, float]:
    """Mean loss and accuracy over the masked tokens of the collator's windows: all, and those at a pitch change.

    Beside the model's stand those of copying the neighbour (baseline.py), on the same tokens.
    """
    model.eval()
    windows = collator.windows
    flags = Windows(dataclasses.replace(windows.tokens, ids=pitch_changes(windows.tokens)), windows.size, windows.stride)
    fallback = commonest_token(train)
    sums = np.zeros((2, 4))  # all masked tokens, those at a change: loss, right, right by copying, count
    size = max(1, _TOKENS_PER_BATCH // windows.size)
    for first in range(0, len(windows), size):
        indices = np.arange(first, min(first + size, len(windows)))
        batch = collator([(0, index) for index in indices])
        labels = batch.pop("labels")
        wanted = labels != IGNORED
        logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits[wanted.to(model.device)]
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
    result = {
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
        result["longer"] = {"window": cell.longer_window}
        result["longer"] |= _rounded(score(model, collator(longer, EVALUATION_SEED + 1), train))
    # Processor time, which a stopped or shared machine does not stretch; of the last process where there were several.
    result["cpu_seconds"] = round(time.process_time() - started, 1)
    return result


def _rounded(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value if isinstance(value, int) else round(value, 6) for name, value in metrics.items()}
