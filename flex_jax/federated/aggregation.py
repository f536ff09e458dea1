"""Aggregation: the stacked uploads of a cohort become one tree, by the mean or by a rule that resists bad clients.

A client that is not `present` [C] is left out of the round; its upload is zeros. Of the others up to `byzantine` may
send anything finite. The median (if they are fewer than half), the trimmed mean, Krum and multi-Krum resist them. The
geometric median resists only noise with a finite squared norm, unless uploads are clipped first.
"""

import jax
import jax.numpy as jnp
import optax

SMOOTHING = 1e-6  # smallest distance that Weiszfeld's iteration divides by; nu in Pillutla et al.
ITERATIONS = 8  # of Weiszfeld. Each divides the noise on the mean, its start, by about good / bad clients


def weighted_mean(stacked: dict, weights: jax.Array) -> dict:
    """Returns the mean over the leading axis C of every leaf. `weights` [C] sum to one."""
    return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, axes=1), stacked)


def clip(stacked: dict, clip_norm: float) -> dict:
    """Scales each client's whole tree down to a global norm of `clip_norm` (Sun et al. 2019, arXiv 1911.07963)."""

    def clip_client(tree):
        norm = optax.tree.norm(tree)
        scale = clip_norm / jnp.maximum(norm, clip_norm)
        # No factor makes NaN or infinity small, so such a client counts as one that changed nothing.
        return jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(norm), scale * leaf, 0.0), tree)

    return jax.vmap(clip_client)(stacked)


def replace_absent(leaf: jax.Array, present: jax.Array, value: float) -> jax.Array:
    return jnp.where(present.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, value)


def median(stacked: dict, present: jax.Array) -> dict:
    """Returns the median of each coordinate over the C clients (Yin et al. 2018, arXiv 1803.01498), unweighted."""
    return jax.tree.map(lambda leaf: jnp.nanmedian(replace_absent(leaf, present, jnp.nan), axis=0), stacked)


def mean_of_range(leaf: jax.Array, first, end) -> jax.Array:
    """Returns the mean of the rows from `first` to `end`, which need not be static."""
    rows = jnp.arange(len(leaf))
    return replace_absent(leaf, (rows >= first) & (rows < end), 0).sum(axis=0) / (end - first)


def trimmed_mean(stacked: dict, byzantine: int, present: jax.Array) -> dict:
    """Returns each coordinate's mean without its `byzantine` largest and smallest (Yin et al. 2018), unweighted."""

    def trim(leaf):
        ordered = jnp.sort(replace_absent(leaf, present, jnp.inf), axis=0)
        return mean_of_range(ordered, byzantine, present.sum() - byzantine)

    return jax.tree.map(trim, stacked)


def squared_distances(stacked: dict, point: dict) -> jax.Array:
    """Returns the squared distance [C] of each client's whole tree from `point`, a tree without the axis C."""
    return jax.vmap(lambda tree: optax.tree.norm(optax.tree.sub(tree, point), squared=True))(stacked)


def geometric_median(stacked: dict, weights: jax.Array) -> dict:
    """Returns the point with the least weighted distance from the clients' trees (Pillutla et al., arXiv 1912.13445).

    Weiszfeld's smoothed iteration, started at the mean. `weights` [C] sum to one.
    """

    def step(_, point):
        pull = weights / jnp.maximum(jnp.sqrt(squared_distances(stacked, point)), SMOOTHING)
        return weighted_mean(stacked, pull / pull.sum())

    return jax.lax.fori_loop(0, ITERATIONS, step, weighted_mean(stacked, weights))


def krum(stacked: dict, byzantine: int, count, present: jax.Array) -> dict:
    """Returns the plain mean of the `count` best clients (Blanchard et al. 2017, arXiv 1703.02757), unweighted.

    A client's score, lower is better, is the sum of its squared distances from its C - byzantine - 2 nearest others.
    """
    # One client at a time, so that no array [C, C, P] exists. |a|^2 + |b|^2 - 2ab would cancel if a is near b.
    distances = jax.lax.map(lambda point: squared_distances(stacked, point), stacked)
    cohort = distances.shape[0]
    # A client is not its own neighbour, and one that is not present is nobody's.
    distances = jnp.where(jnp.eye(cohort, dtype=bool) | ~present, jnp.inf, distances)
    neighbours = jnp.arange(cohort) < present.sum() - byzantine - 2
    scores = jnp.where(neighbours, jnp.sort(distances, axis=1), 0).sum(axis=1)
    best = jnp.argsort(jnp.where(present, scores, jnp.inf))
    return jax.tree.map(lambda leaf: mean_of_range(leaf[best], 0, count), stacked)


RULES = {  # name -> (stacked, weights [C], byzantine, present [C]) -> combined
    "mean": lambda stacked, weights, byzantine, present: weighted_mean(stacked, weights),
    "median": lambda stacked, weights, byzantine, present: median(stacked, present),
    "trimmed_mean": lambda stacked, weights, byzantine, present: trimmed_mean(stacked, byzantine, present),
    "geometric_median": lambda stacked, weights, byzantine, present: geometric_median(stacked, weights),
    "krum": lambda stacked, weights, byzantine, present: krum(stacked, byzantine, 1, present),
    "multi_krum": lambda stacked, weights, byzantine, present: krum(
        stacked, byzantine, present.sum() - byzantine, present
    ),
}


def check_cohort(aggregation: str, byzantine: int, cohort: int) -> str | None:
    """Returns what is wrong if a cohort is too small for its aggregation, else None."""
    extra = {"trimmed_mean": 1, "krum": 3, "multi_krum": 3}.get(aggregation)
    if extra is not None and cohort < 2 * byzantine + extra:
        return f"{aggregation} with {byzantine} byzantine clients needs a cohort of at least {2 * byzantine + extra}"
    return None
