"""Generation for all clients at once against a loop without a cache, and samples against their distribution."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flex_jax.data.batches import Batch
from flex_jax.evaluation.generation import GenerationSettings, Sampling, generate, generate_tokens, pad_prompts
from flex_jax.evaluation.loss import evaluation_loss
from flex_jax.federated.client import ClientModels
from flex_jax.federated.init import start
from flex_jax.federated.method import MethodSpec
from flex_jax.federated.state import ServerState
from flex_jax.methods import make_method
from flex_jax.models.config import Rope
from flex_jax.models.decoder import Decoder

NEW, CLIENTS = 6, 4
LATENT = {  # the Qwen2-MoE of the other tests as a DeepSeek-V2: latent attention, a dense first layer, expert groups
    "family": "deepseek_v2",
    "num_kv_heads": 4,
    "head_dim": 0,
    "attention_bias": False,
    "shared_expert_gate": False,
    "first_k_dense_replace": 1,
    "intermediate_size": 20,
    "n_group": 3,
    "topk_group": 2,
    "kv_lora_rank": 6,
    "q_lora_rank": 5,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 3,
}


@pytest.fixture(scope="session", params=["qwen2_moe", "deepseek_v2"])
def model_config(request, model_config):
    """In place of the one that all tests use; `model` and `params` follow."""
    return dataclasses.replace(model_config, **LATENT) if request.param == "deepseek_v2" else model_config


@pytest.fixture(scope="module")
def models(model, model_config, params):
    """Four FLEx clients whose adapters have moved away from their start."""
    experts = np.arange(CLIENTS * model_config.num_moe_layers).reshape(CLIENTS, -1, 1) % model_config.num_experts
    spec = MethodSpec(model, make_method("flex"))
    frozen, state, init_clients = start(spec, params, experts, key=jax.random.PRNGKey(0))
    clients = init_clients(np.arange(CLIENTS))
    keys = iter(jax.random.split(jax.random.PRNGKey(1), 100))
    moved = [
        jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), tree)
        for tree in (state.server.shared, clients.personal)
    ]
    return ClientModels(spec, frozen, ServerState(moved[0], {}), clients._replace(personal=moved[1]))


def one_client(models, client):
    """The model of this client alone."""
    clients = jax.tree.map(lambda leaf: leaf[client : client + 1], models.clients)
    return dataclasses.replace(models, clients=clients)


def draw_keys(clients, rows):
    return jax.random.split(jax.random.key(7), (clients, rows))


def random_prompts(lengths):
    rng = np.random.default_rng(0)
    return [[rng.integers(0, 60, length).tolist() for length in own] for own in lengths]


@partial(jax.jit, static_argnums=0)
def apply(model, variables, tokens):
    return model.apply(variables, tokens).logits


def logits_of(models, client, ids):
    """Logits [len(ids), V] of one client, without a cache (the sequence is padded so that one compilation serves)."""
    variables = models.variables(jax.tree.map(lambda leaf: leaf[client], models.clients))
    padded = jnp.array([[*ids, *[0] * (16 - len(ids))]], jnp.int32)
    return apply(models.spec.model, variables, padded)[0, : len(ids)]


def naive(models, client, prompt, end):
    ids = list(prompt)
    for _ in range(NEW):
        ids.append(int(logits_of(models, client, ids)[-1].argmax()))
        if ids[-1] == end:
            break
    new = ids[len(prompt) :]
    return new + [end] * (NEW - len(new))


def test_every_row_equals_the_loop_of_its_own_client(models):
    prompts = random_prompts([[3, 9], [5, 1], [7, 4], [2, 8]])
    tokens, lengths = pad_prompts(prompts, 0)
    free = naive(models, 1, prompts[1][0], -1)
    end = free[2]  # a token that this row says by itself: it must stop there
    new = generate(models, tokens, lengths, max_new_tokens=NEW, end=end)
    expected = [[naive(models, c, prompt, end) for prompt in client] for c, client in enumerate(prompts)]
    assert np.asarray(new).tolist() == expected


@pytest.mark.parametrize("sampled", [False, True])
def test_a_mixed_batch_equals_one_call_a_client(models, sampled):
    tokens, lengths = pad_prompts(random_prompts([[3, 9], [5, 1], [7], [2, 8]]), 0)
    sampling = Sampling(draw_keys(CLIENTS, 2), 1.5, 0.9) if sampled else None
    call = partial(generate, max_new_tokens=NEW, end=-1)
    mixed = call(models, tokens, lengths, sampling=sampling)
    for c in range(CLIENTS):
        own = sampling and sampling._replace(keys=sampling.keys[c : c + 1])
        alone = call(one_client(models, c), tokens[c : c + 1], lengths[c : c + 1], sampling=own)
        np.testing.assert_array_equal(mixed[c], alone[0])
    assert len({tuple(row) for row in np.asarray(mixed)[:, 0].tolist()}) == CLIENTS


def test_a_tiny_nucleus_and_a_tiny_temperature_are_greedy(models):
    tokens, lengths = pad_prompts(random_prompts([[3, 9], [5, 1], [7, 4], [2, 8]]), 0)
    call = partial(generate, models, tokens, lengths, max_new_tokens=NEW, end=-1)
    greedy = call()
    for temperature, top_p in [(2.0, 1e-6), (1e-30, 1.0), (1e-42, 0.5)]:
        sampling = Sampling(draw_keys(CLIENTS, 2), temperature, top_p)
        np.testing.assert_array_equal(call(sampling=sampling), greedy)
    assert (call(sampling=Sampling(draw_keys(CLIENTS, 2), 2.0, 1.0)) != greedy).any()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.7, 0.8), (0.6, 0.95)])
def test_samples_have_the_frequencies_of_the_nucleus(models, temperature, top_p):
    """Both of the first token and of the second where the first was the most frequent one."""
    prompt, rows = [5, 17, 40], 4000
    tokens, lengths = pad_prompts([[prompt] * rows], 0)
    sampling = Sampling(draw_keys(1, rows), temperature, top_p)
    new = generate(one_client(models, 2), tokens, lengths, max_new_tokens=2, end=-1, sampling=sampling)
    first, second = np.asarray(new)[0].T
    common = np.bincount(first).argmax()
    for ids, drawn in ((prompt, first), ([*prompt, common], second[first == common])):
        logits = np.asarray(logits_of(models, 2, ids), np.float64)[-1] / temperature
        expected = np.exp(logits - logits.max())
        expected /= expected.sum()
        order = np.argsort(-expected)
        size = 60 if top_p == 1 else np.searchsorted(np.cumsum(expected[order]), top_p) + 1
        expected[order[size:]] = 0
        expected /= expected.sum()
        frequency = np.bincount(drawn, minlength=60) / len(drawn)
        assert (frequency[expected == 0] == 0).all() and (expected > 0.05).sum() > 1
        assert (np.abs(frequency - expected) <= 5 * np.sqrt(expected / len(drawn))).all()


def test_samples_do_not_depend_on_how_the_prompts_are_batched(models):
    prompts = random_prompts([[3, 9, 6], [5, 0, 8], [7], [2, 8]])
    sampling = Sampling(draw_keys(CLIENTS, 3), 2.0, 1.0)

    def call(prompts, end, batch_size):
        return generate_tokens(models, prompts, GenerationSettings(end, NEW, batch_size), sampling)

    end = call(prompts, -1, 3)[0][1][1]
    answers = call(prompts, end, 3)
    assert answers == call(prompts, end, 2)
    assert list(map(len, answers)) == [3, 3, 1, 2]
    assert len(answers[0][1]) <= 1 and answers[1][1] == [] and not any(end in ids for own in answers for ids in own)
    alone = [prompts[0], [[1], [2], prompts[1][2]], [[3]], [[4]]]  # other neighbours
    again = call(alone, end, 3)
    assert again[0] == answers[0] and again[1][2] == answers[1][2] and again[2] != answers[2]


def test_dynamic_rope_goes_by_the_length_of_each_prompt(model, params):
    """Not by that of the padded batch."""
    rope = Rope(theta=100.0, kind="dynamic", factor=8.0, trained_length=3)
    model = Decoder(dataclasses.replace(model.config, rope=rope))
    tokens, lengths = pad_prompts(random_prompts([[2, 4, 6, 8, 10, 12, 14, 16]]), 0)
    spec = MethodSpec(model, make_method("fedavg"))
    frozen, state, init_clients = start(spec, params, None, key=jax.random.PRNGKey(0))
    models = ClientModels(spec, frozen, state.server, init_clients(np.arange(1)))
    first = generate(models, tokens, lengths, max_new_tokens=1, end=-1)
    mask = np.arange(tokens.shape[2]) < lengths[0][:, None]
    logits = model.apply({"params": params}, tokens[0], mask).logits
    assert np.asarray(first)[0, :, 0].tolist() == logits[np.arange(8), lengths[0] - 1].argmax(-1).tolist()


def test_evaluation_loss_is_the_mean_over_response_tokens(models):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 60, (CLIENTS, 4, 8)).astype(np.int32)
    mask = (rng.random((CLIENTS, 4, 8)) < 0.5).astype(np.float32)
    mask[..., 0] = 0
    halves = [Batch(tokens[:, rows], mask[:, rows]) for rows in (slice(0, 2), slice(2, 4))]
    losses = evaluation_loss(models, halves)
    for c in range(CLIENTS):
        terms = [
            -jax.nn.log_softmax(logits_of(models, c, tokens[c, b]))[t - 1, tokens[c, b, t]]
            for b in range(4)
            for t in range(8)
            if mask[c, b, t]
        ]
        np.testing.assert_allclose(losses[c], np.mean(terms), rtol=1e-5)
