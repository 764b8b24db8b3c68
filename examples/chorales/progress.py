"""Progress bars."""

import sys


def progress_bar(iterable=None, **options):
    """A tqdm bar with tqdm's `options`; where nobody watches it, as in a log file, it is drawn every ten seconds."""
    from tqdm import tqdm

    return tqdm(iterable, mininterval=0.1 if sys.stderr.isatty() else 10.0, **options)
