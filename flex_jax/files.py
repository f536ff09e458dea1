"""Atomic text and JSON files."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_text(path: Path | str, text: str) -> None:
    """Writes a file atomically: a reader finds the old content or the new, even after a kill."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # in the same directory: a rename across file systems is a copy
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path | str, value: Any) -> None:
    """Writes `to_plain(value)` as indented JSON, atomically."""
    write_text(path, json.dumps(to_plain(value), indent=2, allow_nan=False) + "\n")


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
