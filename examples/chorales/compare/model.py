"""The three models that are compared: the notebook's BERT with absolute positions, relative ones, or both."""

from typing import TYPE_CHECKING, Any, cast

from ..data.tokens import CLS, MASK, PAD, SEP

if TYPE_CHECKING:
    from transformers import BertForMaskedLM

ARMS = ("absolute", "relative", "both")
NOTEBOOK_POSITIONS = 128


def build_model(
    arm: str,
    vocabulary_size: int,
    window: int,
    max_relative_position: int,
    seed: int,
    layers: int = 2,
    dropout: float = 0.1,
) -> "BertForMaskedLM":
    """The notebook's `BertForMaskedLM` (437,045 parameters at 53 tokens), its attention replaced in the relative arms.

    Args:
        arm: a name in ARMS.
        window: longest input in tokens; a window beyond the notebook's 128 positions gets more of them.
        max_relative_position: distances beyond it share the last row of the relative table. More than window - 1 would
            leave rows that no distance reaches.
        seed: of the initial weights. Equal seeds start the arms from the same weights where they share them.
        layers, dropout: the notebook's are 2 and 0.1, of hidden states and attention weights alike.
    """
    import torch
    from transformers import BertConfig, BertForMaskedLM

    if arm not in ARMS:
        raise ValueError(f"arms: expected some of {', '.join(ARMS)}, got {arm!r}")
    if not 1 <= max_relative_position < window:
        raise ValueError(
            f"max-relative-position: expected 1 to window - 1 = {window - 1} (further rows would never be used), "
            f"got {max_relative_position}"
        )
    torch.manual_seed(seed)
    # BertConfig keeps names that its signature lacks.
    specials: dict[str, Any] = dict(pad_token_id=PAD, mask_token_id=MASK, cls_token_id=CLS, sep_token_id=SEP)
    config = BertConfig(
        vocab_size=vocabulary_size,
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=max(NOTEBOOK_POSITIONS, window),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **specials,
    )
    model = BertForMaskedLM(config)
    if arm == "absolute":
        return model
    from relattn.huggingface import add_relative_positions

    relative = add_relative_positions(model, max_relative_position=max_relative_position, keep_absolute=arm == "both")
    return cast(BertForMaskedLM, relative)


def dead_parameters(model: "BertForMaskedLM", batch: dict) -> list[str]:
    """Names of the parameters that get no gradient, or an all-zero one, from one training step on `batch`."""
    model.zero_grad()
    model(**batch).loss.backward()
    dead = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    model.zero_grad()
    return dead
