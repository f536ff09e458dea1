"""A round of a vmapped cohort against a loop over clients written out with optax, and who hands what to whom."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flex_jax import load_pretrained
from flex_jax.federated.method import Recipe
from flex_jax.federated.placement import merge
from flex_jax.federated.round import cosine, make_round
from flex_jax.federated.start import start
from flex_jax.methods import METHODS
from flex_jax.models.checkpoint import save_pretrained
from flex_jax.models.config import LoraConfig, SlotConfig
from flex_jax.models.decoder import Decoder
from flex_jax.ops.experts import Experts, dense_experts
from flex_jax.ops.quantised import Quantised, dequantise


def assert_trees_close(ours, expected, bound=1e-5):
    """Relative to the norm of each leaf."""
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b)


@partial(jax.jit, static_argnums=0)
def plain_gradients(model, params, fixed, grafts, trained, tokens, mask):
    """Loss and gradients of (shared, personal) beside `fixed` adapters, with dense experts and full logits."""

    def loss(trained):
        variables = {"params": params, "adapters": merge(fixed, *trained), "grafts": grafts}
        logits = model.apply(variables, tokens).logits[:, :-1]
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return (entropy * mask[:, 1:]).sum() / mask[:, 1:].sum()

    return jax.value_and_grad(loss)(trained)


def plain_client(model, frozen, shared, client, batches, learning_rate):
    """One client as a Python loop over its steps, every activation kept."""
    dense = Decoder(model.config, model.adapters, Experts(dense_experts), remat=False)
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
def test_a_round_equals_a_loop_over_clients(name, prepared, one_round, model, batches, examples):
    frozen, state = prepared(name)
    after, metrics = one_round(name, frozen, state)
    shared, personal, losses = [], [], []
    for client in range(len(examples)):
        own = jax.tree.map(lambda leaf, c=client: leaf[c], state.clients)
        data = [leaf[client] for leaf in batches]
        trained, loss = plain_client(model, frozen, state.server.shared, own, data, float(cosine(0, 5, 1e-2, 1e-3)))
        shared.append(trained[0])
        personal.append(trained[1])
        losses.append(loss)
    weights = examples / examples.sum()
    mean = jax.tree.map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *shared)
    assert_trees_close(after.server.shared, mean)
    assert_trees_close(after.clients.personal, jax.tree.map(lambda *leaves: jnp.stack(leaves), *personal))
    np.testing.assert_allclose(metrics["clients"]["train_loss"], losses, rtol=1e-5)


@pytest.mark.parametrize("training", ["full", "lora"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_round_is_one_on_its_values(kind, training, params, model, batches, examples, tmp_path):
    """Under vmap and remat; the slots start from the values too."""
    save_pretrained(tmp_path, model.config, params)
    _, held = load_pretrained(tmp_path, quantisation=kind)
    slot = SlotConfig(training=training, lora=LoraConfig(2, 4.0))
    adapters = replace(model.adapters, slot=slot)
    model = model.clone(adapters=adapters, remat=True)
    settings = dict(rounds=5, learning_rate=1e-2, final_learning_rate=1e-3, weight_decay=0.1, clip_norm=1.0)
    recipe = Recipe(model, METHODS["flex"])
    round_fn = make_round(recipe, clients=4, **settings)
    chosen = np.arange(4 * model.config.layers).reshape(4, -1, 1) % model.config.experts
    after = []
    for backbone in (held, jax.tree.map(dequantise, held, is_leaf=lambda leaf: isinstance(leaf, Quantised))):
        frozen, state, clients = start(recipe, backbone, chosen, key=jax.random.PRNGKey(7))
        state = state._replace(clients=clients(np.arange(4)))
        after.append(round_fn(frozen, state, batches, np.arange(4), examples)[0])
    assert_trees_close(after[0].server.shared, after[1].server.shared, 1e-4)
    assert_trees_close(after[0].clients.personal, after[1].clients.personal, 1e-4)


def test_a_client_trains_alike_whoever_else_takes_part(prepared, one_round):
    frozen, state = prepared("local")
    alone, _ = one_round("local", frozen, state, cohort=(2,))
    together, _ = one_round("local", frozen, state)
    third = [jax.tree.map(lambda leaf: leaf[2], after.clients.personal) for after in (alone, together)]
    assert_trees_close(*third)


def test_one_client_of_fedavg_is_that_client(prepared, one_round):
    """With a cohort of one the mean is its own adapters: FedAvg and Local train the same."""
    frozen, state = prepared("fedavg")
    fedavg, _ = one_round("fedavg", frozen, state, cohort=(1,))
    local, _ = one_round("local", *prepared("local"), cohort=(1,))
    assert_trees_close(fedavg.server.shared, jax.tree.map(lambda leaf: leaf[1], local.clients.personal))


def test_the_learning_rate_follows_a_cosine_over_rounds(prepared, one_round):
    frozen, state = prepared("fedavg")
    rates = []
    for _ in range(3):
        state, metrics = one_round("fedavg", frozen, state)
        rates.append(float(metrics["server"]["learning_rate"]))
    expected = [1e-3 + 0.5 * 9e-3 * (1 + np.cos(np.pi * r / 5)) for r in range(3)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_dropout_is_drawn_anew_in_every_round_and_the_same_again(prepared, model, batches, examples):
    """The same state and batches at a constant rate: only the number of the round tells one call from another."""
    lora = replace(model.adapters.lora, dropout=0.5)
    dropping = model.clone(adapters=replace(model.adapters, lora=lora))
    numbers = dict(rounds=5, learning_rate=1e-2, final_learning_rate=1e-2, weight_decay=0.0, clip_norm=1.0)
    round_fn = make_round(Recipe(dropping, METHODS["fedavg"]), clients=4, **numbers)

    def losses(number):
        frozen, state = prepared("fedavg")
        state = state._replace(round=state.round + number)
        return round_fn(frozen, state, batches, np.arange(len(examples)), examples)[1]["clients"]["train_loss"]

    first = np.asarray(losses(0))
    np.testing.assert_array_equal(first, losses(0))
    assert not np.array_equal(first, losses(1))


def test_the_frozen_backbone_is_stored_once(prepared, round_of, batches, examples, params):
    """The compiled round holds no second copy of the backbone per client: its scratch does not grow by one."""
    frozen, state = prepared("flex")
    compiled = round_of("flex").lower(frozen, state, batches, np.arange(4, dtype=np.int32), examples).compile()
    for name in ("gate_up", "down"):
        shape = params["layers"]["moe"][name].shape
        for axes in ((4, *shape), (4, *shape[1:])):  # of all layers, or of one
            assert f"f32[{','.join(map(str, axes))}]" not in compiled.as_text()
