"""Rows of JSON, JSON Lines and parquet files, each with its place for error lines."""

import gzip
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from flex_jax.errors import InputError
from flex_jax.terminal import HIDDEN

SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".parquet")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # all but tab, newline and carriage return
NAME = "must have at most 200 characters, none of them a control character, mark of direction or half a surrogate pair"

Row = tuple[str, dict[str, Any]]  # the place of a row, for error messages, and its columns


class _BadNumber(ValueError):
    """A number in JSON that Python cannot hold. Its argument is the number as it is written."""


def file_rows(file: Path) -> list[Row]:
    """Returns the place and the columns of every row of a local file.

    Raises InputError, with the file and the line or record (from 1), if the file is missing or damaged.
    """
    if not file.name.endswith(SUFFIXES):
        raise InputError(f"{file}: the file's name must end in one of {', '.join(SUFFIXES)}")
    if file.name.endswith(".parquet"):
        rows = _parquet_rows(file)
    elif file.name.removesuffix(".gz").endswith(".jsonl"):
        rows = _json_lines(file)
    else:
        text = "".join(line for _, line in _lines(file))
        found = _parse(text, file, 1, or_lines=True) if text.strip() else []
        if found is None:
            rows = _json_lines(file)
        elif isinstance(found, list):
            rows = numbered(file, found)
        else:
            kind = type(found).__name__
            raise InputError(f"{file}: must be a list of records or one record a line, not one {kind}")
    return check_rows(file, rows)


def check_rows(source: str | Path, rows: list[Row]) -> list[Row]:
    """Returns the rows. Raises InputError if there is none, or if one is no record with names for its columns."""
    if not rows:
        raise InputError(f"{source}: no record in it")
    for place, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{place}: a record must be an object, not {type(row).__name__}")
        for column in row:
            if not is_name(column):
                raise InputError(f"{place}: a column's name {NAME}, not {column!r:.60}")
    return rows


def is_name(text: str) -> bool:
    """Returns whether a text can name a column, a category or a client (see NAME)."""
    return len(text) <= 200 and not re.search("[\t\n]", text) and not HIDDEN.search(text)


def numbered(source: str | Path, rows: Iterable[Any]) -> list[Row]:
    """Returns rows that have no lines with their numbers as places."""
    return [(f"{source}: record {number}", row) for number, row in enumerate(rows, 1)]


def text_column(place: str, row: dict[str, Any], column: str, *, blank: bool = False) -> str:
    """Returns the text in a column of a row. Raises InputError if it is no valid text, or is empty without `blank`."""
    value = row.get(column)
    if value is None:
        raise InputError(f"{place}: the record has no {column}")
    if not isinstance(value, str):
        raise InputError(f"{place}: {column} must be a string, not {type(value).__name__}")
    if not blank and not value.strip():
        raise InputError(f"{place}: {column} is empty")
    # JSON can contain half a surrogate pair ("\ud83d"), which no tokenizer accepts.
    if re.search("[\ud800-\udfff]", value):
        raise InputError(f"{place}: {column} contains half a surrogate pair, which is not text")
    if "\0" in value:
        raise InputError(f"{place}: {column} contains a NUL byte, which is not text")
    return value


def one_line(error: BaseException) -> str:
    """Returns the message of another library's error as one short line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _parquet_rows(file: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return numbered(file, pyarrow.parquet.read_table(file).to_pylist())
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a readable parquet file ({one_line(error)})") from error


def _json_lines(file: Path) -> list[Row]:
    lines = ((number, line.rstrip()) for number, line in _lines(file))  # a JSON error counts a newline as a line
    return [(f"{file}:{number}", _parse(line, file, number)) for number, line in lines if line]


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line) of a text file that may be gzipped. Only a newline ends a line."""
    number = 0
    try:
        with gzip.open(file, "rb") if file.name.endswith(".gz") else open(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}:{number}: not UTF-8 ({error.reason} at byte {error.start} of the line)") from error
    except (EOFError, zlib.error, OSError) as error:
        raise InputError(f"{file}:{number + 1}: cannot be read ({one_line(error)})") from error


def _parse(text: str, file: Path, first_line: int, *, or_lines: bool = False) -> Any:
    """Returns the value of a JSON text. With `or_lines`, returns None if it is JSON Lines."""
    try:
        return json.loads(
            text, parse_int=_integer, parse_float=_float, parse_constant=_constant, object_pairs_hook=_object
        )
    except json.JSONDecodeError as error:
        if or_lines and error.msg == "Extra data" and text.lstrip().startswith("{"):
            return None
        place, reason = error.pos, f"broken JSON ({error.msg} at column {error.colno})"
    except _BadNumber as error:
        literal = error.args[0]
        place, reason = (
            text.find(literal),
            f"broken JSON (the number {literal:.20}, of {len(literal)} characters, is too large)",
        )
    except _Twice as error:
        place, reason = text.find(json.dumps(error.args[0])), f"the key {error.args[0]!r:.60} is there twice"
    except RecursionError:
        place, reason = _deepest(text), "broken JSON (lists or objects are nested too deeply)"
    raise InputError(f"{file}:{first_line + text.count(chr(10), 0, place)}: {reason}")


class _Twice(ValueError):
    """An object that has a key twice. Its argument is the key."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return found


def _integer(literal: str) -> int:
    try:
        return int(literal)
    except ValueError:  # more digits than sys.get_int_max_str_digits()
        raise _BadNumber(literal) from None


def _float(literal: str) -> float:
    if math.isinf(value := float(literal)):
        raise _BadNumber(literal)
    return value


def _constant(literal: str) -> None:
    """NaN, which JSON does not have, is how Python writes a missing number. Infinity is none."""
    if literal != "NaN":
        raise _BadNumber(literal)


def _deepest(text: str) -> int:
    """Returns the position at which brackets are nested deepest."""
    brackets = [match for match in re.finditer(r'"(?:[^"\\]|\\.)*"|[][{}]', text) if match[0] in "[]{}"]
    depths = list(accumulate(1 if match[0] in "[{" else -1 for match in brackets))
    return brackets[depths.index(max(depths))].start()
