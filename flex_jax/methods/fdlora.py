"""FDLoRA (Qi et al. 2024, arXiv 2406.07925): a shared adapter, whose mean change drives an outer optimiser, and a
client's own one, a copy of its training now and then; a client's model is their fusion.

Stage 1 is the first round: every client trains from a common start, and the server takes the mean. In stage 2 the inner
steps are AdamW's on the received adapter, the outer ones of SGD with Nesterov momentum (server.learning_rate,
server.beta1) on the mean change. The own adapter is a copy of what the client has trained, made at the end of its first
round and then of every settings.client.sync_every-th; a client counts the rounds that it takes part in.

Stage 3, AdaFusion, is A = w1 A_own + w2 A_global, and B alike, with the weights of least loss + 0.05 mean |w|, found
without gradients on few examples. The paper searches them once, at the end; here it is a grid on the first batch of
every round but a client's first: nine more forward passes. They fit the two adapters that the client had as its round
began, so the weights used in evaluation are one round old.
"""

import itertools

import jax
import jax.numpy as jnp
import optax
from optax.transforms import conditionally_transform, selective_transform

from flex_jax.federated.method import ClientRule, Loss, Method, Outcome, Received, Settings, change
from flex_jax.federated.server import server_optimizer

CANDIDATES = tuple(itertools.product((0.0, 0.5, 1.0), repeat=2))  # weights of own and global: 9 pairs
PENALTY = 0.05  # on the mean absolute weight


def fuse(weights: jax.Array, own: dict, common: dict) -> dict:
    """weights [2]."""
    return jax.tree.map(lambda *leaves: weights[0] * leaves[0] + weights[1] * leaves[1], own, common)


def compose(tree: dict, received: Received) -> dict:
    if "own" not in tree:
        return tree["global"]
    return fuse(received.client.kept["fusion"], tree["own"], tree["global"])


def init(shared: dict, settings: Settings, client) -> dict:
    return {"rounds": jnp.int32(0), "fusion": jnp.array([0.0, 1.0])}


def begin(received: Received, loss: Loss) -> dict:
    """The received adapter, which is trained, and the weights of the fusion, which are not."""
    shared, kept = received.download["shared"], received.client.kept

    def objective(weights):
        fused = fuse(weights, received.client.personal["own"], shared["global"])
        return loss({"global": fused}) + PENALTY * jnp.abs(weights).mean()

    candidates = jnp.array(CANDIDATES)
    best = candidates[jnp.argmin(jax.lax.map(objective, candidates))]
    fusion = jnp.where(kept["rounds"] == 0, kept["fusion"], best)  # there is no own adapter before the first round
    return {"shared": shared, "personal": {"fusion": fusion}}


def optimizer(received: Received, clip, adamw):
    return selective_transform(optax.chain(clip, adamw), freeze_mask={"shared": False, "personal": True})


def finish(received: Received, trained: dict) -> Outcome:
    own, rounds = received.client.personal["own"], received.client.kept["rounds"]
    copied = rounds % received.settings.client.sync_every == 0
    own = jax.tree.map(lambda new, old: jnp.where(copied, new, old), trained["shared"]["global"], own)
    kept = {"rounds": rounds + 1, "fusion": trained["personal"]["fusion"]}
    return Outcome({"delta": change(received, trained)}, {"own": own}, kept)


def outer(settings: Settings) -> optax.GradientTransformation:
    """Nesterov momentum on the mean change; that of the first round, stage 1, is taken as it is."""
    numbers = settings.server
    nesterov = optax.chain(optax.trace(numbers.beta1, nesterov=True), optax.scale(numbers.learning_rate))
    return conditionally_transform(nesterov, lambda rounds: rounds > 0)


METHOD = Method(
    placement=((r"global/.*", "shared"), (r"own/.*", "personal")),
    client=ClientRule(init=init, begin=begin, optimizer=optimizer, finish=finish),
    server=server_optimizer(outer),
    build=lambda adapters, key, settings: {"global": adapters, "own": adapters},
    compose=compose,
)
