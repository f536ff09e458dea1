"""A round over several devices: a mesh of three axes, all of whose collectives are written here.

clients  each device trains its share of a cohort
fsdp     and its share of a client's batch; a frozen matrix lies in slices, put together layer by layer where it is used
expert   as fsdp; but experts stay where they are, and the tokens of the axis come to them

So a device holds 1 / (fsdp * expert) of the backbone. Collectives in a step: an all-gather for each matrix of a layer
(fsdp, and expert for what is no expert); around the experts an all-gather of tokens and a reduce-scatter of outputs,
and an all-reduce of grafted experts that a slot reads there (expert); an all-reduce of loss and adapter gradients (fsdp
and expert). In a round: an all-gather of embedding and head (fsdp and expert), and over clients the all-reduce of the
server's mean, which the compiler makes of a sum over a divided axis; other aggregations gather the uploads.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flex_jax.federated.state import Frozen, RoundState
from flex_jax.models.decoder import Decoder
from flex_jax.ops.experts import Experts, ExpertWeights, frozen_experts
from flex_jax.ops.quantised import Quantised

CLIENTS, FSDP, EXPERT = AXES = ("clients", "fsdp", "expert")


def make_mesh(clients: int, fsdp: int, expert: int) -> Mesh | None:
    """A mesh of the first clients * fsdp * expert devices; None for one device."""
    sizes = (clients, fsdp, expert)
    count = clients * fsdp * expert
    if count == 1:
        return None
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:count])


def data_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes that divide the batch of a client."""
    return tuple(axis for axis in (FSDP, EXPERT) if mesh.shape[axis] > 1)


def param_spec(mesh: Mesh, path: str, shape: tuple[int, ...]) -> P:
    """Where a parameter lies: experts [L, E, D, F] over (expert, fsdp), other matrices over both at once, on the first
    axis that they divide; vectors everywhere."""
    stacked = 1 if path.split("/")[0].endswith("layers") else 0
    spec = [None] * len(shape)

    def divide(dimensions, axes):
        axes = tuple(axis for axis in axes if mesh.shape[axis] > 1)
        size = math.prod(mesh.shape[axis] for axis in axes)
        fitting = [dimension for dimension in dimensions if axes and shape[dimension] % size == 0]
        if fitting:
            spec[fitting[0]] = axes

    if len(shape) == 4:
        divide([1], [EXPERT])
        divide([2, 3], [FSDP])
    elif len(shape) - stacked >= 2:
        divide(range(stacked, len(shape)), [FSDP, EXPERT])
    return P(*spec)


def param_sharding(mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """`param_spec`, as `load_pretrained` takes it."""
    return lambda path, shape: NamedSharding(mesh, param_spec(mesh, path, shape))


def param_specs(mesh: Mesh, params: dict) -> dict:
    """`param_spec` of every leaf of a tree of parameters, quantised or not."""

    def spec(path, leaf):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return param_spec(mesh, "/".join(names), leaf.shape)

    return jax.tree_util.tree_map_with_path(spec, params)


def _is_spec(node) -> bool:
    return isinstance(node, P)


def gather(specs: dict, tree: dict) -> dict:
    """The whole parameters from the slices of this device; experts [E, D, F] stay divided by expert."""

    def whole(spec, leaf):
        for dimension, axes in enumerate(spec):
            if axes and not (leaf.ndim == 3 and dimension == 0):
                leaf = lax.all_gather(leaf, axes, axis=dimension, tiled=True)
        return leaf

    return jax.tree.map(whole, specs, tree, is_leaf=_is_spec)


def frozen_experts_over(
    axis: str, x: jax.Array, weights: ExpertWeights, index: jax.Array, weight: jax.Array
) -> jax.Array:
    """`frozen_experts` on the tokens of this device, whose experts lie along a mesh axis: the tokens of the axis go to
    every device, which adds what its own experts, E / size of them, say of each."""
    x, index, weight = (lax.all_gather(array, axis, tiled=True) for array in (x, index, weight))
    held = weights.down.shape[1]
    own = index - lax.axis_index(axis) * held
    mine = (own >= 0) & (own < held)
    y = frozen_experts(x, weights, jnp.where(mine, own, held), jnp.where(mine, weight, 0.0))
    return lax.psum_scatter(y, axis, scatter_dimension=0, tiled=True)


def take_experts_over(
    axis: str, stack: jax.Array | Quantised, layer: jax.Array | int, chosen: jax.Array
) -> jax.Array | Quantised:
    """`take_experts` where they lie along a mesh axis: from the device that has them, to all of it."""
    held = jax.tree.leaves(stack)[0].shape[1]
    own = chosen - lax.axis_index(axis) * held
    mine = (own >= 0) & (own < held)

    def take(leaf):
        rows = leaf[layer, jnp.clip(own, 0, held - 1)]
        return lax.psum(jnp.where(mine[:, None, None], rows, jnp.zeros_like(rows)), axis)

    return jax.tree.map(take, stack)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def summed(axes: tuple[str, ...], value):
    """The sum over devices of a part of the loss; its gradient goes to each device's part as it is."""
    return lax.psum(value, axes)


summed.defvjp(lambda axes, value: (lax.psum(value, axes), None), lambda axes, _, gradient: (gradient,))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def replicated(axes: tuple[str, ...], tree):
    """A tree that all devices hold alike; their gradients are summed."""
    return tree


replicated.defvjp(lambda axes, tree: (tree, None), lambda axes, _, gradients: (lax.psum(gradients, axes),))


def on_a_device(model: Decoder, mesh: Mesh, params: dict) -> Decoder:
    """The model as one device applies it to its slices of the parameters `params`."""
    if not data_axes(mesh):  # to all of them
        return model.clone(stacked=True)
    specs = {
        name: jax.tree.map(lambda spec: P(*spec[1:]), tree, is_leaf=_is_spec)  # of one layer
        for name, tree in param_specs(mesh, params).items()
        if name.endswith("layers")
    }
    divided = Experts(partial(frozen_experts_over, EXPERT), partial(take_experts_over, EXPERT))
    experts = divided if mesh.shape[EXPERT] > 1 else model.experts
    return model.clone(experts=experts, stacked=False, gather=lambda name, layer: gather(specs[name], layer))


def spread(train: Callable, mesh: Mesh, frozen: Frozen) -> Callable:
    """train(frozen, server, round, learning_rate, clients, batches, keys) of a cohort, over a mesh: each device has
    its clients, its rows of their batches, and of the parameters what `on_a_device` asks for; embedding and head, which
    no layer holds, are put together once."""
    specs = param_specs(mesh, frozen.params)

    def on_device(frozen, *arguments):
        whole = {
            name: tree if name.endswith("layers") else gather(specs[name], tree) for name, tree in frozen.params.items()
        }
        return train(frozen._replace(params=whole), *arguments)

    placed = round_specs(mesh, frozen)
    in_specs = (placed[0], P(), P(), P(), P(CLIENTS), placed[2], P(CLIENTS))
    return jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=P(CLIENTS), check_vma=False)


def round_specs(mesh: Mesh, frozen: Frozen) -> tuple:
    """Where the arguments of a round function lie."""
    state = RoundState(P(), P(), P(CLIENTS), P())
    batches = P(CLIENTS, None, data_axes(mesh) or None)
    return Frozen(param_specs(mesh, frozen.params), P()), state, batches, P(CLIENTS), P(CLIENTS)


def place(mesh: Mesh, arguments: tuple) -> tuple:
    """The arguments of a round function, where it takes them."""
    specs = round_specs(mesh, arguments[0])
    return jax.device_put(arguments, jax.tree.map(partial(NamedSharding, mesh), specs, is_leaf=_is_spec))
