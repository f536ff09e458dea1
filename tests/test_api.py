"""The public names, what importing them costs, and a schema that agrees with the code."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import flex_jax
from flex_jax.config import SCHEMA
from flex_jax.data.partition import KINDS
from flex_jax.federated.aggregation import RULES
from flex_jax.federated.cohort import sample_cohort
from flex_jax.federated.compression import PACKERS
from flex_jax.grafting import selection
from flex_jax.ops.quantised import CLIPS
from tests.program import ROOT

SLOW = ("jax", "flax", "optax", "orbax", "datasets", "transformers", "matplotlib")  # each takes up to seconds
WRONG = {
    "main": (["--config", "nosuch.py"], ["--config", "configs/default.py", "--config.rounds=0"], ["--bogus"]),
    "generate": ([], ["--workdir", "nowhere"], ["--workdir", "nowhere", "--prompt", "a", "--temperature", "cold"]),
    "export": ([], ["--workdir", "nowhere", "--client", "0", "--format", "gguf", "--out", "out"]),
}


def python(program):
    """Runs a program in a new process. Returns its last line."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_importing_the_package_imports_nothing_slow():
    assert python(f"import sys, flex_jax; print([name for name in {SLOW} if name in sys.modules])") == "[]"


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_command_line_is_answered_before_slow_imports(command):
    program = f"import sys; from flex_jax.{command} import main; print([main(flags) for flags in {WRONG[command]}], "
    program += f"[name for name in {SLOW} if name in sys.modules])"
    assert python(program) == f"{[2] * len(WRONG[command])} []"


def test_the_public_names_are_those_of_their_modules():
    assert flex_jax.__all__ == sorted(flex_jax.__all__) and len(flex_jax.__all__) > 5
    for name in flex_jax.__all__:
        public = getattr(flex_jax, name)
        home = "flex_jax.methods" if name == "METHODS" else public.__module__
        assert getattr(sys.modules[home], name) is public
    assert flex_jax.METHODS["flex"]() == flex_jax.Method(flex_jax.METHODS["flex"]().ownership, grafts="client")


def test_star_import_and_an_unknown_name():
    names = {}
    exec("from flex_jax import *", names)
    assert set(flex_jax.__all__) <= names.keys()
    with pytest.raises(AttributeError, match="module 'flex_jax' has no attribute 'load_pretraind'"):
        _ = flex_jax.load_pretraind
    with pytest.raises(ImportError):
        exec("from flex_jax import load_pretraind")


def choices(key):
    """The values that the schema allows for a key with a list of choices."""
    check = SCHEMA[key].check
    listed = check.allowed.removeprefix("one of ").split(", ")
    assert all(check.accepts(value) for value in listed) and not check.accepts("other")
    return listed


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("server.aggregation", RULES),
        ("client.compression", PACKERS),
        ("data.partition", KINDS),
        ("model.quantisation", ("none", *CLIPS)),
    ],
)
def test_the_choices_of_the_schema_are_those_of_the_code(key, known):
    assert sorted(choices(key)) == sorted(known)


def test_every_way_to_draw_a_cohort_is_one_of_the_code():
    for sampling in choices("sampling"):
        assert len(sample_cohort(np.zeros(2, np.uint32), 0, np.ones(4), 2, sampling=sampling)) == 2
    with pytest.raises(KeyError):
        sample_cohort(np.zeros(2, np.uint32), 0, np.ones(4), 2, sampling="other")


def test_every_way_to_select_experts_is_one_of_the_code(monkeypatch):
    for name in ("by_reconstruction", "by_router", "at_random"):
        monkeypatch.setattr(selection, name, lambda *args, name=name: name)
    model = SimpleNamespace(config=SimpleNamespace(num_moe_layers=1, num_experts=1))

    def select(kind):
        settings = selection.SelectionSettings(kind, 1)
        return selection.select(model, {}, lambda: [], settings, num_clients=1, key=None)

    assert sorted(map(select, choices("slot.selection"))) == ["at_random", "by_reconstruction", "by_router"]
    with pytest.raises(KeyError):
        select("other")
