"""What the contract of a method promises: one `compose` for training and evaluation, checks first, exact bytes."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flex_jax.building import Backbone, build_spec
from flex_jax.config import default_config
from flex_jax.data.batches import Batch
from flex_jax.errors import InputError
from flex_jax.evaluation.loss import evaluation_loss
from flex_jax.federated.client import ClientModels, OptimizerSettings, client_variables
from flex_jax.federated.compression import tree_bytes
from flex_jax.federated.federated_round import make_round
from flex_jax.federated.init import start
from flex_jax.federated.method import ClientRule, Method, MethodSpec, ServerRule
from flex_jax.federated.state import NO_CLIENTS
from flex_jax.methods import make_method
from flex_jax.models.adapters import AdapterConfig
from flex_jax.models.checkpoint import empty_params, read_model_config
from flex_jax.models.config import LoraConfig, SlotConfig
from flex_jax.models.decoder import Decoder
from tests.federated.fixtures import OPTIMIZER
from tests.federated.helpers import STEPS, N, tree_map

MIXTRAL = Path(__file__).parents[2] / "benchmarks/shapes/Mixtral-8x7B-v0.1.json"


def shape_of(tree):
    return tree_map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)


@pytest.fixture
def composing(model):
    """(spec of a method whose model depends on all three arguments of `compose`, what `compose` was called with)."""
    calls = []

    def compose(*arguments, **others):
        calls.append(shape_of(arguments))
        assert not others
        adapters, client_extra, replicated = arguments
        factor = client_extra["factor"] if client_extra else 1.0
        shared, personal = adapters["shared"], adapters.get("personal")

        def leaf(path, leaf, own):
            if "lora_b" not in jax.tree_util.keystr(path):
                return leaf
            return leaf + factor * replicated["shift"] + own

        own = tree_map(jnp.zeros_like, shared) if personal is None else personal
        return jax.tree_util.tree_map_with_path(leaf, shared, own)

    def build(adapters, key):
        return {"shared": adapters, "personal": tree_map(lambda leaf: leaf + 0.1, adapters)}

    def update(server, context):
        return server._replace(extra={"shift": server.extra["shift"] + 0.1})

    method = Method(
        ownership=((r"shared/.*", "shared"), (r"personal/.*", "personal")),
        client=ClientRule(init_extra=lambda shared, client_id: {"factor": 1.0 + client_id}),
        server=ServerRule(
            init_extra=lambda shared, key: {"shift": jnp.float32(0.2)}, extra_visibility="replicated", update=update
        ),
        build=build,
        compose=compose,
    )
    return MethodSpec(model, method), calls


def test_a_client_is_evaluated_as_the_model_that_it_trains(composing, prepared, batches, examples):
    """At a learning rate of zero the losses of a round are those of evaluation before it, for two rounds.

    Each client's differs, because its model depends on its own extra state, and on what the server replicates.
    """
    spec, calls = composing
    frozen, state = prepared(spec)
    still = OPTIMIZER._replace(learning_rate=0.0, final_learning_rate=0.0)
    round_fn = make_round(spec, num_clients=N, optimizer=still)
    by_step = [Batch(batches.tokens[:, step], batches.loss_mask[:, step]) for step in range(STEPS)]
    seen = []
    for _ in range(2):
        calls.clear()
        models = ClientModels(spec, frozen, state.server, state.clients)
        expected = np.mean([evaluation_loss(models, [batch]) for batch in by_step], axis=0)
        evaluated = list(calls)
        calls.clear()
        state, metrics = round_fn(frozen, tree_map(jnp.copy, state), batches, np.arange(N), examples)
        np.testing.assert_allclose(metrics["clients"]["train_loss"], expected, rtol=1e-5)
        seen.append((evaluated, list(calls), expected))
    (evaluated, trained, first), (_, _, second) = seen
    assert evaluated and trained and all(call == evaluated[0] for call in evaluated + trained)
    assert len(evaluated[0]) == 3 and evaluated[0][1] and evaluated[0][2]
    assert np.ptp(first) > 1e-3 and np.abs(first - second).min() > 1e-4


def test_the_aggregated_model_is_composed_without_a_client(composing, prepared):
    """It gets the shared adapters and the replicated state; what is personal is missing."""
    spec, calls = composing
    frozen, state = prepared(spec)
    calls.clear()
    adapters = client_variables(spec, frozen, state.server, NO_CLIENTS)["adapters"]
    ((composed, client_extra, replicated),) = calls
    assert set(composed) == {"shared"} and client_extra == {} and set(replicated) == {"shift"}
    np.testing.assert_allclose(adapters["layers"]["attention"]["q_proj"]["lora_b"], 0.2)


@pytest.mark.parametrize("visibility", ["server", "broadcast", "replicated"])
def test_who_sees_the_servers_extra_state(visibility, composing, abstract):
    """Broadcast state is downloaded, so it counts as bytes; replicated state is not; other clients see none of it."""
    spec, _ = composing
    contexts = []

    def init_trained(context, loss):
        contexts.append(context)
        return ClientRule().init_trained(context, loss)

    method = spec.method._replace(
        client=spec.method.client._replace(init_trained=init_trained),
        server=spec.method.server._replace(extra_visibility=visibility),
        compose=lambda adapters, client_extra, replicated: adapters["shared"],
    )
    spec = spec._replace(method=method)
    frozen, state = abstract(spec)
    contexts.clear()
    round_fn = make_round(spec, num_clients=N, optimizer=OPTIMIZER)
    batch = Batch(np.zeros((N, 1, 1, 4), np.int32), np.ones((N, 1, 1, 4), np.float32))
    _, metrics = jax.eval_shape(round_fn, frozen, state, batch, np.arange(N), np.ones(N, np.float32))
    seen = {"server": ({}, {}), "broadcast": ({"shift"}, {}), "replicated": ({}, {"shift"})}[visibility]
    assert all((set(c.download.extra), set(c.replicated)) == tuple(map(set, seen)) for c in contexts) and contexts
    shared = tree_bytes(state.server.shared)
    assert metrics["clients"]["download_bytes"].fixed == shared + (4 if visibility == "broadcast" else 0)


REFUSED = {  # method: (hyperparameters, change of the config, error)
    "fedmoe": ({}, {"server": {"aggregation": "geometric_median"}}, "config.server.aggregation is .*must be mean"),
    "fedamole": ({}, {"server": {"aggregation": "median"}}, "config.server.aggregation is 'median': .*must be mean"),
    "flora": (
        {},
        {"client": {"compression": "topk"}},
        "config.client.compression is 'topk': .*none or bfloat16 or int8",
    ),
    "flexlora": ({}, {"server": {"clip_norm": 1.0}}, "config.server.clip_norm is 1.0: .*must be 0"),
    "hetlora": ({"ranks": (2, 64)}, {}, r"ranks is \(2, 64\): must be at most config.lora.rank, 32"),
    "fedper": ({"personal_layers": 3}, {}, "personal_layers is 3: must be below 3, the model's layers"),
    "fedrep": ({"personal_layers": 7}, {}, "personal_layers is 7: must be below 3, the model's layers"),
}
RANKED = [(name, {"ranks": (1, 33)}, {}, r"ranks is \(1, 33\): must be at most") for name in ("flora", "flexlora")]


@pytest.mark.parametrize(
    ("name", "hparams", "changes", "message"), [*((name, *row) for name, row in REFUSED.items()), *RANKED]
)
def test_impossible_settings_are_refused_before_anything_is_built(name, hparams, changes, message, model_config):
    """The backbone has no parameters yet: whatever made a state from them would fail in another way."""
    config = default_config()
    config.update(changes)
    backbone = Backbone(Decoder(model_config), {}, None)
    with pytest.raises(InputError, match=message) as caught:
        build_spec(config, backbone, make_method(name, hparams))
    assert "\n" not in str(caught.value)
    assert build_spec(default_config(), backbone, make_method(name)).method is make_method(name)


def test_an_upload_of_more_than_four_gib_is_traced_and_counted_exactly():
    """FedMoE with whole experts of Mixtral, from shapes alone: a client's expert of each layer is 22.5 GB."""
    config = read_model_config(MIXTRAL)
    method = make_method("fedmoe")
    adapters = AdapterConfig(LoraConfig(2, 4.0), SlotConfig(gate="routing"), method.projection)
    spec = MethodSpec(Decoder(config, adapters), method)
    experts = np.zeros((2, config.num_layers, 1), np.int32)

    def begin(params):
        run = start(spec, params, experts, key=jax.random.PRNGKey(0))
        return run.frozen, run.state._replace(clients=run.init_clients(np.arange(2)))

    params = jax.eval_shape(lambda: empty_params(config, dtype="bfloat16"))
    frozen, state = jax.eval_shape(begin, params)
    batch = Batch(np.zeros((2, 1, 1, 8), np.int32), np.ones((2, 1, 1, 8), np.float32))
    round_fn = make_round(spec, num_clients=2, optimizer=OptimizerSettings(5, 1e-4, 1e-6))
    _, metrics = jax.eval_shape(round_fn, frozen, state, batch, np.arange(2), np.ones(2, np.float32))
    expert = 3 * 4096 * 14336
    lora = 2 * (4096 + 4096 + 2 * (4096 + 1024))
    assert 32 * (expert + lora) * 4 == math.prod((32, 4, expert + lora)) > 5 * 2**32
    assert metrics["clients"]["download_bytes"].fixed == 32 * (expert + lora) * 4
    assert metrics["clients"]["upload_bytes"].fixed == 32 * (expert + lora) * 4 + 32 * 4  # and the experts' numbers
    assert metrics["clients"]["upload_bytes"].units.shape == (2,)
