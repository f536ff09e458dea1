"""The schema of a run: every key with its default, its check and its meaning, in one table.

A config file starts from `default_config()` and changes what it needs. `validate` names the first impossible value.
`for_method` returns the config of one method.
"""

import re
from collections.abc import Iterable, Iterator
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from flex_jax.checks import (
    ANY_TEXT,
    FLAG,
    FRACTION,
    HYPERPARAMETER,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    TEXT,
    TEXTS,
    Check,
    at_least,
    is_distinct,
    is_integer,
    is_text,
    one_of,
)
from flex_jax.errors import InputError


class Key(NamedTuple):
    """One line of the schema."""

    default: Any
    check: Check
    doc: str


_METHODS = Check(
    "a tuple of one or more different method names, such as ('flex', 'fedavg')",
    lambda value: is_distinct(value, lambda name: is_text(name) and "," not in name) and value != (),
)
_SEEDS = Check(
    "a tuple of one or more different integers from 0 to 4294967295, such as (0, 1)",
    lambda value: is_distinct(value, lambda seed: is_integer(seed) and 0 <= seed < 2**32) and value != (),
)

SCHEMA = {
    "methods": Key(("flex", "fedavg", "local"), _METHODS, "methods to run, each with every seed"),
    "method": Key("", ANY_TEXT, "one method instead of methods: its name, or path/to/file.py:name for one of your own"),
    "seeds": Key((0,), _SEEDS, "seeds of partition, initial values, batches and dropout"),
    "rounds": Key(100, at_least(1), "communication rounds"),
    "local_steps": Key(5, at_least(1), "optimiser steps of a client in a round"),
    "batch_size": Key(4, at_least(1), "examples in a client's step"),
    "sequence_length": Key(512, at_least(8), "tokens of prompt and response; longer examples are cut"),
    "clients": Key(4, at_least(1), "clients among which the data is divided"),
    "cohort": Key(0, at_least(0), "clients that train in a round; 0 means all"),
    "sampling": Key("uniform", one_of("uniform", "size"), "how a cohort is drawn: equally or by examples"),
    "availability": Key("", ANY_TEXT, "a file whose line i is the JSON list of clients available in round i"),
    "note": Key("", ANY_TEXT, "a note for readers of the report, about how this comparison was made"),
    "model.path": Key("tiny", TEXT, "tiny (the embedded model), a Hugging Face checkpoint directory or a Hub name"),
    "model.dtype": Key("float32", one_of("float32", "bfloat16"), "type of the frozen weights"),
    "model.quantisation": Key("none", one_of("none", "int8", "int4"), "store the frozen matrices as integers"),
    "model.remat": Key(True, FLAG, "recompute activations in the backward pass: less memory, more time"),
    "mesh.clients": Key(1, at_least(1), "devices among which the clients of a round are divided"),
    "mesh.fsdp": Key(1, at_least(1), "devices among which a client's batch and the backbone are divided"),
    "mesh.expert": Key(1, at_least(1), "devices for expert parallelism: tokens are exchanged, experts stay"),
    "data.path": Key("tiny", TEXT, "tiny (the embedded data), a file, a directory or a Hugging Face data set"),
    "data.split": Key("train", TEXT, "split of a directory or Hugging Face data set to train on"),
    "data.test_split": Key("", ANY_TEXT, "split with the test records; empty: test records are held out of data.split"),
    "data.fields": Key(
        "auto", TEXT, "columns of a prompt: auto, or pairs such as instruction=question,response=answer"
    ),
    "data.skip_empty": Key(False, FLAG, "leave out records without an instruction or response, and say how many"),
    "data.partition": Key(
        "pathological",
        one_of("pathological", "dirichlet", "dirichlet_split", "iid", "column"),
        "how examples are divided among clients",
    ),
    "data.column": Key("", ANY_TEXT, "column with the name of an example's client, for data.partition=column"),
    "data.categories": Key((), TEXTS, "categories to use; () means all"),
    "data.alpha": Key(0.5, POSITIVE, "concentration of the Dirichlet partitions; the smaller, the more uneven"),
    "data.examples_per_client": Key(0, at_least(0), "training examples of a client; 0 means all (dirichlet: 1000)"),
    "data.test_examples": Key(25, at_least(1), "test examples of a client (dirichlet: of a category)"),
    "lora.rank": Key(32, at_least(1), "rank of the LoRA on attention"),
    "lora.alpha": Key(64.0, POSITIVE, "the LoRA on attention is scaled by alpha / rank"),
    "lora.dropout": Key(0.05, PROBABILITY, "dropout on the input of every LoRA"),
    "lora.path": Key("", ANY_TEXT, "directory of a PEFT LoRA adapter to start from; empty: a fresh adapter"),
    "slot.experts": Key(1, at_least(1), "pretrained experts that a client grafts into its slot of each layer"),
    "slot.selection": Key(
        "reconstruction", one_of("reconstruction", "random", "router"), "how the grafted experts are chosen"
    ),
    "slot.training": Key("full", one_of("full", "lora"), "what is trained in the slot: all weights, or a LoRA on them"),
    "slot.rank": Key(32, at_least(1), "rank of the slot's LoRA, for slot.training=lora"),
    "slot.alpha": Key(64.0, POSITIVE, "the slot's LoRA is scaled by alpha / rank"),
    "slot.gate": Key(
        "sigmoid",
        one_of("sigmoid", "none", "routing"),
        "what weights the slot: a trained gate, nothing (1), or the router's weight of the grafted expert",
    ),
    "slot.gate_init": Key("router", one_of("router", "closed"), "first gate: the expert's router row, or closed"),
    "slot.calibration_examples": Key(128, at_least(1), "examples of a client on which its experts are chosen"),
    "slot.calibration": Key(
        "client", one_of("client", "pooled"), "examples that choose a client's experts: its own or all clients'"
    ),
    "optimizer.learning_rate": Key(4e-5, POSITIVE, "AdamW learning rate of the first round"),
    "optimizer.final_learning_rate": Key(1e-6, NOT_NEGATIVE, "learning rate that a cosine over the rounds approaches"),
    "optimizer.weight_decay": Key(0.0, NOT_NEGATIVE, "AdamW weight decay"),
    "optimizer.clip_norm": Key(1.0, POSITIVE, "largest global norm of a step's gradient"),
    "client.compression": Key("none", one_of("none", "bfloat16", "int8", "topk"), "compression of uploads"),
    "client.compression_fraction": Key(
        0.1, FRACTION, "topk: fraction of each array that is sent; the rest comes later"
    ),
    "server.weighting": Key(
        "examples", one_of("examples", "uniform"), "how the server weights clients: by examples or equally"
    ),
    "server.aggregation": Key(
        "mean",
        one_of("mean", "median", "trimmed_mean", "geometric_median", "krum", "multi_krum"),
        "how the server combines the uploads of a cohort",
    ),
    "server.byzantine": Key(1, at_least(0), "bad clients of a cohort that trimmed_mean, krum and multi_krum resist"),
    "server.clip_norm": Key(0.0, NOT_NEGATIVE, "largest norm of a client's upload; 0 means any"),
    "evaluation.max_new_tokens": Key(256, at_least(1), "most tokens generated for an answer"),
    "evaluation.batch_size": Key(8, at_least(1), "examples of each client that are evaluated at once"),
    "evaluation.every": Key(0, at_least(0), "rounds between two evaluations of the loss; 0 means only at the end"),
}
OVERRIDABLE_SECTIONS = ("lora", "slot", "optimizer", "client", "server")
SECTIONS = tuple(dict.fromkeys(key.split(".")[0] for key in SCHEMA if "." in key))
OPEN_SECTIONS = ("overrides", "hparams")  # their keys are names of methods and variants
HPARAM = Key(None, HYPERPARAMETER, "see docs/methods.md")
OVERRIDABLE = {key: entry for key, entry in SCHEMA.items() if key.split(".")[0] in ("method", *OVERRIDABLE_SECTIONS)}


def default_config() -> ConfigDict:
    """Returns the paper's reference setting on the embedded model and data.

    All but two sections are type-safe and locked. `config.overrides.flex = {"optimizer": {"learning_rate": 1e-3}}`
    gives one method its own value; `config.overrides.flex_random = {"method": "flex", "slot": {"selection": "random"}}`
    makes a variant of a method, which `methods` may name in addition to it. `config.hparams.fedprox = {"mu": 0.1}` sets
    the hyperparameters of a method or variant.
    """
    config = ConfigDict({section: {} for section in (*SECTIONS, *OPEN_SECTIONS)})
    for key, entry in SCHEMA.items():
        *section, name = key.split(".")
        (config[section[0]] if section else config)[name] = entry.default
    config.lock()
    for section in OPEN_SECTIONS:
        config[section].unlock()
    return config


def validate(config: ConfigDict) -> None:
    """Raises InputError, naming the key and what is allowed, for the first value that no run can use."""
    validate_keys(config)
    for key, value in _flatten(config):
        _validate_value(key, value)
    _validate_together(config, "")
    for method in config.overrides:
        _validate_together(_overridden(config, method), f" with config.overrides.{method}")


def _validate_value(key: str, value: Any) -> None:
    check = find_key(key).check
    if not check.accepts(value):
        raise InputError(f"config.{key} is {value!r}: must be {check.allowed}")


def validate_keys(config: ConfigDict) -> None:
    """Raises InputError unless the config has all keys of the schema and no other, whatever their values."""
    if not isinstance(config, ConfigDict):
        raise InputError(f"the config is {config!r}: must be a default_config() with changes")
    keys = [key for key, _ in _flatten(config)]
    for key in keys:
        find_key(key)
    missing = [key for key in SCHEMA if key not in keys] + [key for key in OPEN_SECTIONS if key not in config]
    if missing:
        raise InputError(f"config.{missing[0]} is missing: start from default_config()")


def find_key(key: str) -> Key:
    """Returns the schema's line for a dotted key, which may be `overrides.METHOD.KEY` or `hparams.METHOD.NAME`.

    Raises InputError that names the nearest key, if the config has no such key.
    """
    if re.fullmatch(r"hparams\.[^\W\d]\w*\.[^\W\d]\w*", key):
        return HPARAM
    match = re.fullmatch(r"(overrides\.[^\W\d]\w*\.)?(.*)", key, re.DOTALL)
    prefix, target = match.groups(default="") if match else ("", key)
    keys = OVERRIDABLE if prefix else SCHEMA
    if target in keys:
        return keys[target]
    if target.split(".")[0] == "hparams":
        raise InputError(f"config.{key}: must be config.hparams.METHOD.NAME, such as config.hparams.fedprox.mu")
    if target in (*SECTIONS, *OPEN_SECTIONS):
        raise InputError(f"config.{key} is a section: its keys are set one by one")
    reason = "is common to all methods" if target in SCHEMA else "is unknown"
    raise InputError(f"config.{key} {reason}: the nearest key is config.{prefix}{nearest_key(target, keys)}")


def nearest_key(key: str, keys: Iterable[str] = SCHEMA) -> str:
    """Returns the one of `keys` most similar to `key`, as a whole and in its last part (`rank` -> `lora.rank`)."""

    def similarity(candidate: str) -> float:
        pairs = (key, candidate), (key.split(".")[-1], candidate.split(".")[-1])
        return sum(SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return max(keys, key=similarity)


def name_methods(config: ConfigDict) -> None:
    """Gives every method a name that results, `overrides` and `hparams` use.

    path/to/file.py:name becomes a variant called `name`, and config.method, if set, the only one of config.methods.
    Raises InputError if two methods would have the same name.
    """
    for key in ("method", "methods"):
        _validate_value(key, config[key])
    given = (config.method,) if config.method else config.methods
    names = []
    for method in given:
        path, colon, name = method.rpartition(":")
        if not colon and not re.fullmatch(r"[^\W\d]\w*", method):
            raise InputError(f"config.methods names {method!r:.80}: must be a method's name or path/to/file.py:name")
        if colon:
            if not name.isidentifier():
                raise InputError(f"config.method is {method!r}: must be a method's name or path/to/file.py:name")
            if config.overrides.get(name, {}).get("method", method) != method:
                other = config.overrides[name].method
                raise InputError(f"config.methods has two methods called {name}, {other} and {method}: rename one")
            config.overrides.update({name: {"method": method}})
        names.append(name)
    config.methods, config.method = tuple(names), ""
    if len(set(names)) < len(names):
        raise InputError(f"config.methods has two methods of one name: {', '.join(names)}")


def for_method(config: ConfigDict, name: str) -> ConfigDict:
    """Returns the config of the method or variant `name`: a copy with its overrides and hyperparameters alone.

    `method` says which method it is. Raises InputError as `validate`.
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
    result.hparams = ConfigDict({name: config.hparams.get(name, {})})
    result.overrides = ConfigDict()
    result.method = result.method or name
    return result


def _validate_together(config: ConfigDict, where: str) -> None:
    """Runs the checks that need two keys."""
    if config.cohort > config.clients:
        raise InputError(
            f"config.cohort is {config.cohort}: must be at most config.clients, {config.clients}, or 0 for every client"
        )
    cohort, slices = config.cohort or config.clients, config.mesh.fsdp * config.mesh.expert
    if cohort % config.mesh.clients:
        raise InputError(f"config.mesh.clients is {config.mesh.clients}: must divide the clients of a round, {cohort}")
    if config.batch_size % slices:
        raise InputError(
            f"config.mesh.fsdp x config.mesh.expert is {slices}: must divide config.batch_size, {config.batch_size}"
        )
    if config.data.partition == "column" and not config.data.column.strip():
        raise InputError("config.data.column is empty: must name a column if config.data.partition is 'column'")
    if config.data.partition != "column" and config.data.column.strip():
        raise InputError(
            f"config.data.column is {config.data.column!r}: must be empty if config.data.partition is not 'column'"
        )
    first, final = config.optimizer.learning_rate, config.optimizer.final_learning_rate
    if final > first:
        raise InputError(
            f"config.optimizer.final_learning_rate is {final}{where}: "
            f"must be at most config.optimizer.learning_rate, {first}"
        )
