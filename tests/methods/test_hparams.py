"""Hyperparameters: those of the package's methods and of a user's file, and one line for each mistake in them."""

import inspect
from functools import partial

import jax
import pytest

from flex_jax.checks import Check
from flex_jax.errors import InputError
from flex_jax.federated.method import Method
from flex_jax.methods import METHODS, check_hparams, make_method

OWN = """
from functools import partial
from typing import TYPE_CHECKING

from flex_jax.checks import Probability
from flex_jax.errors import InputError
from flex_jax.federated.method import Method
from flex_jax.methods import fedprox

if TYPE_CHECKING:
    from nowhere import Nothing


def mine(size: int, share: Probability = 0.5, rate: float = 1.0, name: str = "a", on: bool = False, free=None):
    if share == rate:
        raise InputError(f"share is {share}: must not be rate")
    if name == "crash":
        raise ZeroDivisionError("a mistake of the user")
    return 3 if name == "three" else Method(ownership=((r".*", "shared"),))


weaker = partial(fedprox, mu=1e-3)


def open_ended(mu: float = 0.1, **others):
    return fedprox(mu)


def unreadable(mu: "Nothing" = 1):
    return fedprox(mu)


variable = Method(ownership=())
"""


@pytest.fixture(scope="module")
def own_file(tmp_path_factory):
    """A user's own file of methods."""
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(OWN)
    return path


def error_of(name, hparams):
    with pytest.raises(InputError) as caught:
        make_method(name, hparams, "config.hparams.run")
    message = str(caught.value)
    assert "\n" not in message
    return message


HAS = "the method has"
ADAM = "eta, tau, beta1, beta2"
IN_PACKAGE = {  # (method, hyperparameters): error
    "unknown": ("fedprox", {"nu": 1.0}, f"config.hparams.run.nu is unknown: {HAS} mu"),
    "unknown of several": ("fedadam", {"mu": 1.0}, f"config.hparams.run.mu is unknown: {HAS} {ADAM}"),
    "unknown of none": ("fedavg", {"mu": 1.0}, f"config.hparams.run.mu is unknown: {HAS} no hyperparameters"),
    "a text": ("fedprox", {"mu": "0.1"}, "config.hparams.run.mu is '0.1': must be a number of at least 0"),
    "a flag": ("fedprox", {"mu": True}, "config.hparams.run.mu is True: must be a number of at least 0"),
    "no integer": ("fedper", {"personal_layers": 1.5}, "is 1.5: must be an integer of at least 1"),
    "beyond int32": ("fedper", {"personal_layers": 2**31}, "must be an integer of at least 1 and at most 2147483647"),
    "beyond float32": ("fedprox", {"mu": 1e39}, "must be a number of at least 0 and at most 1e38"),
    "a rank beyond int32": ("flora", {"ranks": (2**31,)}, "must be a tuple of integers of at least 1 and at most 2147"),
    "no tuple": ("flora", {"ranks": 8}, "config.hparams.run.ranks is 8: must be a tuple of integers of at least 1"),
    "a list": ("flora", {"ranks": [8, 4]}, "config.hparams.run.ranks is [8, 4]: must be a tuple of integers"),
    "too small": ("fedadam", {"tau": 0.0}, "config.hparams.run.tau is 0.0: must be a number above 0"),
    "too large": ("apfl", {"alpha": 1.1}, "config.hparams.run.alpha is 1.1: must be a number from 0 to 1"),
    "not a number": ("ditto", {"lambda_": float("nan")}, "config.hparams.run.lambda_ is nan: must be a number"),
    "together": ("fedamole", {"client_experts": 5}, "config.hparams.run: client_experts is 5: must be at most"),
}
IN_A_FILE = {
    "missing": ("mine", {}, "config.hparams.run.size is missing: the method has no default for it"),
    "unknown": ("mine", {"size": 1, "wide": 2}, f"is unknown: {HAS} size, share, rate, name, on, free"),
    "no integer": ("mine", {"size": "1"}, "config.hparams.run.size is '1': must be an integer"),
    "no number": ("mine", {"size": 1, "rate": "fast"}, "config.hparams.run.rate is 'fast': must be a number"),
    "no text": ("mine", {"size": 1, "name": 3}, "config.hparams.run.name is 3: must be a text"),
    "no flag": ("mine", {"size": 1, "on": 1}, "config.hparams.run.on is 1: must be True or False"),
    "an integer of a thousand digits": ("mine", {"size": 10**1000}, "must be an integer of at most 2147483647"),
    "out of range": ("mine", {"size": 1, "share": 1.0}, "is 1.0: must be a number of at least 0 and below 1"),
    "not hashable": ("mine", {"size": 1, "free": [1]}, "is [1]: must be a number, a text or a tuple of them"),
    "together": ("mine", {"size": 1, "rate": 0.5}, "config.hparams.run: share is 0.5: must not be rate"),
    "a partial's": ("weaker", {"nu": 1.0}, f"config.hparams.run.nu is unknown: {HAS} mu"),
    "of **others": ("open_ended", {"nu": 1.0}, f"config.hparams.run.nu is unknown: {HAS} mu"),
    "unreadable": ("unreadable", {"mu": 1}, "config.hparams.run: an annotation of the method cannot be read"),
}


@pytest.mark.parametrize("kind", IN_PACKAGE)
def test_a_mistake_in_a_hyperparameter_of_the_package_is_one_line(kind):
    name, hparams, message = IN_PACKAGE[kind]
    assert message in error_of(name, hparams)


@pytest.mark.parametrize("kind", IN_A_FILE)
def test_a_mistake_in_a_hyperparameter_of_ones_own_file_is_one_line(kind, own_file):
    name, hparams, message = IN_A_FILE[kind]
    assert message in error_of(f"{own_file}:{name}", hparams)


def test_a_mistake_in_ones_own_function_names_its_line(own_file):
    line = 1 + OWN.splitlines().index('        raise ZeroDivisionError("a mistake of the user")')
    message = error_of(f"{own_file}:mine", {"size": 1, "name": "crash"})
    assert message.endswith(f"{own_file}, line {line}: ZeroDivisionError: a mistake of the user")
    assert "must return a Method, not int" in error_of(f"{own_file}:mine", {"size": 1, "name": "three"})
    for attribute in ("variable", "nothing"):
        message = error_of(f"{own_file}:{attribute}", {})
        assert message.endswith(f"{attribute} in {own_file} must be a function that returns a Method")


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("grafts='clients'", "grafts is 'clients': must be one of none, client, all"),
        ("server=ServerRule(extra_visibility='all')", "extra_visibility is 'all': must be one of server, broadcast"),
    ],
)
def test_a_misspelt_choice_of_a_method_is_refused(field, words, tmp_path):
    file = tmp_path / "mine.py"
    head = "from flex_jax.federated.method import Method, ServerRule\n\ndef mine():\n"
    file.write_text(f"{head}    return Method(ownership=(('.*', 'shared'),), {field})\n")
    assert words in error_of(f"{file}:mine", {})


def test_equal_hyperparameters_give_the_same_method(own_file):
    """The same object, in any order of the names."""
    for name, hparams in (("fedadam", {"eta": 1.0, "tau": 0.5}), (f"{own_file}:mine", {"size": 3, "rate": 2.0})):
        method = make_method(name, hparams)
        assert isinstance(method, Method)
        assert make_method(name, dict(reversed(hparams.items()))) is method
    assert make_method("fedprox") is make_method("fedprox", {})
    assert make_method("fedprox", {"mu": 1}) is make_method("fedprox", {"mu": 1.0})
    assert make_method("fedprox", {"mu": 0.5}) is not make_method("fedprox", {"mu": 0.25})
    assert make_method(f"{own_file}:weaker", {"mu": 0.5}).ownership == ((r".*", "shared"),)
    assert make_method(f"{own_file}:open_ended").ownership == ((r".*", "shared"),)


def test_equal_specs_compile_once(spec_of):
    """A function whose static argument is the spec is traced once for equal hyperparameters."""
    traced = []

    @partial(jax.jit, static_argnums=0)
    def function(spec, x):
        traced.append(spec)
        return x

    for mu in (0.5, 0.5, 0.25):
        function(spec_of("fedprox", {"mu": mu}), 1.0)
    assert len(traced) == 2
    assert spec_of("fedprox", {"mu": 0.5}) == spec_of("fedprox", {"mu": 0.5}) != spec_of("fedprox", {"mu": 0.25})


@pytest.mark.parametrize("name", METHODS)
def test_every_hyperparameter_has_a_check_and_a_default_that_passes(name):
    factory = METHODS[name]
    parameters = inspect.signature(factory).parameters
    checks = [inspect.get_annotations(factory)[key].__metadata__[0] for key in parameters]
    assert all(isinstance(check, Check) for check in checks)
    check_hparams(factory, {key: parameter.default for key, parameter in parameters.items()}, "hparams")
    assert make_method(name).ownership


def test_a_changed_file_is_run_again(tmp_path):
    """In one process, as in a notebook: the method belongs to the content of its file."""
    file = tmp_path / "mine.py"
    made = []
    for method in ("fedavg", "local", "fedavg"):
        file.write_text(f"from flex_jax.methods import METHODS\nmine = METHODS['{method}']\n")
        made.append(make_method(f"{file}:mine"))
    assert made[0] == made[2] != made[1]
