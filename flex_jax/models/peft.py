"""PEFT LoRA adapter directories of the attention adapters, in and out."""

import contextlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from flex_jax.errors import InputError
from flex_jax.models.attention import adapted_projections
from flex_jax.models.checkpoint import check_tensors, open_tensors, read_json
from flex_jax.models.config import LoraConfig, ModelConfig
from flex_jax.models.decoder import layer_stacks
from flex_jax.models.families.family import DISK_NAMES
from flex_jax.models.tensors import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Keys of adapter_config.json by which an adapter is more than W + alpha / rank * A B on an unchanged W, and the values
# that leave it at that; the first is what a missing key means.
PLAIN = {
    "use_rslora": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "bias": ("none",),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "layers_to_transform": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "loftq_config": ({}, None),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # the others change W as they start
}


def adapter_tensors(config: ModelConfig, rank: int) -> list[Tensor]:
    """Every tensor of a PEFT adapter on the projections that make queries, keys and values, and where it goes."""
    table = []
    for stack, layers in layer_stacks(config).items():
        first = config.dense_layers if stack == "layers" else 0
        numbers = range(first, first + layers)
        for name, (inputs, outputs) in adapted_projections(config).items():
            path = f"{stack}/attention/{name}"
            on_disk = f"base_model.model.model.layers.{{layer}}.self_attn.{DISK_NAMES.get(name, name)}"
            table += [
                Tensor(f"{path}/lora_a", (f"{on_disk}.lora_A.weight",), (rank, inputs), True, numbers),
                Tensor(f"{path}/lora_b", (f"{on_disk}.lora_B.weight",), (outputs, rank), True, numbers),
            ]
    return table


def has_adapter(config: ModelConfig, adapters: dict) -> bool:
    """Whether an adapters tree holds the whole LoRA that a PEFT adapter is made of."""
    return {row.path for row in adapter_tensors(config, rank=1)} <= flatten_dict(adapters, sep="/").keys()


def save_adapter(path: Path, config: ModelConfig, adapters: dict, lora: LoraConfig, base: str) -> None:
    """Write the attention LoRA of an adapters tree, A [L, D, R] and B [L, R, F] of each projection, as a PEFT adapter
    of the checkpoint `base`, a directory or a Hub name. Whatever else is in the tree is left out."""
    flat = flatten_dict(adapters, sep="/")
    rank = flat[adapter_tensors(config, lora.rank)[0].path].shape[-1]  # two adapters joined have twice that of `lora`
    table = adapter_tensors(config, rank)
    tensors = {name: part for row in table for name, part in row.disassemble(np.asarray(flat[row.path]))}
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": lora.alpha * rank / lora.rank,
        "lora_dropout": lora.dropout,
        "target_modules": [DISK_NAMES.get(name, name) for name in adapted_projections(config)],
        "bias": "none",
        "inference_mode": True,
    }
    (path / CONFIG).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def load_adapter(path, config: ModelConfig, lora: LoraConfig) -> dict:
    """The adapters tree, float32, of a PEFT directory: `save_adapter`'s inverse.

    Raises InputError for an adapter that is not a plain LoRA of this rank and alpha on just our projections.
    """
    directory = Path(path).expanduser()
    file = directory / CONFIG
    if not file.is_file():
        raise InputError(f"{path}: not a PEFT adapter directory (no {CONFIG})")
    raw = read_json(file)
    allowed = {"peft_type": ("LORA",), "r": (lora.rank,), "lora_alpha": (lora.alpha,)} | PLAIN
    held = {key: values[0] for key, values in PLAIN.items()} | raw
    wrong = [
        f"{key} is {held.get(key)!r}, must be {' or '.join(map(repr, values))}"
        for key, values in allowed.items()
        if held.get(key) not in values
    ]
    if wrong:
        ours = "r and lora_alpha as in config.lora or a method's overrides of it"
        raise InputError(f"{file}: {'; '.join(wrong)} ({ours})")
    table = adapter_tensors(config, lora.rank)
    with contextlib.ExitStack() as stack:
        files = open_tensors(directory / WEIGHTS, stack)
        check_tensors(directory, table, files)
        flat = {row.path: _assemble(row, files) for row in table}
    return unflatten_dict(flat, sep="/")


def _assemble(row: Tensor, files: dict) -> jax.Array:
    parts = [files[name].get_tensor(name).T for name, _ in row.parts()]
    return jnp.asarray(np.stack(parts), jnp.float32)
