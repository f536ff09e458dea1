"""report.html: everything a run found, in one file that loads nothing else."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from flex_jax.files import write_text
from flex_jax.metrics_log import Metrics
from flex_jax.reporting import plots, tables
from flex_jax.reporting.tables import Runs, mean
from flex_jax.results import ClientEntry, Results
from flex_jax.terminal import visible

EXAMPLES = 6  # the page shows at most this many, each from another client
LEADING = 10  # methods in a plot of lines or bars: more colours cannot be told apart

CSS = """
:root { color-scheme: light; --ink: #1f2933; --muted: #52606d; --line: #e4e7eb; --soft: #f5f7fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--soft); color: var(--ink);
       font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; } h2 { font-size: 19px; margin: 0 0 12px; }
p { margin: 0 0 12px; } small, figcaption { font-size: 13.5px; } .lead, small, figcaption { color: var(--muted); }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 24px; margin-top: 20px; }
.facts { display: flex; flex-wrap: wrap; gap: 12px 36px; margin: 20px 0 0; }
.facts dt { color: var(--muted); font-size: 12.5px; } .facts dd { margin: 0; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; } .wide { width: 100%; }
th, td { padding: 7px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line);
         vertical-align: top; }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; } tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } td small { display: block; }
.bar { height: 4px; border-radius: 2px; margin: 3px 0 0; }
.heat td, .heat th { border: 0; padding: 1px; text-align: center; vertical-align: middle; }
.heat td:first-child, .heat th:first-child { padding-right: 16px; text-align: left; }
.key { display: flex; gap: 4px; align-items: center; margin-bottom: 8px; } .key small { margin-right: 8px; }
.shade { border-radius: 3px; padding: 3px 8px; min-width: 38px; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 8px; }
figure { margin: 0 0 28px; } figure:last-child { margin-bottom: 0; } figcaption { margin-top: 6px; max-width: 90ch; }
figure svg { display: block; max-width: none; height: auto; }
figure svg text { font-family: "DejaVu Sans", Verdana, sans-serif !important; } /* laid out for these widths */
ul { margin: 0; padding-left: 20px; } li { margin-bottom: 6px; } summary { cursor: pointer; color: var(--muted); }
.example { border-top: 1px solid var(--line); padding: 14px 0; } .example:first-of-type { border-top: 0; }
.example dl { display: grid; grid-template-columns: minmax(110px, max-content) 1fr; gap: 6px 18px; margin: 8px 0 0; }
.example dt { color: var(--muted); }
.example dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 14em; overflow-y: auto; }
"""
HEAD = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>flex_jax report</title><style>{CSS}</style></head>
<body><main><h1>Federated personalisation report</h1>"""


def write_report(
    path: Path, results: Results, metrics: Metrics, *, notes: Sequence[str], config: Mapping, data: str = ""
) -> None:
    """Writes the page, atomically. The notes tell a reader how to judge the numbers. The config is shown in full.

    `data` says in a line which columns of the data are in the prompts.
    """
    runs = tables.ranked_runs(results)
    leading = dict(islice(runs.items(), LEADING))
    words = f" The {LEADING} best of {len(runs)} methods by ROUGE-L." if len(runs) > LEADING else ""
    curves = (
        "Loss on the response tokens by round, mean over the clients that took part. The band is one standard "
        f"deviation over the seeds.{words}"
    )
    bars = (
        "ROUGE-L of each client on its own test examples, mean over the seeds. The error bar is one standard "
        f"deviation over the seeds.{words}"
    )
    sections = {"Summary": _summary(results, runs, [*notes, *_troubles(results)])}
    if runs:
        sections |= {
            "Learning curves": _figure(plots.learning_curves(leading, metrics), curves),
            "Clients": _figure(plots.client_bars(leading), bars) + _client_table(runs),
            "Grafted experts": _grafts(runs),
            "Communication, size and time": _costs(runs),
            "Examples": _examples(runs),
        }
    sections["Configuration, versions and device"] = _environment(results, config, data)
    parts = [f"<section><h2>{title}</h2>{content}</section>" for title, content in sections.items() if content]
    write_text(path, "\n".join([HEAD, _facts(results, runs, metrics), *parts, "</main></body></html>\n"]))


def _facts(results: Results, runs: Runs, metrics: Metrics) -> str:
    facts = {
        "methods": len(runs),
        "seeds": ", ".join(map(str, sorted({run["seed"] for run in results["runs"]}))),
        "clients": max((len(run["clients"]) for run in results["runs"]), default=0),
        "rounds": max((line["round"] + 1 for line in metrics), default=0),
        "device": results["device"],
    }
    items = "".join(f"<div><dt>{key}</dt><dd>{_text(value)}</dd></div>" for key, value in facts.items())
    return f'<p class="lead">{_text(", ".join(runs))}</p><dl class="facts">{items}</dl>'


def _summary(results: Results, runs: Runs, notes: Sequence[str]) -> str:
    labels = _labels(runs)
    rows = [
        [labels.get(method, _text(method)), *map(_text, cells)] for method, *cells in tables.summary_rows(results, "±")
    ]
    listed = "".join(f"<li>{_text(note)}</li>" for note in notes)
    words = (
        "Scores are means over clients, then over seeds, ± one sample standard deviation over the seeds. ROUGE-L is F1 "
        "in percent. Up and down are the bytes of one client in a round. The columns frozen, shared and personal (of "
        "one client) count parameters."
    )
    table = _table(tables.SUMMARY_COLUMNS, rows, words=words)
    return table + (f'<h2 style="margin-top:24px">Notes</h2><ul>{listed}</ul>' if notes else "")


def _troubles(results: Results) -> Iterable[str]:
    """Yields a note for each run that failed, and for each client that was left out of rounds."""
    for failed in results["failures"]:
        yield f"{failed['method']} seed {failed['seed']} has no result: {failed['error']}"
    for run in results["runs"]:
        for client in run["clients"]:
            if rounds := client.get("rounds_left_out"):
                often = f"{rounds} round{'s' * (rounds > 1)}"
                yield (
                    f"{run['method']} seed {run['seed']}: client {client['name']} was left out of {often}: its update "
                    "was not finite."
                )


def _client_table(runs: Runs) -> str:
    clients = {client["id"]: client for seeds in runs.values() for client in seeds[0]["clients"]}
    rouge = {method: tables.client_values(seeds, "rougeL") for method, seeds in runs.items()}
    loss = {method: tables.client_values(seeds, "eval_loss") for method, seeds in runs.items()}
    rows = []
    for number, client in sorted(clients.items()):
        means = {method: mean(values[number]) for method, values in rouge.items()}
        best = max((value for value in means.values() if value is not None), default=None)
        row = [_text(client["name"]), str(client["train_examples"]), str(client["eval_examples"])]
        for method, value in means.items():
            score = tables.mean_std(rouge[method][number], "±")
            score = f"<b>{score}</b>" if value is not None and value == best else score
            row.append(f"{score}<small>{tables.mean_std(loss[method][number], '±')}</small>")
        rows.append(row)
    words = "Numbers of examples; ROUGE-L in percent, the best in bold, above the evaluation loss."
    return _table(["client", "train", "eval", *_labels(runs).values()], rows, words=words)


def _grafts(runs: Runs) -> str:
    """Shows the first seed of each method. Methods that grafted the same experts share a figure."""
    methods: dict[str, list[str]] = {}
    for method, (run, *_) in runs.items():
        if all(client.get("grafted_experts") for client in run["clients"]):
            methods.setdefault(_heat_map(run["clients"]), []).append(f"{method} seed {run['seed']}")
    caption = (
        ": the numbers of the pretrained experts that each client grafted in each MoE layer. The darker a cell, the "
        "more clients chose its expert in that layer."
    )
    return "".join(_figure(heat_map, ", ".join(names) + caption) for heat_map, names in methods.items())


def _heat_map(clients: Sequence[ClientEntry]) -> str:
    grafts = [client.get("grafted_experts", []) for client in clients]
    counts = [Counter(expert for experts in layer for expert in experts) for layer in zip(*grafts, strict=True)]
    rows = []
    for client, layers in zip(clients, grafts, strict=True):
        row = [_text(client["name"])]
        for experts, count in zip(layers, counts, strict=True):
            share = fmean(count[expert] for expert in experts) / len(clients)
            row.append(_shade(", ".join(map(str, experts)), share))
        rows.append(row)
    key = "".join(_shade(f"{percent}%", percent / 100) for percent in (10, 40, 70, 100))
    key = f'<div class="key"><small>clients that chose this expert in this layer</small>{key}</div>'
    return key + _table(["MoE layer", *map(str, range(len(counts)))], rows, "heat")


def _shade(text: str, share: float) -> str:
    return f'<div class="shade" style="background:rgb(0 114 178 / {60 * share:.0f}%)">{text}</div>'


def _costs(runs: Runs) -> str:
    rows = [[label] for label in _labels(runs).values()]
    for column in tables.COSTS:
        costs = [tables.cost(column, seeds) for seeds in runs.values()]
        most = max((number for number, _ in costs if number), default=1)
        for row, (number, text), colour in zip(rows, costs, plots.method_colours(runs).values(), strict=True):
            bar = f'<div class="bar" style="background:{colour};width:{100 * (number or 0) / most:.1f}%"></div>'
            row.append(text + bar)
    words = (
        "Means over the seeds. Up and down are the bytes of the arrays that one client sends and receives in a round. "
        "Total sent is for all clients and rounds, both ways. Parameters are frozen (one copy for all clients), "
        "shared (trained and averaged) or personal to a client (trained and never sent). Compilation is that of one "
        "seed: the others reuse it. The seconds of a round are a median. Tokens are those trained on."
    )
    return _table(["method", *tables.COSTS], rows, words=words)


def _examples(runs: Runs) -> str:
    """Shows the first example of the first clients, with the answer of each method's first seed."""
    answers: dict[tuple[str, str, str, str], dict[str, str]] = {}
    for method, label in _labels(runs).items():
        for client in runs[method][0]["clients"]:
            for example in client.get("examples", [])[:1]:
                key = (client["name"], example["instruction"], example["context"], example["reference"])
                answers.setdefault(key, {})[label] = example["prediction"]
    blocks = []
    for (name, *record), predictions in islice(answers.items(), EXAMPLES):
        fields = dict(zip(("instruction", "context", "reference"), record, strict=True)) | predictions
        items = "".join(f"<dt>{label}</dt><dd>{_text(text)}</dd>" for label, text in fields.items() if text)
        blocks.append(f'<div class="example"><b>{_text(name)}</b><dl>{items}</dl></div>')
    return "".join(blocks)


def _environment(results: Results, config: Mapping, data: str) -> str:
    versions = _table(["package", "version"], (map(_text, item) for item in results["versions"].items()), "")
    keys = _table(["key", "value"], (map(_text, item) for item in _flat(config)), "")
    return (
        (f"<p>Data: {_text(data)}</p>" if data else "") + f"<p>Device: {_text(results['device'])}</p>{versions}"
        f"<details><summary>Every config key</summary>{keys}</details>"
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _labels(runs: Runs) -> dict[str, str]:
    """Returns the HTML of each method's name, next to its colour."""
    swatch = '<span class="swatch" style="background:{}"></span>{}'
    return {method: swatch.format(colour, _text(method)) for method, colour in plots.method_colours(runs).items()}


def _text(value: Any) -> str:
    return escape(visible(str(value)))


def _table(header: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "wide", words: str = "") -> str:
    """Returns a table, under the words that explain it. Its cells must be HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    table = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return (f"<p><small>{words}</small></p>" if words else "") + f'<div class="scroll">{table}</div>'


def _figure(drawing: str, caption: str) -> str:
    drawing = re.sub(r' xmlns(:\w+)?="[^"]*"', "", drawing)  # HTML knows the namespaces of SVG
    return f'<figure><div class="scroll">{drawing}</div><figcaption>{_text(caption)}</figcaption></figure>'
