"""What a run will hold and send, from shapes alone, before anything runs."""

import math
from typing import NamedTuple

import jax

from flex_jax.federated.client import exchanged
from flex_jax.federated.compression import compress, init_residual, tree_bytes
from flex_jax.federated.method import Recipe
from flex_jax.federated.state import ClientState, Frozen, RoundState
from flex_jax.ops.cross_entropy import ROWS
from flex_jax.ops.quantised import Quantised


class Plan(NamedTuple):
    """Counts are parameters; bytes of the arrays as they are held or handed over."""

    frozen: int
    shared: int
    personal_per_client: int
    trained_per_client: int  # the personal ones and what it is sent of the shared ones
    frozen_bytes: int  # of the backbone, on one device
    client_bytes: int  # adapters, gradients and two moments of one client in training, and its personal state at rest
    activation_bytes: int  # of a step of all clients of a device
    peak_bytes: int
    upload_bytes: int  # per client and round
    download_bytes: int


def count(tree) -> int:
    """Number of array elements in a tree of arrays or shapes; a quantised matrix has as many as the plain one."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Quantised)))


def plan(
    recipe: Recipe, frozen: Frozen, state: RoundState, *, cohort: int, batch: int, sequence: int, slices: int = 1
) -> Plan:
    """The plan of a device that trains `cohort` clients at a time with batches [batch, sequence] and holds one of the
    `slices` of the backbone; state.clients: any rows.

    Where clients have ranks of their own, sent bytes are those of the highest. Activations: the input of every layer;
    the products of its matrices (see ops/saved.py), of one layer with rematerialisation and of all of them without;
    what the backward pass of one layer computes from them, and gradients; the logits that exist at one time.
    """
    client: ClientState = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state.clients)
    upload, download = exchanged(recipe, state.server, client)
    numbers = recipe.settings.client

    def pack(upload):
        kind, fraction = numbers.compression, numbers.compression_fraction
        return compress(upload, init_residual(upload, kind), jax.random.key(0), compression=kind, fraction=fraction)[0]

    personal, remat = count(client.personal), recipe.model.remat
    trained_bytes = tree_bytes(download["shared"]) + tree_bytes(client.personal)
    tokens = cohort * batch * sequence
    slots = recipe.model.adapters.slot.experts if client.grafts else 0
    itemsize = frozen.params["embedding"].dtype.itemsize
    c = recipe.model.config
    attended = c.heads * c.key_dim + c.kv_heads * (c.key_dim + c.value_dim)
    hidden = c.experts_per_token * c.expert_width + c.shared_expert_width + slots * c.expert_width
    products = attended + 2 * hidden + (2 + slots) * c.width
    rows = c.experts_per_token * c.width  # a token's, one for each of its experts
    working = products + hidden + 2 * rows
    held = c.layers * c.width + (1 if remat else c.layers) * products + working
    scores = 3 * tokens * c.heads * sequence * 4  # of one layer, in float32: none with flash attention
    activations = tokens * held * itemsize + scores + 2 * min(tokens, ROWS) * c.vocab_size * 4
    if isinstance(frozen.params["layers"]["moe"]["gate_up"], Quantised):  # the larger matrices of one layer, plain
        activations += c.experts * c.width * 2 * c.expert_width * itemsize
    client_bytes = 5 * trained_bytes
    return Plan(
        frozen=count(frozen),
        shared=count(state.server.shared),
        personal_per_client=personal,
        trained_per_client=count(download["shared"]) + personal,
        frozen_bytes=tree_bytes(frozen) // slices,
        client_bytes=client_bytes,
        activation_bytes=activations,
        peak_bytes=tree_bytes(frozen) // slices + tree_bytes(state.server) + cohort * client_bytes + activations,
        upload_bytes=tree_bytes(jax.eval_shape(pack, upload)),
        download_bytes=tree_bytes(download),
    )
