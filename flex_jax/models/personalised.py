"""One client's whole model as a transformers directory: LoRA merged into the backbone, the personal slot beside it."""

import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flex_jax.models.checkpoint import read_json, save_pretrained
from flex_jax.models.config import LoraConfig, ModelConfig, SlotConfig
from flex_jax.models.decoder import Decoder
from flex_jax.models.families import FAMILIES
from flex_jax.models.tensors import Tensor
from flex_jax.ops.quantised import dequantise

OPEN_BIAS = 40.0  # of a slot without a gate, which modeling_flex.py does not know: its sigmoid is 1 in float32
MODELING = Path(__file__).with_name("modeling_flex.py")  # the model's code for transformers, copied and not imported
COPIED = (  # of a checkpoint, beside weights and config.json
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
)


def merge_lora(frozen: dict, adapters: dict, lora: LoraConfig) -> dict:
    """The frozen tree with alpha / rank * A B added to each kernel that has a LoRA beside it, and alpha / rank * delta
    where there is one: computed in float32, held plain in the kernel's dtype. The personal slot, if any, is not looked
    at."""
    flat, merged = flatten_dict(adapters, sep="/"), flatten_dict(frozen, sep="/")
    for path, leaf in flat.items():
        *module, name = path.split("/")
        if name in ("lora_a", "delta") and "slot" not in module:
            kernel = "/".join((*module, "kernel"))
            pair = "/".join((*module, "lora_b"))
            change = _product(leaf, flat[pair], lora) if name == "lora_a" else lora.alpha / lora.rank * leaf
            plain = dequantise(merged[kernel])
            merged[kernel] = (plain.astype(jnp.float32) + change).astype(plain.dtype)
    return unflatten_dict(merged, sep="/")


def _product(a: jax.Array, b: jax.Array, lora: LoraConfig) -> jax.Array:
    return lora.alpha / lora.rank * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def personal_slot(adapters: dict) -> dict | None:
    """The slot's part of an adapters tree, or None where there is none."""
    return adapters.get("layers", {}).get("moe", {}).get("slot")


def full_slot(frozen: dict, slot: dict, expert_index: jax.Array, config: SlotConfig) -> dict[str, jax.Array]:
    """A slot's gate [L, D, r], gate_bias [L, r] if it has one, gate_proj, up_proj [L, r, D, F], down_proj [L, r, F, D].

    Experts that were trained by LoRA are their grafted weights, rows expert_index [L, r] of the frozen ones, with the
    LoRA merged in float32.
    """
    moe = frozen["layers"]["moe"]

    def grafted(stack):
        rows = jax.vmap(partial(jnp.take, axis=0))
        return dequantise(jax.tree.map(lambda leaf: rows(leaf, expert_index), stack), jnp.float32)

    def full(name, weights):
        held = slot[name]
        return held["kernel"] if "kernel" in held else weights() + _product(held["lora_a"], held["lora_b"], config.lora)

    gate = {name: slot[name] for name in ("gate", "gate_bias") if name in slot}
    if config.gate == "none":
        layers, experts = expert_index.shape
        zero = jnp.zeros((layers, moe["router"].shape[1], experts))
        gate = {"gate": zero, "gate_bias": jnp.full((layers, experts), OPEN_BIAS)}
    return gate | {
        "gate_proj": full("gate_proj", lambda: jnp.split(grafted(moe["gate_up"]), 2, axis=-1)[0]),
        "up_proj": full("up_proj", lambda: jnp.split(grafted(moe["gate_up"]), 2, axis=-1)[1]),
        "down_proj": full("down_proj", lambda: grafted(moe["down"])),
    }


def slot_tensors(config: ModelConfig, experts: int) -> list[Tensor]:
    """Every tensor of the slots on disk, with the names of modeling_flex.py, and where in `full_slot` it comes from."""
    prefix = "model.layers.{layer}.mlp.personal"
    layers = range(config.dense_layers, config.layers)

    def projection(name, outputs, inputs):
        on_disk = f"{prefix}.experts.{{expert}}.{name}.weight"
        return Tensor(name, (on_disk,), (outputs, inputs), True, layers, experts)

    return [
        Tensor("gate", (f"{prefix}.gate.weight",), (experts, config.width), True, layers),
        Tensor("gate_bias", (f"{prefix}.gate.bias",), (experts,), layers=layers),
        projection("gate_proj", config.expert_width, config.width),
        projection("up_proj", config.expert_width, config.width),
        projection("down_proj", config.width, config.expert_width),
    ]


def save_personalised(path: Path, base: Path, model: Decoder, variables: dict) -> None:
    """Write the model of one client, whose collections are `variables`, for transformers' AutoModelForCausalLM.

    base: the directory that the backbone was read from, whose config.json, tokenizer and generation_config.json go
    along. Weights have the backbone's dtype. With a personal slot the directory holds modeling_flex.py too, and loading
    needs trust_remote_code=True.
    """
    config, family = model.config, FAMILIES[model.config.family]
    params, adapters = variables["params"], variables["adapters"]
    dtype, slot = params["embedding"].dtype, personal_slot(adapters)
    raw, copied, extra = read_json(base / "config.json"), COPIED, ()
    raw.pop("torch_dtype", None)  # the older name of dtype
    if family.in_transformers:
        raw.pop("auto_map", None)  # code of the checkpoint's own, which transformers does without
    else:
        copied = (*COPIED, "*.py")
    if slot is not None:
        index = variables["grafts"]["layers"]["moe"]["slot"]["expert_index"]
        full = full_slot(params, slot, index, model.adapters.slot)
        experts = index.shape[-1]
        name = f"Flex{family.architecture}"
        raw |= {"architectures": [name], "auto_map": {"AutoModelForCausalLM": f"{MODELING.stem}.{name}"}}
        raw["flex"] = {
            "personal_experts": experts,
            "expert_width": config.expert_width,
            "gate_bias": "gate_bias" in full,
        }
        rows = [row for row in slot_tensors(config, experts) if row.path in full]
        extra = (pair for row in rows for pair in row.disassemble(np.asarray(full[row.path].astype(dtype))))
        shutil.copy(MODELING, path)
    save_pretrained(path, config, merge_lora(params, adapters, model.adapters.lora), raw=raw, extra=extra)
    for file in sorted({file for pattern in copied for file in base.glob(pattern)}):
        shutil.copy(file, path)
