"""Low-rank adapters (LoRA, arXiv 2106.09685): where they are read, and how they start."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flex_jax.models.config import LoraConfig

DROPOUT = "dropout"  # name of the random stream of LoRA dropout


def lora_delta(module: nn.Module, lora: LoraConfig, x: jax.Array) -> jax.Array:
    """alpha / rank * dropout(x) A B, with A = `lora_a` [D, R] and B = `lora_b` [R, F] of the module's adapters.

    Dropout is active where the caller gives the random stream "dropout": in training.
    """
    a, b = (module.get_variable("adapters", name).astype(x.dtype) for name in ("lora_a", "lora_b"))
    if lora.dropout and module.has_rng(DROPOUT):
        keep = jax.random.bernoulli(module.make_rng(DROPOUT), 1.0 - lora.dropout, x.shape)
        x = jnp.where(keep, x / (1.0 - lora.dropout), 0.0)
    return (x @ a) @ b * (lora.alpha / lora.rank)


def init_lora(key: jax.Array, rank: int, stack: tuple[int, ...], inputs: int, outputs: int) -> dict:
    """A pair whose product is zero: A [*stack, D, R] uniform within 1/sqrt(D) as in PEFT, B [*stack, R, F] zero."""
    bound = inputs**-0.5
    return {
        "lora_a": jax.random.uniform(key, (*stack, inputs, rank), jnp.float32, -bound, bound),
        "lora_b": jnp.zeros((*stack, rank, outputs), jnp.float32),
    }
