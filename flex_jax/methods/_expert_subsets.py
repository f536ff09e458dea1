"""A table of experts at the server, of which each client trains a few, for FedMoE and FedAMoLE.

A table is a leaf [L, E, ...] of the shared tree, with one row for each expert. A client downloads and uploads the rows
of its experts. The server averages each row over the clients of the cohort that have it. A row that none of them has
does not change.
"""

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from flex_jax.errors import InputError
from flex_jax.federated.method import (
    ClientContext,
    ClientResult,
    ClientRule,
    Download,
    ServerContext,
    ServerRule,
    Settings,
    Trained,
    Upload,
    delta,
)
from flex_jax.federated.state import ClientState, ServerState
from flex_jax.models.decoder import Decoder


def mean_of_each_expert(stacked: jax.Array, expert_index: jax.Array, weights: jax.Array, num_experts: int) -> jax.Array:
    """Averages each expert over the clients that have it; zero if there is none. Returns [L, E, ...].

    stacked [C, L, r, ...] are the rows of the experts expert_index [C, L, r], or [C, r] for all layers. The weights [C]
    of an expert's clients are scaled to sum to one.
    """
    expert_index = expert_index.reshape(len(expert_index), -1, expert_index.shape[-1])
    share = weights[:, None, None, None] * jax.nn.one_hot(expert_index, num_experts)  # [C, L or 1, r, E]
    total = share.sum((0, 2), keepdims=True)
    share = jnp.broadcast_to(share / jnp.where(total == 0, 1.0, total), (*stacked.shape[:3], num_experts))
    # A product, not a scatter: the order of a scatter's summation is undefined on some devices.
    return jnp.einsum("clre,clr...->le...", share, stacked, precision=jax.lax.Precision.HIGHEST)


def expert_subset_rules(
    tables: str, expert_index_of: Callable[[ClientState], jax.Array]
) -> tuple[ClientRule, ServerRule]:
    """Returns the rules of a method whose leaves are tables if their whole path matches the expression `tables`.

    expert_index_of returns the experts of a client, int32 [L, r], or [r] for all layers.
    """

    def map_leaves(table, other, *trees):
        """Applies `table` to the leaves that are tables, and `other` to the rest."""

        def either(path, *leaves):
            whole = jax.tree_util.keystr(path, simple=True, separator="/")
            return (table if re.fullmatch(tables, whole) else other)(*leaves)

        return jax.tree_util.tree_map_with_path(either, *trees)

    def select_download(offered: Download, client: ClientState) -> Download:
        index = expert_index_of(client)

        def select(table):
            return jax.vmap(partial(jnp.take, axis=0))(table, jnp.broadcast_to(index, (len(table), index.shape[-1])))

        return offered._replace(shared=map_leaves(select, lambda leaf: leaf, offered.shared))

    def make_result(context: ClientContext, trained: Trained) -> ClientResult:
        upload = Upload(delta(context, trained), {"expert_index": expert_index_of(context.state)})
        return ClientResult(upload, trained.personal, context.state.extra)

    def update(server: ServerState, context: ServerContext) -> ServerState:
        index = context.uploads.extra["expert_index"]
        means = map_leaves(
            lambda table, stacked: mean_of_each_expert(stacked, index, context.weights, table.shape[1]),
            lambda leaf, stacked: context.mean(stacked),
            server.shared,
            context.uploads.delta,
        )
        return server._replace(shared=optax.apply_updates(server.shared, means))

    return ClientRule(select_download=select_download, make_result=make_result), ServerRule(update=update)


def check_mean(model: Decoder, settings: Settings) -> None:
    """Raises InputError unless the aggregation is the mean: each expert is averaged over its own clients."""
    if settings.aggregation != "mean":
        raise InputError(
            f"config.server.aggregation is {settings.aggregation!r}: it averages each expert over the clients "
            "that have it: must be mean"
        )
