"""Samples to listen to: what both committed decoders sing at the same settings, as MIDI, MP3 and pictures, measured.

Everything but the checkpoints is fixed, so that nobody chose. Writes --out DIR/<arm>-<n>.mid and .mp3, samples-<arm>.png to
--figures DIR, and with --readme the part of that file between <!-- listening --> and <!-- /listening -->.
"""

import argparse
import shutil
import sys
from pathlib import Path

from . import generate
from .command import prepare_process, require_packages
from .storage import atomic_write, write_part
from .terminal import exit_code

ARMS = ("relative", "absolute")
SECONDS = 25  # of each recording
TOKENS = 1024  # of each sample, at most: twice the training length


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.chorales.listening",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    here = Path(__file__).parent
    add("--checkpoints", metavar="DIR", type=Path, default=here / "checkpoint", help="holds relative/ and absolute/")
    add("--out", metavar="DIR", type=Path, default=Path("runs/listening"), help="default: runs/listening")
    add("--figures", metavar="DIR", type=Path, help="default: --out")
    add("--samples", type=int, default=8, help="per checkpoint (default 8)")
    add("--soundfont", metavar="FILE", help=".sf2 for fluidsynth; default: the system's, else pretty_midi's")
    add("--data", metavar="FILE", help="classic chorales, for measures and the check (default: music21's corpus)")
    add("--readme", metavar="FILE", type=Path, help="write the table of samples and measures into this file")
    options = parser.parse_args(arguments)
    if options.samples < 1:
        parser.error(f"--samples: expected at least 1, got {options.samples}")
    options.figures = options.figures or options.out
    return options


def sing(arm: str, options: argparse.Namespace) -> dict:
    """The samples of one checkpoint; what generate says of them."""
    from .decoder import sound

    folder = options.out / f".{arm}"
    given = ["--checkpoint", str(options.checkpoints / arm), "--out", str(folder), "--samples", str(options.samples)]
    given += ["--tokens", str(TOKENS), "--seed", "0"]
    given += ["--data", options.data] if options.data else []
    given += ["--soundfont", options.soundfont] if options.soundfont else []
    result = generate.run(generate.parse_arguments(given))
    rolls = {}
    for index, sample in enumerate(result["samples"]):
        name = f"{arm}-{index}"
        content = (folder / sample["files"][0]).read_bytes()
        with atomic_write(options.out / f"{name}.mid", "wb") as file:
            file.write(content)
        sound.write_recording(options.out / f"{name}.mp3", folder / f"sample-{index}.wav", SECONDS)
        rolls[f"{name}: {sample['seconds']:.0f} s{'' if sample['ended'] else ', cut'}"] = sound.open_midi(content)
    sound.draw_piano_rolls(options.figures / f"samples-{arm}.png", rolls, SECONDS, f"{arm} positions, the first {SECONDS} seconds")
    shutil.rmtree(folder)
    return result


def report(results: dict[str, dict]) -> str:
    """Markdown: the samples to play, and the table of measures."""
    from .decoder import measures

    lines = ["| | " + " | ".join(results) + " |", "| --- |" + " --- |" * len(results)]
    for index in range(len(results[ARMS[0]]["samples"])):
        cells = []
        for arm, result in results.items():
            shared = result["samples"][index]["copying"]
            passage = shared["longest_common_passage"] if shared else None
            copied = f"shares {passage['events'] if passage else 0} {shared['unit']}" if shared else "not compared"
            player = f'<audio controls preload="none" src="_static/{arm}-{index}.mp3"></audio>'
            cells.append(f'{player} <a href="_static/{arm}-{index}.mid">MIDI</a>, {copied}')
        lines.append(f"| {index} | " + " | ".join(cells) + " |")
    columns = {arm: result["measures"]["generated"] for arm, result in results.items()}
    columns |= {name: counts for name, counts in results[ARMS[0]]["measures"].items() if name.startswith("Bach")}
    return "\n".join([*lines, "", measures.markdown(columns)])


def run(options: argparse.Namespace) -> dict:
    """Both checkpoints' samples; what generate says of them, by arm."""
    require_packages("recordings need", "music", "soundfile")
    results = {arm: sing(arm, options) for arm in ARMS}
    if options.readme:
        write_part(options.readme, "listening", report(results))
    print(f"Written: {options.out}/<arm>-<n>.mid and .mp3, {options.figures}/samples-<arm>.png")
    return results


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    prepare_process(threads=1)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
