"""What relattn is measured against: the same attention, as others compute it.

    scores_ij = (q_i . k_j + q_i . rel_k[clamp(j - i)]) / sqrt(D);  output = softmax(scores) value

Every peer turns a `Problem` into a function of (query, key, value, rel_k); `PEERS` names them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import relattn
from benchmarks.measure import TensorStep
from relattn import skew

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
PASSES = ("forward", "train", "decode")


class Problem(NamedTuple):
    """Self-attention over `length` positions; the pass "decode" has one query, the last, and is causal."""

    length: int
    passed: str = "forward"
    batch: int = 1
    heads: int = 8
    head_dim: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    causal: bool = False
    clip: int | None = None

    @property
    def sees_left_only(self) -> bool:
        return self.causal or self.passed == "decode"

    @property
    def queries(self) -> int:
        return 1 if self.passed == "decode" else self.length

    @property
    def offset(self) -> int:
        """Position of query 0 among the keys."""
        return self.length - self.queries

    @property
    def reach(self) -> tuple[int, int]:
        """Distances that have a row of their own: so many to the left, so many to the right."""
        left = self.length - 1 if self.clip is None else self.clip
        return left, 0 if self.sees_left_only else left

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, in one head."""
        return self.length * (self.length + 1) // 2 if self.causal and self.passed != "decode" else self.queries * self.length

    def inputs(self) -> list[Tensor]:
        """query (B, H, Lq, D), key and value (B, H, L, D), rel_k (R, D): normal, the table smaller; with gradients in the pass "train"."""
        torch.manual_seed(0)
        dtype = getattr(torch, self.dtype)
        several = (self.batch, self.heads)
        sizes: list[tuple[int, ...]] = [(*several, self.queries), (*several, self.length), (*several, self.length)]
        sizes.append((sum(self.reach) + 1,))
        scales = (1.0, 1.0, 1.0, 0.5)
        return [
            (torch.randn(*size, self.head_dim, device=self.device) * scale).to(dtype).requires_grad_(self.passed == "train")
            for size, scale in zip(sizes, scales, strict=True)
        ]

    def rows(self) -> Tensor:
        """The table's row of every (query, key), (Lq, L), int64."""
        left, right = self.reach
        query = torch.arange(self.offset, self.length, device=self.device)[:, None]
        key = torch.arange(self.length, device=self.device)[None, :]
        return (key - query).clamp(-left, right) + left

    def spread(self, rel_k: Tensor) -> Tensor:
        """The table with a row for every distance from -(L - 1), to L - 1 or, seeing the left only, to 0; clipping repeats edge rows."""
        if self.clip is None:
            return rel_k
        left, right = self.reach
        last = 0 if self.sees_left_only else self.length - 1
        return rel_k[torch.arange(1 - self.length, last + 1, device=rel_k.device).clamp(-left, right) + left]

    def hidden(self) -> Tensor | None:
        """True where a query does not see a key, (Lq, L); None if it sees all."""
        if not self.causal or self.passed == "decode":
            return None
        return torch.ones(self.length, self.length, dtype=torch.bool, device=self.device).triu(1)


def step(attention: Attention, inputs: Sequence[Tensor], train: bool, grad_output: Tensor | None = None) -> TensorStep:
    """A call: its output and, if `train`, the gradients of the inputs, of those that it uses."""
    if not train:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attention(*inputs),)

        return forward
    if grad_output is None:
        grad_output = torch.randn_like(inputs[0])

    def training() -> tuple[Tensor, ...]:
        output = attention(*inputs)
        gradients = torch.autograd.grad(output, list(inputs), grad_output, allow_unused=True)
        return (output.detach(), *(gradient for gradient in gradients if gradient is not None))

    return training


def materialising_skew(query: Tensor, key: Tensor, value: Tensor, rel_k: Tensor) -> Tensor:
    """Relative attention as the field's code does it: Q E^T at L x (2L-1), pad, reshape, drop, slice (Huang et al. 2018).

    query, key, value (B, H, L, D); rel_k (2L - 1, D). Memory: several tensors of (B, H, L, 2L).
    """
    batch, heads, length, size = query.shape
    logits = query @ rel_k.transpose(0, 1)  # (B, H, L, 2L - 1)
    logits = F.pad(logits, (0, 1)).reshape(batch, heads, 2 * length * length)
    logits = F.pad(logits, (0, length - 1)).reshape(batch, heads, length + 1, 2 * length - 1)
    logits = logits[:, :, :length, length - 1 :]
    scores = (query @ key.transpose(-2, -1) + logits) / size**0.5
    return scores.softmax(-1) @ value


def materialising_causal_skew(query: Tensor, key: Tensor, value: Tensor, rel_k: Tensor) -> Tensor:
    """Music Transformer's own, to the left only: rel_k (L, D) or (H, L, D), Q E^T at L x L, pad, reshape, slice, mask."""
    batch, heads, length, size = query.shape
    logits = F.pad(query @ rel_k.transpose(-2, -1), (1, 0)).reshape(batch, heads, length + 1, length)[:, :, 1:]
    hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    scores = (query @ key.transpose(-2, -1) + logits) / size**0.5
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value


def sdpa(query: Tensor, key: Tensor, value: Tensor, rel_k: Tensor) -> Tensor:
    """torch's attention with no relative term at all: a lower bound on the work, not a peer."""
    return F.scaled_dot_product_attention(query, key, value)


def causal_sdpa(query: Tensor, key: Tensor, value: Tensor, rel_k: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def sdpa_by(backend: str) -> Callable[[Problem], Attention]:
    """torch's attention by one of its own backends, FLASH_ATTENTION for instance."""

    def make(problem: Problem) -> Attention:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        side = ceiling(problem)

        def attention(query: Tensor, key: Tensor, value: Tensor, rel_k: Tensor) -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return side(query, key, value, rel_k)

        return attention

    return make


def own(backend: str) -> Callable[[Problem], Attention]:
    def make(problem: Problem) -> Attention:
        options: dict[str, Any] = dict(max_relative_position=problem.reach, backend=backend)
        if problem.sees_left_only:
            options |= dict(is_causal=True, query_offset=problem.offset)
        attention: Any = relattn.relative_attention
        return functools.partial(attention, **options)

    return make


def ceiling(problem: Problem) -> Attention:
    return causal_sdpa if problem.causal and problem.passed != "decode" else sdpa


def skewed(problem: Problem) -> Attention:
    if problem.passed == "decode":  # a single row needs no skew
        return lambda query, key, value, rel_k: _softmax(query, key, value, _logits(problem, query, rel_k))
    side = materialising_causal_skew if problem.causal else materialising_skew
    return lambda query, key, value, rel_k: side(query, key, value, problem.spread(rel_k))


def compiled_skew(problem: Problem) -> Attention:
    return torch.compile(skewed(problem), dynamic=False)


def shaw(problem: Problem) -> Attention:
    """Shaw et al. 2018, section 3.3: an embedding for every pair, (Lq, L, D), and a product of each with its query."""
    hidden = problem.hidden()

    def attention(query: Tensor, key: Tensor, value: Tensor, rel_k: Tensor) -> Tensor:
        embeddings = rel_k[problem.rows()]
        logits = torch.einsum("bhqd,qkd->bhqk", query, embeddings)
        if hidden is not None:
            logits = logits.masked_fill(hidden, float("-inf"))
        return _softmax(query, key, value, logits)

    return attention


def dense_bias(problem: Problem) -> Attention:
    """SDPA with the relative term as a (B, H, Lq, L) bias."""
    hidden = problem.hidden()

    def attention(query: Tensor, key: Tensor, value: Tensor, rel_k: Tensor) -> Tensor:
        bias = _logits(problem, query / query.shape[3] ** 0.5, rel_k)
        if hidden is not None:
            bias = bias.masked_fill(hidden, float("-inf"))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)

    return attention


def flex(problem: Problem) -> Attention:
    """FlexAttention with a materialised and gathered Q E^T: a score_mod cannot hold a product."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    left, right = problem.reach
    mask = None
    if problem.causal:
        length = problem.length
        mask = create_block_mask(lambda batch, head, row, column: row >= column, None, None, length, length, device=problem.device)

    def attention(query: Tensor, key: Tensor, value: Tensor, rel_k: Tensor) -> Tensor:
        logits = (query / query.shape[3] ** 0.5) @ rel_k.transpose(0, 1)

        def add(score, batch, head, row, column):
            return score + logits[batch, head, row, (column - row).clamp(-left, right) + left]

        return compiled(query, key, value, score_mod=add, block_mask=mask)

    return attention


def _logits(problem: Problem, query: Tensor, rel_k: Tensor) -> Tensor:
    """(B, H, Lq, L): each query's product with the rows of its distances, contiguous."""
    logits = query @ rel_k.transpose(0, 1)
    if problem.passed == "decode" and problem.clip is None:
        return logits
    if problem.clip is None and not problem.causal:
        return skew(logits).contiguous()
    return logits.gather(-1, problem.rows().expand(*logits.shape[:2], -1, -1))


def _softmax(query: Tensor, key: Tensor, value: Tensor, logits: Tensor) -> Tensor:
    return ((query @ key.transpose(-2, -1) + logits) / query.shape[3] ** 0.5).softmax(-1) @ value


class _Given(torch.nn.Module):
    """Stands for a projection: gives what it was last set to, whatever comes in."""

    tensor: Tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.tensor


def _side_by_side(tensor: Tensor) -> Tensor:
    """(B, H, L, D) as the (B, L, H D) of a projection's result."""
    return tensor.transpose(1, 2).flatten(2)


def w2v_bert(problem: Problem) -> Attention:
    """Wav2Vec2BertSelfAttention without its projections, `relative_key`: it builds an (L, L, D) tensor."""
    from transformers import Wav2Vec2BertConfig
    from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertSelfAttention

    left, right = problem.reach
    settings: dict[str, Any] = dict(
        hidden_size=problem.heads * problem.head_dim,
        num_attention_heads=problem.heads,
        position_embeddings_type="relative_key",
        left_max_position_embeddings=left,
        right_max_position_embeddings=right,
        attn_implementation="sdpa",
    )
    config = Wav2Vec2BertConfig(**settings)
    module: Any = Wav2Vec2BertSelfAttention(config).to(problem.device).eval()
    module.linear_q, module.linear_k, module.linear_v = _Given(), _Given(), _Given()
    module.linear_out = torch.nn.Identity()
    del module.distance_embedding.weight

    def attention(query: Tensor, key: Tensor, value: Tensor, rel_k: Tensor) -> Tensor:
        given = [_side_by_side(tensor) for tensor in (query, key, value)]
        module.linear_q.tensor, module.linear_k.tensor, module.linear_v.tensor = given
        module.distance_embedding.weight = rel_k
        return module(given[0])[0].unflatten(2, (problem.heads, problem.head_dim)).transpose(1, 2)

    return attention


def parakeet(problem: Problem) -> Attention:
    """ParakeetEncoderAttention without its projections: Q E^T at L x (2L-1) for every head, pad, view, slice."""
    from transformers import ParakeetEncoderConfig
    from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

    settings: dict[str, Any] = dict(
        hidden_size=problem.heads * problem.head_dim,
        num_attention_heads=problem.heads,
        num_key_value_heads=problem.heads,
        attn_implementation="sdpa",
    )
    config = ParakeetEncoderConfig(**settings)
    module: Any = ParakeetEncoderAttention(config, layer_idx=0).to(problem.device, getattr(torch, problem.dtype)).eval()
    module.q_proj, module.k_proj, module.v_proj = _Given(), _Given(), _Given()
    module.o_proj = module.relative_k_proj = torch.nn.Identity()
    for bias in (module.bias_u, module.bias_v):
        torch.nn.init.zeros_(bias).requires_grad_(False)

    def attention(query: Tensor, key: Tensor, value: Tensor, rel_k: Tensor) -> Tensor:
        given = [_side_by_side(tensor) for tensor in (query, key, value)]
        module.q_proj.tensor, module.k_proj.tensor, module.v_proj.tensor = given
        positions = problem.spread(rel_k).repeat(1, problem.heads).expand(problem.batch, -1, -1)
        return module(given[0], positions)[0].unflatten(2, (problem.heads, problem.head_dim)).transpose(1, 2)

    return attention


def flash_deberta(problem: Problem) -> Attention:
    """FlashDeBERTa's kernel, c2p alone: Q E^T in memory, gathered inside. It counts rows by query minus key, one fewer on one side."""
    from flashdeberta.ops.flash_attention import flash_attention_with_disentangled

    left, right = problem.reach
    span = max(left, right) + 1
    rows = (span - torch.arange(2 * span, device=problem.device)).clamp(-left, right) + left
    scale = problem.head_dim**-0.5

    def attention(query: Tensor, key: Tensor, value: Tensor, rel_k: Tensor) -> Tensor:
        table = rel_k[rows].expand(1, problem.heads, -1, -1)
        return flash_attention_with_disentangled(
            query, key, value, None, table, None, problem.causal, scale, position_buckets=0, max_relative_distance=span
        )

    return attention


def disentangled_flash(problem: Problem) -> Attention:
    """DisentangledFlash's training kernel, c2p alone: Q E^T in memory, gathered inside."""
    from disentangled_flash.position import gradient_band, pad_position_table
    from disentangled_flash.training._kernels import training_attention

    left, right = problem.reach
    device, length = torch.device(problem.device), problem.length
    # Its slots go by query minus key, ours by key minus query: slot s is row left + right - s.
    slots = (right + torch.arange(1 - length, length).clamp(-right, left)).to(torch.int32)
    band, slots = gradient_band(slots, device), slots.to(device)
    mask = torch.ones(problem.batch, length, dtype=torch.bool, device=device)

    def attention(query: Tensor, key: Tensor, value: Tensor, rel_k: Tensor) -> Tensor:
        table = pad_position_table(rel_k.flip(0).expand(problem.heads, -1, -1))
        return training_attention(
            query, key, value, table, None, slots, mask, score_scale=problem.head_dim**-0.5, has_padding=False,
            strict_fp32=not torch.backends.cuda.matmul.allow_tf32, gradient_band=band,
        )  # fmt: skip

    return attention


class Peer(NamedTuple):
    name: str  # on the command line
    label: str  # in tables and pictures
    make: Callable[[Problem], Attention]
    passes: tuple[str, ...] = PASSES
    devices: tuple[str, ...] = ("cpu", "cuda")
    package: str | None = None  # that it needs
    causal: bool = True  # can be
    compiled: bool = False  # anew for every shape
    relative: bool = True

    def refusal(self, problem: Problem) -> str | None:
        """Why it does not take part in the problem, or None."""
        if self.package and find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if problem.device not in self.devices:
            return f"not on {problem.device}"
        if problem.passed not in self.passes:
            return f"no {problem.passed} pass"
        if problem.causal and not self.causal:
            return "bidirectional only"
        if self.name == "flex" and problem.device == "cpu" and problem.passed == "train":
            return "no backward pass on a CPU"
        return relattn.available_backends().get(self.name.removeprefix("relattn-"))


_SEQUENCE = ("forward", "train")
PEERS = {
    peer.name: peer
    for peer in (
        Peer("relattn-triton", "relattn (Triton)", own("triton"), devices=("cuda",)),
        Peer("relattn-cpu", "relattn (C++)", own("cpu"), devices=("cpu",)),
        Peer("relattn-blocked", "relattn (blocked PyTorch)", own("blocked")),
        Peer("relattn-reference", "relattn (reference)", own("reference")),
        Peer("skew", "skew, eager", skewed),
        Peer("skew-compiled", "skew, torch.compile", compiled_skew, _SEQUENCE, compiled=True),
        Peer("shaw", "Shaw's (L, L, D)", shaw),
        Peer("sdpa-bias", "SDPA, dense relative bias", dense_bias),
        Peer("flex", "FlexAttention, gathered", flex, _SEQUENCE, compiled=True),
        Peer("w2v-bert", "w2v-BERT (transformers)", w2v_bert, _SEQUENCE, package="transformers", causal=False),
        Peer("parakeet", "Parakeet (transformers)", parakeet, _SEQUENCE, package="transformers", causal=False),
        Peer("flash-deberta", "FlashDeBERTa", flash_deberta, _SEQUENCE, ("cuda",), "flashdeberta", compiled=True),
        Peer(
            "disentangled-flash", "DisentangledFlash", disentangled_flash, _SEQUENCE, ("cuda",), "disentangled_flash", False, compiled=True
        ),
        Peer("sdpa", "SDPA, no relative term", ceiling, relative=False),
        Peer("sdpa-flash", "SDPA flash, no relative term", sdpa_by("FLASH_ATTENTION"), _SEQUENCE, ("cuda",), relative=False),
        Peer("sdpa-cudnn", "SDPA cuDNN, no relative term", sdpa_by("CUDNN_ATTENTION"), _SEQUENCE, ("cuda",), relative=False),
    )
}


@functools.cache
def own_fastest(device: str) -> str:
    """The name of relattn's backend that is automatic on the device."""
    names = ("triton", "blocked") if device == "cuda" else ("cpu", "blocked")
    return "relattn-" + next(name for name in names if relattn.available_backends()[name] is None)
