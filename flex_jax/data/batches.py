"""Token arrays of clients, and the batches for training, calibration and evaluation."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from flex_jax.data.prompts import encode_and_count

ROUND_STREAM = 5  # keeps the random streams of this module different from those of partition.py


class ClientDataset(NamedTuple):
    """The N examples of a client, right-padded to S tokens."""

    name: str
    tokens: np.ndarray  # [N, S] int32
    lengths: np.ndarray  # [N] int32: tokens of each example
    prompt_lengths: np.ndarray  # [N] int32: tokens of its prompt
    full_lengths: np.ndarray  # [N] int32: tokens of each example before it was cut to S


class Batch(NamedTuple):
    """Examples with any number of leading axes.

    loss_mask is 1 at the target positions: the tokens of the response and its end of sequence. A token is predicted
    from the tokens before it, so position 0 is never a target.
    """

    tokens: np.ndarray  # [..., B, S] int32
    loss_mask: np.ndarray  # [..., B, S] float32


def encode_client(
    name: str, records: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> ClientDataset:
    """Returns the records of a client as tokens, in their order, padded with the end-of-sequence token."""
    tokens = np.full((len(records), sequence_length), tokenizer.eos_token_id, np.int32)
    lengths, prompt_lengths, full_lengths = np.zeros((3, len(records)), np.int32)
    for row, record in enumerate(records):
        ids, prompt_lengths[row], full_lengths[row] = encode_and_count(record, tokenizer, sequence_length)
        lengths[row] = len(ids)
        tokens[row, : len(ids)] = ids
    return ClientDataset(name, tokens, lengths, prompt_lengths, full_lengths)


def interleave(datasets: Sequence[ClientDataset], num_examples: int) -> ClientDataset:
    """Returns up to `num_examples` examples: the first of every client, then the second of every client, and so on."""
    turns = sorted((row, client) for client, dataset in enumerate(datasets) for row in range(len(dataset.tokens)))
    examples = [[array[row] for array in datasets[client][1:]] for row, client in turns[:num_examples]]
    return ClientDataset("pooled", *map(np.stack, zip(*examples, strict=True)))


def round_batches(
    datasets: Sequence[ClientDataset],
    cohort: Sequence[int] | np.ndarray,
    *,
    round: int,
    seed: int,
    local_steps: int,
    batch_size: int,
) -> Batch:
    """Returns the training batches of one round: leading axes [C, local_steps], then [B, S].

    A client draws local_steps * batch_size examples without replacement. If it has fewer, it repeats them, in a new
    order each time. The draw depends only on (seed, client, round), not on the rest of the cohort.
    """
    batches, count = [], local_steps * batch_size
    for client in cohort:
        rng = np.random.default_rng([seed, ROUND_STREAM, client, round])
        num_examples = len(datasets[client].tokens)
        passes = -(-count // num_examples)
        rows = np.concatenate([rng.permutation(num_examples) for _ in range(passes)])[:count]
        batches.append(_take(datasets[client], rows.reshape(local_steps, batch_size)))
    return _stack(batches)


def calibration_batches(
    dataset: ClientDataset, *, num_examples: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (input_ids, attention_mask), both [B, S] int32, for the first `num_examples` examples.

    All batches have the same shape: the last one is filled with rows whose attention_mask is 0.
    """
    count = min(num_examples, len(dataset.tokens))
    attention_mask = (np.arange(dataset.tokens.shape[1]) < dataset.lengths[:, None]).astype(np.int32)
    for start in range(0, count, batch_size):
        wanted = np.arange(start, start + batch_size)
        rows = np.minimum(wanted, count - 1)
        yield dataset.tokens[rows], attention_mask[rows] * (wanted < count)[:, None]


def evaluation_batches(datasets: Sequence[ClientDataset], batch_size: int) -> list[Batch]:
    """Returns every example of every client once, in order, as batches with leading axes [C, B, S].

    Clients with fewer examples than the largest are filled with rows whose loss_mask is 0.
    """
    longest = max(len(dataset.tokens) for dataset in datasets)
    return [
        _stack([_take(dataset, np.arange(start, start + batch_size)) for dataset in datasets])
        for start in range(0, longest, batch_size)
    ]


def _take(dataset: ClientDataset, wanted: np.ndarray) -> Batch:
    """Returns the examples with these numbers. An example past the last one has a loss_mask of 0."""
    rows = np.minimum(wanted, len(dataset.tokens) - 1)
    position = np.arange(dataset.tokens.shape[1])
    first_target = np.maximum(dataset.prompt_lengths[rows], 1)[..., None]
    target = (position >= first_target) & (position < dataset.lengths[rows][..., None]) & (rows == wanted)[..., None]
    return Batch(dataset.tokens[rows], target.astype(np.float32))


def _stack(batches: Sequence[Batch]) -> Batch:
    return Batch(*(np.stack(arrays) for arrays in zip(*batches, strict=True)))
