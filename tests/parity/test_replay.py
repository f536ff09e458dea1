"""The replay of a dump, on a dump of our own making: what it finds equal, and that it finds what is not."""

import json

import jax
import numpy as np
import pytest

from flex_jax.data.batches import Batch
from flex_jax.federated.client import OptimizerSettings
from flex_jax.federated.federated_round import make_round
from flex_jax.federated.init import start
from flex_jax.federated.method import MethodSpec
from flex_jax.methods import make_method
from flex_jax.models.adapters import AdapterConfig
from flex_jax.models.checkpoint import save_pretrained
from flex_jax.models.config import LoraConfig
from flex_jax.models.export.peft import adapter_weights
from tests.parity import replay

N, ROUNDS, STEPS, B, S = 3, 2, 2, 2, 8


def named(config, tree, prefix):
    """The arrays of a LoRA tree under the dump's names."""
    attention = tree["layers"]["attention"]
    arrays = {}
    for mapping in adapter_weights(config, 2):
        _, _, name, leaf = mapping.path.split("/")
        for on_disk, array in mapping.disassemble(np.asarray(attention[name][leaf])):
            arrays[prefix + on_disk.removeprefix("base_model.model.")] = array
    return arrays


@pytest.fixture
def dump(tmp_path, model, model_config, params):
    """What the peer would write of two rounds of SCAFFOLD, from our own rounds."""
    save_pretrained(tmp_path / "checkpoint", model_config, params)
    spec = MethodSpec(model.clone(adapters=AdapterConfig(LoraConfig(2, 4.0))), make_method("scaffold"))
    frozen, state, init_clients = start(spec, params, None, key=jax.random.PRNGKey(0))
    state = state._replace(clients=init_clients(np.arange(N)))
    folder = tmp_path / "dump"
    folder.mkdir()
    np.savez(folder / "init.npz", **named(model_config, state.server.shared, "shared/"))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 60, (ROUNDS, N, STEPS, B, S))
    labels = np.where(np.arange(S) < 3, -100, ids)
    np.savez(folder / "batches.npz", input_ids=ids, labels=labels, attention_mask=np.ones_like(ids))
    optimizer = OptimizerSettings(num_rounds=ROUNDS, learning_rate=1e-3, final_learning_rate=1e-6)
    round_fn = make_round(spec, num_clients=N, optimizer=optimizer)
    losses = []
    for number in range(ROUNDS):
        batches = Batch(ids[number].astype(np.int32), (labels[number] != -100).astype(np.float32))
        state, metrics = round_fn(frozen, state, batches, np.arange(N), np.array([1.0, 2.0, 3.0], np.float32))
        losses.append(np.asarray(metrics["clients"]["train_loss"])[:, None].repeat(STEPS, 1))
        np.savez(folder / f"round{number + 1}.npz", **named(model_config, state.server.shared, "shared/"))
    everyone = np.broadcast_to(np.arange(N), (ROUNDS, N))
    np.savez(folder / "steps.npz", losses=np.array(losses), clients=everyone)
    meta = {
        "method": "scaffold",
        "clients": N,
        "rounds": ROUNDS,
        "lora_r": 2,
        "lora_alpha": 4.0,
        "lr": 1e-3,
        "min_lr": 1e-6,
        "max_grad_norm": 1.0,
        "prox_mu": 0.01,
        "fedopt_eta": 1e-3,
        "fedopt_tau": 1e-3,
        "fedopt_beta1": 0.9,
        "fedopt_beta2": 0.99,
        "side_lora": False,
        "router_aux_loss": False,
        "norm_topk_prob": "checkpoint",
        "samples": [1, 2, 3],
        "chosen": None,
        "adam": [0.9, 0.999, 1e-8, 0.0],
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder, tmp_path / "checkpoint"


def test_a_right_dump_passes_and_a_wrong_one_does_not(dump, capsys):
    arguments = [str(path) for path in dump]
    assert replay.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["shared"] < 1e-4
    file = dump[0] / "round2.npz"
    np.savez(file, **{name: array + (1e-5 if "lora_B" in name else 0) for name, array in np.load(file).items()})
    assert replay.main(arguments) == 1
    assert json.loads(capsys.readouterr().out)["shared"] > 2e-3
