"""The work directory of an experiment: what it belongs to, who uses it, and what its runs have read."""

import json
from collections.abc import Callable
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from flex_jax.building import ResolvedMethod, checkpoint_name
from flex_jax.config import default_config, validate
from flex_jax.data.sources import Data
from flex_jax.errors import InputError
from flex_jax.files import read_text, sweep, write_json
from flex_jax.fingerprint import Fingerprint, differences, of_files, of_records
from flex_jax.metrics_log import MetricsLog
from flex_jax.models.checkpoint import checkpoint_files, find_checkpoint
from flex_jax.models.export.peft import adapter_files

Inputs = dict[str, Fingerprint]  # of everything that a run reads, by its key in the config
COMMON = ("model.path", "data.path", "availability")  # beginnings of the names of inputs that all methods read
UNRELATED = ("methods", "seeds", "overrides", "note")  # keys that say nothing about a single run


class Workdir(NamedTuple):
    """A work directory that this process holds."""

    path: Path
    inputs: Inputs
    client_names: list[str]  # by id
    metrics: MetricsLog


def check(path: Path, config: ConfigDict, inputs: Inputs) -> None:
    """Raises InputError if a work directory is of another config or other inputs, or has a broken file.

    The files of a method without a finished round may have changed: it may have failed.
    """
    check_config(path, config)
    new = [name for name in config.methods if not any(path.glob(f"checkpoints/{escape(name)}-seed*/round*.json"))]
    check_inputs(path, inputs, lambda name: not name.startswith(tuple(f"method {method}: " for method in new)))


def take_up(path: Path, config: ConfigDict, inputs: Inputs, client_names: list[str]) -> Workdir:
    """Begins a work directory, or goes on with one that `check` accepts. This process must hold it."""
    sweep(path)
    if not (path / "config.json").exists():
        write_json(path / "config.json", config.to_dict())
    write_json(path / "inputs.json", inputs)
    write_json(path / "clients.json", client_names)
    return Workdir(path, inputs, client_names, MetricsLog(path / "metrics.jsonl"))


def check_config(path: Path, config: ConfigDict) -> None:
    """Raises InputError if the work directory has a config.json that is broken or not equal to `config`."""
    if (path / "config.json").exists():
        found, wanted = _read_json(path / "config.json", dict), _plain(config)
        if different := _different(flatten_dict(found, sep="."), flatten_dict(wanted, sep=".")):
            raise InputError(
                f"{path} holds a run of another config (different: {', '.join(different)}); give another --workdir"
            )


def check_inputs(path: Path, inputs: Inputs, wanted: Callable[[str], bool]) -> None:
    """Raises InputError if inputs with a `wanted` name are not what the runs in the work directory have read."""
    if not (path / "inputs.json").exists():
        return
    before, now = ({name: of[name] for name in of if wanted(name)} for of in (read_inputs(path), inputs))
    if changed := list(differences(before, now)):
        more = f"; and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise InputError(
            f"{path} holds a run of other inputs ({'; '.join(changed[:4])}{more}): "
            "restore them, or give another --workdir"
        )


def read_inputs(path: Path) -> Inputs:
    """Reads inputs.json. Raises InputError if there is none to read."""
    return _read_json(path / "inputs.json", dict)


def read_client_names(path: Path) -> list[str]:
    """Reads clients.json: the names of the clients by id. Raises InputError if there is none to read."""
    config, names = read_config(path), _read_json(path / "clients.json", list)
    if len(names) != config.clients or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"{path / 'clients.json'}: not a list of {config.clients} names: restore it, or give another --workdir"
        )
    return names


def read_config(path: Path) -> ConfigDict:
    """Reads the config of a work directory. Raises InputError if there is none to read."""
    file = path / "config.json"
    if not file.exists():
        raise InputError(f"--workdir {path}: no run there (no config.json)")
    config = default_config()
    try:
        with config.ignore_type():
            config.update(_lists_to_tuples(_read_json(file, dict)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: not the config of a run of this version ({error})") from error
    validate(config)
    return config


def run_identity(name: str, config: ConfigDict, seed: int, inputs: Inputs, client_names: list[str]) -> dict[str, Any]:
    """Returns what decides about the results of a run, by key. `config` is that of the method `name`."""
    keys = flatten_dict({key: value for key, value in _plain(config).items() if key not in UNRELATED}, sep=".")
    own = (*COMMON, f"method {name}: ")
    own_inputs = {name: inputs[name] for name in sorted(inputs) if name.startswith(own)}
    return keys | {"seed": seed, "inputs": own_inputs, "client names": client_names}


def inputs_of(config: ConfigDict, methods: list[ResolvedMethod], data: Data) -> Inputs:
    """Returns the fingerprints of everything that an experiment reads."""
    inputs = {"data.path": of_records(data.train)}
    if data.test is not None:
        inputs["data.path, test split"] = of_records(data.test)
    if config.availability:
        inputs |= of_files({"availability": Path(config.availability)})
    for method in methods:
        inputs |= method_inputs(method.name, method.config)
    return inputs | model_inputs(config)


def model_inputs(config: ConfigDict) -> Inputs:
    """Returns the fingerprints of the files of the checkpoint."""
    directory = find_checkpoint(checkpoint_name(config))
    return of_files({f"model.path {file.name}": file for file in checkpoint_files(directory)})


def method_inputs(name: str, config: ConfigDict) -> Inputs:
    """Returns the fingerprints of the files that only the method `name` reads. `config` is its own."""
    files = adapter_files(config.lora.path) if config.lora.path else []
    if ":" in config.method:
        files.append(Path(config.method.rpartition(":")[0]))
    return of_files({f"method {name}: {file}": file for file in files})


def _plain(config: ConfigDict) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_dict()))


def _read_json(file: Path, kind: type) -> Any:
    try:
        value = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"broken, {error}"
        raise InputError(f"{file}: cannot be read ({reason}): restore it, or give another --workdir") from error
    if not isinstance(value, kind):
        raise InputError(f"{file}: not what flex_jax has written: restore it, or give another --workdir")
    return value


def _different(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def _lists_to_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value
