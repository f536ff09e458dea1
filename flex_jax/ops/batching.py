"""A vmap rule for operators on frozen weights: all clients share one copy of the weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def merge_batch_axis(function: Callable, frozen: tuple[int, ...]) -> Callable:
    """Returns `function` with a vmap that merges the batch axis into the token axis.

    C clients then cost one call on C times the tokens. All arguments and results have a leading token axis, except the
    weights at the positions `frozen`; a vmap over them raises ValueError. The result needs a `jax.custom_vjp`.
    """
    merged = jax.custom_batching.custom_vmap(function)

    @merged.def_vmap
    def rule(num_clients, batched, *arguments):
        if any(jax.tree.leaves([batched[i] for i in frozen])):
            raise ValueError("cannot be vmapped over frozen weights: clients share one frozen backbone")

        def flat(i, argument):
            if i in frozen:
                return argument
            argument = argument if batched[i] else jnp.broadcast_to(argument, (num_clients, *argument.shape))
            return argument.reshape(-1, *argument.shape[2:])

        out = merged(*(flat(i, argument) for i, argument in enumerate(arguments)))
        split = jax.tree.map(lambda leaf: leaf.reshape(num_clients, -1, *leaf.shape[1:]), out)
        return split, jax.tree.map(lambda _: True, out)

    return merged
