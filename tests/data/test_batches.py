import numpy as np
import pytest

from flex_jax.data.batches import (
    ClientDataset,
    calibration_batches,
    encode_client,
    evaluation_batches,
    interleave,
    round_batches,
)
from flex_jax.data.prompts import encode


def numbered(count: int, sequence: int = 6) -> ClientDataset:
    """Example i has the token i at every position, and 4 tokens, 2 of them in the prompt."""
    tokens = np.repeat(np.arange(count, dtype=np.int32)[:, None], sequence, axis=1)
    return ClientDataset(f"n{count}", tokens, *(np.full(count, length, np.int32) for length in (4, 2, 4)))


DRAW = {"round": 3, "seed": 0, "local_steps": 3, "batch_size": 4}


def test_encode_client_pads_on_the_right(tokenizer):
    records = [
        {"instruction": "Add.", "context": "1 2", "response": "3", "category": "a"},
        {"instruction": "Count.", "context": "", "response": "one two three", "category": "a"},
    ]
    dataset = encode_client("a", records, tokenizer, 160)
    for row, record in enumerate(records):
        ids, prompt_length = encode(record, tokenizer, 160)
        assert dataset.tokens[row, : len(ids)].tolist() == ids
        assert set(dataset.tokens[row, len(ids) :].tolist()) == {tokenizer.eos_token_id}
        assert (dataset.lengths[row], dataset.prompt_lengths[row]) == (len(ids), prompt_length)
    assert {array.dtype for array in dataset[1:]} == {np.dtype(np.int32)}


def test_targets_are_the_response_and_its_eos(tokenizer):
    record = {"instruction": "Count.", "context": "", "response": "one two", "category": "a"}
    dataset = encode_client("a", [record], tokenizer, 160)
    (batch,) = evaluation_batches([dataset], batch_size=1)
    targets = batch.tokens[batch.loss_mask == 1]
    assert tokenizer.decode(targets) == " one two<eos>"


def test_position_zero_is_never_a_target():
    dataset = numbered(1)._replace(prompt_lengths=np.zeros(1, np.int32))
    (batch,) = evaluation_batches([dataset], batch_size=1)
    assert batch.loss_mask.tolist() == [[[0, 1, 1, 1, 0, 0]]]


def test_a_round_has_the_clients_steps_and_batch_in_front():
    batch = round_batches([numbered(20), numbered(30)], [0, 1], **DRAW)
    assert batch.tokens.shape == batch.loss_mask.shape == (2, 3, 4, 6)
    assert (batch.tokens.dtype, batch.loss_mask.dtype) == (np.int32, np.float32)
    assert (batch.loss_mask == [0, 0, 1, 1, 0, 0]).all()


def test_a_round_draws_without_replacement():
    batch = round_batches([numbered(20)], [0], **DRAW)
    assert len(set(batch.tokens[0, ..., 0].ravel().tolist())) == 12


def test_a_small_client_goes_over_its_examples_again_in_another_order():
    drawn = round_batches([numbered(5)], [0], **DRAW).tokens[0, ..., 0].ravel().tolist()
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == [0, 1, 2, 3, 4]
    assert drawn[:5] != drawn[5:10] and len(set(drawn[10:])) == 2


def test_a_clients_draw_does_not_depend_on_the_cohort():
    datasets = [numbered(50), numbered(50), numbered(50)]
    together = round_batches(datasets, [0, 1, 2], **DRAW).tokens
    alone = round_batches(datasets, [2], **DRAW).tokens
    assert (together[2] == alone[0]).all()
    assert (together[0] != together[1]).any()


@pytest.mark.parametrize("change", [{"round": 4}, {"seed": 1}])
def test_round_and_seed_change_the_draw(change):
    first = round_batches([numbered(50)], [0], **DRAW).tokens
    assert (first == round_batches([numbered(50)], [0], **DRAW).tokens).all()
    assert (first != round_batches([numbered(50)], [0], **(DRAW | change)).tokens).any()


def test_calibration_takes_the_first_examples_in_one_shape():
    batches = list(calibration_batches(numbered(20), num_examples=7, batch_size=3))
    assert [tokens.shape for tokens, _ in batches] == [(3, 6)] * 3
    assert {array.dtype for batch in batches for array in batch} == {np.dtype(np.int32)}
    mask = np.concatenate([mask for _, mask in batches])
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0]] * 7 + [[0] * 6] * 2
    assert np.concatenate([tokens for tokens, _ in batches])[:7, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_calibration_of_a_small_client_takes_what_there_is():
    masks = [mask for _, mask in calibration_batches(numbered(2), num_examples=7, batch_size=3)]
    assert len(masks) == 1 and masks[0].any(axis=1).tolist() == [True, True, False]


def test_interleave_takes_the_clients_in_turns():
    pooled = interleave([numbered(3), numbered(1)._replace(tokens=np.full((1, 6), 9, np.int32)), numbered(2)], 5)
    assert pooled.name == "pooled"
    assert pooled.tokens[:, 0].tolist() == [0, 9, 0, 1, 1]
    assert pooled.lengths.tolist() == [4] * 5 and pooled.prompt_lengths.tolist() == [2] * 5


def test_evaluation_counts_every_example_of_every_client_once():
    datasets = [numbered(5), numbered(2), numbered(4)]
    batches = evaluation_batches(datasets, batch_size=2)
    assert [batch.tokens.shape for batch in batches] == [(3, 2, 6)] * 3
    for client, dataset in enumerate(datasets):
        counted = np.concatenate([b.tokens[client, b.loss_mask[client].any(axis=1), 0] for b in batches])
        assert counted.tolist() == list(range(len(dataset.tokens)))
