"""Greedy and sampled generation with a key-value cache, for all clients at once over the one backbone."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from flex_jax.command import raise_if_stopped
from flex_jax.federated.client import ClientModels
from flex_jax.models.decoder import Decoder, head_weights, init_cache


class GenerationSettings(NamedTuple):
    """How long answers may be, and how many are generated at once."""

    end: int  # the token that ends an answer
    max_new_tokens: int
    batch_size: int  # prompts of each client


class Sampling(NamedTuple):
    """How tokens are drawn. Nothing here is static: other values need no new compilation."""

    keys: jax.Array  # [C, B], one for each prompt, so that an answer does not depend on the others in its batch
    temperature: float  # above 0
    top_p: float  # the nucleus (arXiv 1904.09751), in (0, 1]; 1 is the whole vocabulary


def draw(key: jax.Array, logits: jax.Array, temperature: float, top_p: float) -> jax.Array:
    """Draws a token [] from softmax(logits / temperature), logits [V], restricted to the nucleus and renormalised.

    The nucleus is the shortest list of likeliest tokens with probabilities that sum to at least top_p.
    """
    values, tokens = jax.lax.top_k(logits, logits.shape[-1])
    scaled = (values - values[0]) / jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
    probabilities = jax.nn.softmax(scaled)
    before = jnp.cumsum(probabilities) - probabilities
    nucleus = (before < top_p) | (top_p >= 1)  # rounding must not cut the tail at top_p = 1
    return tokens[jax.random.categorical(key, jnp.where(nucleus, scaled, -jnp.inf))]


@partial(jax.jit, static_argnames=("max_new_tokens", "end"))
def generate(
    models: ClientModels,
    prompts: jax.Array,
    lengths: jax.Array,
    *,
    max_new_tokens: int,
    end: int,
    sampling: Sampling | None = None,
) -> jax.Array:
    """Returns each client's continuation of its prompts, [C, B, max_new_tokens] int32: the likeliest one or a sample.

    A continuation ends with the token `end`, which fills the rest of its row. The loop stops when all have ended. The
    prompts [C, B, P] int32 are right-padded. Their lengths [C, B] are 0 for a row without a prompt.
    """
    length = prompts.shape[2] + max_new_tokens
    model = models.spec.model
    head = head_weights(model, models.frozen.params)

    def extend(client, tokens, positions, cache, mask=None):
        variables = models.variables(client)
        out: Any = model.apply(variables, tokens, mask, positions=positions, cache=cache, method=Decoder.features)
        return out.hidden, out.cache

    def next_token(i, hidden):  # [C, B, D] -> [C, B]
        logits = jnp.einsum("cbd,vd->cbv", hidden, head, preferred_element_type=jnp.float32)
        if sampling is None:
            return logits.argmax(-1).astype(jnp.int32)
        keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(sampling.keys, i)
        draw_one = partial(draw, temperature=sampling.temperature, top_p=sampling.top_p)
        return jax.vmap(jax.vmap(draw_one))(keys, logits)

    def read_prompt(client, tokens, num_tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        cache = init_cache(model.config, tokens.shape[0], length, head.dtype)
        # The mask hides nothing here. It gives the length of each sequence, which dynamic RoPE needs.
        hidden, cache = extend(client, tokens, positions, cache, positions < num_tokens[:, None])
        last = jnp.maximum(num_tokens - 1, 0)[:, None, None]
        return jnp.take_along_axis(hidden, last, axis=1)[:, 0], cache

    def step(carry):
        i, token, done, cache, out = carry
        out = out.at[:, :, i].set(jnp.where(done, end, token))
        done = done | (token == end)
        # The continuation overwrites the padding keys of the prompt when it reaches their positions. Clients are the
        # second axis of the cache. Layers stay the first, because a scan reads them one by one: no step transposes it.
        extend_each = jax.vmap(extend, (0, 0, 0, 1), (0, 1))
        hidden, cache = extend_each(models.clients, token[..., None], (lengths + i)[..., None], cache)
        return i + 1, next_token(i + 1, hidden[:, :, 0]), done, cache, out

    hidden, cache = jax.vmap(read_prompt, out_axes=(0, 1))(models.clients, prompts, lengths)
    out = jnp.full((*lengths.shape, max_new_tokens), end, jnp.int32)
    carry = (jnp.int32(0), next_token(0, hidden), lengths == 0, cache, out)
    return jax.lax.while_loop(lambda carry: (carry[0] < max_new_tokens) & ~carry[2].all(), step, carry)[-1]


def pad_prompts(prompts: list[list[list[int]]], end: int, batch_size: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Turns token ids per client and example into (prompts [C, N, P], lengths [C, N]), right-padded.

    Missing examples have length 0. N is a multiple of batch_size, and P of 32, so that data sets of similar length
    share a compilation.
    """
    batches = -(-max(map(len, prompts)) // batch_size)
    longest = max(len(ids) for client in prompts for ids in client)
    tokens = np.full((len(prompts), batches * batch_size, -(-longest // 32) * 32), end, np.int32)
    lengths = np.zeros(tokens.shape[:2], np.int32)
    for c, client in enumerate(prompts):
        for i, ids in enumerate(client):
            tokens[c, i, : len(ids)] = ids
            lengths[c, i] = len(ids)
    return tokens, lengths


def generate_tokens(
    models: ClientModels, prompts: list[list[list[int]]], settings: GenerationSettings, sampling: Sampling | None = None
) -> list[list[list[int]]]:
    """Returns the token ids that every client answers to each of its own prompts, without the end token.

    An empty prompt gets an empty answer. The keys of `sampling` are [C, N] for N prompts of the client with the most.
    """
    end, max_new_tokens, batch_size = settings
    tokens, lengths = pad_prompts(prompts, end, batch_size)
    answers = [[] for _ in prompts]
    starts = range(0, tokens.shape[1], batch_size)
    for start in tqdm(starts, desc="generation", unit="batch", leave=False, disable=None):
        raise_if_stopped()
        examples = np.arange(start, start + batch_size)
        batch = tokens[:, examples], lengths[:, examples]
        drawn = sampling and sampling._replace(keys=sampling.keys[:, np.minimum(examples, sampling.keys.shape[1] - 1)])
        new = generate(models, *batch, max_new_tokens=max_new_tokens, end=end, sampling=drawn)
        for client, ids in zip(answers, np.asarray(new).tolist(), strict=True):
            client.extend(answer[: answer.index(end)] if end in answer else answer for answer in ids)
    return [client[: len(asked)] for client, asked in zip(answers, prompts, strict=True)]


def decode(answers: list[list[int]], tokenizer) -> list[str]:
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
