"""The models of the cells: the notebook's BERT (compare/model.py), changed in what a cell's factors say."""

from typing import Any

import torch
from torch import nn
from transformers import BertForMaskedLM

from ..compare.model import build_model
from .cells import Cell
from .published import PUBLISHED

VOICE_LABELS = 5  # 0 for a token of no voice, 1 (soprano) to 4 (bass)


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
    encoder: Any = model.bert.encoder  # to torch any attribute of a module may be a tensor
    for layer in encoder.layer:
        attention = layer.attention.self
        if published:
            attention.published_table = nn.Parameter(torch.empty(2 * cell.window - 1, attention.attention_head_size))
        if cell.skew is not None:
            table = attention.published_table if published else attention.relative_tables.rel_k
            nn.init.normal_(table, std=1.0 if cell.tables == "normal" else std, generator=generator)
    if cell.voice:
        model.config.type_vocab_size = VOICE_LABELS
        embedding = nn.Embedding(VOICE_LABELS, model.config.hidden_size)
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
        new.weight.normal_(std=model.config.initializer_range, generator=torch.Generator().manual_seed(0))
        new.weight.mul_(float(old.any()))
        new.weight[: len(old)] = old[:length]
    new.weight.requires_grad_(old.requires_grad)
    embeddings.position_embeddings = new
    embeddings.register_buffer("position_ids", torch.arange(length, device=old.device)[None], persistent=False)
    no_types = torch.zeros(1, length, dtype=torch.long, device=old.device)
    embeddings.register_buffer("token_type_ids", no_types, persistent=False)
    model.config.max_position_embeddings = length
