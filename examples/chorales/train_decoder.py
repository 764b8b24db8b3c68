"""Trains Music Transformers (Huang et al. 2018) with relative attention, and with absolute positions beside them.

On Bach chorales (music21's corpus, or --data FILE), or on any folder of MIDI files (--midi DIR; MAESTRO's table of
splits is followed). Interrupted or killed, the same command continues where it was. Under torchrun several processes
share each batch, with --context-parallel each window, and with --tensor-parallel the heads of each layer. Results:
--out DIR/results.json, loss.png, and a model per kind of positions, for examples.chorales.generate.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from .command import finished_results, prepare_folder, prepare_process, quiet_transformers, require_packages, training_threads
from .decoder.settings import POSITIONS, PRECISIONS, PRESETS, DecoderSettings
from .reporting import aligned, draw_curves, environment, save_figure
from .storage import write_json
from .terminal import exit_code

# Music Transformer, Table 2: validation, nats per note token. From memory and secondary sources, not checked against
# the paper, and the chorales there come from another edition of the data.
PUBLISHED = {"absolute": 0.417, "relative": 0.357}


# Options that override the preset: field of DecoderSettings, type, help.
_OVERRIDES = (
    ("layers", int, "layers"),
    ("width", int, "width of the model"),
    ("heads", int, "attention heads"),
    ("feed_forward", int, "width of the feed-forward layers"),
    ("window", int, "tokens per training window; a chorale has 16 per beat"),
    ("max_relative_position", int, "distances beyond it share a row of the tables"),
    ("dropout", float, "dropout"),
    ("transpose", int, "transpose training windows by up to so many semitones, at random; 0: never"),
    ("epochs", float, "passes over the training pieces"),
    ("batch", int, "windows per micro-batch, over all processes"),
    ("accumulation", int, "micro-batches per optimizer step"),
    ("learning_rate", float, "peak learning rate"),
    ("warmup", int, "warm-up steps"),
    ("weight_decay", float, "AdamW's weight decay"),
    ("evaluations", int, "evaluations and checkpoints"),
    ("precision", str, "mixed precision of training: fp32 (none), bf16, fp16 (GPUs only)"),
    ("saved_precision", str, "of the model's files: fp32, bf16, fp16; the reported NLL is that of the rounded weights"),
    ("seed", int, "of weights, order, windows, transpositions and dropout"),
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.chorales.train_decoder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", metavar="FILE", help="classic chorales, JSON, npz or pickle (default: music21's corpus)")
    add("--midi", metavar="DIR", help="train on the MIDI files in a folder instead, MAESTRO's for instance")
    add("--preset", choices=PRESETS, default="small", help="default: small")
    some = "some of relative, absolute, both; default: relative,absolute; the report has those of earlier runs in --out, too"
    add("--positions", default="relative,absolute", help=some)
    add("--out", metavar="DIR", type=Path, help="default: runs/decoder-<preset>")
    add("--overwrite", action="store_true", help="delete what an earlier run left in --out, start anew")
    add("--workers", type=int, default=0, help="processes per process that prepare batches (default 0)")
    add("--context-parallel", type=int, default=1, metavar="P", help="processes that share each window, for long ones (default 1)")
    add("--tensor-parallel", type=int, default=1, metavar="T", help="processes that share the heads of each layer (default 1)")
    for field, kind, text in _OVERRIDES:
        choices = PRECISIONS if field.endswith("precision") else None
        add(f"--{field.replace('_', '-')}", dest=field, type=kind, choices=choices, help=text)
    options = parser.parse_args(arguments)
    options.out = options.out or Path("runs") / f"decoder-{options.preset}"
    options.positions = list(dict.fromkeys(options.positions.split(",")))
    for positions in options.positions:
        if positions not in POSITIONS:
            parser.error(f"--positions: expected some of {','.join(POSITIONS)}, got {positions!r}")
    if options.data and options.midi:
        parser.error(f"--midi {options.midi}: expected nothing beside --data {options.data}")
    overrides = {field: getattr(options, field) for field, _, _ in _OVERRIDES if getattr(options, field) is not None}
    try:
        options.settings = dataclasses.replace(PRESETS[options.preset], **overrides)
    except ValueError as error:
        parser.error(str(error))
    return options


def run(options: argparse.Namespace) -> dict:
    """Train the models, write the files; returns the content of results.json."""
    require_packages("the decoder needs", "music", "transformers", "accelerate", "matplotlib", "tqdm")
    import torch
    from accelerate import PartialState

    from .decoder.passages import load_music
    from .decoder.training import train_one

    quiet_transformers()
    settings: DecoderSettings = options.settings
    if settings.precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("--precision fp16: needs a GPU; bf16 also works on CPUs")
    state = PartialState(cpu=not torch.cuda.is_available())
    context, tensor = options.context_parallel, options.tensor_parallel
    if context < 1 or state.num_processes % context:
        raise ValueError(f"--context-parallel: expected a divisor of the {state.num_processes} processes, got {context}")
    if tensor < 1 or state.num_processes % (context * tensor):
        raise ValueError(
            f"--tensor-parallel: expected a divisor of the {state.num_processes} processes / {context} of each window, got {tensor}"
        )
    with state.main_process_first():  # the first process parses and caches, the others read the cache
        music = load_music(options.data, options.midi)
    config = {
        **settings.as_dict(),
        "language": music.language.name,
        "vocabulary": music.language.size,
        "pieces": {name: len(pieces) for name, pieces in music.splits.items()},
        "data_fingerprint": music.fingerprint(),
    }
    if state.is_main_process:
        prepare_folder(options.out, config, POSITIONS, options.overwrite)
    state.wait_for_everyone()
    for positions in options.positions:
        train_one(positions, music, settings, options.out / positions, state, options.workers, context, tensor)
    results = {}
    if state.is_main_process:
        results = {"models": finished_results(options.out, POSITIONS), "config": config, "environment": environment(state.num_processes)}
        if options.midi is not None:
            results["left_out"] = {"count": len(music.left_out), "files": music.left_out}
        if music.language.name == "chorale":
            results["published_unverified"] = PUBLISHED
        write_json(options.out / "results.json", results)
        plot_losses(options.out / "loss.png", results)
        print(f"\n{table(results)}")
        if options.midi is not None:
            print(f"Files left out, as they cannot be read faithfully: {len(music.left_out)} (results.json names them).")
        print(f"Written: {options.out}/results.json, loss.png, <positions>/model", flush=True)
    state.destroy_process_group()
    return results


def table(results: dict) -> str:
    """The models' nats per note token, the published ones beside them."""
    published = results.get("published_unverified", {})
    rows = [("", "valid NLL", "test NLL", "test accuracy", "parameters", "tokens/s", "published (valid, unverified)")]
    for positions, result in results["models"].items():
        speed = result["tokens_per_second"]
        rows.append(
            (
                positions,
                f"{result['valid']['nll']:.4f}",
                f"{result['test']['nll']:.4f}",
                f"{result['test']['accuracy']:.2%}",
                f"{result['parameters']:,}",
                "-" if speed is None else f"{speed:,.0f}",
                f"{published[positions]:.3f}" if positions in published else "-",
            )
        )
    tokens = results["models"][next(iter(results["models"]))]["test"]["tokens"]
    what = "note tokens (each voice, each 16th)" if published else "events"
    return "\n".join([*aligned(rows), "", f"NLL in nats, the mean over {tokens:,} {what} of the test set."])


def plot_losses(path: Path, results: dict) -> None:
    """Training (thin) and validation (thick) loss of every model over optimizer steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    draw_curves(axes, results["models"])
    axes.set(xlabel="optimizer step", ylabel="nats per token", xlim=(0, None))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_title("{language}, {layers} layers, window {window}".format(**results["config"]))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    save_figure(figure, path, dpi=130)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    prepare_process(training_threads(options.settings.batch * options.settings.window))
    return exit_code(lambda: run(options), "the same command continues from the last checkpoint")


if __name__ == "__main__":
    sys.exit(main())
