"""Reads and writes the attention LoRA as PEFT adapter directories."""

import contextlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from flex_jax.errors import InputError
from flex_jax.files import local_path, write_json
from flex_jax.models.checkpoint import check_tensors, open_tensors, read_json, tell_unread
from flex_jax.models.config import LoraConfig, ModelConfig
from flex_jax.models.families.family import DISK_NAMES
from flex_jax.models.weight_map import WeightMapping

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Keys of adapter_config.json, and the values for which an adapter is just W + alpha / rank * A B on an unchanged W. The
# first value is what a missing key means.
PLAIN = {
    **dict.fromkeys(("use_rslora", "use_dora", "use_qalora", "lora_bias", "fan_in_fan_out"), (False,)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "loftq_config"), ({}, None)),
    **dict.fromkeys(("modules_to_save", "layer_replication", "target_parameters", "exclude_modules"), (None, [])),
    **dict.fromkeys(("layers_to_transform", "trainable_token_indices"), (None,)),
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "kasa_config", "use_bdlora"), (None,)),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # other values change W at the start
}


def adapter_weights(config: ModelConfig, rank: int) -> list[WeightMapping]:
    """Returns every weight of a PEFT adapter on the projections that make queries, keys and values."""
    mappings = []
    for stack, num_layers in config.layer_stacks().items():
        first = config.first_k_dense_replace if stack == "layers" else 0
        layers = range(first, first + num_layers)
        for name, (inputs, outputs) in config.lora_projections().items():
            disk_name = f"base_model.model.model.layers.{{layer}}.self_attn.{DISK_NAMES.get(name, name)}"
            for letter, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                path, names = f"{stack}/attention/{name}/lora_{letter.lower()}", (f"{disk_name}.lora_{letter}.weight",)
                mappings.append(WeightMapping(path, names, shape, True, layers))
    return mappings


def has_adapter(config: ModelConfig, adapters: dict) -> bool:
    """Whether an adapters tree has the complete LoRA that a PEFT adapter consists of."""
    return {mapping.path for mapping in adapter_weights(config, rank=1)} <= flatten_dict(adapters, sep="/").keys()


def adapter_files(path) -> list[Path]:
    """Returns the files of an adapter directory that `load_adapter` reads."""
    return [file for name in (CONFIG, WEIGHTS) if (file := local_path(path) / name).is_file()]


def save_adapter(path: Path, config: ModelConfig, adapters: dict, lora: LoraConfig, base: str) -> None:
    """Writes the attention LoRA of an adapters tree as a PEFT adapter of the checkpoint `base`, without other adapters.

    Two concatenated adapters have twice the rank of `lora`. The scale alpha / rank stays the same.
    """
    flat: dict[str, Any] = dict(flatten_dict(adapters, sep="/"))
    rank = flat[adapter_weights(config, lora.rank)[0].path].shape[-1]
    mappings = adapter_weights(config, rank)
    tensors = {name: part for mapping in mappings for name, part in mapping.disassemble(np.asarray(flat[mapping.path]))}
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": lora.alpha * rank / lora.rank,
        "lora_dropout": lora.dropout,
        "target_modules": [DISK_NAMES.get(name, name) for name in config.lora_projections()],
        "bias": "none",
        "inference_mode": True,
    }
    write_json(path / CONFIG, raw)


def load_adapter(path, config: ModelConfig, lora: LoraConfig) -> dict:
    """Reads what `save_adapter` writes, in float32. Raises InputError unless it is a plain LoRA that fits `lora`."""
    directory = local_path(path)
    file = directory / CONFIG
    if not file.is_file():
        raise InputError(f"{path}: not a PEFT adapter directory (no {CONFIG})")
    raw = read_json(file)
    allowed = {"peft_type": ("LORA",), "r": (lora.rank,), "lora_alpha": (lora.alpha,)} | PLAIN
    given = {key: values[0] for key, values in PLAIN.items()} | raw
    wrong = [
        f"{key} is {given.get(key)!r}, must be {' or '.join(map(repr, values))}"
        for key, values in allowed.items()
        if given.get(key) not in values
    ]
    targets, projections = raw.get("target_modules"), [DISK_NAMES.get(name, name) for name in config.lora_projections()]
    if isinstance(targets, list) and {str(target).rpartition(".")[2] for target in targets} != set(projections):
        wrong.append(f"target_modules is {targets!r}, must be {projections!r}")
    if wrong:
        ours = "r and lora_alpha as in config.lora or a method's overrides of it"
        raise InputError(f"{file}: {'; '.join(wrong)} ({ours})")
    mappings = adapter_weights(config, lora.rank)
    with contextlib.ExitStack() as stack:
        files = open_tensors(directory / WEIGHTS, stack)
        tell_unread(directory, [WEIGHTS])
        check_tensors(directory, mappings, files)
        parts = {m.path: [files[name].get_tensor(name).T for name, _ in m.parts()] for m in mappings}
    return unflatten_dict({path: jnp.asarray(np.stack(part), jnp.float32) for path, part in parts.items()}, sep="/")
