"""Hyperparameters of methods: they reach their method alone, and every mistake in them is one line."""

import numpy as np
import pytest

from flex_jax.building import check_method_names, resolve_method
from flex_jax.config import default_config
from flex_jax.errors import InputError
from flex_jax.experiment import run
from flex_jax.main import load, main, override
from flex_jax.methods import METHODS, make_method
from flex_jax.restored_run import open_run
from tests.program import ROOT, SHORT, arguments, assert_refused


def config_of(*flags):
    config = default_config()
    override(config, [f"--config.{flag}" for flag in flags])
    return config


def test_a_hyperparameter_reaches_its_method():
    config = config_of("methods='fedprox','fedavg'", "hparams.fedprox.mu=0.5")
    method = resolve_method(config, "fedprox").method
    assert method is make_method("fedprox", {"mu": 0.5}) is not make_method("fedprox")
    assert resolve_method(config, "fedavg").method is make_method("fedavg")


def test_a_variant_has_its_own():
    config = config_of("methods='fedprox','far'", "overrides.far.method=fedprox", "hparams.far.mu=0.5")
    check_method_names(config)
    assert resolve_method(config, "far").method is make_method("fedprox", {"mu": 0.5})
    assert resolve_method(config, "fedprox").method is make_method("fedprox")
    config = config_of("methods='fedprox','far'", "overrides.far.method=fedprox", "hparams.fedprox.mu=0.5")
    check_method_names(config)
    assert resolve_method(config, "far").method is make_method("fedprox")


WRONG = [  # flags, and what the line says
    ("methods=fedprox", "hparams.fedprox.mu=-1", r"config.hparams.fedprox.mu is -1: must be a number of at least 0"),
    ("methods=fedprox", "hparams.fedprox.mu=high", r"config.hparams.fedprox.mu is 'high': must be a number"),
    ("methods=fedprox", "hparams.fedprox.mu=True", r"config.hparams.fedprox.mu is True: must be a number"),
    ("methods=fedprox", "hparams.fedprox.nu=1", r"config.hparams.fedprox.nu is unknown: the method has mu$"),
    ("methods=fedavg", "hparams.fedavg.mu=1", r"config.hparams.fedavg.mu is unknown: the method has no hyperparam"),
    ("methods=apfl", "hparams.apfl.alpha=1.5", r"config.hparams.apfl.alpha is 1.5: must be a number from 0 to 1"),
    ("methods=fedrep", "hparams.fedrep.personal_steps=0.0", r"fedrep.personal_steps is 0.0: must be a number above 0"),
    ("methods=fdlora", "hparams.fdlora.sync_every=2.5", r"fdlora.sync_every is 2.5: must be an integer of at least 1"),
    ("methods=flora", "hparams.flora.ranks=(0,)", r"flora.ranks is \(0,\): must be a tuple of integers of at least 1"),
    ("methods=flora", "hparams.flora.ranks=8", r"flora.ranks is 8: must be a tuple"),
    ("methods=fedamole", "hparams.fedamole.client_experts=5", r"config.hparams.fedamole: client_experts is 5: must be"),
    ("methods=fedprox", "hparams.fedprx.mu=1", r"config.hparams.fedprx names no method of .* the nearest is fedprox$"),
]


@pytest.mark.parametrize("flags", WRONG, ids=[flags[1] for flags in WRONG])
def test_a_wrong_hyperparameter_is_refused_before_anything_is_loaded(flags, tmp_path):
    *flags, words = flags
    config = config_of(*flags, "model.path=nowhere", "data.path=nowhere")
    with pytest.raises(InputError, match=words) as error:
        run(config, tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_hyperparameters_of_a_method_that_runs_as_a_variant_only_are_refused(tmp_path):
    config = config_of("methods=far", "overrides.far.method=fedprox", "hparams.fedprox.mu=0.5", "model.path=nowhere")
    with pytest.raises(InputError, match=r"hparams.fedprox: no run has this name; its variant has config.hparams.far$"):
        run(config, tmp_path / "run")


def test_what_a_narrowed_choice_of_methods_leaves_unused_is_told_in_one_line(capsys):
    config = load(str(ROOT / "configs/compare.py"))
    check_method_names(config)
    assert capsys.readouterr().err == ""
    config.methods = ("flex", "ditto")
    check_method_names(config)
    line = capsys.readouterr().err
    assert line.startswith("flex_jax: not used, as config.methods does not name them: ") and line.count("\n") == 1
    assert "overrides.flex_random" in line and "overrides.fedprox" in line and "hparams.flora" in line
    assert "overrides.flex," not in line and "ditto" not in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["overrides.fedprx.lora.rank=2"],
            "config.overrides.fedprx names no method of this run: the nearest is fedprox$",
        ),
        (
            ["overrides.far.method=fedprx"],
            "config.overrides.far.method is 'fedprx', no method: the nearest is fedprox$",
        ),
        (["overrides.far.method=fedprox", "hparams.far.nu=2"], "config.hparams.far.nu is unknown: the method has mu$"),
        (["hparams.fedprox.nu=2"], "config.hparams.fedprox.nu is unknown: the method has mu$"),
    ],
)
def test_what_is_not_run_is_checked_all_the_same(flags, words):
    with pytest.raises(InputError, match=words):
        check_method_names(config_of("methods=flex", *flags))


def test_a_mistake_is_one_line_of_the_program(checkpoint, tmp_path, capsys):
    command = arguments(checkpoint, tmp_path / "run", "--config.method=fedprox", "--config.hparams.fedprox.nu=1")
    assert_refused(main, command, "config.hparams.fedprox.nu is unknown", capsys, tmp_path / "run")
    more = ("--config.method=flora", "--config.lora.rank=2", "--config.hparams.flora.ranks=(1, 3)")
    command = arguments(checkpoint, tmp_path / "run", *more)
    assert_refused(main, command, r"flora: ranks is \(1, 3\): must be at most config.lora.rank, 2", capsys)


MINE = """
from functools import partial
import jax
import optax
from flex_jax import Method
from flex_jax.federated.method import ServerRule

def scaled(eta: float = 1.0, *, start=0) -> Method:
    def update(server, context):
        mean = jax.tree.map(lambda leaf: eta * leaf, context.mean(context.uploads.delta))
        return server._replace(shared=optax.apply_updates(server.shared, mean))

    return Method(ownership=((r".*", "shared"),), server=ServerRule(update=update))

def needs(eta: float) -> Method:
    return scaled(eta)

def foreign(eta: "Rate") -> Method:
    return scaled(eta)

twice = partial(scaled, eta=2.0)
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    file = tmp_path_factory.mktemp("own") / "mine.py"
    file.write_text(MINE)
    return file


def test_a_method_of_ones_own_runs_with_its_hyperparameter(mine, checkpoint, tmp_path):
    """A server with eta = 2 goes twice as far as one with the default."""
    moved = []
    for hparams in ((), ("--config.hparams.scaled.eta=2",)):
        workdir = tmp_path / str(len(moved))
        assert main(arguments(checkpoint, workdir, *SHORT, f"--config.method={mine}:scaled", *hparams)) == 0
        moved.append(open_run(workdir, trust=mine).state.server.shared["layers"]["attention"]["q_proj"]["lora_b"])
    assert np.abs(moved[0]).max() > 0
    np.testing.assert_allclose(moved[1], 2 * moved[0], rtol=1e-6)  # it starts from zero


@pytest.mark.parametrize(
    ("name", "hparams", "words"),
    [
        ("scaled", {"eta": "x"}, r"hparams.eta is 'x': must be a number of at most 1e38$"),
        ("scaled", {"rate": 1.0}, r"hparams.rate is unknown: the method has eta, start$"),
        ("needs", {}, r"hparams.eta is missing: the method has no default for it$"),
        ("foreign", {"eta": 1.0}, r"hparams: an annotation of the method cannot be read \(name 'Rate' is not defined"),
        ("twice", {"eta": "x"}, r"hparams.eta is 'x': must be a number of at most 1e38$"),
    ],
)
def test_a_wrong_hyperparameter_of_ones_own_method_is_one_line(mine, name, hparams, words):
    with pytest.raises(InputError, match=words):
        make_method(f"{mine}:{name}", hparams)


def test_a_method_of_ones_own_is_made_once_for_equal_hyperparameters(mine):
    assert make_method(f"{mine}:needs", {"eta": 2}) is make_method(f"{mine}:needs", {"eta": 2})
    assert make_method(f"{mine}:twice") is not make_method(f"{mine}:twice", {"eta": 3.0, "start": (1, "a")})


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_defaults_and_checks_its_hyperparameters(name):
    """An argument without an annotation would take any value."""
    parameters = METHODS[name].__annotations__.keys() - {"return"}
    assert make_method(name) is make_method(name, {})
    for hparam in parameters:
        with pytest.raises(InputError, match=rf"^hparams.{hparam} is \(None,\): must be "):
            make_method(name, {hparam: (None,)})
    assert parameters == set(METHODS[name].__code__.co_varnames[: METHODS[name].__code__.co_argcount])
