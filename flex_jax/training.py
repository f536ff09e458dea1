"""One run, a method with one seed: graft, train round by round, evaluate."""

import itertools
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from flex_jax.building import Backbone, Federation, PreparedMethod, start_run
from flex_jax.data.batches import ClientDataset, calibration_batches, interleave, round_batches
from flex_jax.divergence import check_round, check_scores, left_out_line, put_back
from flex_jax.evaluation.evaluate import HeldOut, evaluate
from flex_jax.evaluation.generation import GenerationSettings
from flex_jax.evaluation.loss import evaluation_loss
from flex_jax.federated.checkpoint import Checkpoints, Totals
from flex_jax.federated.client import ClientModels
from flex_jax.federated.cohort import read_availability, sample_cohort
from flex_jax.federated.cohort_sharding import place
from flex_jax.federated.init import Start
from flex_jax.federated.state import RoundInputs, RoundState
from flex_jax.fingerprint import digest_json
from flex_jax.grafting.selection import SelectionSettings, select
from flex_jax.metrics_log import MetricsLog, read_metrics
from flex_jax.results import ClientScores, RunEntry, Timing, average_scores
from flex_jax.terminal import tell
from flex_jax.workdir import Workdir, run_identity

SELECTION_KEY, COHORT_KEY = 1, 2  # folded into a run's key for the choices outside its rounds


class Run(NamedTuple):
    """A method with one seed, ready for its first round."""

    prepared: PreparedMethod
    backbone: Backbone
    federation: Federation
    seed: int
    start: Start
    identity: dict[str, Any]  # see `run_identity`

    @property
    def name(self) -> str:
        """METHOD-seedN."""
        return f"{self.prepared.name}-seed{self.seed}"

    @property
    def client_names(self) -> list[str]:
        """The names of the clients, by id."""
        return [dataset.name for dataset in self.federation.train]

    def models_by_group(self, state: RoundState, checkpoints: Checkpoints) -> Iterator[tuple[ClientModels, HeldOut]]:
        """Yields the models and held-out examples of all clients, as many at once as a cohort has."""
        for group in client_groups(self.prepared.config):
            clients = checkpoints.clients.load(group)
            models = ClientModels(self.prepared.spec, self.start.frozen, state.server, clients)
            yield models, self.federation.held_out.select(group)


def client_groups(config: ConfigDict) -> list[np.ndarray]:
    """Returns all client ids in groups of the size of a cohort: as many as are on the device at once."""
    size = config.cohort or config.clients
    return [np.arange(first, min(first + size, config.clients)) for first in range(0, config.clients, size)]


def calibration_of_group(train: list[ClientDataset], *, num_examples: int, batch_size: int) -> Iterator[Any]:
    """Yields the clients' calibration batches together, (tokens, attention_mask) [C, B, S].

    A client with fewer examples continues with batches that are all padding.
    """
    batches = [calibration_batches(dataset, num_examples=num_examples, batch_size=batch_size) for dataset in train]
    padding = np.zeros((batch_size, train[0].tokens.shape[1]), np.int32)
    for parts in itertools.zip_longest(*batches, fillvalue=(padding, padding)):
        yield tuple(np.stack(arrays) for arrays in zip(*parts, strict=True))


def select_experts(config: ConfigDict, backbone: Backbone, federation: Federation, key: jax.Array) -> np.ndarray:
    """Selects the experts that each client grafts, [N, L, r] int32; `fill_slots` copies them.

    If config.slot.calibration is "pooled", all clients graft the same, selected on some examples of each.
    """
    slot, num_examples = config.slot, config.slot.calibration_examples
    if slot.calibration == "pooled":
        some = federation.train[: min(config.clients, num_examples)]
        groups = [[interleave(some, num_examples)]]
    else:
        groups = [[federation.train[client] for client in group] for group in client_groups(config)]
    settings, selected = SelectionSettings(slot.selection, slot.experts), []
    for number, datasets in enumerate(groups):
        batches = partial(
            calibration_of_group, datasets, num_examples=num_examples, batch_size=config.evaluation.batch_size
        )
        group_key = jax.random.fold_in(key, number)
        selected.append(
            select(backbone.model, backbone.params, batches, settings, num_clients=len(datasets), key=group_key)
        )
    expert_index = np.concatenate(selected)
    return np.repeat(expert_index, config.clients, axis=0) if slot.calibration == "pooled" else expert_index


class RoundFeed:
    """Makes the inputs of each round of a run: draws its cohort, its batches, and loads its clients."""

    def __init__(self, run: Run, checkpoints: Checkpoints, key: jax.Array):
        config = run.prepared.config
        self._run, self._checkpoints = run, checkpoints
        self._key = jax.random.fold_in(key, COHORT_KEY)
        self._size = config.cohort or config.clients
        self._num_examples = np.array([len(dataset.tokens) for dataset in run.federation.train], np.float32)
        self._available: list[Any] = [None]
        if config.availability:
            self._available = read_availability(config.availability, config.clients, self._size)

    def inputs(self, number: int, state: RoundState) -> RoundInputs:
        """Returns the arguments of a round function."""
        config = self._run.prepared.config
        cohort = sample_cohort(
            self._key,
            number,
            self._num_examples,
            self._size,
            sampling=config.sampling,
            available=self._available[number % len(self._available)],
        )
        batches = round_batches(
            self._run.federation.train,
            cohort,
            round=number,
            seed=self._run.seed,
            local_steps=config.local_steps,
            batch_size=config.batch_size,
        )
        state = state._replace(clients=self._checkpoints.clients.load(cohort))
        inputs = RoundInputs(self._run.start.frozen, state, batches, cohort, self._num_examples[cohort])
        return place(self._run.backbone.mesh, inputs) if self._run.backbone.mesh else inputs


def round_lines(cohort: np.ndarray, metrics: dict[str, dict], num_tokens: int, seconds: float) -> dict:
    """Returns the lines of metrics.jsonl of one round, by client id and for None, the round as a whole."""
    finite = metrics["clients"]["finite"]
    by_metric = {metric: values.tolist() for metric, values in metrics["clients"].items()}
    lines: dict[int | None, dict] = {
        int(client): {metric: values[i] for metric, values in by_metric.items()} for i, client in enumerate(cohort)
    }
    lines[None] = {
        "train_loss": float(np.mean(metrics["clients"]["train_loss"][finite])),
        "round_s": seconds,
        "train_tokens_per_s": num_tokens / seconds,
    } | {metric: value.item() for metric, value in metrics["server"].items()}
    return lines


def train(run: Run, metrics: MetricsLog, checkpoints: Checkpoints) -> tuple[RoundState, Totals, float]:
    """Runs the remaining rounds, each with a checkpoint. Returns the last state, totals and seconds of compilation."""
    config, name = run.prepared.config, run.name
    state, totals = checkpoints.restore(run.start.state) or (run.start.state, Totals())
    first = int(state.round)
    metrics.rewind(name, first)
    if first == config.rounds:
        return state, totals, 0.0
    feed = RoundFeed(run, checkpoints, state.key)
    inputs = feed.inputs(first, state)
    compile_seconds = run.prepared.round_fn.compile(inputs)
    progress = tqdm(
        range(first, config.rounds), initial=first, total=config.rounds, desc=f"{run.prepared.name} seed {run.seed}"
    )
    for number in progress:
        cohort, num_tokens = np.asarray(inputs.cohort), inputs.batches.tokens.size
        started = time.perf_counter()
        state, measured = run.prepared.round_fn(inputs)
        measured = jax.device_get(measured)  # waits for the round
        left_out = check_round(run.prepared.spec.settings, run.client_names, number, cohort, measured)
        lines = round_lines(cohort, measured, num_tokens, time.perf_counter() - started)
        if left_out.any():
            former = checkpoints.clients.load_former(cohort[left_out])
            state = state._replace(clients=put_back(state.clients, left_out, former))
            for client in cohort[left_out]:
                totals.update({f"left out: {client}": 1})
                if totals[f"left out: {client}"] == 1:
                    tell(left_out_line(name, run.client_names[client], number))
        checkpoints.clients.cache(cohort, state.clients)  # the next round consumes them: save before it
        if config.evaluation.every and (number + 1) % config.evaluation.every == 0:
            for client, loss in zip(range(config.clients), eval_losses(run, state, checkpoints), strict=True):
                lines.setdefault(client, {})["eval_loss"] = float(loss)
        metrics.write(name, run.prepared.name, run.seed, number, lines)
        totals.update(client_rounds=len(cohort))
        totals.update({way: sum(measured["clients"][way].tolist()) for way in ("upload_bytes", "download_bytes")})
        checkpoints.save(state, totals)
        if number + 1 < config.rounds:
            inputs = feed.inputs(number + 1, state)
        overall = lines[None]
        progress.set_postfix_str(f"loss {overall['train_loss']:.3f}, {overall['train_tokens_per_s']:,.0f} tokens/s")
    return state, totals, compile_seconds


def eval_losses(run: Run, state: RoundState, checkpoints: Checkpoints) -> list[float]:
    """Returns the loss of every client on its held-out examples."""
    groups = run.models_by_group(state, checkpoints)
    return [loss for models, held_out in groups for loss in evaluation_loss(models, held_out.batches).tolist()]


def score(run: Run, state: RoundState, checkpoints: Checkpoints) -> list[ClientScores]:
    """Returns every client's scores after a run."""
    evaluation, tokenizer = run.prepared.config.evaluation, run.backbone.tokenizer
    settings = GenerationSettings(tokenizer.eos_token_id, evaluation.max_new_tokens, evaluation.batch_size)
    groups = run.models_by_group(state, checkpoints)
    return [scores for models, held_out in groups for scores in evaluate(models, held_out, tokenizer, settings)]


def run_one(
    prepared: PreparedMethod, backbone: Backbone, federation: Federation, seed: int, workdir: Workdir
) -> RunEntry:
    """Grafts, trains and evaluates one method with one seed. Returns its entry of results.json.

    It resumes from the newest checkpoint in the work directory, if there is one; only the selection of experts is
    repeated.
    """
    config, key = prepared.config, jax.random.PRNGKey(seed)
    expert_index, graft_seconds = None, None
    if prepared.spec.method.grafts != "none":
        started = time.perf_counter()
        expert_index = select_experts(config, backbone, federation, jax.random.fold_in(key, SELECTION_KEY))
        graft_seconds = time.perf_counter() - started
    first = start_run(config, prepared.spec, backbone, expert_index, key)
    identity = run_identity(prepared.name, config, seed, workdir.inputs, workdir.client_names)
    run = Run(prepared, backbone, federation, seed, first, identity)
    directory = workdir.path / "checkpoints" / run.name
    with Checkpoints(directory, first.init_clients, config.clients, run.identity) as checkpoints:
        state, totals, compile_seconds = train(run, workdir.metrics, checkpoints)
        if untrained := int((checkpoints.clients.newest == 0).sum()):
            tell(
                f"{run.name}: {untrained} of {config.clients} clients were in no cohort: they are scored as they began"
            )
        started = time.perf_counter()
        scores = score(run, state, checkpoints)
        check_scores(run.client_names, scores)
        evaluation_seconds = time.perf_counter() - started
    rounds = [line for line in read_metrics(workdir.metrics.path) if line["run"] == run.name and line["client"] is None]
    timing: Timing = {
        "graft_s": graft_seconds,
        "compile_s": compile_seconds,
        "evaluation_s": evaluation_seconds,
        "round_s_median": median_of(rounds, "round_s"),
        "train_tokens_per_s": median_of(rounds, "train_tokens_per_s"),
    }
    return run_entry(run, expert_index, scores, totals, timing)


def median_of(rounds: list[dict[str, Any]], metric: str) -> float | None:
    """Returns the median of a metric of rounds, None if metrics.jsonl has lost them all."""
    return float(np.median([line[metric] for line in rounds])) if rounds else None


def run_entry(
    run: Run, expert_index: np.ndarray | None, scores: list[ClientScores], totals: Totals, timing: Timing
) -> RunEntry:
    """Returns the entry of results.json for a finished run."""
    plan, held_out = run.prepared.plan, run.federation.held_out
    return {
        "method": run.prepared.name,
        "seed": run.seed,
        "identity": digest_json(run.identity),
        "parameters": {
            "frozen": plan.frozen,
            "shared": plan.shared,
            "personal_per_client": plan.personal_per_client,
            "trained_per_client": plan.trained_per_client,
        },
        "clients": [
            {
                "id": client,
                "name": dataset.name,
                "train_examples": len(dataset.tokens),
                "eval_examples": len(held_out.records[client]),
                "grafted_experts": [] if expert_index is None else expert_index[client].tolist(),
                "rounds_left_out": totals[f"left out: {client}"],
                **client_scores,
            }
            for client, (dataset, client_scores) in enumerate(zip(run.federation.train, scores, strict=True))
        ],
        "average": average_scores(scores),
        "communication": {
            "upload_bytes_per_client_round": round(totals["upload_bytes"] / totals["client_rounds"]),
            "download_bytes_per_client_round": round(totals["download_bytes"] / totals["client_rounds"]),
            "total_bytes": totals["upload_bytes"] + totals["download_bytes"],
        },
        "timing": timing,
    }
