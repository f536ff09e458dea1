"""Selects the experts that each client grafts: by reconstruction (the paper), at random, or the most routed."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flex_jax.grafting.reconstruction import batch_losses, probe_tokens, routed_counts
from flex_jax.models.decoder import Decoder

Batches = Callable[[], Iterable[tuple[Any, Any]]]  # a new pass over (tokens [C, B, S], attention_mask [C, B, S]) pairs


class SelectionSettings(NamedTuple):
    """How experts are selected, and how many of each layer."""

    selection: str  # "reconstruction" | "router" | "random"
    num_experts: int


@partial(jax.jit, static_argnums=0)
def _client_losses(model, frozen, tokens, attention_mask, selected):
    return jax.vmap(partial(batch_losses, model, frozen))(tokens, attention_mask, selected)


@partial(jax.jit, static_argnums=0)
def _client_counts(model, frozen, tokens, attention_mask):
    return jax.vmap(partial(probe_tokens, model, routed_counts, frozen))(tokens, attention_mask).sum((2, 3))


def _total(function: Callable, batches: Batches) -> np.ndarray:
    """Sums function(tokens, mask) over one pass, in float64 on the host."""
    return sum((np.asarray(function(*batch), np.float64) for batch in batches()), start=np.zeros(()))


def by_reconstruction(model: Decoder, frozen: dict, batches: Batches, num_experts: int) -> np.ndarray:
    """Adds the expert that lowers the reconstruction loss most, one per pass: int32 [C, L, num_experts]."""
    selected = None
    for _ in range(num_experts):
        losses = _total(partial(_client_losses, model, frozen, selected=selected), batches)
        if selected is not None:
            np.put_along_axis(losses, selected, np.inf, axis=-1)
        best = losses.argmin(-1)[..., None].astype(np.int32)
        selected = best if selected is None else np.concatenate([selected, best], axis=-1)
    assert selected is not None
    return selected


def by_router(model: Decoder, frozen: dict, batches: Batches, num_experts: int) -> np.ndarray:
    """Selects the experts with the most calibration tokens, in descending order: int32 [C, L, num_experts]."""
    counts = _total(partial(_client_counts, model, frozen), batches)
    return np.argsort(-counts, axis=-1, kind="stable")[..., :num_experts].astype(np.int32)


def at_random(key: jax.Array, shape: tuple[int, int, int], num_experts: int) -> np.ndarray:
    """Selects uniformly without replacement, given the shape (C, L, E): int32 [C, L, num_experts]."""
    scores = jax.random.uniform(key, shape)
    return np.asarray(jnp.argsort(scores, axis=-1)[..., :num_experts], np.int32)


def select(
    model: Decoder, frozen: dict, batches: Batches, settings: SelectionSettings, *, num_clients: int, key: jax.Array
) -> np.ndarray:
    """Selects experts for each client and layer: int32 [C, L, num_experts]. A random selection reads no batches."""
    if settings.selection == "random":
        shape = (num_clients, model.config.num_moe_layers, model.config.num_experts)
        return at_random(key, shape, settings.num_experts)
    choose = {"reconstruction": by_reconstruction, "router": by_router}[settings.selection]
    return choose(model, frozen, batches, settings.num_experts)
