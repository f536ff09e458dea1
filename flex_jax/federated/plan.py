"""What a run will hold and send, from shapes alone, before anything runs."""

import math
from typing import NamedTuple

import jax

from flex_jax.federated.rules import DEFAULTS, FEDAVG, Rules, Settings, exchanged
from flex_jax.federated.state import Frozen, RoundState
from flex_jax.models.config import ModelConfig
from flex_jax.ops.quantised import Quantised


class Plan(NamedTuple):
    """Counts are parameters; bytes of the arrays as they are held or handed over."""

    frozen: int
    shared: int
    personal_per_client: int
    frozen_bytes: int
    client_bytes: int  # adapters, gradients and two moments of one client in training, and its personal state at rest
    activation_bytes: int  # of the whole cohort's step
    peak_bytes: int
    upload_bytes: int  # per client and round
    download_bytes: int


def count(tree) -> int:
    """Number of array elements in a tree of arrays or shapes; a quantised matrix has as many as the plain one."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Quantised)))


def size(tree) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def plan(
    config: ModelConfig,
    frozen: Frozen,
    state: RoundState,
    rules: Rules = FEDAVG,
    settings: Settings = DEFAULTS,
    *,
    cohort: int,
    batch: int,
    sequence: int,
    remat: bool,
) -> Plan:
    """The plan of a run of `cohort` clients at a time with batches [batch, sequence]; rules, settings: of the method.

    Activations: the input of every layer; what a layer's backward pass needs (attention scores, the K + shared +
    personal hidden layers), for one layer with rematerialisation and for all of them without; one chunk of logits.
    """
    clients = len(jax.tree.leaves(state.clients)[0]) if jax.tree.leaves(state.clients) else 1
    personal = count(state.clients.personal) // clients
    trained_bytes = size(state.server.shared) + size(state.clients.personal) // clients
    tokens = cohort * batch * sequence
    itemsize = frozen.params["embedding"].dtype.itemsize
    c = config
    layer_inputs = tokens * c.layers * c.width * itemsize
    attention = 3 * cohort * batch * c.heads * sequence * sequence * 4
    hidden = 3 * c.experts_per_token * (c.width + 2 * c.expert_width) + 3 * 2 * c.shared_expert_width
    hidden += 3 * 2 * c.expert_width if personal else 0
    logits = 3 * tokens * min(c.vocab_size, 8192) * 4
    held = 1 if remat else c.layers
    activations = layer_inputs + held * (attention + tokens * hidden * itemsize) + logits
    if isinstance(frozen.params["layers"]["moe"]["gate_up"], Quantised):  # the larger matrices of one layer, plain
        activations += c.experts * c.width * 2 * c.expert_width * itemsize
    client_bytes = 5 * trained_bytes
    own = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state.clients.kept)
    upload, download = exchanged(rules, settings, state.server.shared, state.server.kept, own)
    return Plan(
        frozen=count(frozen),
        shared=count(state.server.shared),
        personal_per_client=personal,
        frozen_bytes=size(frozen),
        client_bytes=client_bytes,
        activation_bytes=activations,
        peak_bytes=size(frozen) + size(state) + cohort * client_bytes + activations,
        upload_bytes=size(upload),
        download_bytes=size(download),
    )
