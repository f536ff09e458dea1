"""Records from a file, a directory, the Hugging Face Hub or the embedded tiny task set.

A record is a dict of strings with the keys instruction, context, response and category. The source's other columns keep
their names.
"""

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from flex_jax import tiny
from flex_jax.data.columns import (
    ROLES,
    Columns,
    Record,
    choose_columns,
    has_texts,
    is_missing,
    is_nested,
    listing,
    make_record,
)
from flex_jax.data.readers import CONTROL, Row, check_rows, file_rows, numbered, one_line
from flex_jax.errors import InputError
from flex_jax.files import local_path


class Data(NamedTuple):
    """The records of a source."""

    train: list[Record]
    test: list[Record] | None  # of the test split; None if test records are held out of the others
    summary: str  # one line: what became of which column, and what is not used


def load_records(path: str | Path, *, split: str = "train", fields: str = "auto") -> list[Record]:
    """Returns all records of one split of a source, in its order. See `load_data`."""
    return load_data(path, split=split, fields=fields).train


def load_data(
    path: str | Path,
    *,
    split: str = "train",
    test_split: str = "",
    fields: str = "auto",
    column: str = "",
    skip_empty: bool = False,
) -> Data:
    """Returns the records of a source, in its order.

    A missing or null context becomes an empty one. In columns that are not part of the prompt, numbers become strings,
    and lists, objects and missing values are dropped. If the source is missing or damaged, raises InputError with the
    file and the line or record (from 1).

    Args:
        path: "tiny" (the embedded task set), a local file (a .json list, .jsonl or .parquet; the first two also .gz), a
            directory, or the name of a dataset on the Hugging Face Hub.
        split: the split to train on. Directories and the Hub have those that `datasets` finds; all else is "train".
        test_split: the split with the test records; "" means none.
        fields: see `choose_columns`.
        column: the column that names clients, for the summary.
        skip_empty: leave out records without an instruction or response; they are an error otherwise.
    """
    if split == test_split:
        raise InputError(f"data.test_split is {test_split!r}, as data.split is: must be another split, or empty")
    wanted = [split, *([test_split] if test_split else [])]
    splits, unread = _read(str(path), wanted)
    rows = [row for name in wanted for row in splits[name]]
    columns = choose_columns(fields, rows)
    if column in ROLES and getattr(columns, column) != column:
        raise InputError(f"data.column={column}: has the name of a part of the prompt: rename the column in the data")
    used = {name: [row for row in splits[name] if not skip_empty or has_texts(row[1], columns)] for name in wanted}
    for name in wanted:
        if not used[name]:
            raise InputError(f"{path}: no record of {name!r} has an instruction and a response")
    records = {name: _records(used[name], columns) for name in wanted}
    skipped = len(rows) - sum(map(len, used.values()))
    summary = [
        f"{len(records[split])} records of {path}"
        + (f", {len(records[test_split])} of its split {test_split} for testing" if test_split else "")
        + ": "
        + ", ".join(f"{role} <- {getattr(columns, role) or 'none'}" for role in ("instruction", "context", "response")),
        *_unused(rows, columns, column),
        *([f"left out for want of an instruction or response: {skipped} records"] if skipped else []),
        *_odd_characters(rows, columns),
        *([f"files not read: {listing(unread, 8)}"] if unread else []),
    ]
    return Data(records[split], records[test_split] if test_split else None, "; ".join(summary))


def _records(rows: list[Row], columns: Columns) -> list[Record]:
    """Returns the records of rows. Raises one InputError for all that are wrong."""
    records, wrong = [], []
    for place, row in rows:
        try:
            records.append(make_record(place, row, columns))
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        count = f"{len(wrong)} of {len(rows)} records cannot be used: " if len(wrong) > 1 else ""
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        empty = sum(not has_texts(row, columns) for _, row in rows)
        advice = f"; data.skip_empty=True leaves out the {empty} without an instruction or response" if empty else ""
        raise InputError(f"{count}{'; '.join(wrong[:5])}{more}{advice}")
    return records


def _unused(rows: list[Row], columns: Columns, column: str) -> Iterable[str]:
    """Yields what of the columns does not reach a prompt."""
    names = dict.fromkeys(name for _, row in rows for name in row if name not in (*columns[:3], "category", column))
    if names:
        nested = {name for _, row in rows for name, value in row.items() if value is not None and is_nested(value)}
        marked = [f"{name} (lists or objects, dropped)" if name in nested else name for name in names]
        yield f"not in the prompt: {listing(marked)}"
    without = sum(is_missing(row.get("category")) for _, row in rows)
    if 0 < without < len(rows):
        yield f"no category: {without} records, which get {columns.category!r}"


def _odd_characters(rows: list[Row], columns: Columns) -> Iterable[str]:
    places = [place for place, row in rows if any(name and CONTROL.search(str(row.get(name))) for name in columns[:3])]
    if places:
        yield f"control characters in the text of {len(places)} records, first {places[0]}"


def _read(path: str, wanted: list[str]) -> tuple[dict[str, list[Row]], list[str]]:
    """Returns the rows of the wanted splits, and the names of data files that are in none of them."""
    local = local_path(path)
    if path != "tiny" and local.is_dir():
        if any((local / name).exists() for name in ("dataset_dict.json", "state.json")):
            return _saved_rows(local, wanted), []
        return _directory_rows(local, wanted)
    if path == "tiny" or local.exists():
        _check_splits(path, ["train"], wanted)
        rows = file_rows(local) if path != "tiny" else numbered(path, (row for _, row in file_rows(tiny.TASKS)))
        return {"train": rows}, []
    # A Hub name may end in a version (".5") but not in a file suffix, and has at most one slash.
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path) and not re.search(r"\.[A-Za-z]\w*$", path):
        return {split: _hub_rows(path, split) for split in wanted}, []
    raise InputError(f"{path}: no such file or directory")


def _check_splits(path: str | Path, splits: Iterable[str], wanted: list[str]) -> None:
    for split in wanted:
        if split not in splits:
            raise InputError(f"{path}: no split {split!r}: its splits are {listing(splits)}")


def _directory_rows(directory: Path, wanted: list[str]) -> tuple[dict[str, list[Row]], list[str]]:
    """Reads the files that `datasets` takes for the wanted splits, with our own readers: these name lines.

    A cache of `datasets` would not see every change of a file.
    """
    import datasets
    import yaml
    from datasets.exceptions import DatasetsError

    try:
        with tempfile.TemporaryDirectory() as cache:
            files = datasets.load_dataset_builder(str(directory), cache_dir=cache).config.data_files or {}
    except (DatasetsError, OSError, ValueError, RuntimeError, TypeError, yaml.YAMLError) as error:
        hint = "; a path with [ ] * or ? must be renamed" if re.search(r"[][*?]", str(directory.resolve())) else ""
        raise InputError(f"{directory}: not a directory of data files ({one_line(error)}){hint}") from error
    splits = {str(split): sorted({str(file) for file in of_split}) for split, of_split in files.items()}
    _check_splits(directory, splits, wanted)
    rows = {split: [row for file in splits[split] for row in file_rows(Path(file))] for split in wanted}
    read = {file for split in wanted for file in splits[split]}
    names = (file.relative_to(directory.resolve()) for file in directory.resolve().rglob("*") if str(file) not in read)
    shown = (name for name in names if name.suffix != ".md" and not any(part.startswith(".") for part in name.parts))
    return rows, sorted(str(name) for name in shown if (directory / name).is_file())


def _saved_rows(directory: Path, wanted: list[str]) -> dict[str, list[Row]]:
    """Reads a directory that `save_to_disk` of a Dataset or DatasetDict has written."""
    import datasets
    import pyarrow

    try:
        saved = datasets.load_from_disk(str(directory))
        named = saved if isinstance(saved, dict) else {saved.split or "train": saved}
        splits = {str(split): rows for split, rows in named.items()}
        rows = {split: numbered(f"{directory} ({split})", splits[split]) for split in wanted if split in splits}
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{directory}: not a readable data set of save_to_disk ({one_line(error)})") from error
    _check_splits(directory, splits, wanted)
    return {split: check_rows(directory, rows[split]) for split in wanted}


def _hub_rows(name: str, split: str) -> list[Row]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        dataset = datasets.load_dataset(name, split=split)
    # OSError: a missing dataset, no network or offline mode. ValueError: a wrong split or configuration.
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name}: not a local file, and split {split!r} could not be loaded from the Hugging Face Hub "
            f"({one_line(error)}); download the dataset {name} and set data.path to its file"
        ) from error
    return check_rows(name, numbered(f"{name} ({split})", dataset))
