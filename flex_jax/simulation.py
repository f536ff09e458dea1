"""One simulated run: graft, train round by round, evaluate. What it is given is built once for all runs."""

import itertools
import math
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flex_jax import tiny
from flex_jax.config import for_method
from flex_jax.data.batches import Batch, ClientDataset, calibration_batches, mixed, round_batches
from flex_jax.data.prompts import check_tokenizer
from flex_jax.errors import InputError
from flex_jax.evaluation.evaluate import HeldOut, evaluate
from flex_jax.evaluation.loss import evaluation_loss
from flex_jax.federated.aggregation import check_cohort
from flex_jax.federated.checkpoint import Checkpoints
from flex_jax.federated.cohort import read_availability, sample_cohort
from flex_jax.federated.method import ClientSettings, Recipe, ServerSettings, Settings
from flex_jax.federated.plan import plan
from flex_jax.federated.round import RoundFunction, make_round
from flex_jax.federated.sharding import AXES, make_mesh, param_sharding, place
from flex_jax.federated.start import Start, start
from flex_jax.federated.state import RoundState
from flex_jax.grafting.selection import select
from flex_jax.methods import find_method
from flex_jax.models.checkpoint import find_checkpoint, load_pretrained, read_model_config
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

    recipe: Recipe
    start: Start


def checkpoint_name(config: ConfigDict) -> str:
    """The checkpoint directory or Hub name that config.model.path stands for."""
    return str(tiny.CHECKPOINT) if config.model.path == "tiny" else config.model.path


def build_mesh(config: ConfigDict) -> Mesh | None:
    """The devices of config.mesh, None for one. Raises InputError where there are fewer."""
    sizes = {axis: config.mesh[axis] for axis in AXES}
    wanted, devices = math.prod(sizes.values()), jax.device_count()
    if wanted > devices:
        axes = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise InputError(f"config.mesh is {axes}, {wanted} devices: must be at most {devices}, as many as there are")
    return make_mesh(**sizes)


def load_backbone(config: ConfigDict) -> Backbone:
    """The model, frozen parameters and tokenizer of config.model."""
    path = find_checkpoint(checkpoint_name(config))
    quantisation = None if config.model.quantisation == "none" else config.model.quantisation
    mesh, experts = build_mesh(config), read_model_config(path / "config.json").experts
    if experts % config.mesh.expert:  # before the weights, which may take minutes to load
        raise InputError(
            f"config.mesh.expert is {config.mesh.expert}: must divide the {experts} experts of a layer of {path}"
        )
    sharding = param_sharding(mesh) if mesh else None
    model, params = load_pretrained(path, dtype=config.model.dtype, quantisation=quantisation, sharding=sharding)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:  # transformers does not check its files
        raise InputError(f"{path}: no usable tokenizer in the checkpoint directory ({error})") from error
    check_tokenizer(tokenizer, model.config.vocab_size)
    return Backbone(model.clone(remat=config.model.remat), params, tokenizer)


def make_recipe(config: ConfigDict, backbone: Backbone) -> Recipe:
    """The static part of a method's runs, `config` being its own. Raises InputError for an unknown method, and for a
    cohort too small for its aggregation."""
    method = find_method(config.method)
    lora = LoraConfig(config.lora.rank, config.lora.alpha, config.lora.dropout)
    slot = SlotConfig(
        config.slot.experts,
        config.slot.training,
        LoraConfig(config.slot.rank, config.slot.alpha, config.lora.dropout),
        "routing" if method.grafts == "all" else config.slot.gate,
        config.slot.gate_init,
    )
    settings = Settings(ClientSettings(**config.client), ServerSettings(**config.server))
    numbers = settings.server
    if wrong := check_cohort(numbers.aggregation, numbers.byzantine, config.cohort or config.clients):
        raise InputError(f"config.server.aggregation: {wrong}")
    return Recipe(backbone.model.clone(adapters=AdapterConfig(lora, slot)), method, settings)


def prepare(config: ConfigDict, backbone: Backbone, chosen: np.ndarray | None, key: jax.Array) -> Run:
    """Round 0 of a method, `config` being its own. Raises InputError when config.lora.path is no fitting adapter."""
    recipe = make_recipe(config, backbone)
    model = recipe.model
    lora = load_adapter(config.lora.path, model.config, model.adapters.lora) if config.lora.path else None
    return Run(recipe, start(recipe, backbone.params, chosen, key=key, lora=lora))


def any_run(config: ConfigDict, backbone: Backbone, key: jax.Array) -> Run:
    """What `prepare` gives when every client grafts expert 0: the structure and shapes of all rounds of the method."""
    slot = (config.clients, backbone.model.config.moe_layers, config.slot.experts)
    return prepare(config, backbone, np.zeros(slot, np.int32), key)


def describe(config: ConfigDict, backbone: Backbone, name: str) -> dict:
    """One row of the plan, from shapes alone."""
    own = for_method(config, name)
    cohort = own.cohort or own.clients

    def shapes(params):
        run = any_run(own, backbone._replace(params=params), jax.random.PRNGKey(0))
        return run.start.frozen, run.start.state._replace(clients=run.start.clients(np.arange(1)))

    frozen, state = jax.eval_shape(shapes, backbone.params)
    slices = own.mesh.fsdp * own.mesh.expert
    row = plan(
        make_recipe(own, backbone),
        frozen,
        state,
        cohort=cohort // own.mesh.clients,
        batch=own.batch_size // slices,
        sequence=own.sequence_length,
        slices=slices,
    )
    return row._asdict() | {"method": name, "clients": own.clients, "cohort": cohort}


def cohorts(config: ConfigDict) -> list[np.ndarray]:
    """All clients, in groups as large as a cohort: as many as are held at once."""
    size = config.cohort or config.clients
    return [np.arange(first, min(first + size, config.clients)) for first in range(0, config.clients, size)]


def calibration(train: list[ClientDataset], *, examples: int, batch_size: int):
    """One pass over the clients' calibration examples in step: (tokens, attention_mask) [C, B, S]. A client that has
    fewer goes on with batches that are all padding."""
    each = [calibration_batches(dataset, examples=examples, batch_size=batch_size) for dataset in train]
    nothing = np.zeros((batch_size, train[0].tokens.shape[1]), np.int32)
    for parts in itertools.zip_longest(*each, fillvalue=(nothing, nothing)):
        yield tuple(np.stack(arrays) for arrays in zip(*parts, strict=True))


def graft(config: ConfigDict, backbone: Backbone, federation: Federation, key: jax.Array) -> np.ndarray:
    """The experts each client grafts, [N, L, r] int32, chosen on its own training examples; or the same for all, chosen
    on as many examples, some of each client."""
    slot, examples = config.slot, config.slot.calibration_examples
    if slot.calibration == "common":
        common = mixed([federation.train[i] for i in range(min(config.clients, examples))], examples)
        groups = [[common]]
    else:
        groups = [[federation.train[client] for client in group] for group in cohorts(config)]
    chosen = []
    for number, datasets in enumerate(groups):
        batches = partial(calibration, datasets, examples=examples, batch_size=config.evaluation.batch_size)
        group_key = jax.random.fold_in(key, number)
        kinds = dict(selection=slot.selection, experts=slot.experts, clients=len(datasets), key=group_key)
        chosen.append(select(backbone.model, backbone.params, batches, **kinds))
    chosen = np.concatenate(chosen)
    return np.repeat(chosen, config.clients, axis=0) if slot.calibration == "common" else chosen


def build_round(config: ConfigDict, run: Run) -> RoundFunction:
    """The round function of a method, `config` being its own."""
    optimizer = config.optimizer
    return make_round(
        run.recipe,
        clients=config.clients,
        rounds=config.rounds,
        learning_rate=optimizer.learning_rate,
        final_learning_rate=optimizer.final_learning_rate,
        weight_decay=optimizer.weight_decay,
        clip_norm=optimizer.clip_norm,
        mesh=build_mesh(config),
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
    (name, seed), frozen = label, run.start.frozen
    state = checkpoints.restore(run.start.state) or run.start.state
    first = int(state.round)
    metrics.rewind(f"{name}-seed{seed}", first)
    cohort_key = jax.random.fold_in(state.key, COHORT_KEY)
    size = config.cohort or config.clients
    sizes = np.array([len(dataset.tokens) for dataset in federation.train], np.float32)
    mesh = build_mesh(config)
    trace = read_availability(config.availability, config.clients, size) if config.availability else [None]

    def prepare_round(number):
        available = trace[number % len(trace)]
        cohort = sample_cohort(cohort_key, number, sizes, size, sampling=config.sampling, available=available)
        batches = round_batches(
            federation.train,
            cohort,
            round=number,
            seed=seed,
            local_steps=config.local_steps,
            batch_size=config.batch_size,
        )
        arguments = frozen, state._replace(clients=checkpoints.load(cohort)), batches, cohort, sizes[cohort]
        return place(mesh, arguments) if mesh else arguments

    started = time.perf_counter()
    if "round" not in compiled:
        compiled["round"] = build_round(config, run).lower(*prepare_round(first)).compile()
    compile_seconds = time.perf_counter() - started

    progress = tqdm(range(first, config.rounds), initial=first, total=config.rounds, desc=f"{name} seed {seed}")
    for number in progress:
        arguments = prepare_round(number)
        cohort = np.asarray(arguments[3])
        started = time.perf_counter()
        state, measured = compiled["round"](*arguments)
        measured = jax.device_get(measured)  # waits for the round
        seconds = time.perf_counter() - started
        lines = {
            int(client): {metric: values[i].item() for metric, values in measured["clients"].items()}
            for i, client in enumerate(cohort)
        }
        loss = float(np.mean(measured["clients"]["train_loss"]))
        speed = arguments[2].tokens.size / seconds
        lines[None] = {
            "train_loss": loss,
            "round_s": seconds,
            "train_tokens_per_s": speed,
        } | {metric: value.item() for metric, value in measured["server"].items()}
        checkpoints.hold(cohort, state.clients)
        every = config.evaluation.every
        if every and (number + 1) % every == 0:
            for group in cohorts(config):
                batches = [Batch(*(leaf[group] for leaf in batch)) for batch in federation.held_out.batches]
                rows = checkpoints.load(group)
                losses = evaluation_loss(run.recipe, frozen, state.server, rows, batches)
                for client, value in zip(group, losses, strict=True):
                    lines.setdefault(int(client), {})["eval_loss"] = float(value)
        metrics.write(f"{name}-seed{seed}", name, seed, number, lines)
        checkpoints.save(state)
        progress.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
    return state, compile_seconds


def score(
    config: ConfigDict,
    run: Run,
    state: RoundState,
    federation: Federation,
    tokenizer: PreTrainedTokenizerBase,
    checkpoints: Checkpoints,
) -> list[dict]:
    """Every client's scores after a run, as many clients at a time as a cohort has."""
    scores = []
    for group in cohorts(config):
        held_out = HeldOut(
            [federation.held_out.records[client] for client in group],
            [federation.held_out.prompts[client] for client in group],
            [Batch(*(leaf[group] for leaf in batch)) for batch in federation.held_out.batches],
        )
        scores += evaluate(
            run.recipe,
            run.start.frozen,
            state.server,
            checkpoints.load(group),
            held_out,
            tokenizer,
            max_new_tokens=config.evaluation.max_new_tokens,
            batch_size=config.evaluation.batch_size,
        )
    return scores


def run_one(
    config: ConfigDict,
    backbone: Backbone,
    federation: Federation,
    name: str,
    seed: int,
    workdir: Path,
    metrics: MetricsWriter,
    compiled: dict,
) -> dict:
    """Graft, train and evaluate one method with one seed; returns its entry of results.json. Goes on from the newest
    checkpoint under `workdir` where there is one."""
    own, label = for_method(config, name), f"{name}-seed{seed}"
    key = jax.random.PRNGKey(seed)
    chosen, graft_seconds = None, None
    if find_method(own.method).grafts != "none":
        started = time.perf_counter()
        chosen = graft(own, backbone, federation, jax.random.fold_in(key, GRAFT_KEY))
        graft_seconds = time.perf_counter() - started
    run = prepare(own, backbone, chosen, key)
    with Checkpoints(workdir / "checkpoints" / label, run.start.clients, own.clients) as checkpoints:
        state, compile_seconds = train(own, run, federation, (name, seed), metrics, checkpoints, compiled)
        started = time.perf_counter()
        scores = score(own, run, state, federation, backbone.tokenizer, checkpoints)
        evaluation_seconds = time.perf_counter() - started
    timing = {"graft_s": graft_seconds, "compile_s": compile_seconds, "evaluation_s": evaluation_seconds}
    lines = [line for line in read_metrics(metrics.path) if line["run"] == label]
    entry = report(own, backbone, federation, name, chosen, scores, lines)
    entry["timing"] = timing | entry["timing"]
    return {"method": name, "seed": seed} | entry


def report(
    config: ConfigDict,
    backbone: Backbone,
    federation: Federation,
    name: str,
    chosen: np.ndarray | None,
    scores: list[dict],
    lines: list[dict],
) -> dict:
    """The entry of results.json for a finished run, whose lines of metrics.jsonl are `lines`."""
    row = describe(config, backbone, name)
    clients = [
        {
            "id": i,
            "name": dataset.name,
            "train_examples": len(dataset.tokens),
            "eval_examples": len(federation.held_out.records[i]),
            "grafted_experts": [] if chosen is None else chosen[i].tolist(),
        }
        | client_scores
        for i, (dataset, client_scores) in enumerate(zip(federation.train, scores, strict=True))
    ]
    averaged = [metric for metric, value in scores[0].items() if isinstance(value, float)]
    rounds = [line for line in lines if line["client"] is None]
    sent = {way: [line[f"{way}_bytes"] for line in lines if f"{way}_bytes" in line] for way in ("upload", "download")}
    return {
        "parameters": {role: row[role] for role in ("frozen", "shared", "personal_per_client", "trained_per_client")},
        "clients": clients,
        "average": {metric: float(np.mean([scores_of[metric] for scores_of in scores])) for metric in averaged},
        "communication": {f"{way}_bytes_per_client_round": round(float(np.mean(sent[way]))) for way in sent}
        | {"total_bytes": sum(map(sum, sent.values()))},
        "timing": {
            "round_s_median": float(np.median([line["round_s"] for line in rounds])),
            "train_tokens_per_s": float(np.median([line["train_tokens_per_s"] for line in rounds])),
        },
    }
