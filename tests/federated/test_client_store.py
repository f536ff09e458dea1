"""Files of clients: named arrays that anyone can read, and what is wrong with one is told in a line."""

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from flex_jax.errors import InputError
from flex_jax.federated.client_store import ClientStore, named_leaves
from flex_jax.federated.init import start
from flex_jax.federated.method import Settings
from flex_jax.federated.state import ClientState
from tests.federated.helpers import N, assert_equal

FILE = "client000003-round000001.safetensors"


def first_states(client_ids):
    """States with every part of a client's state, whose numbers tell clients and leaves apart."""
    ids = np.float32(client_ids)
    pair = {"lora_a": 100 + ids[:, None], "lora_b": np.stack([200 + ids, 300 + ids], 1)}
    extra = {"rank": np.int32(client_ids), "control": (400 + ids, np.zeros((len(ids), 0), np.float32))}
    grafts = {"expert_index": np.stack([np.int32(client_ids)] * 3, 1)}
    return ClientState({"layers": {"q_proj": pair}}, grafts, extra, {"delta": {"w": 500 + ids, "count": None}})


def write(store, client_ids, states, round=1):
    """Writes states as a checkpoint does it."""
    store.cache(client_ids, states)
    store.commit(store.write(store.copy_to_host(), round))


@pytest.fixture
def store(tmp_path):
    """A store in which client 3 has been trained and is on the disk alone."""
    (tmp_path / "run" / "clients").mkdir(parents=True)
    store = ClientStore(tmp_path / "run" / "clients", first_states, 10, "run 1")
    write(store, [3], jax.tree.map(lambda leaf: leaf + 1, first_states([3])))
    store.cache([], first_states([]))
    return store


@pytest.fixture
def file(store, tmp_path):
    return tmp_path / "run" / "clients" / FILE


def test_a_file_has_every_array_under_its_path(store, file):
    stored = load_file(file)
    assert {name: leaf.tolist() for name, leaf in stored.items()} == {
        "personal/layers/q_proj/lora_a": [104],
        "personal/layers/q_proj/lora_b": [204, 304],
        "grafts/expert_index": [4, 4, 4],
        "extra/rank": 4,
        "extra/control/0": 404,
        "extra/control/1": [],
        "residual/delta/w": 504,
    }


def test_the_files_of_a_method_name_its_adapters(prepared, spec_of, tmp_path):
    """The paths are those of the adapters tree, which ownership tables use."""
    _, state = prepared(spec_of("flex", settings=Settings(compression="topk")))
    store = ClientStore(tmp_path, lambda client_ids: state.clients, N)
    write(store, np.arange(N), state.clients)
    with safe_open(tmp_path / "client000002-round000001.safetensors", "np") as stored:
        names = set(stored.keys())
        gate = stored.get_tensor("personal/layers/moe/slot/gate")
    np.testing.assert_array_equal(gate, state.clients.personal["layers"]["moe"]["slot"]["gate"][2])
    attention = [f"residual/delta/layers/attention/{name}_proj/lora_{ab}" for name in "qkv" for ab in "ab"]
    slot = ["gate", *(f"{name}_proj/kernel" for name in ("gate", "up", "down"))]
    slot = [f"personal/layers/moe/slot/{name}" for name in slot]
    assert names == {*attention, *slot, "grafts/layers/moe/slot/expert_index"}


def test_a_file_does_not_depend_on_the_order_of_its_arrays(store, file):
    expected = store.load(np.array([3]))
    rewrite(file, lambda arrays: dict(reversed(arrays.items())))
    assert_equal(store.load(np.array([3])), expected)
    assert_equal(expected, jax.tree.map(lambda leaf: leaf + 1, first_states([3])))


def test_an_interrupted_round_replaces_no_file(store, file):
    """A file of the next round has another name; the one before is removed when no stored round needs it."""
    before = store.newest
    states = jax.tree.map(lambda leaf: leaf + 2, first_states([3, 4]))
    write(store, [3, 4], states, round=2)
    assert file.exists() and store.newest.tolist() == [0, 0, 0, 2, 2, 0, 0, 0, 0, 0]
    store.remove_replaced(before, [before, store.newest])
    assert file.exists()
    store.remove_replaced(before, [store.newest])
    assert not file.exists() and len(list(file.parent.iterdir())) == 2


def rewrite(file, change):
    """Changes the arrays of a file under the same label."""
    with safe_open(file, "np") as stored:
        arrays, label = {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata()
    save_file(change(arrays), file, label)


def lost(file):
    file.unlink()


def torn(file):
    file.write_bytes(file.read_bytes()[:-3])


def no_safetensors(file):
    file.write_bytes(b"torn")


def without_an_array(file):
    rewrite(file, lambda arrays: {name: leaf for name, leaf in arrays.items() if name != "extra/rank"})


def of_another_shape(file):
    rewrite(
        file, lambda arrays: arrays | {"personal/layers/q_proj/lora_b": arrays["personal/layers/q_proj/lora_b"][:1]}
    )


def of_another_value(file):
    rewrite(file, lambda arrays: arrays | {"extra/rank": np.array(arrays["extra/rank"] + 1)})


def without_a_label(file):
    save_file(load_file(file), file)


@pytest.mark.parametrize(
    "damage", [lost, torn, no_safetensors, without_an_array, of_another_shape, of_another_value, without_a_label]
)
def test_a_lost_or_damaged_file_is_named(damage, store, file):
    damage(file)
    with pytest.raises(InputError) as caught:
        store.load(np.array([2, 3]))
    message = str(caught.value)
    assert message.startswith(f"{file}: lost or damaged (") and "\n" not in message
    assert message.endswith(f"; without {file.parents[1]} the same command starts this run again")
    assert_equal(store.load(np.array([2, 4])), first_states([2, 4]))  # the others are read as before


def test_a_client_that_never_took_part_has_no_file(spec_of, params, model_config, tmp_path):
    """Its state is its first one, the same in every call."""
    grafted = np.zeros((N, model_config.num_layers, 1), np.int32)
    begun = start(spec_of("flex"), params, grafted, key=jax.random.PRNGKey(7))
    store = ClientStore(tmp_path, begun.init_clients, N)
    assert_equal(store.load(np.array([1, 2])), begun.init_clients([1, 2]))
    assert list(tmp_path.iterdir()) == []
    assert named_leaves(begun.init_clients([1]))
