"""Matrices held as 8-bit or 4-bit integers with a scale per group of inputs, dequantised inside the compute."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

GROUP = 64  # largest number of inputs that share a scale
CLIPS = {"int8": (1.0,), "int4": (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)}  # shares of a group's largest value that are tried


class Quantised(NamedTuple):
    """Matrices [..., D, F] whose D inputs fall into groups of G, each with a scale for every output.

    A pytree, so that it goes through scan, vmap and indexing of its leading axes as the plain array would. Four-bit
    values are packed in pairs: byte i of a group holds inputs i (low) and i + G / 2 (high).
    """

    values: jax.Array  # int8 [..., D, F] or packed uint8 [..., D / 2, F]
    scales: jax.Array  # [..., D / G, F]

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, rows, columns = self.values.shape
        return (*stack, rows * (2 if self.values.dtype == jnp.uint8 else 1), columns)


def group_size(inputs: int) -> int:
    """The largest even divisor of `inputs` up to GROUP. Raises ValueError for an odd number, which has none."""
    sizes = [size for size in range(2, GROUP + 1, 2) if inputs % size == 0]
    if not sizes:
        raise ValueError(f"a matrix with {inputs} inputs cannot be quantised: the number must be even")
    return sizes[-1]


def quantise(matrix: jax.Array, kind: str, dtype) -> Quantised:
    """The nearest integers ("int8" or "int4") to matrix [..., D, F]; scales in `dtype`.

    A group's scale is the one of the `CLIPS` that leaves the least squared error: with 16 levels it pays to clip the
    largest values.
    """
    import qwix  # takes a second, and a run on plain weights does without

    *stack, inputs, outputs = matrix.shape
    group = group_size(inputs)
    # The group is an axis of its own, so that each scale serves one group and one output.
    grouped = matrix.astype(jnp.float32).reshape(*stack, inputs // group, group, outputs)
    own_scale = [axis for axis in range(grouped.ndim) if axis != grouped.ndim - 2]
    values, scales, error = None, None, jnp.inf
    for clip in CLIPS[kind]:
        trial = qwix.quantize(grouped, kind, channelwise_axes=own_scale, calibration_method=f"absmax,{clip}")
        integers, scale = trial.qvalue.astype(jnp.int8), trial.scale.astype(dtype)
        trial_error = jnp.square(integers * scale.astype(jnp.float32) - grouped).sum(-2, keepdims=True)
        better = trial_error < error
        error = jnp.where(better, trial_error, error)
        values = integers if values is None else jnp.where(better, integers, values)
        scales = scale if scales is None else jnp.where(better, scale, scales)
    if kind == "int4":
        low, high = jnp.split(values.astype(jnp.uint8) & 15, 2, axis=-2)
        values = low | (high << 4)
    return Quantised(values.reshape(*stack, -1, outputs), jnp.squeeze(scales, -2))


def dequantise(matrix: jax.Array | Quantised, dtype=None) -> jax.Array:
    """The matrix [..., D, F] as plain numbers, in the dtype of its scales or in `dtype`; a plain array as it is."""
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
