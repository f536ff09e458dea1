"""results.json: the scores and costs of finished runs, and the summary over the seeds."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NotRequired, TypedDict, cast

import numpy as np

from flex_jax.checks import misfit
from flex_jax.errors import InputError
from flex_jax.files import read_text, to_plain, write_json
from flex_jax.fingerprint import digest_json


class Example(TypedDict):
    """A held-out record and the model's answer to it."""

    instruction: str
    context: str
    reference: str
    prediction: str


class ClientScores(TypedDict):
    """What evaluation measured for one client. A value that is not finite is None in the file."""

    eval_loss: float | None  # nats per response token
    perplexity: float | None
    rouge1: float | None  # F1 in percent
    rouge2: float | None
    rougeL: float | None
    examples: NotRequired[list[Example]]


class ClientEntry(ClientScores):
    """One client of a run."""

    id: int
    name: str
    train_examples: int
    eval_examples: int
    rounds_left_out: NotRequired[int]  # in which its update was not finite
    grafted_experts: NotRequired[list[list[int]]]  # of each MoE layer; empty if the method grafts none


class Parameters(TypedDict):
    """Parameter counts by role."""

    frozen: int
    shared: int
    personal_per_client: int
    trained_per_client: int


class Communication(TypedDict):
    """Bytes of the arrays that clients and server exchanged."""

    upload_bytes_per_client_round: int
    download_bytes_per_client_round: int
    total_bytes: int


class Timing(TypedDict):
    """Seconds, and tokens per second."""

    graft_s: float | None  # None if the method grafts no experts
    compile_s: float
    evaluation_s: float
    round_s_median: float | None
    train_tokens_per_s: float | None


class RunEntry(TypedDict):
    """A finished run: one method with one seed."""

    method: str
    seed: int
    identity: str  # digest of its config and of everything that it has read
    parameters: Parameters
    clients: list[ClientEntry]
    average: Mapping[str, float | None]  # of each metric, over the clients
    communication: Communication
    timing: Timing


class Failure(TypedDict):
    """A run that stopped with an error."""

    method: str
    seed: int
    error: str
    diverged: NotRequired[bool]


class SummaryRow(TypedDict):
    """One metric of one method over its seeds."""

    method: str
    metric: str
    mean: float | None
    std: float | None
    seeds: int


class Results(TypedDict):
    """The content of results.json."""

    runs: list[RunEntry]
    summary: list[SummaryRow]
    failures: list[Failure]
    sha256: NotRequired[str]  # of the runs as they stand in the file
    versions: dict[str, str]
    device: str


def read_results(workdir: Path | str) -> Results | None:
    """Returns the results in a work directory, or None without results.json. Raises InputError for any other file."""
    file = Path(workdir) / "results.json"
    if not file.exists():
        return None
    try:
        content: Any = json.loads(read_text(file))
        wrong = misfit(content, Results, "the file")
        if not wrong and content.get("sha256") != digest_json(content["runs"]):
            wrong = "its runs do not have their checksum"
    except (OSError, ValueError, RecursionError) as error:
        wrong = f"it cannot be read, {type(error).__name__}"
    if wrong:
        raise InputError(
            f"{file}: not a results file of this version ({wrong}): restore it, or move it away: the same command "
            "then evaluates the finished runs again"
        )
    return cast(Results, content)


def write_results(workdir: Path | str, results: Results) -> None:
    """Writes results.json atomically, with a checksum of its runs."""
    write_json(Path(workdir) / "results.json", results | {"sha256": digest_json(to_plain(results["runs"]))})


def average_scores(clients: Sequence[ClientScores]) -> dict[str, float]:
    """Returns the mean over the clients of every float metric, NaN if a client has no value."""
    metrics = dict.fromkeys(key for client in clients for key, value in client.items() if isinstance(value, float))
    return {key: float(np.array([client.get(key) for client in clients], float).mean()) for key in metrics}


def mean_and_std(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Returns the mean and the sample standard deviation (ddof 1), which is 0 for a single value.

    Both are None if there is no value or one is missing or not finite: the mean of the other values would flatter.
    """
    numbers = to_plain(list(values))
    if not numbers or None in numbers:
        return None, None
    return fmean(numbers), stdev(numbers) if len(numbers) > 1 else 0.0


def summarise(runs: Iterable[RunEntry]) -> list[SummaryRow]:
    """Returns mean and standard deviation over the seeds, for each average of each method."""
    averages: dict[tuple[str, str], list[float | None]] = {}
    for run in runs:
        for metric, value in run["average"].items():
            averages.setdefault((run["method"], metric), []).append(value)
    rows: list[SummaryRow] = []
    for (method, metric), seeds in averages.items():
        mean, std = mean_and_std(seeds)
        rows.append({"method": method, "metric": metric, "mean": mean, "std": std, "seeds": len(seeds)})
    return rows
