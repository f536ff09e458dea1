"""report.html: everything a run found, in one file that needs no other and no network."""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean, stdev

from flex_jax.reporting import plots
from flex_jax.reporting.tables import SUMMARY_COLUMNS, human_bytes, mean_number, mean_std, ranked_methods, summary_rows
from flex_jax.reporting.writers import write_text

EXAMPLES = 6  # shown at most, each from another client
LEADING = 10  # methods in a plot of lines or bars, whose colours can still be told apart

CSS = """
:root { color-scheme: light; --ink: #1f2933; --muted: #52606d; --line: #e4e7eb; --soft: #f5f7fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--soft); color: var(--ink);
       font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 0 0 12px; }
p { margin: 0 0 12px; }
.lead, figcaption, small { color: var(--muted); }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 24px; margin-top: 20px; }
.facts { display: flex; flex-wrap: wrap; gap: 12px 36px; margin: 20px 0 0; }
.facts dt { color: var(--muted); font-size: 12.5px; } .facts dd { margin: 0; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
table.wide { width: 100%; }
th, td { padding: 7px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line);
         vertical-align: top; }
th { color: var(--muted); font-weight: 600; } tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; }
td small { display: block; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 8px; }
figure { margin: 0 0 28px; } figure:last-child { margin-bottom: 0; }
figure svg { display: block; max-width: none; height: auto; }
figure svg text { font-family: "DejaVu Sans", Verdana, sans-serif !important; } /* laid out for these widths */
figcaption { margin-top: 6px; font-size: 13.5px; max-width: 90ch; }
ul { margin: 0; padding-left: 20px; } li { margin-bottom: 6px; }
summary { cursor: pointer; color: var(--muted); }
.example { border-top: 1px solid var(--line); padding: 14px 0; } .example:first-of-type { border-top: 0; }
.example dl { display: grid; grid-template-columns: minmax(110px, max-content) 1fr; gap: 6px 18px; margin: 8px 0 0; }
.example dt { color: var(--muted); }
.example dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 14em; overflow-y: auto; }
"""


def write_report(
    path: Path | str,
    results: Mapping,
    metrics: Sequence[Mapping],
    *,
    notes: Sequence[str],
    config: Mapping | None = None,
) -> None:
    """Writes the page, atomically.

    Args:
      results: the content of results.json; a client may carry "examples", a list of
        {"instruction", "context", "reference", "prediction"}.
      metrics: the lines of metrics.jsonl.
      notes: paragraphs a reader needs to judge the numbers, such as how the comparison was made fair.
      config: the content of config.json, shown in full.
    """
    page = "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<title>flex_jax report</title>",
            f"<style>{CSS}</style>",
            "</head>",
            "<body>",
            "<main>",
            _header(results, metrics),
            _summary(results, notes),
            _learning(results, metrics),
            _clients(results),
            _grafts(results),
            _costs(results),
            _examples(results),
            _environment(results, config),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )
    write_text(path, page)


def _header(results: Mapping, metrics: Sequence[Mapping]) -> str:
    runs = results["runs"]
    facts = {
        "methods": len(_methods(results)),
        "seeds": ", ".join(str(s) for s in sorted({r["seed"] for r in runs})),
        "clients": max(len(run["clients"]) for run in runs),
        "rounds": max((row["round"] + 1 for row in metrics), default=0),
        "device": results["device"],
    }
    items = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(str(value))}</dd></div>" for key, value in facts.items())
    return (
        f'<h1>Federated personalisation report</h1><p class="lead">{escape(", ".join(_methods(results)))}</p>'
        f'<dl class="facts">{items}</dl>'
    )


def _summary(results: Mapping, notes: Sequence[str]) -> str:
    rows = [[_swatch(results, row[0]), *map(_cell, row[1:])] for row in summary_rows(results)]
    text = (
        "Mean over clients, then over seeds, ± one sample standard deviation over the seeds. ROUGE-L is F1 in "
        "percent. Up and down: bytes of one client in a round. Columns frozen, shared and personal (of one client) "
        "count parameters."
    )
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return _section(
        "Summary",
        f"<p><small>{text}</small></p>",
        _table(map(_cell, SUMMARY_COLUMNS), rows),
        f'<h2 style="margin-top:24px">Notes</h2><ul>{listed}</ul>' if notes else "",
    )


def _leading(results: Mapping) -> tuple[Mapping, str]:
    """The results of the best methods alone where there are many, and the words for a caption."""
    methods = ranked_methods(results)
    best = methods[:LEADING]
    words = f" The {LEADING} best of {len(methods)} methods by ROUGE-L." if len(methods) > LEADING else ""
    return {**results, "runs": [run for run in results["runs"] if run["method"] in best]}, words


def _learning(results: Mapping, metrics: Sequence[Mapping]) -> str:
    leading, words = _leading(results)
    return _section(
        "Learning curves",
        _figure(
            plots.learning_curves(leading, metrics),
            "Loss on the response tokens by round, mean over the clients that took part. The band is one standard "
            f"deviation over the seeds.{words}",
        ),
    )


def _clients(results: Mapping) -> str:
    methods = ranked_methods(results)
    clients = {client["id"]: client for run in reversed(results["runs"]) for client in run["clients"]}
    rows = []
    for number, client in sorted(clients.items()):
        rouge = {method: _values(results, method, number, "rougeL") for method in methods}
        means = {method: fmean(values) for method, values in rouge.items() if values and None not in values}
        best = max(means.values(), default=None)
        cells = []
        for method in methods:
            score, loss = _spread(rouge[method]), _spread(_values(results, method, number, "eval_loss"))
            cells.append(
                (f"<b>{score}</b>" if best is not None and means.get(method) == best else score)
                + f"<small>{loss}</small>"
            )
        rows.append([_cell(client["name"]), _cell(client["train_examples"]), _cell(client["eval_examples"]), *cells])
    header = ["client", "train", "eval", *(_swatch(results, method) for method in methods)]
    leading, words = _leading(results)
    return _section(
        "Clients",
        _figure(
            plots.client_bars(leading),
            "ROUGE-L of each client on its own test examples, mean over the seeds; "
            f"the error bar is one standard deviation over the seeds.{words}",
        ),
        "<p><small>Examples to train and to evaluate; ROUGE-L in percent, the best in bold, above the evaluation "
        "loss.</small></p>",
        _table(header, rows),
    )


def _grafts(results: Mapping) -> str:
    """A figure for each choice of experts, whose caption names the methods that made it."""
    alike: dict[str, list[Mapping]] = {}
    for method in _methods(results):
        run = next(run for run in results["runs"] if run["method"] == method)
        grafts = [client.get("grafted_experts") for client in run["clients"]]
        if grafts and all(grafts):
            alike.setdefault(f"{run['seed']} {grafts}", []).append(run)
    figures = [
        _figure(
            plots.grafted_experts(runs[0]["clients"]),
            f"{', '.join(run['method'] for run in runs)}, seed {runs[0]['seed']}: the number of the pretrained expert that "
            "each client grafted in each MoE layer. Darker cells: more clients chose that expert in that layer.",
        )
        for runs in alike.values()
    ]
    return _section("Grafted experts", *figures) if figures else ""


def _costs(results: Mapping) -> str:
    rows = []
    for method in _methods(results):
        runs = [run for run in results["runs"] if run["method"] == method]
        compilation = max(run["timing"]["compile_s"] for run in runs)  # later seeds use the first's
        forms = {"round_s_median": ".3g", "train_tokens_per_s": ",.0f"}
        times = [mean_number((run["timing"][key] for run in runs), form) for key, form in forms.items()]
        total = fmean(run["communication"]["total_bytes"] for run in runs)
        rows.append([_swatch(results, method), f"{compilation:.1f}", *times, human_bytes(total)])
    header = ["method", "compilation, all seeds (s)", "round, median (s)", "training tokens/s", "sent in all, per seed"]
    return _section(
        "Communication, size and time",
        _figure(
            plots.bytes_per_round(results),
            "Bytes of the arrays handed over between one client and the server in one round.",
        ),
        _figure(
            plots.parameters_by_role(results),
            "Parameters by role. Frozen: one copy for all clients. Shared: "
            "trained and averaged. Personal: trained and never sent.",
        ),
        _table(header, rows),
    )


def _examples(results: Mapping) -> str:
    """The first example of the first clients, with the answer of every method's first seed to it."""
    answers: dict[tuple, dict[str, str]] = {}
    for method in _methods(results):
        run = next(run for run in results["runs"] if run["method"] == method)
        for client in run["clients"]:
            for example in client.get("examples", [])[:1]:
                key = (client["name"], example["instruction"], example["context"], example["reference"])
                answers.setdefault(key, {})[method] = example["prediction"]
    blocks = []
    for (name, instruction, context, reference), predictions in list(answers.items())[:EXAMPLES]:
        fields = {"instruction": instruction, "context": context, "reference": reference}
        lines = [(escape(label), text) for label, text in fields.items() if text]
        lines += [(_swatch(results, method), text) for method, text in predictions.items()]
        items = "".join(f"<dt>{label}</dt><dd>{escape(text)}</dd>" for label, text in lines)
        blocks.append(f'<div class="example"><b>{escape(str(name))}</b><dl>{items}</dl></div>')
    return _section("Examples", *blocks) if blocks else ""


def _environment(results: Mapping, config: Mapping | None) -> str:
    versions = _table(["package", "version"], [[_cell(k), _cell(v)] for k, v in results["versions"].items()], "")
    device = f"<p>Device: {escape(str(results['device']))}</p>"
    if config is None:
        return _section("Versions and device", device, versions)
    rows = [[_cell(key), _cell(value)] for key, value in _flat(config)]
    return _section(
        "Configuration, versions and device",
        device,
        versions,
        f"<details><summary>Every config key</summary>{_table(['key', 'value'], rows, '')}</details>",
    )


def _methods(results: Mapping) -> list[str]:
    return list(dict.fromkeys(run["method"] for run in results["runs"]))


def _values(results: Mapping, method: str, client: int, metric: str) -> list:
    """One number a seed."""
    return [
        row.get(metric)
        for run in results["runs"]
        if run["method"] == method
        for row in run["clients"]
        if row["id"] == client
    ]


def _spread(values: list) -> str:
    if not values or None in values:
        return "-"
    return _cell(mean_std(fmean(values), stdev(values) if len(values) > 1 else 0.0, len(values)))


def _flat(tree: Mapping, prefix: str = "") -> Iterable[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _swatch(results: Mapping, method: str) -> str:
    return f'<span class="swatch" style="background:{plots.method_colours(results)[method]}"></span>{escape(method)}'


def _cell(value) -> str:
    return escape(str(value)).replace("+-", "±")


def _table(header: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "wide") -> str:
    """A table of cells that are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    table = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _figure(svg: str, caption: str) -> str:
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows the namespaces
    return f'<figure><div class="scroll">{svg}</div><figcaption>{escape(caption)}</figcaption></figure>'


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"
