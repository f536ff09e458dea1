"""Records from a file, a directory, the Hugging Face Hub or the embedded tiny task set.

A record is a plain dict of strings with the keys instruction, context, response and category, and the source's other
columns under their own names.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from flex_jax.errors import InputError


class Fields(NamedTuple):
    """Which column of a source holds which key of a record; category is the one where the source names none."""

    instruction: str
    response: str
    context: str | None
    category: str

    def columns(self) -> tuple[str, ...]:
        return tuple(c for c in (self.instruction, self.context, self.response) if c is not None)


# "auto" takes the first whose columns are all present, so the more specific come first.
FIELDS = {
    "dolly": Fields("instruction", "response", "context", "dolly"),
    "alpaca": Fields("instruction", "output", "input", "alpaca"),
    "gsm8k": Fields("question", "answer", None, "math"),
    "prompt_completion": Fields("prompt", "completion", None, "prompt_completion"),
    "instruction_response": Fields("instruction", "response", None, "instruction_response"),
}
SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".parquet")

Row = tuple[str, dict]  # the place of a row, for error lines, and its columns


def load_records(path: str | Path, *, split: str = "train", fields: str = "auto") -> list[dict[str, str]]:
    """All records of `path`, in the order of the source.

    Args:
        path: "tiny" (the embedded task set), a local file (.json list, .jsonl, .parquet; the first two also .gz), a
            directory of such files (read in sorted order), or the name of a dataset on the Hugging Face Hub.
        split: the split of a Hub dataset; local files have none.
        fields: a name of FIELDS, or "auto" for the first of them whose columns the source has.

    Numbers in columns that the mapping does not name become strings; such columns' lists, objects and nulls are left
    out. A null or absent context is an empty one.

    Raises:
        InputError: whatever is wrong with the source, with its file and line (or record number, from 1).
    """
    if fields != "auto" and fields not in FIELDS:
        raise InputError(f"data.fields={fields!r} is unknown; choose auto or one of {', '.join(FIELDS)}")
    rows = list(_rows(str(path), split))
    if not rows:
        raise InputError(f"{path}: no record in it")
    mapping = _choose_fields(fields, rows)
    return [_record(place, row, mapping) for place, row in rows]


def _rows(path: str, split: str) -> Iterator[Row]:
    if path == "tiny":
        from flex_jax.tiny.tasks import make_records

        return _numbered("tiny", make_records())
    local = Path(path).expanduser()
    if local.is_dir():
        return _directory_rows(local)
    if local.exists():
        return file_rows(local)
    # A Hub name may end in a version (".5") but not in a file's suffix, and has at most one slash.
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path) and not re.search(r"\.[A-Za-z]\w*$", path):
        return _hub_rows(path, split)
    raise InputError(f"{path}: no such file or directory")


def _directory_rows(directory: Path) -> Iterator[Row]:
    files = sorted(f for f in directory.iterdir() if f.name.endswith(SUFFIXES) and not f.name.startswith("."))
    if not files:
        raise InputError(f"{directory}: no file in it ends in one of {', '.join(SUFFIXES)}")
    for file in files:
        yield from file_rows(file)


def file_rows(file: Path) -> Iterator[Row]:
    """Place and columns of every row of one local file. Raises InputError as `load_records`."""
    if not file.name.endswith(SUFFIXES):
        raise InputError(f"{file}: the file's name must end in one of {', '.join(SUFFIXES)}")
    if file.name.endswith(".parquet"):
        rows = _parquet_rows(file)
    elif file.name.removesuffix(".gz").endswith(".jsonl"):
        lines = ((number, line.rstrip()) for number, line in _lines(file))  # a newline would count as a line
        rows = ((f"{file}:{number}", _parse(line, file, number)) for number, line in lines if line)
    else:
        rows = _json_list_rows(file)
    empty = True
    for place, row in rows:
        empty = False
        if not isinstance(row, dict):
            raise InputError(f"{place}: a record must be an object, not {type(row).__name__}")
        yield place, row
    if empty:
        raise InputError(f"{file}: no record in it")


def _json_list_rows(file: Path) -> Iterator[Row]:
    text = "".join(line for _, line in _lines(file))
    rows = _parse(text, file, 1) if text.strip() else []
    if not isinstance(rows, list):
        raise InputError(f"{file}: must hold a list of records, not {type(rows).__name__}; one a line is .jsonl")
    return _numbered(str(file), rows)


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a readable parquet file ({_one_line(error)})") from error
    return _numbered(str(file), table.to_pylist())


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split)
    # OSError covers a missing dataset, no network and offline mode; ValueError a wrong split or configuration.
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name}: not a local file, and split {split!r} could not be had from the Hugging Face Hub "
            f"({_one_line(error)}); download the dataset {name} and set data.path to its file"
        ) from error
    return _numbered(f"{name} ({split})", dataset)


def _numbered(source: str, rows: Iterable) -> Iterator[Row]:
    return ((f"{source}: record {number}", row) for number, row in enumerate(rows, 1))


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of a text file that may be gzipped; only "\\n" ends a line."""
    number = 0
    try:
        with gzip.open(file, "rb") if file.name.endswith(".gz") else open(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}:{number}: not UTF-8 ({error.reason} at byte {error.start} of the line)") from error
    except (EOFError, zlib.error, OSError) as error:
        raise InputError(f"{file}:{number + 1}: cannot be read ({_one_line(error)})") from error


def _parse(text: str, file: Path, first_line: int) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(f"{file}:{line}: broken JSON ({error.msg} at column {error.colno})") from error


def _choose_fields(name: str, rows: list[Row]) -> Fields:
    found = set().union(*(row for _, row in rows))
    if name != "auto":
        candidates = [FIELDS[name]]
    else:
        candidates = list(FIELDS.values())
    for mapping in candidates:
        if found.issuperset(mapping.columns()):
            return mapping
    wanted = "; ".join(f"{key} ({', '.join(mapping.columns())})" for key, mapping in FIELDS.items())
    raise InputError(
        f"{rows[0][0]}: no instruction and response for data.fields={name!r}: the columns are "
        f"{', '.join(sorted(map(str, found))) or 'none'}; known are {wanted}"
    )


def _record(place: str, row: dict, mapping: Fields) -> dict[str, str]:
    context, category = row.get(mapping.context), row.get("category")
    mapped = {
        "instruction": text_column(place, row, mapping.instruction),
        "context": "" if context is None else text_column(place, row, mapping.context, blank=True),
        "response": text_column(place, row, mapping.response),
        "category": mapping.category if category in (None, "") else text_column(place, row, "category"),
    }
    others = {
        key: text_column(place, row, key, blank=True) if isinstance(value, str) else str(value)
        for key, value in row.items()
        if key not in mapped and key not in mapping.columns() and isinstance(value, str | int | float)
    }
    return mapped | others


def text_column(place: str, row: dict, column: str, blank: bool = False) -> str:
    """The text in a column of a row. Raises InputError where it is missing, no text or, unless `blank`, empty."""
    value = row.get(column)
    if value is None:
        raise InputError(f"{place}: the record has no {column}")
    if not isinstance(value, str):
        raise InputError(f"{place}: {column} must be a string, not {type(value).__name__}")
    if not blank and not value.strip():
        raise InputError(f"{place}: {column} is empty")
    # JSON can spell half a surrogate pair ("\ud83d"), which no tokenizer takes.
    if re.search("[\ud800-\udfff]", value):
        raise InputError(f"{place}: {column} holds half a surrogate pair, which is not text")
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
