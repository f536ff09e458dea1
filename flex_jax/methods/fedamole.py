"""FedAMoLE-style (Zhang et al. 2024, arXiv 2411.19128), without its data-driven assignment of experts.

Beside every adapted projection stand one LoRA expert that all clients hold and a few of which each holds some, behind a
router of tokens (`lora_experts_delta`). The server averages the router and the common expert over all clients and each
other expert over its holders.

In the paper experts choose clients anew every round, in each projection, by an integer program over the likeness of
their mean embeddings. Here client i always holds the experts i, i + 1, ... of config.client.lora_experts, counted
round, in every projection: each expert has as many holders as any other where there are as many experts as clients, or
one for several. Other departures: no loss that balances the experts' load (0.001 in the paper); one dropout mask for
all routed experts; AdamW; the server weighs by examples, config.server.weighting="uniform" being the paper's; and a
client's model is what it receives, where the released code tests what local training has made of it.
"""

import jax
import jax.numpy as jnp

from flex_jax.errors import InputError
from flex_jax.federated.method import Method, Settings
from flex_jax.methods.holders import partial_rules
from flex_jax.models.lora import init_lora, is_pair


def build(adapters: dict, key: jax.Array, settings: Settings) -> dict:
    """Adds experts_a [L, n, D, R], experts_b [L, n, R, F] and router [L, D, R] to the LoRA of each projection."""
    pairs, tree = jax.tree.flatten(adapters, is_leaf=is_pair)
    experts = settings.client.lora_experts

    def add(pair, key):
        (layers, inputs, rank), outputs = pair["lora_a"].shape, pair["lora_b"].shape[-1]
        expert_key, router_key = jax.random.split(key)
        mixture = init_lora(expert_key, rank, (layers, experts), inputs, outputs)
        router = init_lora(router_key, rank, (layers,), inputs, outputs)["lora_a"]  # starts alike: uniform
        return pair | {"experts_a": mixture["lora_a"], "experts_b": mixture["lora_b"], "router": router}

    return jax.tree.unflatten(tree, map(add, pairs, jax.random.split(key, len(pairs))))


def init(shared: dict, settings: Settings, client) -> dict:
    experts, held = settings.client.lora_experts, settings.client.held_experts
    if held > experts:
        raise InputError(f"config.client.held_experts is {held}: must be at most config.client.lora_experts, {experts}")
    return {"held": (client + jnp.arange(held, dtype=jnp.int32)) % experts}


client, server = partial_rules("fedamole", r".*/experts_[ab]", lambda received: received.client.kept["held"])
METHOD = Method(
    placement=((r".*", "shared"),), client=client._replace(init=init), server=server, build=build, common=False
)
