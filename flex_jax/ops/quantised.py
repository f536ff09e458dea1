"""Matrices stored as 8-bit or 4-bit integers with a scale per group of inputs. They are dequantised when used."""

from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp

GROUP = 64  # largest number of inputs that share a scale
CLIPS = {"int8": (1.0,), "int4": (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)}  # fractions of a group's largest value to try


class Quantised(NamedTuple):
    """Matrices [..., D, F] with D inputs in groups of G. Each group has a scale for every output.

    This is a pytree, so scan, vmap and indexing of the leading axes treat it as a plain array. Four-bit values are
    packed in pairs: byte i of a group has the inputs i (low bits) and i + G / 2 (high bits).
    """

    values: jax.Array  # int8 [..., D, F] or packed uint8 [..., D / 2, F]
    scales: jax.Array  # [..., D / G, F]

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, packed, outputs = self.values.shape
        return (*stack, packed * (2 if self.values.dtype == jnp.uint8 else 1), outputs)


Matrices = jax.Array | Quantised  # one matrix or a stack of them


def group_size(inputs: int) -> int:
    """Returns the largest even divisor of `inputs` up to GROUP. Raises ValueError if `inputs` is odd."""
    sizes = [size for size in range(2, GROUP + 1, 2) if inputs % size == 0]
    if not sizes:
        raise ValueError(f"a matrix with {inputs} inputs cannot be quantised: the number must be even")
    return sizes[-1]


def quantise(matrix: jax.Array, kind: str, dtype) -> Quantised:
    """Rounds matrix [..., D, F] to "int8" or "int4", with scales in `dtype`.

    Each group gets the scale of `CLIPS` with the least squared error: with 16 levels, clipping can reduce the error.
    """
    import qwix  # importing it takes a second, and runs on plain weights do not need it

    *stack, inputs, outputs = matrix.shape
    group = group_size(inputs)
    # The inputs of a group get a separate axis, so that each scale serves one group and one output.
    grouped = matrix.astype(jnp.float32).reshape(*stack, inputs // group, group, outputs)
    scale_axes = [axis for axis in range(grouped.ndim) if axis != grouped.ndim - 2]

    def attempt(clip):
        trial = qwix.quantize(grouped, kind, channelwise_axes=scale_axes, calibration_method=f"absmax,{clip}")
        integers, scale = trial.qvalue.astype(jnp.int8), trial.scale.astype(dtype)
        return integers, scale, jnp.square(integers * scale.astype(jnp.float32) - grouped).sum(-2, keepdims=True)

    def better(best, trial):
        return tuple(jnp.where(trial[2] < best[2], new, old) for new, old in zip(trial, best, strict=True))

    values, scales, _ = reduce(better, map(attempt, CLIPS[kind]))
    if kind == "int4":
        low, high = jnp.split(values.astype(jnp.uint8) & 15, 2, axis=-2)
        values = low | (high << 4)
    return Quantised(values.reshape(*stack, -1, outputs), jnp.squeeze(scales, -2))


def dequantise(matrix: Matrices, dtype=None) -> jax.Array:
    """Returns a plain matrix [..., D, F], in `dtype` or by default in the dtype of the scales or the plain matrix."""
    if not isinstance(matrix, Quantised):
        return matrix if dtype is None else matrix.astype(dtype)
    values, scales = matrix
    *stack, groups, outputs = scales.shape
    values = values.reshape(*stack, groups, -1, outputs)
    if values.dtype == jnp.uint8:
        low, high = values << 4, values & 0xF0  # each nibble in the upper half of a byte: its sign is the byte's
        values = jnp.concatenate([low, high], axis=-2).astype(jnp.int8) >> 4
    dtype = dtype or scales.dtype
    return (values.astype(dtype) * scales[..., None, :].astype(dtype)).reshape(*stack, -1, outputs)
