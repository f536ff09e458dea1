"""Rotary positions (RoPE, arXiv 2104.09864) and their scalings: linear, dynamic NTK, YaRN (arXiv 2309.00071)."""

import math

import jax
import jax.numpy as jnp

from flex_jax.models.config import Rope


def frequencies(rope: Rope, size: int, length: jax.Array) -> jax.Array:
    """Returns the angle per position of each pair of dimensions, float32 [B, size / 2].

    Only "dynamic" depends on the length [B], the number of tokens in a sequence. As in transformers, cached keys have
    the angles of the length at which they were written.
    """
    exponents = jnp.arange(0, size, 2, dtype=jnp.float32) / size
    if rope.kind == "dynamic":
        stretch = rope.factor * jnp.maximum(length, rope.trained_length) / rope.trained_length - (rope.factor - 1)
        return (rope.theta * stretch ** (size / (size - 2)))[:, None] ** -exponents
    plain = rope.theta**-exponents
    if rope.kind == "linear":
        plain = plain / rope.factor
    elif rope.kind == "yarn":
        low, high = _interpolated_range(rope, size)
        interpolated = jnp.clip((jnp.arange(size // 2, dtype=jnp.float32) - low) / (high - low), 0, 1)
        plain = plain * (1 - interpolated) + plain / rope.factor * interpolated
    return jnp.broadcast_to(plain, (*length.shape, size // 2))


def _interpolated_range(rope: Rope, size: int) -> tuple[float, float]:
    """YaRN: pairs before the range keep their frequency; for pairs after it, the factor divides the frequency."""

    def pair_with_rotations(count):
        return size * math.log(rope.trained_length / (count * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with_rotations(rope.beta_fast), pair_with_rotations(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    return low, high + 0.001 * (low == high)


def rotary(rope: Rope, size: int, positions: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines, float32 [B, S, 1, size], of positions [B, S] in sequences of length [B]."""
    angles = positions[..., None].astype(jnp.float32) * frequencies(rope, size, length)[:, None, :]
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates heads x [B, S, H, head_dim] by their positions, with halves paired as in Hugging Face."""
    (cos, sin), wide = rope, x.astype(jnp.float32)
    first, second = jnp.split(wide, 2, axis=-1)
    return (wide * cos + jnp.concatenate([-second, first], axis=-1) * sin).astype(x.dtype)
