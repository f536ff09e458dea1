"""Refuses sizes that cannot fit in memory, before anything starts."""

import os
from functools import partial

import jax

from flex_jax.errors import InputError
from flex_jax.federated.compression import tree_bytes
from flex_jax.federated.cost_model import Plan
from flex_jax.models.decoder import Decoder, init_cache
from flex_jax.reporting.tables import human_bytes

PLAN_MARGIN = 1.25  # a plan is an estimate from above; what is measured is up to 20% less


def host_memory() -> int:
    """Returns the bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_memory() -> int:
    """Returns the bytes that JAX may use on a device. A device without memory of its own has the machine's."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit") or host_memory()


def check_memory(what: str, needed: float, limit: float, keys: str) -> None:
    """Raises InputError that names the keys to lower if `needed` bytes are more than the limit."""
    if needed > limit:
        sizes = f"would take about {human_bytes(needed)} of memory, and there are {human_bytes(limit)}"
        raise InputError(f"{what} {sizes}: lower {keys}")


def check_plan(name: str, plan: Plan) -> None:
    """Raises InputError if a method's round clearly does not fit on a device."""
    adapters = plan.peak_bytes - plan.frozen_bytes - plan.activation_bytes
    parts = {
        "the size of the model, or use config.model.quantisation": plan.frozen_bytes,
        "config.batch_size, config.sequence_length, config.clients or config.cohort": plan.activation_bytes,
        "config.lora.rank, config.slot.rank, config.clients, config.cohort or a size in config.hparams": adapters,
    }
    keys = max(parts, key=lambda key: parts[key])
    if plan.peak_bytes > PLAN_MARGIN * device_memory():
        check_memory(f"method {name}: a round on one device", plan.peak_bytes, device_memory(), keys)


def check_tokens(what: str, num_examples: int, sequence_length: int, keys: str) -> None:
    """Raises InputError if the host cannot hold the tokens and masks of so many examples."""
    check_memory(what, num_examples * sequence_length * (4 + 4), host_memory(), keys)


def check_generation(
    model: Decoder, params: dict, shape: tuple[int, int, int], keys: str, *, num_devices: int = 1
) -> None:
    """Raises InputError if the backbone and a key-value cache of (clients, prompts, tokens) clearly do not fit."""
    clients, batch, length = shape
    cache = jax.eval_shape(partial(init_cache, model.config, batch, length, params["embedding"].dtype))
    needed = (tree_bytes(params) + clients * tree_bytes(cache)) / num_devices
    check_memory(
        f"generation for {clients} x {batch} prompts at once, of {length} tokens", needed, device_memory(), keys
    )
