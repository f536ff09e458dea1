"""One round of FLEx as a plain Python loop, and the same round as the package compiles it.

    python examples/one_round.py

Four clients with a department each, on the embedded model and data, on a CPU in a minute. It prints the loss of each
client and the largest difference between the two results.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flex_jax import METHODS, MethodSpec, default_config, make_round, start
from flex_jax.building import build_backbone, build_federation
from flex_jax.data.batches import round_batches
from flex_jax.data.sources import load_data
from flex_jax.federated.client import OptimizerSettings
from flex_jax.federated.ownership import merge
from flex_jax.models.objective import response_loss
from flex_jax.training import select_experts

CLIENTS, STEPS, LEARNING_RATE = np.arange(4, dtype=np.int32), 5, 4e-3
key = jax.random.PRNGKey(0)

# The backbone stays frozen. Each client selects the experts that it grafts, and starts from them.
config = default_config()
config.data.partition, config.data.column, config.sequence_length = "column", "department", 64
backbone = build_backbone(config)
federation = build_federation(config, backbone, load_data("tiny"), seed=0)
expert_index = select_experts(config, backbone, federation, key)
spec = MethodSpec(backbone.model, METHODS["flex"]())
frozen, state, init_clients = start(spec, backbone.params, expert_index, key=key)
clients = init_clients(CLIENTS)
batches = round_batches(federation.train, CLIENTS, round=0, seed=0, local_steps=STEPS, batch_size=4)
num_examples = np.array([len(dataset.tokens) for dataset in federation.train], np.float32)


@jax.jit
def loss_and_gradients(trained, grafts, tokens, loss_mask):
    """The mean loss over response tokens, and its gradients for the shared and the personal adapters."""

    def loss(trained):
        variables = {"params": frozen.params, "adapters": merge(*trained), "grafts": grafts}
        total, count = response_loss(spec.model, variables, tokens, loss_mask)
        return total / count

    return jax.value_and_grad(loss)(trained)


# Each client takes a few steps on the shared LoRA and on its own experts and gates.
deltas, losses = [], []
for c in CLIENTS:
    client = jax.tree.map(lambda leaf, c=c: leaf[c], clients)
    trained = (state.server.shared, client.personal)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, weight_decay=0.0))
    opt_state, client_losses = optimizer.init(trained), []
    for tokens, loss_mask in zip(batches.tokens[c], batches.loss_mask[c], strict=True):
        loss, gradients = loss_and_gradients(trained, client.grafts, tokens, loss_mask)
        updates, opt_state = optimizer.update(gradients, opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        client_losses.append(float(loss))
    deltas.append(jax.tree.map(jnp.subtract, trained[0], state.server.shared))
    losses.append(np.mean(client_losses))
    print(f"{federation.train[c].name}: loss {losses[-1]:.3f}")

# The server averages what the clients changed in the shared LoRA, weighted by examples. It sees nothing else.
weights = num_examples / num_examples.sum()
mean = jax.tree.map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *deltas)
shared = optax.apply_updates(state.server.shared, mean)

# The package does all of that in one jit, with the clients under a vmap.
settings = OptimizerSettings(num_rounds=1, learning_rate=LEARNING_RATE, final_learning_rate=LEARNING_RATE)
round_fn = make_round(spec, num_clients=len(CLIENTS), optimizer=settings)
after, metrics = round_fn(frozen, state._replace(clients=clients), batches, CLIENTS, num_examples)
difference = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), shared, after.server.shared)
print(f"largest difference of the shared adapters: {max(jax.tree.leaves(difference)):.1e}")
