import json

import numpy as np
import pytest

from flex_jax.errors import InputError
from flex_jax.metrics_log import MetricsLog, read_metrics


def write_rounds(path, run, rounds):
    log = MetricsLog(path)
    for round in rounds:
        log.write(run, run, 0, round, {0: {"train_loss": 1.0}, None: {"train_loss": np.float32(1.5)}})
    return log


def test_a_line_names_run_method_seed_round_and_client(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    lines = {np.int64(1): {"train_loss": np.float32(0.5), "diverged": float("nan")}, None: {"round_s": 2.0}}
    log.write("flex-seed3", "flex", 3, 7, lines)
    head = {"run": "flex-seed3", "method": "flex", "seed": 3, "round": 7}
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [
        {**head, "client": 1, "train_loss": 0.5, "diverged": None},
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
    log = write_rounds(path, "flex", [2])
    assert [line["round"] for line in read_metrics(path)] == [0, 0, 1, 2, 2]
    path.write_bytes(path.read_bytes() + b'{"run": "fl')
    log.rewind("flex", 2)
    assert [json.loads(line)["round"] for line in path.read_text().splitlines()] == [0, 0, 1]


def test_rewind_leaves_no_round_twice_and_other_runs_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rounds(path, "fedavg", range(4))
    log = write_rounds(path, "flex", range(4))
    log.rewind("flex", 2)
    write_rounds(path, "flex", [2, 3])
    lines = [(line["run"], line["round"], line["client"]) for line in read_metrics(path)]
    assert len(lines) == len(set(lines)) == 16
    MetricsLog(tmp_path / "new.jsonl").rewind("flex", 0)  # a first start has nothing to rewind
    assert not (tmp_path / "new.jsonl").exists()


HEAD = {"run": "flex-seed0", "method": "flex", "seed": 0, "round": 0, "client": None}


def test_a_foreign_file_is_one_clear_line_and_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(HEAD | {"round": number}) for number in (0, 1)]
    path.write_text(f"{lines[0]}\nhello\n{lines[1]}\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: not a metrics line"):
        MetricsLog(path)
    assert "hello" in path.read_text()
