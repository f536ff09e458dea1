"""The state that a run starts from."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flex_jax.federated.client import exchanged
from flex_jax.federated.compression import init_residual
from flex_jax.federated.method import Recipe
from flex_jax.federated.placement import Roles, merge, split
from flex_jax.federated.state import NO_CLIENTS, ClientState, Frozen, RoundState, ServerState
from flex_jax.grafting.surgery import fill_slots
from flex_jax.models.adapters import init_attention_lora


class Start(NamedTuple):
    """Round 0."""

    frozen: Frozen
    state: RoundState  # without clients
    clients: Callable[[np.ndarray], ClientState]  # numbers [C] -> the rows of these clients, equal in every call


def start(
    recipe: Recipe, params: dict, chosen: np.ndarray | None, *, key: jax.Array, lora: dict | None = None
) -> Start:
    """Adapters with the same initial values for all clients, divided by role; slots as `chosen` says.

    chosen: [N, L, r] int32, the experts each client grafts, or None where the method has no slots. `key` becomes the
    run's key. lora: the attention LoRA that all start with, by default a fresh one.
    """
    (model, method, settings), config = recipe, recipe.model.config
    lora_key, slot_key = jax.random.split(jax.random.fold_in(key, 0x1017))
    build_key, server_key = jax.random.split(jax.random.fold_in(key, 0x1018))
    everyone = jnp.broadcast_to(jnp.arange(config.experts), (config.moe_layers, config.experts))

    def tree(params, experts) -> tuple[Roles, dict]:
        adapters = init_attention_lora(lora_key, config, model.adapters.lora) if lora is None else lora
        grafts = {}
        if method.grafts != "none":
            slots, grafts = fill_slots(params, experts, model.adapters.slot, slot_key)
            if method.grafts == "all":
                slots, _ = fill_slots(params, everyone, model.adapters.slot, slot_key)
            adapters = merge(adapters, slots)
        return split(method.build(adapters, build_key, settings), method.placement), grafts

    def nobody(params):
        experts = jnp.zeros((config.moe_layers, model.adapters.slot.experts), jnp.int32)
        roles, _ = tree(params, experts)
        return roles.frozen, ServerState(roles.shared, method.server.init(roles.shared, settings, server_key))

    def row(params, number, experts) -> ClientState:
        roles, grafts = tree(params, experts)
        _, server = nobody(params)
        client = ClientState(roles.personal, grafts, method.client.init(server.shared, settings, number), {})
        upload, _ = exchanged(recipe, server, client)
        return client._replace(residual=init_residual(upload, settings.client.compression))

    frozen, server = jax.jit(nobody)(params)
    rows = jax.jit(jax.vmap(row, in_axes=(None, 0, 0)))

    def clients(numbers):
        numbers = np.asarray(numbers, np.int32)
        experts = np.zeros(len(numbers), np.int32) if chosen is None else np.asarray(chosen)[numbers]
        return rows(params, numbers, experts)

    return Start(Frozen(params, frozen), RoundState(jnp.int32(0), server, NO_CLIENTS, key), clients)
