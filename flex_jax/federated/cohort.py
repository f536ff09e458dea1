"""Which clients take part in a round."""

import jax
import numpy as np


def sample_cohort(key: jax.Array, round: int, clients: int, size: int) -> np.ndarray:
    """`size` of the `clients` clients, uniform without replacement and in order, [size] int32; by key and round."""
    if size == clients:
        return np.arange(clients, dtype=np.int32)
    drawn = jax.random.choice(jax.random.fold_in(key, round), clients, (size,), replace=False)
    return np.sort(np.asarray(drawn, np.int32))
