"""FedDPA-T (Yang et al. 2024, arXiv 2403.19211): a shared adapter and a personal one.

In each round a client first trains its personal adapter in the mix of both, with the shared one fixed. Then it trains
the shared one alone and sends it. As in the released code, outputs are mixed half and half, the personal adapter starts
from a fresh A, and the first round trains the shared one only. There both phases take several epochs; here
`personal_steps` is the first phase's fraction of a round's steps. The released server weights clients equally:
`server.weighting="uniform"`.

Two departures. The paper weights the personal adapter by each answer's similarity to the client's training examples;
here the mix is half and half in evaluation too. And a step computes the losses of both phases and uses one gradient.
"""

import jax
import jax.numpy as jnp

from flex_jax.checks import Fraction
from flex_jax.federated.method import ClientContext, ClientRule, Loss, Method, Trained
from flex_jax.federated.ownership import merge
from flex_jax.methods._personal_copy import OWNERSHIP, or_global
from flex_jax.methods._phases import count_personal_steps, personal_first
from flex_jax.models.lora import fresh_pairs, map_pairs

PERSONAL_WEIGHT = 0.5  # of the personal adapter's output in the mix


def mix(shared: dict, personal: dict) -> dict:
    """One pair that outputs the mix of two: x [A_g A_k] [w_g B_g; w_k B_k] = w_g x A_g B_g + w_k x A_k B_k."""
    weighted = (1 - PERSONAL_WEIGHT) * shared["lora_b"], PERSONAL_WEIGHT * personal["lora_b"]
    return {
        "lora_a": jnp.concatenate([shared["lora_a"], personal["lora_a"]], axis=-1),
        "lora_b": jnp.concatenate(weighted, axis=-2),
    }


def build(adapters: dict, key: jax.Array) -> dict:
    return {"global": adapters, "personal": fresh_pairs(key, adapters)}


@or_global
def compose(adapters: dict, client_extra: dict, replicated: dict) -> dict:
    return map_pairs(mix, adapters["global"], adapters["personal"])


def objective(context: ClientContext, trained: Trained, loss: Loss) -> tuple[jax.Array, jax.Array]:
    """The personal adapter gets a gradient from the mix only, the shared one from its own loss only."""
    mixed = loss(merge(jax.lax.stop_gradient(trained.shared), trained.personal))
    return mixed + loss(trained.shared), mixed


def feddpa(personal_steps: Fraction = 0.5) -> Method:
    """Trains the personal adapter in the mix for a fraction `personal_steps` of a round, then the shared one."""

    def optimizer(context: ClientContext, clip, adamw):
        steps = count_personal_steps(personal_steps, context.num_steps)
        return personal_first(jnp.where(context.round == 0, 0, steps), clip, adamw)

    return Method(
        ownership=OWNERSHIP, client=ClientRule(objective=objective, optimizer=optimizer), build=build, compose=compose
    )
