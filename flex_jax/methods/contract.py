"""Whether the functions of a method return what its contract says, found out from shapes before anything runs."""

from functools import partial
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from flex_jax.federated.client import client_variables, exchanged
from flex_jax.federated.method import MethodSpec
from flex_jax.federated.server import aggregate
from flex_jax.federated.state import Frozen, RoundState
from flex_jax.models.adapters import LORA


def check_contract(spec: MethodSpec, frozen: Frozen, state: RoundState, *, model_adapters: dict) -> None:
    """Raises TypeError if a method returns adapters that the model does not read, or another kind of state.

    All arguments are shapes. `state` has one client. `model_adapters` are those that the model reads; a method with its
    own kind of projection may add leaves to projections.
    """
    client = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state.clients)
    if not isinstance(client.extra, dict):
        raise TypeError(f"client.init_extra must return a dict, not {type(client.extra).__name__}")
    adapters = jax.eval_shape(partial(client_variables, spec), frozen, state.server, client)["adapters"]
    known, composed = (set(flatten_dict(tree, sep="/")) for tree in (model_adapters, adapters))
    modules = {path.rpartition("/")[0] for path in known}
    for path in sorted(composed - known):
        if spec.method.projection is LORA or path.rpartition("/")[0] not in modules:
            raise TypeError(
                f"compose returns {path}, which the model does not read: it reads {', '.join(sorted(known))}"
            )
    upload, _ = exchanged(spec, state.server, client)
    uploads = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), upload)
    examples = jax.ShapeDtypeStruct((1,), "float32")
    updated: Any = jax.eval_shape(partial(aggregate, spec, 1, upload), state.server, uploads, examples)
    if jax.tree.structure(updated) != jax.tree.structure(state.server):
        raise TypeError(f"server.update must return a ServerState with the leaves that it got, not {updated!r:.200}")
    for before, after in zip(jax.tree.leaves(state.server), jax.tree.leaves(updated), strict=True):
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            raise TypeError(f"server.update changes a leaf {before.dtype}{before.shape} to {after.dtype}{after.shape}")
