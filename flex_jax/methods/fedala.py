"""FedALA on LoRA (Zhang et al. 2023, arXiv 2212.01197): before it trains, a client learns for every weight how far to
go from its last model towards the one it received.

    W <- clip(W - eta grad_W f(theta^), 0, 1),   theta^ = theta + (Theta - theta) W        then theta <- train(theta^)

Theta: received; theta: the client's at the end of its last round; W starts at ones, which is FedAvg. theta and W are of
the last `personal_layers` layers and stay with the client; lower layers, and dense ones, take Theta as it is. The paper
learns W to convergence at first and for one epoch on 80% of the data in later rounds; here it is ITERATIONS steps on
the first batch of every round. Evaluated as in the paper, after aggregation and before training, but with the W that
the client learned last. Local steps are AdamW's. They, and LoRA's gradients, are small, and so is a step of W at the
paper's eta of 1.
"""

import jax
import jax.numpy as jnp
import optax

from flex_jax.federated.method import ClientRule, Loss, Method, Outcome, Received, Settings, change

ITERATIONS = 5


def last_layers(adapters: dict, settings: Settings) -> dict:
    """Leaves [P, ...] of the last P = personal_layers layers."""
    return jax.tree.map(lambda leaf: leaf[-settings.client.personal_layers :], adapters["layers"])


def build(adapters: dict, key: jax.Array, settings: Settings) -> dict:
    own = last_layers(adapters, settings)
    return {"global": adapters, "own": own, "weight": jax.tree.map(jnp.ones_like, own)}


def compose(tree: dict, received: Received) -> dict:
    """theta^, or Theta alone where there is no theta."""
    if "own" not in tree:
        return tree["global"]

    def aggregate(theta_global, theta, weight):  # [L, ...], [P, ...], [P, ...]
        last = len(theta_global) - len(theta)
        return theta_global.at[last:].set(theta + (theta_global[last:] - theta) * weight)

    layers = jax.tree.map(aggregate, tree["global"]["layers"], tree["own"], tree["weight"])
    return tree["global"] | {"layers": layers}


def begin(received: Received, loss: Loss) -> dict:
    """Training starts from theta^, with the W learned on the first batch."""
    tree, eta = received.download["shared"] | received.client.personal, received.settings.client.weight_learning_rate
    gradient = jax.grad(lambda weight: loss(tree | {"weight": weight}))

    def learn(_, weight):
        return jax.tree.map(lambda w, g: jnp.clip(w - eta * g, 0.0, 1.0), weight, gradient(weight))

    weight = jax.lax.fori_loop(0, ITERATIONS, learn, tree["weight"])
    return {"shared": {"global": compose(tree | {"weight": weight}, received)}, "personal": {"weight": weight}}


def objective(received: Received, trained: dict, loss: Loss) -> tuple[jax.Array, jax.Array]:
    value = loss(trained["shared"])
    return value, value


def optimizer(received: Received, clip, adamw) -> optax.GradientTransformation:
    """Of theta; W is learned by now."""
    parts = {"theta": optax.chain(clip, adamw), "weight": optax.set_to_zero()}
    return optax.partition(parts, {"shared": "theta", "personal": "weight"})


def finish(received: Received, trained: dict) -> Outcome:
    own = last_layers(trained["shared"]["global"], received.settings)
    personal = {"own": own, "weight": trained["personal"]["weight"]}
    return Outcome({"delta": change(received, trained)}, personal, received.client.kept)


METHOD = Method(
    placement=((r"global/.*", "shared"), (r"(own|weight)/.*", "personal")),
    client=ClientRule(begin=begin, objective=objective, optimizer=optimizer, finish=finish),
    build=build,
    compose=compose,
)
