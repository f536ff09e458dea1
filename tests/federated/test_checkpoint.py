"""Rounds on disk, and the states of clients that are read from there."""

import threading

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from flex_jax.federated.checkpoint import Checkpoints
from flex_jax.federated.init import start
from tests.federated.helpers import assert_equal, of_client

KEY = jax.random.PRNGKey(7)
NUM_CLIENTS = 1000


@pytest.fixture
def opened(spec_of, params, model_config, tmp_path):
    """name -> a function that opens the run of many clients as a new process would: (Checkpoints, Start)."""
    size = NUM_CLIENTS, model_config.num_layers, 1
    grafted = np.random.default_rng(0).integers(0, model_config.num_experts, size)

    def open_run(name):
        begun = start(spec_of(name), params, grafted, key=KEY)
        return Checkpoints(tmp_path, begun.init_clients, NUM_CLIENTS), begun

    return open_run


def changed(states, by):
    return jax.tree.map(lambda leaf: leaf + by if leaf.dtype == np.float32 else leaf, states)


def joined(*states):
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *states)


@pytest.mark.parametrize("name", ["flex", "apfl", "hetlora"])
def test_states_of_changing_cohorts_come_back_bit_for_bit(name, opened):
    """After every round and again in a new process: those of any cohort, and those of clients never drawn."""
    checkpoints, begun = opened(name)
    cohorts = [np.array(cohort) for cohort in ([0, 1, 7], [0, 1, 7], [1, 500, 999], [0, 7, 8])]
    expected = {client: begun.init_clients([client]) for client in (0, 1, 2, 7, 8, 500, 999)}
    with checkpoints:
        assert checkpoints.restore(begun.state) is None
        state = begun.state
        for by, cohort in enumerate(cohorts, 1):
            states = checkpoints.clients.load(cohort)
            assert_equal(states, joined(*(expected[client] for client in cohort)))
            states = changed(states, by)
            expected |= {client: of_client(states, slice(i, i + 1)) for i, client in enumerate(cohort)}
            state = state._replace(round=state.round + 1, clients=states, server=changed(state.server, by))
            checkpoints.clients.cache(cohort, states)
            loaded = checkpoints.clients.load(np.array([cohort[1], 2]))
            assert_equal(loaded, joined(expected[cohort[1]], expected[2]))
            checkpoints.save(state)
    again, begun = opened(name)
    with again:
        restored = again.restore(begun.state)
        assert int(restored.round) == 4
        assert_equal(restored.server, state.server)
        for client, own in expected.items():
            assert_equal(again.clients.load(np.array([client])), own)


def save_round(checkpoints, begun, number, cohort, by=0.0):
    """Saves what a round makes of a cohort, and returns the states."""
    states = changed(checkpoints.clients.load(np.array(cohort)), by)
    checkpoints.clients.cache(np.array(cohort), states)
    checkpoints.save(begun.state._replace(round=np.int32(number)))
    return states


def test_disk_has_one_file_for_each_client_that_took_part(opened, tmp_path):
    checkpoints, begun = opened("local")
    with checkpoints:
        for number, cohort in enumerate([[0, 1], [1, 2], [1, 2], [900, 1]], 1):
            save_round(checkpoints, begun, number, cohort)
    assert len(list((tmp_path / "clients").iterdir())) == 4


def test_a_round_cut_off_before_its_end_leaves_the_last_one(opened, tmp_path):
    """Files of clients are there, the server's state is not: as after a kill between the two."""
    checkpoints, begun = opened("local")
    cohort = np.array([3, 4])
    with checkpoints:
        states = save_round(checkpoints, begun, 1, cohort, by=1.0)
    for client in cohort:
        (tmp_path / "clients" / f"client{client:06d}-round000002.safetensors").write_bytes(b"torn")
    again, begun = opened("local")
    with again:
        assert int(again.restore(begun.state).round) == 1
        assert_equal(again.clients.load(cohort), states)


def test_a_run_of_another_number_of_clients_is_not_restored(opened, tmp_path):
    """orbax alone would cut the table of client files."""
    checkpoints, begun = opened("local")
    with checkpoints:
        save_round(checkpoints, begun, 1, [3])
    with (
        Checkpoints(tmp_path, begun.init_clients, 10) as fewer,
        pytest.raises(ValueError, match="1000 clients, not 10"),
    ):
        fewer.restore(begun.state)


def test_a_save_that_fails_is_not_silent(opened, monkeypatch):
    checkpoints, begun = opened("local")

    def full_disk(*_):
        raise OSError(28, "full")

    monkeypatch.setattr("flex_jax.federated.client_store.save_file", full_disk)
    with pytest.raises(OSError, match="full"), checkpoints:
        save_round(checkpoints, begun, 1, [3])


@pytest.fixture
def slow_disk(monkeypatch):
    """Makes every write of a client's file wait. Setting the event ends it."""
    release = threading.Event()

    def wait_and_save(*arguments):
        assert release.wait(20)
        save_file(*arguments)

    monkeypatch.setattr("flex_jax.federated.client_store.save_file", wait_and_save)
    yield release
    release.set()


@pytest.mark.parametrize("name", ["local", "apfl"])
@pytest.mark.parametrize("finished", [0, 1])
def test_a_client_whose_file_is_being_written_is_loaded_as_the_newest(name, finished, opened, slow_disk):
    """Another cohort is in the cache. On the disk is a file of the round before, or none yet."""
    checkpoints, begun = opened(name)
    with checkpoints:
        if finished:
            slow_disk.set()
            save_round(checkpoints, begun, 1, [3, 4], by=1.0)
            checkpoints._saving.result()
            slow_disk.clear()
        states = save_round(checkpoints, begun, finished + 1, [3, 4], by=2.0)
        others = changed(checkpoints.clients.load(np.array([8, 9])), 3.0)
        checkpoints.clients.cache(np.array([8, 9]), others)
        alone = of_client(states, slice(0, 1))
        expected = joined(of_client(others, slice(1, 2)), alone, begun.init_clients([5]))

        def check():
            assert_equal(checkpoints.clients.load(np.array([3])), alone)
            assert_equal(checkpoints.clients.load(np.array([9, 3, 5])), expected)

        check()
        assert checkpoints.clients.newest[3] == finished
        slow_disk.set()
        checkpoints.save(begun.state._replace(round=np.int32(finished + 2)))  # waits for the one before
        assert checkpoints.clients.newest[3] == finished + 1
        check()


def test_a_write_that_ends_during_a_load_changes_nothing(opened, slow_disk, monkeypatch):
    """The old file may be gone and the new one may not be in `newest` yet, in any order."""
    checkpoints, begun = opened("local")
    with checkpoints:
        slow_disk.set()
        save_round(checkpoints, begun, 1, [3], by=1.0)
        checkpoints._saving.result()
        slow_disk.clear()
        states = save_round(checkpoints, begun, 2, [3], by=2.0)
        checkpoints.clients.cache(np.array([8]), begun.init_clients([8]))

        def finish_the_write(client_ids):
            slow_disk.set()
            checkpoints._saving.result()
            return begun.init_clients(client_ids)

        monkeypatch.setattr(checkpoints.clients, "_init_clients", finish_the_write)
        assert_equal(checkpoints.clients.load(np.array([3])), states)
