"""Trains Music Transformers (Huang et al. 2018) with relative attention, and with absolute positions beside them.

On Bach chorales (music21's corpus, or --data FILE), or on any folder of MIDI files (--midi DIR; MAESTRO's table of splits
is followed). Interrupted or killed, the same command continues where it was. Under torchrun several processes share each
batch. Results: --out DIR/results.json, loss.png, and a model per kind of positions, for examples.chorales.generate.
"""

import argparse
import dataclasses
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .compare import prepare_folder, prepare_process
from .settings import Settings
from .storage import atomic_write, read_json, write_json
from .terminal import exit_code

POSITIONS = ("relative", "absolute", "both")
PRECISIONS = ("fp32", "bf16", "fp16")

# Music Transformer, Table 2: validation, nats per note token. From memory and secondary sources, not checked against
# the paper, and the chorales there come from another edition of the data.
PUBLISHED = {"absolute": 0.417, "relative": 0.357}


@dataclass(frozen=True)
class DecoderSettings:
    """Settings of one training, the same for every kind of positions.

    Sizes are those of `decoder.MusicTransformerConfig`; window is counted in tokens, four per 16th of a chorale;
    transpose is the largest transposition in training, in semitones; batch is the number of windows per micro-batch over
    all processes; evaluations is the number of validations and checkpoints.
    """

    layers: int
    width: int
    heads: int
    feed_forward: int
    window: int
    max_relative_position: int
    dropout: float = 0.1
    transpose: int = 6
    epochs: float = 100.0
    batch: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.01
    evaluations: int = 10
    precision: str = "fp32"
    saved_precision: str = "fp32"
    seed: int = 0

    def __post_init__(self):
        for name in ("layers", "width", "heads", "feed_forward", "max_relative_position", "batch", "accumulation", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.window < 8:
            raise ValueError(f"window: expected at least 8 tokens, got {self.window}")
        for name in ("epochs", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if not 0 <= self.transpose <= 127:
            raise ValueError(f"transpose: expected 0 to 127 semitones, got {self.transpose}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected at least 0 and less than 1, got {self.dropout}")
        for name in ("precision", "saved_precision"):
            if getattr(self, name) not in PRECISIONS:
                raise ValueError(f"{name}: expected one of {', '.join(PRECISIONS)}, got {getattr(self, name)!r}")

    update_steps = Settings.update_steps

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


PRESETS = {
    # The committed checkpoints: 20 minutes on one core for each kind of positions.
    "small": DecoderSettings(
        layers=4, width=128, heads=4, feed_forward=512, window=512, max_relative_position=256,
        epochs=32, batch=4, learning_rate=2e-3, warmup=300, evaluations=8, saved_precision="fp16",
    ),
    # Six layers, for a GPU.
    "paper": DecoderSettings(
        layers=6, width=512, heads=8, feed_forward=1024, window=2048, max_relative_position=1024,
        epochs=300, batch=8, learning_rate=5e-4, warmup=1000, evaluations=30, precision="bf16", dropout=0.2,
    ),
    # Proves that everything runs, in half a minute.
    "tiny": DecoderSettings(
        layers=2, width=32, heads=2, feed_forward=64, window=128, max_relative_position=64,
        epochs=1, batch=16, learning_rate=3e-3, warmup=10, evaluations=3,
    ),
}  # fmt: skip

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
    parser.add_argument("--data", metavar="FILE", help="classic chorales, JSON, npz or pickle (default: music21's corpus)")
    parser.add_argument("--midi", metavar="DIR", help="train on the MIDI files in a folder instead, MAESTRO's for instance")
    parser.add_argument("--preset", choices=PRESETS, default="small", help="default: small")
    parser.add_argument("--positions", default="relative,absolute", help="some of relative, absolute, both; default: relative,absolute")
    parser.add_argument("--out", metavar="DIR", type=Path, help="default: runs/decoder-<preset>")
    parser.add_argument("--overwrite", action="store_true", help="delete what an earlier run left in --out, start anew")
    parser.add_argument("--workers", type=int, default=0, help="processes per process that prepare batches (default 0)")
    for field, kind, text in _OVERRIDES:
        choices = PRECISIONS if field.endswith("precision") else None
        parser.add_argument(f"--{field.replace('_', '-')}", dest=field, type=kind, choices=choices, help=text)
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


def require_packages() -> None:
    missing = [name for name in ("transformers", "accelerate", "matplotlib", "tqdm") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f'the decoder needs {", ".join(missing)}: pip install "relattn[music]"')


def build_model(positions: str, settings: DecoderSettings, music):
    """A new model; equal seeds start all kinds of positions from the same weights where they share them."""
    import torch

    from .decoder import MusicTransformer, MusicTransformerConfig

    torch.manual_seed(settings.seed)
    config = MusicTransformerConfig(
        vocab_size=music.language.size,
        positions=positions,
        language=music.language.name,
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=settings.feed_forward,
        max_relative_position=settings.max_relative_position,
        training_length=settings.window,
        dropout=settings.dropout,
    )
    return MusicTransformer(config)


def train_one(positions: str, music, settings: DecoderSettings, folder: Path, state, workers: int = 0) -> dict:
    """Train and test one model in `folder`, or continue, or return the result that is already there.

    `folder` gets the checkpoints while training, then `model/` (the one with the best validation loss) and `result.json`.
    """
    import torch

    from . import training
    from .model import parameter_count
    from .passages import ScoredCollator, ScoredWindows, TrainingCollator, TrainingWindows

    finished = folder / "result.json"
    if finished.is_file():
        return read_json(finished)
    unit, checkpoints = music.language.unit, folder / "checkpoints"
    windows = TrainingWindows(music.splits["train"], settings.window, unit, settings.seed)
    scored = {name: ScoredCollator(ScoredWindows(music.splits[name], settings.window, unit)) for name in ("valid", "test")}
    model = build_model(positions, settings, music)
    parameters = parameter_count(model)
    if state.is_main_process:
        print(f"{positions}: {parameters:,} parameters", flush=True)
    clock = training.Clock()
    precision = {"bf16": settings.precision == "bf16", "fp16": settings.precision == "fp16"}
    trainer = training.ChoraleTrainer(
        model=model,
        args=training.training_arguments(settings, checkpoints, len(windows), state.num_processes, workers, **precision),
        train_dataset=windows,
        eval_dataset=scored["valid"].windows,
        data_collator=TrainingCollator(windows, music.language, settings.transpose),
        callbacks=[training.EpochSetter(windows), clock, training.Progress(positions)],
        evaluation=scored,
    )
    training.train_on(trainer, checkpoints, state, positions)
    saved_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.saved_precision]
    # What is scored is what is saved: rounded as the file, and not under autocast.
    trainer.model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trainer.model.to(saved_dtype).float()
    tokens = trainer.accelerator.reduce(torch.as_tensor(trainer.tokens_seen, device=trainer.args.device), "sum")
    result = {
        "positions": positions,
        "parameters": parameters,
        **{name: _score(trainer, scored[name]) for name in ("valid", "test")},
        **training._history(trainer.state),
        "train_seconds": round(clock.seconds, 3),
        # Of this process only: a run continued after a kill does not know how fast the killed one was.
        "tokens_per_second": round(int(tokens) / clock.seconds, 1) if clock.seconds else None,
    }
    if state.is_main_process:
        trainer.model.to(saved_dtype).save_pretrained(folder / "model")
        music.language.save(folder / "model")
        write_json(finished, result)
        shutil.rmtree(checkpoints, ignore_errors=True)
    state.wait_for_everyone()
    return result


def _score(trainer, collator) -> dict:
    """Nats per note token (per event of a MIDI performance), and the share that is predicted right."""
    score = trainer.score(collator)
    return {"nll": score["loss"], "accuracy": score["accuracy"], "tokens": score["masked_tokens"]}


def run(options: argparse.Namespace) -> dict:
    """Train the models, write the files; returns the content of results.json."""
    require_packages()
    import torch
    import transformers
    from accelerate import PartialState

    from .passages import load_music
    from .report import environment

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings: DecoderSettings = options.settings
    if settings.precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("--precision fp16: needs a GPU; bf16 also works on CPUs")
    state = PartialState(cpu=not torch.cuda.is_available())
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
        prepare_folder(options.out, config, options.overwrite)
    state.wait_for_everyone()
    models = {}
    for positions in options.positions:
        models[positions] = train_one(positions, music, settings, options.out / positions, state, options.workers)
    results = {}
    if state.is_main_process:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        results = {"models": models, "config": config, "environment": environment(state.num_processes, device)}
        if music.language.name == "chorale":
            results["published_unverified"] = PUBLISHED
        write_json(options.out / "results.json", results)
        plot_losses(options.out / "loss.png", results)
        print(f"\n{table(results)}\nWritten: {options.out}/results.json, loss.png, <positions>/model", flush=True)
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
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))]).rstrip()
        for name, *cells in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    tokens = results["models"][next(iter(results["models"]))]["test"]["tokens"]
    what = "note tokens (each voice, each 16th)" if published else "events"
    return "\n".join([*lines, "", f"NLL in nats, the mean over {tokens:,} {what} of the test set."])


def plot_losses(path: Path, results: dict) -> None:
    """Training (thin) and validation (thick) loss of every model over optimizer steps."""
    from matplotlib.figure import Figure

    from .report import _COLOURS, _points, _smooth

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for positions, result in results["models"].items():
        colour = _COLOURS[positions]
        axes.plot(*_points(_smooth(result["training"])), color=colour, linewidth=0.9, alpha=0.55, label=f"{positions}, train")
        axes.plot(*_points(result["validation"]), color=colour, linewidth=2.2, marker="o", label=f"{positions}, valid")
    axes.set(xlabel="optimizer step", ylabel="nats per token", xlim=(0, None))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_title("{language}, {layers} layers, window {window}".format(**results["config"]))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=130)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    prepare_process(options.settings)
    return exit_code(lambda: run(options), "the same command continues from the last checkpoint")


if __name__ == "__main__":
    sys.exit(main())
