"""FedAMoLE-style (Zhang et al. 2024, arXiv 2411.19128), without its data-driven assignment of experts.

Each adapted projection has one LoRA expert that all clients train, and a few behind a router of tokens, of which each
client trains some. The server averages the router and the common expert over all clients, and each other expert over
the clients that have it.

In the paper experts choose clients anew in every round and projection, by an integer program on the similarity of their
mean embeddings. Here client i always has the experts i, i + 1, ... modulo `num_experts`, in every projection. So each
expert has equally many clients if there are as many experts as clients, or one for several. Other departures: no loss
that balances the load of the experts (0.001 in the paper); one dropout mask for all routed experts; AdamW; the server
weights by examples (the paper's is config.server.weighting="uniform"); and a client's model is what it downloads, while
the released code tests what local training has made of it.
"""

import jax
import jax.numpy as jnp

from flex_jax.checks import Count
from flex_jax.errors import InputError
from flex_jax.federated.method import Method
from flex_jax.methods._expert_subsets import check_mean, expert_subset_rules
from flex_jax.models.adapters import ProjectionAdapter, apply_lora
from flex_jax.models.config import LoraConfig
from flex_jax.models.lora import Dropout, Leaves, init_lora, is_pair


def apply_experts(leaves: Leaves, lora: LoraConfig, x: jax.Array, y: jax.Array, dropout: Dropout) -> jax.Array:
    """A LoRA, and the sum of g_e alpha / rank * dropout(x) A_e B_e over a token's two best LoRA experts e.

    A = `experts_a` [n, D, R], B = `experts_b` [n, R, F]. A token is compared with the experts' own A: the logits are
    (x P) . (x A_e) / sqrt(R) with P = `router` [D, R]. g is the softmax over the best two.
    """
    y = apply_lora(leaves, lora, x, y, dropout)
    a, b, router = (leaves[name].astype(x.dtype) for name in ("experts_a", "experts_b", "router"))
    num_experts, _, rank = a.shape

    def embed(x):
        return jnp.einsum("...d,ndr->...nr", x, a)

    logits = jnp.einsum("...r,...nr->...n", x @ router, embed(x)).astype(jnp.float32) * rank**-0.5
    best, index = jax.lax.top_k(logits, min(2, num_experts))
    gates = jnp.einsum("...k,...kn->...n", jax.nn.softmax(best), jax.nn.one_hot(index, num_experts)).astype(x.dtype)
    hidden = gates[..., None] * embed(dropout(x))
    return y + jnp.einsum("...nr,nrf->...f", hidden, b) * lora.scale


def fedamole(num_experts: Count = 4, client_experts: Count = 2) -> Method:
    """Trains n = `num_experts` routed LoRA experts of each projection, of which a client has `client_experts`."""
    if client_experts > num_experts:
        raise InputError(f"client_experts is {client_experts}: must be at most num_experts, {num_experts}")

    def build(adapters: dict, key: jax.Array) -> dict:
        """Adds experts_a [L, n, D, R], experts_b [L, n, R, F] and router [L, D, R] to the LoRA of each projection."""
        pairs, tree = jax.tree.flatten(adapters, is_leaf=is_pair)

        def add(pair, key):
            (layers, inputs, rank), outputs = pair["lora_a"].shape, pair["lora_b"].shape[-1]
            expert_key, router_key = jax.random.split(key)
            experts = init_lora(expert_key, rank, (layers, num_experts), inputs, outputs)
            router = init_lora(router_key, rank, (layers,), inputs, outputs)["lora_a"]  # drawn as an A: uniform
            return pair | {"experts_a": experts["lora_a"], "experts_b": experts["lora_b"], "router": router}

        return jax.tree.unflatten(tree, map(add, pairs, jax.random.split(key, len(pairs))))

    def init_extra(shared: dict, client_id) -> dict:
        return {"expert_index": (client_id + jnp.arange(client_experts, dtype=jnp.int32)) % num_experts}

    client, server = expert_subset_rules(r".*/experts_[ab]", lambda client: client.extra["expert_index"])
    return Method(
        ownership=((r".*", "shared"),),
        client=client._replace(init_extra=init_extra),
        server=server,
        build=build,
        projection=ProjectionAdapter(apply_experts),
        check=check_mean,
        has_global_model=False,
    )
