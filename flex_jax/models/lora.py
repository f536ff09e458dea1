"""Low-rank adapters (LoRA, arXiv 2106.09685): where they are read, and how they start."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from flex_jax.models.config import LoraConfig
from flex_jax.ops.saved import saved

DROPOUT = "dropout"  # name of the random stream of LoRA dropout


def lora_delta(module: nn.Module, lora: LoraConfig, x: jax.Array) -> jax.Array:
    """alpha / rank * dropout(x) A B, with A = `lora_a` [D, R] and B = `lora_b` [R, F] of the module's adapters.

    Dropout is active where the caller gives the random stream "dropout": in training.
    """
    a, b = (module.get_variable("adapters", name).astype(x.dtype) for name in ("lora_a", "lora_b"))
    return saved(dropped(module, lora, x) @ a) @ b * (lora.alpha / lora.rank)


def lora_experts_delta(module: nn.Module, lora: LoraConfig, x: jax.Array) -> jax.Array:
    """sum of g_e alpha / rank * dropout(x) A_e B_e over a token's two best LoRA experts e (FedAMoLE, arXiv 2411.19128).

    A = `experts_a` [n, D, R], B = `experts_b` [n, R, F]. The experts' own A are what a token is compared with:
    logits (x P) . (x A_e) / sqrt(R), P = `router` [D, R]; g is their softmax, of the two to a sum of one.
    """
    names = ("experts_a", "experts_b", "router")
    a, b, router = (module.get_variable("adapters", name).astype(x.dtype) for name in names)
    experts, _, rank = a.shape

    def embed(x):
        return jnp.einsum("...d,ndr->...nr", x, a)

    logits = jnp.einsum("...r,...nr->...n", x @ router, embed(x)).astype(jnp.float32) * rank**-0.5
    best, index = jax.lax.top_k(logits, min(2, experts))
    gates = jnp.einsum("...k,...kn->...n", jax.nn.softmax(best), jax.nn.one_hot(index, experts)).astype(x.dtype)
    hidden = gates[..., None] * embed(dropped(module, lora, x))
    return jnp.einsum("...nr,nrf->...f", hidden, b) * (lora.alpha / lora.rank)


def dropped(module: nn.Module, lora: LoraConfig, x: jax.Array) -> jax.Array:
    """dropout(x), which is x where the module has no random stream for it."""
    if not (lora.dropout and module.has_rng(DROPOUT)):
        return x
    keep = saved(bernoulli(module.make_rng(DROPOUT), 1.0 - lora.dropout, x.shape))
    return jnp.where(keep, x / (1.0 - lora.dropout), 0.0)


def bernoulli(key: jax.Array, probability: float, shape: tuple[int, ...]) -> jax.Array:
    """`jax.random.bernoulli` to 16 bits of the probability, for half the random bits, which are most of its cost."""
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 2),), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[:size]
    return halves.reshape(shape) < round(probability * 2**16)


def init_lora(key: jax.Array, rank: int, stack: tuple[int, ...], inputs: int, outputs: int) -> dict:
    """A pair whose product is zero: A [*stack, D, R] uniform within 1/sqrt(D) as in PEFT, B [*stack, R, F] zero."""
    bound = inputs**-0.5
    return {
        "lora_a": jax.random.uniform(key, (*stack, inputs, rank), jnp.float32, -bound, bound),
        "lora_b": jnp.zeros((*stack, rank, outputs), jnp.float32),
    }


def is_pair(node) -> bool:
    """Whether a node of an adapters tree is the LoRA of one projection, A [L, D, R] and B [L, R, F]."""
    return isinstance(node, dict) and "lora_a" in node


def map_pairs(function: Callable, tree: dict, *rest: dict) -> dict:
    """`function` of each pair of a tree and what the other trees have in its place."""
    return jax.tree.map(function, tree, *rest, is_leaf=is_pair)


def fresh_pairs(key: jax.Array, like: dict) -> dict:
    """Pairs of these shapes as they start: A random, B zero."""

    def draw(pair, keys):
        *stack, inputs, rank = pair["lora_a"].shape
        return init_lora(keys["lora_a"], rank, tuple(stack), inputs, pair["lora_b"].shape[-1])

    return map_pairs(draw, like, optax.tree.split_key_like(key, like))
