"""What FLoRA, FlexLoRA and HetLoRA share: clients whose pairs A, B have ranks of their own.

Pairs are held at the LoRA's rank R. Of a client of rank r the columns of A and rows of B from r on are zero and stay so
in training: the gradient of a zero column is zero where its row is, and AdamW and weight decay leave zero as it is. The
scale alpha / R is the same for all.
"""

import jax
import jax.numpy as jnp

from flex_jax.errors import InputError
from flex_jax.federated.compression import tree_bytes
from flex_jax.federated.method import Outcome, Received, Settings, change
from flex_jax.models.lora import is_pair, map_pairs


def full_rank(tree: dict) -> int:
    """R."""
    return jax.tree.leaves(tree, is_leaf=is_pair)[0]["lora_a"].shape[-1]


def client_rank(shared: dict, settings: Settings, client) -> dict:
    """What a client keeps: its rank, config.client.ranks in turn, or R where there are none."""
    ranks = jnp.array(settings.client.ranks or (full_rank(shared),), jnp.int32)
    return {"rank": ranks[client % len(ranks)]}


def truncate(tree: dict, rank) -> dict:
    """The pairs with all but their first `rank` columns and rows set to zero."""

    def cut(pair):
        held = jnp.arange(pair["lora_a"].shape[-1]) < rank
        return {"lora_a": jnp.where(held, pair["lora_a"], 0), "lora_b": jnp.where(held[:, None], pair["lora_b"], 0)}

    return map_pairs(cut, tree)


def take(received: Received) -> dict:
    """A client is sent its rank's part of the shared pairs; the aggregated model, which keeps nothing, has them all."""
    download, kept = received.download, received.client.kept
    return download | {"shared": truncate(download["shared"], kept["rank"])} if kept else download


def finish(received: Received, trained: dict) -> Outcome:
    """What a client sends has the shape of its rank, which padding hides: the rank goes along."""
    kept = received.client.kept
    return Outcome({"delta": change(received, trained), "rank": kept["rank"]}, trained["personal"], kept)


def own_bytes(tree, full: int, rank) -> jax.Array:
    """Bytes of pairs of rank `full`, compressed or not, without the padding beyond `rank`. What has no axis of ranks
    (a rank, the scale of int8, the entries of topk) counts whole."""
    leaves = jax.tree.leaves(tree)
    padded = tree_bytes([leaf for leaf in leaves if leaf.ndim > 1])
    return jnp.uint32(padded // full) * jnp.uint32(rank) + jnp.uint32(tree_bytes(leaves) - padded)


def sent(received: Received, upload: dict) -> tuple[jax.Array, jax.Array]:
    full, rank = full_rank(received.download["shared"]), received.client.kept["rank"]
    return own_bytes(upload, full, upload["rank"]), own_bytes(received.download, full, rank)


def trained_pairs(shared: dict, uploads: dict) -> dict:
    """The pairs that a cohort's clients have trained, leading axis C, from {"delta", "rank"} of each."""

    def of_client(delta, rank):
        return truncate(jax.tree.map(jnp.add, shared, delta), rank)

    return jax.vmap(of_client)(uploads["delta"], uploads["rank"])


def stack(pair: dict, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A [L, D, C R] and B [L, C R, F] whose product is the weighted sum of the products of the pairs of C clients."""
    weighted = weights[:, None, None, None] * pair["lora_a"]  # A only, or weights would be squared
    return jnp.concatenate(weighted, axis=-1), jnp.concatenate(pair["lora_b"], axis=-2)


def check_stackable(settings: Settings, method: str) -> None:
    """Raises InputError for settings that combine factors, not products: a factor means nothing without its other, and
    with `stack` the factors of two clients, or of two rounds, are not those of one matrix."""
    for name, value, allowed in (
        ("server.aggregation", settings.server.aggregation, ("mean",)),
        ("server.clip_norm", settings.server.clip_norm, (0,)),
        ("client.compression", settings.client.compression, ("none", "bfloat16", "int8")),
    ):
        if value not in allowed:
            words = " or ".join(map(str, allowed))
            raise InputError(f"config.{name} is {value!r}: {method} stacks adapters: must be {words}")
