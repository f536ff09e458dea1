"""Whether the functions of a method return what its contract says, found out from shapes before anything runs."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from flex_jax.federated.client import client_context, client_variables
from flex_jax.federated.client_store import named_leaves
from flex_jax.federated.method import MethodSpec, Settings
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
    readable, composed = (set(flatten_dict(tree, sep="/")) for tree in (model_adapters, adapters))
    params = flatten_dict(frozen.params, sep="/")
    projections = {path.rpartition("/")[0] for path in params if path.endswith("/kernel")}
    for path in sorted(composed - readable):
        if spec.method.projection is LORA or path.rpartition("/")[0] not in projections:
            raise TypeError(
                f"compose returns {path}, which the model does not read: it reads {', '.join(sorted(readable))}"
            )

    def run_client(server, client):
        context = client_context(spec, server, client, 0, 1.0, 1)
        trained = spec.method.client.init_trained(context, lambda tree: jnp.float32(0.0))
        return context.download, spec.method.client.make_result(context, trained)

    download, result = jax.eval_shape(run_client, state.server, client)
    _compare("client.make_result: the delta", result.upload.delta, download.shared)
    _compare("client.make_result: the personal tree", result.personal, client.personal)
    _compare("client.make_result: the extra state", result.extra, client.extra)
    uploads = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), result.upload)
    combine = partial(aggregate, spec._replace(settings=Settings()), 1, result.upload)
    examples = jax.ShapeDtypeStruct((1,), "float32")
    _compare("server.update: the state", jax.eval_shape(combine, state.server, uploads, examples), state.server)


def _compare(what: str, returned: Any, wanted: Any) -> None:
    """Raises TypeError unless a tree of shapes has the structure, shapes and types of another one."""
    found, expected = (
        {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named_leaves(tree).items()}
        for tree in (returned, wanted)
    )
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise TypeError(
                f"{what} has {found.get(name, 'nothing')} at {name}: must be {expected.get(name, 'nothing')}"
            )
    if jax.tree.structure(returned) != jax.tree.structure(wanted):
        raise TypeError(f"{what} is {returned!r:.80}: must have the structure of {wanted!r:.80}")
