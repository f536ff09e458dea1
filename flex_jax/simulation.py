"""One simulated run: graft, train round by round, evaluate. What it is given is built once for all runs."""

import itertools
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flex_jax import tiny
from flex_jax.config import for_method
from flex_jax.data.batches import ClientDataset, calibration_batches, round_batches
from flex_jax.data.prompts import check_tokenizer
from flex_jax.errors import InputError
from flex_jax.evaluation.evaluate import HeldOut, evaluate
from flex_jax.evaluation.loss import evaluation_loss
from flex_jax.federated.checkpoint import Checkpoints
from flex_jax.federated.cohort import sample_cohort
from flex_jax.federated.plan import plan
from flex_jax.federated.round import make_round
from flex_jax.federated.rules import Settings
from flex_jax.federated.start import start
from flex_jax.federated.state import Frozen, RoundState
from flex_jax.grafting.selection import select
from flex_jax.methods import METHODS
from flex_jax.models.checkpoint import find_checkpoint, load_pretrained
from flex_jax.models.config import AdapterConfig, LoraConfig, SlotConfig
from flex_jax.models.decoder import Decoder
from flex_jax.models.peft import load_adapter
from flex_jax.reporting.writers import MetricsWriter, read_metrics

# What is folded into a run's key for the choices made outside of its rounds.
GRAFT_KEY, COHORT_KEY = 1, 2


class Backbone(NamedTuple):
    """A pretrained model with its tokenizer, loaded once for all runs."""

    model: Decoder
    params: dict
    tokenizer: PreTrainedTokenizerBase


class Federation(NamedTuple):
    """The clients' data of one seed."""

    train: list[ClientDataset]
    held_out: HeldOut


class Run(NamedTuple):
    """One method with one seed, ready for its first round."""

    model: Decoder
    frozen: Frozen
    state: RoundState


def checkpoint_name(config: ConfigDict) -> str:
    """The checkpoint directory or Hub name that config.model.path stands for."""
    return str(tiny.CHECKPOINT) if config.model.path == "tiny" else config.model.path


def load_backbone(config: ConfigDict) -> Backbone:
    """The model, frozen parameters and tokenizer of config.model."""
    path = find_checkpoint(checkpoint_name(config))
    quantisation = None if config.model.quantisation == "none" else config.model.quantisation
    model, params = load_pretrained(path, dtype=config.model.dtype, quantisation=quantisation)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:  # transformers does not check its files
        raise InputError(f"{path}: no usable tokenizer in the checkpoint directory ({error})") from error
    check_tokenizer(tokenizer, model.config.vocab_size)
    return Backbone(model.clone(remat=config.model.remat), params, tokenizer)


def adapter_config(config: ConfigDict) -> AdapterConfig:
    """The adapters that a method's config asks for."""
    lora = LoraConfig(config.lora.rank, config.lora.alpha, config.lora.dropout)
    slot_lora = LoraConfig(config.slot.rank, config.slot.alpha, config.lora.dropout)
    return AdapterConfig(lora, SlotConfig(config.slot.experts, config.slot.training, slot_lora, config.slot.gate_init))


def method_settings(config: ConfigDict) -> Settings:
    """The numbers that methods are configured with."""
    server = config.server
    return Settings(
        config.client.proximal_mu, server.learning_rate, server.tau, server.beta1, server.beta2, server.weighting
    )


def prepare(config: ConfigDict, backbone: Backbone, name: str, chosen: np.ndarray | None, key: jax.Array) -> Run:
    """Round 0 of a method, `config` being its own. Raises InputError when config.lora.path is no fitting adapter."""
    adapters = adapter_config(config)
    model = backbone.model.clone(adapters=adapters)
    lora = load_adapter(config.lora.path, model.config, adapters.lora) if config.lora.path else None
    frozen, state = start(
        model.config,
        backbone.params,
        adapters,
        METHODS[name].placement,
        chosen,
        clients=config.clients,
        key=key,
        rules=METHODS[name].rules,
        settings=method_settings(config),
        lora=lora,
    )
    return Run(model, frozen, state)


def any_round(config: ConfigDict, backbone: Backbone, name: str, key: jax.Array) -> tuple[Frozen, RoundState]:
    """What `prepare` gives when every client grafts expert 0: the structure and shapes of all rounds of the method."""
    slot = (config.clients, backbone.model.config.moe_layers, config.slot.experts)
    chosen = np.zeros(slot, np.int32) if METHODS[name].personal_slot else None
    return prepare(config, backbone, name, chosen, key)[1:]


def describe(config: ConfigDict, backbone: Backbone, name: str) -> dict:
    """One row of the plan, from shapes alone."""
    own = for_method(config, name)

    def shapes(params):
        return any_round(own, backbone._replace(params=params), name, jax.random.PRNGKey(0))

    frozen, state = jax.eval_shape(shapes, backbone.params)
    cohort = own.cohort or own.clients
    row = plan(
        backbone.model.config,
        frozen,
        state,
        METHODS[name].rules,
        method_settings(own),
        cohort=cohort,
        batch=own.batch_size,
        sequence=own.sequence_length,
        remat=own.model.remat,
    )
    return row._asdict() | {"method": name, "clients": own.clients, "cohort": cohort}


def calibration(train: list[ClientDataset], *, examples: int, batch_size: int):
    """One pass over the clients' calibration examples in step: (tokens, attention_mask) [C, B, S]. A client that has
    fewer goes on with batches that are all padding."""
    each = [calibration_batches(dataset, examples=examples, batch_size=batch_size) for dataset in train]
    nothing = np.zeros((batch_size, train[0].tokens.shape[1]), np.int32)
    for parts in itertools.zip_longest(*each, fillvalue=(nothing, nothing)):
        yield tuple(np.stack(arrays) for arrays in zip(*parts, strict=True))


def graft(config: ConfigDict, backbone: Backbone, federation: Federation, key: jax.Array) -> np.ndarray:
    """The experts each client grafts, [N, L, r] int32, chosen on its own training examples."""

    def batches():
        return calibration(
            federation.train, examples=config.slot.calibration_examples, batch_size=config.evaluation.batch_size
        )

    return select(
        backbone.model,
        backbone.params,
        batches,
        selection=config.slot.selection,
        experts=config.slot.experts,
        clients=config.clients,
        key=key,
    )


def train(
    config: ConfigDict,
    run: Run,
    federation: Federation,
    label: tuple[str, int],
    metrics: MetricsWriter,
    checkpoints: Checkpoints,
    compiled: dict,
) -> tuple[RoundState, float]:
    """The remaining rounds of a run, each checkpointed; returns the last state and the seconds of compilation.

    label: (method, seed). `compiled` keeps the compiled round of a method for its other seeds.
    """
    (method, seed), (model, frozen, state) = label, run
    cohort_key = jax.random.fold_in(state.key, COHORT_KEY)
    size = config.cohort or config.clients
    sizes = np.array([len(dataset.tokens) for dataset in federation.train], np.float32)
    first = int(state.round)

    def prepare_round(number):
        cohort = sample_cohort(cohort_key, number, config.clients, size)
        batches = round_batches(
            federation.train,
            cohort,
            round=number,
            seed=seed,
            local_steps=config.local_steps,
            batch_size=config.batch_size,
        )
        return frozen, state, batches, cohort, sizes[cohort]

    started = time.perf_counter()
    if "round" not in compiled:
        optimizer = config.optimizer
        round_fn = make_round(
            model,
            METHODS[method].rules,
            method_settings(config),
            clients=config.clients,
            rounds=config.rounds,
            learning_rate=optimizer.learning_rate,
            final_learning_rate=optimizer.final_learning_rate,
            weight_decay=optimizer.weight_decay,
            clip_norm=optimizer.clip_norm,
        )
        compiled["round"] = round_fn.lower(*prepare_round(first)).compile()
    compile_seconds = time.perf_counter() - started

    progress = tqdm(range(first, config.rounds), initial=first, total=config.rounds, desc=f"{method} seed {seed}")
    for number in progress:
        arguments = prepare_round(number)
        started = time.perf_counter()
        state, measured = compiled["round"](*arguments)
        measured = jax.device_get(measured)  # waits for the round
        seconds = time.perf_counter() - started
        lines = {
            int(client): {name: float(values[i]) for name, values in measured["clients"].items()}
            for i, client in enumerate(arguments[3])
        }
        loss = float(np.mean(measured["clients"]["train_loss"]))
        speed = arguments[2].tokens.size / seconds
        lines[None] = {
            "train_loss": loss,
            "round_s": seconds,
            "train_tokens_per_s": speed,
        } | {name: value.item() for name, value in measured["server"].items()}
        every = config.evaluation.every
        if every and (number + 1) % every == 0:
            losses = evaluation_loss(model, frozen, state.server.shared, state.clients, federation.held_out.batches)
            for client, value in enumerate(losses):
                lines.setdefault(client, {})["eval_loss"] = float(value)
        metrics.write(f"{method}-seed{seed}", method, seed, number, lines)
        checkpoints.save(state)
        progress.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
    return state, compile_seconds


def run_one(
    config: ConfigDict,
    backbone: Backbone,
    federation: Federation,
    method: str,
    seed: int,
    workdir: Path,
    metrics: MetricsWriter,
    compiled: dict,
) -> dict:
    """Graft, train and evaluate one method with one seed; returns its entry of results.json. Goes on from the newest
    checkpoint under `workdir` where there is one."""
    own, name = for_method(config, method), f"{method}-seed{seed}"
    key = jax.random.PRNGKey(seed)
    with Checkpoints(workdir / "checkpoints" / name) as checkpoints:
        chosen, graft_seconds = None, None
        if METHODS[method].personal_slot:
            started = time.perf_counter()
            chosen = graft(own, backbone, federation, jax.random.fold_in(key, GRAFT_KEY))
            graft_seconds = time.perf_counter() - started
        fresh = prepare(own, backbone, method, chosen, key)
        run = fresh._replace(state=checkpoints.restore(fresh.state) or fresh.state)
        metrics.rewind(name, int(run.state.round))
        state, compile_seconds = train(own, run, federation, (method, seed), metrics, checkpoints, compiled)
    started = time.perf_counter()
    scores = evaluate(
        run.model,
        run.frozen,
        state.server.shared,
        state.clients,
        federation.held_out,
        backbone.tokenizer,
        max_new_tokens=own.evaluation.max_new_tokens,
        batch_size=own.evaluation.batch_size,
    )
    evaluation_seconds = time.perf_counter() - started
    timing = {"graft_s": graft_seconds, "compile_s": compile_seconds, "evaluation_s": evaluation_seconds}
    rounds = [line for line in read_metrics(metrics.path) if line["run"] == name and line["client"] is None]
    entry = report(own, backbone, federation, method, state, scores, rounds)
    entry["timing"] = timing | entry["timing"]
    return {"method": method, "seed": seed} | entry


def report(
    config: ConfigDict,
    backbone: Backbone,
    federation: Federation,
    method: str,
    state: RoundState,
    scores: list[dict],
    rounds: list[dict],
) -> dict:
    """The entry of results.json for a finished run, whose lines of metrics.jsonl are `rounds`."""
    row = describe(config, backbone, method)
    grafts = state.clients.grafts
    grafted = np.asarray(grafts["layers"]["moe"]["slot"]["expert_index"]).tolist() if grafts else None
    clients = [
        {
            "id": i,
            "name": dataset.name,
            "train_examples": len(dataset.tokens),
            "eval_examples": len(federation.held_out.records[i]),
            "grafted_experts": grafted[i] if grafted else [],
        }
        | score
        for i, (dataset, score) in enumerate(zip(federation.train, scores, strict=True))
    ]
    averaged = [metric for metric, value in scores[0].items() if isinstance(value, float)]
    total = sum(row["cohort"] * (line["upload_bytes"] + line["download_bytes"]) for line in rounds)
    return {
        "parameters": {role: row[role] for role in ("frozen", "shared", "personal_per_client")},
        "clients": clients,
        "average": {metric: float(np.mean([score[metric] for score in scores])) for metric in averaged},
        "communication": {
            "upload_bytes_per_client_round": rounds[-1]["upload_bytes"],
            "download_bytes_per_client_round": rounds[-1]["download_bytes"],
            "total_bytes": total,
        },
        "timing": {
            "round_s_median": float(np.median([line["round_s"] for line in rounds])),
            "train_tokens_per_s": float(np.median([line["train_tokens_per_s"] for line in rounds])),
        },
    }
