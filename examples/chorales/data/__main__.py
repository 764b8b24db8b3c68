"""What the data holds, as JSON."""

import argparse
import json
import sys

from ..terminal import exit_code
from .tokens import Chorales


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.chorales.data",
        description="Chorales as tokens and windows, as in the seed notebook, in flat arrays.",
    )
    parser.add_argument("--data", metavar="PATH", help="classic JSON, npz or pickle file (default: music21's corpus)")
    parser.add_argument("--window", type=int, default=16, metavar="N", help="tokens per window (default 16)")
    parser.add_argument("--stride", type=int, default=1, metavar="N", help="tokens between window starts (default 1)")
    parser.add_argument("--summary", action="store_true", help="print the facts as JSON (the default and only action)")
    options = parser.parse_args(arguments)
    return exit_code(lambda: print(json.dumps(Chorales.load(options.data).summary(options.window, options.stride))))


if __name__ == "__main__":
    sys.exit(main())
