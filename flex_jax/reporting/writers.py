"""What a run leaves on disk: metrics.jsonl line by line, whole files at once, and the summary over seeds."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean, stdev

from flex_jax.errors import InputError


def write_text(path: Path | str, text: str) -> None:
    """Writes a file atomically: a reader, or a kill at any moment, finds the old content or the new, whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # the same directory: a rename across file systems is a copy
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path | str, obj) -> None:
    """Writes `obj` as indented JSON, atomically; arrays and their scalars become numbers, NaN and infinities null."""
    write_text(path, json.dumps(_plain(obj), indent=2, allow_nan=False) + "\n")


def read_metrics(path: Path | str) -> list[dict]:
    """The lines of a metrics.jsonl; a last line torn by a kill is left out.

    Raises: InputError naming the file and the line where a line is not a JSON object.
    """
    return [record for _, record in _complete_lines(Path(path))]


class MetricsWriter:
    """Appends to metrics.jsonl, one JSON object a line.

    Opening drops a last line torn by a kill, so that the next line does not grow onto it. Write a round's metrics
    before its checkpoint: on resume, `rewind` takes away what the checkpoint does not know of, and nothing is lost.

    Raises: InputError where the file that is there is not a metrics.jsonl.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._keep(lambda record: True)

    def write(self, run: str, method: str, seed: int, round: int, lines: Mapping[int | None, Mapping]) -> None:
        """Appends the lines of one round and flushes them.

        Args:
          lines: numbers by name, for each client id, and for None (the round as a whole).
        """
        records = (
            {"run": run, "method": method, "seed": seed, "round": round, "client": client, **numbers}
            for client, numbers in lines.items()
        )
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(_plain(record), allow_nan=False) + "\n" for record in records))

    def rewind(self, run: str, round: int) -> None:
        """Drops, atomically, the lines of `run` from `round` on: those that a resumed run writes again."""
        self._keep(lambda record: record["run"] != run or record["round"] < round)

    def _keep(self, wanted) -> None:
        if not self.path.exists():
            return
        kept = "".join(f"{line}\n" for line, record in _complete_lines(self.path) if wanted(record))
        if len(kept) != self.path.stat().st_size:  # the lines are ASCII: characters are bytes
            write_text(self.path, kept)


def summarise(runs: Iterable[Mapping]) -> list[dict]:
    """Mean and sample standard deviation (ddof 1; 0.0 for one seed) over the seeds, of every average of every method.

    A value that is missing because a seed diverged makes the mean null: the mean of the seeds that survived
    would flatter the method.

    Returns: [{"method", "metric", "mean", "std", "seeds"}], methods and metrics in the order of the runs.
    """
    values: dict[tuple[str, str], list] = {}
    for run in runs:
        for metric, value in run["average"].items():
            values.setdefault((run["method"], metric), []).append(_plain(value))
    rows = []
    for (method, metric), seeds in values.items():
        finite = None not in seeds
        rows.append(
            {
                "method": method,
                "metric": metric,
                "mean": fmean(seeds) if finite else None,
                "std": (stdev(seeds) if len(seeds) > 1 else 0.0) if finite else None,
                "seeds": len(seeds),
            }
        )
    return rows


def _plain(value):
    """`value` in JSON's own types; what is not a finite number becomes None, as JSON has no NaN."""
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _complete_lines(path: Path) -> Iterable[tuple[str, dict]]:
    """The lines that end in a newline, with their content: what comes after the last newline was torn by a kill."""
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict) or not {"run", "round"} <= record.keys():
            raise InputError(
                f"{path}, line {number}: not a metrics line (a JSON object with run and round): "
                "move the file away or use another work directory"
            )
        yield line, record
