"""Rotary positions (RoPE, arXiv 2104.09864) and their scalings: linear, dynamic NTK, YaRN (arXiv 2309.00071)."""

import math

import jax
import jax.numpy as jnp

from flex_jax.models.config import Rope


def frequencies(rope: Rope, size: int, length: jax.Array) -> jax.Array:
    """Angle per position of each pair of dimensions, float32 [B, size / 2].

    length [B] is the number of tokens a sequence has; only "dynamic" depends on it. Keys in a cache keep the angles of
    the length at which they were written, as in transformers.
    """
    exponents = jnp.arange(0, size, 2, dtype=jnp.float32) / size
    if rope.kind == "dynamic":
        stretch = rope.factor * jnp.maximum(length, rope.trained_length) / rope.trained_length - (rope.factor - 1)
        theta = rope.theta * stretch ** (size / (size - 2))
        return theta[:, None] ** -exponents
    plain = rope.theta**-exponents
    if rope.kind == "linear":
        plain = plain / rope.factor
    elif rope.kind == "yarn":
        low, high = _interpolated_range(rope, size)
        interpolated = jnp.clip((jnp.arange(size // 2, dtype=jnp.float32) - low) / (high - low), 0, 1)
        plain = plain * (1 - interpolated) + plain / rope.factor * interpolated
    return jnp.broadcast_to(plain, (*length.shape, size // 2))


def _interpolated_range(rope: Rope, size: int) -> tuple[float, float]:
    """YaRN: pairs of dimensions below the first keep their frequency, above the second it is divided by the factor."""

    def pair_that_turns(times):
        return size * math.log(rope.trained_length / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    return low, high + 0.001 * (low == high)


def rotary(rope: Rope, size: int, positions: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, [B, S, 1, size] float32, for positions [B, S] of sequences of `length` [B] tokens."""
    angles = positions[..., None].astype(jnp.float32) * frequencies(rope, size, length)[:, None, :]
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate heads x [B, S, H, head_dim] by their positions, halves paired as Hugging Face does."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)
