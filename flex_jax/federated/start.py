"""The state that a run starts from."""

import jax
import jax.numpy as jnp
import numpy as np

from flex_jax.federated.placement import Placement, Roles, merge, split
from flex_jax.federated.rules import DEFAULTS, FEDAVG, Rules, Settings
from flex_jax.federated.state import ClientState, Frozen, RoundState, ServerState
from flex_jax.grafting.surgery import fill_slots
from flex_jax.models.adapters import init_attention_lora
from flex_jax.models.config import AdapterConfig, ModelConfig


def start(
    config: ModelConfig,
    params: dict,
    adapters: AdapterConfig,
    placement: Placement,
    chosen: np.ndarray | None,
    *,
    clients: int,
    key: jax.Array,
    rules: Rules = FEDAVG,
    settings: Settings = DEFAULTS,
    lora: dict | None = None,
) -> tuple[Frozen, RoundState]:
    """Round 0: adapters with the same initial values for all clients, divided by role; slots as `chosen` says.

    chosen: [N, L, r] int32, the experts each client grafts, or None for no personal slot. `key` becomes the run's key.
    rules, settings: of the method, for what its server and clients keep. lora: the attention LoRA that all start with,
    by default a fresh one.
    """
    lora_key, slot_key = jax.random.split(jax.random.fold_in(key, 0x1017))

    def one_client(experts):
        tree = init_attention_lora(lora_key, config, adapters.lora) if lora is None else lora
        if chosen is None:
            return split(tree, placement), {}
        slots, grafts = fill_slots(params, experts, adapters.slot, slot_key)
        return split(merge(tree, slots), placement), grafts

    experts = jnp.zeros(clients) if chosen is None else jnp.asarray(chosen)
    roles, grafts = jax.vmap(one_client, out_axes=(Roles(frozen=None, shared=None, personal=0), 0))(experts)
    frozen = Frozen(params, roles.frozen)
    own = rules.client.init(roles.shared)
    kept = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (clients, *leaf.shape)), own)
    server = ServerState(roles.shared, rules.server.init(roles.shared, settings))
    state = RoundState(jnp.int32(0), server, ClientState(roles.personal, grafts, kept), key)
    return frozen, state
