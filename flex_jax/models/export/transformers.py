"""One client's whole model as a transformers directory: adapters merged into the backbone, plus the personal slot."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flex_jax.models.adapters import LORA, AdapterConfig
from flex_jax.models.checkpoint import read_json, save_pretrained
from flex_jax.models.config import ModelConfig, SlotConfig
from flex_jax.models.decoder import Decoder
from flex_jax.models.families import FAMILIES
from flex_jax.models.lora import lora_matrix
from flex_jax.models.weight_map import WeightMapping
from flex_jax.ops.quantised import dequantise
from flex_jax.terminal import tell

# modeling_flex.py has no slot without a gate. With this bias the sigmoid of a gate is 1 in float32.
OPEN_BIAS = 40.0
MODELING = Path(__file__).with_name("modeling_flex.py")  # the model's code for transformers; copied, not imported
COPIED = (  # files of a checkpoint to copy, in addition to weights and config.json
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)


def merge_adapters(frozen: dict, adapters: dict, adapter_config: AdapterConfig) -> dict:
    """Returns the frozen tree with the adapter of each projection merged into its kernel, without a personal slot.

    The sum is computed in float32, and rounded to the dtype of the backbone. Raises ValueError if it is not possible.
    """
    merged: dict[tuple[str, ...], Any] = dict(flatten_dict(frozen))
    leaves: dict[tuple[str, ...], dict[str, Any]] = {}
    for path, leaf in flatten_dict(adapters).items():
        kernel_path = (*path[:-1], "kernel")
        if kernel_path in merged:
            leaves.setdefault(kernel_path, {})[path[-1]] = leaf
    merge = adapter_config.projection.merge
    for path in leaves:
        if merge is None:
            raise ValueError(f"the adapter of {'/'.join(path[:-1])} cannot be merged into plain weights")
        kernel = dequantise(merged[path])
        new = merge(leaves[path], adapter_config.lora, kernel.astype(jnp.float32))
        bias = merged.get((*path[:-1], "bias"), jnp.zeros(new.shape[::2]))
        if adapter_config.projection is not LORA:
            check_merge(adapter_config, leaves[path], "/".join(path[:-1]), kernel, (new, bias))
        merged[path] = new.astype(kernel.dtype)
    return unflatten_dict(merged)


@jax.default_matmul_precision("highest")
def check_merge(adapters: AdapterConfig, leaves: dict, place: str, kernel: jax.Array, merged: tuple) -> None:
    """Raises ValueError if a method merges something else than it applies, for instance by forgetting the bias in y."""
    x = jax.random.normal(jax.random.key(0), (8, kernel.shape[1]))
    first, (new, bias) = {name: leaf[0] for name, leaf in leaves.items()}, merged
    wanted = adapters.projection.apply(first, adapters.lora, x, x @ kernel[0].astype(x.dtype) + bias[0], lambda x: x)
    if not jnp.allclose(x @ new[0] + bias[0], wanted, 1e-3, 1e-3 * jnp.abs(wanted).max()):
        raise ValueError(f"merge of {place} does not give the output of apply, whose y has the bias")


def personal_slot(adapters: dict) -> dict | None:
    return adapters.get("layers", {}).get("moe", {}).get("slot")


def full_slot(frozen: dict, slot: dict, expert_index: jax.Array, config: SlotConfig) -> dict[str, jax.Array]:
    """Returns the weights of a slot, with LoRA merged into the frozen experts expert_index [L, r] it came from.

    These are gate [L, D, r], gate_bias [L, r] if the gate has one, gate_proj and up_proj [L, r, D, F], and down_proj
    [L, r, F, D].
    """
    moe = frozen["layers"]["moe"]

    def grafted(stack):
        gather = jax.vmap(partial(jnp.take, axis=0))
        return dequantise(jax.tree.map(lambda leaf: gather(leaf, expert_index), stack), jnp.float32)

    def full(name, weights):
        leaves = slot[name]
        return leaves["kernel"] if "kernel" in leaves else weights() + lora_matrix(leaves, config.lora)

    gate = {name: slot[name] for name in ("gate", "gate_bias") if name in slot}
    if config.gate == "none":
        num_layers, num_experts = expert_index.shape
        zero = jnp.zeros((num_layers, moe["router"].shape[1], num_experts))
        gate = {"gate": zero, "gate_bias": jnp.full((num_layers, num_experts), OPEN_BIAS)}
    return gate | {
        "gate_proj": full("gate_proj", lambda: jnp.split(grafted(moe["gate_up"]), 2, axis=-1)[0]),
        "up_proj": full("up_proj", lambda: jnp.split(grafted(moe["gate_up"]), 2, axis=-1)[1]),
        "down_proj": full("down_proj", lambda: grafted(moe["down"])),
    }


def slot_weights(config: ModelConfig, num_experts: int) -> list[WeightMapping]:
    """Returns every weight of the slots on disk, under the names in modeling_flex.py. Paths are keys of `full_slot`."""
    prefix = "model.layers.{layer}.mlp.personal"
    layers = range(config.first_k_dense_replace, config.num_layers)
    width, hidden = config.hidden_size, config.moe_intermediate_size
    shapes = {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}
    names = {name: (f"{prefix}.experts.{{expert}}.{name}.weight",) for name in shapes}
    return [
        WeightMapping("gate", (f"{prefix}.gate.weight",), (num_experts, width), True, layers),
        WeightMapping("gate_bias", (f"{prefix}.gate.bias",), (num_experts,), layers=layers),
        *(WeightMapping(name, names[name], shape, True, layers, num_experts) for name, shape in shapes.items()),
    ]


def save_transformers(path: Path, base: Path, model: Decoder, variables: dict) -> None:
    """Writes the model of one client, whose collections are `variables`, for transformers' AutoModelForCausalLM.

    Files other than weights come from `base`, the directory of the backbone. Weights have the dtype of the backbone.
    With a personal slot the directory also has modeling_flex.py, and loading it needs trust_remote_code=True.
    """
    config, family = model.config, FAMILIES[model.config.family]
    params, adapters = variables["params"], variables["adapters"]
    dtype, slot = params["embedding"].dtype, personal_slot(adapters)
    raw, extra = read_json(base / "config.json"), ()
    raw.pop("torch_dtype", None)  # the older name of dtype
    if family.in_transformers:
        raw.pop("auto_map", None)  # transformers does not need the code that came with the checkpoint
    if slot is not None:
        expert_index = variables["grafts"]["layers"]["moe"]["slot"]["expert_index"]
        full = full_slot(params, slot, expert_index, model.adapters.slot)
        count, name = expert_index.shape[-1], f"Flex{family.architecture}"
        raw |= {"architectures": [name], "auto_map": {"AutoModelForCausalLM": f"{MODELING.stem}.{name}"}}
        sizes = {"personal_experts": count, "expert_width": config.moe_intermediate_size}
        raw["flex"] = sizes | {"gate_bias": "gate_bias" in full}
        mappings = [m for m in slot_weights(config, count) if m.path in full]
        extra = (pair for m in mappings for pair in m.disassemble(np.asarray(full[m.path].astype(dtype))))
        shutil.copy(MODELING, path)
    save_pretrained(path, config, merge_adapters(params, adapters, model.adapters), raw=raw, extra=extra)
    copy_files(base, path, COPIED if family.in_transformers else (*COPIED, "*.py"))


def copy_files(base: Path, path: Path, patterns: tuple[str, ...]) -> None:
    """Copies files of a checkpoint directory, and tells of links out of it, which are not copied."""
    for file in sorted({file for pattern in patterns for file in base.glob(pattern)}):
        if is_own_file(file, base):
            shutil.copy(file, path)
        else:
            tell(f"{file}: not copied: it is no file of the checkpoint, but leads to {file.resolve()}")


def is_own_file(file: Path, base: Path) -> bool:
    """Whether a file is in a checkpoint directory, or a link into the blobs of a Hugging Face cache around it."""
    target, directory = file.resolve(), base.resolve()
    return target.is_file() and any(map(target.is_relative_to, (directory, directory.parent.parent / "blobs")))
