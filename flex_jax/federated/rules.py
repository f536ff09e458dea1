"""The two places where methods differ once roles are given: how a client trains, and how the server updates.

Both are pure functions of plain data, so that a method reads like its paper. The defaults are FedAvg's.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class Settings(NamedTuple):
    """The numbers that methods are configured with; names as in the papers that they cite."""

    proximal_mu: float = 0.01  # FedProx
    server_learning_rate: float = 1e-3  # eta of the FedOpt family
    server_tau: float = 1e-3  # adaptivity: added to the root of the second moment, which starts at its square
    server_beta1: float = 0.9
    server_beta2: float = 0.99
    weighting: str = "examples"  # "examples" | "uniform": how the server weighs clients


class Received(NamedTuple):
    """What a client has at hand when its round begins."""

    download: dict  # from the server: "shared" and what a method's server broadcasts beside it
    state: dict  # what the client kept beside its personal adapters
    learning_rate: jax.Array
    steps: int
    settings: Settings


class ClientRule(NamedTuple):
    """How a client trains.

    init: shared tree -> what the client keeps beside its personal adapters. optimizer: the optax chain of a round on
    {"shared", "personal"}, made of the given clipping and AdamW. finish: trained shared tree -> (what is sent to the
    server beside the change of the shared tree, what the client keeps).
    """

    init: Callable[[dict], dict] = lambda shared: {}
    optimizer: Callable[..., optax.GradientTransformation] = lambda received, clip, adamw: optax.chain(clip, adamw)
    finish: Callable[[Received, dict], tuple[dict, dict]] = lambda received, trained: ({}, received.state)


def weighted_mean(stacked: dict, weights: jax.Array) -> dict:
    """Mean over the leading axis C of every leaf; weights [C] sum to one."""
    return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, axes=1), stacked)


def client_weights(num_examples: jax.Array, settings: Settings) -> jax.Array:
    """The weight of each client of a cohort, [C], summing to one."""
    weights = num_examples if settings.weighting == "examples" else jnp.ones_like(num_examples)
    return weights / weights.sum()


class ServerRule(NamedTuple):
    """How the server updates.

    init: (shared tree, settings) -> what the server keeps beside it. broadcast: that -> what every client of a cohort
    downloads beside the shared tree. update: (shared, kept, uploads, weights [C], clients N, settings) -> (shared,
    kept); uploads hold "delta", the changes of the shared tree, and what clients sent beside, with a leading axis C.
    """

    init: Callable[[dict, Settings], dict] = lambda shared, settings: {}
    broadcast: Callable[[dict], dict] = lambda kept: {}
    update: Callable[..., tuple[dict, dict]] = lambda shared, kept, uploads, weights, clients, settings: (
        optax.apply_updates(shared, weighted_mean(uploads["delta"], weights)),
        kept,
    )


class Rules(NamedTuple):
    """What a method changes of FedAvg's round."""

    client: ClientRule = ClientRule()
    server: ServerRule = ServerRule()


def exchanged(rules: Rules, settings: Settings, shared: dict, kept: dict, own: dict) -> tuple[dict, dict]:
    """(upload, download) of one client in a round, as shapes; kept, own: what server and client keep."""
    download = {"shared": shared, **rules.server.broadcast(kept)}

    def beside(download, own, trained):
        received = Received(download, own, jnp.float32(1.0), 1, settings)
        return rules.client.finish(received, trained)[0]

    return {"delta": shared, **jax.eval_shape(beside, download, own, shared)}, download


FEDAVG, DEFAULTS = Rules(), Settings()


def server_optimizer(make: Callable[[Settings], optax.GradientTransformation]) -> ServerRule:
    """A rule that hands the mean change of the shared tree to an optax transformation."""

    def update(shared, kept, uploads, weights, clients, settings):
        mean = weighted_mean(uploads["delta"], weights)
        updates, kept = make(settings).update(mean, kept, shared)
        return optax.apply_updates(shared, updates), kept

    return ServerRule(init=lambda shared, settings: make(settings).init(shared), update=update)
