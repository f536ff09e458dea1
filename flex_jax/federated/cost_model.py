"""What a run will store and send, from shapes alone, before anything runs."""

import math
from typing import Any, NamedTuple

import jax

from flex_jax.federated.client import exchanged
from flex_jax.federated.compression import compress, init_residual, tree_bytes
from flex_jax.federated.method import MethodSpec
from flex_jax.federated.state import ClientState, Frozen, RoundState
from flex_jax.ops.attention import has_flash
from flex_jax.ops.cross_entropy import LOGIT_CHUNK
from flex_jax.ops.quantised import Quantised


class StepShape(NamedTuple):
    """What one device trains in a step."""

    clients: int
    batch_size: int  # rows of each client's batch
    sequence_length: int
    slices: int = 1  # devices among which the backbone is divided


class Plan(NamedTuple):
    """Numbers of parameters, and bytes of the arrays as they are stored or sent."""

    frozen: int
    shared: int
    personal_per_client: int
    trained_per_client: int  # personal ones, and the shared ones that a client downloads
    frozen_bytes: int  # of the backbone, on one device
    client_bytes: int  # adapters, gradients and two moments of a client in training, and its stored personal state
    activation_bytes: int  # of a step of all clients of a device
    peak_bytes: int
    upload_bytes: int  # per client and round
    download_bytes: int


def count(tree) -> int:
    """Returns the number of elements in a tree of arrays or shapes. A quantised matrix counts as a plain one."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Quantised)))


def _activation_bytes(spec: MethodSpec, step: StepShape, num_slots: int, dtype) -> int:
    """Bytes of activations in a step: an estimate from above.

    The input of every layer; the products of its matrices (see ops/remat.py), for one layer with rematerialisation and
    for all of them without; what the backward pass of one layer computes from them, and gradients; attention scores of
    one layer in float32, which flash attention does not have; a chunk of logits.
    """
    c, remat = spec.model.config, spec.model.remat
    tokens = step.clients * step.batch_size * step.sequence_length
    attended = c.num_heads * c.key_dim + c.num_kv_heads * (c.key_dim + c.value_dim)
    hidden = (c.num_experts_per_tok + num_slots) * c.moe_intermediate_size + c.shared_expert_intermediate_size
    products = attended + 2 * hidden + (2 + num_slots) * c.hidden_size
    working = products + hidden + 2 * c.num_experts_per_tok * c.hidden_size
    per_token = c.num_layers * c.hidden_size + (1 if remat else c.num_layers) * products + working
    scores = 0 if has_flash(dtype, c.key_dim) else 3 * tokens * c.num_heads * step.sequence_length * 4
    return tokens * per_token * dtype.itemsize + scores + 2 * min(tokens, LOGIT_CHUNK) * c.vocab_size * 4


def plan(spec: MethodSpec, frozen: Frozen, state: RoundState, step: StepShape) -> Plan:
    """Returns the plan of one device, from arrays or shapes with any clients.

    If clients have different LoRA ranks, it is that of the highest. It counts arrays, not the method's `wire_bytes`.
    """
    client: ClientState = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state.clients)
    upload, download = exchanged(spec, state.server, client)

    def pack(upload) -> Any:
        kind, fraction = spec.settings.compression, spec.settings.compression_fraction
        return compress(upload, init_residual(upload, kind), jax.random.key(0), compression=kind, fraction=fraction)[0]

    personal = count(client.personal)
    client_bytes = 5 * (tree_bytes(download.shared) + tree_bytes(client.personal))
    dtype = frozen.params["embedding"].dtype
    num_slots = spec.model.adapters.slot.num_experts if client.grafts else 0
    activations = _activation_bytes(spec, step, num_slots, dtype)
    gate_up = frozen.params["layers"]["moe"]["gate_up"]
    if isinstance(gate_up, Quantised):  # one layer's larger matrices, dequantised
        activations += math.prod(gate_up.shape[1:]) * dtype.itemsize
    frozen_bytes = tree_bytes(frozen) // step.slices
    return Plan(
        frozen=count(frozen),
        shared=count(state.server.shared),
        personal_per_client=personal,
        trained_per_client=count(download.shared) + personal,
        frozen_bytes=frozen_bytes,
        client_bytes=client_bytes,
        activation_bytes=activations,
        peak_bytes=frozen_bytes + tree_bytes(state.server) + step.clients * client_bytes + activations,
        upload_bytes=tree_bytes(jax.eval_shape(pack, upload)),
        download_bytes=tree_bytes(download),
    )
