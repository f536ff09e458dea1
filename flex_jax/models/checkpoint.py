"""Hugging Face directories of safetensors, in and out."""

import contextlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (gives NumPy the name bfloat16, which safetensors asks for)
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flex_jax.errors import InputError
from flex_jax.models.config import ModelConfig
from flex_jax.models.decoder import Decoder
from flex_jax.models.families import FAMILIES

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def load_config(path) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory. Raises InputError for what is missing or not supported."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise InputError(f"{path}: not a checkpoint directory (no config.json)")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: broken JSON ({error})") from error
    family = raw.get("model_type") if isinstance(raw, dict) else None
    if family not in FAMILIES:
        raise InputError(f"{file}: model_type {family!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    try:
        config, unsupported = FAMILIES[family].read_config(raw)
    except KeyError as error:
        raise InputError(f"{file}: key {error} is missing") from error
    if unsupported:
        raise InputError(f"{file}: not supported: {'; '.join(unsupported)}")
    return config


def load_pretrained(path, *, dtype: str = "float32") -> tuple[Decoder, dict]:
    """A model and its frozen parameters from a Hugging Face directory.

    The family is read from config.json; every weight is cast to `dtype` ("float32" or "bfloat16"). Raises InputError
    with every missing or misshapen tensor named at once.
    """
    config = load_config(path)
    table = FAMILIES[config.family].tensors(config)
    with contextlib.ExitStack() as stack:
        files = _open(Path(path), stack)
        _check(path, table, config, files)
        flat = {}
        for tensor in table:
            whole = tensor.assemble(config, lambda name: files[name].get_tensor(name), jnp.dtype(dtype))
            flat[tensor.path] = jnp.asarray(whole)
    return Decoder(config), unflatten_dict(flat, sep="/")


def _open(path: Path, stack) -> dict:
    """Tensor name -> the open file that holds it."""
    if (path / INDEX).is_file():
        names = sorted(set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [WEIGHTS]
    files = {}
    for name in names:
        file = path / name
        if not file.is_file():
            raise InputError(f"{file}: missing weights file")
        try:
            opened = stack.enter_context(safe_open(file, framework="np"))
        except SafetensorError as error:
            raise InputError(f"{file}: not a whole safetensors file ({error})") from error
        files.update(dict.fromkeys(opened.keys(), opened))
    return files


def _check(path, table, config, files):
    wrong = []
    for tensor in table:
        for name, _ in tensor.parts(config):
            if name not in files:
                wrong.append(f"{name} is missing")
            else:
                shape = tuple(files[name].get_slice(name).get_shape())
                if shape != tensor.shape:
                    wrong.append(f"{name} has shape {list(shape)}, not {list(tensor.shape)}")
    if wrong:
        raise InputError(f"{path}: {len(wrong)} wrong tensors: {'; '.join(wrong)}")


def save_pretrained(path, config: ModelConfig, frozen: dict, *, tokenizer=None) -> None:
    """Write a Hugging Face directory that `load_pretrained` and transformers read.

    The tensors keep their dtype. `tokenizer`, a transformers tokenizer, is saved beside them.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    flat = flatten_dict(frozen, sep="/")
    disk = {}
    for tensor in FAMILIES[config.family].tensors(config):
        disk.update(tensor.disassemble(config, np.asarray(jax.device_get(flat[tensor.path]))))
    save_file(disk, path / WEIGHTS, metadata={"format": "pt"})
    raw = FAMILIES[config.family].write_config(config) | {"dtype": str(flat["embedding"].dtype)}
    if tokenizer is not None:
        raw |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        tokenizer.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
