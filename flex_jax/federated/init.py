"""The state that a run starts from."""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from flex_jax.federated.client import exchanged
from flex_jax.federated.compression import init_residual
from flex_jax.federated.method import MethodSpec
from flex_jax.federated.ownership import OwnedTrees, merge, split
from flex_jax.federated.state import NO_CLIENTS, ClientState, Frozen, RoundState, ServerState
from flex_jax.grafting.surgery import fill_slots
from flex_jax.models.adapters import init_attention_lora


class Start(NamedTuple):
    """A run before its first round."""

    frozen: Frozen
    state: RoundState  # without clients
    init_clients: Callable[[np.ndarray], ClientState]  # client ids [C] -> their first states; the same in every call


def check_grafts_are_personal(adapters: dict) -> None:
    """Raises ValueError for copies of grafted experts that are not personal: they differ between clients."""
    for path in flatten_dict(adapters, sep="/"):
        if re.search(r"/slot/(.*/kernel|gate)$", path):
            raise ValueError(f"ownership of {path}: must be personal, because each client grafts its own experts")


def start(
    spec: MethodSpec, params: dict, expert_index: np.ndarray | None, *, key: jax.Array, lora: dict | None = None
) -> Start:
    """Returns the first state of a run: equal adapters for all clients, divided by owner, and grafted slots.

    Args:
        spec: the model, method and settings.
        params: the frozen backbone.
        expert_index: [N, L, r] int32, the experts that each client grafts; None if the method has no slots.
        key: the run's key.
        lora: the attention LoRA that everybody starts with; by default a fresh one.
    """
    (model, method, settings), config = spec, spec.model.config
    lora_key, slot_key = jax.random.split(jax.random.fold_in(key, 0x1017))
    build_key, server_key = jax.random.split(jax.random.fold_in(key, 0x1018))
    every_expert = jnp.broadcast_to(jnp.arange(config.num_experts), (config.num_moe_layers, config.num_experts))

    def owned_trees(params, experts) -> tuple[OwnedTrees, dict]:
        adapters = init_attention_lora(lora_key, config, model.adapters.lora) if lora is None else lora
        grafts = {}
        if method.grafts != "none":
            slots, grafts = fill_slots(params, experts, model.adapters.slot, slot_key)
            if method.grafts == "all":
                slots, _ = fill_slots(params, every_expert, model.adapters.slot, slot_key)
            adapters = merge(adapters, slots)
        return split(method.build(adapters, build_key), method.ownership), grafts

    def init_server(params) -> tuple[dict, ServerState]:
        experts = jnp.zeros((config.num_moe_layers, model.adapters.slot.num_experts), jnp.int32)
        trees, _ = owned_trees(params, experts)
        if method.grafts == "client":
            check_grafts_are_personal(merge(trees.frozen, trees.shared))
        return trees.frozen, ServerState(trees.shared, method.server.init_extra(trees.shared, server_key))

    def init_client(params, client_id, experts) -> ClientState:
        trees, grafts = owned_trees(params, experts)
        _, server = init_server(params)
        client = ClientState(trees.personal, grafts, method.client.init_extra(server.shared, client_id), {})
        upload, _ = exchanged(spec, server, client)
        return client._replace(residual=init_residual(upload, settings.compression))

    frozen_adapters, server = jax.jit(init_server)(params)
    init_cohort = jax.jit(jax.vmap(init_client, in_axes=(None, 0, 0)))

    def init_clients(client_ids) -> ClientState:
        client_ids = np.asarray(client_ids, np.int32)
        experts = np.zeros(len(client_ids), np.int32) if expert_index is None else np.asarray(expert_index)[client_ids]
        return init_cohort(params, client_ids, experts)

    return Start(Frozen(params, frozen_adapters), RoundState(jnp.int32(0), server, NO_CLIENTS, key), init_clients)
