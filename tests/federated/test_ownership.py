"""Splitting adapters by owner and putting them together again."""

import jax
import numpy as np
import pytest

from flex_jax.federated.ownership import merge, split

TREE = {"a": {"x": 1, "y": 2}, "b": {"x": {"z": 3}}}


def test_merge_is_the_inverse_of_split():
    trees = split(TREE, ((r"a/x", "frozen"), (r"a/.*", "shared"), (r"b/.*", "personal")))
    assert trees == ({"a": {"x": 1}}, {"a": {"y": 2}}, {"b": {"x": {"z": 3}}})
    assert merge(*trees) == TREE


def test_patterns_match_whole_paths_and_the_first_wins():
    assert split(TREE, ((r"a", "frozen"), (r"a/x|b/x/z", "shared"), (r"a/x", "personal"), (r".*", "personal"))) == (
        {},
        {"a": {"x": 1}, "b": {"x": {"z": 3}}},
        {"a": {"y": 2}},
    )


def test_an_uncovered_leaf_a_wrong_owner_and_a_leaf_of_two_owners_are_errors():
    with pytest.raises(ValueError, match="b/x/z is covered by no row"):
        split(TREE, ((r"a/.*", "shared"),))
    with pytest.raises(ValueError, match="'public' is not one of frozen, shared, personal"):
        split(TREE, ((r".*", "public"),))
    with pytest.raises(ValueError, match="a/x"):
        merge({"a": {"x": 1}}, {"a": {"x": 1}})


def test_flex_shares_attention_only(prepared, spec_of):
    _, state = prepared(spec_of("flex"))
    shared = jax.tree_util.tree_leaves_with_path(state.server.shared)
    personal = jax.tree_util.tree_leaves_with_path(state.clients.personal)
    assert shared and all("attention" in jax.tree_util.keystr(path) for path, _ in shared)
    assert personal and all("slot" in jax.tree_util.keystr(path) for path, _ in personal)


def test_local_sends_nothing_and_fedavg_keeps_nothing(prepared, spec_of):
    assert not jax.tree.leaves(prepared(spec_of("local"))[1].server.shared)
    assert not jax.tree.leaves(prepared(spec_of("fedavg"))[1].clients.personal)


def test_all_clients_start_from_the_same_lora(prepared, spec_of):
    for leaf in jax.tree.leaves(prepared(spec_of("local"))[1].clients.personal):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
