"""Greedy generation with a key-value cache, for all clients at once over the one backbone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from flex_jax.federated.client import collections
from flex_jax.federated.state import ClientState, Frozen
from flex_jax.models.decoder import Decoder, head_weights, init_cache


@partial(jax.jit, static_argnums=0, static_argnames=("max_new_tokens", "end"))
def greedy(
    model: Decoder,
    frozen: Frozen,
    shared: dict,
    clients: ClientState,
    prompts: jax.Array,
    lengths: jax.Array,
    *,
    max_new_tokens: int,
    end: int,
) -> jax.Array:
    """Each client's most likely continuation of its prompts, [C, B, max_new_tokens] int32.

    clients: leading axis C; prompts [C, B, P] int32, right-padded, of `lengths` [C, B] tokens, 0 for rows to leave
    out. A continuation ends with the token `end`, which fills the rest of its row; the loop stops when all have ended.
    """
    width = prompts.shape[2] + max_new_tokens
    head = head_weights(model, frozen.params)

    def extend(client, tokens, positions, cache):
        variables = collections(frozen, shared, client)
        features = model.apply(variables, tokens, positions=positions, cache=cache, method=Decoder.features)
        return features.hidden, features.cache

    def most_likely(hidden):  # [C, B, D] -> [C, B]
        logits = jnp.einsum("cbd,vd->cbv", hidden, head, preferred_element_type=jnp.float32)
        return logits.argmax(-1).astype(jnp.int32)

    def read_prompt(client, tokens, length):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        cache = init_cache(model.config, tokens.shape[0], width, head.dtype)
        hidden, cache = extend(client, tokens, positions, cache)
        last = jnp.maximum(length - 1, 0)[:, None, None]
        return jnp.take_along_axis(hidden, last, axis=1)[:, 0], cache

    def step(carry):
        i, token, done, cache, out = carry
        out = out.at[:, :, i].set(jnp.where(done, end, token))
        done = done | (token == end)
        # Padding keys of the prompt are overwritten as the continuation reaches their positions.
        hidden, cache = jax.vmap(extend)(clients, token[..., None], (lengths + i)[..., None], cache)
        return i + 1, most_likely(hidden[:, :, 0]), done, cache, out

    def unfinished(carry):
        i, _, done, _, _ = carry
        return (i < max_new_tokens) & ~done.all()

    hidden, cache = jax.vmap(read_prompt)(clients, prompts, lengths)
    out = jnp.full((*lengths.shape, max_new_tokens), end, jnp.int32)
    carry = (jnp.int32(0), most_likely(hidden), lengths == 0, cache, out)
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


def generate_texts(
    model: Decoder,
    frozen: Frozen,
    shared: dict,
    clients: ClientState,
    prompts: list[list[list[int]]],
    tokenizer,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[list[str]]:
    """The answers of every client to its own prompts (token ids), `batch_size` prompts of each client at a time."""
    end = tokenizer.eos_token_id
    tokens, lengths = pad_prompts(prompts, end)
    fill = -tokens.shape[1] % batch_size
    tokens = np.pad(tokens, ((0, 0), (0, fill), (0, 0)), constant_values=end)
    lengths = np.pad(lengths, ((0, 0), (0, fill)))
    answers = [[] for _ in prompts]
    for start in range(0, tokens.shape[1], batch_size):
        rows = slice(start, start + batch_size)
        new = greedy(
            model, frozen, shared, clients, tokens[:, rows], lengths[:, rows], max_new_tokens=max_new_tokens, end=end
        )
        for client, texts in zip(answers, np.asarray(new), strict=True):
            client.extend(text.strip() for text in tokenizer.batch_decode(texts, skip_special_tokens=True))
    return [client[: len(own)] for client, own in zip(answers, prompts, strict=True)]
