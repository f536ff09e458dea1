"""The report's plots, as SVG text.

A method has the same colour in every plot. Text in the SVG stays text: it can be selected and searched. Figures are
made without pyplot, which would need global state.
"""

import io
import math
from collections.abc import Iterable
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flex_jax.metrics_log import Metrics
from flex_jax.reporting.tables import Runs, client_values

# Okabe and Ito's colours, which colour-blind readers can tell apart, then others for long lists of methods.
PALETTE = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #7A5195".split()
PALETTE += "#8C564B #6B6B6B #A6A100 #003F5C #F28E8E #7FC97F #B39DDB".split()
WIDTH = 10.0  # inches: 960 pixels at 100%, the width of the page's column
BARS_PER_ROW = 48
LABEL_LENGTH = 24
INK, MUTED, GRID = "#1f2933", "#52606d", "#e4e7eb"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a client's name may contain a dollar sign
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.axisbelow": True,
    "axes.labelcolor": MUTED,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "lines.linewidth": 1.8,
    "lines.markersize": 3.5,
}
styled = matplotlib.rc_context(STYLE)  # decorates every function that draws


def method_colours(methods: Iterable[str]) -> dict[str, str]:
    """Returns a colour for each method. The first methods get the colours that are easiest to tell apart."""
    return dict(zip(methods, cycle(PALETTE), strict=False))


@styled
def learning_curves(runs: Runs, metrics: Metrics) -> str:
    """Draws the training loss over the rounds and, if it was measured, the evaluation loss next to it.

    A line is the mean over clients, then seeds. Its band is one standard deviation over the seeds.
    """
    titles = {"train_loss": "training loss"}
    if any("eval_loss" in line for line in metrics):
        titles["eval_loss"] = "evaluation loss"
    figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles.items(), strict=True):
        for method, colour in method_colours(runs).items():
            rounds, means, stds = _curve(metrics, method, key)
            axes.plot(rounds, means, color=colour, label=method, marker="o" if len(rounds) <= 25 else "")
            axes.fill_between(rounds, means - stds, means + stds, color=colour, alpha=0.15, linewidth=0)
        axes.set(title=title.capitalize(), xlabel="round", ylabel=f"{title} (nats per token)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(True)
    return _svg(figure, "learning")


@styled
def client_bars(runs: Runs) -> str:
    """Draws each client's ROUGE-L under each method: the mean over the seeds, one standard deviation as error bar."""
    colours, width = method_colours(runs), 0.8 / len(runs)
    scores = {method: client_values(seeds, "rougeL") for method, seeds in runs.items()}
    names = {client["id"]: _short(client["name"]) for seeds in runs.values() for client in seeds[0]["clients"]}
    ids = sorted(names)
    rows = math.ceil(len(ids) * len(runs) / BARS_PER_ROW)
    per_row = math.ceil(len(ids) / rows)
    # A character is about 0.08 inches wide. Names that would touch are turned.
    turned = max(map(len, names.values())) * 0.08 > 0.85 * (WIDTH - 1) / per_row
    rotation: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if turned else {}
    error_style = {"ecolor": INK, "elinewidth": 1.0, "capsize": min(3.0, 60 * width / per_row)}
    height = 0.6 + rows * ((3.2 if rows == 1 else 2.4) + (0.5 if turned else 0))
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    for row, axes in enumerate(figure.subplots(rows, 1, squeeze=False, sharey=True)[:, 0]):
        shown = ids[row * per_row : (row + 1) * per_row]
        for index, (method, colour) in enumerate(colours.items()):
            values = [np.array(scores[method][client], float) for client in shown]  # None becomes NaN
            means, stds = [value.mean() for value in values], [_std(value) for value in values]
            places = np.arange(len(shown)) + (index - (len(runs) - 1) / 2) * width
            yerr = stds if any(stds) else None
            axes.bar(places, means, width * 0.92, color=colour, label=method, yerr=yerr, error_kw=error_style)
        axes.set(ylabel="ROUGE-L (%)", xlim=(-0.6, per_row - 0.4))  # bars of a short last row stay as wide
        axes.set_xticks(range(len(shown)), [names[client] for client in shown], **rotation)
        axes.tick_params(axis="x", length=0)
        axes.grid(True, axis="y")
    return _svg(figure, "clients")


def _curve(metrics: Metrics, method: str, key: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Returns the rounds, and over the seeds the mean and the standard deviation of the clients' mean of `key`."""
    values: dict[int, dict[int, list[float | None]]] = {}
    for line in metrics:
        if line["method"] == method and line["client"] is not None and key in line:
            values.setdefault(line["round"], {}).setdefault(line["seed"], []).append(line[key])
    rounds = sorted(values)
    # None, a diverged loss, becomes NaN and leaves a gap.
    seeds = [np.array([np.array(clients, float).mean() for clients in values[round].values()]) for round in rounds]
    return rounds, np.array([means.mean() for means in seeds]), np.array([_std(means) for means in seeds])


def _std(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _short(name: str) -> str:
    return name if len(name) <= LABEL_LENGTH else name[: LABEL_LENGTH - 1] + "…"


def _svg(figure: Figure, name: str) -> str:
    """Returns the figure, with a legend, as one <svg> element.

    The same drawing gives the same text. The name makes its ids unique in the page.
    """
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = math.ceil(len(labels) / math.ceil(len(labels) / 7))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(text, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()
    return svg[svg.index("<svg") :]  # without the XML prologue, which HTML does not allow
