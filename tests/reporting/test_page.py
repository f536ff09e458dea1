import re
from html.parser import HTMLParser

import pytest

from flex_jax.files import to_plain
from flex_jax.reporting.page import write_report
from flex_jax.results import average_scores, summarise

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks that the tags nest; gathers the text and the attributes."""

    def __init__(self, path):
        super().__init__()
        self.open, self.words, self.attributes, self.tags = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def report(path, results, metrics, **options):
    write_report(path / "report.html", results, metrics, **{"notes": [], "config": {}, **options})
    return Page(path / "report.html")


def test_the_page_shows_all_that_the_run_found(tmp_path, fake):
    results, metrics = fake()
    page = report(
        tmp_path,
        results,
        metrics,
        notes=["The learning rates were not tuned."],
        config={"rounds": 20, "lora": {"rank": 32}, "overrides": {}},
    )
    for run in results["runs"]:
        assert run["method"] in page.text
        for client in run["clients"]:
            assert client["name"] in page.text
    for text in (
        "The learning rates were not tuned.",
        "lora.rank 32",
        "overrides {}",
        "jax 0.10.2",
        "cpu x 1",
        "flex seed 0",
        "flex says 2",
        "Capital 3",
    ):
        assert text in page.text
    flex = next(row for row in results["summary"] if (row["method"], row["metric"]) == ("flex", "rougeL"))
    assert f"{flex['mean']:.2f} ± {flex['std']:.2f}" in page.text
    assert page.tags.count("svg") == 2


def test_the_page_needs_nothing_from_outside(tmp_path, fake):
    page = report(tmp_path, *fake())
    assert not {"script", "link", "iframe", "img", "image"} & set(page.tags)
    for name, value in page.attributes:
        assert name != "src"
        assert not name.endswith("href") or value.startswith("#")
    content = (tmp_path / "report.html").read_text()
    assert "http" not in content and "@import" not in content
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", content))


def test_nothing_in_the_data_becomes_markup(tmp_path, fake):
    attack = "<script>alert('x')</script>&amp;\""
    results, metrics = fake(seeds=(0,))
    for run in results["runs"]:
        run["clients"][0]["name"] = attack
        run["clients"][0]["examples"][0] = dict.fromkeys(("instruction", "context", "reference", "prediction"), attack)
    results["device"] = results["versions"]["jax"] = attack
    page = report(tmp_path, results, metrics, notes=[attack], config={attack: {attack: attack}})
    assert "script" not in page.tags
    assert page.text.count(attack) >= 3 + 3 + 2  # shown as it is: notes, names, examples


@pytest.mark.parametrize(
    "shape",
    [
        {"methods": ("local",), "seeds": (0,), "rounds": 1},
        {"methods": ("fedavg",), "seeds": (0, 1), "clients": 1},
        {"seeds": (0,), "clients": 50, "experts": 3, "rounds": 2},
    ],
    ids=str,
)
def test_any_size_of_experiment_has_a_page(tmp_path, fake, shape):
    results, metrics = fake(**shape)
    page = report(tmp_path, results, metrics)
    assert ("Grafted experts" in page.text) == ("flex" in {run["method"] for run in results["runs"]})
    last = results["runs"][0]["clients"][-1]["name"]
    assert last in page.text
    assert len(re.findall(r"Name the capital", page.text)) == min(6, len(results["runs"][0]["clients"]))


def test_only_the_scores_have_a_plus_minus_sign(tmp_path, fake):
    results, metrics = fake()
    for run in results["runs"]:
        run["clients"][0]["name"] = "a+-b"
    results["versions"]["own"] = "1+-2"
    page = report(tmp_path, results, metrics, config={"data": {"path": "c+-d"}})
    assert page.words.count("a+-b") >= 4  # in the plot, the two tables and the examples
    assert {"1+-2", "c+-d"} <= set(page.words)
    assert not [word for word in page.words if "±" in word and re.search("[a-d]±|1±2", word)]
    assert page.text.count("±") >= 3 * 2 * (1 + 4)  # each method's two scores in the summary and for each client


def test_every_grafted_expert_is_written_and_darker_the_more_clients_chose_it(tmp_path, fake):
    results, metrics = fake(methods=("flex", "twin", "fedavg"), seeds=(0,), clients=2)
    for run in results["runs"][:2]:
        run["clients"][0]["grafted_experts"] = [[101], [102, 103]]
        run["clients"][1]["grafted_experts"] = [[101], [104, 102]]
    page = report(tmp_path, results, metrics)
    assert {"101", "102, 103", "104, 102"} <= set(page.words)
    assert "flex seed 0, twin seed 0:" in page.text or "twin seed 0, flex seed 0:" in page.text  # one figure for both
    html = (tmp_path / "report.html").read_text()
    shades = dict(re.findall(r"background:rgb\(0 114 178 / (\d+)%\)\">([\d, ]+)<", html)[::-1])
    assert [shades.get(shade) for shade in ("60", "45")] == ["101", "102, 103"]


def test_the_costs_are_written_and_their_bars_compare_the_methods(tmp_path, fake):
    results, metrics = fake()
    html = _html(tmp_path, results, metrics)
    costs = html[html.index("<h2>Communication") :]
    costs = costs[: costs.index("</section>")]
    rows = dict(re.findall(r"</span>(\w+)</td>(.*?)</tr>", costs))
    cells = {method: re.findall(r"<td>([^<]*)<div[^>]*width:([\d.]+)%", row) for method, row in rows.items()}
    assert cells["local"] == [
        ("0 B", "0.0"),
        ("0 B", "0.0"),
        ("0 B", "0.0"),
        ("14.3B", "100.0"),
        ("0", "0.0"),
        ("786K", "25.0"),
        ("12.5", "100.0"),  # not the mean over the seeds: one compilation serves all
        ("0.7", "100.0"),
        ("9,000", "100.0"),
    ]
    assert cells["flex"][:3] == [("3 MiB", "100.0"), ("6 MiB", "100.0"), ("720 MiB", "100.0")]


def test_a_diverged_run_has_a_page_before_and_after_it_went_through_the_file(tmp_path, fake):
    results, metrics = fake(seeds=(0, 1))
    for client in results["runs"][0]["clients"]:
        client["rougeL"] = client["eval_loss"] = float("nan")
    results["runs"][0]["average"] = average_scores(results["runs"][0]["clients"])
    for row in results["runs"][0]["timing"]:
        results["runs"][0]["timing"][row] = 1.0 if row == "compile_s" else None
    results["summary"] = summarise(results["runs"])
    html = _html(tmp_path, results, metrics)
    assert html == _html(tmp_path, to_plain(results), metrics)
    page = html[html.index("<h2>Summary") : html.index("<h2>Learning")]
    assert "nan" not in re.sub("<svg.*?</svg>", "", html, flags=re.S) and "<td>-</td>" in page
    assert html.count("<b>") == 4 + 4  # the best score of each client, and the titles of the examples


def test_without_examples_there_is_no_section_for_them(tmp_path, fake):
    results, metrics = fake()
    for run in results["runs"]:
        for client in run["clients"]:
            del client["examples"]
    assert "Examples" not in re.findall(r"<h2>(.*?)</h2>", _html(tmp_path, results, metrics))


def test_the_best_score_of_a_client_is_bold(tmp_path, fake):
    results, metrics = fake(seeds=(0,))
    for run in results["runs"]:
        for client in run["clients"]:
            client["rougeL"] = {"fedavg": 41.0, "flex": None, "local": 40.0}[run["method"]]
    html = _html(tmp_path, results, metrics)
    assert html.count("<b>41.00</b>") == 4 and "<b>40.00</b>" not in html and "<b>-</b>" not in html


def _html(path, results, metrics):
    report(path, results, metrics)
    return (path / "report.html").read_text()


def test_nothing_on_the_page_acts_on_its_reader(tmp_path, fake):
    """Answers of a model and notes may hold anything."""
    results, metrics = fake()
    attack = "\x1b[31m\x00\u202etxt"
    results["runs"][0]["clients"][0]["examples"] = [
        {"instruction": attack, "context": attack, "reference": attack, "prediction": attack}
    ]
    report(tmp_path, results, metrics, notes=[attack], config={"note": attack})
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not set(text) & set("\x1b\x00\u202e") and r"\x1b[31m\x00\u202etxt" in text
