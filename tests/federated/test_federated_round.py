"""A round of a vmapped cohort against a loop over clients that is written out with optax."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flex_jax import load_pretrained
from flex_jax.federated.federated_round import cosine, make_round
from flex_jax.federated.init import start
from flex_jax.federated.ownership import merge
from flex_jax.models.checkpoint import save_pretrained
from flex_jax.models.config import LoraConfig, SlotConfig
from flex_jax.models.decoder import Decoder
from flex_jax.ops.experts import ExpertOps, dense_experts
from flex_jax.ops.quantised import Quantised, dequantise
from tests.federated.fixtures import OPTIMIZER
from tests.federated.helpers import N, mean, of_client, shares, stack


def assert_trees_close(ours, expected, bound=1e-5):
    """Relative to the norm of each leaf."""
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b)


@partial(jax.jit, static_argnums=0)
def plain_gradients(model, params, fixed, grafts, trained, tokens, mask):
    """Loss and gradients of (shared, personal) next to `fixed` adapters, with dense experts and full logits."""

    def loss(trained):
        variables = {"params": params, "adapters": merge(fixed, *trained), "grafts": grafts}
        logits = model.apply(variables, tokens).logits[:, :-1]
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return (entropy * mask[:, 1:]).sum() / mask[:, 1:].sum()

    return jax.value_and_grad(loss)(trained)


def plain_client(model, frozen, shared, client, batches, learning_rate):
    """One client as a Python loop over its steps, every activation saved."""
    dense = Decoder(model.config, model.adapters, ExpertOps(dense_experts), remat=False)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, weight_decay=0.1))
    trained, losses = (shared, client.personal), []
    opt_state = optimizer.init(trained)
    for tokens, mask in zip(*batches, strict=True):
        value, gradients = plain_gradients(dense, frozen.params, frozen.adapters, client.grafts, trained, tokens, mask)
        updates, opt_state = optimizer.update(gradients, opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        losses.append(float(value))
    return trained, np.mean(losses)


@pytest.mark.parametrize("name", ["fedavg", "flex", "local", "ffa_lora", "fedsa_lora"])
def test_a_round_equals_a_loop_over_clients(name, prepared, one_round, spec_of, model, batches, examples):
    frozen, state = prepared(spec_of(name))
    after, metrics = one_round(spec_of(name), frozen, state)
    shared, personal, losses = [], [], []
    for number in range(N):
        client, data = of_client(state.clients, number), of_client(tuple(batches), number)
        trained, loss = plain_client(model, frozen, state.server.shared, client, data, float(cosine(0, OPTIMIZER)))
        shared.append(trained[0])
        personal.append(trained[1])
        losses.append(loss)
    assert_trees_close(after.server.shared, mean(shared, shares(examples, range(N))))
    assert_trees_close(after.clients.personal, stack(personal))
    np.testing.assert_allclose(metrics["clients"]["train_loss"], losses, rtol=1e-5)


@pytest.mark.parametrize("training", ["full", "lora"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_round_is_one_on_its_values(kind, training, params, spec_of, batches, examples, tmp_path):
    """Under vmap and remat; the slots start from the values too."""
    spec = spec_of("flex")
    config = spec.model.config
    save_pretrained(tmp_path, config, params)
    _, quantised = load_pretrained(tmp_path, quantisation=kind)
    slot = SlotConfig(training=training, lora=LoraConfig(2, 4.0))
    spec = spec._replace(model=spec.model.clone(adapters=replace(spec.model.adapters, slot=slot), remat=True))
    round_fn = make_round(spec, num_clients=N, optimizer=OPTIMIZER)
    grafted = np.arange(N * config.num_layers).reshape(N, -1, 1) % config.num_experts
    after = []
    for backbone in (quantised, jax.tree.map(dequantise, quantised, is_leaf=lambda leaf: isinstance(leaf, Quantised))):
        frozen, state, init_clients = start(spec, backbone, grafted, key=jax.random.PRNGKey(7))
        state = state._replace(clients=init_clients(np.arange(N)))
        after.append(round_fn(frozen, state, batches, np.arange(N), examples)[0])
    assert_trees_close(after[0].server.shared, after[1].server.shared, 1e-4)
    assert_trees_close(after[0].clients.personal, after[1].clients.personal, 1e-4)


def test_a_client_trains_the_same_whoever_else_takes_part(prepared, one_round, spec_of):
    local = spec_of("local")
    frozen, state = prepared(local)
    alone, _ = one_round(local, frozen, state, cohort=(2,))
    together, _ = one_round(local, frozen, state)
    assert_trees_close(*(of_client(after.clients.personal, 2) for after in (alone, together)))


def test_one_client_of_fedavg_is_that_client(prepared, one_round, spec_of):
    """The mean of a cohort of one is its only client's adapters: FedAvg and Local train the same."""
    fedavg, local = (one_round(spec, *prepared(spec), cohort=(1,))[0] for spec in map(spec_of, ("fedavg", "local")))
    assert_trees_close(fedavg.server.shared, of_client(local.clients.personal, 1))


def test_the_learning_rate_follows_a_cosine_over_rounds(prepared, one_round, spec_of):
    fedavg = spec_of("fedavg")
    frozen, state = prepared(fedavg)
    rates = []
    for _ in range(3):
        state, metrics = one_round(fedavg, frozen, state)
        rates.append(float(metrics["server"]["learning_rate"]))
    expected = [1e-3 + 0.5 * 9e-3 * (1 + np.cos(np.pi * r / 5)) for r in range(3)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_dropout_is_drawn_anew_in_every_round_and_the_same_again(prepared, spec_of, batches, examples):
    """The same state and batches at a constant rate: only the number of the round tells one call from another."""
    fedavg = spec_of("fedavg")
    lora = replace(fedavg.model.adapters.lora, dropout=0.5)
    dropping = fedavg.model.clone(adapters=replace(fedavg.model.adapters, lora=lora))
    optimizer = OPTIMIZER._replace(final_learning_rate=1e-2, weight_decay=0.0)
    round_fn = make_round(fedavg._replace(model=dropping), num_clients=N, optimizer=optimizer)

    def losses(number):
        frozen, state = prepared(fedavg)
        state = jax.tree.map(jnp.copy, state._replace(round=state.round + number))
        return round_fn(frozen, state, batches, np.arange(N), examples)[1]["clients"]["train_loss"]

    first = np.asarray(losses(0))
    np.testing.assert_array_equal(first, losses(0))
    assert not np.array_equal(first, losses(1))


def test_the_frozen_backbone_is_stored_once(prepared, round_of, spec_of, batches, examples, params):
    """The compiled round has no second copy of the backbone for each client: its scratch does not grow by one."""
    flex = spec_of("flex")
    frozen, state = prepared(flex)
    compiled = round_of(flex).lower(frozen, state, batches, np.arange(N, dtype=np.int32), examples).compile()
    for name in ("gate_up", "down"):
        shape = params["layers"]["moe"][name].shape
        for axes in ((N, *shape), (N, *shape[1:])):  # of all layers, or of one
            assert f"f32[{','.join(map(str, axes))}]" not in compiled.as_text()
