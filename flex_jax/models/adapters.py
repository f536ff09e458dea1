"""The adapters of a projection: the extension point for a method that needs another kind than LoRA."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax

from flex_jax.models.config import LoraConfig, ModelConfig, SlotConfig
from flex_jax.models.lora import Dropout, Leaves, init_lora, lora_delta, lora_matrix


class ProjectionAdapter(NamedTuple):
    """How every projection of attention reads the adapter leaves that the adapters tree has for it, if any.

    Under the scan over layers the leaves have no leading axis L.
    """

    # (leaves, lora, x [..., D], frozen projection y [..., F] of x, dropout: a function of x, active in training) -> y
    apply: Callable[[Leaves, LoraConfig, jax.Array, jax.Array, Dropout], jax.Array]
    # (leaves with the axis L, lora, float32 kernel [L, D, F]) -> kernel, for export; None: it cannot be merged
    merge: Callable[[Leaves, LoraConfig, jax.Array], jax.Array] | None = None


def apply_lora(leaves: Leaves, lora: LoraConfig, x: jax.Array, y: jax.Array, dropout: Dropout) -> jax.Array:
    """Returns y + alpha / rank * dropout(x) A B."""
    return y + lora_delta(leaves, lora, x, dropout)


def merge_lora_kernel(leaves: Leaves, lora: LoraConfig, kernel: jax.Array) -> jax.Array:
    """Returns kernel + alpha / rank * A B."""
    return kernel + lora_matrix(leaves, lora)


LORA = ProjectionAdapter(apply_lora, merge_lora_kernel)


@dataclass(frozen=True)
class AdapterConfig:
    """How a model reads its adapters. Which adapters it has is up to the adapters tree."""

    lora: LoraConfig = LoraConfig()
    slot: SlotConfig = SlotConfig()
    projection: ProjectionAdapter = LORA


def init_attention_lora(key: jax.Array, config: ModelConfig, lora: LoraConfig) -> dict:
    """Returns initial LoRA pairs, [L, D, R] and [L, R, F], for every layer. Their product is zero."""
    projections, stacks = config.lora_projections(), config.layer_stacks()
    places = [(stack, name) for stack in reversed(stacks) for name in projections]
    tree = {stack: {"attention": {}} for stack in stacks}
    for pair_key, (stack, name) in zip(jax.random.split(key, len(places)), places, strict=True):
        tree[stack]["attention"][name] = init_lora(pair_key, lora.rank, (stacks[stack],), *projections[name])
    return tree
