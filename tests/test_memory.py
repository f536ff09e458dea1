"""Sizes that cannot fit in memory are refused with a figure, the limit and the keys to lower."""

import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from flex_jax import memory
from flex_jax.errors import InputError
from flex_jax.federated.compression import tree_bytes
from flex_jax.federated.cost_model import Plan, StepShape, _activation_bytes
from flex_jax.main import main
from flex_jax.memory import check_generation, check_plan, check_tokens, device_memory, host_memory
from tests.program import arguments, assert_refused

PLAN = Plan(*[0] * len(Plan._fields))
GIB = 2**30


@pytest.fixture
def small(monkeypatch):
    """A machine of 10 GiB and a device of 5 GiB."""
    monkeypatch.setattr(memory, "host_memory", lambda: 10 * GIB)
    monkeypatch.setattr(memory, "device_memory", lambda: 5 * GIB)


def test_a_device_without_memory_of_its_own_has_the_machines():
    assert 2**28 < host_memory() < 2**50
    assert device_memory() == host_memory()  # on CPU


@pytest.mark.parametrize(
    ("parts", "keys"),
    [
        ({"frozen_bytes": 7 * GIB}, "the size of the model, or use config.model.quantisation"),
        ({"activation_bytes": 7 * GIB}, "config.batch_size, config.sequence_length, config.clients or config.cohort"),
        ({"client_bytes": 7 * GIB}, "config.lora.rank, config.slot.rank, config.clients, config.cohort or a size in "),
    ],
)
def test_a_plan_far_above_the_memory_names_what_takes_most(small, parts, keys):
    words = f"method flex: a round on one device would take about 7 GiB of memory, and there are 5 GiB: lower {keys}"
    with pytest.raises(InputError, match=words):
        check_plan("flex", PLAN._replace(peak_bytes=7 * GIB, **parts))
    check_plan("flex", PLAN._replace(peak_bytes=6 * GIB))  # a plan is an estimate from above


def test_tokens_of_a_round_are_held_against_the_machine(small):
    check_tokens("a round", 20 * 2**20, 64, "config.local_steps")
    with pytest.raises(InputError, match="a round would take about 20 GiB of memory, and there are 10 GiB: lower "):
        check_tokens("a round", 40 * 2**20, 64, "config.local_steps")


def test_a_cache_is_counted_by_hand(monkeypatch, model, params):
    """3 layers x 2 key-value heads x (4 + 4) numbers of 4 bytes for each token, in addition to the backbone."""
    needed = tree_bytes(params) + 2 * 5 * 70 * 3 * 2 * 8 * 4
    monkeypatch.setattr(memory, "device_memory", lambda: needed)
    check_generation(model, params, (2, 5, 70), "--batch-size")
    with pytest.raises(InputError, match="generation for 2 x 5 prompts at once, of 71 tokens would take .*: lower --b"):
        check_generation(model, params, (2, 5, 71), "--batch-size")
    check_generation(model, params, (2, 5, 71), "--batch-size", num_devices=2)


def test_flash_attention_has_no_scores_in_the_plan(monkeypatch, model):
    """2 x 3 sequences of 11 tokens, 4 heads: three arrays of float32."""
    spec: Any = SimpleNamespace(model=model)
    step, dtype = StepShape(clients=2, batch_size=3, sequence_length=11), jnp.dtype("bfloat16")
    scores = _activation_bytes(spec, step, 1, dtype)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    scores -= _activation_bytes(spec, step, 1, dtype)
    assert scores == 3 * 2 * 3 * 4 * 11 * 11 * 4
    assert _activation_bytes(spec, step, 1, jnp.dtype("float32")) > _activation_bytes(spec, step, 1, dtype) + scores


@pytest.mark.parametrize(
    ("flag", "key"),
    [
        ("local_steps=1000000000", "config.local_steps"),
        ("batch_size=1000000000", "config.batch_size"),
        ("evaluation.batch_size=1000000000", "config.evaluation.batch_size"),
        ("lora.rank=2147483646", "config.lora.rank"),
    ],
)
def test_a_huge_value_is_refused_before_anything_starts(flag, key, checkpoint, tmp_path, capsys):
    words = rf"would take about [\d.]+ [TP]iB of memory, and there are .* lower .*{re.escape(key)}"
    assert_refused(main, arguments(checkpoint, tmp_path / "run", f"--config.{flag}"), words, capsys, tmp_path / "run")
