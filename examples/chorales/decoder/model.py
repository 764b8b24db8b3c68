"""Music Transformer (Huang et al. 2018): a decoder whose attention knows distances, as a model of transformers.

`model.generate` works with sampling, beams, batches of primes of different lengths (padded on the left) and a
key/value cache. Distances have no longest one: those beyond `max_relative_position` share the table's last row.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import PreTrainedConfig as Config
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from relattn import relative_attention
from relattn.functional import attention_with_weights

from .settings import POSITIONS


class MusicTransformerConfig(Config):
    """Settings of a `MusicTransformer`.

    Args:
        vocab_size: number of tokens.
        positions: "relative" (a table of distances in every layer), "absolute" (sinusoids added to the embeddings, as
            in Vaswani et al. 2017) or "both".
        language: what the tokens mean, "chorale" or "midi" (see languages.py).
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: width, layers, heads and width of the
            feed-forward layers.
        max_relative_position: distances beyond it share a row; the tables have one row more.
        training_length: tokens of a training window. Not a limit: longer music may be read and written.
        dropout: of embeddings, attention weights and both sublayers' outputs.
    """

    model_type = "relattn-music-transformer"

    vocab_size: int = 132
    positions: str = "relative"
    language: str = "chorale"
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 512
    max_relative_position: int = 256
    training_length: int = 512
    dropout: float = 0.1
    initializer_range: float = 0.02
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if self.positions not in POSITIONS:
            raise ValueError(f"positions: expected one of {', '.join(POSITIONS)}, got {self.positions!r}")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"width: expected a multiple of twice the {self.num_attention_heads} heads, got {self.hidden_size}"
            )
        if self.max_relative_position < 1:
            raise ValueError(f"max-relative-position: expected at least 1, got {self.max_relative_position}")
        super().__post_init__(**kwargs)


def sinusoids(position: Tensor, size: int) -> Tensor:
    """Vaswani et al. 2017, section 3.5: (..., size) for integer positions (...), sines then cosines."""
    rate = torch.exp(torch.arange(0, size, 2, device=position.device) * (-torch.log(torch.tensor(10_000.0)) / size))
    angle = position[..., None] * rate
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


class Attention(nn.Module):
    """Causal self-attention with `relattn.relative_attention`."""

    def __init__(self, config: MusicTransformerConfig, layer: int):
        super().__init__()
        self.layer, self.heads, self.dropout = layer, config.num_attention_heads, config.dropout
        self.head_size = config.hidden_size // config.num_attention_heads
        self.project_in = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.project_out = nn.Linear(config.hidden_size, config.hidden_size)
        self.clip = (config.max_relative_position, 0)  # keys to the left only
        # (heads, rows, head size): a table per head, as in the paper. Row 0 is the farthest distance, the last row 0.
        table = torch.empty(self.heads, config.max_relative_position + 1, self.head_size)
        self.rel_k = None if config.positions == "absolute" else nn.Parameter(table)

    def forward(self, hidden: Tensor, key_mask: Tensor | None, cache: Cache | None, weights: bool):
        """(B, L, hidden) -> the same, and (B, heads, L, keys) if `weights`, else None."""
        batch, length, _ = hidden.shape
        projected = self.project_in(hidden).view(batch, length, 3, self.heads, self.head_size)
        query, key, value = (part.transpose(1, 2) for part in projected.unbind(2))  # (B, heads, L, head size)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        arguments: dict[str, Any] = dict(
            rel_k=self.rel_k,
            max_relative_position=None if self.rel_k is None else self.clip,
            key_mask=key_mask,
            is_causal=True,
            query_offset=key.shape[2] - length,  # the last query stands at the last key
            dropout_p=self.dropout if self.training else 0.0,
        )
        if weights:
            output, _, shown = attention_with_weights(query, key, value, **arguments)
        else:
            output, shown = cast(Tensor, relative_attention(query, key, value, **arguments)), None
        return self.project_out(output.transpose(1, 2).flatten(2)), shown


class Layer(nn.Module):
    """Attention, then two linear maps, each on its normalised input and added to it."""

    def __init__(self, config: MusicTransformerConfig, layer: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size)
        self.widen = nn.Linear(config.hidden_size, config.intermediate_size)
        self.narrow = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = config.dropout

    def forward(self, hidden: Tensor, key_mask: Tensor | None, cache: Cache | None, weights: bool):
        attended, shown = self.attention(self.attention_norm(hidden), key_mask, cache, weights)
        hidden = hidden + F.dropout(attended, self.dropout, self.training)
        fed = self.narrow(F.gelu(self.widen(self.feed_forward_norm(hidden))))
        return hidden + F.dropout(fed, self.dropout, self.training), shown


class MusicTransformer(PreTrainedModel, GenerationMixin):
    """A decoder that predicts the next token of music."""

    config_class = MusicTransformerConfig
    base_model_prefix = "music"
    _no_split_modules = ["Layer"]  # noqa: RUF012 (transformers wants a list, and a dict)
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012

    def __init__(self, config: MusicTransformerConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Attention) and module.rel_k is not None:
            init.normal_(module.rel_k, std=self.config.initializer_range)  # small: N(0, 1) would drown the content

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int = 0,
        position_ids: Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Predict.

        Args:
            input_ids: (B, L) tokens; with a cache, those behind the tokens that it holds.
            attention_mask: (B, keys), 0 for padding, on either side; keys are all tokens so far, those of the cache
                too. None: no padding.
            past_key_values: a DynamicCache; `cache` is the same.
            labels: (B, L) tokens, -100 where none is to be predicted; label t is predicted from the inputs before t.
            use_cache: return a cache.
            output_attentions: return every layer's weights, (B, heads, L, keys).
            logits_to_keep: only for the last so many tokens; 0: for all.
            position_ids: (B, L), where the tokens stand; None: behind those before, of which padding does not count.

        Returns:
            `logits` (B, L, vocabulary); `loss`, the mean over the labels in nats; `past_key_values`; `attentions`.

        Raises:
            TypeError: a cache that is no DynamicCache: distances are counted from its last key, which must be the
                newest.
            ValueError: `attention_mask` or `logits_to_keep` does not fit; the message says what is accepted.
        """
        if past_key_values is None:
            past_key_values = kwargs.get("cache")  # its name in generate() since transformers 5.24
        if not isinstance(past_key_values, DynamicCache | None):
            raise TypeError(f"past_key_values: expected a DynamicCache, got {type(past_key_values).__name__}")
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        batch, length = input_ids.shape
        keys = past + length
        if attention_mask is not None and attention_mask.shape != (batch, keys):
            raise ValueError(
                f"attention_mask: expected {(batch, keys)}, the tokens so far, got {tuple(attention_mask.shape)}"
            )
        hidden = self.embedding(input_ids) * self.config.hidden_size**0.5
        if self.config.positions != "relative":
            if position_ids is not None:
                position = position_ids
            elif attention_mask is None:
                position = torch.arange(past, keys, device=input_ids.device)
            else:  # padding on the left does not count
                position = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
            hidden = hidden + sinusoids(position, self.config.hidden_size).to(hidden.dtype)
        hidden = F.dropout(hidden, self.config.dropout, self.training)
        key_mask = None if attention_mask is None else attention_mask.bool()
        attentions = []
        for layer in self.layers:
            hidden, weights = layer(hidden, key_mask, past_key_values, bool(output_attentions))
            attentions.append(weights)
        logits = self.head(self.norm(hidden[:, -logits_to_keep:] if logits_to_keep else hidden))
        loss = None
        if labels is not None:
            if logits_to_keep:
                raise ValueError(f"logits_to_keep: expected 0 beside labels, got {logits_to_keep}")
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            attentions=tuple(attentions) if output_attentions else None,
        )


AutoConfig.register(MusicTransformerConfig.model_type, MusicTransformerConfig)
AutoModelForCausalLM.register(MusicTransformerConfig, MusicTransformer)
