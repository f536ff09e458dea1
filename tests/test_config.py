"""The schema: defaults, one clear line for every impossible value, and the overrides of a method."""

import runpy
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from flex_jax.config import default_config, for_method, name_methods, validate
from flex_jax.errors import InputError
from flex_jax.federated.method import Settings

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.py"))


def changed(key, value):
    """A default config with one value put in whatever its type, as an unchecked config file could."""
    config = default_config()
    with config.unlocked(), config.ignore_type():
        section, _, name = key.rpartition(".")
        (config[section] if section else config)[name] = value
    return config


BAD_VALUES = [
    *[(key, 0, "at least 1") for key in ("rounds", "local_steps", "batch_size", "clients", "lora.rank", "slot.rank")],
    *[(key, 0, "at least 1") for key in ("slot.experts", "slot.calibration_examples", "data.test_examples")],
    *[(key, 0, "at least 1") for key in ("evaluation.max_new_tokens", "evaluation.batch_size")],
    *[(key, -1, "at least 0") for key in ("cohort", "data.examples_per_client", "evaluation.every")],
    *[(key, 0.0, "above 0") for key in ("lora.alpha", "slot.alpha", "data.alpha", "optimizer.clip_norm")],
    ("sequence_length", 7, "at least 8"),
    ("rounds", 2.0, "an integer"),
    ("rounds", True, "an integer"),
    ("rounds", "many", "an integer"),
    ("rounds", None, "an integer"),
    ("lora.alpha", "high", "a number"),
    ("lora.dropout", 1.0, "below 1"),
    ("lora.dropout", -0.1, "at least 0"),
    ("optimizer.learning_rate", 0.0, "above 0"),
    ("optimizer.learning_rate", float("nan"), "a number"),
    ("optimizer.learning_rate", float("inf"), "a number"),
    ("optimizer.final_learning_rate", -1e-6, "at least 0"),
    ("optimizer.final_learning_rate", 1.0, "at most config.optimizer.learning_rate"),
    ("optimizer.weight_decay", -0.1, "at least 0"),
    ("methods", (), "one or more"),
    ("methods", ("flex", "flex"), "different"),
    ("methods", ("flex,fedavg",), "('flex', 'fedavg')"),
    ("methods", "flex", "a tuple"),
    ("seeds", (), "one or more"),
    ("seeds", (0, 0), "different"),
    ("seeds", (-1,), "from 0"),
    ("seeds", (2**32,), "4294967295"),
    ("seeds", (0.5,), "integers"),
    ("cohort", 5, "at most config.clients, 4"),
    *[(f"mesh.{axis}", 0, "at least 1") for axis in ("clients", "fsdp", "expert")],
    ("mesh.clients", 3, "must divide the clients of a round, 4"),
    ("mesh.fsdp", 3, "must divide config.batch_size, 4"),
    ("model.path", " ", "not empty"),
    ("model.dtype", "float16", "float32, bfloat16"),
    ("data.path", "", "not empty"),
    ("data.split", "", "not empty"),
    ("data.fields", "", "not empty"),
    ("data.partition", "even", "pathological, dirichlet, dirichlet_split, iid, column"),
    ("data.column", 3, "a text"),
    ("data.categories", ("a", "a"), "different"),
    ("slot.selection", "best", "reconstruction, random, router"),
    ("slot.training", "none", "full, lora"),
    ("slot.gate_init", "open", "router, closed"),
    ("lora", None, "a section"),
    ("slot.gate", "open", "sigmoid, none, routing"),
    ("slot.calibration", "all", "client, pooled"),
    ("sampling", "fair", "uniform, size"),
    ("client.compression", "zip", "none, bfloat16, int8, topk"),
    ("server.aggregation", "best", "mean, median, trimmed_mean"),
    ("server.byzantine", -1, "at least 0"),
    ("overrides", None, "a section"),
    ("overrides", {"flex": 1}, "unknown"),
    ("overrides", {"flex": {"lora": 1}}, "a section"),
    ("overrides", {"flex": {"rounds": 1}}, "common to all methods"),
    ("overrides", {"flex": {"hparams": {"mu": 1}}}, "config.hparams.METHOD.NAME"),
    ("hparams", None, "config.hparams.METHOD.NAME"),
    ("hparams", {"fedprox": 0.1}, "config.hparams.METHOD.NAME"),
    ("hparams", {"fedprox": {"mu": None}}, "a number, a text or a tuple"),
    ("hparams", {"fedprox": {"mu": [0.1]}}, "a number, a text or a tuple"),
    ("hparams", {"fedprox": {"mu": float("nan")}}, "a number, a text or a tuple"),
    ("hparams", {"mine": {"sizes": ((1, 2), 3)}}, "a number, a text or a tuple"),
]


@pytest.mark.parametrize(
    ("key", "value", "allowed"), BAD_VALUES, ids=[f"{key}={value}" for key, value, _ in BAD_VALUES]
)
def test_an_impossible_value_is_named_with_what_is_allowed(key, value, allowed):
    with pytest.raises(InputError) as error:
        validate(changed(key, value))
    assert str(error.value).startswith(f"config.{key}")
    assert allowed in str(error.value)
    assert "\n" not in str(error.value)


def test_the_line_reads_key_value_rule():
    with pytest.raises(InputError) as error:
        validate(changed("lora.rank", 0))
    assert str(error.value) == "config.lora.rank is 0: must be an integer of at least 1 and at most 2147483647"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cohort", 4),
        ("data.examples_per_client", 0),
        ("data.categories", ("a", "b")),
        ("lora.alpha", 16),
        ("lora.dropout", 0.0),
        ("optimizer.final_learning_rate", 4e-5),
        ("seeds", (0, 2**32 - 1)),
        ("sequence_length", 8),
    ],
)
def test_a_value_on_the_edge_is_accepted(key, value):
    validate(changed(key, value))


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_config_file_is_valid(path):
    config = runpy.run_path(str(path))["get_config"]()
    validate(config)
    for method in config.methods:
        validate(for_method(config, method))


def test_the_column_partition_needs_a_column():
    config = default_config()
    config.data.partition = "column"
    with pytest.raises(InputError, match=r"config\.data\.column is empty"):
        validate(config)
    config.data.column = "department"
    validate(config)


@pytest.mark.parametrize("returned", [None, {"rounds": 3}, 3])
def test_only_a_config_dict_is_a_config(returned):
    with pytest.raises(InputError, match="default_config"):
        validate(returned)


@pytest.mark.parametrize("key", ["rounds", "lora.rank", "overrides", "hparams"])
def test_a_missing_key_is_named(key):
    values = default_config().to_dict()
    section, _, name = key.rpartition(".")
    del (values[section] if section else values)[name]
    with pytest.raises(InputError, match=f"config.{key} is missing"):
        validate(ConfigDict(values))


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("roundz", "rounds"),
        ("lora.rnk", "lora.rank"),
        ("gate_init", "slot.gate_init"),
        ("optimizer.learnin_rate", "optimizer.learning_rate"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(key, nearest):
    with pytest.raises(InputError, match=rf"config\.{key} is unknown: the nearest key is config\.{nearest}$"):
        validate(changed(key, 1))


def test_the_default_refuses_unknown_keys_and_other_types():
    config = default_config()
    with pytest.raises(AttributeError):
        config.lora.rnk = 4
    with pytest.raises(TypeError):
        config.rounds = "many"


def test_overrides_reach_only_their_method():
    config = default_config()
    config.overrides.flex = {"optimizer": {"learning_rate": 1e-3}, "slot": {"experts": 2}, "lora": {"alpha": 8}}
    flex, fedavg = for_method(config, "flex"), for_method(config, "fedavg")
    assert (flex.optimizer.learning_rate, flex.slot.experts, flex.lora.alpha) == (1e-3, 2, 8.0)
    assert (fedavg.optimizer.learning_rate, fedavg.slot.experts, fedavg.lora.alpha) == (4e-5, 1, 64.0)
    assert flex.optimizer.weight_decay == fedavg.optimizer.weight_decay
    assert not flex.overrides and config.overrides.flex.slot.experts == 2
    assert config.optimizer.learning_rate == 4e-5


def test_hyperparameters_reach_only_their_method():
    config = default_config()
    config.methods = ("fedprox", "far", "flex")
    config.overrides.far = {"method": "fedprox"}
    config.hparams.fedprox, config.hparams.far = {"mu": 0.5}, {"mu": 2}
    validate(config)
    own = {name: for_method(config, name) for name in config.methods}
    assert {name: own[name].hparams.to_dict() for name in own} == {
        "fedprox": {"fedprox": {"mu": 0.5}},
        "far": {"far": {"mu": 2}},  # not those of the method that it is a variant of
        "flex": {"flex": {}},
    }
    assert config.hparams.to_dict() == {"fedprox": {"mu": 0.5}, "far": {"mu": 2}}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lora": {"rank": 0}}, r"config\.overrides\.flex\.lora\.rank is 0: must be an integer of at least 1"),
        ({"lora": {"rank": "big"}}, r"config\.overrides\.flex\.lora\.rank is 'big'"),
        ({"optimizer": {"lerning_rate": 1e-3}}, r"nearest key is config\.overrides\.flex\.optimizer\.learning_rate"),
        ({"data": {"alpha": 1.0}}, r"config\.overrides\.flex\.data\.alpha is common to all methods"),
        ({"optimizer": {"learning_rate": 1e-7}}, r"final_learning_rate is 1e-06 with config\.overrides\.flex"),
    ],
)
def test_a_wrong_override_is_named(overrides, message):
    config = default_config()
    config.overrides.flex = overrides
    with pytest.raises(InputError, match=message):
        for_method(config, "fedavg")


def test_a_variant_is_a_method_with_values_of_its_own():
    config = default_config()
    config.methods = ("flex", "flex_random")
    config.overrides.flex_random = {"method": "flex", "slot": {"selection": "random"}}
    validate(config)
    assert [for_method(config, name).method for name in config.methods] == ["flex", "flex"]
    assert [for_method(config, name).slot.selection for name in config.methods] == ["reconstruction", "random"]


def test_methods_of_ones_own_files_get_their_names():
    config = default_config()
    config.methods = ("flex", "mine/new.py:new")
    name_methods(config)
    assert config.methods == ("flex", "new") and for_method(config, "new").method == "mine/new.py:new"
    config.method = "other.py:only"
    name_methods(config)
    assert config.methods == ("only",) and config.method == ""
    validate(config)


@pytest.mark.parametrize("methods", [("a.py:x", "b.py:x"), ("x", "a.py:x"), ("a.py:",), ("a.py:1",)])
def test_two_methods_of_one_name_and_names_that_are_none(methods):
    config = default_config()
    config.methods = methods
    with pytest.raises(InputError, match=r"config\.(methods?|overrides)"):
        name_methods(config)


def test_the_default_settings_of_methods_are_those_of_the_config():
    config = default_config()
    assert Settings(**config.client, **config.server) == Settings()
