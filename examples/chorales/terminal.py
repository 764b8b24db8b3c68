"""What commands show: progress bars, and what became of them in one line and an exit code."""

import os
import sys
from collections.abc import Callable


def progress_bar(iterable=None, **options):
    """A tqdm bar with tqdm's `options`; where nobody watches it, as in a log file, it is drawn every ten seconds."""
    from tqdm import tqdm

    return tqdm(iterable, mininterval=0.1 if sys.stderr.isatty() else 10.0, **options)


def printable(path: str | os.PathLike) -> str:
    """A path as text for any stream: bytes of its name that are not UTF-8 as \\x and two digits."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def exit_code(action: Callable[[], object], interrupted: str = "") -> int:
    """Run a command's `action`: 0, 2 after an error that its message explains, 130 after Ctrl-C.

    interrupted: what the user is told after Ctrl-C, such as how to go on. Errors that only a defect of ours can cause
    keep their traceback.
    """
    try:
        action()
    except KeyboardInterrupt:
        print("\ninterrupted" + (f"; {interrupted}" if interrupted else ""), file=sys.stderr)
        return 130
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
