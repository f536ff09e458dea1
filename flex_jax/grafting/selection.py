"""Which experts each client grafts: by reconstruction (the paper), at random, or the most routed."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from flex_jax.grafting.reconstruction import batch_losses, probe_tokens, routed_counts
from flex_jax.models.decoder import Decoder

Batches = Callable[[], object]  # a fresh pass over (tokens [C, B, S], attention_mask [C, B, S]) pairs


@partial(jax.jit, static_argnums=0)
def _client_losses(model, frozen, tokens, attention_mask, kept):
    return jax.vmap(partial(batch_losses, model, frozen))(tokens, attention_mask, kept)


@partial(jax.jit, static_argnums=0)
def _client_counts(model, frozen, tokens, attention_mask):
    def count(tokens, attention_mask):
        return probe_tokens(model, routed_counts, frozen, tokens, attention_mask).sum((1, 2))

    return jax.vmap(count)(tokens, attention_mask)


def _total(function, batches: Batches, *arguments) -> np.ndarray:
    """Sum of function(tokens, mask, *arguments) over one pass, float64 on the host."""
    return sum(np.asarray(function(tokens, mask, *arguments), np.float64) for tokens, mask in batches())


def by_reconstruction(model: Decoder, frozen: dict, batches: Batches, experts: int) -> np.ndarray:
    """Greedy: add the expert that lowers the reconstruction loss most; for one expert this is exhaustive.

    One streaming pass over the calibration batches per expert kept. Returns [C, L, experts] int32.
    """
    kept = None
    for _ in range(experts):
        losses = _total(partial(_client_losses, model, frozen), batches, kept)
        if kept is not None:
            np.put_along_axis(losses, kept, np.inf, axis=-1)
        best = losses.argmin(-1)[..., None].astype(np.int32)
        kept = best if kept is None else np.concatenate([kept, best], axis=-1)
    return kept


def by_router(model: Decoder, frozen: dict, batches: Batches, experts: int) -> np.ndarray:
    """The experts that the router sends most calibration tokens to, most first. Returns [C, L, experts] int32."""
    counts = _total(partial(_client_counts, model, frozen), batches)
    return np.argsort(-counts, axis=-1, kind="stable")[..., :experts].astype(np.int32)


def at_random(key: jax.Array, clients: int, layers: int, experts_in_layer: int, experts: int) -> np.ndarray:
    """Uniform without replacement, per client and layer. Returns [C, L, experts] int32."""
    scores = jax.random.uniform(key, (clients, layers, experts_in_layer))
    return np.asarray(jnp.argsort(scores, axis=-1)[..., :experts], np.int32)


def select(
    model: Decoder, frozen: dict, batches: Batches, *, selection: str, experts: int, clients: int, key: jax.Array
) -> np.ndarray:
    """Chosen experts [C, L, experts] int32; selection is "reconstruction", "router" or "random"."""
    if selection == "random":
        return at_random(key, clients, model.config.moe_layers, model.config.experts, experts)
    choose = {"reconstruction": by_reconstruction, "router": by_router}[selection]
    return choose(model, frozen, batches, experts)
