"""Atomic files, in which a reader finds the old content or the new, even after a kill or on a full disk."""

import errno
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flex_jax.errors import InputError

TEMPORARY = ".*.tmp"  # what `replacing` leaves behind if the process is killed
UMASK = os.umask(0)
os.umask(UMASK)


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yields a new file, which takes the place of `path` when it is written and on the disk. On an error it is removed.

    Raises OSError that names `path` if it cannot be written.
    """
    path = Path(path)
    try:
        # In the same directory, as a rename across file systems is a copy. Created exclusively, so no link is followed.
        handle, name = tempfile.mkstemp(".tmp", f".{path.name[:100]}.", path.parent)
        os.close(handle)
        try:
            yield Path(name)
            os.chmod(name, 0o666 & ~UMASK)
            synchronise(name)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        synchronise(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def synchronise(path: Path | str) -> None:
    """Waits until a file's content, or a directory's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def local_path(path) -> Path:
    """Returns the path, which may start with ~. Raises InputError if no file can have that name."""
    try:
        local = Path(path).expanduser()
        local.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, the home of an unknown user, a NUL
        raise InputError(f"{str(path)!r}: cannot be a path ({error})") from error
    return local


def read_text(path: Path) -> str:
    """Reads a file in UTF-8. Raises OSError or UnicodeDecodeError; a pipe would wait for its writer."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.read_text(encoding="utf-8")


def write_text(path: Path | str, text: str) -> None:
    """Writes a file atomically, in UTF-8. Raises OSError that names it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Writes `to_plain(value)` as indented JSON, atomically."""
    write_text(path, json.dumps(to_plain(value), indent=2, allow_nan=False) + "\n")


def sweep(directory: Path) -> None:
    """Removes the temporary files of `replacing` that a kill has left in a directory."""
    for file in directory.glob(TEMPORARY):
        if file.is_file() or file.is_symlink():
            file.unlink(missing_ok=True)


def to_plain(value: Any) -> Any:
    """Returns `value` in JSON's types: arrays become lists or numbers, NaN and infinities become None."""
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
