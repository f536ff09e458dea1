"""Server optimisers on FedAvg's mean change: FedAvgM, FedAdagrad, FedAdam, FedYogi.

Reddi et al. 2021 (arXiv 2003.00295, algorithm 2), and the momentum of FedAvgM (Hsu et al. 2019, arXiv 1909.06335):

    m <- beta1 m + (1 - beta1) delta        v as below, from tau^2        w <- w + eta m / (sqrt(v) + tau)

There is no bias correction, as published. The paper leaves the first m open: here it is the first delta, and FedAdagrad
has no momentum, both as in the released code of FLEx. That code weights clients equally in the adaptive methods, which
is `server.weighting="uniform"` here.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from flex_jax.checks import Positive, Probability
from flex_jax.federated.method import Method
from flex_jax.federated.server import server_optimizer


def momentum(beta1: float) -> optax.GradientTransformation:
    """m <- beta1 m + (1 - beta1) delta, with m = delta in the first round; the update is m."""

    def init(params):
        return {"m": jax.tree.map(jnp.zeros_like, params), "rounds": jnp.int32(0)}

    def update(updates, state, params=None):
        beta = jnp.where(state["rounds"] == 0, 0.0, beta1)
        m = jax.tree.map(lambda m, d: beta * m + (1 - beta) * d, state["m"], updates)
        return m, {"m": m, "rounds": state["rounds"] + 1}

    return optax.GradientTransformation(init, update)


def adaptive(eta: float, tau: float, second_moment: Callable) -> optax.GradientTransformation:
    """eta m / (sqrt(v) + tau) for an incoming m; second_moment: (v, m^2) -> v."""

    def init(params):
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, tau**2), params)

    def update(updates, state, params=None):
        v = jax.tree.map(lambda v, m: second_moment(v, jnp.square(m)), state, updates)
        return jax.tree.map(lambda m, v: eta * m / (jnp.sqrt(v) + tau), updates, v), v

    return optax.GradientTransformation(init, update)


def _method(*parts: optax.GradientTransformation) -> Method:
    return Method(ownership=((r".*", "shared"),), server=server_optimizer(optax.chain(*parts)))


def fedavgm(beta1: Probability = 0.9) -> Method:
    """FedAvg with momentum `beta1` at the server."""
    return _method(momentum(beta1))


def fedadagrad(eta: Positive = 1e-3, tau: Positive = 1e-3) -> Method:
    """v <- v + m^2."""
    return _method(adaptive(eta, tau, lambda v, square: v + square))


def fedadam(eta: Positive = 1e-3, tau: Positive = 1e-3, beta1: Probability = 0.9, beta2: Probability = 0.99) -> Method:
    """v <- beta2 v + (1 - beta2) m^2."""
    return _method(momentum(beta1), adaptive(eta, tau, lambda v, square: beta2 * v + (1 - beta2) * square))


def fedyogi(eta: Positive = 1e-3, tau: Positive = 1e-3, beta1: Probability = 0.9, beta2: Probability = 0.99) -> Method:
    """v <- v - (1 - beta2) m^2 sign(v - m^2)."""

    def second_moment(v, square):
        return v - (1 - beta2) * square * jnp.sign(v - square)

    return _method(momentum(beta1), adaptive(eta, tau, second_moment))
