"""metrics.jsonl: what a run measured, one JSON object a line."""

import errno
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flex_jax.errors import InputError
from flex_jax.files import read_text, to_plain, write_text

HEAD = {"run": (str,), "method": (str,), "seed": (int,), "round": (int,), "client": (int, type(None))}  # of a line
Metrics = Sequence[Mapping[str, Any]]  # the lines of the file


class MetricsLog:
    """Appends to a metrics.jsonl file.

    Write a round's metrics before its checkpoint. When a run resumes, `rewind` drops the rounds after the checkpoint,
    so no round is missing and none appears twice.
    """

    def __init__(self, path: Path | str):
        """Drops a last line torn by a kill, so that the next line does not grow onto it. Raises as `read_metrics`."""
        self.path = Path(path)
        self._filter(lambda record: True)

    def write(self, run: str, method: str, seed: int, round: int, lines: Mapping[int | None, Mapping]) -> None:
        """Appends one round: in `lines` the metrics of each client by its id, and of the whole round under None."""
        head = {"run": run, "method": method, "seed": seed, "round": round}
        records = (to_plain({**head, "client": client, **metrics}) for client, metrics in lines.items())
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        with open(self.path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(text.encode()) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                file.truncate(size)  # the next line must not grow onto half of this one
                raise OSError(error.errno, error.strerror, str(self.path)) from error

    def rewind(self, run: str, round: int) -> None:
        """Drops, atomically, the lines of `run` from `round` on: a resumed run writes them again."""
        self._filter(lambda record: record["run"] != run or record["round"] < round)

    def _filter(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        if self.path.exists():
            selected = "".join(f"{line}\n" for line, record in _complete_lines(self.path) if wanted(record))
            if len(selected) != self.path.stat().st_size:  # JSON is written in ASCII, so characters are bytes
                write_text(self.path, selected)


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Returns the lines of a file, [] if there is none. Raises InputError for a line of another form, or one twice.

    A last line torn by a kill is left out.
    """
    return [record for _, record in _complete_lines(Path(path))]


def missing_rounds(metrics: Metrics, run: str, num_rounds: int) -> list[int]:
    """Returns the rounds, from 0, of a run that the file has no line for."""
    found = {line["round"] for line in metrics if line["run"] == run and line["client"] is None}
    return [round for round in range(num_rounds) if round not in found]


def _complete_lines(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yields the lines and what they say, without a torn last one. A line that is there twice is refused."""
    try:
        *lines, _ = read_text(path).split("\n")  # a torn line has no newline yet
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}): restore the file, or move it away") from error
    seen = set()
    for number, line in enumerate(lines, start=1):
        try:
            record: Any = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not _is_metrics_line(record):
            raise InputError(
                f"{path}, line {number}: not a metrics line (a JSON object with run, method, seed, round, client and "
                "numbers): restore the file, or move it away"
            )
        key = record["run"], record["round"], record["client"]
        if key in seen:
            raise InputError(f"{path}, line {number}: there is a line before of this run, round and client: remove one")
        seen.add(key)
        yield line, record


def _is_metrics_line(record: Any) -> bool:
    if not isinstance(record, dict) or not HEAD.keys() <= record.keys():
        return False
    heads = all(type(record[key]) in types for key, types in HEAD.items()) and 0 <= record["round"] < 2**31
    return heads and all(
        value is None or (type(value) in (int, float, bool) and abs(value) < 1e300)
        for key, value in record.items()
        if key not in HEAD
    )
