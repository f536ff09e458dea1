"""Clients folded into tokens: how an operator on frozen weights is batched without a copy of them for each client."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def fold_clients(function: Callable, frozen: tuple[int, ...]) -> Callable:
    """`function` of arrays with a leading token axis and, at the positions `frozen`, of weights that are the same for
    all tokens; every result has a leading token axis. Its `vmap` over clients joins their axis to the token axis, so
    that C clients cost one call on C times the tokens. Raises ValueError when a `vmap` would batch the weights.

    Only what is made of such functions by `jax.custom_vjp` has a gradient: `custom_vmap` has none of its own.
    """
    folded = jax.custom_batching.custom_vmap(function)

    @folded.def_vmap
    def rule(clients, batched, *arguments):
        if any(jax.tree.leaves([batched[i] for i in frozen])):
            raise ValueError("cannot be vmapped over frozen weights: clients share one frozen backbone")
        flat = []
        for i, (argument, is_batched) in enumerate(zip(arguments, batched, strict=True)):
            if i not in frozen:
                if not is_batched:
                    argument = jnp.broadcast_to(argument, (clients, *argument.shape))
                argument = argument.reshape(-1, *argument.shape[2:])
            flat.append(argument)
        out = folded(*flat)
        split = jax.tree.map(lambda leaf: leaf.reshape(clients, -1, *leaf.shape[1:]), out)
        return split, jax.tree.map(lambda _: True, out)

    return folded
