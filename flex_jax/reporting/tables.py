"""Text tables: the plan before a run and the summary after it. Plain ASCII, so any terminal and log can show them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flex_jax.results import Results, RunEntry, mean_and_std
from flex_jax.terminal import visible

Runs = dict[str, list[RunEntry]]  # of each method

SUMMARY_COLUMNS = "method|seeds|ROUGE-L|eval loss|up/round|down/round|frozen|shared|personal|s/round".split("|")
PLAN_COLUMNS = "method|clients|frozen|shared|personal|up|down|client|frozen|clients|activations|peak".split("|")
PLAN_GROUPS = {2: "parameters", 5: "sent/client/round", 7: "state of a", 8: "memory of a device"}  # by first column


def human_bytes(count: float) -> str:
    """Returns bytes in binary units: 1536 is "1.5 KiB"."""
    return _human(count, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def human_count(count: float) -> str:
    """Returns a number of parameters in short form: 14316000000 is "14.3B"."""
    return _human(count, 1000, ("", "K", "M", "B", "T"))


def _human(count: float, base: int, units: Sequence[str]) -> str:
    power = 0
    while abs(count) >= 999.5 and power < len(units) - 1:  # three digits are shown: 999.7 would be "1e+03"
        count, power = count / base, power + 1
    return f"{count:.3g}{units[power]}"


def mean(values: Iterable[float | None]) -> float | None:
    return mean_and_std(values)[0]


def mean_std(values: Sequence[float | None], plus_minus: str = "+-") -> str:
    """Returns the mean and the sample standard deviation, "43.13 +- 0.52", or the mean of a single value."""
    average, std = mean_and_std(values)
    if average is None:
        return "-"
    return f"{average:.2f} {plus_minus} {std:.2f}" if len(values) > 1 else f"{average:.2f}"


def ranked_runs(results: Results) -> Runs:
    """Returns the runs of each method, best mean ROUGE-L first; methods without a ROUGE-L come last."""
    runs: Runs = {}
    for run in results["runs"]:
        runs.setdefault(run["method"], []).append(run)

    def rank(method: str) -> float:
        rouge = mean(run["average"].get("rougeL") for run in runs[method])
        return math.inf if rouge is None else -rouge

    return {method: runs[method] for method in sorted(runs, key=rank)}


def client_values(runs: Iterable[RunEntry], metric: str) -> dict[int, list[float | None]]:
    """Returns a metric's value in each run, by client id."""
    values: dict[int, list[float | None]] = {}
    for run in runs:
        for client in run["clients"]:
            values.setdefault(client["id"], []).append(client.get(metric))
    return values


# What a run cost: its value, how to write it, and how to combine the seeds.
COSTS: dict[str, tuple[Callable[[RunEntry], float | None], Callable[[float], str], Callable[..., float | None]]] = {
    "up/round": (lambda run: run["communication"]["upload_bytes_per_client_round"], human_bytes, mean),
    "down/round": (lambda run: run["communication"]["download_bytes_per_client_round"], human_bytes, mean),
    "total sent": (lambda run: run["communication"]["total_bytes"], human_bytes, mean),
    "frozen": (lambda run: run["parameters"]["frozen"], human_count, mean),
    "shared": (lambda run: run["parameters"]["shared"], human_count, mean),
    "personal": (lambda run: run["parameters"]["personal_per_client"], human_count, mean),
    "compilation (s)": (lambda run: run["timing"]["compile_s"], "{:.1f}".format, max),  # later seeds reuse it
    "s/round": (lambda run: run["timing"]["round_s_median"], "{:.3g}".format, mean),
    "tokens/s": (lambda run: run["timing"]["train_tokens_per_s"], "{:,.0f}".format, mean),
}


def cost(column: str, runs: Iterable[RunEntry]) -> tuple[float | None, str]:
    """Returns a column of COSTS for the runs of one method, as a number and as text."""
    value, text, combine = COSTS[column]
    number = combine(map(value, runs))
    return number, "-" if number is None else text(number)


def diverged_methods(results: Results) -> list[str]:
    """Returns the methods of which a seed has diverged."""
    return list(dict.fromkeys(failed["method"] for failed in results["failures"] if failed.get("diverged")))


def summary_rows(results: Results, plus_minus: str = "+-") -> list[list[str]]:
    """Returns the cells of the summary under SUMMARY_COLUMNS, one row per method; those that diverged come last."""
    rows, diverged, ranked = [], diverged_methods(results), ranked_runs(results)
    for method in [*(method for method in ranked if method not in diverged), *diverged]:
        runs = ranked.get(method, [])
        scores = [[run["average"].get(metric) for run in runs] for metric in ("rougeL", "eval_loss")]
        cells = ["diverged"] * 2 if method in diverged else [mean_std(values, plus_minus) for values in scores]
        costs = [cost(column, runs)[1] if runs else "-" for column in SUMMARY_COLUMNS[4:]]
        rows.append([method, str(len(runs)), *cells, *costs])
    return rows


def summary_table(results: Results) -> str:
    """Returns the results as an aligned table: one row per method, ROUGE-L in percent, best first."""
    return _align([SUMMARY_COLUMNS, *summary_rows(results)])


def plan_table(plans: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table of what each method will cost: the fields of its `Plan`, with its name, clients and cohort."""
    rows = []
    for plan in plans:
        cohort, clients, client_bytes = plan["cohort"], plan["clients"], human_bytes(plan["client_bytes"])
        rows.append(
            [plan["method"], f"{clients}" if cohort == clients else f"{cohort} of {clients}"]
            + [human_count(plan[role]) for role in ("frozen", "shared", "personal_per_client")]
            + [human_bytes(plan["upload_bytes"]), human_bytes(plan["download_bytes"]), client_bytes]
            + [human_bytes(plan["frozen_bytes"]), f"{cohort} x {client_bytes}"]
            + [human_bytes(plan["activation_bytes"]), human_bytes(plan["peak_bytes"])]
        )
    return _align([PLAN_COLUMNS, *rows], PLAN_GROUPS)


def _align(rows: Sequence[Sequence[str]], groups: Mapping[int, str] | None = None) -> str:
    """Aligns the columns and draws a rule under the first row.

    `groups` are titles above the first row: each spans the columns from its key up to the next key.
    """
    groups, titles = groups or {}, ""
    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for (start, title), end in zip(groups.items(), [*groups, len(widths)][1:], strict=True):
        span = sum(widths[start:end]) + 2 * (end - start - 1)
        widths[start] += max(0, len(title) - span)
        titles = titles.ljust(sum(widths[:start]) + 2 * start) + title.center(span)
    first, *others = widths
    lines = ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([titles.rstrip(), *lines] if titles else lines)
