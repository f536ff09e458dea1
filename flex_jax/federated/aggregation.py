"""How a server combines the stacked uploads of a cohort into one tree: the mean, and rules that resist bad clients.

Up to `byzantine` clients of a cohort may send anything, NaN and infinity included, and the combined tree of the median
(where they are fewer than half), the trimmed mean, Krum and multi-Krum stays finite. The geometric median resists
noise of a finite squared norm only, unless uploads are clipped first.
"""

import jax
import jax.numpy as jnp
import optax

SMOOTHING = 1e-6  # of a distance in Weiszfeld's iteration: the least that it divides by; nu in Pillutla et al.
ITERATIONS = 8  # of Weiszfeld: each shrinks noise on the mean, where it starts, by about bad / good clients


def weighted_mean(stacked: dict, weights: jax.Array) -> dict:
    """Mean over the leading axis C of every leaf; weights [C] sum to one."""
    return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, axes=1), stacked)


def clip(stacked: dict, clip_norm: float) -> dict:
    """Each client's whole tree scaled down to a global norm of `clip_norm` (Sun et al. 2019, arXiv 1911.07963)."""

    def clip_client(tree):
        norm = optax.tree.norm(tree)
        scale = clip_norm / jnp.maximum(norm, clip_norm)
        # No factor makes NaN or infinity small: such a client counts as one that changed nothing.
        return jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(norm), scale * leaf, 0.0), tree)

    return jax.vmap(clip_client)(stacked)


def median(stacked: dict) -> dict:
    """Of each coordinate over the C clients (Yin et al. 2018, arXiv 1803.01498); weights play no part."""

    def middle(leaf):  # jnp.median hands a NaN on; as infinity it stays at one end
        return jnp.median(jnp.where(jnp.isnan(leaf), jnp.inf, leaf), axis=0)

    return jax.tree.map(middle, stacked)


def trimmed_mean(stacked: dict, byzantine: int) -> dict:
    """Of each coordinate, without its `byzantine` largest and smallest (Yin et al. 2018); weights play no part."""

    def trim(leaf):  # jnp.sort puts NaN last, so that it is trimmed as one of the largest
        return jnp.sort(leaf, axis=0)[byzantine : leaf.shape[0] - byzantine].mean(axis=0)

    return jax.tree.map(trim, stacked)


def squared_distances(stacked: dict, point: dict) -> jax.Array:
    """Of each client's whole tree from `point`, a tree without the axis C: [C]."""
    return jax.vmap(lambda tree: optax.tree.norm(optax.tree.sub(tree, point), squared=True))(stacked)


def geometric_median(stacked: dict, weights: jax.Array) -> dict:
    """The point of least weighted distance from the clients' trees, by smoothed Weiszfeld from the mean.

    Pillutla et al. 2019, arXiv 1912.13445. weights [C] sum to one.
    """

    def step(_, point):
        pull = weights / jnp.maximum(jnp.sqrt(squared_distances(stacked, point)), SMOOTHING)
        return weighted_mean(stacked, pull / pull.sum())

    return jax.lax.fori_loop(0, ITERATIONS, step, weighted_mean(stacked, weights))


def krum(stacked: dict, byzantine: int, count: int) -> dict:
    """The plain mean of the `count` best clients (Blanchard et al. 2017, arXiv 1703.02757); weights play no part.

    A client's score, lower is better: the sum of its squared distances from its C - byzantine - 2 nearest others.
    """
    # One client at a time needs no [C, C, P]; |a|^2 + |b|^2 - 2ab, which needs none either, cancels where a is near b.
    distances = jax.lax.map(lambda point: squared_distances(stacked, point), stacked)
    cohort = distances.shape[0]
    # Oneself is no neighbour. A distance from NaN or infinity is one of them, and both sorts below put NaN last, after
    # infinity: such a client is nobody's neighbour, and comes out last.
    distances = jnp.where(jnp.eye(cohort, dtype=bool), jnp.inf, distances)
    scores = jnp.sort(distances, axis=1)[:, : cohort - byzantine - 2].sum(axis=1)
    best = jnp.argsort(scores)[:count]  # picked by row, as a weight of zero would keep a NaN
    return jax.tree.map(lambda leaf: leaf[best].mean(axis=0), stacked)


RULES = {  # name -> (stacked, weights [C], byzantine) -> combined
    "mean": lambda stacked, weights, byzantine: weighted_mean(stacked, weights),
    "median": lambda stacked, weights, byzantine: median(stacked),
    "trimmed_mean": lambda stacked, weights, byzantine: trimmed_mean(stacked, byzantine),
    "geometric_median": lambda stacked, weights, byzantine: geometric_median(stacked, weights),
    "krum": lambda stacked, weights, byzantine: krum(stacked, byzantine, 1),
    "multi_krum": lambda stacked, weights, byzantine: krum(stacked, byzantine, weights.shape[0] - byzantine),
}
AGGREGATIONS = tuple(RULES)


def combine(stacked: dict, weights: jax.Array, *, aggregation: str, byzantine: int, clip_norm: float) -> dict:
    """One tree from stacked uploads with a leading axis C; weights [C] sum to one.

    aggregation: one of AGGREGATIONS; all but "mean" and "geometric_median" ignore the weights. byzantine: how many bad
    clients the trimmed mean and (multi-)Krum allow for; see `check_cohort`. clip_norm: see `clip`; 0 for none.
    """
    if not jax.tree.leaves(stacked):  # of a method that shares nothing
        return stacked
    if clip_norm > 0:
        stacked = clip(stacked, clip_norm)
    return RULES[aggregation](stacked, weights, byzantine)


def check_cohort(aggregation: str, byzantine: int, cohort: int) -> str | None:
    """What is wrong when a cohort is too small for its aggregation; None when nothing is."""
    spare = {"trimmed_mean": 1, "krum": 3, "multi_krum": 3}.get(aggregation)
    least = 0 if spare is None else 2 * byzantine + spare
    if cohort < least:
        return f"{aggregation} with {byzantine} byzantine clients needs a cohort of at least {least}"
    return None
