"""A round over eight virtual devices against the round on one. This file is also the program that has the devices."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

SHAPE = Path(__file__).parents[2] / "benchmarks/shapes/tiny.json"
MESHES = {"8x1x1": (8, 1, 1), "2x4x1": (2, 4, 1), "2x2x2": (2, 2, 2)}
RUNS = [
    *((name, "flex", "full", "none") for name in MESHES),
    ("2x2x2", "flex", "lora", "int4"),
    ("2x4x1", "ditto", "full", "none"),
]
HPARAMS = {"ditto": {"lambda_": 3.0}}  # so strong that a term counted twice would show
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
C, STEPS, B, S = 8, 2, 4, 16


def collectives(text):
    """{kind: elements of all results} in the text of a compiled program."""
    found = dict.fromkeys(KINDS, 0)
    for result, kind in re.findall(rf"= (.+?) ({'|'.join(KINDS)})(?:-start)?\(", text):
        shapes = re.findall(r"\w\d+\[([\d,]*)\]", result)
        found[kind] += sum(math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes)
    return {kind: elements for kind, elements in found.items() if elements}


def main():
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import NamedSharding

    from flex_jax.data.batches import Batch
    from flex_jax.federated.client import OptimizerSettings
    from flex_jax.federated.cohort_sharding import place
    from flex_jax.federated.federated_round import make_round
    from flex_jax.federated.init import start
    from flex_jax.federated.method import MethodSpec
    from flex_jax.federated.state import RoundInputs
    from flex_jax.methods import make_method
    from flex_jax.models.adapters import AdapterConfig
    from flex_jax.models.checkpoint import empty_params, read_model_config
    from flex_jax.models.config import LoraConfig, SlotConfig
    from flex_jax.models.decoder import Decoder
    from flex_jax.models.sharding import make_mesh, param_specs

    config = read_model_config(SHAPE)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (C, STEPS, B, S)).astype(np.int32)
    mask = (rng.random(tokens.shape) < 0.5).astype(np.float32)  # rows and devices have different numbers of targets
    data = Batch(tokens, mask), np.arange(C, dtype=np.int32), np.arange(1, 1 + C, dtype=np.float32)

    def random(leaf):  # NumPy, so that a mesh and one device both take it
        if leaf.dtype == np.uint8:
            return rng.integers(0, 256, leaf.shape).astype(np.uint8)
        return (0.1 * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    def one_round(spec, params, mesh):
        grafted = np.arange(C * config.num_layers).reshape(C, -1, 1) % config.num_experts
        frozen, state, init_clients = start(spec, params, grafted, key=jax.random.PRNGKey(1))
        optimizer = OptimizerSettings(
            num_rounds=5, learning_rate=1e-2, final_learning_rate=1e-3, weight_decay=0.1, clip_norm=1.0
        )
        round_fn = make_round(spec, num_clients=C, optimizer=optimizer, mesh=mesh)
        inputs = RoundInputs(frozen, state._replace(clients=init_clients(np.arange(C))), *data)
        inputs = place(mesh, inputs) if mesh else inputs
        compiled = round_fn.lower(*inputs).compile()
        stored = jax.tree.leaves(jax.tree.map(jnp.asarray, inputs.frozen.params))
        facts = {
            "collectives": collectives(compiled.as_text()),
            "share": sum(leaf.addressable_shards[0].data.nbytes for leaf in stored)
            / sum(leaf.nbytes for leaf in stored),
            "shared": sum(leaf.size for leaf in jax.tree.leaves(state.server.shared)),
        }
        after, metrics = compiled(*inputs)
        losses = {name: metrics["clients"][name] for name in ("train_loss", "grad_norm")}
        sent = {way: metrics["clients"][f"{way}_bytes"].tolist() for way in ("upload", "download")}
        return facts | sent, jax.device_get((after.server.shared, after.clients.personal, losses))

    def scratch_of_a_forward_pass(mesh):
        """Over the bytes of all experts, where the compiler divides the work as evaluation leaves it to."""
        deep = replace(config, num_layers=16)
        shapes = jax.eval_shape(lambda: empty_params(deep, dtype="float32", quantisation=None))
        params = jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)),
            shapes,
            param_specs(mesh, shapes),
        )
        forward = jax.jit(lambda params, tokens: Decoder(deep, stacked=False).apply({"params": params}, tokens).logits)
        memory = forward.lower(params, jnp.zeros((2, 16), jnp.int32)).compile().memory_analysis()
        experts = sum(shapes["layers"]["moe"][name].size * 4 for name in ("gate_up", "down"))
        return memory.temp_size_in_bytes / experts

    for mesh, method, training, quantisation in RUNS:
        kind = None if quantisation == "none" else quantisation
        shapes = jax.eval_shape(lambda kind=kind: empty_params(config, dtype="float32", quantisation=kind))
        params = jax.tree.map(random, shapes)
        slot = SlotConfig(training=training, lora=LoraConfig(2, 4.0))
        model = Decoder(config, AdapterConfig(LoraConfig(2, 4.0), slot))
        spec = MethodSpec(model, make_method(method, HPARAMS.get(method)))
        expected_facts, expected = one_round(spec, params, None)
        facts, ours = one_round(spec, params, make_mesh(*MESHES[mesh]))
        facts["sent"] = [[each[way] for way in ("upload", "download")] for each in (facts, expected_facts)]
        facts["scratch"] = scratch_of_a_forward_pass(make_mesh(*MESHES[mesh]))
        # Of each tree as a whole, because Adam moves an entry with a gradient of rounding size as far as all others.
        facts["error"] = max(
            float(optax.tree.norm(optax.tree.sub(a, b)) / optax.tree.norm(b))
            for a, b in zip(ours, expected, strict=True)
            if jax.tree.leaves(b)
        )
        print(json.dumps(facts), flush=True)


@pytest.fixture(scope="module")
def rounds():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(RUNS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("run", RUNS, ids="-".join)
class TestRoundOverAMesh:
    def test_it_gives_what_one_device_gives(self, run, rounds):
        assert rounds[run]["error"] < 1e-5

    def test_it_counts_the_bytes_that_one_device_counts(self, run, rounds):
        ours, expected = rounds[run]["sent"]
        assert ours == expected and all(len(set(way)) == 1 and way[0] > 0 for way in ours)

    def test_a_device_stores_its_share_of_the_backbone(self, run, rounds):
        _, fsdp, expert = MESHES[run[0]]
        assert rounds[run]["share"] <= 1.02 / (fsdp * expert)  # vectors are everywhere

    def test_evaluation_gathers_no_more_than_a_layer(self, run, rounds):
        assert rounds[run]["scratch"] < 0.3  # of all experts; a layer is 1/16

    def test_it_has_the_collectives_of_its_axes_and_no_other(self, run, rounds):
        _, fsdp, expert = MESHES[run[0]]
        named = {"all-reduce"} | ({"all-gather"} if fsdp * expert > 1 else set())
        assert set(rounds[run]["collectives"]) == named | ({"reduce-scatter"} if expert > 1 else set())


def test_between_clients_go_the_shared_adapters_and_nothing_else(rounds):
    """In size: what devices with clients of their own add up is the mean change, and the sum of examples."""
    facts = rounds["8x1x1", "flex", "full", "none"]
    assert facts["shared"] <= facts["collectives"]["all-reduce"] <= facts["shared"] + 1


if __name__ == "__main__":
    main()
