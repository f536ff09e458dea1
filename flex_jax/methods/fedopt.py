"""Server optimisers on FedAvg's mean change (Reddi et al. 2021, arXiv 2003.00295, algorithm 2): FedAdagrad, FedAdam,
FedYogi, and the momentum of FedAvgM (Hsu et al. 2019, arXiv 1909.06335).

    m <- beta1 m + (1 - beta1) delta        v as below, from tau^2        w <- w + eta m / (sqrt(v) + tau)

No bias correction, as published. The paper leaves the first m open: it is the first delta, and FedAdagrad has no
momentum, both as in the released code of FLEx. That code weighs clients alike here, as `server.weighting="uniform"`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from flex_jax.federated.method import Method, Settings
from flex_jax.federated.server import server_optimizer


def momentum(settings: Settings) -> optax.GradientTransformation:
    """m <- beta1 m + (1 - beta1) delta, from m = delta in the first round; the update is m."""

    def init(shared):
        return {"m": jax.tree.map(jnp.zeros_like, shared), "rounds": jnp.int32(0)}

    def update(delta, state, shared=None):
        beta = jnp.where(state["rounds"] == 0, 0.0, settings.server.beta1)
        m = jax.tree.map(lambda m, d: beta * m + (1 - beta) * d, state["m"], delta)
        return m, {"m": m, "rounds": state["rounds"] + 1}

    return optax.GradientTransformation(init, update)


def adaptive(second_moment: Callable) -> Callable[[Settings], optax.GradientTransformation]:
    """eta m / (sqrt(v) + tau) of the m it is given; second_moment: (v, m^2, beta2) -> v."""

    def make(settings):
        def init(shared):
            return jax.tree.map(lambda leaf: jnp.full_like(leaf, settings.server.tau**2), shared)

        def update(m, v, shared=None):
            v = jax.tree.map(lambda v, m: second_moment(v, jnp.square(m), settings.server.beta2), v, m)
            step = jax.tree.map(
                lambda m, v: settings.server.learning_rate * m / (jnp.sqrt(v) + settings.server.tau), m, v
            )
            return step, v

        return optax.GradientTransformation(init, update)

    return make


def method(*parts: Callable[[Settings], optax.GradientTransformation]) -> Method:
    server = server_optimizer(lambda settings: optax.chain(*(part(settings) for part in parts)))
    return Method(placement=((r".*", "shared"),), server=server)


FEDAVGM = method(momentum)
FEDADAGRAD = method(adaptive(lambda v, square, beta: v + square))
FEDADAM = method(momentum, adaptive(lambda v, square, beta: beta * v + (1 - beta) * square))
FEDYOGI = method(momentum, adaptive(lambda v, square, beta: v - (1 - beta) * square * jnp.sign(v - square)))
