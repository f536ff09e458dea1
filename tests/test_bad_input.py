"""Mistakes in data, checkpoint and config: one line, status 2, and no work directory."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from flex_jax.building import build_backbone
from flex_jax.config import default_config
from flex_jax.errors import InputError
from flex_jax.main import main
from flex_jax.models.checkpoint import WEIGHTS, save_pretrained
from flex_jax.models.decoder import Decoder
from tests.program import arguments, assert_refused


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
    assert_refused(main, arguments(checkpoint, tmp_path / "run", *flags), words, capsys, tmp_path / "run")


def test_a_cohort_too_small_for_its_aggregation(checkpoint, tmp_path, capsys):
    command = arguments(checkpoint, tmp_path / "run", "--config.server.aggregation=krum")
    assert_refused(main, command, "config.server.aggregation: krum .* cohort", capsys, tmp_path / "run")


def test_fewer_available_clients_than_a_cohort(checkpoint, tmp_path, capsys):
    (tmp_path / "trace.jsonl").write_text("[0]\n")
    more = ("--config.cohort=2", f"--config.availability={tmp_path}/trace.jsonl")
    command, words = (
        arguments(checkpoint, tmp_path / "run", *more),
        "trace.jsonl:1: has 1 clients: must have at least 2",
    )
    assert_refused(main, command, words, capsys, tmp_path / "run")


def test_more_grafted_experts_than_experts(checkpoint, tmp_path, capsys):
    command = arguments(checkpoint, tmp_path / "run", "--config.slot.experts=7")
    assert_refused(main, command, r"config.slot.experts is 7: must be at most 6", capsys, tmp_path / "run")


def test_an_unknown_method_and_an_unknown_category(checkpoint, tmp_path, capsys):
    command = arguments(checkpoint, tmp_path / "run", "--config.methods='flax',")
    assert_refused(
        main, command, "'flax' is unknown: must be path/to/file.py:name or one of ", capsys, tmp_path / "run"
    )
    command = arguments(checkpoint, tmp_path / "run", "--config.data.categories='poetry',")
    assert_refused(main, command, "poetry", capsys, tmp_path / "run")


def test_a_bad_checkpoint_names_all_its_tensors(checkpoint, tmp_path, capsys):
    broken = copied(checkpoint, tmp_path / "broken")
    tensors = load_file(broken / WEIGHTS)
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = np.zeros((2, 2), np.float32)
    save_file(tensors, broken / WEIGHTS)
    command = arguments(broken, tmp_path / "run")
    assert_refused(main, command, "model.norm.weight is missing.*lm_head|lm_head.*model.norm", capsys, tmp_path / "run")


def copied(checkpoint, directory):
    directory.mkdir()
    for file in checkpoint.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b"[" * 100_000),
        ("tokenizer_config.json", b'{"eos_token": "\\ud800"}'),
        ("tokenizer_config.json", b'{"eos_token": "\0"}'),
        ("tokenizer_config.json", b'{"model_max_length": ' + b"9" * 10_000 + b"}"),
        ("tokenizer.json", b'{"a":' * 100_000),
        ("tokenizer.json", b'{"a": "\xff"}'),
        ("tokenizer.json", None),
        ("special_tokens_map.json", b"[" * 100_000),
    ],
)
def test_a_broken_tokenizer_is_one_line(name, content, checkpoint, tmp_path, capsys):
    broken = copied(checkpoint, tmp_path / "broken")
    if content is None:  # what only the part of transformers that is not Python notices
        content = (broken / name).read_bytes().replace(b'"id": 0,', b'"id": 1000000000000,', 1)
        content = content if b"1000000000000" in content else content.replace(b'"id":0,', b'"id":1000000000000,', 1)
    (broken / name).write_bytes(content)
    command, words = arguments(broken, tmp_path / "run"), "broken: no usable tokenizer in the checkpoint directory"
    assert_refused(main, command, words, capsys, tmp_path / "run")


@pytest.mark.parametrize("tokenizer_class", ["Custom", None])
def test_code_of_a_checkpoint_is_not_run_and_not_asked_about(
    tokenizer_class, checkpoint, model_config, tmp_path, monkeypatch
):
    """A DeepSeek checkpoint brings its code, which transformers would run after a question."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    changes = {"vocab_size": len(tokenizer), "attention_bias": False, "intermediate_size": 8}
    changes |= {"shared_expert_gate": False, "shared_expert_intermediate_size": 16}
    config = dataclasses.replace(model_config, family="deepseek", **changes)
    params = Decoder(config).init(jax.random.PRNGKey(0), jnp.zeros((1, 4), jnp.int32))["params"]
    hostile = tmp_path / "hostile"
    save_pretrained(hostile, config, params, tokenizer=tokenizer)
    (hostile / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for name, classes in (("config", ("AutoConfig", "AutoModel")), ("tokenizer_config", ("AutoTokenizer",))):
        raw = json.loads((hostile / f"{name}.json").read_text())
        raw |= {"auto_map": dict.fromkeys(classes, "code.Custom"), "tokenizer_class": tokenizer_class}
        (hostile / f"{name}.json").write_text(json.dumps(raw))
    asked = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "y")
    settings = default_config()
    settings.model.path = str(hostile)
    with contextlib.suppress(InputError):
        assert build_backbone(settings).tokenizer("a few words")["input_ids"]
    assert not asked and not (tmp_path / "ran").exists()


def test_a_tokenizer_larger_than_the_embedding(checkpoint, model_config, params, tmp_path, capsys):
    save_pretrained(tmp_path / "small", model_config, params, tokenizer=AutoTokenizer.from_pretrained(checkpoint))
    command = arguments(tmp_path / "small", tmp_path / "run")
    assert_refused(main, command, "embedding has 60 rows", capsys, tmp_path / "run")
