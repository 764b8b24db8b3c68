"""BERT-like models with relative positions: what is put into them, their classes, loading, old checkpoints."""

from __future__ import annotations

import copy
import functools
import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file

from relattn.functional import clip_sides
from relattn.huggingface.attention import IMPLEMENTATION

TERMS = ("rel_k", "rel_q", "rel_v", "rel_bias")  # the tables a model can have, named as in `relattn.relative_attention`

# ---- what is put into a model ----


class _RelativeSettings(NamedTuple):
    """What `config.relative_attention` holds, checked."""

    max_relative_position: tuple[int, int]
    keep_absolute: bool
    per_head: bool
    terms: tuple[str, ...]

    @classmethod
    def check(cls, max_relative_position, keep_absolute=False, per_head=False, terms=("rel_k",)) -> _RelativeSettings:
        sides = clip_sides(max_relative_position)
        for name, flag in (("keep_absolute", keep_absolute), ("per_head", per_head)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name}: expected True or False, got {flag!r}")
        if not isinstance(terms, (tuple, list)):
            raise TypeError(f"terms: expected a tuple of names from {TERMS}, got {terms!r}")
        if not terms or any(term not in TERMS for term in terms) or len(set(terms)) != len(terms):
            raise ValueError(f"terms: expected one or more of {TERMS}, each once, got {tuple(terms)!r}")
        return cls(sides, keep_absolute, per_head, tuple(terms))

    def to_config(self) -> dict[str, Any]:
        """As JSON gives it back, so that a loaded configuration equals the saved one."""
        return self._asdict() | {"max_relative_position": list(self.max_relative_position), "terms": list(self.terms)}


class RelativeTables(nn.Module):
    """The tables of one attention layer, row 0 for the keys farthest to the left; R = left + right + 1.

    rel_k, rel_q, rel_v: (R, head size) or, `per_head`, (heads, R, head size). rel_bias: (R,) or (heads, R). A term that
    the settings do not list is None.
    """

    def __init__(self, settings: _RelativeSettings, heads: int, head_size: int, std: float, like: Tensor) -> None:
        super().__init__()
        self.max_relative_position = settings.max_relative_position
        rows = sum(settings.max_relative_position) + 1
        for name in TERMS:
            shape = (heads,) * settings.per_head + (rows,) + (head_size,) * (name != "rel_bias")
            # Small, never N(0, 1): at that scale the tables would drown the content at the start of training.
            table = torch.randn(shape, device=like.device, dtype=like.dtype) * std
            self.register_parameter(name, nn.Parameter(table) if name in settings.terms else None)

    def forward(self) -> dict[str, Tensor]:
        """The tables there are, as arguments of `relattn.relative_attention`. A call, so that hooks see it: transformers' tensor
        parallelism sums gradients of what ranks share by one.
        """
        return dict(self.named_parameters(recurse=False))

    def extra_repr(self) -> str:
        return f"max_relative_position={self.max_relative_position}, {', '.join(dict(self.named_parameters(recurse=False)))}"


class _WithoutPositions(nn.Module):
    """The forward pass of BertEmbeddings and its like without positions, hence without a longest input."""

    word_embeddings: nn.Embedding
    token_type_embeddings: nn.Embedding
    task_type_embeddings: nn.Embedding  # of ERNIE
    LayerNorm: nn.LayerNorm  # not of XLM-RoBERTa-XL, which normalises in its layers alone
    dropout: nn.Dropout

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
        *,
        cache_length: int = 0,
        task_type_ids: Tensor | None = None,
    ) -> Tensor:
        """(B, L, hidden). `position_ids`, `past_key_values_length` and `cache_length`, its name since transformers 5.24, are the
        original's, and change nothing."""
        embeddings = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        # Not the buffer of the original: it ends at max_position_embeddings.
        none = torch.zeros(embeddings.shape[:-1], dtype=torch.long, device=embeddings.device)
        embeddings = embeddings + self.token_type_embeddings(none if token_type_ids is None else token_type_ids)
        if getattr(self, "use_task_id", False):
            embeddings = embeddings + self.task_type_embeddings(none if task_type_ids is None else task_type_ids)
        return self.dropout(self.LayerNorm(embeddings) if hasattr(self, "LayerNorm") else embeddings)


# ---- configurations and model classes ----


class _RelativeConfig:
    """Mixed into a configuration class: the attention that relative positions need."""

    def to_dict(self) -> dict[str, Any]:
        # transformers does not write the implementation but reads it: a plain model made from this file then asks for
        # an attention that is not registered, and raises instead of running without the tables.
        return super().to_dict() | {"attn_implementation": IMPLEMENTATION}  # type: ignore[misc]

    @property
    def output_attentions(self) -> bool | None:
        return self._output_attentions  # type: ignore[has-type]

    @output_attentions.setter
    def output_attentions(self, value: bool | None) -> None:  # the original takes True only for "eager"
        self._output_attentions = value

    def validate_output_attentions(self) -> None:
        """Nothing to refuse: relattn_attention gives the weights."""


class _RelativeModel:
    """Mixed into a model class: builds the model with the tables that its configuration lists."""

    def __init__(self, config, *args, **kwargs) -> None:
        if getattr(config, "relative_attention", None) is None:
            raise ValueError(
                "config: relative_attention is not set; make the plain model and call add_relative_positions on it"
            )
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        _install(self, config)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, RelativeTables):  # only where a checkpoint lacks them
            for table in module.parameters():
                init.normal_(table, std=self.config.initializer_range)  # type: ignore[attr-defined]

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs) -> str:
        # Every way to choose an attention ends here; any other would leave the tables out without a word.
        if attn_implementation not in (None, IMPLEMENTATION):
            raise ValueError(
                f"attn_implementation: a model with relative positions needs {IMPLEMENTATION!r} "
                f"(which also serves output_attentions=True), got {attn_implementation!r}"
            )
        return super()._check_and_adjust_attn_implementation(IMPLEMENTATION, *args, **kwargs)  # type: ignore[misc]


_HEADS = (
    "Model", "ForPreTraining", "LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForNextSentencePrediction",
    "ForSequenceClassification", "ForMultipleChoice", "ForTokenClassification", "ForQuestionAnswering",
)  # fmt: skip
_AUTO = {
    "Model": "AutoModel",
    "LMHeadModel": "AutoModelForCausalLM",
}  # the others are named alike: AutoModelForMaskedLM
# Families whose self-attention is transformers' `AttentionInterface`: as their classes are called, and their module.
_FAMILIES = {
    "Bert": "bert.modeling_bert",
    "Roberta": "roberta.modeling_roberta",
    "XLMRoberta": "xlm_roberta.modeling_xlm_roberta",
    "XLMRobertaXL": "xlm_roberta_xl.modeling_xlm_roberta_xl",
    "Camembert": "camembert.modeling_camembert",
    "Data2VecText": "data2vec.modeling_data2vec_text",
    "Electra": "electra.modeling_electra",
    "RobertaPreLayerNorm": "roberta_prelayernorm.modeling_roberta_prelayernorm",
    "Ernie": "ernie.modeling_ernie",
    "Xmod": "xmod.modeling_xmod",
}
# What pickles of models look for in the package, by name.
CLASSES: dict[str, type] = {"RelativeTables": RelativeTables}
_MODELS: dict[type, Any] = {}  # plain class -> the one with relative positions
_EMBEDDINGS: dict[type, type] = {}  # likewise, the second without absolute ones
_ATTENTIONS: set[type] = set()


def _define(family: str, place: str) -> None:
    """Define a family's ``Relative<name>`` in the package, where pickle looks; tell the Auto classes."""
    try:
        modeling = importlib.import_module(f"transformers.models.{place}")
    except ModuleNotFoundError:  # a version of transformers without it
        return

    def define(plain: Any, mixin: type, doc: str, **content: Any) -> Any:
        content |= {"__doc__": f"`{plain.__name__}` {doc}", "__module__": __package__}
        relative = type(f"Relative{plain.__name__}", (mixin, plain), content)
        CLASSES[relative.__name__] = relative
        return relative

    _ATTENTIONS.add(getattr(modeling, f"{family}SelfAttention"))
    plain = getattr(modeling, f"{family}Embeddings")
    _EMBEDDINGS[plain] = define(plain, _WithoutPositions, "without absolute positions.")
    plain = getattr(transformers, f"{family}Config")
    # A field, as the configurations of transformers are data classes.
    content = dict(
        model_type=f"relattn-{plain.model_type}",
        relative_attention=None,
        __annotations__={"relative_attention": dict | None},
    )
    doc = "with `relative_attention`, the settings given to `add_relative_positions`."
    config_class = define(plain, _RelativeConfig, doc, **content)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for head in _HEADS:
        plain = getattr(transformers, family + head, None)
        if plain is None:  # not every family has every head
            continue
        doc = "with relative positions in its self-attention."
        _MODELS[plain] = relative = define(plain, _RelativeModel, doc, config_class=config_class)
        getattr(transformers, _AUTO.get(head, f"AutoModel{head}")).register(config_class, relative, exist_ok=True)


for _family, _place in _FAMILIES.items():
    _define(_family, _place)


def _install(model: Any, config: Any) -> None:
    """Give a built model the tables, classes and embeddings that `config.relative_attention` asks for."""
    settings = _RelativeSettings.check(**config.relative_attention)
    std = config.initializer_range
    for module in list(model.modules()):
        if type(module) in _MODELS:  # `model` itself, or the encoder inside a model with a head
            module.__class__ = _MODELS[type(module)]
            _make_known(type(module), getattr(config, "is_decoder", False))  # type: ignore[arg-type]
        elif type(module) in _EMBEDDINGS and not settings.keep_absolute:
            del module.position_embeddings
            module.__class__ = _EMBEDDINGS[type(module)]
        elif type(module) in _ATTENTIONS:
            heads, head_size = module.num_attention_heads, module.attention_head_size
            module.relative_tables = RelativeTables(settings, heads, head_size, std, like=module.query.weight)


@functools.cache
def _make_known(model_class: Any, is_decoder: bool) -> None:
    """Let transformers see an instance of a class be constructed once.

    It records per class, in PreTrainedModel.__init__, which outputs can be captured: a model whose class was changed
    afterwards would give an empty tuple for `output_attentions=True`. On the meta device this costs no memory.
    """
    settings: dict[str, Any] = {"max_relative_position": 0}
    with torch.device("meta"):
        model_class(model_class.config_class(num_hidden_layers=0, is_decoder=is_decoder, relative_attention=settings))


# ---- what users call ----


def add_relative_positions(
    model: PreTrainedModel,
    *,
    max_relative_position: int | tuple[int, int],
    keep_absolute: bool = False,
    per_head: bool = False,
    terms: Sequence[str] = ("rel_k",),
) -> PreTrainedModel:
    """Put relative attention in place of a BERT-like model's self-attention.

    Every self-attention layer gets its own learned tables (``relative_tables``), initialised N(0, initializer_range);
    `relattn.relative_attention` says what each term adds. ``terms=("rel_k",)`` is Shaw et al. 2018 without their value
    term, Huang et al. 2018 (Music Transformer), and ``position_embedding_type="relative_key"``, which transformers 5
    removed; ``("rel_k", "rel_q")`` is ``"relative_key_query"`` (Huang et al. 2020) with two tables.

    Args:
        model: a BERT, RoBERTa, XLM-RoBERTa (XL too), CamemBERT, Data2VecText, ELECTRA, RoBERTa-PreLayerNorm, ERNIE or
            X-MOD model of transformers, with any head, as an encoder or as a causal decoder without cross-attention.
        max_relative_position: k for (k, k), or (left, right): keys farther away share the edge rows, so any length is
            accepted. A decoder never looks ahead: give it (k, 0), as rows to the right would never be used.
        keep_absolute: False removes the absolute position embeddings, their parameter too, and with them the longest
            input length; `position_ids` then change nothing, as distances are counted in tokens.
        per_head: a table for each head instead of one for all heads of a layer.
        terms: one or more of "rel_k", "rel_q", "rel_v", "rel_bias".

    Returns:
        The same object, changed in place: its class becomes ``Relative<its class>`` (a subclass), and its configuration
        a new object with ``relative_attention`` (the old one, which other models may share, is left alone). It saves
        with `save_pretrained` and loads with `relattn.huggingface.from_pretrained` or the Auto classes. An optimizer
        made before does not know the new parameters.

    Raises:
        TypeError: `model` is of no supported class, or an argument of a wrong type.
        ValueError: `model` already has relative positions or has cross-attention; or a setting is out of range.
    """
    settings = _RelativeSettings.check(max_relative_position, keep_absolute, per_head, terms)
    if isinstance(model, _RelativeModel):
        raise ValueError(f"model: this {type(model).__name__} already has relative positions")
    if type(model) not in _MODELS:
        supported = ", ".join(plain.__name__ for plain in _MODELS)
        raise TypeError(f"model: expected one of {supported}; got {type(model).__name__}")
    if getattr(model.config, "add_cross_attention", False):
        raise ValueError(
            f"model: a {type(model).__name__} with cross-attention (add_cross_attention=True) is not supported, as its "
            "queries and keys have no distance; give an encoder, or a decoder without it"
        )

    before = model.config
    # A new configuration: other models may hold the given one, and would start to use this attention too.
    config = copy.deepcopy(before)
    config.__class__ = _MODELS[type(model)].config_class
    config.relative_attention = settings.to_config()
    config._attn_implementation = IMPLEMENTATION
    for module in model.modules():
        if getattr(module, "config", None) is before:
            module.config = config  # type: ignore[assignment]
    _install(model, config)
    return model


_OLD = {
    "relative_key": ("rel_k",),
    "relative_key_query": ("rel_k", "rel_q"),
}  # position_embedding_type of transformers 4


def from_old_state_dict(state_dict: Mapping[str, Tensor], position_embedding_type: str) -> dict[str, Tensor]:
    """The weights of a BERT that transformers 4 trained with relative positions, under the names and in the order that
    models here have.

    Args:
        state_dict: with one ``...attention.self.distance_embedding.weight`` (2 * max_position_embeddings - 1, head
            size) per layer, its rows by query minus key.
        position_embedding_type: "relative_key" (Shaw et al. 2018) or "relative_key_query" (Huang et al. 2020, method
            4).

    Returns:
        For ``load_state_dict`` of a model with ``add_relative_positions(model,
        max_relative_position=max_position_embeddings - 1, terms=...)``: ``relative_tables.rel_k``, rows by key minus
        query, and for "relative_key_query", whose one table serves both products, the same again as
        ``relative_tables.rel_q``. The absolute position embeddings, which such a model has but does not add, are left
        out.

    Raises:
        ValueError: another `position_embedding_type`, or no such weight.
    """
    if position_embedding_type not in _OLD:
        raise ValueError(
            f"position_embedding_type: expected one of {', '.join(map(repr, _OLD))}, got {position_embedding_type!r}"
        )
    result: dict[str, Tensor] = {}
    found = 0
    for name, tensor in state_dict.items():
        layer, old, _ = name.partition("distance_embedding.weight")
        if old:
            found += 1
            result |= {f"{layer}relative_tables.{term}": tensor.flip(0) for term in _OLD[position_embedding_type]}
        elif not name.endswith(("embeddings.position_embeddings.weight", "embeddings.position_ids")):
            result[name] = tensor
    if not found:
        raise ValueError(
            "state_dict: it has no distance_embedding.weight, the table of position_embedding_type='relative_key'"
        )
    return result


def _from_old(folder: str | os.PathLike, config: Any, where: dict[str, Any], **kwargs) -> tuple[Any, dict]:
    """The model of a checkpoint of transformers 4 with relative positions, and the loading info."""
    by_name = {plain.__name__: relative for plain, relative in _MODELS.items()}
    names = [name for name in config.architectures or [] if name in by_name]
    if not names:
        raise ValueError(
            f"folder: {folder} has position_embedding_type={config.position_embedding_type!r} and "
            f"architectures={config.architectures}, of which none is among {', '.join(by_name)}"
        )
    relative = by_name[names[0]]
    kind = config.position_embedding_type
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = cached_file(folder, name, _raise_exceptions_for_missing_entries=False, **where)
        if path is not None:
            break
    else:
        raise ValueError(
            f"folder: {folder} has neither model.safetensors nor pytorch_model.bin; "
            "join a checkpoint of several files first"
        )
    config = copy.deepcopy(config)
    config.__class__ = relative.config_class
    del config.position_embedding_type
    reach = config.max_position_embeddings - 1
    config.relative_attention = _RelativeSettings.check(reach, terms=_OLD[kind]).to_config()
    config._attn_implementation = IMPLEMENTATION
    config.architectures = [relative.__name__]
    weights = from_old_state_dict(load_state_dict(path), kind)
    return relative.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True, **kwargs)


def from_pretrained(folder: str | os.PathLike, **kwargs) -> Any:
    """Load a model that `add_relative_positions` made and `save_pretrained` (or Trainer) saved, in its own class.

    Or one that transformers 4 trained with `position_embedding_type` "relative_key" or "relative_key_query": see
    `from_old_state_dict`.

    Args:
        folder: the folder, or the name of a repository on the Hugging Face hub.
        kwargs: for `PreTrainedModel.from_pretrained`.

    Returns:
        What `PreTrainedModel.from_pretrained` does: the model in eval mode, or with `output_loading_info` a pair.

    Raises:
        ValueError: the checkpoint is of another kind, or lacks tables or position embeddings that its configuration
            lists.
    """
    named = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
    where = {name: kwargs[name] for name in named if name in kwargs}
    config = AutoConfig.from_pretrained(folder, **where)
    with_info = kwargs.pop("output_loading_info", False)
    if getattr(config, "position_embedding_type", None) in _OLD:
        model, info = _from_old(
            folder, config, where, **{name: value for name, value in kwargs.items() if name not in named}
        )
    else:
        by_name = {relative.__name__: relative for relative in _MODELS.values()}
        names = [name for name in config.architectures or [] if name in by_name]
        if not names:
            raise ValueError(
                f"folder: {folder} is not of a model that add_relative_positions made; its config.json has "
                f"model_type={config.model_type!r}, architectures={config.architectures}"
            )
        model, info = by_name[names[0]].from_pretrained(folder, output_loading_info=True, **kwargs)
    listed = ("relative_tables", "position_embeddings")
    missing = sorted(name for name in info["missing_keys"] if any(part in name for part in listed))
    if missing:
        raise ValueError(
            f"folder: the checkpoint in {folder} lacks {', '.join(missing)}, which its configuration lists"
        )
    return (model, info) if with_info else model
