"""VITS: Shaw's form with values too. Its attention is only eager, with a float mask (B, 1, L, L)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from relattn.huggingface.attend import attend, expanded_mask, projected
from relattn.huggingface.conversion import Plan, Replacement, original, replacement


def _vits_encoder(
    module: nn.Module,
    hidden_states: Tensor,
    padding_mask: Tensor,
    attention_mask: Tensor | None = None,
    *rest: Any,
    **kwargs: Any,
) -> Any:
    mask = expanded_mask(module, attention_mask, hidden_states.dtype)
    return original(module)(hidden_states, padding_mask, mask, *rest, **kwargs)


def _vits(
    module: Any,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple:
    """Shaw et al. 2018 with values too; zero outside the window, which is a row of zeros at each end."""
    if output_attentions:
        return original(module)(hidden_states, key_value_states, attention_mask, output_attentions)
    query, key, value = projected(hidden_states, module.head_dim, module.q_proj, module.k_proj, module.v_proj)
    rel_k, rel_v = (nn.functional.pad(table[0], (0, 0, 1, 1)) for table in (module.emb_rel_k, module.emb_rel_v))
    output, _ = attend(
        module, query, key, value, attention_mask, module.dropout,
        rel_k=rel_k, rel_v=rel_v, max_relative_position=module.window_size + 1, scale=module.scaling,
    )  # fmt: skip
    return module.out_proj(output), None


_ATTENTION: dict[str, Any] = dict(
    q_proj=nn.Module, k_proj=nn.Module, v_proj=nn.Module, out_proj=nn.Module,
    head_dim=int, scaling=float, dropout=(int, float),
)  # fmt: skip


def _vits_plan(module: Any) -> list[Replacement] | str:
    if not module.window_size:
        return f"window_size={module.window_size!r} has no relative term"
    parameters = "hidden_states key_value_states attention_mask output_attentions"
    attributes = _ATTENTION | dict(emb_rel_k=Tensor, emb_rel_v=Tensor, window_size=int)
    return [replacement(module, "forward", _vits, parameters, **attributes)]


def _vits_encoder_plan(module: nn.Module) -> list[Replacement]:
    parameters = "hidden_states padding_mask attention_mask output_attentions output_hidden_states return_dict"
    return [replacement(module, "forward", _vits_encoder, parameters, False, config=object)]


PLANS: dict[str, Plan] = {"VitsAttention": _vits_plan, "VitsEncoder": _vits_encoder_plan}
