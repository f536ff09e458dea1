"""A run read back from its work directory: every client as it was left, and one line for what cannot be read."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from flex_jax import export, generate
from flex_jax.config import default_config
from flex_jax.errors import InputError
from flex_jax.federated.checkpoint import Checkpoints
from flex_jax.main import main, parse
from flex_jax.methods import METHODS
from flex_jax.restored_run import open_run, parse_client
from flex_jax.workdir import check_config, read_client_names, read_config, take_up
from tests.program import arguments, assert_refused, count_method_calls, read, read_lines

TRACE = "[0, 3]\n[1, 2, 3]\n"  # the clients that are available in each round, then from the first line again


@pytest.fixture(scope="module")
def workdir(checkpoint, tmp_path_factory):
    """LoRA slots, and cohorts smaller than the clients: client 2 never trains."""
    folder = tmp_path_factory.mktemp("cohorts")
    (folder / "trace.jsonl").write_text(TRACE)
    more = ("slot.training=lora", "slot.rank=2", "slot.experts=2", "slot.gate_init=closed", "client.compression=topk")
    more += ("methods='flex','local'", "cohort=2", "sampling=size", f"availability={folder}/trace.jsonl")
    assert main(arguments(checkpoint, folder / "run", *(f"--config.{value}" for value in more))) == 0
    return folder / "run"


def test_cohorts_by_an_availability_trace(workdir):
    lines = [line for line in read_lines(workdir / "metrics.jsonl") if line["run"] == "flex-seed0"]
    trained = [{line["client"] for line in lines if line["round"] == n} - {None} for n in range(3)]
    assert trained[0] == trained[2] == {0, 3} and trained[1] == {1, 3}


def test_lora_slots_and_a_cohort_smaller_than_the_clients_run(workdir):
    for run in read(workdir)["runs"]:
        assert len(run["clients"]) == 4 and all(client["eval_loss"] > 0 for client in run["clients"])
        for client in run["clients"]:
            assert len(client["grafted_experts"]) == (0 if run["method"] == "local" else 3)
            assert all(len(set(layer)) == 2 for layer in client["grafted_experts"])


def test_a_run_is_restored_once_with_the_grafts_of_its_clients(workdir, monkeypatch):
    restored = count_method_calls(monkeypatch, Checkpoints, "read")
    run = open_run(workdir, client_ids=[0, 1])
    clients = run.models([1, 0]).clients
    run.shared_model(), run.models([0])
    assert len(restored) == 1
    grafted = [client["grafted_experts"] for client in read(workdir)["runs"][0]["clients"]]
    np.testing.assert_array_equal(clients.grafts["layers"]["moe"]["slot"]["expert_index"], [grafted[1], grafted[0]])


def test_a_client_that_has_not_trained_is_refused_by_a_method_that_grafts(workdir, tmp_path, capsys):
    """The experts that it grafted are not stored."""
    for name in ("2", "shipping"):
        run, words = ("--workdir", workdir, "--client", name), "client 2: flex-seed0 has not trained it yet"
        assert_refused(generate.main, [*run, "--prompt", "a"], words, capsys)
        flags = ("--format", "peft", "--out", tmp_path / "out")
        assert_refused(export.main, [*run, *flags], words, capsys, tmp_path / "out")
    with pytest.raises(InputError, match="client 2: flex-seed0 has not"):
        open_run(workdir, client_ids=[0, 2])


def test_a_client_that_has_not_trained_has_the_first_state_of_a_method_without_grafts(workdir, tmp_path, capsys):
    local = ["--workdir", str(workdir), "--method", "local"]
    adapters = []
    for client in ("0", "2"):
        assert main_export(local, client, tmp_path / client) == 0
        adapters.append(load_file(tmp_path / client / "adapter_model.safetensors"))
    changed, first = ({name: leaf.any() for name, leaf in tree.items() if "lora_B" in name} for tree in adapters)
    assert all(changed.values()) and not any(first.values()) and len(first) == 3 * 3
    capsys.readouterr()
    for client in ("2", "shared", "0"):  # nothing is shared: the backbone alone
        assert generate.main([*local, "--client", client, "--prompt", "Write a note."]) == 0
    first, backbone, trained = capsys.readouterr().out.splitlines()
    assert first == backbone != trained
    prediction = read(workdir)["runs"][1]["clients"][2]["examples"][0]
    question = ("--prompt", prediction["instruction"], "--context", prediction["context"])
    assert generate.main([*local, "--client", "2", *question]) == 0
    assert capsys.readouterr().out == f"{prediction['prediction']}\n"


def test_a_method_without_a_shared_model_has_none(workdir):
    run = open_run(workdir)
    with pytest.raises(InputError, match="client shared: flex-seed0 shares only a part of its adapters"):
        run._replace(spec=run.spec._replace(method=METHODS["fedmoe"]())).shared_model()


def main_export(flags, client, out):
    return export.main([*flags, "--client", client, "--format", "peft", "--out", str(out)])


DEPARTMENTS = ["finance", "legal", "shipping", "support"]


@pytest.mark.parametrize(
    ("text", "names", "client"),
    [
        ("shared", DEPARTMENTS, None),
        ("legal", DEPARTMENTS, 1),
        ("1", DEPARTMENTS, 1),
        ("#1", DEPARTMENTS, 1),
        ("1", ["1", "2", "3"], 0),  # hospital 1, which has index 0
        ("#1", ["1", "2", "3"], 1),
        ("10", ["2", "10"], 1),
        ("2024", ["2023", "2024"], 1),
        ("1", ["client_0", "client_1"], 1),
    ],
)
def test_a_name_wins_over_an_index(text, names, client):
    assert parse_client(text, names) == client


@pytest.mark.parametrize(
    ("text", "names", "words"),
    [
        ("0", ["1", "2", "3"], r"one of 1 \(#0\), 2 \(#1\), 3 \(#2\); #0 is the client with that index"),
        ("1", ["math_1", "math_2"], "#1 is the client with that index"),
        ("1", ["1.0", "2.0"], "#1 is the client with that index"),
        ("0", ["²", "³"], "#0 is the client with that index"),
        ("4", DEPARTMENTS, r"client '4': must be shared or one of finance \(#0\)"),
        ("#4", DEPARTMENTS, "must be shared or one of"),
        ("01", DEPARTMENTS, "must be shared or one of"),
        ("-1", DEPARTMENTS, "must be shared or one of"),
        ("9" * 5000, DEPARTMENTS, "client '999"),
        ("", DEPARTMENTS, "must be shared or one of"),
    ],
)
def test_an_ambiguous_or_unknown_client_is_refused(text, names, words):
    with pytest.raises(InputError, match=words):
        parse_client(text, names)


def test_the_names_of_clients_are_known_before_a_run_has_finished(workdir, tmp_path, capsys):
    """They belong to the run: changed names are no longer its clients'."""
    assert read_client_names(workdir) == DEPARTMENTS
    copy = shutil.copytree(workdir, tmp_path / "run")
    (copy / "results.json").unlink()
    ask = ("--workdir", str(copy), "--client", "legal", "--prompt", "Write a note.")
    assert generate.main(list(ask)) == 0
    assert "answered by legal (#1)" in capsys.readouterr().err
    (copy / "clients.json").write_text(json.dumps(["legal", "finance", "shipping", "support"]))
    assert_refused(generate.main, ask, r"of another run \(different: client names\)", capsys)
    (copy / "clients.json").write_text("[1, 2]")
    assert_refused(generate.main, ask, "clients.json: not a list of 4 names", capsys)


SPIES = "import pathlib\nfrom flex_jax.methods import METHODS\npathlib.Path('PLACE').touch()\nmine = METHODS['local']\n"


def test_a_work_directory_does_not_run_its_programs(workdir, tmp_path, capsys):
    """Its config may name any file; only the command itself can allow it."""
    copy, program, place = shutil.copytree(workdir, tmp_path / "run"), tmp_path / "mine.py", tmp_path / "was_run"
    program.write_text(SPIES.replace("PLACE", str(place)))
    config = read(copy, "config.json") | {"methods": ["flex"], "overrides": {"flex": {"method": f"{program}:mine"}}}
    (copy / "config.json").write_text(json.dumps(config))
    words = f"its method is a program, {program}: read it, then give --trust {program} to run it"
    out = ("--format", "peft", "--out", tmp_path / "out")
    for trust in ((), ("--trust", tmp_path / "another.py")):
        assert_refused(generate.main, ["--workdir", copy, *ONE, *trust], words, capsys)
        assert_refused(export.main, ["--workdir", copy, "--client", "1", *out, *trust], words, capsys)
    assert not place.exists()


def test_a_config_is_read_back_as_it_was(tmp_path):
    flags = ["--config", "configs/default.py", "--config.methods='hetlora','far','mine.py:mine'", "--config.seeds=3,"]
    flags += ["--config.hparams.hetlora.ranks=(8, 16)", "--config.hparams.far.mu=2", "--config.hparams.mine.on=True"]
    flags += ["--config.hparams.mine.kinds=('a', 'b')", "--config.hparams.mine.none=()"]
    flags += ["--config.overrides.far.method=fedprox", "--config.overrides.far.optimizer.learning_rate=1"]
    config, _ = parse(flags)
    take_up(tmp_path, config, {}, [])
    again = read_config(tmp_path)
    assert again.to_dict() == config.to_dict() != default_config().to_dict()
    assert again.hparams.hetlora.ranks == (8, 16) and again.hparams.mine.none == ()
    check_config(tmp_path, again)
    config.hparams.far.mu = 3
    with pytest.raises(InputError, match=r"holds a run of another config \(different: hparams.far.mu\)"):
        check_config(tmp_path, config)


ONE = ("--client", "1", "--prompt", "Write a note.")


def test_a_broken_config_of_the_run(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{\n")
    assert_refused(generate.main, ["--workdir", tmp_path, *ONE], "config.json: cannot be read", capsys)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("config.json", {"clients": 3}, "clients.json: not a list of 3 names"),
        ("config.json", {"methods": []}, "config.methods is"),
        ("config.json", {"methods": ["flox"]}, "flox-seed0: no checkpoint of this method"),
        ("config.json", {"rank": 3}, "not the config of a run of this version"),
        ("config.json", {"hparams": {"flex": {"mu": 1}}}, "config.hparams.flex.mu is unknown"),
    ],
)
def test_a_damaged_run_is_one_line(workdir, tmp_path, capsys, file, change, words):
    copy = shutil.copytree(workdir, tmp_path / "run")
    text = "" if change is None else json.dumps(json.loads((copy / file).read_text()) | change)
    (copy / file).write_text(text)
    assert_refused(generate.main, ["--workdir", copy, *ONE], words, capsys)


def test_a_lost_client_file_is_one_line(workdir, tmp_path, capsys):
    copy = shutil.copytree(workdir, tmp_path / "run")
    for file in (copy / "checkpoints/flex-seed0/clients").glob("client000001-*"):
        file.unlink()
    words = "client000001-round000002.safetensors: lost or damaged"
    assert_refused(generate.main, ["--workdir", copy, *ONE], words, capsys)
