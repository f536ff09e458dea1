"""Greedy and sampled generation with a key-value cache, for all clients at once over the one backbone."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from flex_jax.federated.client import collections
from flex_jax.federated.method import Recipe
from flex_jax.federated.state import ClientState, Frozen, ServerState
from flex_jax.models.decoder import Decoder, head_weights, init_cache


class Sampling(NamedTuple):
    """How tokens are drawn. Nothing here is static: other values need no other compilation."""

    keys: jax.Array  # [C, B], one a row, so that what a row draws does not depend on the rows beside it
    temperature: float  # above 0
    top_p: float  # the nucleus (arXiv 1904.09751), in (0, 1]; 1 is the whole vocabulary


def draw(key: jax.Array, logits: jax.Array, temperature: float, top_p: float) -> jax.Array:
    """A token [] from softmax(logits / temperature), logits [V], restricted to the nucleus and renormalised.

    The nucleus is the shortest list of most likely tokens whose probabilities sum to at least top_p.
    """
    values, tokens = jax.lax.top_k(logits, logits.shape[-1])
    scaled = (values - values[0]) / jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
    probabilities = jax.nn.softmax(scaled)
    before = jnp.cumsum(probabilities) - probabilities
    nucleus = (before < top_p) | (top_p >= 1)  # rounding must not cut the tail where all is wanted
    return tokens[jax.random.categorical(key, jnp.where(nucleus, scaled, -jnp.inf))]


@partial(jax.jit, static_argnums=0, static_argnames=("max_new_tokens", "end"))
def generate(
    recipe: Recipe,
    frozen: Frozen,
    server: ServerState,
    clients: ClientState,
    prompts: jax.Array,
    lengths: jax.Array,
    *,
    max_new_tokens: int,
    end: int,
    sampling: Sampling | None = None,
) -> jax.Array:
    """Each client's continuation of its prompts, [C, B, max_new_tokens] int32: the most likely one, or a sample.

    clients: leading axis C; prompts [C, B, P] int32, right-padded, of `lengths` [C, B] tokens, 0 for rows to leave
    out. A continuation ends with the token `end`, which fills the rest of its row; the loop stops when all have ended.
    """
    width = prompts.shape[2] + max_new_tokens
    model = recipe.model
    head = head_weights(model, frozen.params)

    def extend(client, tokens, positions, cache, mask=None):
        variables = collections(recipe, frozen, server, client)
        features = model.apply(variables, tokens, mask, positions=positions, cache=cache, method=Decoder.features)
        return features.hidden, features.cache

    def next_token(i, hidden):  # [C, B, D] -> [C, B]
        logits = jnp.einsum("cbd,vd->cbv", hidden, head, preferred_element_type=jnp.float32)
        if sampling is None:
            return logits.argmax(-1).astype(jnp.int32)

        def draw_row(key, logits):
            return draw(jax.random.fold_in(key, i), logits, sampling.temperature, sampling.top_p)

        return jax.vmap(jax.vmap(draw_row))(sampling.keys, logits)

    def read_prompt(client, tokens, length):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        cache = init_cache(model.config, tokens.shape[0], width, head.dtype)
        # The mask hides nothing here. It tells the length of each sequence, which dynamic RoPE needs.
        hidden, cache = extend(client, tokens, positions, cache, positions < length[:, None])
        last = jnp.maximum(length - 1, 0)[:, None, None]
        return jnp.take_along_axis(hidden, last, axis=1)[:, 0], cache

    def step(carry):
        i, token, done, cache, out = carry
        out = out.at[:, :, i].set(jnp.where(done, end, token))
        done = done | (token == end)
        # Padding keys of the prompt are overwritten as the continuation reaches their positions. Clients are the second
        # axis of the cache: layers, which a scan takes one by one, stay the first, so that no step turns it over.
        extend_each = jax.vmap(extend, (0, 0, 0, 1), (0, 1))
        hidden, cache = extend_each(clients, token[..., None], (lengths + i)[..., None], cache)
        return i + 1, next_token(i + 1, hidden[:, :, 0]), done, cache, out

    def unfinished(carry):
        i, _, done, _, _ = carry
        return (i < max_new_tokens) & ~done.all()

    hidden, cache = jax.vmap(read_prompt, out_axes=(0, 1))(clients, prompts, lengths)
    out = jnp.full((*lengths.shape, max_new_tokens), end, jnp.int32)
    carry = (jnp.int32(0), next_token(0, hidden), lengths == 0, cache, out)
    return jax.lax.while_loop(unfinished, step, carry)[-1]


def pad_prompts(prompts: list[list[list[int]]], end: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids per client and example -> (prompts [C, N, P], lengths [C, N]), right-padded, missing rows of length 0.

    P is a multiple of 32, so that data sets of like length share a compilation.
    """
    examples = max(map(len, prompts))
    longest = max(len(ids) for client in prompts for ids in client)
    tokens = np.full((len(prompts), examples, -(-longest // 32) * 32), end, np.int32)
    lengths = np.zeros(tokens.shape[:2], np.int32)
    for c, client in enumerate(prompts):
        for i, ids in enumerate(client):
            tokens[c, i, : len(ids)] = ids
            lengths[c, i] = len(ids)
    return tokens, lengths


def generate_tokens(
    recipe: Recipe,
    frozen: Frozen,
    server: ServerState,
    clients: ClientState,
    prompts: list[list[list[int]]],
    *,
    end: int,
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling | None = None,
) -> list[list[list[int]]]:
    """The token ids that every client answers to each of its own prompts (token ids; none for an empty one), without
    the `end`. `batch_size` prompts of each client at a time; sampling.keys are [C, N], N the most prompts of a client.
    """
    tokens, lengths = pad_prompts(prompts, end)
    examples = tokens.shape[1]
    fill = -examples % batch_size
    tokens = np.pad(tokens, ((0, 0), (0, fill), (0, 0)), constant_values=end)
    lengths = np.pad(lengths, ((0, 0), (0, fill)))
    answers = [[] for _ in prompts]
    for start in tqdm(range(0, examples, batch_size), desc="generation", unit="batch", leave=False, disable=None):
        rows = np.arange(start, start + batch_size)
        keys = None if sampling is None else sampling.keys[:, np.minimum(rows, examples - 1)]
        new = generate(
            recipe,
            frozen,
            server,
            clients,
            tokens[:, rows],
            lengths[:, rows],
            max_new_tokens=max_new_tokens,
            end=end,
            sampling=sampling and sampling._replace(keys=keys),
        )
        for client, ids in zip(answers, np.asarray(new).tolist(), strict=True):
            client.extend(row[: row.index(end)] if end in row else row for row in ids)
    return [client[: len(own)] for client, own in zip(answers, prompts, strict=True)]


def decode(answers: list[list[int]], tokenizer) -> list[str]:
    """The texts of answers."""
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def generate_texts(
    recipe: Recipe,
    frozen: Frozen,
    server: ServerState,
    clients: ClientState,
    prompts: list[list[list[int]]],
    tokenizer,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[list[str]]:
    """The most likely answers of every client to its own prompts (token ids), as `generate_tokens` gives them."""
    answers = generate_tokens(
        recipe,
        frozen,
        server,
        clients,
        prompts,
        end=tokenizer.eos_token_id,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    return [decode(client, tokenizer) for client in answers]
