"""Rounds on disk, and the states of clients that are read from there."""

import os
import shutil
import threading
from collections import Counter

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from flex_jax.errors import InputError
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
        identity = {"method": name, "clients": NUM_CLIENTS}
        return Checkpoints(tmp_path, begun.init_clients, NUM_CLIENTS, identity), begun

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
            checkpoints.save(state, Counter(rounds=by))
    again, begun = opened(name)
    with again:
        restored, totals = again.restore(begun.state)
        assert int(restored.round) == 4 and totals == {"rounds": 4}
        assert_equal(restored.server, state.server)
        for client, own in expected.items():
            assert_equal(again.clients.load(np.array([client])), own)


def save_round(checkpoints, begun, number, cohort, by=0.0):
    """Saves what a round makes of a cohort, and returns the states."""
    states = changed(checkpoints.clients.load(np.array(cohort)), by)
    checkpoints.clients.cache(np.array(cohort), states)
    checkpoints.save(begun.state._replace(round=np.int32(number)), Counter(rounds=number))
    return states


def files(tmp_path):
    return {file.name for file in (tmp_path / "clients").iterdir()}


def test_disk_has_the_clients_of_two_rounds(opened, tmp_path):
    """Also after a process that goes on from them."""
    checkpoints, begun = opened("local")
    with checkpoints:
        for number, cohort in enumerate([[0, 1], [1, 2], [1, 2], [900, 1]], 1):
            save_round(checkpoints, begun, number, cohort)
    names = {"000-round000001", "002-round000003", "001-round000003", "001-round000004", "900-round000004"}
    assert files(tmp_path) == {f"client000{name}.safetensors" for name in names}
    again, begun = opened("local")
    with again:
        again.restore(begun.state)
        save_round(again, begun, 5, [2, 1])
    names ^= {"001-round000003", "001-round000005", "002-round000005"}
    assert files(tmp_path) == {f"client000{name}.safetensors" for name in names}
    assert sorted(path.name for path in (tmp_path / "server").iterdir()) == ["4", "5"]


def test_what_a_kill_has_left_behind_is_removed(opened, tmp_path):
    checkpoints, begun = opened("local")
    with checkpoints:
        save_round(checkpoints, begun, 1, [3])
    sound = files(tmp_path)
    (tmp_path / "clients/.client000003-round000002.safetensors.x.tmp").write_bytes(b"torn")
    (tmp_path / "clients/client000003-round000002.safetensors").write_bytes(b"whole")
    (tmp_path / "server/2.orbax-checkpoint-tmp").mkdir()
    again, begun = opened("local")
    with again:
        assert int(again.restore(begun.state)[0].round) == 1
    assert files(tmp_path) == sound and [path.name for path in (tmp_path / "server").iterdir()] == ["1"]


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
        assert int(again.restore(begun.state)[0].round) == 1
        assert_equal(again.clients.load(cohort), states)


def test_a_run_of_another_identity_is_not_restored(opened, tmp_path):
    checkpoints, begun = opened("local")
    with checkpoints:
        save_round(checkpoints, begun, 1, [3])
    with (
        Checkpoints(tmp_path, begun.init_clients, 10, {"method": "local", "clients": 10}) as fewer,
        pytest.raises(InputError, match=r"of another run \(different: clients\); without it the same command"),
    ):
        fewer.restore(begun.state)
    assert len(files(tmp_path)) == 1


def flip_in(pattern):
    """Damage: one bit in the middle of the largest file."""

    def flip(directory):
        file = max(directory.glob(pattern), key=lambda file: file.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    return flip


def rewrite(change):
    """Damage: a whole safetensors file with other values or another label."""

    def damage(directory):
        file = directory / "clients/client000003-round000002.safetensors"
        with safe_open(file, "np") as stored:
            arrays, label = {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata()
        change(arrays, label)
        save_file(arrays, file, label)

    return damage


def not_a_number(arrays, label):
    next(iter(arrays.values())).ravel()[0] = np.nan


def half_precision(arrays, label):
    arrays.update({name: leaf.astype(np.float16) for name, leaf in arrays.items()})


def of_another_client(directory):
    clients = directory / "clients"
    shutil.copy(clients / "client000004-round000002.safetensors", clients / "client000003-round000002.safetensors")


def of_an_older_round(directory):
    clients = directory / "clients"
    shutil.copy(clients / "client000003-round000001.safetensors", clients / "client000003-round000002.safetensors")


def without_a_label(directory):
    (directory / "round000002.json").write_text("{}")


def a_pipe(directory):
    file = next((directory / "server/2/default/d").iterdir())
    file.unlink()
    os.mkfifo(file)


def another_file(directory):
    (directory / "server/2/default/d/more").write_text("")


def a_file_in_its_place(directory):
    shutil.rmtree(directory / "server/2")
    (directory / "server/2").write_text("")


def without_arrays(directory):
    shutil.rmtree(directory / "server/2/default")


def renamed(directory):
    (directory / "server/2").rename(directory / "server/9")


DAMAGES = [
    renamed,
    flip_in("server/2/default/d/*"),
    flip_in("server/2/default/manifest.ocdbt"),
    flip_in("server/2/_CHECKPOINT_METADATA"),
    flip_in("round000002.json"),
    a_pipe,
    another_file,
    a_file_in_its_place,
    flip_in("clients/client000003-round000002*"),
    rewrite(not_a_number),
    rewrite(half_precision),
    rewrite(lambda arrays, label: arrays.popitem()),
    rewrite(lambda arrays, label: label.update(run="another")),
    of_another_client,
    of_an_older_round,
    without_a_label,
    without_arrays,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_round_before_takes_the_place_of_a_damaged_one(damage, opened, tmp_path, capsys):
    checkpoints, begun = opened("apfl")
    with checkpoints:
        states = save_round(checkpoints, begun, 1, [3, 4], by=1.0)
        after = save_round(checkpoints, begun, 2, [3, 4], by=2.0)
    damage(tmp_path)
    again, begun = opened("apfl")
    with again:
        state, totals = again.restore(begun.state)
        assert int(state.round) == 1 and totals == {"rounds": 1}
        assert_equal(again.clients.load(np.array([3, 4])), states)
        told = capsys.readouterr().err
        assert (
            told.count("\n") == 1 and "lost or damaged (" in told and "round 1 takes the place of a later one" in told
        )
        assert_equal(save_round(again, begun, 2, [3, 4], by=2.0), after)  # the round runs again
    last, begun = opened("apfl")
    with last:
        assert int(last.restore(begun.state)[0].round) == 2


def test_a_run_without_a_sound_round_is_refused_and_left_alone(opened, tmp_path):
    checkpoints, begun = opened("local")
    with checkpoints:
        for number in (1, 2):
            save_round(checkpoints, begun, number, [3, 4])
    for round in (1, 2):
        (tmp_path / f"round{round:06d}.json").write_text("{}")
    before = files(tmp_path)
    again, begun = opened("local")
    with again, pytest.raises(InputError, match=rf"round000002.json: lost .* without {tmp_path} the same command"):
        again.restore(begun.state)
    assert files(tmp_path) == before and len(list((tmp_path / "server").iterdir())) == 2


def test_a_lost_file_of_an_older_round_is_found_at_once(opened, tmp_path):
    checkpoints, begun = opened("local")
    with checkpoints:
        for number, cohort in enumerate([[3], [4], [5]], 1):
            save_round(checkpoints, begun, number, cohort)
    file = tmp_path / "clients/client000003-round000001.safetensors"
    file.unlink()
    again, begun = opened("local")
    with again, pytest.raises(InputError, match=f"{file}: lost or damaged"):
        again.restore(begun.state)


def test_a_reader_gets_one_round_while_another_process_trains(opened, tmp_path, monkeypatch):
    """Five rounds are finished between its reading of the server and of the clients."""
    checkpoints, begun = opened("local")
    with checkpoints:
        states = save_round(checkpoints, begun, 1, [3, 4], by=1.0)
        checkpoints._saving.result()
        reader = Checkpoints(
            tmp_path, begun.init_clients, NUM_CLIENTS, {"method": "local", "clients": NUM_CLIENTS}, read_only=True
        )
        load = reader.clients.load

        def load_late(client_ids):
            for number in range(2, 7):
                save_round(checkpoints, begun, number, [3, 4], by=2.0)
            checkpoints._saving.result()
            return load(client_ids)

        monkeypatch.setattr(reader.clients, "load", load_late)
        read = reader.read(begun.state, [4, 3])
        assert int(read.round) == 1
        assert_equal(read.clients, jax.tree.map(lambda leaf: leaf[::-1], states))
        save_round(checkpoints, begun, 7, [3, 4])
    assert len(files(tmp_path)) == 4  # what could not be removed then is removed after the next round


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
        checkpoints.save(begun.state._replace(round=np.int32(finished + 2)), Counter())  # waits for the one before
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
