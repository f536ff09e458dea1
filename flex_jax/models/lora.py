"""Low-rank adapters (LoRA, arXiv 2106.09685): what they compute, their dropout, and their initial values."""

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from flex_jax.models.config import LoraConfig
from flex_jax.ops.remat import checkpoint_product

DROPOUT = "dropout"  # name of the random stream of LoRA dropout

Leaves = Mapping[str, jax.Array]  # the adapter leaves of one projection
Dropout = Callable[[jax.Array], jax.Array]


def lora_delta(leaves: Leaves, lora: LoraConfig, x: jax.Array, dropout: Dropout) -> jax.Array:
    """Returns alpha / rank * dropout(x) A B, with A = `lora_a` [D, R] and B = `lora_b` [R, F]."""
    a, b = (leaves[name].astype(x.dtype) for name in ("lora_a", "lora_b"))
    return checkpoint_product(dropout(x) @ a) @ b * lora.scale


def lora_matrix(leaves: Leaves, lora: LoraConfig) -> jax.Array:
    """Returns alpha / rank * A B, float32 [..., D, F]: what a LoRA adds to its matrix."""
    return lora.scale * jnp.matmul(leaves["lora_a"], leaves["lora_b"], precision=jax.lax.Precision.HIGHEST)


def dropout_of(module: nn.Module, lora: LoraConfig) -> Dropout:
    """Returns the dropout of a module. It is active if the caller gives the random stream "dropout": in training."""

    def dropout(x: jax.Array) -> jax.Array:
        if not (lora.dropout and module.has_rng(DROPOUT)):
            return x
        keep = checkpoint_product(_bernoulli(module.make_rng(DROPOUT), 1.0 - lora.dropout, x.shape))
        return jnp.where(keep, x / (1.0 - lora.dropout), 0.0)

    return dropout


def _bernoulli(key: jax.Array, probability: float, shape: tuple[int, ...]) -> jax.Array:
    """`jax.random.bernoulli` with 16 random bits per element. Random bits are most of its cost; this needs half."""
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 2),), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[:size]
    return halves.reshape(shape) < round(probability * 2**16)


def init_lora(key: jax.Array, rank: int, stack: tuple[int, ...], inputs: int, outputs: int) -> dict:
    """Returns A [*stack, D, R], uniform within 1 / sqrt(D) as in PEFT, and B [*stack, R, F], zero."""
    bound = inputs**-0.5
    a = jax.random.uniform(key, (*stack, inputs, rank), jnp.float32, -bound, bound)
    return {"lora_a": a, "lora_b": jnp.zeros((*stack, rank, outputs), jnp.float32)}


def is_pair(node: Any) -> bool:
    """Whether a node of an adapters tree is the LoRA of one projection: A [L, D, R] and B [L, R, F]."""
    return isinstance(node, dict) and "lora_a" in node


def map_pairs(function: Callable, tree: dict, *rest: dict) -> dict:
    """Applies `function` to each pair of a tree, and to what the other trees have in its place."""
    return jax.tree.map(function, tree, *rest, is_leaf=is_pair)


def fresh_pairs(key: jax.Array, like: dict) -> dict:
    """Returns initial pairs with the shapes of `like`: A random, B zero."""

    def draw(pair, keys):
        *stack, inputs, rank = pair["lora_a"].shape
        return init_lora(keys["lora_a"], rank, tuple(stack), inputs, pair["lora_b"].shape[-1])

    return map_pairs(draw, like, cast(dict, optax.tree.split_key_like(key, like)))
