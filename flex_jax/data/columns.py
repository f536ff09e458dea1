"""Which columns of a source are the instruction, context and response of its records."""

import datetime
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from flex_jax.data.readers import NAME, Row, is_name, text_column
from flex_jax.errors import InputError

Record = dict[str, str]


class Columns(NamedTuple):
    """Names of a source's columns, and the category of its records if it has no column for it."""

    instruction: str
    response: str
    context: str | None
    category: str


# "auto" takes the column with one of these names, in any case.
ROLES = {
    "instruction": ("instruction", "question", "prompt", "query", "problem"),
    "context": ("context", "input", "passage"),
    "response": ("response", "output", "answer", "completion", "target", "solution"),
}
FIELDS = {
    "dolly": Columns("instruction", "response", "context", "dolly"),
    "alpaca": Columns("instruction", "output", "input", "alpaca"),
    "gsm8k": Columns("question", "answer", None, "math"),
    "prompt_completion": Columns("prompt", "completion", None, "prompt_completion"),
    "instruction_response": Columns("instruction", "response", None, "instruction_response"),
}
EXAMPLE = "data.fields=instruction=COLUMN,context=COLUMN,response=COLUMN"


def choose_columns(fields: str, rows: list[Row]) -> Columns:
    """Returns the columns that `fields` means: "auto", a key of FIELDS, or pairs such as "instruction=q,response=a".

    Pairs name the columns of some roles; the others are found as with "auto". `context=` means no context. Raises
    InputError if a role has no column or several.
    """
    found = dict.fromkeys(column for _, row in rows for column in row)
    chosen = _named(fields)
    for role, column in chosen.items():
        if column not in found and column and not (fields in FIELDS and role == "context"):
            raise InputError(f"data.fields={fields}: {rows[0][0]}: no column {column}; found are {listing(found)}")
    for role, names in ROLES.items():
        if role in chosen:
            continue
        candidates = [name for name in found if name.strip().lower() in names and name not in chosen.values()]
        if len(candidates) > 1:  # a column without any value is no loss
            candidates = [name for name in candidates if any(row.get(name) not in (None, "") for _, row in rows)]
        if len(candidates) > 1:
            raise InputError(
                f"{rows[0][0]}: {' and '.join(candidates)} may each be the {role}: choose one with "
                f"data.fields={role}={candidates[0]}"
            )
        chosen[role] = candidates[0] if candidates else ""
    if missing := [role for role in ("instruction", "response") if not chosen[role]]:
        names = "; ".join(f"{role} ({', '.join(ROLES[role])})" for role in missing)
        raise InputError(
            f"{rows[0][0]}: no column for the {' and the '.join(missing)}: the columns are {listing(found) or 'none'}; "
            f"recognised are {names}; name others with {EXAMPLE}"
        )
    context = chosen["context"] if chosen["context"] in found else None
    columns = Columns(chosen["instruction"], chosen["response"], context, "all")
    return next((named for named in FIELDS.values() if named[:3] == columns[:3]), columns)


def _named(fields: str) -> dict[str, str]:
    """Returns the column of every role that `fields` settles; an empty one means none."""
    if fields in FIELDS:
        columns = FIELDS[fields]
        return {role: getattr(columns, role) or "" for role in ROLES}
    if fields == "auto":
        return {}
    chosen = {}
    for pair in fields.split(","):
        role, equals, column = (part.strip() for part in pair.partition("="))
        if role not in ROLES or not equals or role in chosen or not (column or role == "context"):
            raise InputError(
                f"data.fields={fields!r} is unknown: choose auto, one of {', '.join(FIELDS)}, or name columns as in "
                f"{EXAMPLE}"
            )
        chosen[role] = column
    return chosen


def has_texts(row: dict[str, Any], columns: Columns) -> bool:
    """Returns whether instruction and response are there and not empty."""
    return all(not is_missing(row.get(column)) and str(row[column]).strip() for column in columns[:2])


def make_record(place: str, row: dict[str, Any], columns: Columns) -> Record:
    """Returns the record of a row. Raises InputError, with the place, if a text is missing or no text."""
    context, category = columns.context, row.get("category")
    mapped = {
        "instruction": text_column(place, row, columns.instruction),
        "context": ""
        if context is None or is_missing(row.get(context))
        else text_column(place, row, context, blank=True),
        "response": text_column(place, row, columns.response),
        "category": columns.category if is_missing(category) else text_column(place, row, "category"),
    }
    others = {
        key: _plain(value)
        for key, value in row.items()
        if key not in mapped and key not in columns[:3] and not is_missing(value) and not is_nested(value)
    }
    if not is_name(mapped["category"]):
        raise InputError(f"{place}: a category {NAME}, not {mapped['category']!r:.60}")
    return mapped | others


def is_missing(value: Any) -> bool:
    """Returns whether a value of a column means none: null, empty or not a number."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def is_nested(value: Any) -> bool:
    """Returns whether a value is none that a record keeps, such as a list."""
    return not isinstance(value, str | int | float | datetime.date)


def _plain(value: Any) -> str:
    """Returns a value as text; 1.0 is 1, as a column of integers with a gap has floats."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def listing(names: Iterable[str], most: int = 20) -> str:
    """Returns names as one line, the first of many."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
