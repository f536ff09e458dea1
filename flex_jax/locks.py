"""Locks between processes. The operating system releases them when their holder ends, however it ends."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

from flex_jax.errors import InputError


@contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Holds a work directory for this process, and makes it. It is removed again if nothing is written into it.

    Raises InputError that names the process that has it.
    """
    made = not workdir.exists()
    workdir.mkdir(parents=True, exist_ok=True)
    name = workdir / ".lock"
    with open(name, "a+", encoding="utf-8", errors="replace") as file:
        if not _acquire(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            file.seek(0)
            holder = " ".join(file.read(200).split()) or "another process"
            raise InputError(
                f"--workdir {workdir}: in use by {holder}: wait until that has ended, or give another --workdir"
            )
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
            if made and set(workdir.iterdir()) == {name}:
                name.unlink()
                workdir.rmdir()


@contextmanager
def reading(directory: Path) -> Iterator[None]:
    """Keeps the files of a directory from being removed by a process that asks `removing`."""
    try:
        file = open(directory / ".reading", encoding="utf-8")
    except FileNotFoundError:  # no process has removed anything here
        yield
        return
    with file:
        _acquire(file, fcntl.LOCK_SH)
        yield


@contextmanager
def removing(directory: Path, *, wait: bool = False) -> Iterator[bool]:
    """Yields whether files of a directory can be removed, because no process is reading them. If `wait`, they can."""
    with open(directory / ".reading", "a", encoding="utf-8") as file:
        yield _acquire(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def locked_directory(directory: Path) -> Iterator[bool]:
    """Holds a directory for this process. Yields whether it does: another one may have it."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield _acquire(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(handle)


def _acquire(file: IO[str] | int, operation: int) -> bool:
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    return True
