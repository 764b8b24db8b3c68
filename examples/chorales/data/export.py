"""A folder of MIDI files to train on without a download: pieces of music21's corpus by all composers but Bach.

They are spread evenly over the corpus. The same command continues where it was. Licences: as for the chorales, see the manual.
"""

import argparse
import sys
from pathlib import Path

from ..command import require_packages
from ..storage import atomic_write
from ..terminal import exit_code, progress_bar

_LARGEST = 20_000  # bytes: music21 takes minutes for a collection of songs or a movement of a quartet


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.chorales.data.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/midi"), help="default: runs/midi")
    parser.add_argument("--pieces", type=int, default=400, help="how many files of the corpus (default 400)")
    options = parser.parse_args(arguments)
    if options.pieces < 1:
        parser.error(f"--pieces: expected at least 1, got {options.pieces}")
    return options


def run(options: argparse.Namespace) -> int:
    """Write the files that are not there yet; returns how many are."""
    require_packages("the corpus needs", "chorales", "music21", "tqdm")
    import numpy as np
    from music21 import corpus

    paths = sorted(Path(path) for path in corpus.getCorePaths())
    # .rntxt are analyses, not scores.
    paths = [path for path in paths if "bach" not in path.parts and path.suffix != ".rntxt" and path.stat().st_size <= _LARGEST]
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(options.pieces, len(paths))).round().astype(int))
    smallest_first = sorted((paths[index] for index in chosen), key=lambda path: path.stat().st_size)
    for path in progress_bar(smallest_first, desc="exporting"):
        target = options.out / f"{path.parent.name}-{path.name}.mid"
        if not target.is_file():
            try:
                content = _midi(path)
            except Exception as error:  # music21 raises whatever it met in a score
                print(f"export: left out: {path.parent.name}/{path.name}: {error or type(error).__name__}", file=sys.stderr)
                continue
            with atomic_write(target, "wb") as file:
                file.write(content)
    count = len(list(options.out.glob("*.mid")))
    print(f"Written: {options.out}, {count} files")
    return count


def _midi(path: Path) -> bytes:
    """One file of the corpus; of a collection the first piece."""
    from music21 import converter, midi, stream

    score = converter.parse(path)
    if isinstance(score, stream.Opus):
        score = score.scores[0]
    return midi.translate.streamToMidiFile(score).writestr()


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return exit_code(lambda: run(options), "the same command continues with the files that are not there yet")


if __name__ == "__main__":
    sys.exit(main())
