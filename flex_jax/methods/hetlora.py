"""HetLoRA (Cho et al. 2024, arXiv 2401.06432): truncated on the way down, padded with zeros on the way up.

    client   minimise F_k + lambda ||A[:, gamma r:]|| ||B[gamma r:]||; if that product of norms has shrunk in the round,
             r <- gamma r for good
    server   A = sum_k w_k A_k,  B = sum_k w_k B_k,  w_k in proportion to ||A_k B_k||_F

No code was released. There is one rank and one weight per client: the penalty is a sum over the adapted matrices, and
w_k the norm of all of them together. gamma r is rounded down, to at least 1. The numbers of examples are not used.
Columns of A and rows of B beyond the largest rank of a cohort do not change: zeros in both could never train again.
Robust aggregation acts on the changes of the padded pairs. Local steps are AdamW's.
"""

import jax
import jax.numpy as jnp
import optax

from flex_jax.checks import Fraction, NotNegative, Ranks
from flex_jax.federated.method import (
    ClientContext,
    ClientResult,
    Loss,
    Method,
    ServerContext,
    ServerRule,
    Trained,
    Upload,
    delta,
)
from flex_jax.federated.state import ServerState
from flex_jax.methods._ranks import check_ranks, client_rule, trained_pairs, truncate
from flex_jax.models.lora import is_pair


def tail_norm(tree: dict, rank: jax.Array) -> jax.Array:
    """||A[:, rank:]|| ||B[rank:]||, summed over the adapted matrices of all layers."""
    tail = jax.tree.map(jnp.subtract, tree, truncate(tree, rank))
    norms = jax.tree.map(lambda leaf: optax.safe_norm(leaf, 0.0, axis=(-2, -1)), tail)  # has a gradient at zero
    products = [(pair["lora_a"] * pair["lora_b"]).sum() for pair in jax.tree.leaves(norms, is_leaf=is_pair)]
    return jnp.stack(products).sum()


def product_norm(tree: dict) -> jax.Array:
    """||A B||_F over all matrices of one client, without the product: it is <A' A, B B'>."""
    squares = [
        jnp.sum((pair["lora_a"].mT @ pair["lora_a"]) * (pair["lora_b"] @ pair["lora_b"].mT))
        for pair in jax.tree.leaves(tree, is_leaf=is_pair)
    ]
    return jnp.sqrt(jnp.maximum(sum(squares), 0.0))


def update(server: ServerState, context: ServerContext) -> ServerState:
    pairs = trained_pairs(server.shared, context.uploads)
    norms = jnp.maximum(jax.vmap(product_norm)(pairs), jnp.finfo(jnp.float32).tiny)  # equal weights if all are zero
    norms = jnp.where(context.weights > 0, norms, 0)
    changes = jax.tree.map(jnp.subtract, pairs, server.shared)
    mean = truncate(context.mean(changes, weights=norms / norms.sum()), context.uploads.extra["rank"].max())
    return server._replace(shared=optax.apply_updates(server.shared, mean))


def hetlora(ranks: Ranks = (), gamma: Fraction = 0.99, lambda_: NotNegative = 5e-3) -> Method:
    """Trains clients with different ranks (in turn; () means config.lora.rank for all), which prune themselves."""
    ranked = client_rule(ranks)

    def pruned_rank(context: ClientContext) -> jax.Array:
        return jnp.maximum(jnp.floor(gamma * context.state.extra["rank"]), 1).astype(jnp.int32)

    def objective(context: ClientContext, trained: Trained, loss: Loss) -> tuple[jax.Array, jax.Array]:
        value = loss(trained.shared)
        return value + lambda_ * tail_norm(trained.shared, pruned_rank(context)), value

    def make_result(context: ClientContext, trained: Trained) -> ClientResult:
        pruned = pruned_rank(context)
        has_shrunk = tail_norm(trained.shared, pruned) < tail_norm(context.download.shared, pruned)
        rank = jnp.where(has_shrunk, pruned, context.state.extra["rank"])
        upload = Upload(truncate(delta(context, trained), rank), {"rank": rank})
        return ClientResult(upload, trained.personal, {"rank": rank})

    return Method(
        ownership=((r".*", "shared"),),
        client=ranked._replace(objective=objective, make_result=make_result),
        server=ServerRule(update=update),
        check=lambda model, settings: check_ranks(model, ranks),
    )
