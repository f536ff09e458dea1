"""FDLoRA (Qi et al. 2024, arXiv 2406.07925): a shared adapter, and a personal one that is copied from it now and then.

The mean change of the shared adapter drives an outer optimiser; a client's model is the fusion of both adapters.

Stage 1 is the first round: every client trains from a common start, and the server takes the mean. In stage 2 the inner
steps are AdamW's on the downloaded adapter, the outer ones SGD with Nesterov momentum on the mean change. A client
copies what it has trained to its personal adapter after its first round, and every `sync_every` rounds from then on; it
counts the rounds that it takes part in.

Stage 3, AdaFusion, is A = w1 A_personal + w2 A_global, and B likewise. The weights are those with the least
loss + 0.05 mean |w|, found without gradients on few examples. The paper searches them once, at the end. Here it is a
grid on the first batch of every round except a client's first: nine more forward passes. The weights fit the two
adapters that the client had when its round began, so those used in evaluation are one round old.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.transforms import conditionally_transform, selective_transform

from flex_jax.checks import Count, Positive, Probability
from flex_jax.federated.method import ClientContext, ClientResult, ClientRule, Loss, Method, Trained, Upload, delta
from flex_jax.federated.server import server_optimizer
from flex_jax.methods._personal_copy import OWNERSHIP, copy_adapters, or_global

CANDIDATES = tuple(itertools.product((0.0, 0.5, 1.0), repeat=2))  # weights of personal and global: 9 pairs
PENALTY = 0.05  # on the mean absolute weight


def fuse(weights: jax.Array, personal: dict, shared: dict) -> dict:
    return jax.tree.map(lambda p, g: weights[0] * p + weights[1] * g, personal, shared)


@or_global
def compose(adapters: dict, client_extra: dict, replicated: dict) -> dict:
    return fuse(client_extra["fusion"], adapters["personal"], adapters["global"])


def init_extra(shared: dict, client_id) -> dict:
    return {"rounds": jnp.int32(0), "fusion": jnp.array([0.0, 1.0])}


def init_trained(context: ClientContext, loss: Loss) -> Trained:
    """The downloaded adapter, which is trained, and the weights of the fusion, which are not."""
    shared, extra = context.download.shared, context.state.extra

    def objective(weights):
        fused = fuse(weights, context.state.personal["personal"], shared["global"])
        return loss({"global": fused}) + PENALTY * jnp.abs(weights).mean()

    candidates = jnp.array(CANDIDATES)
    best = candidates[jnp.argmin(jax.lax.map(objective, candidates))]
    fusion = jnp.where(extra["rounds"] == 0, extra["fusion"], best)  # before its first round a client has no copy
    return Trained(shared=shared, personal={"fusion": fusion})


def optimizer(context: ClientContext, clip, adamw) -> optax.GradientTransformation:
    not_trained = Trained(shared=False, personal=True)  # pyright: ignore[reportArgumentType]
    return selective_transform(optax.chain(clip, adamw), freeze_mask=not_trained)


def outer_optimizer(eta: float, beta1: float) -> optax.GradientTransformation:
    """Nesterov momentum on the mean change. The change of the first round, stage 1, is applied as it is."""
    nesterov = optax.chain(optax.trace(beta1, nesterov=True), optax.scale(eta))

    def after_first_round(step: Any, **extra: Any) -> Any:
        return step > 0

    return conditionally_transform(nesterov, after_first_round)


def fdlora(eta: Positive = 1e-3, beta1: Probability = 0.9, sync_every: Count = 10) -> Method:
    """Fuses a shared and a personal adapter. `eta` and `beta1` are the outer optimiser's rate and momentum."""

    def make_result(context: ClientContext, trained: Trained) -> ClientResult:
        rounds = context.state.extra["rounds"]
        copies = rounds % sync_every == 0
        old = context.state.personal["personal"]
        personal = jax.tree.map(lambda new, old: jnp.where(copies, new, old), trained.shared["global"], old)
        extra = {"rounds": rounds + 1, "fusion": trained.personal["fusion"]}
        return ClientResult(Upload(delta(context, trained)), {"personal": personal}, extra)

    client = ClientRule(init_extra=init_extra, init_trained=init_trained, optimizer=optimizer, make_result=make_result)
    return Method(
        ownership=OWNERSHIP,
        client=client,
        server=server_optimizer(outer_optimizer(eta, beta1)),
        build=copy_adapters,
        compose=compose,
    )
