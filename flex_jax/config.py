"""The schema of a run: every key with its default, its check and its meaning, in one table.

A config file starts from `default_config()` and changes what it needs; `validate` names the first impossible value;
`for_method` gives one method its own values where `overrides` asks for them.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from flex_jax.errors import InputError


class Check(NamedTuple):
    """What a value may be: the words of the error line, and the test."""

    allowed: str
    accepts: Callable[[Any], bool]


class Key(NamedTuple):
    """One line of the schema."""

    default: Any
    check: Check
    doc: str


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _is_distinct(value: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple) and all(map(accepts, value)) and len(set(value)) == len(value)


def _at_least(low: int) -> Check:
    return Check(f"an integer of at least {low}", lambda value: _is_integer(value) and value >= low)


def _one_of(*choices: str) -> Check:
    return Check(f"one of {', '.join(choices)}", lambda value: value in choices)


_POSITIVE = Check("a number above 0", lambda value: _is_number(value) and value > 0)
_NOT_NEGATIVE = Check("a number of at least 0", lambda value: _is_number(value) and value >= 0)
_PROBABILITY = Check("a number of at least 0 and below 1", lambda value: _is_number(value) and 0 <= value < 1)
_UNIT = Check("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
_FLAG = Check("True or False", lambda value: isinstance(value, bool))
_TEXT = Check("a text that is not empty", _is_text)
_ANY_TEXT = Check("a text", lambda value: isinstance(value, str))
_TEXTS = Check("a tuple of different texts", lambda value: _is_distinct(value, _is_text))
_RANKS = Check(
    "a tuple of integers of at least 1, such as (8, 16), or ()",
    lambda value: isinstance(value, tuple) and all(_is_integer(rank) and rank >= 1 for rank in value),
)
_SHARE = Check("a number above 0 and at most 1", lambda value: _is_number(value) and 0 < value <= 1)
_METHODS = Check(
    "a tuple of one or more different method names, such as ('flex', 'fedavg')",
    lambda value: _is_distinct(value, lambda name: _is_text(name) and "," not in name) and value != (),
)
_SEEDS = Check(
    "a tuple of one or more different integers from 0 to 4294967295, such as (0, 1)",
    lambda value: _is_distinct(value, lambda seed: _is_integer(seed) and 0 <= seed < 2**32) and value != (),
)

SCHEMA = {
    "methods": Key(("flex", "fedavg", "local"), _METHODS, "methods to run, each with every seed"),
    "method": Key("", _ANY_TEXT, "one method in the place of methods: its name, or path/to/file.py:name of your own"),
    "seeds": Key((0,), _SEEDS, "seeds of partition, initial values, batches and dropout"),
    "rounds": Key(100, _at_least(1), "communication rounds"),
    "local_steps": Key(5, _at_least(1), "optimiser steps of a client in a round"),
    "batch_size": Key(4, _at_least(1), "examples in a client's step"),
    "sequence_length": Key(512, _at_least(8), "tokens of prompt and response; longer examples are cut"),
    "clients": Key(4, _at_least(1), "clients that the data is divided into"),
    "cohort": Key(0, _at_least(0), "clients trained in a round; 0 is every client"),
    "sampling": Key("uniform", _one_of("uniform", "size"), "how a cohort is drawn: alike or by examples"),
    "availability": Key("", _ANY_TEXT, "a file: in line i the JSON list of clients that round i can draw"),
    "note": Key("", _ANY_TEXT, "what a reader of the report has to know about this comparison"),
    "model.path": Key("tiny", _TEXT, "tiny (the embedded model), a Hugging Face checkpoint directory or a Hub name"),
    "model.dtype": Key("float32", _one_of("float32", "bfloat16"), "type of the frozen weights"),
    "model.quantisation": Key("none", _one_of("none", "int8", "int4"), "integers that hold the frozen matrices"),
    "model.remat": Key(True, _FLAG, "compute activations again in the backward pass: less memory, more time"),
    "mesh.clients": Key(1, _at_least(1), "devices that divide a cohort among them"),
    "mesh.fsdp": Key(1, _at_least(1), "devices that divide a client's batch, each with a slice of the backbone"),
    "mesh.expert": Key(1, _at_least(1), "the same, where experts stay on their device and tokens come to them"),
    "data.path": Key("tiny", _TEXT, "tiny (the embedded data), a file, a directory or a Hugging Face data set"),
    "data.split": Key("train", _TEXT, "split of a Hugging Face data set"),
    "data.fields": Key("auto", _TEXT, "which columns hold instruction and response; auto finds out"),
    "data.partition": Key(
        "pathological",
        _one_of("pathological", "dirichlet", "dirichlet_split", "iid", "column"),
        "how examples are divided into clients",
    ),
    "data.column": Key("", _ANY_TEXT, "column that names an example's client, for the partition column"),
    "data.categories": Key((), _TEXTS, "categories to keep; () is every one found"),
    "data.alpha": Key(0.5, _POSITIVE, "concentration of the Dirichlet partitions; small is uneven"),
    "data.examples_per_client": Key(0, _at_least(0), "training examples of a client; 0 is all (dirichlet: 1000)"),
    "data.test_examples": Key(25, _at_least(1), "examples held out of a client (dirichlet: of a category, for all)"),
    "lora.rank": Key(32, _at_least(1), "rank of the attention adapters"),
    "lora.alpha": Key(64.0, _POSITIVE, "the attention adapters are scaled by alpha / rank"),
    "lora.dropout": Key(0.05, _PROBABILITY, "dropout on the input of the attention adapters"),
    "lora.path": Key("", _ANY_TEXT, "a PEFT LoRA adapter directory to start from; empty: a fresh adapter"),
    "slot.experts": Key(1, _at_least(1), "pretrained experts grafted into a client's slot in each layer"),
    "slot.selection": Key(
        "reconstruction", _one_of("reconstruction", "random", "router"), "how the grafted experts are chosen"
    ),
    "slot.training": Key("full", _one_of("full", "lora"), "what is trained in the slot: weights or adapters"),
    "slot.rank": Key(32, _at_least(1), "rank of the slot's adapters, for the training lora"),
    "slot.alpha": Key(64.0, _POSITIVE, "the slot's adapters are scaled by alpha / rank"),
    "slot.gate": Key(
        "sigmoid",
        _one_of("sigmoid", "none", "routing"),
        "what lets the slot speak: a trained gate, nothing, or the router in the place of the grafted expert",
    ),
    "slot.gate_init": Key("router", _one_of("router", "closed"), "first gate: the expert's router row, or closed"),
    "slot.calibration_examples": Key(128, _at_least(1), "examples of a client that choose its grafted experts"),
    "slot.calibration": Key(
        "own", _one_of("own", "common"), "whose examples choose the experts: each client's own, or some of all clients"
    ),
    "optimizer.learning_rate": Key(4e-5, _POSITIVE, "AdamW learning rate of the first round"),
    "optimizer.final_learning_rate": Key(1e-6, _NOT_NEGATIVE, "learning rate of the last round, along a cosine"),
    "optimizer.weight_decay": Key(0.0, _NOT_NEGATIVE, "AdamW weight decay"),
    "optimizer.clip_norm": Key(1.0, _POSITIVE, "largest global norm of a step's gradient"),
    "client.proximal_mu": Key(0.01, _NOT_NEGATIVE, "FedProx: pull of the received weights on a client"),
    "client.ditto_lambda": Key(0.1, _NOT_NEGATIVE, "Ditto: pull of the received weights on a client's own"),
    "client.mixing_alpha": Key(0.5, _UNIT, "APFL: first share of a client's own weights in its model"),
    "client.personal_layers": Key(
        1, _at_least(1), "FedPer, FedRep: last layers whose adapters stay with the client; FedALA: that it weighs"
    ),
    "client.weight_learning_rate": Key(1.0, _NOT_NEGATIVE, "FedALA: eta of the weights that it aggregates with"),
    "client.personal_steps": Key(0.5, _SHARE, "FedRep, FedDPA: share of a round's steps on what is personal"),
    "client.sync_every": Key(10, _at_least(1), "FDLoRA: rounds between copies of the shared adapter to the own one"),
    "client.ranks": Key((), _RANKS, "FLoRA, FlexLoRA, HetLoRA: ranks of the clients, in turn; () is lora.rank for all"),
    "client.rank_decay": Key(0.99, _SHARE, "HetLoRA: part of its ranks that a client prunes to; 1 prunes none"),
    "client.rank_lambda": Key(5e-3, _NOT_NEGATIVE, "HetLoRA: penalty on the ranks that may be pruned"),
    "client.lora_experts": Key(4, _at_least(1), "FedAMoLE: LoRA experts beside a projection, but for the common one"),
    "client.held_experts": Key(2, _at_least(1), "FedAMoLE: how many of them a client holds; a token goes to two"),
    "client.compression": Key(
        "none", _one_of("none", "bfloat16", "int8", "topk"), "how uploads are made smaller, for every method"
    ),
    "client.compression_fraction": Key(0.1, _SHARE, "topk: entries sent of each array; the rest is sent later"),
    "server.weighting": Key("examples", _one_of("examples", "uniform"), "how the server weighs a cohort's clients"),
    "server.aggregation": Key(
        "mean",
        _one_of("mean", "median", "trimmed_mean", "geometric_median", "krum", "multi_krum"),
        "how the server combines a cohort's uploads",
    ),
    "server.byzantine": Key(1, _at_least(0), "trimmed_mean, krum, multi_krum: bad clients of a cohort to withstand"),
    "server.clip_norm": Key(0.0, _NOT_NEGATIVE, "largest norm of a client's upload; 0 is any"),
    "server.learning_rate": Key(1e-3, _POSITIVE, "FedAdagrad, FedAdam, FedYogi, FDLoRA: eta"),
    "server.tau": Key(1e-3, _POSITIVE, "FedAdagrad, FedAdam, FedYogi: adaptivity; its square starts v"),
    "server.beta1": Key(0.9, _PROBABILITY, "FedAvgM, FedAdam, FedYogi, FDLoRA: momentum"),
    "server.beta2": Key(0.99, _PROBABILITY, "FedAdam, FedYogi: decay of the second moment"),
    "evaluation.max_new_tokens": Key(256, _at_least(1), "most tokens generated for an answer"),
    "evaluation.batch_size": Key(8, _at_least(1), "examples evaluated at once"),
    "evaluation.every": Key(0, _at_least(0), "rounds between evaluations of the loss; 0 is only at the end"),
}
OVERRIDABLE_SECTIONS = ("lora", "slot", "optimizer", "client", "server")
SECTIONS = tuple(dict.fromkeys(key.split(".")[0] for key in SCHEMA if "." in key))
OVERRIDABLE = {key: entry for key, entry in SCHEMA.items() if key.split(".")[0] in ("method", *OVERRIDABLE_SECTIONS)}


def default_config() -> ConfigDict:
    """The paper's reference setting on the embedded model and data: type-safe, and locked but for `overrides`.

    `config.overrides.flex = {"optimizer": {"learning_rate": 1e-3}}` gives one method a value of its own;
    `config.overrides.flex_random = {"method": "flex", "slot": {"selection": "random"}}` makes a variant of a method,
    which `methods` may name beside it.
    """
    config = ConfigDict({section: {} for section in (*SECTIONS, "overrides")})
    for key, entry in SCHEMA.items():
        *section, name = key.split(".")
        (config[section[0]] if section else config)[name] = entry.default
    config.lock()
    config.overrides.unlock()
    return config


def validate(config: ConfigDict) -> None:
    """Raises InputError, naming the key and what is allowed, for the first value that no run can use."""
    validate_keys(config)
    for key, value in _flatten(config):
        check = find_key(key).check
        if not check.accepts(value):
            raise InputError(f"config.{key} is {value!r}: must be {check.allowed}")
    _validate_together(config, "")
    for method in config.overrides:
        _validate_together(_overridden(config, method), f" with config.overrides.{method}")


def validate_keys(config: ConfigDict) -> None:
    """Raises InputError unless the config has all keys of the schema and no other, whatever their values."""
    if not isinstance(config, ConfigDict):
        raise InputError(f"the config is {config!r}: must be a default_config() with changes")
    keys = [key for key, _ in _flatten(config)]
    for key in keys:
        find_key(key)
    for key in SCHEMA:
        if key not in keys:
            raise InputError(f"config.{key} is missing: start from default_config()")
    if "overrides" not in config:
        raise InputError("config.overrides is missing: start from default_config()")


def find_key(key: str) -> Key:
    """The schema's line for a dotted key, which may be `overrides.METHOD.KEY`.

    Raises:
        InputError: the config has no such key; the message names the nearest one.
    """
    prefix, target = re.match(r"(overrides\.[^\W\d]\w*\.)?(.*)", key).groups(default="")
    known = OVERRIDABLE if prefix else SCHEMA
    if target in known:
        return known[target]
    if target in (*SECTIONS, "overrides"):
        raise InputError(f"config.{key} is a section: its keys are set one by one")
    reason = "is common to all methods" if target in SCHEMA else "is unknown"
    raise InputError(f"config.{key} {reason}: the nearest known key is config.{prefix}{nearest_key(target, known)}")


def nearest_key(key: str, known: Iterable[str] = SCHEMA) -> str:
    """The known key most like `key`, as a whole and in its last part (`rank` is nearest to `lora.rank`)."""

    def likeness(candidate: str) -> float:
        pairs = (key, candidate), (key.split(".")[-1], candidate.split(".")[-1])
        return sum(SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return max(known, key=likeness)


def name_methods(config: ConfigDict) -> None:
    """Writes a method that is given as path/to/file.py:name as a variant called `name`, and config.method, if any, as
    the one of config.methods. Raises InputError where two would have one name."""
    given = (config.method,) if config.method else config.methods
    names = []
    for method in given:
        path, colon, name = method.rpartition(":")
        if colon:
            if not name.isidentifier():
                raise InputError(f"config.method is {method!r}: must be a method's name or path/to/file.py:name")
            if config.overrides.get(name, {}).get("method", method) != method:
                raise InputError(f"config.overrides.{name}.method is another method than {method}: rename one")
            config.overrides.update({name: {"method": method}})
        names.append(name)
    config.methods, config.method = tuple(names), ""
    if len(set(names)) < len(names):
        raise InputError(f"config.methods has two methods of one name: {', '.join(names)}")


def for_method(config: ConfigDict, name: str) -> ConfigDict:
    """The config of the method or variant `name`: a copy with its overrides applied and none left; its `method` says
    which method it is.

    Raises:
        InputError: as `validate`.
    """
    validate(config)
    return _overridden(config, name)


def _flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _overridden(config: ConfigDict, name: str) -> ConfigDict:
    result = config.copy_and_resolve_references()
    result.update(config.overrides.get(name, ConfigDict()))
    result.overrides = ConfigDict()
    result.method = result.method or name
    return result


def _validate_together(config: ConfigDict, where: str) -> None:
    """The checks that need two keys."""
    if config.cohort > config.clients:
        raise InputError(
            f"config.cohort is {config.cohort}: must be at most config.clients, {config.clients}, or 0 for every client"
        )
    cohort, rows = config.cohort or config.clients, config.mesh.fsdp * config.mesh.expert
    if cohort % config.mesh.clients:
        raise InputError(f"config.mesh.clients is {config.mesh.clients}: must divide the clients of a round, {cohort}")
    if config.batch_size % rows:
        raise InputError(
            f"config.mesh.fsdp x config.mesh.expert is {rows}: must divide config.batch_size, {config.batch_size}"
        )
    if any(rank > config.lora.rank for rank in config.client.ranks):
        raise InputError(
            f"config.client.ranks is {config.client.ranks}{where}: must be at most config.lora.rank, {config.lora.rank}"
        )
    if config.data.partition == "column" and not config.data.column.strip():
        raise InputError("config.data.column is empty: must name a column where config.data.partition is 'column'")
    first, final = config.optimizer.learning_rate, config.optimizer.final_learning_rate
    if final > first:
        raise InputError(
            f"config.optimizer.final_learning_rate is {final}{where}: "
            f"must be at most config.optimizer.learning_rate, {first}"
        )
