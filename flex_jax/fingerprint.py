"""Fingerprints: sizes and digests that show whether what a run has read or written is still the same."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

Fingerprint = dict[str, Any]  # "sha256", and "bytes" of a file or "records" of a data set


def digest_json(value: Any) -> str:
    """Returns the SHA-256 of a value of JSON's types; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the SHA-256 of named arrays: their names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        array = np.asarray(array, order="C")
        digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def of_files(files: Mapping[str, Path]) -> dict[str, Fingerprint]:
    """Returns the fingerprints of files under the same names. Several files are read at once."""

    def one(path: Path) -> Fingerprint:
        with open(path, "rb") as file:
            return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    with ThreadPoolExecutor() as pool:  # hashing releases Python's lock
        return dict(zip(files, pool.map(one, files.values()), strict=True))


def of_records(records: list[dict[str, str]]) -> Fingerprint:
    """Returns the fingerprint of the records of a data set, wherever they came from."""
    return {"records": len(records), "sha256": digest_json(records)}


def differences(before: Mapping[str, Fingerprint], now: Mapping[str, Fingerprint]) -> Iterable[str]:
    """Yields what is new, gone or changed, each with its sizes."""
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old != new:
            was, is_now = _size(old), _size(new)
            yield f"{name}: was {was}, is {is_now}" if was != is_now else f"{name}: other content, also {was}"


def _size(fingerprint: Any) -> str:
    if not isinstance(fingerprint, dict):
        return "not there"
    return ", ".join(f"{value:,} {unit}" for unit, value in fingerprint.items() if unit != "sha256")
