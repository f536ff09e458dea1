"""FedDPA-T (Yang et al. 2024, arXiv 2403.19211): a shared adapter beside a client's own one. In each round a client
first trains its own in the mix of both, with the shared one held, and then the shared one alone, which it sends.

As in the released code, outputs are mixed half and half, the own adapter starts from a fresh A, and the first round
trains the shared one only; there both phases are of several epochs, here settings.client.personal_steps is the share
of a round's steps of the first one. Also there the server weighs clients alike: `server.weighting="uniform"`.

Two departures. The weight of each answer by its likeness to the client's training examples is left out: the mix is
half and half in evaluation too. And a step computes the losses of both phases, of which it uses one gradient.
"""

import jax
import jax.numpy as jnp

from flex_jax.federated.method import ClientRule, Loss, Method, Received, Settings
from flex_jax.federated.placement import merge
from flex_jax.methods.phases import personal_first, personal_steps
from flex_jax.models.lora import fresh_pairs, map_pairs

OWN_WEIGHT = 0.5  # of the own adapter's output in the mix


def mix(held: dict, own: dict) -> dict:
    """One pair whose output is the mix of two: x [A_g A_k] [w_g B_g; w_k B_k] = w_g x A_g B_g + w_k x A_k B_k."""
    return {
        "lora_a": jnp.concatenate([held["lora_a"], own["lora_a"]], axis=-1),
        "lora_b": jnp.concatenate([(1 - OWN_WEIGHT) * held["lora_b"], OWN_WEIGHT * own["lora_b"]], axis=-2),
    }


def build(adapters: dict, key: jax.Array, settings: Settings) -> dict:
    return {"global": adapters, "own": fresh_pairs(key, adapters)}


def compose(tree: dict, received: Received) -> dict:
    if "own" not in tree:
        return tree["global"]
    return map_pairs(mix, tree["global"], tree["own"])


def objective(received: Received, trained: dict, loss: Loss) -> tuple[jax.Array, jax.Array]:
    """The own adapter has a gradient from the mix only, the shared one from its loss alone only: phases pick."""
    mixed = loss(merge(jax.lax.stop_gradient(trained["shared"]), trained["personal"]))
    return mixed + loss(trained["shared"]), mixed


def optimizer(received: Received, clip, adamw):
    first = jnp.where(received.round == 0, 0, personal_steps(received))
    return personal_first(first, clip, adamw)


METHOD = Method(
    placement=((r"global/.*", "shared"), (r"own/.*", "personal")),
    client=ClientRule(objective=objective, optimizer=optimizer),
    build=build,
    compose=compose,
)
