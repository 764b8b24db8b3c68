"""The attention layers of Hugging Face models, computed by `relattn.relative_attention`: `convert` and `revert`.

For each class of transformers that has relative attention there is a plan: which methods to replace, and what they must look like before.
A replacement is set on the instance (``module.forward``), so that classes, parameters, buffers and state dicts stay what they are; it
reads the module's own parameters at every call, and calls the original for what the kernel does not give.
"""

from __future__ import annotations

import collections
import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from relattn._version import __version__
from relattn.functional import attention_with_weights, relative_attention

__all__ = ["convert", "revert"]

_logger = logging.getLogger(__name__)
_BLOCK = 512  # queries that share a mask where attention is chunked


class _Replacement(NamedTuple):
    module: nn.Module
    method: str
    function: Callable
    is_attention: bool = True


# ---- what users call ----


def convert(model: nn.Module, strict: bool = True) -> nn.Module:
    """Let `relattn.relative_attention` compute the relative attention of a transformers model, in place.

    Converted are the self-attention layers of Wav2Vec2-BERT, Wav2Vec2-Conformer and SeamlessM4T v1 (``position_embeddings_type``
    "relative" and "relative_key"), SeamlessM4T v2, Parakeet, Nemotron ASR streaming, FastSpeech2-Conformer, SpeechT5's encoder, XLNet,
    VITS, DeBERTa and DeBERTa v2, wherever they stand in `model`. Parameters, state dicts and files stay as they are; results change by
    rounding only, in training and evaluation, with padding, under autocast, gradient checkpointing and torch.compile. Except that

    - positions that are padding, whose values mean nothing, may hold other values than before (they are never attended to);
    - dropout draws other numbers, and dropout on position embeddings once per batch instead of once per sequence;
    - ``output_attentions=True`` gives weights also where the configuration says "sdpa", and materialises them as before;
    - Nemotron ASR streaming under "eager" is as under "sdpa": transformers' eager attention hides there what its mask shows.

    The original runs where a call asks for what the kernel does not give: XLNet with segment ids or two streams, DeBERTa with
    `query_states`, `output_attentions` of the models whose only implementation is eager, flex attention's block masks.

    Args:
        model: any module. Convert before accelerate dispatches it.
        strict: False = return quietly where there is nothing to convert.

    Returns:
        `model` itself. Converting twice is the same as once. How many layers of which class were converted is logged (INFO).

    Raises:
        ValueError: nothing was converted (the message says why), unless ``strict=False``; or a class of the installed transformers is laid
            out in an unknown way (the message names both). Then nothing has been changed.
    """
    planned: list[_Replacement] = []
    reasons: dict[str, str] = {}
    for module in model.modules():
        plan = _plan_of(module)
        if plan is None:
            if _has_position_bias(module):
                reasons.setdefault(type(module).__name__, _POSITION_BIAS)
            continue
        found = plan(module)
        if isinstance(found, str):
            reasons.setdefault(type(module).__name__, found)
        else:
            planned += found
    counts = collections.Counter(type(item.module).__name__ for item in planned if item.is_attention)
    reasons = {name: reason for name, reason in reasons.items() if name not in counts}
    if not counts:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "it has no layer of a class that relattn knows"
        if strict:
            raise ValueError(f"model: nothing to convert in this {type(model).__name__} ({why})")
        _logger.info("nothing to convert in %s (%s)", type(model).__name__, why)
        return model
    for item in planned:
        _bind(item.module, item.method, item.function)
    _logger.info("converted %s", ", ".join(f"{count} {name}" for name, count in counts.items()))
    for name, reason in reasons.items():
        _logger.info("left as it is: %s (%s)", name, reason)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert`: every layer of `model` computes as before. Returns `model`.

    Give it a whole encoder or more: an encoder's replaced parts and its layers' belong together, and a single layer cannot be reverted.

    Raises:
        RuntimeError: something (accelerate's hooks) has wrapped a converted layer since; remove it first. Nothing has been changed.
    """
    for module in model.modules():
        if any(_is_bound(value) for name, value in vars(module).items() if name == "_old_forward"):
            raise RuntimeError(f"model: a converted {type(module).__name__} was wrapped since; remove accelerate's hooks first")
    for module in model.modules():
        for name in [name for name, value in vars(module).items() if _is_bound(value)]:
            delattr(module, name)
        if isinstance(vars(module).get("config"), _CompactMasks):
            module.config = module.config.config  # type: ignore[assignment,union-attr]
    return model


# ---- putting methods in place ----


class _CompactMasks:
    """A configuration in the place of an encoder's, so that the masks it asks for stay (B, L): all else is the original's."""

    def __init__(self, config: Any) -> None:
        object.__setattr__(self, "config", config)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.config, name, value)

    @property
    def _attn_implementation(self) -> str:
        asked = self.config._attn_implementation
        return "relattn" if asked in ("sdpa", "eager") else asked

    def __getattr__(self, name: str) -> Any:
        if name == "config" or name.startswith("__"):  # while a copy is being made
            raise AttributeError(name)
        return getattr(self.config, name)


def _bind(module: nn.Module, method: str, function: Callable) -> None:
    if function is _CompactMasks:
        if not isinstance(module.config, _CompactMasks):
            module.config = _CompactMasks(module.config)  # type: ignore[assignment]
        return
    # Not a bound method: a partial is copied and pickled together with its module.
    setattr(module, method, functools.partial(function, module))
    module._replicate_for_data_parallel = functools.partial(_replicate, module)  # type: ignore[assignment]


def _is_bound(value: object) -> bool:
    return isinstance(value, functools.partial) and getattr(value.func, "__module__", None) == __name__


def _replicate(module: nn.Module) -> nn.Module:
    """nn.DataParallel's copy of a module for another device: bound to itself, not to what it was copied from."""
    replica = type(module)._replicate_for_data_parallel(module)
    for name, value in vars(module).items():
        if _is_bound(value):
            replica.__dict__[name] = functools.partial(value.func, replica)
    return replica


def _original(module: nn.Module, method: str = "forward") -> Callable:
    return functools.partial(getattr(type(module), method), module)


def _unknown(module: nn.Module, what: str) -> ValueError:
    return ValueError(
        f"model: {type(module).__module__}.{type(module).__qualname__} of transformers {transformers.__version__} is laid out in a way "
        f"that relattn {__version__} does not know ({what}); nothing was converted"
    )


def _check_parameters(module: nn.Module, method: str, parameters: str) -> None:
    given = getattr(type(module), method, None)
    names = None if given is None else " ".join(inspect.signature(given).parameters)
    if names != f"self {parameters}":
        raise _unknown(module, f"{method}({names}), expected {method}(self {parameters})")


def _part(module: nn.Module, name: str, kind: str = "ModuleList") -> Any:
    part = getattr(module, name, None)
    if type(part).__name__ != kind:
        raise _unknown(module, f"its {name} is {type(part).__name__}, expected {kind}")
    return part


def _replacement(
    module: nn.Module, method: str, function: Callable, parameters: str, is_attention: bool = True, **attributes: Any
) -> _Replacement:
    """A replacement, after a look at what it replaces: the method's parameters and the attributes that `function` reads."""
    for name, kind in attributes.items():
        value = getattr(module, name, None)
        if not isinstance(value, kind):
            raise _unknown(module, f"its attribute {name} is {type(value).__name__}")
    _check_parameters(module, method, parameters)
    present = vars(module).get(method)
    if present is not None and not _is_bound(present):
        raise ValueError(
            f"model: {method} of a {type(module).__name__} was replaced already (by accelerate's hooks?); convert the model before that"
        )
    return _Replacement(module, method, function, is_attention)


# ---- arguments of relative_attention ----


def _split(projected: Tensor, size: int) -> Tensor:
    """(B, L, H D) as (B, H, L, D)."""
    return projected.view(*projected.shape[:-1], -1, size).transpose(1, 2)


def _table(projected: Tensor, size: int) -> Tensor:
    """(R, H D) as (H, R, D)."""
    return projected.view(projected.shape[0], -1, size).transpose(0, 1)


def _masks(mask: Tensor | None, batch: int) -> dict[str, Tensor]:
    """`key_mask` or `attn_mask` from the mask that a layer of transformers is handed.

    Where it is the same for every query (its stride says so: transformers expands a mask of padding) only one row is looked at.
    """
    if mask is None:
        return {}
    if mask.dim() == 2:
        return {"key_mask": mask.bool()}
    if mask.shape[2] == 1 or mask.stride(2) == 0:
        mask = mask[:, :, :1]
        if mask.dtype == torch.bool and (mask.shape[1] == 1 or mask.stride(1) == 0):
            return {"key_mask": mask[:, 0, 0].expand(batch, -1)}
    return {"attn_mask": mask}


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    weights: bool = False,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    """(B, L, H D) from (B, H, L, D), and the weights (B, H, L, Lk) if asked for."""
    arguments |= _masks(mask, query.shape[0]) | {"dropout_p": dropout if module.training else 0.0}
    if weights:
        output, _, given = attention_with_weights(query, key, value, **arguments)
        return output.transpose(1, 2).flatten(2), given
    output = relative_attention(query, key, value, **arguments)  # type: ignore[assignment]
    return output.transpose(1, 2).flatten(2), None


def _wants_weights(module: Any, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("output_attentions", getattr(module.config, "output_attentions", False)))


def _is_foreign(module: Any, mask: Any) -> bool:
    """Flex attention's BlockMask, or SeamlessM4T v2's boolean mask under "eager", which adds it to the scores as it is.

    A mask (B, L) is `_CompactMasks`'s, not the original's.
    """
    if mask is None:
        return False
    if not isinstance(mask, Tensor):
        return True
    return mask.dim() == 4 and mask.dtype == torch.bool and module.config._attn_implementation == "eager"


# ---- Wav2Vec2-BERT, Wav2Vec2-Conformer, SeamlessM4T ----


def _relative_key(module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *positions: Any, **kwargs: Any) -> tuple:
    """Shaw et al. 2018 with a range of its own on each side: rows by key minus query, as here."""
    if _is_foreign(module, attention_mask):
        return _original(module)(hidden_states, attention_mask, *positions, **kwargs)
    query, key, value = (_split(of(hidden_states), module.head_size) for of in (module.linear_q, module.linear_k, module.linear_v))
    sides = (module.left_max_position_embeddings, module.right_max_position_embeddings)
    # By a call of the embedding, not its weight: hooks and adapters on it keep working.
    rel_k = module.distance_embedding(torch.arange(sum(sides) + 1, device=query.device)).to(query.dtype)
    output, weights = _attend(
        module, query, key, value, attention_mask, module.dropout.p, _wants_weights(module, kwargs),
        rel_k=rel_k, max_relative_position=sides, scale=module.scaling,
    )  # fmt: skip
    return module.linear_out(output), weights


def _relative(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    relative_position_embeddings: Tensor | None = None,
    **kwargs: Any,
) -> tuple:
    """Transformer-XL's form: projected sinusoids, one row for each distance, u and v."""
    positions = relative_position_embeddings
    if _is_foreign(module, attention_mask) or positions is None or positions.shape[:2] != (1, 2 * hidden_states.shape[1] - 1):
        return _original(module)(hidden_states, attention_mask, positions, **kwargs)
    query, key, value = (_split(of(hidden_states), module.head_size) for of in (module.linear_q, module.linear_k, module.linear_v))
    output, weights = _attend(
        module, query, key, value, attention_mask, module.dropout.p, _wants_weights(module, kwargs), scale=module.scaling,
        rel_k=_table(module.linear_pos(positions)[0], module.head_size), pos_bias_u=module.pos_bias_u, pos_bias_v=module.pos_bias_v,
    )  # fmt: skip
    return module.linear_out(output), weights


_PROJECTIONS: dict[str, Any] = dict(linear_q=nn.Module, linear_k=nn.Module, linear_v=nn.Module, linear_out=nn.Module, dropout=nn.Dropout)


def _conformer(parameters: str) -> Callable[[nn.Module], list[_Replacement] | str]:
    def plan(module: nn.Module) -> list[_Replacement] | str:
        kind = getattr(module, "position_embeddings_type", "missing")
        attributes = _PROJECTIONS | dict(scaling=float, head_size=int, config=object)
        if kind == "relative_key":
            attributes |= dict(left_max_position_embeddings=int, right_max_position_embeddings=int, distance_embedding=nn.Module)
            return [_replacement(module, "forward", _relative_key, parameters, **attributes)]
        if kind == "relative":
            attributes |= dict(linear_pos=nn.Module, pos_bias_u=Tensor, pos_bias_v=Tensor)
            return [_replacement(module, "forward", _relative, parameters, **attributes)]
        if kind not in (None, "rotary"):
            raise _unknown(module, f"position_embeddings_type={kind!r}")
        return f"position_embeddings_type={kind!r} has no relative term"

    return plan


def _apply_chunk_attention(module: Any, attention_mask: Tensor | None, hidden_states: Tensor) -> Tensor | None:
    """SeamlessM4T v2: a single chunk hides nothing, and needs no (L, L) mask."""
    asked = getattr(module.config, "config", module.config)._attn_implementation  # behind _CompactMasks
    if hidden_states.shape[1] <= module.config.speech_encoder_chunk_size and asked != "eager":
        return attention_mask
    return _original(module, "_apply_chunk_attention")(attention_mask, hidden_states)


def _conformer_encoder(module: Any) -> list[_Replacement] | str:
    attentions = [getattr(layer, "self_attn", None) for layer in _part(module, "layers")]
    if not all(getattr(attention, "position_embeddings_type", None) in ("relative", "relative_key") for attention in attentions):
        return "its layers have no relative term"
    return [_Replacement(module, "config", _CompactMasks, False)]


def _seamless_v2_encoder(module: Any) -> list[_Replacement] | str:
    planned = _conformer_encoder(module)
    if isinstance(planned, str):
        return planned
    parameters = "attention_mask hidden_states"
    return [*planned, _replacement(module, "_apply_chunk_attention", _apply_chunk_attention, parameters, False, config=object)]


# ---- Parakeet, Nemotron ASR streaming ----


def _fast_conformer(module: Any, position_embeddings: Tensor, keys: int) -> dict[str, Any]:
    """Arguments of the position term. Rows of the embeddings, which a batch shares but for dropout: distances -(Lk - 1) to Lk - 1."""
    if position_embeddings.shape[1] != 2 * keys - 1:
        raise ValueError(f"position_embeddings: expected {2 * keys - 1} rows for {keys} keys, got {position_embeddings.shape[1]}")
    rel_k = _table(module.relative_k_proj(position_embeddings[0]), module.head_dim)
    grouped = module.num_key_value_groups != 1
    return dict(rel_k=rel_k, pos_bias_u=module.bias_u, pos_bias_v=module.bias_v, scale=module.scaling, enable_gqa=grouped)


def _parakeet(
    module: Any, hidden_states: Tensor, position_embeddings: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    query, key, value = (_split(of(hidden_states), module.head_dim) for of in (module.q_proj, module.k_proj, module.v_proj))
    arguments = _fast_conformer(module, position_embeddings, key.shape[2])
    weights = _wants_weights(module, kwargs)
    output, given = _attend(module, query, key, value, attention_mask, module.attention_dropout, weights, **arguments)
    return module.o_proj(output), given


@merge_with_config_defaults
@capture_outputs
def _parakeet_encoder(
    module: Any, input_features: Tensor, attention_mask: Tensor | None = None, output_attention_mask: bool = True, **kwargs: Any
) -> Any:
    """ParakeetEncoder.forward with a mask (B, 1, 1, L) instead of its outer product (B, 1, L, L); the convolutions need no more."""
    from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderModelOutput

    hidden = module.subsampling(input_features, attention_mask)
    hidden = hidden * module.input_scale
    positions = module.encode_positions(hidden)
    hidden = nn.functional.dropout(hidden, p=module.dropout, training=module.training)
    positions = nn.functional.dropout(positions, p=module.dropout_positions, training=module.training)
    frames = None if attention_mask is None else module._get_output_attention_mask(attention_mask, target_length=hidden.shape[1])
    mask = None if frames is None else frames[:, None, None, :]
    for layer in module.layers:
        if module.training and module.layerdrop > 0.0 and torch.rand([]) < module.layerdrop:
            continue
        hidden = layer(hidden, attention_mask=mask, position_embeddings=positions, **kwargs)
    output_mask = frames.int() if frames is not None and output_attention_mask else None
    return ParakeetEncoderModelOutput(last_hidden_state=hidden, attention_mask=output_mask)


def _nemotron(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    chunk: tuple[int, int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """With `chunk` (from `_nemotron_encoder`): (frames of a chunk, chunks seen to the left), and the mask is (B, L), of padding alone."""
    query, key, value = (_split(of(hidden_states), module.head_dim) for of in (module.q_proj, module.k_proj, module.v_proj))
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
    arguments = _fast_conformer(module, position_embeddings, key.shape[2])
    weights = _wants_weights(module, kwargs)
    if chunk is not None and not weights:
        arguments |= {"dropout_p": module.attention_dropout if module.training else 0.0}
        output = _chunked(query, key, value, chunk, attention_mask, **arguments).transpose(1, 2).flatten(2)
        return module.o_proj(output), None
    if chunk is not None:
        frames = torch.arange(query.shape[2], device=query.device)
        seen = _chunk_mask(frames, frames, chunk)[None, None]
        attention_mask = seen if attention_mask is None else seen & attention_mask[:, None, None, :]
    arguments |= {"query_offset": key.shape[2] - query.shape[2]}
    output, given = _attend(module, query, key, value, attention_mask, module.attention_dropout, weights, **arguments)
    return module.o_proj(output), given


def _chunk_mask(queries: Tensor, keys: Tensor, chunk: tuple[int, int]) -> Tensor:
    """bool (Lq, Lk): keys of the query's own chunk and of so many before it."""
    behind = (queries // chunk[0])[:, None] - (keys // chunk[0])[None, :]
    return (behind >= 0) & (behind <= chunk[1])


def _chunked(
    query: Tensor, key: Tensor, value: Tensor, chunk: tuple[int, int], key_mask: Tensor | None, *, rel_k: Tensor, **arguments: Any
) -> Tensor:
    """Attention to one's chunk and some before it, a block of queries at a time, each with the keys that it may see: no (L, L) mask."""
    size, left = chunk
    length, reach = query.shape[2], size * left
    if size == 1:
        arguments |= {"window": (reach, 0), "key_mask": key_mask}
        return relative_attention(query, key, value, rel_k, **arguments)  # type: ignore[return-value]
    block = -(-_BLOCK // size) * size
    frames = torch.arange(length, device=query.device)
    outputs: list[Any] = []
    for start in range(0, length, block):
        stop, first = min(start + block, length), max(0, start - reach)
        sides = (stop - 1 - first, stop - 1 - start)  # the distances of this block
        rows = rel_k[:, length - 1 - sides[0] : length + sides[1]]
        # The window, wider than what a query sees, lets the kernel pass over whole tiles; the mask says the rest.
        outputs.append(
            relative_attention(
                query[:, :, start:stop], key[:, :, first:stop], value[:, :, first:stop], rows, max_relative_position=sides,
                query_offset=start - first, window=(reach + size - 1, size - 1),
                attn_mask=_chunk_mask(frames[start:stop], frames[first:stop], chunk),
                key_mask=None if key_mask is None else key_mask[:, first:stop], **arguments,
            )
        )  # fmt: skip
    return torch.cat(outputs, 2)


@merge_with_config_defaults
@capture_outputs
def _nemotron_encoder(
    module: Any,
    input_features: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    output_attention_mask: bool = True,
    use_cache: bool | None = None,
    padding_cache: Any = None,
    num_lookahead_tokens: int | None = None,
    **kwargs: Any,
) -> Any:
    """NemotronAsrStreamingEncoder.forward without its (B, 1, L, L) mask. Streaming, whose masks are small, stays with the original."""
    from transformers.models.nemotron_asr_streaming.modeling_nemotron_asr_streaming import NemotronAsrStreamingEncoderModelOutput

    if use_cache or past_key_values is not None or padding_cache is not None:
        given = dict(position_ids=position_ids, past_key_values=past_key_values, padding_cache=padding_cache, use_cache=use_cache)
        given |= dict(output_attention_mask=output_attention_mask, num_lookahead_tokens=num_lookahead_tokens)
        return inspect.unwrap(type(module).forward)(module, input_features, attention_mask, **given, **kwargs)
    hidden = module.subsampling(input_features, attention_mask)
    hidden = hidden * module.input_scale
    frames = None if attention_mask is None else module._get_output_attention_mask(attention_mask, target_length=hidden.shape[1])
    left, right = module._resolve_attn_context(num_lookahead_tokens)
    chunk = (right + 1, left // (right + 1) if left >= 0 else hidden.shape[1])  # as its chunked_limited_mask_function
    positions = module.encode_positions(hidden, cached_frames=0)
    hidden = nn.functional.dropout(hidden, p=module.dropout, training=module.training)
    positions = nn.functional.dropout(positions, p=module.dropout_positions, training=module.training)
    all_masked_rows = None if frames is None else _sees_none(frames, chunk)[:, None, :]
    for layer in module.layers:
        if module.training and module.layerdrop > 0.0 and torch.rand([]) < module.layerdrop:
            continue
        hidden = layer(
            hidden, attention_mask=frames, all_masked_rows=all_masked_rows, position_embeddings=positions, chunk=chunk, **kwargs
        )  # fmt: skip
    output_mask = frames.int() if frames is not None and output_attention_mask else None
    return NemotronAsrStreamingEncoderModelOutput(last_hidden_state=hidden, attention_mask=output_mask)


def _sees_none(frames: Tensor, chunk: tuple[int, int]) -> Tensor:
    """bool (B, L): every frame that the query may see is padding."""
    size, left = chunk
    length = frames.shape[1]
    start = torch.arange(length, device=frames.device) // size * size
    counts = nn.functional.pad(frames.cumsum(1), (1, 0))
    return counts[:, (start + size).clamp(max=length)] == counts[:, (start - left * size).clamp(min=0)]


_FAST_CONFORMER: dict[str, Any] = dict(
    q_proj=nn.Module, k_proj=nn.Module, v_proj=nn.Module, o_proj=nn.Module, relative_k_proj=nn.Module, bias_u=Tensor, bias_v=Tensor,
    scaling=float, head_dim=int, num_key_value_groups=int, attention_dropout=(int, float), config=object,
)  # fmt: skip

_FAST_CONFORMER_ENCODER: dict[str, Any] = dict(
    subsampling=nn.Module, encode_positions=nn.Module, input_scale=float, dropout=(int, float), dropout_positions=(int, float),
    layerdrop=(int, float), _get_output_attention_mask=Callable,
)  # fmt: skip


def _parakeet_plan(module: Any) -> list[_Replacement]:
    encoder = "input_features attention_mask output_attention_mask kwargs"
    block = "hidden_states attention_mask position_embeddings kwargs"
    attention = "hidden_states position_embeddings attention_mask kwargs"
    planned = [_replacement(module, "forward", _parakeet_encoder, encoder, False, **_FAST_CONFORMER_ENCODER)]
    for layer in _part(module, "layers"):
        _check_parameters(layer, "forward", block)
        layer_attention = _part(layer, "self_attn", "ParakeetEncoderAttention")
        planned.append(_replacement(layer_attention, "forward", _parakeet, attention, **_FAST_CONFORMER))
    return planned


def _nemotron_plan(module: Any) -> list[_Replacement]:
    encoder = "input_features attention_mask position_ids past_key_values output_attention_mask use_cache padding_cache"
    encoder += " num_lookahead_tokens kwargs"
    block = "hidden_states attention_mask all_masked_rows position_embeddings past_key_values padding_cache kwargs"
    attention = "hidden_states position_embeddings attention_mask past_key_values kwargs"
    attributes = _FAST_CONFORMER_ENCODER | dict(_resolve_attn_context=Callable)
    planned = [_replacement(module, "forward", _nemotron_encoder, encoder, False, **attributes)]
    for layer in _part(module, "layers"):
        _check_parameters(layer, "forward", block)
        layer_attention = _part(layer, "self_attn", "NemotronAsrStreamingEncoderAttention")
        planned.append(_replacement(layer_attention, "forward", _nemotron, attention, **_FAST_CONFORMER, layer_idx=int))
    return planned


# ---- FastSpeech2-Conformer ----


def _fastspeech2(
    module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, pos_emb: Tensor | None = None, output_attentions: bool = False
) -> tuple:
    batch, length, _ = hidden_states.shape
    mask_fits = attention_mask is None or attention_mask.shape == (batch, 1, length)
    if output_attentions or not mask_fits or pos_emb is None or pos_emb.shape[:2] != (1, 2 * length - 1):
        return _original(module)(hidden_states, attention_mask, pos_emb, output_attentions)
    query, key, value = (_split(of(hidden_states), module.head_dim) for of in (module.linear_q, module.linear_k, module.linear_v))
    mask = None if attention_mask is None else attention_mask[:, 0]  # (B, L), zero where hidden
    output, _ = _attend(
        module, query, key, value, mask, module.dropout.p, rel_k=_table(module.linear_pos(pos_emb)[0], module.head_dim),
        pos_bias_u=module.pos_bias_u, pos_bias_v=module.pos_bias_v,
    )  # fmt: skip
    return module.linear_out(output), None


def _fastspeech2_plan(module: nn.Module) -> list[_Replacement]:
    attributes = _PROJECTIONS | dict(linear_pos=nn.Module, pos_bias_u=Tensor, pos_bias_v=Tensor, head_dim=int)
    return [_replacement(module, "forward", _fastspeech2, "hidden_states attention_mask pos_emb output_attentions", **attributes)]


# ---- SpeechT5, VITS: only eager, with a float mask (B, 1, L, L) ----


def _expanded(module: Any, attention_mask: Tensor | None, hidden_states: Tensor) -> Tensor | None:
    """The additive mask that transformers makes from (B, L), with one row in memory: its mask function takes 4-D ones as they are."""
    if attention_mask is None or attention_mask.dim() != 2 or module.config._attn_implementation != "eager":
        return attention_mask
    mask = hidden_states.new_zeros(attention_mask.shape)
    mask = mask.masked_fill(~attention_mask.bool(), torch.finfo(mask.dtype).min)
    return mask[:, None, None, :].expand(-1, 1, hidden_states.shape[1], -1)


def _speecht5_encoder(module: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None = None, *rest: Any, **kwargs: Any) -> Any:
    return _original(module)(hidden_states, _expanded(module, attention_mask, hidden_states), *rest, **kwargs)


def _vits_encoder(
    module: nn.Module, hidden_states: Tensor, padding_mask: Tensor, attention_mask: Tensor | None = None, *rest: Any, **kwargs: Any
) -> Any:
    return _original(module)(hidden_states, padding_mask, _expanded(module, attention_mask, hidden_states), *rest, **kwargs)


def _speecht5_positions(module: Any, hidden_states: Tensor) -> Tensor:
    """The table by key minus query, (2 max_length, D), where the original spreads it to (L, L, D). Its rows go by query minus key."""
    return module.pe_k(torch.arange(2 * module.max_length - 1, -1, -1, device=hidden_states.device))


def _speecht5(
    module: Any,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple:
    compact = position_bias is not None and position_bias.dim() == 2
    if not compact or output_attentions or key_value_states is not None or past_key_values is not None:
        if compact:
            position_bias = _spread(position_bias, hidden_states.shape[1])  # type: ignore[arg-type]
        return _original(module)(
            hidden_states, key_value_states, past_key_values, attention_mask, position_bias, output_attentions, **kwargs
        )
    query, key, value = (_split(of(hidden_states), module.head_dim) for of in (module.q_proj, module.k_proj, module.v_proj))
    right = position_bias.shape[0] // 2  # type: ignore[union-attr]
    output, _ = _attend(
        module, query, key, value, attention_mask, module.dropout, rel_k=position_bias, max_relative_position=(right - 1, right),
        scale=module.scaling,
    )  # fmt: skip
    return module.out_proj(output), None


def _spread(table: Tensor, length: int) -> Tensor:
    """(L, L, D) from `_speecht5_positions`."""
    right = table.shape[0] // 2
    frames = torch.arange(length, device=table.device)
    return table[(frames - frames[:, None]).clamp(1 - right, right) + right - 1]


_EAGER: dict[str, Any] = dict(
    q_proj=nn.Module, k_proj=nn.Module, v_proj=nn.Module, out_proj=nn.Module, head_dim=int, scaling=float, dropout=(int, float)
)  # fmt: skip


def _speecht5_plan(module: Any) -> list[_Replacement]:
    attention = "hidden_states key_value_states past_key_values attention_mask position_bias output_attentions kwargs"
    encoder = "hidden_states attention_mask output_attentions output_hidden_states return_dict kwargs"
    positions = _part(module, "embed_positions", "SpeechT5RelativePositionalEncoding")
    planned = [
        _replacement(module, "forward", _speecht5_encoder, encoder, False, config=object),
        _replacement(positions, "forward", _speecht5_positions, "hidden_states", False, pe_k=nn.Module, max_length=int),
    ]
    return planned + [
        _replacement(_part(layer, "attention", "SpeechT5Attention"), "forward", _speecht5, attention, **_EAGER)
        for layer in _part(module, "layers")
    ]


def _vits(
    module: Any,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple:
    """Shaw et al. 2018 with values too; zero outside the window, which is a row of zeros at each end."""
    if output_attentions:
        return _original(module)(hidden_states, key_value_states, attention_mask, output_attentions)
    query, key, value = (_split(of(hidden_states), module.head_dim) for of in (module.q_proj, module.k_proj, module.v_proj))
    rel_k, rel_v = (nn.functional.pad(table[0], (0, 0, 1, 1)) for table in (module.emb_rel_k, module.emb_rel_v))
    output, _ = _attend(
        module, query, key, value, attention_mask, module.dropout, rel_k=rel_k, rel_v=rel_v, max_relative_position=module.window_size + 1,
        scale=module.scaling,
    )  # fmt: skip
    return module.out_proj(output), None


def _vits_plan(module: Any) -> list[_Replacement] | str:
    if not module.window_size:
        return f"window_size={module.window_size!r} has no relative term"
    parameters = "hidden_states key_value_states attention_mask output_attentions"
    return [_replacement(module, "forward", _vits, parameters, **_EAGER, emb_rel_k=Tensor, emb_rel_v=Tensor, window_size=int)]


def _vits_encoder_plan(module: nn.Module) -> list[_Replacement]:
    parameters = "hidden_states padding_mask attention_mask output_attentions output_hidden_states return_dict"
    return [_replacement(module, "forward", _vits_encoder, parameters, False, config=object)]


# ---- XLNet ----


def _xlnet(
    module: Any,
    h: Tensor,
    g: Tensor | None,
    attn_mask_h: Tensor | None,
    attn_mask_g: Tensor | None,
    r: Tensor,
    seg_mat: Tensor | None,
    mems: Tensor | None = None,
    target_mapping: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple:
    """Time first: h (L, B, E), r (rows, B, E); masks (L, Lk, B or 1, 1), 0 where seen.

    The rows of r go from distance -Lk, which no key has, to L - 1, or to 0 where attention is causal.
    """
    seen = h if mems is None or mems.dim() <= 1 else torch.cat([mems, h], dim=0)
    queries, keys, rows = h.shape[0], seen.shape[0], r.shape[0]
    fits = rows == keys + queries or (rows == keys + 1 and attn_mask_h is not None)
    if g is not None or seg_mat is not None or output_attentions or not fits:
        return _original(module)(h, g, attn_mask_h, attn_mask_g, r, seg_mat, mems, target_mapping, output_attentions)
    query, key, value = (
        torch.einsum("ibh,hnd->ibnd", of, by).permute(1, 2, 0, 3) for of, by in ((h, module.q), (seen, module.k), (seen, module.v))
    )
    table = torch.einsum("ih,hnd->nid", r[:, 0].type(module.r.dtype), module.r)
    mask = None if attn_mask_h is None else (attn_mask_h == 0).permute(2, 3, 0, 1)
    output = relative_attention(
        query, key, value, table[:, 1:], max_relative_position=(keys - 1, rows - 1 - keys), query_offset=keys - queries, scale=module.scale,
        pos_bias_u=module.r_w_bias, pos_bias_v=module.r_r_bias, dropout_p=module.dropout.p if module.training else 0.0, attn_mask=mask,
    )  # fmt: skip
    return module.post_attention(h, output.permute(2, 0, 1, 3)), None  # type: ignore[union-attr]


def _xlnet_plan(module: Any) -> list[_Replacement] | str:
    if not isinstance(getattr(module, "bi_data", None), bool):
        raise _unknown(module, "it has no bi_data")
    if module.bi_data:
        return "bi_data=True gives the halves of a batch positions of their own"
    parameters = "h g attn_mask_h attn_mask_g r seg_mat mems target_mapping output_attentions"
    attributes: dict[str, Any] = dict.fromkeys(("q", "k", "v", "r", "r_w_bias", "r_r_bias"), Tensor)
    attributes |= dict(scale=float, dropout=nn.Dropout, post_attention=Callable)
    return [
        _replacement(_part(layer, "rel_attn", "XLNetRelativeAttention"), "forward", _xlnet, parameters, **attributes)
        for layer in _part(module, "layer")
    ]


# ---- DeBERTa ----


def _deberta_positions(module: Any, hidden_states: Any, query_states: Any = None, relative_pos: Tensor | None = None) -> Tensor | None:
    """Instead of an (L, L) tensor of positions: None, from which a layer makes one row per distance."""
    return relative_pos


def _deberta_mask(module: Any, attention_mask: Tensor) -> Tensor:
    """(B, 1, 1, L) instead of its outer product (B, 1, L, L)."""
    if attention_mask.dim() <= 2:
        return attention_mask[:, None, None, :]
    return _original(module, "get_attention_mask")(attention_mask)


def _deberta_by_original(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool,
    query_states: Tensor | None,
    relative_pos: Tensor | None,
    rel_embeddings: Tensor | None,
) -> tuple:
    """The original layer, with the tensors that `_deberta_positions` and `_deberta_mask` spared."""
    if attention_mask.shape[-2] == 1:
        attention_mask = attention_mask * attention_mask.transpose(-1, -2)
    if relative_pos is None:
        queries = hidden_states if query_states is None else query_states
        query, key = (torch.arange(states.shape[-2], device=states.device) for states in (queries, hidden_states))
        distance = query[:, None] - key
        bucket = _deberta_bucket(module)
        relative_pos = (distance if bucket is None else bucket(distance).to(torch.long))[None]
    return _original(module)(hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings)


def _deberta_bucket(module: Any) -> Callable[[Tensor], Tensor] | None:
    """The logarithmic buckets of DeBERTa v2, a function of query minus key; None = without."""
    if getattr(module, "position_buckets", -1) <= 0:
        return None
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    return functools.partial(make_log_bucket_position, bucket_size=module.position_buckets, max_position=module.max_relative_positions)


def _deberta_rows(length: int, span: int, device: torch.device, bucket: Callable | None, limit: int) -> tuple[int, Tensor]:
    """k, and the row of the 2 * span embeddings for each distance from -k to k; farther ones share the last rows."""
    k = min(length - 1, limit)
    distance = torch.arange(k, -k - 1, -1, device=device)  # DeBERTa counts query minus key
    position = distance if bucket is None else bucket(distance).to(torch.long)
    return k, (position + span).clamp(0, 2 * span - 1)


def _deberta(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> tuple:
    """c2p is rel_k, p2c is rel_q (He et al. 2021)."""
    if output_attentions or query_states is not None or relative_pos is not None or rel_embeddings is None:
        return _deberta_by_original(module, hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings)
    size, length, most = module.attention_head_size, hidden_states.shape[1], module.max_relative_positions
    query, key, value = _split(module.in_proj(hidden_states), 3 * size).chunk(3, dim=-1)
    query = query + module.q_bias.view(1, -1, 1, size)
    value = value + module.v_bias.view(1, -1, 1, size)
    span = min(length, most)
    embeddings = module.pos_dropout(rel_embeddings)[most - span : most + span]
    k, rows = _deberta_rows(length, span, query.device, None, span)
    tables: dict[str, Any] = {}
    if "c2p" in module.pos_att_type:
        tables["rel_k"] = _table(module.pos_proj(embeddings)[rows], size)
    if "p2c" in module.pos_att_type:
        tables["rel_q"] = _table(module.pos_q_proj(embeddings)[rows], size)
    scale = (size * (1 + len(module.pos_att_type))) ** -0.5
    return _attend(
        module, query, key, value, attention_mask.bool(), module.dropout.p, max_relative_position=k, scale=scale, **tables
    )  # fmt: skip


def _deberta_v2(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> tuple:
    """c2p is rel_k, p2c is rel_q, the logarithmic buckets spread to one row per distance (He et al. 2021)."""
    if output_attentions or query_states is not None or relative_pos is not None or rel_embeddings is None:
        return _deberta_by_original(module, hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings)
    size, length, span, most = module.attention_head_size, hidden_states.shape[1], module.pos_ebd_size, module.max_relative_positions
    query, key, value = (_split(of(hidden_states), size) for of in (module.query_proj, module.key_proj, module.value_proj))
    embeddings = module.pos_dropout(rel_embeddings)[: 2 * span]
    bucket, limit = _deberta_bucket(module), span
    if bucket is not None:
        # Beyond max_relative_positions all share a bucket; where the settings leave no room for the logarithm nothing is cut, and
        # where their number is odd its rounding goes on.
        limit = most + 1 if most - 1 > module.position_buckets // 2 and module.position_buckets % 2 == 0 else length
    k, rows = _deberta_rows(length, span, query.device, bucket, limit)
    tables: dict[str, Any] = {}
    if "c2p" in module.pos_att_type:
        tables["rel_k"] = _table((module.key_proj if module.share_att_key else module.pos_key_proj)(embeddings)[rows], size)
    if "p2c" in module.pos_att_type:
        tables["rel_q"] = _table((module.query_proj if module.share_att_key else module.pos_query_proj)(embeddings)[rows], size)
    scale = (size * (1 + len(tables))) ** -0.5
    return _attend(
        module, query, key, value, attention_mask.bool(), module.dropout.p, max_relative_position=k, scale=scale, **tables
    )  # fmt: skip


def _deberta_plan(version: int) -> Callable[[Any], list[_Replacement] | str]:
    parameters = "hidden_states attention_mask output_attentions query_states relative_pos rel_embeddings"
    common: dict[str, Any] = dict(
        attention_head_size=int, pos_att_type=(list, tuple), max_relative_positions=int, pos_dropout=nn.Module, dropout=nn.Dropout
    )
    outer = "DebertaAttention" if version == 1 else "DebertaV2Attention"
    if version == 1:
        function, names = _deberta, ("pos_proj", "pos_q_proj")
        common |= dict(in_proj=nn.Module, q_bias=Tensor, v_bias=Tensor, talking_head=bool)
    else:
        function, names = _deberta_v2, ("pos_key_proj", "pos_query_proj")
        common |= dict(query_proj=nn.Module, key_proj=nn.Module, value_proj=nn.Module, pos_ebd_size=int, position_buckets=int)
        common |= dict(share_att_key=bool)

    def plan(module: Any) -> list[_Replacement] | str:
        if not isinstance(getattr(module, "relative_attention", None), bool):
            raise _unknown(module, "it has no relative_attention")
        if not module.relative_attention:
            return "relative_attention=False"
        planned = [
            _replacement(module, "get_rel_pos", _deberta_positions, "hidden_states query_states relative_pos", False),
            _replacement(module, "get_attention_mask", _deberta_mask, "attention_mask", False),
        ]
        for layer in _part(module, "layer"):
            attention = _part(_part(layer, "attention", outer), "self", "DisentangledSelfAttention")
            attributes, terms = dict(common), getattr(attention, "pos_att_type", ())
            if not getattr(attention, "share_att_key", False):
                attributes |= {name: nn.Module for term, name in zip(("c2p", "p2c"), names, strict=True) if term in terms}
            planned.append(_replacement(attention, "forward", function, parameters, **attributes))
            if not {"c2p", "p2c"} & set(terms):
                return f"pos_att_type={terms!r} has no relative term"
            if getattr(attention, "talking_head", False):
                return "talking_head=True mixes the scores of the heads"
        return planned

    return plan


# ---- which class has which plan ----

_PLANS: dict[str, Callable[[Any], list[_Replacement] | str]] = {
    "wav2vec2_bert.Wav2Vec2BertSelfAttention": _conformer("hidden_states attention_mask relative_position_embeddings kwargs"),
    "wav2vec2_conformer.Wav2Vec2ConformerSelfAttention": _conformer("hidden_states attention_mask relative_position_embeddings kwargs"),
    "seamless_m4t.SeamlessM4TConformerSelfAttention": _conformer("hidden_states attention_mask relative_position_embeddings kwargs"),
    "seamless_m4t_v2.SeamlessM4Tv2ConformerSelfAttention": _conformer("hidden_states attention_mask kwargs"),
    "wav2vec2_bert.Wav2Vec2BertEncoder": _conformer_encoder,
    "wav2vec2_conformer.Wav2Vec2ConformerEncoder": _conformer_encoder,
    "seamless_m4t.SeamlessM4TConformerEncoder": _conformer_encoder,
    "seamless_m4t_v2.SeamlessM4Tv2ConformerEncoder": _seamless_v2_encoder,
    "parakeet.ParakeetEncoder": _parakeet_plan,
    "nemotron_asr_streaming.NemotronAsrStreamingEncoder": _nemotron_plan,
    "fastspeech2_conformer.FastSpeech2ConformerAttention": _fastspeech2_plan,
    "speecht5.SpeechT5Encoder": _speecht5_plan,
    "vits.VitsAttention": _vits_plan,
    "vits.VitsEncoder": _vits_encoder_plan,
    "xlnet.XLNetModel": _xlnet_plan,
    "deberta.DebertaEncoder": _deberta_plan(1),
    "deberta_v2.DebertaV2Encoder": _deberta_plan(2),
}
_POSITION_BIAS = (
    "its position_bias, of (batch, heads, length, length), does not depend on the content and is made once for all layers: "
    "there is no relative product to save; attn_implementation='sdpa' takes it"
)


def _plan_of(module: nn.Module) -> Callable[[Any], list[_Replacement] | str] | None:
    for known in type(module).__mro__:
        folder = known.__module__.removeprefix("transformers.models.").split(".")[0]
        if known.__module__ == f"transformers.models.{folder}.modeling_{folder}" and f"{folder}.{known.__name__}" in _PLANS:
            for name, value in vars(known).items():
                if inspect.isfunction(value) and name != "__init__" and getattr(type(module), name) is not value:
                    raise _unknown(module, f"a subclass of {known.__name__} with a {name} of its own")
            return _PLANS[f"{folder}.{known.__name__}"]
    return None


def _has_position_bias(module: nn.Module) -> bool:
    """T5, WavLM, MPNet and their like."""
    if not type(module).__module__.startswith("transformers.models.") or "Attention" not in type(module).__name__:
        return False
    return "position_bias" in inspect.signature(type(module).forward).parameters
