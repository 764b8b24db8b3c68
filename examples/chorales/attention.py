"""Pictures of what a chorale decoder attends to: absolute positions beside relative ones.

Writes --out DIR/attention-maps.png (weights of every layer and head on the beginning of a chorale),
attention-distance.png (mean weight against the distance looked back), table-norms.png (how long the learned vectors of
each distance are) and attention.json with the figures.

Distances are counted from the token that is predicted, which stands one behind the query: 4 tokens back its own voice
sang the 16th before, 16 tokens back the beat before.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .command import prepare_process, require_packages
from .data.files import VOICES
from .generate import CHECKPOINT, load_model
from .reporting import save_figure
from .storage import write_json
from .terminal import exit_code

_VOICES, _BEAT = len(VOICES), 4 * len(VOICES)
_SHOWN = 4 * _BEAT + 2  # distances in the picture of weights
_SHOWN_ROWS = 8 * _BEAT + 2  # and in that of the tables
_DPI = 80


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.chorales.attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    absolute = CHECKPOINT.with_name("absolute")
    add = parser.add_argument
    add("--absolute", metavar="DIR", type=Path, default=absolute, help="default: the committed checkpoint")
    add("--relative", metavar="DIR", type=Path, default=CHECKPOINT, help="default: the committed checkpoint")
    add("--data", metavar="FILE", help="classic chorales (default: music21's corpus)")
    add("--piece", type=int, default=0, help="of the test set, for the maps (default 0)")
    add("--tokens", type=int, default=96, help="of the piece, in the maps (default 96: six beats)")
    add("--pieces", type=int, default=20, help="of the test set, for the means (default 20)")
    add("--out", metavar="DIR", type=Path, default=Path("runs/attention"), help="default: runs/attention")
    options = parser.parse_args(arguments)
    for name, least in (("piece", 0), ("tokens", _BEAT), ("pieces", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(options, name)}")
    return options


def attention_weights(model, ids: np.ndarray) -> np.ndarray:
    """Weights (layers, heads, L, L) of one sequence of ids (L,): row i, column j is what query i gives to key j."""
    import torch

    with torch.no_grad():
        given = torch.from_numpy(ids.astype(np.int64))[None].to(model.device)
        output = model(input_ids=given, output_attentions=True)
    return torch.cat(output.attentions).float().cpu().numpy()


def weight_by_distance(model, pieces: list[np.ndarray], length: int) -> np.ndarray:
    """Mean weight (layers, heads, distances) at each distance from the predicted token, 1 to length / 2.

    Over the queries of the second half of each piece's first `length` tokens: all of them have keys at all these
    distances.
    """
    half = length // 2
    sums: Any = 0.0  # an array, once a piece is added
    queries = 0
    for ids in pieces:
        weights = attention_weights(model, ids[:length])
        rows = np.arange(half, weights.shape[-1])
        keys = rows[:, None] - np.arange(half)
        sums = sums + weights[:, :, rows[:, None], keys].sum(axis=2)
        queries += len(rows)
    return sums / queries


def shares(mean: np.ndarray) -> dict:
    """What part of the weight falls on the predicted voice (distances 4, 8, ...) and on whole beats (16, 32, ...), and
    what an even spread would give; of all heads together and of the head with the largest part; and the mean
    distance."""
    distance = np.arange(1, mean.shape[-1] + 1)
    found = {}
    for name, every in (("same_voice", _VOICES), ("whole_beats", _BEAT)):
        chosen = distance % every == 0
        by_head = mean[..., chosen].sum(axis=-1) / mean.sum(axis=-1)
        layer, head = np.unravel_index(by_head.argmax(), by_head.shape)
        found[name] = {
            "mean": float(by_head.mean()),
            "largest": float(by_head.max()),
            "largest_in": {"layer": int(layer) + 1, "head": int(head) + 1},
            "even_spread": float(chosen.mean()),
        }
    return found | {"mean_distance": float((mean * distance).sum(axis=-1).mean() / mean.sum(axis=-1).mean())}


def draw_maps(path: Path, maps: dict[str, np.ndarray], piece: str) -> None:
    """Every layer (rows) and head (columns) of each model; grey is what the causal mask hides."""
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    layers, heads, length, _ = next(iter(maps.values())).shape
    figure = Figure(figsize=(1.9 * heads * len(maps) + 1, 1.95 * layers + 0.8), layout="constrained")
    colours = colormaps["magma"].with_extremes(bad="#c8c8c8")
    hidden = np.triu(np.ones((length, length), dtype=bool), 1)
    every = 2 * _BEAT
    subfigures: Any = figure.subfigures(1, len(maps) + 1, wspace=0.02, width_ratios=[1] * len(maps) + [0.08])
    *panels, scale = subfigures
    for panel, (name, weights) in zip(panels, maps.items(), strict=True):
        panel.suptitle(f"{name} positions", fontweight="bold")
        grid = panel.subplots(layers, heads, sharex=True, sharey=True, squeeze=False)
        for layer in range(layers):
            for head in range(heads):
                axes = grid[layer, head]
                # The square root shows small weights too.
                shown = np.ma.array(weights[layer, head], mask=hidden)
                image = axes.imshow(shown, cmap=colours, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
                axes.set_xticks(range(0, length, every))
                axes.set_yticks(range(0, length, every))
                axes.tick_params(labelsize=6, length=2)
                axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=7, pad=2)
        grid[-1, 0].set_xlabel("key token", fontsize=7)
        grid[-1, 0].set_ylabel("query token", fontsize=7)
    bar = figure.colorbar(image, cax=scale.add_axes((0.05, 0.3, 0.25, 0.4)))
    bar.set_label("attention weight", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(f"Attention on the first {length} tokens of {piece}; grey: hidden by the causal mask", fontsize=10)
    save_figure(figure, path, _DPI)


def draw_distances(path: Path, means: dict[str, np.ndarray]) -> None:
    """Mean weight against distance from the predicted token, a row per layer, heads averaged."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    layers = next(iter(means.values())).shape[0]
    figure = Figure(figsize=(11, 1.6 * layers + 1), layout="constrained")
    grid = figure.subplots(layers, len(means), sharex=True, sharey="row", squeeze=False)
    distance = np.arange(1, min(_SHOWN, next(iter(means.values())).shape[-1]) + 1)
    kinds = {"same voice, whole beats back": "#d62728", "same voice": "#1f77b4", "other voices": "#c5c5c5"}
    beat, same, other = kinds.values()
    colours = [beat if back % _BEAT == 0 else same if back % _VOICES == 0 else other for back in distance]
    for column, (name, mean) in enumerate(means.items()):
        for layer in range(layers):
            axes = grid[layer, column]
            axes.bar(distance, mean[layer].mean(axis=0)[: len(distance)], color=colours, width=0.85)
            axes.set_yscale("log")
            axes.set_ylim(3e-4, 1)
            axes.grid(axis="y", alpha=0.3)
            axes.set_xticks(range(_BEAT, len(distance), _BEAT))
            axes.set_xticks(range(_VOICES, len(distance), _VOICES), minor=True)
            if not column:
                axes.set_ylabel(f"layer {layer + 1}\nmean weight", fontsize=8)
        grid[0, column].set_title(f"{name} positions", fontweight="bold", fontsize=10)
        text = "tokens back from the predicted one (4: its voice a 16th ago; 16: a beat ago)"
        grid[-1, column].set_xlabel(text, fontsize=9)
    handles = [Patch(color=colour, label=kind) for kind, colour in kinds.items()]
    figure.legend(handles=handles, fontsize="small", ncols=3, loc="outside lower center", frameon=False)
    save_figure(figure, path, _DPI)


def draw_norms(path: Path, norms: np.ndarray) -> None:
    """Lengths of the table's vectors (layers, heads, distances from the predicted token), a panel per layer."""
    from matplotlib.figure import Figure

    layers, heads, rows = norms.shape
    figure = Figure(figsize=(11, 1.6 * layers + 0.8), layout="constrained")
    grid = figure.subplots(layers, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    distance = np.arange(1, min(_SHOWN_ROWS, rows) + 1)
    for layer, axes in enumerate(grid):
        for back in range(_VOICES, len(distance) + 1, _VOICES):
            axes.axvline(back, color="black", linewidth=0.6, alpha=0.45 if back % _BEAT == 0 else 0.1)
        for head in range(heads):
            lengths = norms[layer, head, : len(distance)]
            axes.plot(distance, lengths, linewidth=1.2, marker=".", markersize=3, label=f"head {head + 1}")
        axes.set_ylabel(f"layer {layer + 1}\nlength of row", fontsize=8)
        axes.set_xlim(0, len(distance) + 1)
        axes.set_ylim(0, 1.05 * norms[..., : len(distance)].max())
    grid[0].set_xticks(range(0, len(distance), _BEAT))
    grid[0].legend(fontsize="small", ncols=heads, loc="upper right")
    grid[-1].set_xlabel("tokens back from the predicted one (lines: its own voice, strong ones whole beats ago)")
    grid[0].set_title("Learned relative tables: length of each distance's vector", fontsize=10)
    save_figure(figure, path, _DPI)


def run(options: argparse.Namespace) -> dict:
    """Draw and write; returns the content of attention.json."""
    require_packages("the pictures need", "music", "transformers", "matplotlib")
    from .decoder.passages import load_chorales

    models = {}
    for name in ("absolute", "relative"):
        folder = getattr(options, name)
        try:
            models[name], language = load_model(folder)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(str(error).replace("--checkpoint", f"--{name}")) from error
        if language.name != "chorale":
            raise ValueError(f"--{name} {folder}: expected a model of chorales, got one of {language.name}")
    layers: Any = models["relative"].layers
    if layers[0].attention.rel_k is None:
        raise ValueError(f"--relative {options.relative}: expected a model with relative positions, got absolute ones")
    test = load_chorales(options.data).splits["test"]
    if options.piece >= len(test):
        raise ValueError(f"--piece: expected 0 to {len(test) - 1}, got {options.piece}")
    length = min(model.config.training_length for model in models.values())
    long_enough = [test[index] for index in range(len(test)) if len(test[index]) >= length][: options.pieces]
    if not long_enough:
        raise ValueError(
            f"--data {options.data}: expected test pieces of at least {length} tokens, the training length"
        )
    maps = {name: attention_weights(model, test[options.piece][: options.tokens]) for name, model in models.items()}
    means = {name: weight_by_distance(model, long_enough, length) for name, model in models.items()}
    tables = np.stack([layer.attention.rel_k.detach().float().cpu().numpy() for layer in layers])
    norms = np.linalg.norm(tables[:, :, ::-1], axis=-1)  # (layers, heads, distances): the last row is the query's own
    draw_maps(options.out / "attention-maps.png", maps, test.names[options.piece])
    draw_distances(options.out / "attention-distance.png", means)
    draw_norms(options.out / "table-norms.png", norms)
    result = {
        "piece": test.names[options.piece],
        "pieces": len(long_enough),
        "training_length": length,
        "shares": {name: shares(mean) for name, mean in means.items()},
        "weight_by_distance": {name: mean.round(6).tolist() for name, mean in means.items()},
        "table_norms": norms.round(5).tolist(),
    }
    write_json(options.out / "attention.json", result)
    for name, share in result["shares"].items():
        parts = [
            f"{share[kind]['mean']:.0%} of the weight on {text} (even spread {share[kind]['even_spread']:.0%}, "
            f"largest of a head {share[kind]['largest']:.0%})"
            for kind, text in (("same_voice", "the same voice"), ("whole_beats", "whole beats"))
        ]
        print(f"{name}: {'; '.join(parts)}; mean distance {share['mean_distance']:.0f} tokens")
    print(f"Written: {options.out}/attention-maps.png, attention-distance.png, table-norms.png, attention.json")
    return result


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    prepare_process()
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
