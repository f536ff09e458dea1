"""FLoRA (Wang et al. 2024, arXiv 2409.05976): adapters of any ranks are stacked, not averaged.

    client   A_k random, B_k = 0, of rank r_k; train them on W
    server   A = [p_1 A_1 ... p_C A_C],  B = [B_1; ...; B_C]:  A B = sum_k p_k A_k B_k, exactly
    all      W <- W + alpha / rank A B; the pairs are thrown away

The merged sum is kept in float32, apart from the frozen W. As in the released code p_k is on A only, the scale is the
same for all ranks, and each client draws A itself, here from a seed that all know. In the first round clients start
from the adapter that the run starts with, cut to their rank. Local steps are AdamW's.

A download is counted as the stack of the last cohort, whose rank is the sum of its ranks; in the first round as the
start. A client that missed rounds would need their stacks as well: this is not counted.
"""

import jax
import jax.numpy as jnp

from flex_jax.federated.method import Arrived, ClientRule, Method, Received, ServerRule, Settings
from flex_jax.methods.ranks import (
    check_stackable,
    client_rank,
    finish,
    full_rank,
    own_bytes,
    stack,
    take,
    trained_pairs,
    truncate,
)
from flex_jax.models.lora import fresh_pairs, map_pairs


def init_client(shared: dict, settings: Settings, client) -> dict:
    return client_rank(shared, settings, client) | {"number": jnp.int32(client)}


def begin(received: Received, loss) -> dict:
    start, kept = received.download["shared"], received.client.kept
    key = jax.random.fold_in(jax.random.fold_in(received.known["key"], received.round), kept["number"])
    own = truncate(fresh_pairs(key, start), kept["rank"])
    pairs = jax.tree.map(lambda start, own: jnp.where(received.round == 0, start, own), start, own)
    return {"shared": pairs, "personal": received.client.personal}


def sent(received: Received, upload: dict) -> tuple[jax.Array, jax.Array]:
    full, stacked = full_rank(received.download["shared"]), received.known["stacked_ranks"]
    down = jnp.where(stacked == 0, upload["rank"], stacked)
    return own_bytes(upload, full, upload["rank"]), own_bytes(received.download, full, down)


def init_server(shared: dict, settings: Settings, key: jax.Array) -> dict:
    check_stackable(settings, "flora")
    merged = map_pairs(lambda pair: jnp.zeros_like(pair["lora_a"] @ pair["lora_b"]), shared)
    return {"merged": merged, "key": key, "stacked_ranks": jnp.int32(0)}


def update(shared: dict, kept: dict, arrived: Arrived) -> tuple[dict, dict]:
    """Merge the stack; between rounds there is no pair, so that the shared one is zero from here on."""

    def merge(pair, merged):
        return merged + jnp.matmul(*stack(pair, arrived.weights), precision=jax.lax.Precision.HIGHEST)

    merged = map_pairs(merge, trained_pairs(shared, arrived.uploads), kept["merged"])
    zero = jax.tree.map(jnp.zeros_like, shared)
    return zero, kept | {"merged": merged, "stacked_ranks": arrived.uploads["rank"].sum()}


def compose(tree: dict, received: Received) -> dict:
    return map_pairs(lambda pair, merged: pair | {"delta": merged}, tree, received.known["merged"])


METHOD = Method(
    placement=((r".*", "shared"),),
    client=ClientRule(init=init_client, take=take, begin=begin, finish=finish, sent=sent),
    server=ServerRule(init=init_server, known=lambda kept: kept, update=update),
    compose=compose,
)
