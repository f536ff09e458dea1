"""The whole program on a random model of a few thousand weights: contract, resumption, bad input."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from flex_jax import tiny
from flex_jax.main import main
from flex_jax.methods import find_method
from flex_jax.models.checkpoint import WEIGHTS, save_pretrained
from flex_jax.models.decoder import Decoder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def checkpoint(model_config, tmp_path_factory):
    """A random model with the embedded tokenizer, as a Hugging Face directory."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.CHECKPOINT)
    config = dataclasses.replace(model_config, vocab_size=len(tokenizer))
    params = Decoder(config).init(jax.random.PRNGKey(0), jnp.zeros((1, 4), jnp.int32))["params"]
    path = tmp_path_factory.mktemp("random") / "model"
    save_pretrained(path, config, params, tokenizer=tokenizer)
    return path


def arguments(checkpoint, workdir, *more):
    """A run of seconds on the embedded tasks; `more` are further --config values."""
    values = {
        "methods": "'flex',",
        "rounds": 3,
        "local_steps": 2,
        "batch_size": 2,
        "sequence_length": 96,
        "model.path": checkpoint,
        "data.partition": "column",
        "data.column": "department",
        "data.examples_per_client": 12,
        "data.test_examples": 3,
        "lora.rank": 2,
        "optimizer.learning_rate": 1e-2,
        "evaluation.max_new_tokens": 4,
        "evaluation.batch_size": 4,
        "slot.calibration_examples": 8,
    }
    changed = [flag.removeprefix("--config.").split("=")[0] for flag in more]
    flags = [f"--config.{key}={value}" for key, value in values.items() if key not in changed]
    return ["--config", str(ROOT / "configs/default.py"), "--workdir", str(workdir), *flags, *more]


def read(workdir, name="results.json"):
    return json.loads((workdir / name).read_text())


def without_times(results):
    return [{key: value for key, value in run.items() if key != "timing"} for run in results["runs"]]


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    """All three methods, two seeds, to the end."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert main(arguments(checkpoint, workdir, "--config.methods='flex','fedavg','local'", "--config.seeds=0,1")) == 0
    return workdir


def test_results_hold_what_the_contract_says(finished, model_config):
    results = read(finished)
    assert [(run["method"], run["seed"]) for run in results["runs"]] == [
        (method, seed) for method in ("flex", "fedavg", "local") for seed in (0, 1)
    ]
    for run in results["runs"]:
        assert [client["name"] for client in run["clients"]] == ["finance", "legal", "shipping", "support"]
        for client in run["clients"]:
            assert (client["train_examples"], client["eval_examples"]) == (12, 3)
            assert client["eval_loss"] > 0 and 0 <= client["rougeL"] <= 100
            grafted = client["grafted_experts"]
            assert len(grafted) == (model_config.layers if run["method"] == "flex" else 0)
            assert all(len(layer) == 1 and 0 <= layer[0] < model_config.experts for layer in grafted)
        losses = [client["eval_loss"] for client in run["clients"]]
        assert run["average"]["eval_loss"] == pytest.approx(np.mean(losses))
        assert run["timing"]["round_s_median"] > 0 and run["timing"]["compile_s"] >= 0
    by_method = {run["method"]: run for run in results["runs"]}
    lora = 2 * 3 * (16 + 16 + 2 * (16 + 8))  # rank x layers x (q, k, v: inputs + outputs)
    slot = 3 * (3 * 16 * 8 + 16)  # layers x (expert + gate)
    assert by_method["flex"]["parameters"]["shared"] == by_method["fedavg"]["parameters"]["shared"] == lora
    assert by_method["flex"]["parameters"]["personal_per_client"] == slot
    assert by_method["local"]["parameters"]["shared"] == 0
    sent = by_method["flex"]["communication"]
    assert sent["upload_bytes_per_client_round"] == sent["download_bytes_per_client_round"] == 4 * lora
    assert sent["total_bytes"] == 3 * 4 * 2 * 4 * lora
    assert by_method["local"]["communication"]["total_bytes"] == 0
    assert {"method", "metric", "mean", "std", "seeds"} == set(results["summary"][0])
    assert results["device"] and results["versions"]["jax"] == jax.__version__


def test_metrics_have_a_line_for_every_client_and_round(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    keys = [(line["run"], line["round"], line["client"]) for line in lines]
    assert len(keys) == len(set(keys)) == 6 * 3 * 5
    assert all(line["train_loss"] > 0 for line in lines)


def test_the_report_stands_alone(finished):
    page = (finished / "report.html").read_text()
    assert all(name in page for name in ("flex", "fedavg", "local", "finance", "support"))


def test_the_same_command_again_trains_nothing(finished, checkpoint):
    before = (finished / "metrics.jsonl").read_bytes(), read(finished)
    assert main(arguments(checkpoint, finished, "--config.methods='flex','fedavg','local'", "--config.seeds=0,1")) == 0
    assert ((finished / "metrics.jsonl").read_bytes(), read(finished)) == before


def test_another_config_does_not_write_over_a_run(finished, checkpoint, capsys):
    before = read(finished)
    assert main(arguments(checkpoint, finished, "--config.rounds=9")) == 2
    assert "another config" in capsys.readouterr().err
    assert read(finished) == before


def test_the_same_seed_gives_the_same_bits_and_training_lowers_the_loss(finished, checkpoint, tmp_path):
    assert main(arguments(checkpoint, tmp_path / "again")) == 0
    assert without_times(read(tmp_path / "again"))[0] == without_times(read(finished))[0]
    lines = [json.loads(line) for line in (tmp_path / "again/metrics.jsonl").read_text().splitlines()]
    first, last = ([line["train_loss"] for line in lines if line["round"] == n] for n in (0, 2))
    assert np.mean(last) < np.mean(first)


def test_kill_9_in_a_round_and_the_same_command_give_the_same_numbers(finished, checkpoint, tmp_path):
    """The run is killed once some rounds are done, goes on, and ends as the one that was never interrupted."""
    command = [sys.executable, "-m", "flex_jax.main", *arguments(checkpoint, tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and '"round": 0' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run/results.json").exists()
    assert main(arguments(checkpoint, tmp_path / "run")) == 0
    assert without_times(read(tmp_path / "run"))[0] == without_times(read(finished))[0]
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    whole = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    expected = [line["train_loss"] for line in whole if line["run"] == "flex-seed0"]
    assert [line["train_loss"] for line in lines] == expected


def test_lora_slots_and_a_cohort_smaller_than_the_clients_run(checkpoint, tmp_path):
    more = ("slot.training=lora", "slot.rank=2", "slot.experts=2", "slot.gate_init=closed", "cohort=2")
    more += ("client.compression=topk",)
    assert main(arguments(checkpoint, tmp_path / "run", *(f"--config.{value}" for value in more))) == 0
    run = read(tmp_path / "run")["runs"][0]
    assert all(len(set(layer)) == 2 for client in run["clients"] for layer in client["grafted_experts"])


BREAKS = """
from flex_jax.federated.method import ClientRule, Method

def finish(received, trained):
    raise ValueError("no such leaf")

breaks = Method(placement=((r".*", "shared"),), client=ClientRule(begin=finish))
"""


def test_a_method_that_breaks_does_not_lose_the_others(checkpoint, tmp_path, capsys):
    """Not even one in the middle; and the same command tries it again."""
    file, run = tmp_path / "mine.py", tmp_path / "run"
    file.write_text(BREAKS.replace("begin=", "finish="))  # breaks as it is planned: nothing has begun
    command = arguments(checkpoint, run, f"--config.methods=('fedavg','{file}:breaks','local')", "--config.rounds=1")
    assert_refused(command, "mine.py, line 5: ValueError: no such leaf", capsys, run)
    find_method.cache_clear()
    file.write_text(
        BREAKS.replace("raise", "if received.steps > 1: raise")
        .replace('ValueError("no such leaf")', 'ValueError("no such leaf")\n    return default(received, trained)')
        .replace("import ClientRule", "import begin as default, ClientRule")
    )
    assert main(command) == 1
    printed = capsys.readouterr()
    assert f"1 of 3 runs failed (breaks seed 0: {file}, line 5: ValueError: no such leaf)" in printed.err
    assert [line.split()[0] for line in printed.out.splitlines() if line.startswith(("fedavg", "local"))]
    results = read(run)
    assert [done["method"] for done in results["runs"]] == ["fedavg", "local"]
    assert [failed["method"] for failed in results["failures"]] == ["breaks"]
    assert "mine.py" in (run / "failures/breaks-seed0.txt").read_text() and (run / "report.html").exists()
    find_method.cache_clear()
    file.write_text("from flex_jax.methods import METHODS\nbreaks = METHODS['fedavg']\n")
    assert main(command) == 0
    assert [done["method"] for done in read(run)["runs"]] == ["fedavg", "local", "breaks"] and not read(run)["failures"]
    assert not list((run / "failures").iterdir())


def test_variants_of_a_method_stand_beside_it(checkpoint, tmp_path):
    """Ablations of FLEx: chosen at random, the same for all, without a gate, in the place of the expert."""
    variants = {
        "random": {"slot": {"selection": "random"}},
        "common": {"slot": {"calibration": "common", "gate": "none"}},
        "released": {"slot": {"selection": "random", "calibration": "common", "gate": "routing", "training": "lora"}},
    }
    changes = [f"--config.overrides.{name}.method=flex" for name in variants]
    for name, values in variants.items():
        changes += [f"--config.overrides.{name}.slot.{key}={value}" for key, value in values["slot"].items()]
    names = ",".join(f"'{name}'" for name in ("flex", *variants))
    more = (f"--config.methods={names}", "--config.rounds=1", "--config.slot.rank=2", *changes)
    assert main(arguments(checkpoint, tmp_path / "run", *more)) == 0
    runs = {run["method"]: run for run in read(tmp_path / "run")["runs"]}
    assert list(runs) == ["flex", *variants]
    grafted = {name: [client["grafted_experts"] for client in run["clients"]] for name, run in runs.items()}
    assert grafted["random"] != grafted["flex"]
    for name in ("common", "released"):
        assert all(client == grafted[name][0] for client in grafted[name])
    kept = {name: run["parameters"]["personal_per_client"] for name, run in runs.items()}
    gate = 3 * 16  # layers x width
    assert kept["common"] == kept["flex"] - gate and kept["released"] == 3 * 2 * 3 * (16 + 8)


def test_cohorts_by_an_availability_trace(checkpoint, tmp_path, capsys):
    trace = tmp_path / "trace.jsonl"
    trace.write_text("[0, 3]\n[1, 2, 3]\n")
    more = ("--config.cohort=2", "--config.sampling=size", f"--config.availability={trace}")
    assert main(arguments(checkpoint, tmp_path / "run", *more)) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    trained = [{line["client"] for line in lines if line["round"] == n} - {None} for n in range(3)]
    assert trained[0] == trained[2] == {0, 3} and trained[1] < {1, 2, 3}
    trace.write_text("[0]\n")
    capsys.readouterr()
    assert_refused(arguments(checkpoint, tmp_path / "no", *more), r"trace.jsonl:1: has 1 of", capsys, tmp_path / "no")


def test_a_cohort_too_small_for_its_aggregation(checkpoint, tmp_path, capsys):
    command = arguments(checkpoint, tmp_path / "run", "--config.server.aggregation=krum")
    assert_refused(command, "config.server.aggregation: krum .* cohort", capsys, tmp_path / "run")


def record(**changes):
    fields = {"instruction": "Name it.", "context": "", "response": "yes", "category": "closed_qa"}
    return json.dumps(fields | changes)


BAD_DATA = {
    "missing file": (None, "no such file|missing|does not exist"),
    "no response": ([record(), json.dumps({"instruction": "a", "context": "", "category": "x"})], ":2: .*response"),
    "a response of spaces": ([record(), record(response="   ")], ":2: response is empty"),
    "broken JSON": ([record(), '{"instruction": '], ":2: broken JSON"),
    "an empty client": ([record(instruction=str(i)) for i in range(5)], "client"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data_gives_one_line_and_status_2(kind, checkpoint, tmp_path, capsys):
    lines, words = BAD_DATA[kind]
    file = tmp_path / "data.jsonl"
    if lines is not None:
        file.write_text("\n".join(lines))
    flags = [f"--config.data.path={file}", "--config.data.partition=iid", "--config.data.column="]
    assert_refused(arguments(checkpoint, tmp_path / "run", *flags), words, capsys, tmp_path / "run")


def assert_refused(command, words, capsys, workdir):
    assert main(command) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("flex_jax: error:") and "\n" not in error
    assert re.search(words, error), error
    assert not workdir.exists()


def test_more_grafted_experts_than_experts(checkpoint, tmp_path, capsys):
    command = arguments(checkpoint, tmp_path / "run", "--config.slot.experts=7")
    assert_refused(command, r"config.slot.experts is 7: must be at most 6", capsys, tmp_path / "run")


def test_an_unknown_method_and_an_unknown_category(checkpoint, tmp_path, capsys):
    command = arguments(checkpoint, tmp_path / "run", "--config.methods='flax',")
    assert_refused(command, "'flax' is unknown: must be path/to/file.py:name or one of ", capsys, tmp_path / "run")
    command = arguments(checkpoint, tmp_path / "run", "--config.data.categories='poetry',")
    assert_refused(command, "poetry", capsys, tmp_path / "run")


def test_a_bad_checkpoint_names_all_its_tensors(checkpoint, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / WEIGHTS)
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = np.zeros((2, 2), np.float32)
    save_file(tensors, broken / WEIGHTS)
    command = arguments(broken, tmp_path / "run")
    assert_refused(command, "model.norm.weight is missing.*lm_head|lm_head.*model.norm", capsys, tmp_path / "run")


def test_a_tokenizer_larger_than_the_embedding(checkpoint, model_config, params, tmp_path, capsys):
    save_pretrained(tmp_path / "small", model_config, params, tokenizer=AutoTokenizer.from_pretrained(checkpoint))
    command = arguments(tmp_path / "small", tmp_path / "run")
    assert_refused(command, "embedding has 60 rows", capsys, tmp_path / "run")


@pytest.mark.parametrize("config", ["dolly_pathological", "dolly_dirichlet"])
def test_the_dolly_configs_run_on_the_real_file(config, checkpoint, shared_data, tmp_path):
    values = {
        "model.path": checkpoint,
        "data.path": shared_data / "dolly-15k.jsonl.gz",
        "rounds": 3,
        "local_steps": 2,
        "sequence_length": 64,
        "methods": "'flex',",
        "evaluation.max_new_tokens": 2,
        "evaluation.batch_size": 50,
        "data.test_examples": 5,
        "data.examples_per_client": 40,
        "slot.calibration_examples": 16,
        "optimizer.learning_rate": 1e-2,
    }
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    assert main(["--config", str(ROOT / f"configs/{config}.py"), "--workdir", str(tmp_path / "run"), *flags]) == 0
    run = read(tmp_path / "run")["runs"][0]
    assert len(run["clients"]) == (4 if config == "dolly_pathological" else 10)
    assert all(np.isfinite(client["eval_loss"]) and client["eval_examples"] > 0 for client in run["clients"])
