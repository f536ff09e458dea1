"""A round over several devices: how a cohort and its batches are divided, and the collectives that this needs.

The axis "clients" of the mesh divides the cohort; "fsdp" and "expert" divide the batch of each client and the model, as
`models.sharding` says.

A step has an all-gather for each matrix of a layer; around the experts, an all-gather of tokens and a reduce-scatter of
outputs; and an all-reduce of the loss and of the adapter gradients over fsdp and expert. A round has in addition an
all-gather of embedding and head, and over clients the all-reduce of the server's mean, which the compiler makes from a
sum over a divided axis. Aggregations other than the mean gather the uploads.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flex_jax.federated.state import Frozen, RoundInputs, RoundState
from flex_jax.models.sharding import CLIENTS, data_axes, gather_params, param_specs


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_over(axes: tuple[str, ...], value):
    """Sums a part of the loss over devices; without axes the identity.

    The gradient of psum would be summed again. Here each device has that of its own part, and `sum_gradients_over` sums
    them once.
    """
    return lax.psum(value, axes)


sum_over.defvjp(lambda axes, value: (lax.psum(value, axes), None), lambda axes, _, gradient: (gradient,))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_gradients_over(axes: tuple[str, ...], tree):
    """Marks a tree that is the same on all devices, so that its gradients are summed over them."""
    return tree


sum_gradients_over.defvjp(lambda axes, tree: (tree, None), lambda axes, _, gradients: (lax.psum(gradients, axes),))


def round_specs(mesh: Mesh, frozen: Frozen) -> RoundInputs:
    """Returns how the inputs of a round function are divided over the mesh."""
    return RoundInputs(
        frozen=Frozen(param_specs(mesh, frozen.params), P()),  # pyright: ignore[reportArgumentType]
        state=RoundState(round=P(), server=P(), clients=P(CLIENTS), key=P()),  # pyright: ignore[reportArgumentType]
        batches=P(CLIENTS, None, data_axes(mesh) or None),
        cohort=P(CLIENTS),
        num_examples=P(CLIENTS),
    )


def shard_cohort(train_cohort: Callable, mesh: Mesh, inputs: RoundInputs, learning_rate, keys) -> Any:
    """Runs train_cohort(inputs, learning_rate, keys) with each device on its clients and its rows of their batches.

    A device gets its slices of the parameters of every layer, which `shard_model` gathers. Embedding and head belong to
    no layer: they are gathered once.
    """
    specs = round_specs(mesh, inputs.frozen)

    def on_device(inputs: RoundInputs, learning_rate, keys):
        params = {
            name: tree if name.endswith("layers") else gather_params(specs.frozen.params[name], tree)
            for name, tree in inputs.frozen.params.items()
        }
        return train_cohort(inputs._replace(frozen=inputs.frozen._replace(params=params)), learning_rate, keys)

    sharded = jax.shard_map(
        on_device, mesh=mesh, in_specs=(specs, P(), P(CLIENTS)), out_specs=P(CLIENTS), check_vma=False
    )
    return sharded(inputs, learning_rate, keys)


def place(mesh: Mesh, inputs: RoundInputs) -> RoundInputs:
    """Puts the inputs of a round function on the devices of the mesh."""
    specs = round_specs(mesh, inputs.frozen)
    shardings = jax.tree.map(partial(NamedSharding, mesh), specs, is_leaf=lambda node: isinstance(node, P))
    return jax.device_put(inputs, shardings)
