import json
import math
import subprocess
import sys

import pytest

from flex_jax.errors import InputError
from flex_jax.results import average_scores, read_results, summarise, write_results

RUN = {
    "method": "flex",
    "seed": 0,
    "identity": "0f",
    "parameters": {"frozen": 9, "shared": 1, "personal_per_client": 2, "trained_per_client": 3},
    "clients": [],
    "average": {},
    "communication": {"upload_bytes_per_client_round": 4, "download_bytes_per_client_round": 4, "total_bytes": 8},
    "timing": {"graft_s": None, "compile_s": 1, "evaluation_s": 1.5, "round_s_median": 0.1, "train_tokens_per_s": None},
}
RESULTS = {"runs": [RUN], "summary": [], "failures": [], "versions": {"jax": "0.10.2"}, "device": "cpu"}


def average(method, **numbers):
    return {"method": method, "average": numbers}


def test_results_come_back_as_they_were_written_and_nan_as_none(tmp_path):
    assert read_results(tmp_path) is None
    write_results(tmp_path, RESULTS)
    assert {key: value for key, value in read_results(tmp_path).items() if key != "sha256"} == RESULTS
    write_results(tmp_path, {**RESULTS, "runs": [{**RUN, "average": {"eval_loss": math.nan}}]})
    assert read_results(tmp_path)["runs"][0]["average"] == {"eval_loss": None}


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"runs": [',
        "[]",
        "null",
        "{}",
        json.dumps({**RESULTS, "runs": None}),
        json.dumps({**RESULTS, "runs": [1]}),
        json.dumps({**RESULTS, "runs": [{"method": "flex"}]}),
        b"\xff",
    ],
)
def test_another_file_is_one_clear_line(tmp_path, content):
    file = tmp_path / "results.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"results\.json: not a results file") as error:
        read_results(tmp_path)
    assert "\n" not in str(error.value)


def test_average_scores_are_the_means_of_every_float():
    clients = [
        {"id": 0, "name": "qa", "eval_loss": 1.0, "rougeL": 30.0, "train_examples": 5, "examples": []},
        {"id": 1, "name": "ie", "eval_loss": 2.0, "rougeL": 50.0, "train_examples": 7, "examples": []},
    ]
    assert average_scores(clients) == {"eval_loss": 1.5, "rougeL": 40.0}
    clients[0]["eval_loss"] = None  # as a diverged client is read from the file
    scores = average_scores(clients)
    assert math.isnan(scores["eval_loss"]) and scores["rougeL"] == 40.0


def test_summary_by_hand():
    runs = [
        average("flex", rougeL=40.0, eval_loss=1.0),
        average("fedavg", rougeL=39.0),
        average("flex", rougeL=42.0, eval_loss=1.0),
        average("flex", rougeL=47.0, eval_loss=1.0),
    ]
    assert summarise(runs) == [
        {"method": "flex", "metric": "rougeL", "mean": 43.0, "std": pytest.approx(13**0.5), "seeds": 3},
        {"method": "flex", "metric": "eval_loss", "mean": 1.0, "std": 0.0, "seeds": 3},
        {"method": "fedavg", "metric": "rougeL", "mean": 39.0, "std": 0.0, "seeds": 1},
    ]


def test_a_diverged_seed_does_not_flatter_the_mean():
    (row,) = summarise([average("flex", eval_loss=1.0), average("flex", eval_loss=float("nan"))])
    assert row == {"method": "flex", "metric": "eval_loss", "mean": None, "std": None, "seeds": 2}


def test_results_and_metrics_are_read_without_jax():
    code = "import sys, flex_jax.results, flex_jax.metrics_log, flex_jax.files; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_changed_runs_are_refused(tmp_path):
    """A number that somebody has edited, and a run that is there twice."""
    write_results(tmp_path, RESULTS)
    written = json.loads((tmp_path / "results.json").read_text())
    for runs in ([RUN, RUN], [{**RUN, "average": {"rougeL": 88.8}}], []):
        (tmp_path / "results.json").write_text(json.dumps({**written, "runs": runs}))
        with pytest.raises(InputError, match="its runs do not have their checksum"):
            read_results(tmp_path)
