"""The export command end to end, and a run that starts from what it wrote."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from flex_jax import export, load_pretrained
from flex_jax.locks import locked_directory
from flex_jax.main import main
from flex_jax.models.export import transformers
from flex_jax.models.families import FAMILIES
from flex_jax.restored_run import open_run
from tests.program import SHORT, arguments

ADAPTER, MODEL = "adapter_model.safetensors", "model.safetensors"


@pytest.fixture(scope="module")
def workdir(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run"
    more = ("--config.methods='flex','fedavg','local'", "--config.overrides.local.lora.rank=3")
    assert main(arguments(checkpoint, path, *SHORT, *more)) == 0
    return path


def run_export(workdir, out, *more):
    flags = {"--workdir": workdir, "--client": "1", "--format": "peft", "--out": out} | dict(
        zip(more[::2], more[1::2], strict=True)
    )
    return export.main([str(part) for pair in flags.items() for part in pair])


def names(out):
    return {path.name for path in out.iterdir()}


def test_peft_holds_the_shared_lora_of_flex(workdir, checkpoint, tmp_path, capsys):
    assert run_export(workdir, tmp_path / "one") == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert "PeftModel.from_pretrained" in line and "personal expert is not part" in line
    assert names(tmp_path / "one") == {"README.md", "adapter_config.json", ADAPTER} and names(tmp_path) == {"one"}
    held = json.loads((tmp_path / "one/adapter_config.json").read_text())
    assert held["base_model_name_or_path"] == str(checkpoint.resolve())
    assert run_export(workdir, tmp_path / "all", "--client", "shared") == 0
    one, shared = (load_file(tmp_path / name / ADAPTER) for name in ("one", "all"))
    assert one.keys() == shared.keys() and all(np.array_equal(one[name], shared[name]) for name in one)
    weights = open_run(workdir).state.server.shared["layers"]["attention"]["k_proj"]["lora_b"]
    np.testing.assert_array_equal(
        shared["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"], np.asarray(weights)[1].T
    )


def test_peft_of_local_is_the_clients_own_with_its_own_rank(workdir, tmp_path, capsys):
    for client in "01":
        assert run_export(workdir, tmp_path / client, "--method", "local", "--client", client) == 0
    assert "personal expert" not in capsys.readouterr().out
    zero, one = (load_file(tmp_path / client / ADAPTER) for client in "01")
    assert any(not np.array_equal(zero[name], one[name]) for name in zero)
    assert {min(array.shape) for array in one.values()} == {3}


def test_hf_holds_everything_and_hf_merged_plain_weights(workdir, checkpoint, tmp_path, capsys):
    out = tmp_path / "hf"
    out.mkdir()  # an empty directory may be there
    assert run_export(workdir, out, "--format", "hf") == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert str(out) in line and "trust_remote_code=True" in line
    assert {"config.json", MODEL, "modeling_flex.py", "tokenizer.json"} <= names(out)
    raw, base = (json.loads((path / "config.json").read_text()) for path in (out, checkpoint))
    assert raw["flex"] == {"personal_experts": 1, "expert_width": 8, "gate_bias": False}
    assert raw["eos_token_id"] == base["eos_token_id"] and raw["model_type"] == base["model_type"]
    slots = (
        open_run(workdir, client_ids=range(4))
        .models([0, 1, 2, 3])
        .clients.personal["layers"]["moe"]["slot"]["up_proj"]["kernel"]
    )
    held = load_file(out / MODEL)["model.layers.2.mlp.personal.experts.0.up_proj.weight"]
    np.testing.assert_array_equal(held, np.asarray(slots)[1, 2, 0].T)

    assert run_export(workdir, tmp_path / "plain", "--format", "hf-merged", "--client", "shared") == 0
    _, frozen = load_pretrained(tmp_path / "plain")
    _, before = load_pretrained(checkpoint)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), frozen, before)
    changed = {"q_proj", "k_proj", "v_proj"}
    assert not any(same["layers"]["attention"][name].pop("kernel") for name in changed)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--client", "4"), "client '4': must be shared or one of finance "),
        (("--client", "first"), "client 'first': must be shared or one of finance "),
        (("--method", "fedprox"), "--method fedprox: the run in .* has flex, fedavg, local"),
        (("--seed", "5"), "--seed 5: the run in .* has 0"),
        (("--seed", "x"), "--seed: invalid int value: 'x'"),
        (("--format", "gguf"), "--format: invalid choice: 'gguf' .*peft.*hf-merged"),
        (("--workdir", "nowhere"), "--workdir nowhere: no run there"),
        (("--format", "hf-merged"), "client legal .#1. of flex-seed0 has a personal expert; use hf$"),
        (("--method", "local", "--client", "shared"), "local-seed0 has no adapter that is shared"),
        (("--shape", "round"), "unrecognized arguments: --shape round"),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, tuple) else "",
)
def test_bad_flags_give_one_line_and_status_2(workdir, tmp_path, capsys, more, words):
    assert_refused(workdir, tmp_path / "out", more, words, capsys)
    assert names(tmp_path) == set()


def assert_refused(workdir, out, more, words, capsys):
    assert run_export(workdir, out, *more) == 2
    captured = capsys.readouterr()
    error = captured.err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("flex_jax: error:") and not captured.out
    assert re.search(words, error[0]), error


def test_a_directory_in_use_is_left_alone(workdir, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    assert_refused(workdir, tmp_path / "out", (), "must not exist yet or be an empty directory", capsys)
    assert_refused(workdir, tmp_path / "out/mine", (), "must not exist yet or be an empty directory", capsys)
    assert_refused(workdir, tmp_path / "out/mine/below", (), "cannot be written", capsys)
    assert names(tmp_path / "out") == {"mine"}


def test_nothing_is_half_written(workdir, tmp_path, monkeypatch, capsys):
    """A full disk while the last file is copied. Somebody else's directory with a similar name stays as it is."""

    def full_disk(*paths):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.shutil, "copy", full_disk)
        assert_refused(workdir, tmp_path / "out", ("--format", "hf"), "No space left", capsys)
    assert names(tmp_path) == set()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/part-0").write_text("another's")
    assert run_export(workdir, tmp_path / "out") == 0
    assert names(tmp_path) == {"out", "out.partial"} and names(tmp_path / "out.partial") == {"part-0"}
    assert names(tmp_path / "out") == {"README.md", "adapter_config.json", ADAPTER}


@pytest.mark.parametrize(("target", "copied"), [("blobs/0f", True), ("secret", False)])
def test_only_files_of_the_checkpoint_are_copied(target, copied, tmp_path, capsys):
    """A Hugging Face cache has links into its blobs. Any other link may lead to a file of its reader."""
    base, out = tmp_path / "model/snapshots/1", tmp_path / "out"
    for folder in (base, out, tmp_path / "model/blobs"):
        folder.mkdir(parents=True)
    (base / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / target).write_text("content")
    (base / "vocab.json").symlink_to(tmp_path / "model" / target)
    (base / "tokenizer_notes.txt").write_text("another file")
    transformers.copy_files(base, out, transformers.COPIED)
    assert names(out) == {"tokenizer.json", *(["vocab.json"] if copied else [])}
    assert ("vocab.json: not copied" in capsys.readouterr().err) != copied


def test_what_a_killed_export_has_left_is_removed(workdir, tmp_path):
    """What another one is writing stays."""
    for name in ("out.partial-killed", "out.partial-writing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part-0").write_text("torn")
    with locked_directory(tmp_path / "out.partial-writing"):
        assert run_export(workdir, tmp_path / "out") == 0
    assert names(tmp_path) == {"out", "out.partial-writing"}


def test_families_without_a_class_in_transformers(tmp_path):
    for wanted, slot, words in (
        ("hf", True, "no model of the family deepseek; use peft$"),
        ("hf", False, "use peft or hf-merged$"),
        ("hf-merged", True, "has a personal expert; use peft, which leaves it out$"),
    ):
        with pytest.raises(export.InputError, match=words):
            export.check_format(wanted, "0", "flex-seed0", FAMILIES["deepseek"], lora=True, slot=slot)
    export.check_format("hf-merged", "0", "fedavg-seed0", FAMILIES["deepseek"], lora=True, slot=False)
    assert "trust_remote_code=True" in export.how_to_load("hf-merged", tmp_path, FAMILIES["deepseek"], slot=False)
    assert "trust_remote_code" not in export.how_to_load("hf-merged", tmp_path, FAMILIES["mixtral"], slot=False)


def test_a_run_starts_from_an_exported_adapter(workdir, checkpoint, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    assert run_export(workdir, adapter, "--method", "fedavg", "--client", "shared") == 0
    held = open_run(workdir, "fedavg").state.server.shared
    flags = (*SHORT, f"--config.lora.path={adapter}", "--config.methods='fedavg','local'")
    still = "--config.optimizer.learning_rate=1e-30", "--config.optimizer.final_learning_rate=0.0"
    assert main(arguments(checkpoint, tmp_path / "run", *flags, *still)) == 0
    again = open_run(tmp_path / "run", "fedavg").state.server.shared
    jax.tree.map(np.testing.assert_array_equal, again, held)
    local = open_run(tmp_path / "run", "local", client_ids=range(4)).models([0, 1, 2, 3]).clients.personal
    for leaf, own in zip(jax.tree.leaves(local), jax.tree.leaves(held), strict=True):
        np.testing.assert_array_equal(leaf, np.broadcast_to(own, leaf.shape))

    command = arguments(checkpoint, tmp_path / "other", *flags, "--config.overrides.local.lora.rank=3")
    capsys.readouterr()
    assert main(command) == 2
    assert re.search(r"r is 2, must be 3 .*lora", capsys.readouterr().err)
    assert not (tmp_path / "other").exists()
    shutil.rmtree(adapter)
    assert main(arguments(checkpoint, tmp_path / "other", *flags)) == 2
    assert f"{adapter}: not a PEFT adapter directory" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
