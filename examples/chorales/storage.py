"""Files that are either complete or absent."""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside `path` and rename it over `path` once the block ends without an error.

    A reader, or a later run after a kill, sees the old file or the new one, never half of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp gives 0600; use what a plain open() would have given
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def cached(path: Path, name: str, read: Callable[[Path], T], make: Callable[[], T], write: Callable[[IO[bytes], T], None]) -> T:
    """What `read` finds in the file `path`; where it is absent or damaged, what `make` makes, which `write` writes to it.

    A damaged file and one that cannot be written are no errors: a line says so, in the name of `name`.

    Args:
        read: raises whatever it likes for a file that is not as `write` wrote it.
    """
    try:
        return read(path)
    except FileNotFoundError:
        pass
    except Exception as error:  # half a file makes parsers raise nearly anything: EOFError, BadZipFile, zlib.error, ...
        print(f"{name}: rebuilding the cache {path}: {error or type(error).__name__}", file=sys.stderr)
    value = make()
    try:
        with atomic_write(path, "wb") as file:
            write(file, value)
    except OSError as error:
        print(f"{name}: could not be cached ({error}); it will be made again next time", file=sys.stderr)
    return value


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file; a garbled one is a ValueError that names the path."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def write_part(path: Path, mark: str, text: str) -> None:
    """Write anew, atomically, what a file has between `<!-- mark -->` and `<!-- /mark -->`.

    Raises:
        ValueError: the file has not just one of each.
    """
    first, last = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    old = path.read_text(encoding="utf-8")
    if old.count(first) != 1 or old.count(last) != 1:
        raise ValueError(f"--readme {path}: expected one {first} and one {last}")
    with atomic_write(path) as file:
        file.write(f"{old.split(first)[0]}{first}\n{text}{last}{old.split(last)[1]}")
