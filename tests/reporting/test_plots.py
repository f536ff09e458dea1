import warnings
from xml.etree import ElementTree

import matplotlib
import pytest

from flex_jax.reporting import plots
from flex_jax.reporting.tables import ranked_runs


def drawn(results, metrics):
    runs = ranked_runs(results)
    return {"curves": plots.learning_curves(runs, metrics), "clients": plots.client_bars(runs)}


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}text")]


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"methods": ("local",), "seeds": (0,), "rounds": 1, "clients": 1},
        {"methods": tuple("abcdefghijklmnop"), "seeds": (0, 1), "clients": 20},
    ],
)
def test_every_plot_is_svg_that_names_every_method_without_a_warning(fake, shape):
    results, metrics = fake(**shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = drawn(results, metrics)
    for svg in images.values():
        assert {run["method"] for run in results["runs"]} <= set(texts(svg))


def test_a_method_has_one_colour_everywhere_and_no_other_method_has_it(fake):
    results, metrics = fake()
    colours = plots.method_colours(ranked_runs(results))
    assert len(set(colours.values())) == 3
    for svg in drawn(results, metrics).values():
        assert all(colour.lower() in svg for colour in colours.values())


def test_the_curve_is_the_mean_over_clients_then_seeds_with_the_spread_of_the_seeds():
    def line(seed, round, client, loss):
        return {"method": "flex", "seed": seed, "round": round, "client": client, "train_loss": loss}

    metrics = [
        line(0, 0, 0, 1.0),
        line(0, 0, 1, 3.0),
        line(1, 0, 0, 4.0),
        line(1, 0, 1, 4.0),
        line(0, 0, None, 99.0),
        line(0, 1, 0, None),
        line(1, 1, 0, 2.0),
    ]
    rounds, means, stds = plots._curve(metrics, "flex", "train_loss")
    assert rounds == [0, 1]
    assert means[0] == pytest.approx(3.0) and stds[0] == pytest.approx(2**0.5)
    assert means[1] != means[1]  # a diverged seed is a gap, not the mean of the others


def test_a_diverged_run_still_has_a_report(fake):
    results, metrics = fake(methods=("fedavg", "flex"), seeds=(0, 1))
    for row in metrics:
        row["train_loss"] = None
    for client in results["runs"][0]["clients"]:
        client["rougeL"] = None
    drawn(results, metrics)


def test_evaluation_loss_has_its_panel_only_where_it_was_measured(fake):
    results, metrics = fake()
    assert "Evaluation loss" in texts(drawn(results, metrics)["curves"])
    assert "Evaluation loss" not in texts(drawn(results, [r for r in metrics if "eval_loss" not in r])["curves"])


def test_a_name_in_a_plot_is_never_markup_nor_mathematics(fake):
    results, metrics = fake(seeds=(0,))
    for run in results["runs"]:
        run["clients"][0]["name"], run["clients"][1]["name"] = "qa & <a>", "$100$"
    assert {"qa & <a>", "$100$"} <= set(texts(drawn(results, metrics)["clients"]))


def test_the_same_results_are_the_same_text_and_matplotlib_is_left_as_it_was(fake):
    results, metrics = fake()
    before = dict(matplotlib.rcParams)
    assert drawn(results, metrics) == drawn(results, metrics)
    assert dict(matplotlib.rcParams) == before
