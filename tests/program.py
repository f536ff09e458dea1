"""How tests run the programs of the package on a random model of a few thousand weights."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from flex_jax import tiny
from flex_jax.models.checkpoint import save_pretrained
from flex_jax.models.config import ModelConfig, Rope
from flex_jax.models.decoder import Decoder

ROOT = Path(__file__).parents[1]
SHORT = ("--config.rounds=1", "--config.local_steps=2", "--config.evaluation.max_new_tokens=1")


def small_model() -> ModelConfig:
    """A Qwen2-MoE of a few thousand weights."""
    return ModelConfig(
        family="qwen2_moe",
        vocab_size=60,
        hidden_size=16,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=12,
        norm_topk_prob=False,
        attention_bias=True,
        tie_word_embeddings=False,
        rms_norm_eps=1e-6,
        max_position_embeddings=4096,
        rope=Rope(theta=10000.0),
        shared_expert_gate=True,
    )


def save_checkpoint(path):
    """Writes the small model with random weights and the embedded tokenizer, as a Hugging Face directory."""
    from transformers import AutoTokenizer  # here, because it takes seconds and most tests do without

    tokenizer = AutoTokenizer.from_pretrained(tiny.CHECKPOINT)
    config = dataclasses.replace(small_model(), vocab_size=len(tokenizer))
    params = Decoder(config).init(jax.random.PRNGKey(0), jnp.zeros((1, 4), jnp.int32))["params"]
    save_pretrained(path, config, params, tokenizer=tokenizer)


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


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def without_times(results):
    return [{key: value for key, value in run.items() if key != "timing"} for run in results["runs"]]


def assert_refused(main, command, words, capsys, absent=None):
    """The command ends with status 2, one line with these words (a regular expression), and without this path."""
    capsys.readouterr()
    assert main(list(map(str, command))) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and printed.err.startswith("flex_jax: error:")
    assert re.search(words, printed.err), printed.err
    assert absent is None or not absent.exists()


def count_calls(patch, function):
    """Records the calls of a function of the package, in every module that has imported it. Returns the list."""
    calls = []

    def counted(*args, **kwargs):
        calls.append((args, kwargs))
        return function(*args, **kwargs)

    for module in [module for name, module in sys.modules.items() if name.startswith("flex_jax.")]:
        for name in [name for name, value in vars(module).items() if value is function]:
            patch.setattr(module, name, counted)
    return calls


def count_method_calls(patch, owner, name):
    """Records the calls of a method of a class. Returns the list of their arguments."""
    calls, function = [], getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append((args, kwargs))
        return function(*args, **kwargs)

    patch.setattr(owner, name, counted)
    return calls
