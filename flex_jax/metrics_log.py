"""metrics.jsonl: what a run measured, one JSON object a line."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flex_jax.errors import InputError
from flex_jax.files import to_plain, write_text

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
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record, allow_nan=False) + "\n" for record in records))

    def rewind(self, run: str, round: int) -> None:
        """Drops, atomically, the lines of `run` from `round` on: a resumed run writes them again."""
        self._filter(lambda record: record["run"] != run or record["round"] < round)

    def _filter(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        if self.path.exists():
            selected = "".join(f"{line}\n" for line, record in _complete_lines(self.path) if wanted(record))
            if len(selected) != self.path.stat().st_size:  # JSON is written in ASCII, so characters are bytes
                write_text(self.path, selected)


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Returns the lines of a file, without a last line torn by a kill. Raises InputError for a line of another form."""
    return [record for _, record in _complete_lines(Path(path))]


def _complete_lines(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")  # a torn line has no newline yet
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
