"""Rounds on disk, and the rows of clients paged from there."""

import jax
import numpy as np
import pytest

from flex_jax.errors import InputError
from flex_jax.federated.checkpoint import Checkpoints
from flex_jax.federated.start import start

KEY = jax.random.PRNGKey(7)
CLIENTS = 1000


@pytest.fixture
def opened(recipe_of, params, model_config, tmp_path):
    """name -> a function that opens the run of many clients as a new process would: (Checkpoints, Start)."""
    chosen = np.random.default_rng(0).integers(0, model_config.experts, (CLIENTS, model_config.layers, 1))

    def open_run(name):
        begun = start(recipe_of(name), params, chosen, key=KEY)
        return Checkpoints(tmp_path, begun.clients, CLIENTS), begun

    return open_run


def changed(rows, by):
    return jax.tree.map(lambda leaf: leaf + by if leaf.dtype == np.float32 else leaf, rows)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", ["flex", "apfl", "hetlora"])
def test_rows_of_changing_cohorts_come_back_bit_for_bit(name, opened):
    """After every round and again in a new process: those of any cohort, and those of clients never drawn."""
    checkpoints, begun = opened(name)
    cohorts = [np.array(cohort) for cohort in ([0, 1, 7], [0, 1, 7], [1, 500, 999], [0, 7, 8])]
    expected = {number: begun.clients([number]) for number in (0, 1, 2, 7, 8, 500, 999)}
    with checkpoints:
        assert checkpoints.restore(begun.state) is None
        state = begun.state
        for by, cohort in enumerate(cohorts, 1):
            rows = checkpoints.load(cohort)
            assert_same(rows, jax.tree.map(lambda *leaves: np.concatenate(leaves), *(expected[n] for n in cohort)))
            rows = changed(rows, by)
            expected |= {n: jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], rows) for i, n in enumerate(cohort)}
            state = state._replace(round=state.round + 1, clients=rows, server=changed(state.server, by))
            checkpoints.hold(cohort, rows)
            assert_same(
                checkpoints.load(np.array([cohort[1], 2])),
                jax.tree.map(lambda *leaves: np.concatenate(leaves), expected[cohort[1]], expected[2]),
            )
            checkpoints.save(state)
    again, begun = opened(name)
    with again:
        restored = again.restore(begun.state)
        assert int(restored.round) == 4
        assert_same(restored.server, state.server)
        for number, row in expected.items():
            assert_same(again.load(np.array([number])), row)


def test_disk_holds_one_file_for_each_client_that_took_part(opened, tmp_path):
    checkpoints, begun = opened("local")
    with checkpoints:
        for number, cohort in enumerate([[0, 1], [1, 2], [1, 2], [900, 1]], 1):
            checkpoints.hold(np.array(cohort), checkpoints.load(np.array(cohort)))
            checkpoints.save(begun.state._replace(round=np.int32(number)))
    assert len(list((tmp_path / "clients").iterdir())) == 4


def test_a_round_cut_off_before_its_end_leaves_the_last_one(opened, tmp_path):
    """Files of clients are there, the server's state is not: as after a kill between the two."""
    checkpoints, begun = opened("local")
    cohort = np.array([3, 4])
    with checkpoints:
        rows = changed(checkpoints.load(cohort), 1.0)
        checkpoints.hold(cohort, rows)
        checkpoints.save(begun.state._replace(round=np.int32(1)))
    for number in cohort:
        (tmp_path / "clients" / f"client{number:06d}-round000002.safetensors").write_bytes(b"torn")
    again, begun = opened("local")
    with again:
        assert int(again.restore(begun.state).round) == 1
        assert_same(again.load(cohort), rows)


def test_a_lost_file_of_a_client_is_named(opened, tmp_path):
    checkpoints, begun = opened("local")
    with checkpoints:
        checkpoints.hold(np.array([3]), checkpoints.load(np.array([3])))
        checkpoints.save(begun.state._replace(round=np.int32(1)))
    for file in (tmp_path / "clients").iterdir():
        file.unlink()
    again, begun = opened("local")
    with again:
        again.restore(begun.state)
        with pytest.raises(InputError, match="client000003-round000001.safetensors: lost or damaged"):
            again.load(np.array([3]))


def test_a_save_that_fails_is_not_silent(opened, tmp_path, monkeypatch):
    checkpoints, begun = opened("local")

    def full_disk(*_):
        raise OSError(28, "full")

    monkeypatch.setattr("flex_jax.federated.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="full"), checkpoints:
        checkpoints.hold(np.array([3]), checkpoints.load(np.array([3])))
        checkpoints.save(begun.state._replace(round=np.int32(1)))
