"""HetLoRA (Cho et al. 2024, arXiv 2401.06432): truncated on the way down, padded with zeros on the way up.

    client   minimise F_k + lambda ||A[:, gamma r:]|| ||B[gamma r:]||; where that product of norms has shrunk in the
             round, r <- gamma r for good
    server   A = sum_k w_k A_k,  B = sum_k w_k B_k,  w_k in proportion to ||A_k B_k||_F

No code was released. One rank and one weight a client: the penalty is a sum over the adapted matrices, w_k the norm of
all of them together. gamma r is rounded down, to 1 at least. The numbers of examples play no part. Ranks that no
client of a cohort has stay as they are, as zeros in both factors could never be trained again. Robust aggregation acts
on the changes of the padded pairs. Local steps are AdamW's.
"""

import jax
import jax.numpy as jnp
import optax

from flex_jax.federated.method import Arrived, ClientRule, Method, Outcome, Received, ServerRule, change
from flex_jax.methods.ranks import client_rank, sent, take, trained_pairs, truncate
from flex_jax.models.lora import is_pair


def pruned(received: Received) -> jax.Array:
    """The rank that the client would prune to."""
    kept = jnp.floor(received.settings.client.rank_decay * received.client.kept["rank"])
    return jnp.maximum(kept, 1).astype(jnp.int32)


def tail(tree: dict, rank: jax.Array) -> jax.Array:
    """||A[:, rank:]|| ||B[rank:]||, summed over the adapted matrices of all layers."""
    rest = jax.tree.map(jnp.subtract, tree, truncate(tree, rank))
    norms = jax.tree.map(lambda leaf: optax.safe_norm(leaf, 0.0, axis=(-2, -1)), rest)  # of zeros: with a gradient
    return sum((pair["lora_a"] * pair["lora_b"]).sum() for pair in jax.tree.leaves(norms, is_leaf=is_pair))


def objective(received: Received, trained: dict, loss) -> tuple[jax.Array, jax.Array]:
    value = loss(trained["shared"])
    return value + received.settings.client.rank_lambda * tail(trained["shared"], pruned(received)), value


def finish(received: Received, trained: dict) -> Outcome:
    fewer = pruned(received)
    shrunk = tail(trained["shared"], fewer) < tail(received.download["shared"], fewer)
    rank = jnp.where(shrunk, fewer, received.client.kept["rank"])
    upload = {"delta": truncate(change(received, trained), rank), "rank": rank}
    return Outcome(upload, trained["personal"], {"rank": rank})


def product_norm(tree: dict) -> jax.Array:
    """||A B||_F over all matrices of one client: <A' A, B B'> needs no product."""
    squares = [
        jnp.sum((pair["lora_a"].mT @ pair["lora_a"]) * (pair["lora_b"] @ pair["lora_b"].mT))
        for pair in jax.tree.leaves(tree, is_leaf=is_pair)
    ]
    return jnp.sqrt(jnp.maximum(sum(squares), 0.0))


def update(shared: dict, kept: dict, arrived: Arrived) -> tuple[dict, dict]:
    pairs = trained_pairs(shared, arrived.uploads)
    norms = jnp.maximum(jax.vmap(product_norm)(pairs), jnp.finfo(jnp.float32).tiny)  # all zero: alike
    changes = jax.tree.map(jnp.subtract, pairs, shared)
    mean = truncate(arrived.mean(changes, weights=norms / norms.sum()), arrived.uploads["rank"].max())
    return optax.apply_updates(shared, mean), kept


METHOD = Method(
    placement=((r".*", "shared"),),
    client=ClientRule(init=client_rank, take=take, objective=objective, finish=finish, sent=sent),
    server=ServerRule(update=update),
)
