"""Records from a file, a directory, the Hugging Face Hub or the embedded tiny task set.

A record is a dict of strings with the keys instruction, context, response and category. The source's other columns keep
their names.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flex_jax import tiny
from flex_jax.errors import InputError


class Fields(NamedTuple):
    """Names of a source's columns, and the category of its records if it has no column for it."""

    instruction: str
    response: str
    context: str | None
    category: str

    def columns(self) -> tuple[str, ...]:
        """Returns the columns that the source must have."""
        return tuple(c for c in (self.instruction, self.context, self.response) if c is not None)


# "auto" takes the first entry whose columns are all present, so the more specific ones come first.
FIELDS = {
    "dolly": Fields("instruction", "response", "context", "dolly"),
    "alpaca": Fields("instruction", "output", "input", "alpaca"),
    "gsm8k": Fields("question", "answer", None, "math"),
    "prompt_completion": Fields("prompt", "completion", None, "prompt_completion"),
    "instruction_response": Fields("instruction", "response", None, "instruction_response"),
}
SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".parquet")

Row = tuple[str, dict[str, Any]]  # the place of a row, for error messages, and its columns


def load_records(path: str | Path, *, split: str = "train", fields: str = "auto") -> list[dict[str, str]]:
    """Returns all records of a source, in its order.

    A missing or null context becomes an empty one. In columns that `fields` does not name, numbers become strings, and
    lists, objects and nulls are dropped. If the source is missing or damaged, raises InputError with the file and the
    line or record (from 1).

    Args:
        path: "tiny" (the embedded task set), a local file (a .json list, .jsonl or .parquet; the first two also .gz), a
            directory of such files (read in sorted order), or the name of a dataset on the Hugging Face Hub.
        split: the split of a Hub dataset; local files have none.
        fields: a key of FIELDS, or "auto" for the first entry whose columns the source has.
    """
    if fields != "auto" and fields not in FIELDS:
        raise InputError(f"data.fields={fields!r} is unknown; choose auto or one of {', '.join(FIELDS)}")
    rows = _rows(str(path), split)
    mapping = _choose_fields(fields, rows)
    return [_record(place, row, mapping) for place, row in rows]


def _rows(path: str, split: str) -> list[Row]:
    if path == "tiny":
        return _numbered("tiny", (row for _, row in file_rows(tiny.TASKS)))
    local = Path(path).expanduser()
    if local.is_dir():
        files = sorted(f for f in local.iterdir() if f.name.endswith(SUFFIXES) and not f.name.startswith("."))
        if not files:
            raise InputError(f"{local}: no file in it ends in one of {', '.join(SUFFIXES)}")
        return [row for file in files for row in file_rows(file)]
    if local.exists():
        return file_rows(local)
    # A Hub name may end in a version (".5") but not in a file suffix, and has at most one slash.
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path) and not re.search(r"\.[A-Za-z]\w*$", path):
        return _hub_rows(path, split)
    raise InputError(f"{path}: no such file or directory")


def file_rows(file: Path) -> list[Row]:
    """Returns the place and the columns of every row of a local file. Raises InputError as in `load_records`."""
    if not file.name.endswith(SUFFIXES):
        raise InputError(f"{file}: the file's name must end in one of {', '.join(SUFFIXES)}")
    if file.name.endswith(".parquet"):
        rows = _parquet_rows(file)
    elif file.name.removesuffix(".gz").endswith(".jsonl"):
        lines = ((number, line.rstrip()) for number, line in _lines(file))  # a JSON error counts a newline as a line
        rows = [(f"{file}:{number}", _parse(line, file, number)) for number, line in lines if line]
    else:
        text = "".join(line for _, line in _lines(file))
        found = _parse(text, file, 1) if text.strip() else []
        if not isinstance(found, list):
            kind = type(found).__name__
            raise InputError(f"{file}: must be a list of records, not {kind}; use .jsonl for one record per line")
        rows = _numbered(file, found)
    for place, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{place}: a record must be an object, not {type(row).__name__}")
    if not rows:
        raise InputError(f"{file}: no record in it")
    return rows


def _parquet_rows(file: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a readable parquet file ({_one_line(error)})") from error
    return _numbered(file, table.to_pylist())


def _hub_rows(name: str, split: str) -> list[Row]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        dataset = datasets.load_dataset(name, split=split)
    # OSError: a missing dataset, no network or offline mode. ValueError: a wrong split or configuration.
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name}: not a local file, and split {split!r} could not be loaded from the Hugging Face Hub "
            f"({_one_line(error)}); download the dataset {name} and set data.path to its file"
        ) from error
    if not (rows := _numbered(f"{name} ({split})", dataset)):
        raise InputError(f"{name}: no record in it")
    return rows


def _numbered(source: str | Path, rows: Iterable[Any]) -> list[Row]:
    return [(f"{source}: record {number}", row) for number, row in enumerate(rows, 1)]


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
        raise InputError(f"{file}:{number + 1}: cannot be read ({_one_line(error)})") from error


def _parse(text: str, file: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(f"{file}:{line}: broken JSON ({error.msg} at column {error.colno})") from error


def _choose_fields(name: str, rows: list[Row]) -> Fields:
    found = set().union(*(row for _, row in rows))
    for mapping in FIELDS.values() if name == "auto" else [FIELDS[name]]:
        if found.issuperset(mapping.columns()):
            return mapping
    wanted = "; ".join(f"{key} ({', '.join(mapping.columns())})" for key, mapping in FIELDS.items())
    raise InputError(
        f"{rows[0][0]}: no instruction and response for data.fields={name!r}: the columns are "
        f"{', '.join(sorted(map(str, found))) or 'none'}; known are {wanted}"
    )


def _record(place: str, row: dict[str, Any], mapping: Fields) -> dict[str, str]:
    context, category = mapping.context, row.get("category")
    mapped = {
        "instruction": text_column(place, row, mapping.instruction),
        "context": "" if context is None or row.get(context) is None else text_column(place, row, context, blank=True),
        "response": text_column(place, row, mapping.response),
        "category": mapping.category if category in (None, "") else text_column(place, row, "category"),
    }
    others = {
        key: text_column(place, row, key, blank=True) if isinstance(value, str) else str(value)
        for key, value in row.items()
        if key not in mapped and key not in mapping.columns() and isinstance(value, str | int | float)
    }
    return mapped | others


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
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
