"""The whole program on a random model of a few thousand weights: contract, resumption, what is done only once."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from flex_jax import building, training
from flex_jax.federated.federated_round import CompiledRound, make_round
from flex_jax.main import main
from tests.program import (
    ROOT,
    arguments,
    assert_refused,
    count_calls,
    count_method_calls,
    read,
    read_lines,
    without_times,
)

THREE = ("--config.methods='flex','fedavg','local'", "--config.seeds=0,1")


class CountedRound:
    """A round function that records when it is traced."""

    def __init__(self, round_fn, traced):
        self._round_fn, self._traced = round_fn, traced

    def lower(self, *args):
        self._traced.append(args)
        return self._round_fn.lower(*args)


def count_compilations(patch):
    """Records the compilations of rounds in a list."""
    traced = []
    patch.setattr(building, "make_round", lambda *args, **kwargs: CountedRound(make_round(*args, **kwargs), traced))
    return traced


@pytest.fixture(scope="module")
def counted():
    """How often the command of `finished` called some functions."""
    return {}


@pytest.fixture(scope="module")
def finished(checkpoint, counted, tmp_path_factory):
    """All three methods, two seeds, to the end."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for function in (building.for_method, building.plan, building.make_mesh, training.round_batches):
            counted[function.__name__] = count_calls(patch, function)
        counted["compile"] = count_method_calls(patch, CompiledRound, "compile")
        counted["lower"] = count_compilations(patch)
        assert main(arguments(checkpoint, workdir, *THREE)) == 0
    return workdir


@pytest.fixture(scope="module")
def resumed(checkpoint, tmp_path_factory):
    """FLEx with the first of these seeds, interrupted in its evaluation, and the compilations of the second command."""

    def interrupt(*args):
        raise KeyboardInterrupt

    workdir = tmp_path_factory.mktemp("resumed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "score", interrupt)
        assert main(arguments(checkpoint, workdir)) == 130
        assert len(read_lines(workdir / "metrics.jsonl")) == 3 * 5 and not (workdir / "results.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        compilations = count_compilations(patch)
        assert main(arguments(checkpoint, workdir)) == 0
    return workdir, compilations


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
            assert len(grafted) == (model_config.num_layers if run["method"] == "flex" else 0)
            assert all(len(layer) == 1 and 0 <= layer[0] < model_config.num_experts for layer in grafted)
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
    lines = read_lines(finished / "metrics.jsonl")
    keys = [(line["run"], line["round"], line["client"]) for line in lines]
    assert len(keys) == len(set(keys)) == 6 * 3 * 5
    assert all(line["train_loss"] > 0 for line in lines)


def test_the_report_stands_alone(finished):
    page = (finished / "report.html").read_text()
    assert all(name in page for name in ("flex", "fedavg", "local", "finance", "support"))


def test_the_same_command_again_trains_nothing(finished, checkpoint):
    before = (finished / "metrics.jsonl").read_bytes(), read(finished)
    assert main(arguments(checkpoint, finished, *THREE)) == 0
    assert ((finished / "metrics.jsonl").read_bytes(), read(finished)) == before


def test_another_config_does_not_write_over_a_run(finished, checkpoint, capsys):
    before = read(finished)
    assert_refused(main, arguments(checkpoint, finished, "--config.rounds=9"), "another config", capsys)
    assert read(finished) == before


def test_the_same_seed_gives_the_same_bits_and_training_lowers_the_loss(finished, resumed):
    workdir, _ = resumed
    assert without_times(read(workdir))[0] == without_times(read(finished))[0]
    lines = read_lines(workdir / "metrics.jsonl")
    first, last = ([line["train_loss"] for line in lines if line["round"] == n] for n in (0, 2))
    assert np.mean(last) < np.mean(first)


def test_a_run_that_was_interrupted_in_its_evaluation_compiles_no_round(resumed):
    workdir, compilations = resumed
    assert not compilations and read(workdir)["runs"][0]["timing"]["compile_s"] == 0.0


def test_what_runs_share_is_made_once(finished, counted):
    """Three methods, two seeds, three rounds."""
    resolved = [args[1] for args, _ in counted["for_method"]]
    assert sorted(resolved) == ["fedavg", "flex", "local"]
    assert len(counted["plan"]) == len(counted["lower"]) == 3
    assert len(counted["make_mesh"]) == 1
    assert len(counted["compile"]) == 3 * 2
    rounds = [(options["seed"], options["round"]) for _, options in counted["round_batches"]]
    assert rounds == [(seed, number) for _ in range(3) for seed in (0, 1) for number in range(3)]


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
    lines = read_lines(metrics)
    whole = read_lines(finished / "metrics.jsonl")
    expected = [line["train_loss"] for line in whole if line["run"] == "flex-seed0"]
    assert [line["train_loss"] for line in lines] == expected


BREAKS = """
from flex_jax.federated.method import ClientRule, Method, make_result as default

def make_result(context, trained):
    if context.num_steps >= LEAST: raise ValueError("no such leaf")
    return default(context, trained)

def breaks():
    return Method(ownership=((r".*", "shared"),), client=ClientRule(make_result=make_result))
"""


def test_a_method_that_breaks_does_not_lose_the_others(checkpoint, tmp_path, capsys):
    """Not even one in the middle; and the same command tries it again."""
    file, run = tmp_path / "mine.py", tmp_path / "run"
    file.write_text(BREAKS.replace("LEAST", "1"))  # breaks when it is planned: nothing has begun
    command = arguments(checkpoint, run, f"--config.methods=('fedavg','{file}:breaks','local')", "--config.rounds=1")
    assert_refused(main, command, "mine.py, line 5: ValueError: no such leaf", capsys, run)
    file.write_text(BREAKS.replace("LEAST", "2"))  # breaks when its round is traced
    assert main(command) == 1
    printed = capsys.readouterr()
    assert f"1 of 3 runs failed (breaks seed 0: {file}, line 5: ValueError: no such leaf)" in printed.err
    assert [line.split()[0] for line in printed.out.splitlines() if line.startswith(("fedavg", "local"))]
    results = read(run)
    assert [done["method"] for done in results["runs"]] == ["fedavg", "local"]
    assert [failed["method"] for failed in results["failures"]] == ["breaks"]
    assert "mine.py" in (run / "failures/breaks-seed0.txt").read_text() and (run / "report.html").exists()
    file.write_text("from flex_jax.methods import METHODS\nbreaks = METHODS['fedavg']\n")
    assert main(command) == 0
    assert [done["method"] for done in read(run)["runs"]] == ["fedavg", "local", "breaks"] and not read(run)["failures"]
    assert not list((run / "failures").iterdir())


DIVERGES = """
import jax
import jax.numpy as jnp
from flex_jax import Method
from flex_jax.federated.method import ClientRule, ServerRule, Upload, make_result as default

def method(bad, server=ServerRule()):
    def make_result(context, trained):
        result, client = default(context, trained), context.state.extra["client"]
        spoil = jnp.where((context.round == 1) & bad(client), BAD, 1.0)
        upload = Upload(jax.tree.map(lambda leaf: leaf * spoil, result.upload.delta))
        return result._replace(upload=upload, personal=jax.tree.map(lambda leaf: leaf + spoil, result.personal))

    init_extra = lambda shared, client_id: {"client": client_id}
    return Method(
        ownership=((r".*lora_a", "personal"), (r".*", "shared")),
        client=ClientRule(init_extra=init_extra, make_result=make_result),
        server=server,
    )

def one_of_four(): return method(lambda client: client == 2)
def three_of_four(): return method(lambda client: client > 0)

def server_alone():
    def update(server, context):
        return server._replace(shared=jax.tree.map(lambda leaf: leaf + BAD, server.shared))
    return method(lambda client: False, ServerRule(update=update))
"""


@pytest.fixture(scope="module")
def diverged(checkpoint, tmp_path_factory):
    """Clients whose upload and state are not finite in the second of three rounds: one of four, then three."""
    folder = tmp_path_factory.mktemp("diverged")
    file, run = folder / "mine.py", folder / "run"
    file.write_text(DIVERGES.replace("BAD", "jnp.nan"))
    names = ("three_of_four", "server_alone", "one_of_four", "fedavg")
    methods = ",".join(f"'{file}:{name}'" if "_" in name else f"'{name}'" for name in names)
    process = subprocess.run(
        [sys.executable, "-m", "flex_jax.main", *arguments(checkpoint, run, f"--config.methods={methods}")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return run, process


def test_a_client_that_diverges_is_left_out_and_named(diverged):
    run, process = diverged
    told = [line for line in process.stderr.splitlines() if "left out" in line]
    assert len(told) == 1 and "one_of_four-seed0, round 2: the update of client shipping is not finite" in told[0]
    (entry,) = [entry for entry in read(run)["runs"] if entry["method"] == "one_of_four"]
    assert [client["rounds_left_out"] for client in entry["clients"]] == [0, 0, 1, 0]
    assert all(client["eval_loss"] > 0 for client in entry["clients"])
    lines = [line for line in read_lines(run / "metrics.jsonl") if line["run"] == "one_of_four-seed0"]
    assert [line["client"] for line in lines if not line["finite"]] == [2]
    assert all(line["train_loss"] > 0 for line in lines if line["client"] is None)
    assert "client shipping was left out of 1 round:" in (run / "report.html").read_text()


def test_the_state_of_a_client_that_is_left_out_stays(diverged, checkpoint, tmp_path):
    """One round fewer, at the same learning rates, leaves the stored states of the second round as the newest."""
    file = diverged[0].parent / "mine.py"
    more = ("optimizer.final_learning_rate=1e-2", "optimizer.learning_rate=1e-2", f"methods='{file}:one_of_four',")
    assert main(arguments(checkpoint, tmp_path / "run", *(f"--config.{v}" for v in more), "--config.rounds=2")) == 0
    stored = {file.name: load_file(file) for file in (tmp_path / "run/checkpoints").rglob("*.safetensors")}
    for client in range(4):
        before, after = (stored[f"client{client:06d}-round{round:06d}.safetensors"] for round in (1, 2))
        same = [np.array_equal(before[name], after[name]) for name in before if name.startswith("personal")]
        assert all(same) if client == 2 else not any(same)


def test_a_round_with_too_few_finite_clients_ends_the_run_at_its_last_good_state(diverged):
    run, process = diverged
    assert process.returncode == 1 and "Traceback" not in process.stderr
    words = (
        "flex_jax: three_of_four seed 0 failed: diverged in round 2: of 4 clients 3 have an update that is not finite "
        "(legal, shipping, support): lower config.optimizer.learning_rate"
    )
    assert words in process.stderr
    assert "server_alone seed 0 failed: diverged in round 1: the server's new state is not finite" in process.stderr
    assert "flex_jax: error: 2 of 4 runs failed" in process.stderr
    server = run / "checkpoints/three_of_four-seed0/server"
    assert [path.name for path in server.iterdir()] == ["1"]
    lines = read_lines(run / "metrics.jsonl")
    assert {line["round"] for line in lines if line["method"] == "three_of_four"} == {0}


def test_methods_that_diverge_come_last(diverged):
    run, process = diverged
    table = [line.split() for line in (run / "summary.txt").read_text().splitlines()[2:]]
    assert sorted(row[0] for row in table[:2]) == ["fedavg", "one_of_four"]
    assert [row[:4] for row in table[2:]] == [
        [name, "0", "diverged", "diverged"] for name in ("three_of_four", "server_alone")
    ]
    assert (run / "report.html").read_text().count("diverged</td>") == 4


def test_variants_of_a_method_differ_from_it(finished, checkpoint, tmp_path):
    """Ablations of FLEx: selected at random, the same for all, without a gate, in place of the pretrained expert."""
    variants = {
        "random": {"slot": {"selection": "random"}},
        "pooled": {"slot": {"calibration": "pooled", "gate": "none"}},
        "released": {"slot": {"selection": "random", "calibration": "pooled", "gate": "routing", "training": "lora"}},
    }
    changes = [f"--config.overrides.{name}.method=flex" for name in variants]
    for name, values in variants.items():
        changes += [f"--config.overrides.{name}.slot.{key}={value}" for key, value in values["slot"].items()]
    names = ",".join(f"'{name}'" for name in variants)
    more = (f"--config.methods={names}", "--config.rounds=1", "--config.slot.rank=2", *changes)
    assert main(arguments(checkpoint, tmp_path / "run", *more)) == 0
    runs = {run["method"]: run for run in read(tmp_path / "run")["runs"]}
    assert list(runs) == list(variants)
    runs["flex"] = read(finished)["runs"][0]
    grafted = {name: [client["grafted_experts"] for client in run["clients"]] for name, run in runs.items()}
    assert grafted["random"] != grafted["flex"]
    for name in ("pooled", "released"):
        assert all(client == grafted[name][0] for client in grafted[name])
    personal = {name: run["parameters"]["personal_per_client"] for name, run in runs.items()}
    gate = 3 * 16  # layers x hidden size
    assert personal["pooled"] == personal["flex"] - gate and personal["released"] == 3 * 2 * 3 * (16 + 8)


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
