"""Cohorts and checkpoints."""

import jax
import numpy as np
import pytest

from flex_jax.federated.checkpoint import Checkpoints
from flex_jax.federated.cohort import sample_cohort


def test_a_cohort_repeats_by_key_and_round_and_has_no_client_twice():
    key = jax.random.PRNGKey(0)
    rounds = [sample_cohort(key, round, 10, 4) for round in range(30)]
    again = [sample_cohort(key, round, 10, 4) for round in range(30)]
    np.testing.assert_array_equal(rounds, again)
    assert all(len(set(cohort.tolist())) == 4 for cohort in rounds)
    assert len({tuple(cohort) for cohort in rounds}) > 20
    assert set(np.concatenate(rounds)) == set(range(10))
    np.testing.assert_array_equal(sample_cohort(key, 3, 4, 4), range(4))


@pytest.mark.parametrize("name", ["flex", "fedavg", "local"])
def test_the_newest_checkpoint_comes_back_bit_for_bit(tmp_path, name, prepared, one_round):
    frozen, state = prepared(name)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state) is None
        for _ in range(2):
            state, _ = one_round(name, frozen, state)
            checkpoints.save(state)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(prepared(name)[1])
    assert int(restored.round) == 2
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
