"""The decoder: its model, its tokens, its windows, and the check against copying."""

# ruff: noqa: E402 (what cannot be imported is skipped first)

import math

import numpy as np
import pytest

for package in ("transformers", "accelerate", "tqdm"):
    pytest.importorskip(package)

import torch

from examples.chorales.copying import CopyCheck, chord_events, longest_common_passage, note_events
from examples.chorales.decoder import POSITIONS, MusicTransformer, MusicTransformerConfig
from examples.chorales.files import SILENT
from examples.chorales.languages import END, PAD, START, ChoraleLanguage
from examples.chorales.masking import IGNORED
from examples.chorales.passages import ScoredCollator, ScoredWindows, TrainingCollator, TrainingWindows, load_chorales

pytestmark = pytest.mark.xdist_group("chorales_decoder")

CLIP, TRAINED = 6, 16  # far below the lengths that are tried


@pytest.fixture(scope="module", params=POSITIONS)
def model(request):
    """A small model whose tables are large enough to matter."""
    torch.manual_seed(0)
    config = MusicTransformerConfig(
        vocab_size=40, positions=request.param, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_relative_position=CLIP, training_length=TRAINED,
    )  # fmt: skip
    model = MusicTransformer(config).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.project_in.weight.mul_(5)  # else all attention is nearly even, and nothing here could go wrong
            if layer.attention.rel_k is not None:
                layer.attention.rel_k.normal_(std=1)
    return model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 40, (2, 50), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_decoding_with_the_cache_equals_recomputation(model, tokens):
    """Beyond training length and clip, token by token and in chunks."""
    expected = model(tokens).logits
    for sizes in ([1] * 50, [20, 1, 1, 7, 1, 20]):
        cache, parts = None, []
        for part in tokens.split(sizes, dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_later_tokens_change_nothing(model, tokens):
    other = tokens.clone()
    other[:, 30:] = 3
    torch.testing.assert_close(model(other).logits[:, :30], model(tokens).logits[:, :30])
    assert not torch.allclose(model(other).logits[:, 30:], model(tokens).logits[:, 30:], atol=1e-2)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(model, tokens):
    """Also while decoding, where the cache holds the padding."""
    padded = torch.cat((torch.full((2, 9), PAD), tokens), dim=1)
    mask = (padded != PAD).long()
    expected = model(tokens).logits
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 9:], expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model(padded).logits[:, 9:], expected, atol=1e-2)  # without the mask it does
    first = model(padded[:, :20], attention_mask=mask[:, :20], use_cache=True)
    rest = model(padded[:, 20:], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, expected[:, 11:], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"attention_mask: expected \(2, 59\)"):
        model(padded, attention_mask=mask[:, 1:])


@pytest.mark.parametrize("drawing", [dict(top_k=3), dict(top_p=0.6), dict(temperature=0.5), dict(num_beams=3, do_sample=False)])
def test_generate_is_the_same_with_and_without_cache(model, tokens, drawing):
    lengths = [20, 31]  # primes of two lengths in one batch, padded on the left
    prime = torch.full((2, 31), PAD)
    for row, length in enumerate(lengths):
        prime[row, 31 - length :] = tokens[row, :length]
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        options = dict(do_sample=True, suppress_tokens=[PAD, END], use_cache=use_cache) | drawing
        drawn.append(model.generate(prime, attention_mask=(prime != PAD).long(), max_new_tokens=25, **options))
    assert drawn[0].shape == (2, 56)
    assert torch.equal(*drawn)
    assert torch.equal(drawn[0][:, :31], prime)


@torch.no_grad()
def test_top_k_and_top_p_draw_what_they_promise(model, tokens):
    prime = tokens[:1, :8]
    torch.manual_seed(0)
    drawn = model.generate(prime, do_sample=True, top_k=3, max_length=60, eos_token_id=None)
    logits = model(drawn).logits[:, 7:-1]
    rank = (logits > logits.gather(-1, drawn[:, 8:, None])).sum(-1)
    assert rank.max() == 2
    torch.manual_seed(0)
    drawn = model.generate(prime, do_sample=True, top_k=0, top_p=0.5, max_length=60, eos_token_id=None)
    probability = model(drawn).logits[:, 7:-1].softmax(-1)
    before = torch.where(probability > probability.gather(-1, drawn[:, 8:, None]), probability, 0).sum(-1)
    assert 0.2 < before.max() < 0.5  # the likelier tokens alone do not make half
    greedy = model.generate(prime, do_sample=False, max_length=60, eos_token_id=None)
    torch.manual_seed(0)
    assert torch.equal(model.generate(prime, do_sample=True, top_k=1, max_length=60, eos_token_id=None), greedy)


@torch.no_grad()
def test_beams_find_likelier_music_than_greed(model, tokens):
    def log_likelihood(ids):
        return model(ids).logits[:, 7:-1].log_softmax(-1).gather(-1, ids[:, 8:, None]).sum()

    options = dict(do_sample=False, max_length=20, eos_token_id=None, use_cache=True)
    greedy, beams = (model.generate(tokens[:1, :8], num_beams=beams, **options) for beams in (1, 8))
    assert log_likelihood(beams) >= log_likelihood(greedy)


def test_other_caches_are_refused(model, tokens):
    with pytest.raises(TypeError, match="past_key_values: expected a DynamicCache, got StaticCache"):
        model.generate(tokens[:, :8], max_new_tokens=3, cache_implementation="static")


@torch.no_grad()
def test_tables_are_read_by_distance_back(tokens):
    """A row of the table that outweighs the content draws all attention to its distance, and the first row to all beyond the clip."""
    config = MusicTransformerConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, max_relative_position=CLIP
    )
    model = MusicTransformer(config).eval()
    attention = model.layers[0].attention
    attention.project_in.weight.zero_()
    attention.project_in.bias.zero_()
    attention.project_in.bias[:32] = 1  # every query is the same
    attention.rel_k.zero_()
    attention.rel_k[0, CLIP - 3] = 10
    attention.rel_k[1, 0] = 10
    near, far = model(tokens[:1], output_attentions=True).attentions[0][0]
    assert (near[torch.arange(3, 50), torch.arange(47)] > 0.99).all()
    assert (far[20, : 21 - CLIP].sum() > 0.99).all()
    torch.testing.assert_close(far[20, : 21 - CLIP], torch.full((21 - CLIP,), 1 / (21 - CLIP)))
    assert (far.triu(1) == 0).all()


def test_loss_is_that_of_the_next_token(model, tokens):
    labels = tokens.clone()
    labels[:, :10] = IGNORED
    output = model(tokens, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, 9:-1].flatten(0, 1), tokens[:, 10:].flatten())
    torch.testing.assert_close(output.loss, expected)
    with pytest.raises(ValueError, match="logits_to_keep: expected 0 beside labels"):
        model(tokens, labels=labels, logits_to_keep=1)


def test_saved_in_half_precision_and_loaded(model, tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    half = MusicTransformer(model.config).half()
    half.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(loaded) is MusicTransformer
    assert loaded.head.weight is loaded.embedding.weight
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded.eval()(tokens).logits, half.float().eval()(tokens).logits)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(positions="rotary"), "positions: expected one of relative, absolute, both, got 'rotary'"),
        (dict(hidden_size=30), "width: expected a multiple of twice the 4 heads, got 30"),
        (dict(max_relative_position=0), "max-relative-position: expected at least 1, got 0"),
    ],
)
def test_impossible_models_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        MusicTransformerConfig(**setting)


# ---- tokens, windows, batches ----


def random_grid(length, seed=0):
    rng = np.random.default_rng(seed)
    grid = (np.array([72, 65, 58, 48]) + rng.integers(-4, 5, (length, 4))).astype(np.int16)
    grid[rng.random(grid.shape) < 0.05] = SILENT
    return grid


def test_chorale_tokens_and_back():
    language, grid = ChoraleLanguage(), random_grid(40)
    ids = language.encode(grid)
    assert ids.shape == (160,)
    assert ids[:4].tolist() == [3 if pitch == SILENT else pitch + 4 for pitch in grid[0].tolist()]
    np.testing.assert_array_equal(language.decode(ids), grid)
    framed = np.concatenate([[START], ids, [70, 60, END, PAD]])  # an unfinished step, which is dropped
    np.testing.assert_array_equal(language.decode(framed), grid)
    up = language.transposition(5)[ids]
    np.testing.assert_array_equal(language.decode(up), np.where(grid == SILENT, SILENT, grid + 5))
    assert (language.transposition(5) == -1).sum() == 5
    np.testing.assert_array_equal(language.transposition(0), np.arange(language.size))


@pytest.fixture(scope="module")
def music(small_json):
    return load_chorales(small_json)


@pytest.mark.parametrize("size", [32, 100, 4096])
def test_every_note_is_scored_once_from_enough_context(music, size):
    """Over all windows together the labels are the pieces' notes, and those of later windows have half a window before them."""
    windows = ScoredWindows(music.splits["test"], size, music.language.unit)
    collator = ScoredCollator(windows)
    found = []
    for index in range(len(windows)):
        batch = {name: tensor[0].numpy() for name, tensor in collator([(0, index)]).items()}
        scored = np.flatnonzero(batch["labels"] != IGNORED)
        found.append(batch["labels"][scored])
        assert batch["input_ids"][0] == START or len(scored) == 0 or scored[0] + 1 >= size // 2
        following = batch["input_ids"][1:]
        overlap = (batch["labels"][:-1] != IGNORED) & (following != PAD)
        np.testing.assert_array_equal(batch["labels"][:-1][overlap], following[overlap])  # the label is the next token
    ids = music.splits["test"].ids
    np.testing.assert_array_equal(np.concatenate(found), ids[ids > END])


def test_training_windows_cover_everything_and_keep_the_voices_phase(music):
    pieces = music.splits["train"]
    windows = TrainingWindows(pieces, 64, music.language.unit, seed=0)
    marked = type(pieces)(np.arange(len(pieces.ids)), pieces.bounds, pieces.names)  # ids that say where they come from
    windows.pieces = marked
    seen = np.zeros(len(pieces.ids), dtype=int)
    for epoch in range(30):
        for index in range(len(windows)):
            ids, _ = windows.cut(epoch, index)
            first, end = pieces.bounds[windows.piece[index] : windows.piece[index] + 2]
            assert first <= ids[0]
            assert ids[-1] < end
            assert (ids[0] - first) % 4 == 0
            assert len(ids) <= 65
            seen[ids] += 1
    assert seen.min() > 0
    again = windows.cut(7, 3)[0]
    np.testing.assert_array_equal(again, windows.cut(7, 3)[0])
    assert len({windows.cut(epoch, 3)[0][0] for epoch in range(30)}) > 5


def test_transpositions_move_all_voices_and_stay_within_the_training_set(music):
    windows = TrainingWindows(music.splits["train"], 64, music.language.unit, seed=0)
    collator = TrainingCollator(windows, music.language, transpose=6)
    shifts = set()
    known = set(music.splits["train"].ids.tolist())
    for epoch in range(20):
        for index in range(len(windows)):
            batch = collator([(epoch, index)])
            inputs, labels = batch["input_ids"][0].numpy(), batch["labels"][0].numpy()
            ids, _ = windows.cut(epoch, index)
            drawn = np.append(inputs[:1], labels)
            drawn = drawn[: len(ids)]
            notes = ids > 3
            moved = np.unique(drawn[notes] - ids[notes])
            assert len(moved) == 1
            np.testing.assert_array_equal(drawn[~notes], ids[~notes])
            assert set(drawn.tolist()) <= known
            shifts.add(int(moved[0]))
    assert shifts == set(range(-6, 7))
    plain = TrainingCollator(windows, music.language, transpose=0)([(0, 0)])
    np.testing.assert_array_equal(plain["input_ids"][0].numpy()[:20], windows.cut(0, 0)[0][:20])


# ---- copying ----


def test_planted_copy_is_found_in_another_key():
    train = [random_grid(80, seed) for seed in range(5)]
    sample = np.concatenate([random_grid(50, 10), train[3][20:61], random_grid(30, 11)])
    copied = sample[50:91]
    copied[copied != SILENT] += 4
    passage = longest_common_passage(chord_events([sample]), chord_events(train))
    assert (passage.events, passage.start, passage.piece, passage.piece_start, passage.semitones) == (41, 50, 3, 20, 4)
    sample[70, 2] += 1  # one note in the middle
    passage = longest_common_passage(chord_events([sample]), chord_events(train))
    assert (passage.events, passage.start) == (20, 50)


def test_copies_do_not_run_from_piece_to_piece():
    first, second = random_grid(30, 1), random_grid(30, 2)
    sample = np.concatenate([first[-12:], second[:17]])
    passage = longest_common_passage(chord_events([sample]), chord_events([first, second]))
    assert (passage.events, passage.start, passage.piece, passage.piece_start) == (17, 12, 1, 0)


def test_longest_common_passage_agrees_with_trying_everything():
    rng = np.random.default_rng(3)
    for _ in range(20):
        pieces = [rng.integers(60, 63, rng.integers(1, 40)) for _ in range(4)]
        sample = rng.integers(60, 63, 30)
        passage = longest_common_passage(note_events([sample]), note_events(pieces))
        longest = 0
        for piece in pieces:
            for start in range(len(sample)):
                for place in range(len(piece)):
                    size = 0
                    while (
                        start + size < len(sample)
                        and place + size < len(piece)
                        and sample[start + size] - sample[start] == piece[place + size] - piece[place]
                    ):
                        size += 1
                    longest = max(longest, size)
        assert passage.events == longest
        piece = pieces[passage.piece][passage.piece_start : passage.piece_start + longest]
        np.testing.assert_array_equal(sample[passage.start : passage.start + longest] - passage.semitones, piece)


def test_copy_check_of_generated_tokens(music):
    check = CopyCheck(music)
    train = music.splits["train"]
    report = check(np.concatenate([ChoraleLanguage().encode(random_grid(20, 5)), train[4][1 + 4 * 8 : 1 + 4 * 32], [END]]))
    passage = report["longest_common_passage"]
    assert report["unit"] == "16ths"
    assert report["generated"] == 44
    assert passage["events"] >= 24
    assert passage["piece"] == "train[4]"
    assert passage["piece_start"] == 8
    assert 0 < passage["changes"] < passage["events"]
    test = check.of_test_pieces(44)
    assert test["pieces"] == len(music.splits["test"])
    assert 1 <= test["median"] <= test["longest"] <= 44
    assert check(np.array([END]))["longest_common_passage"] is None


def test_committed_checkpoints_are_small_and_know_bach(classic_path):
    """Nats per note of the classic test set's first pieces, far below what copying the previous note can reach (about 1.3)."""
    from examples.chorales.generate import CHECKPOINT, load_model

    pieces = load_chorales(classic_path).splits["test"]
    few = type(pieces)(pieces.ids[: pieces.bounds[5]], pieces.bounds[:6], pieces.names[:5])
    for positions, bound in (("relative", 0.7), ("absolute", 1.2)):
        folder = CHECKPOINT.with_name(positions)
        assert sum(path.stat().st_size for path in folder.iterdir()) < 5e6
        model, language = load_model(folder)
        assert model.config.positions == positions
        collator = ScoredCollator(ScoredWindows(few, 512, language.unit))
        total = count = 0
        with torch.no_grad():
            for index in range(len(collator.windows)):
                batch = collator([(0, index)])
                logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                total += torch.nn.functional.cross_entropy(logits[0], batch["labels"][0], reduction="sum").item()
                count += int((batch["labels"] != IGNORED).sum())
        assert math.log(2) * 0.2 < total / count < bound
