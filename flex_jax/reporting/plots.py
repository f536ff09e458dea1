"""The report's plots, as SVG text. Figures are made without pyplot: no global state, no display.

A method has the same colour in every plot. Text stays text in the SVG: selectable, searchable, small.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from flex_jax.reporting.tables import human_bytes, human_count, ranked_methods

# Okabe and Ito's colours, told apart by colour-blind readers, then others for long lists of methods.
PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7A5195",
    "#8C564B",
    "#6B6B6B",
    "#A6A100",
    "#003F5C",
    "#F28E8E",
    "#7FC97F",
    "#B39DDB",
)
WIDTH = 10.0  # inches: 960 pixels at 100%, the width of the page's column
BARS_A_ROW = 48
LABEL_LENGTH = 24
INK, MUTED, GRID = "#1f2933", "#52606d", "#e4e7eb"
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a client's name may hold a dollar sign
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.axisbelow": True,
    "axes.labelcolor": MUTED,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def method_colours(results: Mapping) -> dict[str, str]:
    """A colour for each method, the best first: in a long list those that lead can be told apart."""
    return {method: PALETTE[index % len(PALETTE)] for index, method in enumerate(ranked_methods(results))}


def learning_curves(results: Mapping, metrics: Sequence[Mapping]) -> str:
    """Training loss over the rounds, and beside it the evaluation loss where it was measured on the way.

    A line is the mean over clients, then seeds; its band is one standard deviation over the seeds.
    """
    wanted = {"train_loss": "training loss", "eval_loss": "evaluation loss"}
    panels = {key: title for key, title in wanted.items() if key == "train_loss" or any(key in row for row in metrics)}

    def draw(figure: Figure) -> None:
        for axes, (key, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            for method, colour in method_colours(results).items():
                rounds, means, stds = _curve(metrics, method, key)
                axes.plot(
                    rounds, means, color=colour, label=method, marker="o" if len(rounds) <= 25 else "", markersize=3.5
                )
                axes.fill_between(rounds, means - stds, means + stds, color=colour, alpha=0.15, linewidth=0)
            axes.set(title=title.capitalize(), xlabel="round", ylabel=f"{title} (nats per token)")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.grid(True)
        _legend(figure, axes)

    return _svg("learning", (WIDTH, 4.0), draw)


def client_bars(results: Mapping) -> str:
    """ROUGE-L of each client under each method: mean over the seeds, one standard deviation as an error bar."""
    colours = method_colours(results)
    names = {client["id"]: client["name"] for run in results["runs"] for client in run["clients"]}
    scores: dict[tuple, list[float]] = {}
    for run in results["runs"]:
        for client in run["clients"]:
            value = client.get("rougeL")
            scores.setdefault((run["method"], client["id"]), []).append(math.nan if value is None else value)
    ids = sorted(names)
    rows = math.ceil(len(ids) * len(colours) / BARS_A_ROW)
    a_row = math.ceil(len(ids) / rows)
    labels = {client: _short(str(name)) for client, name in names.items()}
    # a character is about 0.08 inches wide: names that would touch are turned
    turned = max(map(len, labels.values())) * 0.08 > 0.85 * (WIDTH - 1) / a_row
    width = 0.8 / len(colours)

    def draw(figure: Figure) -> None:
        for row, axes in enumerate(figure.subplots(rows, 1, squeeze=False, sharey=True)[:, 0]):
            shown = ids[row * a_row : (row + 1) * a_row]
            for index, (method, colour) in enumerate(colours.items()):
                seeds = [scores.get((method, client), [math.nan]) for client in shown]
                places = np.arange(len(shown)) + (index - (len(colours) - 1) / 2) * width
                errors = [_std(values) for values in seeds]
                axes.bar(
                    places,
                    [fmean(values) for values in seeds],
                    width * 0.92,
                    color=colour,
                    label=method,
                    yerr=errors if any(errors) else None,
                    error_kw={"ecolor": INK, "elinewidth": 1.0, "capsize": min(3.0, 60 * width / a_row)},
                )
            axes.set(ylabel="ROUGE-L (%)", xlim=(-0.6, a_row - 0.4))  # a short last row keeps the width of its bars
            axes.set_xticks(
                range(len(shown)),
                [labels[client] for client in shown],
                **({"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if turned else {}),
            )
            axes.tick_params(axis="x", length=0)
            axes.grid(True, axis="y")
        _legend(figure, axes)

    return _svg("clients", (WIDTH, 0.6 + rows * (3.2 if rows == 1 else 2.4) + (0.5 * rows if turned else 0)), draw)


def grafted_experts(clients: Sequence[Mapping]) -> str:
    """Which expert each client (row) grafted in each MoE layer (column), of one run; darker: more clients hold it.

    Args:
      clients: a run's clients, each with "grafted_experts", a list of expert numbers a layer.
    """
    grafts = [client["grafted_experts"] for client in clients]
    layers, lines = len(grafts[0]), max(len(experts) for client in grafts for experts in client)
    # the share of the clients that hold an expert of the cell, averaged over its experts
    share = np.array(
        [
            [
                fmean(sum(expert in other[layer] for other in grafts) for expert in client[layer]) / len(grafts)
                for layer in range(layers)
            ]
            for client in grafts
        ]
    )
    width, height = max(0.28, min(0.9, (WIDTH - 3) / layers)), 0.15 * lines + 0.16  # of a cell, in inches

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        mesh = axes.pcolormesh(100 * share, cmap="Blues", vmin=0, vmax=125, edgecolors="white", linewidth=1.5)
        for row, client in enumerate(grafts):
            for layer, experts in enumerate(client):
                axes.text(
                    layer + 0.5,
                    row + 0.5,
                    "\n".join(map(str, experts)),
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color="white" if share[row, layer] > 0.7 else INK,
                )
        axes.set_xticks(np.arange(layers) + 0.5, range(layers))
        axes.set_yticks(np.arange(len(clients)) + 0.5, [_short(str(client["name"])) for client in clients])
        axes.set_xlabel("MoE layer")
        axes.set_ylabel("client", labelpad=10)
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.tick_params(labeltop=len(clients) > 20)
        keys = [Patch(color=mesh.to_rgba(percent), label=f"{percent}%") for percent in (10, 40, 70, 100)]
        figure.legend(
            handles=keys,
            loc="outside upper left",
            ncols=4,
            handlelength=1.2,
            alignment="left",
            title="clients that hold this expert in this layer",
            title_fontsize=9,
        )

    return _svg("grafts", (3 + width * layers, 1.5 + height * len(clients)), draw)


def bytes_per_round(results: Mapping) -> str:
    """What one client sends and receives in one round, for each method."""
    kinds = {"upload": "upload_bytes_per_client_round", "download": "download_bytes_per_client_round"}
    values = _first_seed(results, lambda run: [run["communication"][key] for key in kinds.values()])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _grouped_bars(axes, list(kinds), values, method_colours(results), human_bytes)
        axes.set_xlabel("bytes per client and round")
        most = max(1, *(max(row) for row in values.values()))
        unit = 1024.0 ** math.floor(math.log(most, 1024))
        axes.set_xticks(unit * MaxNLocator(6).tick_values(0, most / unit))  # round numbers of its unit, not of bytes
        axes.set_xlim(0, 1.14 * most)
        _legend(figure, axes)

    return _svg("bytes", (WIDTH, 1.3 + 0.46 * len(values)), draw)


def parameters_by_role(results: Mapping) -> str:
    """How many parameters are frozen, shared, and personal to one client, for each method, on a logarithmic axis."""
    roles = {"frozen": "frozen", "shared": "shared", "personal,\nper client": "personal_per_client"}
    values = _first_seed(results, lambda run: [run["parameters"][key] for key in roles.values()])
    counts = [count for row in values.values() for count in row if count]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_xscale("log")
        lowest, highest = math.floor(math.log10(min(counts))), math.log10(max(counts))
        left = 10.0 ** (lowest - 1)  # room for the shortest bar, and for the 0 of a bar that is none
        axes.set_xlim(left, 10.0 ** (highest + 0.14 * (highest - lowest + 1)))
        _grouped_bars(axes, list(roles), values, method_colours(results), human_count, left=left)
        axes.minorticks_off()
        axes.set_xlabel("parameters (logarithmic)")
        _legend(figure, axes)

    return _svg("parameters", (WIDTH, 1.3 + 0.66 * len(values)), draw)


def _curve(metrics: Sequence[Mapping], method: str, key: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Rounds, and the mean and the standard deviation over seeds of the clients' mean of `key`."""
    clients: dict[int, dict[int, list[float]]] = {}
    for row in metrics:
        if row["method"] == method and row["client"] is not None and key in row:
            value = math.nan if row[key] is None else row[key]  # a diverged loss leaves a gap
            clients.setdefault(row["round"], {}).setdefault(row["seed"], []).append(value)
    rounds = sorted(clients)
    seeds = [[fmean(values) for values in clients[round].values()] for round in rounds]
    return (rounds, np.array([fmean(values) for values in seeds]), np.array([_std(values) for values in seeds]))


def _grouped_bars(
    axes,
    groups: list[str],
    values: Mapping[str, list[float]],
    colours: Mapping[str, str],
    label: Callable[[float], str],
    left: float = 0.0,
) -> None:
    """Horizontal bars, one group a label of `groups`, one bar a method, each with its number at its end."""
    height = 0.8 / len(values)
    for index, (method, row) in enumerate(values.items()):
        places = np.arange(len(groups)) + (index - (len(values) - 1) / 2) * height
        axes.barh(
            places,
            [max(value - left, 0) for value in row],
            height * 0.9,
            left=left,
            color=colours[method],
            label=method,
        )
        for place, value in zip(places, row, strict=True):
            axes.annotate(
                label(value),
                (max(value, left), place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=MUTED,
            )
    axes.set_yticks(range(len(groups)), groups)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))
    axes.grid(True, axis="x")


def _first_seed(results: Mapping, values: Callable[[Mapping], list]) -> dict[str, list]:
    """`values` of each method's first run, for what the seed does not change."""
    rows: dict[str, list] = {}
    for run in results["runs"]:
        rows.setdefault(run["method"], values(run))
    return rows


def _std(values: Sequence[float]) -> float:
    """Sample standard deviation, 0 for one value, NaN where a value is (statistics.stdev would raise)."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _short(name: str) -> str:
    return name if len(name) <= LABEL_LENGTH else name[: LABEL_LENGTH - 1] + "…"


def _legend(figure: Figure, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    lines = math.ceil(len(labels) / 7)
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=math.ceil(len(labels) / lines),
        handlelength=1.2,
        columnspacing=1.6,
    )


def _svg(name: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """The drawing as one <svg> element; the same drawing is the same text, and `name` keeps its ids its own."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()
    return svg[svg.index("<svg") :]  # without the XML prologue: HTML takes the element only
