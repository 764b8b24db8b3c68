"""Small BERT-like models with relative positions, and the oracle: attention as transformers 4 computed it."""

import inspect
import math

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertForMaskedLM,
)
from transformers.masking_utils import eager_mask

from relattn.huggingface import add_relative_positions

SMALL = dict(vocab_size=53, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
SMALL |= dict(
    max_position_embeddings=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2
)
HIDDEN = slice(9, None)  # padded keys of the second row of `batch`


def build(kind=BertForMaskedLM, *, relative=True, dtype=None, seed=0, config=None, **settings):
    torch.manual_seed(seed)
    names = inspect.signature(add_relative_positions).parameters
    options = {name: settings.pop(name) for name in list(settings) if name in names}
    model = kind(kind.config_class(**(SMALL | settings)) if config is None else config).to(dtype).eval()
    return add_relative_positions(model, **({"max_relative_position": 5} | options)) if relative else model


def batch(length: int = 14) -> dict[str, torch.Tensor]:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, HIDDEN] = 0
    return {"input_ids": torch.randint(3, 53, (2, length)), "attention_mask": mask}


# ---- the oracle: attention as BertSelfAttention of transformers 4 computed it ----


def old_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **_):
    """`position_embedding_type="relative_key_query"` of transformers 4: tables by query minus key; terms optional."""
    length = query.shape[2]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    left, right = module.clip  # of key minus query
    rows = distance.clamp(-right, left) + right
    scores = query @ key.transpose(-1, -2)
    for name, equation in (("rel_k", "bhld,{}lrd->bhlr"), ("rel_q", "bhrd,{}lrd->bhlr")):
        if name in module.distance_embedding:
            table = module.distance_embedding[name][..., rows, :]
            operands = (query if name == "rel_k" else key), table
            scores = scores + torch.einsum(equation.format("h" if table.dim() == 4 else ""), *operands)
    scores = scores / math.sqrt(query.shape[-1])
    if "rel_bias" in module.distance_embedding:
        scores = scores + module.distance_embedding["rel_bias"][..., rows]
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1)
    output = weights @ value
    if "rel_v" in module.distance_embedding:  # Shaw et al. 2018, equation 3
        table = module.distance_embedding["rel_v"][..., rows, :]
        output = output + torch.einsum("bhlr,hlrd->bhld" if table.dim() == 4 else "bhlr,lrd->bhld", weights, table)
    return output.transpose(1, 2).contiguous(), weights


AttentionInterface.register("old_relative_key", old_attention)
AttentionMaskInterface.register("old_relative_key", eager_mask)


def oracle_of(model):
    """A plain model with the same weights, tables flipped to query minus key, zeros where positions were removed."""
    kind = type(model).__mro__[2]
    sizes = SMALL if model.config.relative_attention["keep_absolute"] else SMALL | {"max_position_embeddings": 60}
    config = kind.config_class(**sizes, is_decoder=model.config.is_decoder, attn_implementation="old_relative_key")
    oracle = kind(config).to(model.dtype).eval()
    weights = model.state_dict()
    position = f"{kind.base_model_prefix}.embeddings.position_embeddings.weight"
    weights.setdefault(position, torch.zeros_like(oracle.state_dict()[position]))
    oracle.load_state_dict({name: tensor for name, tensor in weights.items() if "relative_tables" not in name})
    for name, module in model.named_modules():
        if hasattr(module, "relative_tables"):
            twin = oracle.get_submodule(name)
            twin.clip = module.relative_tables.max_relative_position
            twin.distance_embedding = nn.ParameterDict(
                {
                    term: nn.Parameter(table.detach().flip(-1 if term == "rel_bias" else -2))
                    for term, table in module.relative_tables.named_parameters()
                }
            )  # fmt: skip
    return oracle


def parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
