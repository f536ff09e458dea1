"""Compression of a client's upload, and the count of bytes on the wire.

It works on arrays alone, so it combines with every method: floating-point leaves are compressed, integer leaves are
sent unchanged. Shapes are static, so the clients of a cohort are a `vmap`.

bfloat16: the nearest number with half the bits. int8: stochastic rounding, right on average, in the spirit of QSGD
(Alistarh et al. 2017, arXiv 1610.02132). topk: the largest entries. What was not sent is added to the client's next
upload: error feedback (Seide et al. 2014; Stich et al. 2018, arXiv 1809.07599).
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ByteCount:
    """An exact number of bytes, fixed + units * per_unit, that can leave a jit.

    `fixed` and `per_unit` are static Python integers of any size; the product is taken on the host. A 32-bit array
    would overflow at 4 GiB.
    """

    fixed: int = field(metadata={"static": True})
    per_unit: int = field(default=0, metadata={"static": True})
    units: Any = field(default_factory=lambda: np.zeros((), np.int32))  # int32 [], or [C] for a cohort

    def tolist(self) -> Any:
        """Returns the bytes as a Python integer, for a cohort as a list."""
        units = np.asarray(self.units)
        counts = [self.fixed + int(unit) * self.per_unit for unit in units.ravel()]
        return counts if units.ndim else counts[0]


class Int8(NamedTuple):
    """A leaf as integers from -127 to 127 times one scale."""

    values: jax.Array  # int8, the leaf's shape
    scale: jax.Array  # float32 []


class TopK(NamedTuple):
    """The k largest entries of a leaf by magnitude. An entry takes 8 bytes: above half of a leaf nothing is saved."""

    values: jax.Array  # float32 [k]
    indices: jax.Array  # int32 [k], into the flattened leaf


def stochastic_int8(leaf: jax.Array, key: jax.Array) -> Int8:
    """Rounds leaf / scale up or down at random, so that the mean is the leaf's value."""
    leaf = leaf.astype(jnp.float32)
    scale = jnp.abs(leaf).max(initial=0.0) / 127
    steps = leaf / jnp.where(scale == 0, 1.0, scale)
    below = jnp.floor(steps)
    rounded = below + jax.random.bernoulli(key, steps - below)
    return Int8(jnp.clip(rounded, -127, 127).astype(jnp.int8), scale)  # rounding in the division may overshoot 127


def largest(leaf: jax.Array, fraction: float) -> TopK:
    """Selects the `fraction` of entries with the largest magnitude, at least one."""
    flat = leaf.astype(jnp.float32).ravel()
    _, indices = jax.lax.top_k(jnp.abs(flat), min(flat.size, max(1, round(fraction * flat.size))))
    return TopK(flat[indices], indices)


PACKERS = {  # (floating-point leaf, key, fraction) -> what is sent for it
    "none": lambda leaf, key, fraction: leaf,
    "bfloat16": lambda leaf, key, fraction: leaf.astype(jnp.bfloat16),
    "int8": lambda leaf, key, fraction: stochastic_int8(leaf, key),
    "topk": lambda leaf, key, fraction: largest(leaf, fraction),
}


def is_floating(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def init_residual(upload, compression: str) -> Any:
    """Returns what a client has not sent yet: zeros for topk (None for integer leaves), {} for the others."""
    if compression != "topk":
        return {}
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if is_floating(leaf) else None, upload)


def compress(upload, residual, key: jax.Array, *, compression: str, fraction: float) -> tuple[Any, Any]:
    """Returns what one client sends and its new residual. `fraction` is topk's share of every leaf."""

    def pack(leaf, leaf_key):
        return PACKERS[compression](leaf, leaf_key, fraction) if is_floating(leaf) else leaf

    def with_residual(function, *trees):
        return jax.tree.map(function, residual, *trees, is_leaf=lambda node: node is None)

    if compression == "topk":
        upload = with_residual(lambda left, leaf: leaf if left is None else left + leaf, upload)
    packed = jax.tree.map(pack, upload, optax.tree.split_key_like(key, upload))
    if compression == "topk":
        unpacked = decompress(packed, upload)
        residual = with_residual(lambda left, leaf, sent: None if left is None else leaf - sent, upload, unpacked)
    return packed, residual


def decompress(packed, like) -> Any:
    """Returns one client's upload at the server, with the shapes and dtypes of `like` (arrays or shapes)."""

    def restore(packed, like):
        if isinstance(packed, Int8):
            packed = packed.values * packed.scale
        elif isinstance(packed, TopK):
            packed = jnp.zeros(like.size).at[packed.indices].set(packed.values).reshape(like.shape)
        return packed.astype(like.dtype)

    return jax.tree.map(restore, packed, like, is_leaf=lambda node: isinstance(node, Int8 | TopK))


def tree_bytes(tree) -> int:
    """Returns the bytes of all arrays or shapes of a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
