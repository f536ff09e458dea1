"""Replay a dump of the PyTorch peer (train.py --dump-parity) with our own rounds, and compare.

    python tests/parity/replay.py DUMP_DIR CHECKPOINT_DIR

It starts from the dump's initial weights and batches and repeats every round of its method. It compares the training
loss of each client and round, the shared weights, each client's personal weights, and for FLEx the experts that
reconstruct best. It prints one JSON line with the largest errors and exits 1 if they are above the bounds. A weight
whose gradient is of rounding size moves by up to the learning rate in a direction that rounding decides. So weights are
judged by ||difference|| / ||distance moved||.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import unflatten_dict

from flex_jax import load_pretrained
from flex_jax.data.batches import Batch
from flex_jax.federated.client import OptimizerSettings
from flex_jax.federated.federated_round import make_round
from flex_jax.federated.init import start
from flex_jax.federated.method import MethodSpec, Settings
from flex_jax.grafting.reconstruction import reconstruction_losses
from flex_jax.methods import METHODS
from flex_jax.models.adapters import AdapterConfig
from flex_jax.models.config import LoraConfig, SlotConfig
from flex_jax.models.export.peft import adapter_weights
from flex_jax.models.weight_map import WeightMapping

LOSS_BOUND, WEIGHTS_BOUND = 1e-4, 2e-3
MOMENTS = {name: f"fedopt_{name}" for name in ("eta", "tau", "beta1", "beta2")}
HPARAMS = {  # method -> {its hyperparameter: the dump's name for it}
    "fedprox": {"mu": "prox_mu"},
    "fedavgm": {"beta1": "fedopt_beta1"},
    "fedadagrad": {"eta": "fedopt_eta", "tau": "fedopt_tau"},
    "fedadam": MOMENTS,
    "fedyogi": MOMENTS,
}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def read_lora(config, rank: int, arrays, prefix: str) -> dict:
    """Returns the adapters tree of the dump's LoRA, whose names are PEFT's without their first part."""
    flat = {}
    for mapping in adapter_weights(config, rank):
        parts = [arrays[prefix + name.removeprefix("base_model.model.")].T for name, _ in mapping.parts()]
        flat[mapping.path] = jnp.asarray(np.stack(parts))
    return unflatten_dict(flat, sep="/")


def read_slot(config, arrays, prefix: str) -> dict:
    """Returns the adapters tree of one client's personal expert and gate."""
    layers = range(config.first_k_dense_replace, config.num_layers)

    def stacked(name):
        mapping = WeightMapping(name, (f"{prefix}model.layers.{{layer}}.mlp.{name}.weight",), (), layers=layers)
        return jnp.asarray(np.stack([arrays[name.format(layer=layer)].T for layer in layers for name in mapping.names]))

    slot = {name: {"kernel": stacked(f"side_expert.{name}")[:, None]} for name in PROJECTIONS}
    return {"layers": {"moe": {"slot": slot | {"gate": stacked("side_gate")}}}}


def distance(ours, theirs, first) -> float:
    """Returns ||ours - theirs|| / ||theirs - first||."""
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, theirs, first))
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, ours, theirs)) / moved)


def replay(dump: Path, checkpoint: Path) -> dict:
    """Returns the largest errors of our rounds against the dump's."""
    meta = json.loads((dump / "meta.json").read_text())
    init, data, steps = (np.load(dump / f"{name}.npz") for name in ("init", "batches", "steps"))
    method, num_clients, rank = meta["method"], meta["clients"], meta["lora_r"]
    if meta["side_lora"] or meta["router_aux_loss"] or meta["norm_topk_prob"] != "checkpoint":
        raise SystemExit("this dump has a slot by LoRA, a router loss or another norm_topk_prob: not replayed")
    model, params = load_pretrained(checkpoint)
    config = model.config
    model = model.clone(adapters=AdapterConfig(LoraConfig(rank, meta["lora_alpha"]), SlotConfig()))
    hparams = {name: meta[key] for name, key in HPARAMS.get(method, {}).items()}
    weighting = "uniform" if method in ("fedadagrad", "fedadam", "fedyogi") else "examples"
    spec = MethodSpec(model, METHODS[method](**hparams), Settings(weighting=weighting))
    grafted = np.array(meta["chosen"])[..., None] if method == "flex" else None
    frozen, state, init_clients = start(spec, params, grafted, key=jax.random.PRNGKey(0))
    lora = read_lora(config, rank, init, "shared/")

    def personal(arrays, c):
        if method == "flex":
            return read_slot(config, arrays, f"private{c}/")
        return read_lora(config, rank, arrays, "shared/" if arrays is init else f"local{c}/")

    errors = {"loss": 0.0, "shared": 0.0, "personal": 0.0}
    if method == "flex":
        errors["grafted_experts_that_differ"] = differing_experts(dump, model, params, grafted)
    has_personal = method in ("flex", "local")
    first = [personal(init, c) if has_personal else {} for c in range(num_clients)]
    shared = {} if method == "local" else lora
    clients = init_clients(np.arange(num_clients))
    state = state._replace(
        server=state.server._replace(shared=shared),
        clients=clients._replace(personal=jax.tree.map(lambda *leaves: jnp.stack(leaves), *first)),
    )
    _, _, _, weight_decay = meta["adam"]
    assert meta["adam"][:3] == [0.9, 0.999, 1e-8], f"AdamW with {meta['adam']}"
    optimizer = OptimizerSettings(meta["rounds"], meta["lr"], meta["min_lr"], weight_decay, meta["max_grad_norm"])
    round_fn = make_round(spec, num_clients=num_clients, optimizer=optimizer)
    examples = np.array(meta["samples"], np.float32)
    for number in range(meta["rounds"]):
        cohort = steps["clients"][number].astype(np.int32)
        batches = Batch(data["input_ids"][number].astype(np.int32), (data["labels"][number] != -100).astype(np.float32))
        state, metrics = round_fn(frozen, jax.tree.map(jnp.copy, state), batches, cohort, examples[cohort])
        losses = steps["losses"][number].mean(-1)
        errors["loss"] = max(errors["loss"], float(np.abs(metrics["clients"]["train_loss"] / losses - 1).max()))
        after = np.load(dump / f"round{number + 1}.npz")
        if shared:
            theirs = read_lora(config, rank, after, "shared/")
            errors["shared"] = max(errors["shared"], distance(state.server.shared, theirs, shared))
        for c in cohort if has_personal else ():
            ours = jax.tree.map(lambda leaf, c=c: leaf[c], state.clients.personal)
            errors["personal"] = max(errors["personal"], distance(ours, personal(after, c), first[c]))
    return {"method": method, "clients": num_clients, "rounds": meta["rounds"]} | errors


def differing_experts(dump: Path, model, params, grafted) -> int:
    """Returns how many grafted experts of the dump ours would not graft."""
    calibration, count = np.load(dump / "calibration.npz"), 0
    for c in range(len(grafted)):
        batch = calibration[f"calib_ids_{c}"].astype(np.int32), calibration[f"calib_mask_{c}"].astype(np.int32)
        best = reconstruction_losses(model, params, [batch]).argmin(-1)
        count += int((best != grafted[c, :, 0]).sum())
    return count


def main(arguments: list[str]) -> int:
    errors = replay(Path(arguments[0]), Path(arguments[1]))
    weights = max(errors["shared"], errors["personal"])
    right = errors["loss"] < LOSS_BOUND and weights < WEIGHTS_BOUND
    right = right and not errors.get("grafted_experts_that_differ")
    print(json.dumps(errors | {"ok": right}))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
