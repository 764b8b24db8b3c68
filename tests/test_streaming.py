"""Streaming: a conformer layer, some chunks at a time with a cache that slides, against the whole sequence at once."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relattn import KeyValueCache, RelativeMultiheadAttention

SIZE, KERNEL = 12, 4


class Stream:
    """What a layer keeps between the steps: keys and values, and the frames that the convolution still needs."""

    def __init__(self) -> None:
        self.cache = KeyValueCache(sliding=True)
        self.frames = torch.zeros(2, SIZE, KERNEL - 1, dtype=torch.float64)


class ConformerLayer(nn.Module):
    """Gulati et al. 2020: half a feed-forward layer, attention as Transformer-XL's, a causal convolution, the other half."""

    def __init__(self, **options) -> None:
        super().__init__()

        def half() -> nn.Module:
            return nn.Sequential(nn.LayerNorm(SIZE), nn.Linear(SIZE, 24), nn.SiLU(), nn.Linear(24, SIZE))

        self.before, self.after = half(), half()
        self.norm, self.norm_conv, self.final = nn.LayerNorm(SIZE), nn.LayerNorm(SIZE), nn.LayerNorm(SIZE)
        self.attention = RelativeMultiheadAttention(SIZE, 3, terms=("rel_k", "pos_bias"), batch_first=True, **options)
        self.pointwise, self.depthwise = nn.Linear(SIZE, 2 * SIZE), nn.Conv1d(SIZE, SIZE, KERNEL, groups=SIZE)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        x = x + 0.5 * self.before(x)
        x = x + self.attention(self.norm(x), need_weights=False, cache=None if stream is None else stream.cache)[0]
        frames = F.glu(self.pointwise(self.norm_conv(x)), dim=-1).transpose(1, 2)
        frames = F.pad(frames, (KERNEL - 1, 0)) if stream is None else torch.cat((stream.frames.to(frames), frames), dim=2)
        if stream is not None:
            stream.frames = frames[:, :, 1 - KERNEL :]
        x = x + F.silu(self.depthwise(frames)).transpose(1, 2)
        return self.final(x + 0.5 * self.after(x))


def layers(dtype=torch.float64, **options) -> nn.ModuleList:
    torch.manual_seed(0)
    made = nn.ModuleList(ConformerLayer(max_relative_position=10, **options) for _ in range(2)).to(dtype)
    for layer in made:
        nn.init.normal_(layer.attention.pos_bias_u), nn.init.normal_(layer.attention.pos_bias_v)
    return made


def streamed(model: nn.ModuleList, x: Tensor, steps: list[int]) -> tuple[Tensor, list[Stream], int]:
    """Outputs, what is kept at the end, and the most positions that a cache held after a step."""
    streams, outputs, most = [Stream() for _ in model], [], 0
    for part in x.split(steps, dim=1):
        for layer, stream in zip(model, streams, strict=True):
            part = layer(part, stream)
            most = max(most, stream.cache.length)
        outputs.append(part)
    return torch.cat(outputs, dim=1), streams, most


def whole(model: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in model:
        x = layer(x)
    return x


SETTINGS = [
    (dict(chunk=(4, 2)), [4] * 10, 8),
    (dict(chunk=(4, 0)), [8, 4, 12, 4, 8, 3], 4),
    (dict(chunk=(5, 3)), [5, 15, 5, 10, 1], 16),
    (dict(chunk=(4, 2), is_causal=True), [1, 2, 7, 3, 1, 1, 9, 15], 11),
    (dict(chunk=(3, None), window=(7, None)), [3] * 13, 9),
    (dict(window=(6, 0), is_causal=True), [1] * 20 + [19], 6),
    (dict(chunk=(1, 0)), [1] * 5 + [34], 1),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("options", "steps", "most"), SETTINGS, ids=str)
def test_chunk_by_chunk_equals_offline(options: dict, steps: list[int], most: int, dtype: torch.dtype) -> None:
    model, x = layers(dtype, **options), torch.randn(2, sum(steps), SIZE, dtype=dtype)
    with torch.no_grad():
        output, streams, held = streamed(model, x, steps)
        torch.testing.assert_close(output, whole(model, x))
    assert held <= most
    assert all(stream.cache.seen == sum(steps) for stream in streams)


@pytest.mark.parametrize(("options", "steps"), [setting[:2] for setting in SETTINGS[:4]], ids=str)
def test_with_gradients(options: dict, steps: list[int]) -> None:
    """Through the cache too."""
    model, x = layers(**options), torch.randn(2, sum(steps), SIZE, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(streamed(model, x, steps)[0].square().sum(), (x, *model.parameters()))
    torch.testing.assert_close(found, torch.autograd.grad(whole(model, x).square().sum(), (x, *model.parameters())))


def test_a_long_stream_copies_little_and_stays_small() -> None:
    cache, buffers, views = KeyValueCache(sliding=True), set(), []
    for step in range(500):
        with torch.no_grad():
            key, value = cache.append(torch.full((1, 1, 2, 3), float(step)), torch.full((1, 1, 2, 3), -float(step)))
        views.append((key, key.clone()))
        assert torch.equal(value, -key)
        assert key[0, 0, :, 0].tolist() == [float(one) for one in range(max(0, step - 4), step + 1) for _ in range(2)]
        cache.forget(max(0, cache.length - 8))
        buffers.add(key.untyped_storage().data_ptr())
        assert key.untyped_storage().nbytes() <= 4 * 3 * 20
    assert (cache.seen, cache.length) == (1000, 8)
    assert all(torch.equal(view, kept) for view, kept in views)  # also those whose positions were forgotten


def test_in_inference_mode_and_out_of_it() -> None:
    model, x = layers(chunk=(4, 1)), torch.randn(2, 24, SIZE, dtype=torch.float64)
    stream, parts = Stream(), []
    for index, part in enumerate(x.split(4, dim=1)):
        with torch.inference_mode(index % 3 != 2), torch.no_grad():
            parts.append(model[0](part, stream).clone())
    torch.testing.assert_close(torch.cat([part.detach() for part in parts], dim=1), model[0](x).detach())


def test_key_padding_covers_what_is_held() -> None:
    layer = RelativeMultiheadAttention(8, 2, max_relative_position=5, chunk=(4, 1), batch_first=True, dtype=torch.float64)
    x, padding = torch.randn(2, 20, 8, dtype=torch.float64), torch.arange(20) >= torch.tensor([[20], [13]])
    cache, outputs = KeyValueCache(sliding=True), []
    with torch.no_grad():
        for start in range(0, 20, 4):
            mask = padding[:, start - cache.length : start + 4]
            outputs.append(layer(x[:, start : start + 4], need_weights=False, key_padding_mask=mask, cache=cache)[0])
        torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x, need_weights=False, key_padding_mask=padding)[0])
        with pytest.raises(ValueError, match=r"^key_padding_mask: expected \(2, 8\), got \(2, 24\)"):
            layer(x[:, :4], key_padding_mask=torch.zeros(2, 24, dtype=torch.bool), cache=cache)


def test_refusals() -> None:
    x = torch.randn(1, 3, 8)
    for options, message in (
        (dict(is_causal=True), r"^cache: a sliding one needs .* got window=None and chunk=None"),
        (dict(is_causal=True, window=(None, 0)), r"^cache: a sliding one needs .* got window=\(None, 0\) and chunk=None"),
        (dict(chunk=(4, None)), r"^cache: a sliding one needs .* got window=None and chunk=\(4, None\)"),
        ({}, r"^cache: expected a causal layer or call .*, or a layer with chunks, got neither"),
    ):
        layer = RelativeMultiheadAttention(8, 2, max_relative_position=5, batch_first=True, **options)
        with pytest.raises(ValueError, match=message):
            layer(x, need_weights=False, cache=KeyValueCache(sliding=True))
    layer, cache = RelativeMultiheadAttention(8, 2, max_relative_position=5, batch_first=True, chunk=(4, 1)), KeyValueCache()
    layer(x, need_weights=False, cache=cache)
    with pytest.raises(ValueError, match=r"^cache: expected whole chunks of 4 positions, .* got 3 positions before"):
        layer(x, need_weights=False, cache=cache)
    with pytest.raises(ValueError, match=r"^count: expected 0 to 3, .* got 4"):
        cache.forget(4)


@pytest.mark.parametrize(("size", "left"), list(itertools.product((1, 3, 8), (0, 1, 5))))
def test_a_cache_that_does_not_slide_gives_the_same(size: int, left: int) -> None:
    layer = RelativeMultiheadAttention(8, 2, max_relative_position=4, chunk=(size, left), batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 5 * size + 1, 8, dtype=torch.float64)
    outputs = []
    for sliding in (False, True):
        cache = KeyValueCache(sliding)
        with torch.no_grad():
            outputs.append(torch.cat([layer(part, need_weights=False, cache=cache)[0] for part in x.split(size, dim=1)], dim=1))
        assert cache.seen == 5 * size + 1
        assert (cache.length < cache.seen) is (sliding and cache.seen // size > left)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(outputs[0], layer(x, need_weights=False)[0].detach())
