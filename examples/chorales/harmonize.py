"""Alto, tenor and bass for a melody, by the masked language model of the comparison: MIDI, MusicXML, sound, a piano roll.

--melody takes a MIDI or MusicXML file (its highest notes, on a grid of 16ths), or the soprano of a piece of the data (test:3);
then Bach's own voices are compared with. Writes --out DIR/harmony-<n>.mid, .musicxml, .wav, .png and harmonized.json.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .command import prepare_process, quiet_transformers, require_packages
from .compare.masking import VOICES_MODE
from .data.files import SILENT, SPLITS, VOICES, Splits
from .storage import read_json, write_json, write_part
from .terminal import exit_code, printable, progress_bar

if TYPE_CHECKING:
    from .compare.gibbs import Annealing

CHECKPOINT = Path(__file__).with_name("checkpoint") / "harmonize"
SOPRANO = (60, 81)  # what sopranos sing in the training set: C4 to A5


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    from .compare.gibbs import Annealing

    usual = Annealing()
    parser = argparse.ArgumentParser(
        prog="python -m examples.chorales.harmonize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--melody", metavar="PIECE", default="test:3", help="a .mid, .xml, .musicxml or .mxl file, or test:3 (default), valid:0, ...")
    add("--evaluate", metavar="N", type=int, help="instead: harmonize N pieces of the test set, and compare them all with Bach's")
    add("--readme", metavar="FILE", type=Path, help="with --evaluate: write the table into this file, between <!-- harmonize --> marks")
    add("--checkpoint", metavar="DIR", type=Path, default=CHECKPOINT, help="a both/model folder of compare --preset harmonize")
    add("--out", metavar="DIR", type=Path, default=Path("runs/harmonized"), help="default: runs/harmonized")
    add("--samples", type=int, default=1, help="how many (default 1)")
    add("--steps", type=int, default=usual.steps, help=f"of Gibbs sampling (default {usual.steps})")
    add("--temperature", type=float, default=usual.cold, help=f"at the end; it begins with {usual.hot:g} (default {usual.cold:g})")
    add("--seed", type=int, default=0, help="default 0")
    add("--bpm", type=float, default=80, help="beats per minute (default 80)")
    add("--soundfont", metavar="FILE", help=".sf2 for fluidsynth; default: the system's, else pretty_midi's")
    add("--data", metavar="FILE", help="classic chorales, for test:3 and the like (default: music21's corpus)")
    options = parser.parse_args(arguments)
    for name in ("samples", "evaluate"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if options.readme and not options.evaluate:
        parser.error(f"--readme {options.readme}: expected --evaluate N beside it")
    if not 20 <= options.bpm <= 400:
        parser.error(f"--bpm: expected 20 to 400, got {options.bpm:g}")
    if not 0 < options.temperature <= usual.hot:
        parser.error(f"--temperature: expected more than 0 and at most {usual.hot:g}, got {options.temperature:g}")
    try:
        options.annealing = Annealing(steps=options.steps, cold=options.temperature)
    except ValueError as error:
        parser.error(f"--{error}")
    return options


def load_model(folder: Path):
    """The masked language model in float32 and eval mode.

    Raises:
        FileNotFoundError: there is no model in `folder`.
        ValueError: it was not trained on hidden lower voices of chorales, or by an older version.
    """
    import torch

    from relattn.huggingface import from_pretrained

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"--checkpoint {folder}: no config.json there; compare writes <out>/both/model")
    masking = read_json(folder / "config.json").get("masking")
    if masking != VOICES_MODE:
        raise ValueError(f"--checkpoint {folder}: expected a model of compare --preset harmonize; its config.json has masking {masking!r}")
    quiet_transformers()
    model = from_pretrained(folder, dtype=torch.float32).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def into_range(melody: np.ndarray) -> int:
    """Semitones by which a melody must be transposed so that a soprano can sing it: 0, else octaves, else the fewest.

    Raises:
        ValueError: it has a wider range than sopranos.
    """
    sung = melody[melody != SILENT]
    low, high = int(sung.min()), int(sung.max())
    fitting = [shift for shift in range(-127, 128) if SOPRANO[0] <= low + shift and high + shift <= SOPRANO[1]]
    if not fitting:
        raise ValueError(
            f"--melody: expected a range of at most {SOPRANO[1] - SOPRANO[0]} semitones, as sopranos have, got {high - low} "
            f"(MIDI pitches {low} to {high})"
        )
    return min(fitting, key=lambda shift: (shift != 0, shift % 12 != 0, abs(shift)))


def lower_voices(model, melody: np.ndarray, samples: int, annealing: "Annealing", seed: int, title: str) -> np.ndarray:
    """Grids (samples, T, 4) whose first voice is `melody`, (T,). Where it rests, all rest; the model reads the note before on."""
    from .compare.gibbs import harmonize

    sounds = melody != SILENT
    last = np.maximum.accumulate(np.where(sounds, np.arange(len(melody)), sounds.argmax()))
    with progress_bar(total=annealing.steps, desc=title, leave=False) as bar:
        grids = harmonize(model, melody[last], samples, annealing, seed, bar.update)
    grids[:, ~sounds] = SILENT
    return grids


def agreement(grid: np.ndarray, bach: np.ndarray) -> dict[str, tuple[int, int]]:
    """(16ths with Bach's pitch, 16ths) of each lower voice, where Bach's sounds and the melody does."""
    where = (bach != SILENT) & (bach[:, :1] != SILENT)
    return {
        name: (int((grid == bach)[:, voice][where[:, voice]].sum()), int(where[:, voice].sum()))
        for voice, name in enumerate(VOICES)
        if voice > 0
    }


def _percentages(agreed: dict[str, tuple[int, int]]) -> str:
    return ", ".join(f"{name} {right / max(1, count):.0%}" for name, (right, count) in agreed.items())


def load_pieces(data: str | None) -> Splits:
    """The chorales as grids."""
    from .data.corpus import load_corpus
    from .data.files import load_file

    return load_file(data) if data else load_corpus()


def find_melody(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray | None, str]:
    """The melody (T,), Bach's own setting (T, 4) if it is one of the data's pieces, and its name."""
    from .decoder.scores import read_melody

    split, _, index = options.melody.partition(":")
    if split in SPLITS and index.isdecimal():
        pieces = load_pieces(options.data)[split]
        if int(index) >= len(pieces):
            raise ValueError(f"--melody {options.melody}: expected {split}:0 to {split}:{len(pieces) - 1}")
        bach = pieces[int(index)]
        if not (bach[:, 0] != SILENT).any():
            raise ValueError(f"--melody {options.melody}: its soprano rests all the time")
        return bach[:, 0], bach, options.melody
    try:
        return read_melody(options.melody), None, printable(Path(options.melody).name)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"--melody {error}; or a piece of the data, such as test:3") from error


def write_harmony(grid: np.ndarray, options: argparse.Namespace, name: str, title: str) -> dict:
    """Files of one sample: .mid, .musicxml, .png and .wav; returns what to record."""
    from .decoder import scores, sound

    path = options.out / name
    midi = sound.chorale_midi(grid, options.bpm)
    sound.write_midi(path.with_suffix(".mid"), midi)
    scores.write_musicxml(path.with_suffix(".musicxml"), grid, title)
    sound.draw_piano_roll(path.with_suffix(".png"), midi, title)
    played = sound.write_sound(path.with_suffix(".wav"), midi, path.with_suffix(".mid"), options.soundfont)
    return {"files": [f"{name}{suffix}" for suffix in (".mid", ".musicxml", ".png", ".wav")], "sound": played}


def evaluate(model, options: argparse.Namespace) -> dict:
    """Harmonize pieces of the test set, spread evenly; agreement and measures, Bach's beside the model's."""
    from .decoder import measures

    pieces = load_pieces(options.data)["test"]
    chosen = np.unique(np.linspace(0, len(pieces) - 1, min(options.evaluate, len(pieces))).round().astype(int)).tolist()
    agreed: dict[str, tuple[int, int]] = dict.fromkeys(VOICES[1:], (0, 0))
    written = []
    for index in chosen:
        bach = pieces[index]
        grid = lower_voices(model, bach[:, 0], 1, options.annealing, options.seed, f"test:{index}")[0]
        written.append(grid)
        now = agreement(grid, bach)
        agreed = {name: (right + now[name][0], count + now[name][1]) for name, (right, count) in agreed.items()}
        print(f"test:{index}: as Bach's: {_percentages(now)}", flush=True)
    counts = {"harmonized": measures.total(written), "Bach's": measures.total(pieces[index] for index in chosen)}
    summary = f"As Bach's, {len(chosen)} pieces: {_percentages(agreed)}"
    print(f"\n{summary}\n\n{measures.describe(counts)}")
    if options.readme:
        write_part(options.readme, "harmonize", f"{summary}.\n\n{measures.markdown(counts)}")
    return {"pieces": chosen, "agreement": agreed, "measures": counts}


def harmonize_one(model, options: argparse.Namespace) -> dict:
    """Harmonize --melody and write the files."""
    from .decoder import measures

    melody, bach, name = find_melody(options)
    shift = into_range(melody)
    if shift:
        print(f"{name}: transposed by {shift:+d} semitones, into the range of a soprano")
        melody = np.where(melody == SILENT, SILENT, melody + shift).astype(np.int16)
        bach = None if bach is None else np.where(bach == SILENT, SILENT, bach + shift).astype(np.int16)
    grids = lower_voices(model, melody, options.samples, options.annealing, options.seed, "harmonizing")
    samples = []
    for index, grid in enumerate(grids):
        sample = write_harmony(grid, options, f"harmony-{index}", f"{name}, harmonized, seed {options.seed}")
        line = f"{options.out / sample['files'][0]}: {len(grid) / 4:g} quarters; sound by {sample['sound']}"
        if bach is not None:
            sample["agreement"] = agreement(grid, bach)
            line += f"; as Bach's: {_percentages(sample['agreement'])}"
        samples.append(sample)
        print(line, flush=True)
    counts = {"harmonized": measures.total(grids)}
    if bach is not None:
        counts |= {"Bach's": measures.count(bach)}
    print(f"\n{measures.describe(counts)}")
    return {"melody": name, "transposed": shift, "samples": samples, "measures": counts}


def run(options: argparse.Namespace) -> dict:
    """Harmonize and write; returns the content of harmonized.json."""
    require_packages("harmonizing needs", "music", "transformers", "music21", "matplotlib", "pretty_midi", "mido")
    if options.soundfont and not Path(options.soundfont).is_file():
        raise FileNotFoundError(f"--soundfont {options.soundfont}: no such file")
    import torch

    model = load_model(options.checkpoint)
    start = time.perf_counter()
    result = evaluate(model, options) if options.evaluate else harmonize_one(model, options)
    result |= {
        "checkpoint": options.checkpoint.name if options.checkpoint == CHECKPOINT else str(options.checkpoint),
        "annealing": vars(options.annealing),
        "seed": options.seed,
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {"torch": torch.__version__, "transformers": __import__("transformers").__version__},
    }
    write_json(options.out / "harmonized.json", result)
    print(f"Written: {options.out}/harmonized.json")
    return result


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    prepare_process(threads=1)  # few windows at a time: too little work to share
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
