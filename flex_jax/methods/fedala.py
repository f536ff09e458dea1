"""FedALA on LoRA (Zhang et al. 2023, arXiv 2212.01197): a client learns how much of the global model it takes over.

Before it trains, it learns for every weight how far to go from its last model towards the downloaded one:

    W <- clip(W - eta grad_W f(theta^), 0, 1),   theta^ = theta + (Theta - theta) W        then theta <- train(theta^)

Theta is the downloaded model, theta the client's at the end of its last round. W starts at ones, which is FedAvg. theta
and W cover the last `personal_layers` layers and stay with the client; lower layers, and dense ones, take over Theta.
The paper learns W to convergence at first, and for one epoch on 80% of the data in later rounds; here it is ITERATIONS
steps on the first batch of every round. Evaluation is, as in the paper, after aggregation and before training, but with
the W that the client learned last. Local steps are AdamW's. They and LoRA's gradients are small, and so is a step of W
at the paper's eta of 1.
"""

import jax
import jax.numpy as jnp
import optax

from flex_jax.checks import Count, NotNegative
from flex_jax.federated.method import ClientContext, ClientResult, ClientRule, Loss, Method, Trained, Upload, delta
from flex_jax.methods._personal_copy import OWNERSHIP, or_global

ITERATIONS = 5


@or_global
def compose(adapters: dict, client_extra: dict, replicated: dict) -> dict:
    """theta^."""

    def aggregate(theta_global, theta, weight):  # [L, ...], [P, ...], [P, ...]
        last = len(theta_global) - len(theta)
        return theta_global.at[last:].set(theta + (theta_global[last:] - theta) * weight)

    layers = jax.tree.map(aggregate, adapters["global"]["layers"], adapters["personal"], adapters["weight"])
    return adapters["global"] | {"layers": layers}


def objective(context: ClientContext, trained: Trained, loss: Loss) -> tuple[jax.Array, jax.Array]:
    value = loss(trained.shared)
    return value, value


def optimizer(context: ClientContext, clip, adamw) -> optax.GradientTransformation:
    parts = {"theta": optax.chain(clip, adamw), "weight": optax.set_to_zero()}
    return optax.partition(parts, Trained(shared="theta", personal="weight"))  # pyright: ignore[reportArgumentType]


def fedala(personal_layers: Count = 1, eta: NotNegative = 1.0) -> Method:
    """Learns an elementwise aggregation W of the last P = `personal_layers` layers, with learning rate `eta`."""

    def last_layers(adapters: dict) -> dict:
        return jax.tree.map(lambda leaf: leaf[-personal_layers:], adapters["layers"])

    def build(adapters: dict, key: jax.Array) -> dict:
        personal = last_layers(adapters)
        return {"global": adapters, "personal": personal, "weight": jax.tree.map(jnp.ones_like, personal)}

    def init_trained(context: ClientContext, loss: Loss) -> Trained:
        """Training starts from theta^, with the W learned on the first batch."""
        tree = context.download.shared | context.state.personal
        gradient = jax.grad(lambda weight: loss(tree | {"weight": weight}))

        def learn(_, weight):
            return jax.tree.map(lambda w, g: jnp.clip(w - eta * g, 0.0, 1.0), weight, gradient(weight))

        weight = jax.lax.fori_loop(0, ITERATIONS, learn, tree["weight"])
        start = compose(tree | {"weight": weight}, context.state.extra, context.replicated)
        return Trained(shared={"global": start}, personal={"weight": weight})

    def make_result(context: ClientContext, trained: Trained) -> ClientResult:
        personal = {"personal": last_layers(trained.shared["global"]), "weight": trained.personal["weight"]}
        return ClientResult(Upload(delta(context, trained)), personal, context.state.extra)

    client = ClientRule(init_trained=init_trained, objective=objective, optimizer=optimizer, make_result=make_result)
    return Method(ownership=OWNERSHIP, client=client, build=build, compose=compose)
