import json
import os

import numpy as np
import pytest

from flex_jax.errors import InputError
from flex_jax.reporting import writers
from flex_jax.reporting.writers import MetricsWriter, read_metrics, summarise, write_json


def write_rounds(path, run, rounds):
    writer = MetricsWriter(path)
    for round in rounds:
        writer.write(run, run, 0, round, {0: {"train_loss": 1.0}, None: {"train_loss": np.float32(1.5)}})
    return writer


def test_a_line_names_run_method_seed_round_and_client(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsWriter(path).write(
        "flex-seed3", "flex", 3, 7, {np.int64(1): {"train_loss": np.float32(0.5)}, None: {"round_s": 2.0}}
    )
    head = {"run": "flex-seed3", "method": "flex", "seed": 3, "round": 7}
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {**head, "client": 1, "train_loss": 0.5},
        {**head, "client": None, "round_s": 2.0},
    ]


def test_a_round_is_on_disk_once_written(tmp_path):
    write_rounds(tmp_path / "metrics.jsonl", "flex", [0])
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_a_line_torn_by_a_kill_is_dropped_before_the_next_is_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rounds(path, "flex", [0, 1])
    path.write_bytes(path.read_bytes()[:-9])
    assert len(read_metrics(path)) == 3
    writer = write_rounds(path, "flex", [2])
    assert [row["round"] for row in read_metrics(path)] == [0, 0, 1, 2, 2]
    path.write_bytes(path.read_bytes() + b'{"run": "fl')
    writer.rewind("flex", 2)
    assert [json.loads(line)["round"] for line in path.read_text().splitlines()] == [0, 0, 1]


def test_rewind_leaves_no_round_twice_and_other_runs_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rounds(path, "fedavg", range(4))
    writer = write_rounds(path, "flex", range(4))
    writer.rewind("flex", 2)
    write_rounds(path, "flex", [2, 3])
    rows = [(row["run"], row["round"], row["client"]) for row in read_metrics(path)]
    assert len(rows) == len(set(rows)) == 16
    MetricsWriter(tmp_path / "new.jsonl").rewind("flex", 0)  # a first start has nothing to rewind
    assert not (tmp_path / "new.jsonl").exists()


def test_a_foreign_file_is_one_clear_line_and_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"run": "flex", "round": 0}\nhello\n{"run": "flex", "round": 1}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: not a metrics line"):
        MetricsWriter(path)
    assert "hello" in path.read_text()


@pytest.mark.parametrize("number", [float("nan"), np.float32("inf"), np.array(-np.inf)])
def test_what_json_cannot_say_is_null(tmp_path, number):
    MetricsWriter(tmp_path / "metrics.jsonl").write("flex", "flex", 0, 0, {0: {"train_loss": number}})
    write_json(tmp_path / "results.json", {"runs": [{"eval_loss": number}]})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["train_loss"] is None
    assert json.loads((tmp_path / "results.json").read_text()) == {"runs": [{"eval_loss": None}]}


def test_write_json_takes_numpy_at_any_depth(tmp_path):
    write_json(tmp_path / "a.json", {"n": np.int64(3), "x": (np.float64(0.5),), "a": np.arange(4).reshape(2, 2)})
    assert json.loads((tmp_path / "a.json").read_text()) == {"n": 3, "x": [0.5], "a": [[0, 1], [2, 3]]}


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})

    def killed(descriptor):
        assert json.loads(path.read_text()) == {"old": 1}  # the new content is still elsewhere
        raise KeyboardInterrupt

    monkeypatch.setattr(writers.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    monkeypatch.undo()
    write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"new": 2}
    assert os.listdir(tmp_path) == ["results.json"]


def average(method, **numbers):
    return {"method": method, "average": numbers}


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
