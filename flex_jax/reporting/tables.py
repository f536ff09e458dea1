"""Text tables: the plan before a run, the summary after it. Plain ASCII, so that any terminal and log shows them."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

SUMMARY_COLUMNS = (
    "method",
    "seeds",
    "ROUGE-L",
    "eval loss",
    "up/round",
    "down/round",
    "frozen",
    "shared",
    "personal",
    "s/round",
)
PLAN_COLUMNS = (
    "method",
    "clients",
    "frozen",
    "shared",
    "personal",
    "up",
    "down",
    "client",
    "frozen",
    "clients",
    "activations",
    "peak",
)
PLAN_GROUPS = {2: "parameters", 5: "sent/client/round", 7: "held by a", 8: "memory of a device"}


def human_bytes(count: float) -> str:
    """Bytes in binary units: 1536 is "1.5 KiB"."""
    return _human(count, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def human_count(count: float) -> str:
    """A number of parameters: 14316000000 is "14.3B"."""
    return _human(count, 1000, ("", "K", "M", "B", "T"))


def _human(count: float, base: int, units: Sequence[str]) -> str:
    power = 0
    while abs(count) >= 999.5 and power < len(units) - 1:  # three digits are shown: 999.7 would be "1e+03"
        count, power = count / base, power + 1
    return f"{count:.3g}{units[power]}"


def mean_std(mean: float | None, std: float | None, seeds: int) -> str:
    """ "43.13 +- 0.52"; without a spread for one seed, "-" for no number."""
    if mean is None:
        return "-"
    return f"{mean:.2f} +- {std:.2f}" if seeds > 1 else f"{mean:.2f}"


def mean_number(values: Iterable[float | None], form: str) -> str:
    """The mean in the given format; "-" where a value is missing."""
    values = list(values)
    return "-" if None in values else format(fmean(values), form)


def ranked_methods(results: Mapping) -> list[str]:
    """The methods by mean ROUGE-L, best first; those without one last, in the order of the runs."""
    rouge = {row["method"]: row["mean"] for row in results["summary"] if row["metric"] == "rougeL"}
    methods = dict.fromkeys(run["method"] for run in results["runs"])
    return sorted(methods, key=lambda method: -rouge[method] if rouge.get(method) is not None else float("inf"))


def summary_rows(results: Mapping) -> list[list[str]]:
    """The cells of the summary under SUMMARY_COLUMNS, one row a method, best ROUGE-L first."""
    summary = {(row["method"], row["metric"]): row for row in results["summary"]}

    def score(method: str, metric: str) -> str:
        row = summary.get((method, metric))
        return mean_std(row["mean"], row["std"], row["seeds"]) if row else "-"

    rows = []
    for method in ranked_methods(results):
        runs = [run for run in results["runs"] if run["method"] == method]
        parameters = runs[0]["parameters"]  # the seed does not change them
        rows.append(
            [
                method,
                str(len(runs)),
                score(method, "rougeL"),
                score(method, "eval_loss"),
                *(
                    human_bytes(runs[0]["communication"][f"{way}_bytes_per_client_round"])
                    for way in ("upload", "download")
                ),
                human_count(parameters["frozen"]),
                human_count(parameters["shared"]),
                human_count(parameters["personal_per_client"]),
                mean_number((run["timing"]["round_s_median"] for run in runs), ".3g"),
            ]
        )
    return rows


def summary_table(results: Mapping) -> str:
    """The content of results.json as an aligned table, best ROUGE-L (percent, mean +- std over seeds) first."""
    return _align([SUMMARY_COLUMNS, *summary_rows(results)])


def plan_table(plans: Sequence[Mapping]) -> str:
    """What each method is about to cost, before anything is computed.

    Args:
      plans: one mapping a method. Parameter counts: frozen, shared, personal_per_client. Numbers of clients: clients,
        cohort (those that train at once). Bytes: frozen_bytes (one copy for all), client_bytes (adapters and
        optimiser state of one client), activation_bytes (of the whole cohort), peak_bytes, upload_bytes and
        download_bytes (one client, one round).
    """
    rows = [
        [
            plan["method"],
            f"{plan['cohort']} of {plan['clients']}" if plan["cohort"] != plan["clients"] else str(plan["clients"]),
            human_count(plan["frozen"]),
            human_count(plan["shared"]),
            human_count(plan["personal_per_client"]),
            human_bytes(plan["upload_bytes"]),
            human_bytes(plan["download_bytes"]),
            human_bytes(plan["client_bytes"]),
            human_bytes(plan["frozen_bytes"]),
            f"{plan['cohort']} x {human_bytes(plan['client_bytes'])}",
            human_bytes(plan["activation_bytes"]),
            human_bytes(plan["peak_bytes"]),
        ]
        for plan in plans
    ]
    return _align([PLAN_COLUMNS, *rows], PLAN_GROUPS)


def _align(rows: Sequence[Sequence[str]], groups: Mapping[int, str] | None = None) -> str:
    """Rows as lines of equal columns, the first one left-aligned, a rule under the header.

    `groups` puts a line above the header: the text over the columns from that one up to the next group.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if groups:
        ends = [*list(groups)[1:], len(widths)]
        for (start, text), end in zip(groups.items(), ends, strict=True):  # room for the text over narrow columns
            widths[start] += max(0, len(text) - sum(widths[start:end]) - 2 * (end - start - 1))
    lines = [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    if groups:
        above = ""
        for (start, text), end in zip(groups.items(), ends, strict=True):
            above = above.ljust(sum(widths[:start]) + 2 * start)
            above += text.center(sum(widths[start:end]) + 2 * (end - start - 1))
        lines.insert(0, above.rstrip())
    return "\n".join(lines)
