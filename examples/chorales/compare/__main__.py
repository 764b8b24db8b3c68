"""Absolute against relative attention, against both, on Bach chorales: BERT predicts masked notes.

Interrupted or killed, the same command continues where it was; arms that are finished are not trained again. Under
torchrun several processes share each batch. Results: --out DIR/results.json, loss.png and config.json.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from ..command import finished_results, prepare_folder, prepare_process, quiet_transformers, require_packages, training_threads
from ..terminal import exit_code
from .masking import MODES, VOICES_MODE
from .model import ARMS, NOTEBOOK_POSITIONS
from .settings import PRESETS, Settings

# Options that override the preset: flag, field of Settings, type, help.
_OVERRIDES = (
    ("--window", "window", int, "tokens per window; beyond 128 the model gets more positions and parameters"),
    ("--stride", "stride", int, "tokens between the starts of windows"),
    (
        "--masking",
        "masking",
        str,
        "hidden together: token, time (four tokens), step (a time step of the music), span (a voice); or voices: any share "
        "of the three lower ones",
    ),
    ("--epochs", "epochs", float, "passes over the training windows"),
    ("--batch", "batch", int, "windows per micro-batch, over all processes"),
    ("--accumulation", "accumulation", int, "micro-batches per optimizer step"),
    ("--learning-rate", "learning_rate", float, "peak learning rate"),
    ("--warmup", "warmup", int, "warm-up steps"),
    ("--weight-decay", "weight_decay", float, "AdamW's weight decay"),
    ("--evaluations", "evaluations", int, "evaluations and checkpoints per arm"),
    ("--train-windows", "train_windows", int, "use at most so many training windows"),
    ("--valid-windows", "valid_windows", int, "use at most so many validation windows"),
    ("--test-windows", "test_windows", int, "use at most so many test windows"),
    ("--max-relative-position", "max_relative_position", int, "clip of relative distances (default: window - 1)"),
    ("--layers", "layers", int, "layers of the model (default 2)"),
    ("--dropout", "dropout", float, "of hidden states and attention weights (default 0.1)"),
    ("--transpose", "transpose", int, "transpose training windows by up to so many semitones, at random (default 0)"),
    ("--seed", "seed", int, "of weights, order, dropout and training masks"),
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.chorales.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", metavar="PATH", help="classic JSON, npz or pickle file (default: music21's corpus)")
    add("--preset", choices=PRESETS, default="quick", help="default: quick")
    add("--arms", default=",".join(ARMS), help=f"default: {','.join(ARMS)}; the report has those of earlier runs in --out, too")
    add("--out", metavar="DIR", type=Path, help="default: runs/chorales-<preset>")
    add("--overwrite", action="store_true", help="delete what an earlier run left in --out, start anew")
    add("--workers", type=int, default=0, help="processes per process that prepare batches (default 0)")
    for flag, field, kind, text in _OVERRIDES:
        choices = MODES if field == "masking" else None
        add(flag, dest=field, type=kind, choices=choices, help=text)
    options = parser.parse_args(arguments)
    options.out = options.out or Path("runs") / f"chorales-{options.preset}"
    options.arms = list(dict.fromkeys(options.arms.split(",")))
    for arm in options.arms:
        if arm not in ARMS:
            parser.error(f"--arms: expected some of {','.join(ARMS)}, got {arm!r}")
    overrides = {field: getattr(options, field) for _, field, _, _ in _OVERRIDES if getattr(options, field) is not None}
    try:
        preset = PRESETS[options.preset]
        if "window" in overrides:  # the preset's clip belongs to the preset's window
            preset = dataclasses.replace(preset, window=overrides["window"], max_relative_position=None)
        options.settings = dataclasses.replace(preset, **overrides)
    except ValueError as error:
        parser.error(str(error))
    return options


def run(options: argparse.Namespace) -> dict:
    """Train the arms, score the baseline, write the files; returns the content of results.json."""
    require_packages("the comparison needs", "chorales", "transformers", "accelerate", "matplotlib", "tqdm")
    import numpy as np
    import torch
    from accelerate import PartialState

    from ..data.tokens import Chorales
    from ..reporting import environment
    from .baseline import score_baseline
    from .report import table, write_results
    from .training import cut_windows, evaluation_collators, run_arm

    quiet_transformers()
    settings: Settings = options.settings
    state = PartialState(cpu=not torch.cuda.is_available())
    with state.main_process_first():  # the first process parses and caches, the others read the cache
        chorales = Chorales.load(options.data, whole_steps=settings.masking == VOICES_MODE)
    if settings.transpose and np.any(np.diff(chorales.vocabulary.pitches) != 1):
        raise ValueError("--transpose: expected 0, as the training set lacks pitches between its lowest and its highest")
    config = {
        **settings.as_dict(),
        "vocabulary": len(chorales.vocabulary),
        "data": "file" if options.data else "music21",
        "data_fingerprint": chorales.fingerprint(),
    }
    if state.is_main_process:
        prepare_folder(options.out, config, ARMS, options.overwrite)
        if settings.window > NOTEBOOK_POSITIONS:
            print(f"window {settings.window} exceeds {NOTEBOOK_POSITIONS}: positions raised to {settings.window}")
    state.wait_for_everyone()
    windows = cut_windows(chorales, settings)
    for arm in options.arms:
        run_arm(arm, chorales, windows, settings, options.out / arm, state, options.workers)
    if not state.is_main_process:
        state.destroy_process_group()
        return {}
    collators = evaluation_collators(windows, settings, len(chorales.vocabulary))
    baseline = {
        name: score_baseline(collator, chorales.tokens["train"], chorales.vocabulary)
        for name, collator in collators.items()
    }
    results = {
        "arms": finished_results(options.out, ARMS),
        "baseline": baseline,
        "config": config,
        "windows": {name: len(split) for name, split in windows.items()},
        "environment": environment(state.num_processes),
    }
    write_results(options.out, results)
    print(f"\n{table(results)}\nWritten: {options.out}/results.json, loss.png, config.json", flush=True)
    state.destroy_process_group()
    return results


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    prepare_process(training_threads(options.settings.batch * options.settings.window))
    return exit_code(lambda: run(options), "the same command continues from the last checkpoint")


if __name__ == "__main__":
    sys.exit(main())
