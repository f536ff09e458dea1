"""Token arrays of a client, and the batches that training, calibration and evaluation take from them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from flex_jax.data.prompts import encode

ROUND_STREAM = 5  # tells this module's random streams from those of partition.py


class ClientDataset(NamedTuple):
    """A client's N examples, right-padded to S tokens."""

    name: str
    tokens: np.ndarray  # [N, S] int32
    lengths: np.ndarray  # [N] int32: tokens of an example
    prompt_lengths: np.ndarray  # [N] int32: how many of them are the prompt's


class Batch(NamedTuple):
    """Examples with any leading axes.

    loss_mask is 1 at the targets: the positions whose token belongs to the response or ends it. The token at position
    t is predicted from those before t, so position 0 is never a target.
    """

    tokens: np.ndarray  # [..., B, S] int32
    loss_mask: np.ndarray  # [..., B, S] float32


def encode_client(
    name: str, records: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> ClientDataset:
    """Tokens of all `records` of one client, in their order; padding is the end-of-sequence token.

    Raises:
        InputError: sequence_length is too short for the prompt's heading (see `prompts.encode`).
    """
    tokens = np.full((len(records), sequence_length), tokenizer.eos_token_id, np.int32)
    lengths = np.zeros(len(records), np.int32)
    prompt_lengths = np.zeros(len(records), np.int32)
    for row, record in enumerate(records):
        ids, prompt_lengths[row] = encode(record, tokenizer, sequence_length)
        lengths[row] = len(ids)
        tokens[row, : len(ids)] = ids
    return ClientDataset(name, tokens, lengths, prompt_lengths)


def mixed(datasets: Sequence[ClientDataset], examples: int) -> ClientDataset:
    """One data set of up to `examples` examples, the first of all clients, then the second of all, and so on."""
    turns = [(row, client) for client, dataset in enumerate(datasets) for row in range(len(dataset.tokens))]
    picked = sorted(turns)[:examples]
    columns = ("tokens", "lengths", "prompt_lengths")
    arrays = [np.stack([getattr(datasets[client], column)[row] for row, client in picked]) for column in columns]
    return ClientDataset("common", *arrays)


def round_batches(
    datasets: Sequence[ClientDataset],
    cohort: Sequence[int],
    *,
    round: int,
    seed: int,
    local_steps: int,
    batch_size: int,
) -> Batch:
    """What the clients of `cohort` train on in one round: leading axes [C, local_steps], then [B, S].

    A client draws local_steps * batch_size examples without replacement; one that has fewer goes over them again,
    each time in a new order. The draw depends on (seed, client, round) alone, not on the rest of the cohort.
    """
    batches = []
    for client in cohort:
        rng = np.random.default_rng([seed, ROUND_STREAM, client, round])
        rows = _draw(len(datasets[client].tokens), local_steps * batch_size, rng)
        batches.append(_take(datasets[client], rows.reshape(local_steps, batch_size)))
    return _stack(batches)


def calibration_batches(
    dataset: ClientDataset, *, examples: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(input_ids [B, S] int32, attention_mask [B, S] int32) over the first `examples` examples, whole sequences.

    The last batch is filled up with rows whose attention_mask is all 0, so that every batch has the same shape.
    """
    count = min(examples, len(dataset.tokens))
    attention_mask = (np.arange(dataset.tokens.shape[1]) < dataset.lengths[:, None]).astype(np.int32)
    for start in range(0, count, batch_size):
        rows = np.arange(start, start + batch_size)
        present = (rows < count).astype(np.int32)
        rows = np.minimum(rows, count - 1)
        yield dataset.tokens[rows], attention_mask[rows] * present[:, None]


def evaluation_batches(datasets: Sequence[ClientDataset], batch_size: int) -> list[Batch]:
    """Every client's examples once, in order and in step: batches with leading axes [C, B, S].

    A client with fewer examples than the largest goes on with rows whose loss_mask is all 0.
    """
    longest = max(len(dataset.tokens) for dataset in datasets)
    return [
        _stack([_take_in_order(dataset, np.arange(start, start + batch_size)) for dataset in datasets])
        for start in range(0, longest, batch_size)
    ]


def _draw(examples: int, count: int, rng: np.random.Generator) -> np.ndarray:
    passes = -(-count // examples)
    return np.concatenate([rng.permutation(examples) for _ in range(passes)])[:count]


def _take(dataset: ClientDataset, rows: np.ndarray) -> Batch:
    """The examples `rows` [...] of a dataset: a batch [..., S]."""
    position = np.arange(dataset.tokens.shape[1])
    first_target = np.maximum(dataset.prompt_lengths[rows], 1)[..., None]
    target = (position >= first_target) & (position < dataset.lengths[rows][..., None])
    return Batch(dataset.tokens[rows], target.astype(np.float32))


def _take_in_order(dataset: ClientDataset, rows: np.ndarray) -> Batch:
    last = len(dataset.tokens) - 1
    batch = _take(dataset, np.minimum(rows, last))
    return batch._replace(loss_mask=batch.loss_mask * (rows <= last)[:, None].astype(np.float32))


def _stack(batches: Sequence[Batch]) -> Batch:
    return Batch(*(np.stack(arrays) for arrays in zip(*batches, strict=True)))
