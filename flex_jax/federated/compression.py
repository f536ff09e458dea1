"""How a client's upload is made smaller on its way to the server.

Any method's upload goes through it, since only arrays are seen: floating-point leaves are compressed, integer leaves
are sent as they are. Shapes are static, so that a cohort's clients are a `vmap`.

bfloat16: the nearest number of half the bits. int8: stochastic rounding, right on average, in the spirit of QSGD
(Alistarh et al. 2017, arXiv 1610.02132). topk: the largest entries, and what was not sent is added to the client's next
upload: error feedback (Seide et al. 2014; Stich et al. 2018, arXiv 1809.07599).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class Int8(NamedTuple):
    """A leaf as integers of -127 to 127 times one scale."""

    values: jax.Array  # int8, the leaf's shape
    scale: jax.Array  # float32 []


class TopK(NamedTuple):
    """The k largest entries by magnitude of a leaf; 8 bytes each, so above half of a float32 leaf nothing is saved."""

    values: jax.Array  # float32 [k]
    indices: jax.Array  # int32 [k], into the flattened leaf


def stochastic_int8(leaf: jax.Array, key: jax.Array) -> Int8:
    """The integers next to leaf / scale, up or down at random such that the mean is the leaf's value."""
    leaf = leaf.astype(jnp.float32)
    scale = jnp.abs(leaf).max(initial=0.0) / 127
    steps = leaf / jnp.where(scale == 0, 1.0, scale)
    below = jnp.floor(steps)
    rounded = below + jax.random.bernoulli(key, steps - below)
    return Int8(jnp.clip(rounded, -127, 127).astype(jnp.int8), scale)  # the division may overshoot 127 by a rounding


def largest(leaf: jax.Array, fraction: float) -> TopK:
    """The `fraction` of largest magnitude, at least one entry."""
    flat = leaf.astype(jnp.float32).ravel()
    _, indices = jax.lax.top_k(jnp.abs(flat), min(flat.size, max(1, round(fraction * flat.size))))
    return TopK(flat[indices], indices)


PACKERS = {  # (floating-point leaf, key, fraction) -> what is sent for it
    "none": lambda leaf, key, fraction: leaf,
    "bfloat16": lambda leaf, key, fraction: leaf.astype(jnp.bfloat16),
    "int8": lambda leaf, key, fraction: stochastic_int8(leaf, key),
    "topk": lambda leaf, key, fraction: largest(leaf, fraction),
}
COMPRESSIONS = tuple(PACKERS)


def is_floating(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def init_residual(upload_shapes: dict, compression: str) -> dict:
    """What a client has not sent so far, of the arrays or shapes of its upload: zeros for topk, with None in place of
    integer leaves; {} for the others, which leave nothing behind."""
    if compression != "topk":
        return {}
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if is_floating(leaf) else None, upload_shapes)


def compress(upload: dict, residual: dict, key: jax.Array, *, compression: str, fraction: float) -> tuple[dict, dict]:
    """(What one client sends, its new residual); `fraction` is topk's share of every leaf."""

    def pack(leaf, leaf_key):
        return PACKERS[compression](leaf, leaf_key, fraction) if is_floating(leaf) else leaf

    def beside_residual(function, *trees):
        return jax.tree.map(function, residual, *trees, is_leaf=lambda node: node is None)

    if compression == "topk":
        upload = beside_residual(lambda left, leaf: leaf if left is None else left + leaf, upload)
    sent = jax.tree.map(pack, upload, optax.tree.split_key_like(key, upload))
    if compression == "topk":
        arrived = decompress(sent, upload)
        residual = beside_residual(lambda left, leaf, came: None if left is None else leaf - came, upload, arrived)
    return sent, residual


def decompress(sent: dict, like: dict) -> dict:
    """At the server: one client's upload, with the shapes and dtypes of `like`, arrays or shapes."""

    def restore(packed, like):
        if isinstance(packed, Int8):
            packed = packed.values * packed.scale
        elif isinstance(packed, TopK):
            packed = jnp.zeros(like.size).at[packed.indices].set(packed.values).reshape(like.shape)
        return packed.astype(like.dtype)

    return jax.tree.map(restore, sent, like, is_leaf=lambda node: isinstance(node, Int8 | TopK))


def tree_bytes(tree) -> int:
    """Bytes of all arrays or shapes of a tree: what is counted as crossing the wire."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
