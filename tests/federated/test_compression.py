"""Compressed uploads: what is sent, what arrives and what is left behind, by hand."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flex_jax.federated.compression import (
    PACKERS,
    ByteCount,
    Int8,
    TopK,
    compress,
    decompress,
    init_residual,
    tree_bytes,
)

KEY = jax.random.key(0)


class Moments(NamedTuple):
    first: jax.Array
    count: jax.Array


def one(leaf, compression, key=KEY, fraction=0.25):
    """(What is sent of a tree with one leaf, what arrives)."""
    upload = {"w": jnp.asarray(leaf)}
    sent, _ = compress(upload, init_residual(upload, compression), key, compression=compression, fraction=fraction)
    return sent["w"], decompress(sent, upload)["w"]


def tree(seed):
    """An upload with a NamedTuple, an integer leaf, a matrix, a half-precision leaf and a scalar."""
    rng = np.random.default_rng(seed)
    moments = Moments(jnp.float32(rng.normal(size=6)), jnp.int32(seed + 7))
    half = jnp.asarray(rng.normal(size=8), jnp.bfloat16)
    return {"delta": {"a": jnp.float32(rng.normal(size=(3, 4))), "b": half}, "m": moments, "s": jnp.float32(seed + 0.1)}


def test_none_is_the_identity():
    sent, residual = compress(tree(0), {}, KEY, compression="none", fraction=0.1)
    assert residual == {}
    jax.tree.map(np.testing.assert_array_equal, decompress(sent, tree(0)), tree(0))


def test_bfloat16_rounds_to_nearest():
    sent, arrived = one([1 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-8, 1 + 3 * 2**-8, -3.0], "bfloat16")  # 2**-7 a step
    assert (sent.dtype, arrived.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(arrived, [1.0, 1 + 2**-7, 1.0, 1 + 2**-6, -3.0])  # ties go to even


def test_int8_by_hand():
    leaf = [254.0, -254.0, 6.0, -8.0, 0.0]  # all multiples of the scale: nothing is random
    sent, arrived = one(leaf, "int8")
    assert isinstance(sent, Int8) and sent.values.dtype == jnp.int8 and sent.scale == 2.0
    np.testing.assert_array_equal(sent.values, [127, -127, 3, -4, 0])
    np.testing.assert_array_equal(arrived, leaf)


def test_int8_is_unbiased_and_at_most_a_step_off():
    leaf, draws = np.float32([127.0, 0.3, -0.3, 5.5, -99.9, 1e-2]), 4000  # scale 1
    arrived = jax.vmap(lambda key: one(leaf, "int8", key)[1])(jax.random.split(KEY, draws))
    assert np.abs(arrived - leaf).max() < 1.0
    up = leaf - np.floor(leaf)  # the chance of going up; the bound is 4 standard errors and the rounding of the mean
    assert np.all(np.abs(np.mean(arrived, 0) - leaf) <= 4 * np.sqrt(up * (1 - up) / draws) + 1e-5)


@pytest.mark.parametrize("peak", [3.3e-30, 0.1, 0.3, 1e30])  # 0.3 / (0.3 / 127) is more than 127 in float32
def test_int8_stays_in_range_and_within_a_step_at_any_scale(peak):
    leaf = jnp.append(jnp.full(1_000_000, -peak), jnp.linspace(-peak, peak, 20_001))
    sent, arrived = one(leaf, "int8")
    assert sent.values.min() == -127 and sent.values.max() == 127
    assert np.abs(arrived - leaf).max() <= sent.scale * (1 + 1e-4)


def test_int8_draws_anew_for_every_leaf():
    sent, _ = compress(dict.fromkeys("ab", jnp.linspace(0.0, 1.0, 1000)), {}, KEY, compression="int8", fraction=0.0)
    assert 100 < (sent["a"].values != sent["b"].values).sum() < 900


@pytest.mark.parametrize("compression", PACKERS)
def test_zeros_stay_zeros_and_a_diverged_client_is_not_hidden(compression):
    with jax.debug_nans(True):  # 0 / 0 would end as some integer times a scale of zero, where it does not trap
        np.testing.assert_array_equal(one(np.zeros((2, 3), np.float32), compression)[1], np.zeros((2, 3)))
    assert np.isnan(one(np.float32([1.0, np.nan, 2.0, 3.0]), compression)[1]).any()


@pytest.mark.parametrize("fraction, selected", [(0.0, 1), (0.25, 2), (0.5, 3), (1.0, 6)])
def test_topk_sends_the_largest(fraction, selected):
    leaf = np.float32([[1.0, -6.0, 2.0], [-3.0, 5.0, -4.0]])
    sent, arrived = one(leaf, "topk", fraction=fraction)
    assert isinstance(sent, TopK) and (sent.values.dtype, sent.indices.dtype) == (jnp.float32, jnp.int32)
    np.testing.assert_array_equal(sent.values, [-6.0, 5.0, -4.0, -3.0, 2.0, 1.0][:selected])
    np.testing.assert_array_equal(sent.indices, [1, 4, 5, 3, 2, 0][:selected])
    np.testing.assert_array_equal(arrived, np.where(np.abs(leaf) > 6 - selected, leaf, 0))


def test_error_feedback_by_hand():
    step = jax.jit(partial(compress, compression="topk", fraction=0.3))  # one of three
    sent, residual = step({"w": jnp.float32([4.0, 3.0, -1.0])}, {"w": jnp.zeros(3)}, KEY)
    assert sent["w"].indices == 0 and sent["w"].values == 4.0
    np.testing.assert_array_equal(residual["w"], [0.0, 3.0, -1.0])
    sent, residual = step({"w": jnp.float32([4.0, 3.0, -1.0])}, residual, KEY)
    assert sent["w"].indices == 1 and sent["w"].values == 6.0
    np.testing.assert_array_equal(residual["w"], [4.0, 0.0, -2.0])


def test_error_feedback_loses_nothing_over_rounds():
    def floats(tree):
        return [np.float64(leaf) for leaf in jax.tree.leaves(tree) if leaf.dtype == jnp.float32]

    residual, totals = init_residual(tree(0), "topk"), [0.0] * 3
    for number in range(5):
        sent, residual = compress(tree(number), residual, KEY, compression="topk", fraction=0.2)
        pairs = zip(totals, floats(decompress(sent, tree(number))), floats(tree(number)), strict=True)
        totals = [total + arrived - leaf for total, arrived, leaf in pairs]
    assert np.abs(residual["delta"]["a"]).max() > 0.5 and residual["m"].count is None
    for total, left in zip(totals, floats(residual), strict=True):
        np.testing.assert_allclose(total + left, 0.0, atol=1e-5)


@pytest.mark.parametrize("compression", PACKERS)
def test_clients_under_vmap_equal_a_loop(compression):
    uploads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(tree, range(3)))
    residuals = jax.tree.map(lambda leaf: leaf + 0.3, init_residual(uploads, compression))
    shapes = jax.eval_shape(lambda: tree(0))

    def client(upload, residual, key):
        sent, residual = compress(upload, residual, key, compression=compression, fraction=0.3)
        return decompress(sent, shapes), residual

    inputs = uploads, residuals, jax.random.split(KEY, 3)
    together = jax.jit(jax.vmap(client))(*inputs)
    for i in range(3):
        alone = client(*jax.tree.map(lambda leaf, i=i: leaf[i], inputs))
        assert jax.tree.structure(alone[0]) == jax.tree.structure(tree(0))
        assert alone[0]["m"].count == i + 7 and alone[0]["m"].count.dtype == jnp.int32
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(b[i], a, rtol=1e-6), alone, together)


# Leaves of tree(): 12 float32, 8 bfloat16, 6 float32, an int32 and a float32 scalar; topk takes 4, 2, 2 and 1.
BYTES = {"none": 48 + 16 + 24 + 4 + 4, "bfloat16": 24 + 16 + 12 + 4 + 2, "int8": 16 + 12 + 10 + 4 + 5}


@pytest.mark.parametrize("compression, expected", [*BYTES.items(), ("topk", 8 * (4 + 2 + 2 + 1) + 4)])
def test_bytes_by_hand_and_an_empty_tree(compression, expected):
    step = partial(compress, compression=compression, fraction=0.3)
    residual = init_residual(jax.eval_shape(lambda: tree(0)), compression)
    assert tree_bytes(step(tree(0), residual, KEY)[0]) == expected
    assert tree_bytes(jax.eval_shape(step, tree(0), residual, KEY)[0]) == expected
    assert step({}, init_residual({}, compression), KEY) == ({}, {})
    assert decompress({}, {}) == {} and tree_bytes({}) == 0


GIB4 = 2**32


def test_bytes_beyond_four_gib_are_exact():
    """1.125 MiB for each of 4,096 stacked ranks; a 32-bit product would be 536,870,912."""
    count = ByteCount(fixed=0, per_unit=9 * 2**17, units=np.int32(4096))
    assert count.tolist() == 4_831_838_208 == GIB4 + 536_870_912
    assert ByteCount(3 * GIB4 + 1).tolist() == 3 * GIB4 + 1
    assert ByteCount(5, 7, np.int32([0, 2])).tolist() == [5, 19]


def test_byte_counts_leave_a_jit_and_a_vmap():
    """For one client and for a cohort; one that has no units is the same for each client of a cohort."""

    def client(rank):
        return ByteCount(4, 9 * 2**17, rank), ByteCount(GIB4)

    alone = jax.jit(client)(jnp.int32(4096))
    cohort = jax.device_get(jax.jit(jax.vmap(client))(jnp.array([1, 4096], jnp.int32)))
    assert [count.tolist() for count in alone] == [4_831_838_212, GIB4]
    assert [count.tolist() for count in cohort] == [[9 * 2**17 + 4, 4_831_838_212], [GIB4, GIB4]]
    assert all(type(number) is int for count in cohort for number in count.tolist())
