"""Experts at the server, of which each client holds a few: their rows for a client, their mean over those that do.

A table is a leaf [L, E, ...] of the shared tree, one row an expert. A client is sent and sends the rows that it holds;
the server averages each row over the clients of the cohort that hold it, and leaves alone what none of them does.
"""

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from flex_jax.errors import InputError
from flex_jax.federated.aggregation import clip
from flex_jax.federated.method import Arrived, ClientRule, Outcome, Received, ServerRule, change


def mean_over_holders(rows: jax.Array, index: jax.Array, weights: jax.Array, experts: int) -> jax.Array:
    """[L, E, ...] of rows [C, L, r, ...], which are those of the experts index [C, L, r] or [C, r]; weights [C].

    The weights of an expert's holders are scaled to sum to one; it is zero where there is none.
    """
    index = index.reshape(len(index), -1, index.shape[-1])
    share = weights[:, None, None, None] * jax.nn.one_hot(index, experts)  # [C, L or 1, r, E]
    total = share.sum((0, 2), keepdims=True)
    share = jnp.broadcast_to(share / jnp.where(total == 0, 1.0, total), (*rows.shape[:3], experts))
    # A product, not a scatter, whose order of summation is open on some devices.
    return jnp.einsum("clre,clr...->le...", share, rows, precision=jax.lax.Precision.HIGHEST)


def partial_rules(name: str, tables: str, held: Callable[[Received], jax.Array]) -> tuple[ClientRule, ServerRule]:
    """The rules of a method `name` whose leaves are tables where their whole path matches the regular expression
    `tables`; held: received -> the experts that the client holds, int32 [L, r], or [r] for all layers alike."""

    def map_leaves(table, other, *trees):
        """table(leaves) where they are tables, other(leaves) elsewhere."""

        def either(path, *leaves):
            whole = jax.tree_util.keystr(path, simple=True, separator="/")
            return (table if re.fullmatch(tables, whole) else other)(*leaves)

        return jax.tree_util.tree_map_with_path(either, *trees)

    def take(received):
        def rows(table):
            index = jnp.broadcast_to(held(received), (len(table), held(received).shape[-1]))
            return jax.vmap(partial(jnp.take, axis=0))(table, index)

        return received.download | {"shared": map_leaves(rows, lambda leaf: leaf, received.download["shared"])}

    def finish(received, trained):
        upload = {"delta": change(received, trained), "expert_index": held(received)}
        return Outcome(upload, trained["personal"], received.client.kept)

    def init(shared, settings, key):
        if settings.server.aggregation != "mean":
            raise InputError(
                f"config.server.aggregation is {settings.server.aggregation!r}: "
                f"{name} averages each expert over its holders: must be mean"
            )
        return {}

    def update(shared: dict, kept: dict, arrived: Arrived) -> tuple[dict, dict]:
        limit, deltas = arrived.settings.server.clip_norm, arrived.uploads["delta"]
        if limit > 0:
            deltas = clip(deltas, limit)  # an upload as a whole; so not once more in the mean
        means = map_leaves(
            lambda table, rows: mean_over_holders(
                rows, arrived.uploads["expert_index"], arrived.weights, table.shape[1]
            ),
            lambda leaf, delta: arrived.mean(delta, clip_norm=0.0),
            shared,
            deltas,
        )
        return optax.apply_updates(shared, means), kept

    return ClientRule(take=take, finish=finish), ServerRule(init=init, update=update)
