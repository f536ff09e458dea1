"""How a backbone is divided over the devices of a mesh, and how one device applies its part.

The mesh has three axes:

clients  Each device trains its share of the cohort.
fsdp     Each device trains its share of a client's batch. Frozen matrices are divided, and all-gathered layer by layer
         when they are used.
expert   As fsdp, but experts are not gathered: they stay on their device and the tokens of the axis go to them.

So a device stores 1 / (fsdp * expert) of the backbone. A step has an all-gather for each matrix of a layer (over fsdp;
over expert as well for matrices other than experts); an all-gather of tokens and a reduce-scatter of outputs around the
experts, and an all-reduce of the grafted experts that a slot reads (over expert).
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flex_jax.models.decoder import Decoder
from flex_jax.ops.experts import ExpertOps, ExpertWeights, frozen_experts
from flex_jax.ops.quantised import Matrices

CLIENTS, FSDP, EXPERT = AXES = ("clients", "fsdp", "expert")


class Division(NamedTuple):
    """Divides an array over mesh axes, along the first of the dimensions whose size they divide."""

    axes: tuple[str, ...]
    dimensions: tuple[int, ...]


EXPERTS = r"layers/moe/(gate_up|down)"
REPLICATED = ()
PARAM_DIVISIONS: tuple[tuple[str, tuple[Division, ...]], ...] = (
    # The first regular expression that matches the whole path of a parameter counts.
    (EXPERTS, (Division((EXPERT,), (1,)), Division((FSDP,), (2, 3)))),  # [L, E, D, F]
    (r"(dense_)?layers/attention/\w+/kernel", (Division((FSDP, EXPERT), (1, 2)),)),  # [L, D, F]
    (r"dense_layers/mlp/(gate_up|down)", (Division((FSDP, EXPERT), (1, 2)),)),
    (r"layers/moe/(router|shared_expert/(gate|gate_up|down))", (Division((FSDP, EXPERT), (1, 2)),)),
    (r"embedding|head", (Division((FSDP, EXPERT), (0, 1)),)),  # [V, D]
    (r"norm/scale|(dense_)?layers/(\w+/)+(scale|bias)", REPLICATED),
)


def make_mesh(clients: int, fsdp: int, expert: int) -> Mesh | None:
    """Returns a mesh of the first clients * fsdp * expert devices, or None for one device."""
    count, kinds = clients * fsdp * expert, (AxisType.Auto,) * 3
    if count == 1:
        return None
    return jax.make_mesh((clients, fsdp, expert), AXES, axis_types=kinds, devices=jax.devices()[:count])


def data_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Returns the axes that divide the batch of a client."""
    return tuple(axis for axis in (FSDP, EXPERT) if mesh.shape[axis] > 1)


def param_spec(mesh: Mesh | AbstractMesh, path: str, shape: tuple[int, ...]) -> P:
    """Returns how an array is divided, by PARAM_DIVISIONS; the two arrays of a quantised parameter separately.

    The shape decides along which of the table's dimensions. Raises ValueError if the table does not cover the path.
    """
    divisions = next((divisions for pattern, divisions in PARAM_DIVISIONS if re.fullmatch(pattern, path)), None)
    if divisions is None:
        raise ValueError(f"parameter {path} is covered by no row of PARAM_DIVISIONS")
    spec: list[tuple[str, ...] | None] = [None] * len(shape)
    for division in divisions:
        axes = tuple(axis for axis in division.axes if mesh.shape[axis] > 1)
        size = math.prod(mesh.shape[axis] for axis in axes)
        fitting = [dimension for dimension in division.dimensions if axes and shape[dimension] % size == 0]
        if fitting:
            spec[fitting[0]] = axes
    return P(*spec)


def param_sharding(mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Returns `param_spec` as the argument `sharding` of `load_pretrained`."""
    return lambda path, shape: NamedSharding(mesh, param_spec(mesh, path, shape))


def param_specs(mesh: Mesh | AbstractMesh, params: dict) -> dict:
    """Returns `param_spec` of every leaf of a tree of parameters, quantised or not."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: param_spec(mesh, _join(path), leaf.shape), params)


def _join(path) -> str:
    return "/".join(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))


def gather_params(specs: dict, tree: dict) -> dict:
    """All-gathers parameters that are divided by `specs`, within `shard_map`."""

    def gather(spec, leaf):
        for dimension, axes in enumerate(spec):
            if axes:
                leaf = lax.all_gather(leaf, axes, axis=dimension, tiled=True)
        return leaf

    return jax.tree.map(gather, specs, tree, is_leaf=lambda node: isinstance(node, P))


def frozen_experts_over(
    axis: str, x: jax.Array, weights: ExpertWeights, expert_index: jax.Array, routing_weight: jax.Array
) -> jax.Array:
    """Computes `frozen_experts` for this device's tokens, with experts that are divided over a mesh axis.

    All devices of the axis get all its tokens. Each device adds the outputs of its E / size experts.
    """
    arrays = (x, expert_index, routing_weight)
    x, expert_index, routing_weight = (lax.all_gather(array, axis, tiled=True) for array in arrays)
    num_local = weights.down.shape[1]
    local_index = expert_index - lax.axis_index(axis) * num_local
    is_local = (local_index >= 0) & (local_index < num_local)
    local_index, local_weight = jnp.where(is_local, local_index, num_local), jnp.where(is_local, routing_weight, 0.0)
    y = frozen_experts(x, weights, local_index, local_weight)
    return lax.psum_scatter(y, axis, scatter_dimension=0, tiled=True)


def gather_experts_over(axis: str, stack: Matrices, layer: jax.Array | int, expert_index: jax.Array) -> Matrices:
    """Computes `gather_experts` with experts that are divided over a mesh axis. All its devices get the result."""
    num_local = jax.tree.leaves(stack)[0].shape[1]
    local_index = expert_index - lax.axis_index(axis) * num_local
    is_local = (local_index >= 0) & (local_index < num_local)

    def gather(leaf):
        experts = leaf[layer, jnp.clip(local_index, 0, num_local - 1)]
        return lax.psum(jnp.where(is_local[:, None, None], experts, jnp.zeros_like(experts)), axis)

    return jax.tree.map(gather, stack)


def shard_model(model: Decoder, mesh: Mesh, params: dict) -> Decoder:
    """Returns the model as one device applies it, within `shard_map`, to its slices of the parameters `params`."""
    if not data_axes(mesh):  # every device has all parameters
        return model.clone(stacked=True)

    def layer_spec(path, spec):
        # These are the dimensions of one layer's array to all-gather. Experts stay divided.
        return P(None, *spec[2:]) if re.fullmatch(EXPERTS, _join(path)) else P(*spec[1:])

    specs = param_specs(mesh, params)
    specs = jax.tree_util.tree_map_with_path(layer_spec, specs, is_leaf=lambda node: isinstance(node, P))
    experts = model.experts
    if mesh.shape[EXPERT] > 1:
        experts = ExpertOps(partial(frozen_experts_over, EXPERT), partial(gather_experts_over, EXPERT))
    return model.clone(experts=experts, stacked=False, gather=lambda name, layer: gather_params(specs[name], layer))
