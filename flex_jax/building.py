"""What all runs of an experiment share, built once: backbone and mesh, clients' data, and each method with its plan."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from transformers import AutoTokenizer

from flex_jax import tiny
from flex_jax.config import OPEN_SECTIONS, for_method, nearest_key
from flex_jax.data.batches import ClientDataset, encode_client, evaluation_batches
from flex_jax.data.partition import PartitionSettings, partition, partition_notes
from flex_jax.data.prompts import check_round_trip, check_tokenizer, encode_prompt
from flex_jax.data.sources import Data, load_data
from flex_jax.errors import InputError
from flex_jax.evaluation.evaluate import HeldOut
from flex_jax.federated.aggregation import check_cohort
from flex_jax.federated.client import OptimizerSettings
from flex_jax.federated.cost_model import Plan, StepShape, plan
from flex_jax.federated.federated_round import CompiledRound, make_round
from flex_jax.federated.init import Start, start
from flex_jax.federated.method import MethodSpec, Settings
from flex_jax.memory import check_generation, check_tokens
from flex_jax.methods import METHODS, Method, check_hparams, make_method, user_error, user_frame
from flex_jax.methods.contract import check_contract
from flex_jax.models.adapters import AdapterConfig
from flex_jax.models.checkpoint import find_checkpoint, load_pretrained, read_model_config
from flex_jax.models.config import LoraConfig, SlotConfig
from flex_jax.models.decoder import Decoder
from flex_jax.models.export.peft import load_adapter
from flex_jax.models.sharding import AXES, make_mesh, param_sharding
from flex_jax.terminal import tell

ROUND_TRIPS = 200  # records whose tokens are decoded again, to see whether the tokenizer loses something


class Backbone(NamedTuple):
    """A pretrained model with its tokenizer, on the devices of an experiment."""

    model: Decoder
    params: dict
    tokenizer: Any  # a transformers tokenizer
    mesh: Mesh | None = None  # None for one device


class Federation(NamedTuple):
    """The clients' data of one seed."""

    train: list[ClientDataset]
    held_out: HeldOut
    notes: list[str]  # a line for each thing about them that is not as expected


class ResolvedMethod(NamedTuple):
    """An entry of config.methods, with its own config and hyperparameters applied."""

    name: str
    config: ConfigDict
    method: Method


class PreparedMethod(NamedTuple):
    """A method or variant that is ready to run with every seed."""

    name: str
    config: ConfigDict
    spec: MethodSpec
    plan: Plan  # of one device
    round_fn: CompiledRound


def checkpoint_name(config: ConfigDict) -> str:
    """Returns the checkpoint directory or Hub name that config.model.path means."""
    return str(tiny.CHECKPOINT) if config.model.path == "tiny" else config.model.path


def build_mesh(config: ConfigDict) -> Mesh | None:
    """Returns the devices of config.mesh, None for one. Raises InputError if there are fewer."""
    sizes = {axis: config.mesh[axis] for axis in AXES}
    wanted, devices = math.prod(sizes.values()), jax.device_count()
    if wanted > devices:
        axes = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise InputError(f"config.mesh is {axes}, {wanted} devices: must be at most the {devices} that there are")
    return make_mesh(**sizes)


def build_backbone(config: ConfigDict) -> Backbone:
    """Loads the model, frozen parameters and tokenizer of config.model. Raises InputError if one is unusable."""
    path = find_checkpoint(checkpoint_name(config))
    quantisation = None if config.model.quantisation == "none" else config.model.quantisation
    mesh, num_experts = build_mesh(config), read_model_config(path / "config.json").num_experts
    if num_experts % config.mesh.expert:  # before the weights, which may take minutes to load
        raise InputError(
            f"config.mesh.expert is {config.mesh.expert}: must divide the {num_experts} experts of a layer of {path}"
        )
    sharding = param_sharding(mesh) if mesh else None
    model, params = load_pretrained(path, dtype=config.model.dtype, quantisation=quantisation, sharding=sharding)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers does not check its files, which are anyone's and can raise anything
        raise InputError(
            f"{path}: no usable tokenizer in the checkpoint directory, whose own code is never run ({error})"
        ) from error
    check_tokenizer(tokenizer, model.config.vocab_size)
    return Backbone(model.clone(remat=config.model.remat), params, tokenizer, mesh)


def load_data_of(config: ConfigDict) -> Data:
    """Returns the records of config.data."""
    data = config.data
    return load_data(
        data.path,
        split=data.split,
        test_split=data.test_split,
        fields=data.fields,
        column=data.column if data.partition == "column" else "",
        skip_empty=data.skip_empty,
    )


def build_federation(config: ConfigDict, backbone: Backbone, source: Data, seed: int) -> Federation:
    """Divides the records among clients and encodes them. Raises InputError for sizes that memory cannot hold."""
    data, length, tokenizer = config.data, config.sequence_length, backbone.tokenizer
    cohort, evaluation = config.cohort or config.clients, config.evaluation
    new_tokens, positions = evaluation.max_new_tokens, backbone.model.config.max_position_embeddings
    if length + new_tokens > positions:
        raise InputError(
            f"config.sequence_length {length} with config.evaluation.max_new_tokens {new_tokens} is "
            f"{length + new_tokens} tokens: the model has {positions} positions"
        )
    examples = cohort * config.local_steps * config.batch_size
    keys = "config.local_steps, config.batch_size, config.sequence_length, config.clients or config.cohort"
    check_tokens(f"a round's batches of {examples} examples", examples, length, keys)
    kind, column, categories = data.partition, data.column, data.categories
    settings = PartitionSettings(kind, column, categories, data.alpha, data.examples_per_client, data.test_examples)
    clients = partition(source.train, settings, num_clients=config.clients, seed=seed, test=source.test)
    train, test = (
        [encode_client(client.name, getattr(client, part), tokenizer, length) for client in clients]
        for part in ("train", "test")
    )
    prompts = [[encode_prompt(record, tokenizer, length) for record in client.test] for client in clients]
    examples = len(test) * max(evaluation.batch_size, *(len(client.tokens) for client in test))
    check_tokens(
        f"evaluation on {examples} examples", examples, length, "config.evaluation.batch_size or config.clients"
    )
    prompt_length = max(len(prompt) for client in prompts for prompt in client)
    check_generation(
        backbone.model,
        backbone.params,
        (cohort, evaluation.batch_size, prompt_length + evaluation.max_new_tokens),
        "config.evaluation.batch_size, config.evaluation.max_new_tokens, config.clients or config.cohort",
        num_devices=backbone.mesh.size if backbone.mesh else 1,
    )
    batches = evaluation_batches(test, evaluation.batch_size)
    notes = partition_notes(source.train, clients, source.test)
    if kind not in ("iid", "column") and len({record["category"] for record in source.train}) == 1:
        notes.append(f"all records have one category: data.partition={kind} divides it without regard to content")
    for kind, datasets in (("training", train), ("test", test)):
        full_lengths = np.concatenate([client.full_lengths for client in datasets])
        if cut := np.count_nonzero(full_lengths > length):
            notes.append(f"{cut} of {len(full_lengths)} {kind} examples are longer than {length} tokens and are cut")
    if line := check_round_trip(source.train[:: 1 + len(source.train) // ROUND_TRIPS], tokenizer):
        notes.append(line)
    return Federation(train, HeldOut([client.test for client in clients], prompts, batches), notes)


def resolve_method(config: ConfigDict, name: str) -> ResolvedMethod:
    """Returns one entry of config.methods. Raises InputError for an unknown method or wrong hyperparameters."""
    own = for_method(config, name)
    return ResolvedMethod(name, own, make_method(own.method, own.hparams[name].to_dict(), f"config.hparams.{name}"))


def check_method_names(config: ConfigDict) -> None:
    """Checks whose config.overrides and config.hparams are, and tells on stderr which of them no run uses.

    Raises InputError for a name that is no method, and for hyperparameters that their method does not have.
    """
    bases = {name: entry.get("method", name) for name, entry in config.overrides.items()}
    variants = [name for name in bases if bases[name] != name]
    for name in variants:
        if ":" not in bases[name] and bases[name] not in METHODS:
            nearest = nearest_key(bases[name], METHODS)
            raise InputError(f"config.overrides.{name}.method is {bases[name]!r}, no method: the nearest is {nearest}")
    unused = []
    for section in OPEN_SECTIONS:
        for name in (name for name in config[section] if name not in config.methods):
            key, unused = f"config.{section}.{name}", [*unused, f"{section}.{name}"]
            shadowed = [run for run in config.methods if bases.get(run, run).rpartition(":")[2] == name]
            if section == "hparams" and shadowed:
                raise InputError(f"{key}: no run has this name; its variant has config.hparams.{shadowed[0]}")
            if name not in (*METHODS, *variants):
                nearest = nearest_key(name, (*config.methods, *METHODS))
                raise InputError(f"{key} names no method of this run: the nearest is {nearest}")
            if section == "hparams" and (factory := METHODS.get(bases.get(name, name))):
                check_hparams(factory, config.hparams[name].to_dict(), key)
    if unused:
        tell(f"not used, as config.methods does not name them: config.{', '.join(unused)}")


def build_spec(config: ConfigDict, backbone: Backbone, method: Method) -> MethodSpec:
    """Returns the static part of a method's runs; `config` is the method's own.

    Raises InputError if the method cannot work with this model, these settings, or a cohort of this size.
    """
    lora = LoraConfig(config.lora.rank, config.lora.alpha, config.lora.dropout)
    slot = SlotConfig(
        config.slot.experts,
        config.slot.training,
        LoraConfig(config.slot.rank, config.slot.alpha, config.lora.dropout),
        "routing" if method.grafts == "all" else config.slot.gate,
        config.slot.gate_init,
    )
    num_experts = backbone.model.config.num_experts
    if method.grafts != "none" and slot.num_experts > num_experts:
        raise InputError(
            f"config.slot.experts is {slot.num_experts}: must be at most {num_experts}, the experts of a layer"
        )
    settings = Settings(**config.client, **config.server)
    if problem := check_cohort(settings.aggregation, settings.byzantine, config.cohort or config.clients):
        raise InputError(f"config.server.aggregation: {problem}")
    model = backbone.model.clone(adapters=AdapterConfig(lora, slot, method.projection))
    try:
        method.check(model, settings)
    except InputError as error:
        raise InputError(f"method {config.method}: {error}") from error
    return MethodSpec(model, method, settings)


def start_run(
    config: ConfigDict, spec: MethodSpec, backbone: Backbone, expert_index: np.ndarray | None, key: jax.Array
) -> Start:
    """Returns the first state of a run. Raises InputError if config.lora.path is no fitting adapter."""
    model = spec.model
    lora = load_adapter(config.lora.path, model.config, model.adapters.lora) if config.lora.path else None
    return start(spec, backbone.params, expert_index, key=key, lora=lora)


def start_without_grafting(config: ConfigDict, spec: MethodSpec, backbone: Backbone, key: jax.Array) -> Start:
    """Returns a start in which every client grafts expert 0; all but the grafted slots is as in a real one."""
    slot = (config.clients, backbone.model.config.num_moe_layers, config.slot.experts)
    return start_run(config, spec, backbone, np.zeros(slot, np.int32), key)


def abstract_state(config: ConfigDict, spec: MethodSpec, backbone: Backbone) -> tuple[Any, Any]:
    """Returns the shapes of `Frozen` and of a `RoundState` with one client."""

    def shapes(params):
        run = start_without_grafting(config, spec, backbone._replace(params=params), jax.random.PRNGKey(0))
        return run.frozen, run.state._replace(clients=run.init_clients(np.arange(1)))

    return jax.eval_shape(shapes, backbone.params)


def prepare_method(resolved: ResolvedMethod, backbone: Backbone) -> PreparedMethod:
    """Returns a method that is ready to run, with its plan.

    This traces the method for the first time, so a mistake in a user's own file becomes an InputError with its line.
    """
    name, config, method = resolved
    optimizer = OptimizerSettings(config.rounds, **config.optimizer)
    slices = config.mesh.fsdp * config.mesh.expert
    clients_per_device = (config.cohort or config.clients) // config.mesh.clients
    step = StepShape(clients_per_device, config.batch_size // slices, config.sequence_length, slices)
    try:
        spec = build_spec(config, backbone, method)
        state = abstract_state(config, spec, backbone)
        plain = spec._replace(method=Method(ownership=((r".*", "personal"),), grafts=method.grafts))
        check_contract(spec, *state, model_adapters=abstract_state(config, plain, backbone)[1].clients.personal)
        planned = plan(spec, *state, step)
    except Exception as error:  # the file is the user's program, which may raise anything
        if isinstance(error, InputError) or not user_frame(config.method, error):
            raise
        raise user_error(config.method, error) from error
    round_fn = make_round(spec, num_clients=config.clients, optimizer=optimizer, mesh=backbone.mesh)
    return PreparedMethod(name, config, spec, planned, CompiledRound(round_fn))


def plan_row(prepared: PreparedMethod) -> dict[str, Any]:
    """Returns the plan of a method as `reporting.tables.plan_table` takes it."""
    config = prepared.config
    cohort = config.cohort or config.clients
    return prepared.plan._asdict() | {"method": prepared.name, "clients": config.clients, "cohort": cohort}
