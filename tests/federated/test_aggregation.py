"""The aggregations against NumPy written out by hand, and what they make of a client that sends noise or NaN."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flex_jax.federated.aggregation import RULES, check_cohort, clip
from flex_jax.federated.method import Settings
from flex_jax.federated.server import make_mean

C, F = 7, 1
WEIGHTS = np.array([1, 2, 3, 4, 5, 6, 7], np.float32) / 28
ROBUST = [name for name in RULES if name != "mean"]


def run(tree, aggregation, weights=WEIGHTS, byzantine=F, clip_norm=0.0, jit=True):
    settings = Settings(aggregation=aggregation, byzantine=byzantine)

    def combine(tree, weights):
        return make_mean(settings, weights)(clip(tree, clip_norm) if clip_norm else tree)

    return (jax.jit(combine) if jit else combine)(tree, weights)


def as_tree(rows):
    """[..., 10] -> two leaves, of [2, 3] and [4]."""
    rows = np.asarray(rows, np.float32)
    return {"a": {"w": rows[..., :6].reshape(*rows.shape[:-1], 2, 3)}, "b": rows[..., 6:]}


def flat(combined):
    return np.concatenate([np.ravel(combined["a"]["w"]), combined["b"]])


def assert_combines_to(combined, row, rtol=1e-5):
    expected = as_tree(row)
    assert jax.tree.structure(combined) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(combined), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


@pytest.fixture
def rows():
    """[C, 10]: seven clients about a common change, one of them further out."""
    rows = 1.0 + 0.5 * np.random.default_rng(0).normal(size=(C, 10))
    rows[2] += 4.0
    return rows


def norms(rows):
    return np.sqrt((rows**2).sum(axis=-1))


def by_hand_mean(rows):
    return sum(weight * row for weight, row in zip(WEIGHTS, rows, strict=True))


def by_hand_median(rows):
    return np.array([sorted(column)[3] for column in rows.T])


def by_hand_trimmed_mean(rows):
    return np.array([sum(sorted(column)[1:6]) / 5 for column in rows.T])


def by_hand_geometric_median(rows):
    point = by_hand_mean(rows)
    for _ in range(2000):
        pull = WEIGHTS / norms(rows - point)
        point = (pull[:, None] * rows).sum(axis=0) / pull.sum()
    return point


def by_hand_ranking(rows):
    scores = []
    for i in range(C):
        others = sorted(norms(rows[i] - rows[j]) ** 2 for j in range(C) if j != i)
        scores.append(sum(others[: C - F - 2]))
    return np.argsort(scores)


def by_hand_krum(rows):
    return rows[by_hand_ranking(rows)[0]]


def by_hand_multi_krum(rows):
    return sum(rows[i] for i in by_hand_ranking(rows)[: C - F]) / (C - F)


@pytest.mark.parametrize("aggregation", RULES)
def test_against_numpy(aggregation, rows):
    expected = globals()[f"by_hand_{aggregation}"](rows)
    rtol = 2e-3 if aggregation == "geometric_median" else 1e-5  # a few iterations against thousands
    assert_combines_to(run(as_tree(rows), aggregation), expected, rtol)


def test_krum_counts_the_four_nearest_others():
    """On a line: the client at 6 has 1 + 1 + 9 + 16; of three others that at 7 had the least, of five that at 5."""
    tree = as_tree(np.outer([0, 1, 2, 5, 6, 7, 9], np.ones(10)))
    assert_combines_to(run(tree, "krum"), np.full(10, 6.0))
    assert_combines_to(run(tree, "multi_krum"), np.full(10, 3.5))


@pytest.mark.parametrize("aggregation", RULES)
def test_the_same_without_jit(aggregation, rows):
    jitted, plain = (run(as_tree(rows), aggregation, clip_norm=4.0, jit=jit) for jit in (True, False))
    np.testing.assert_allclose(flat(jitted), flat(plain), rtol=1e-5)


@pytest.mark.parametrize("aggregation", RULES)
def test_the_order_of_clients_does_not_matter(aggregation, rows):
    order = np.array([3, 6, 0, 2, 5, 1, 4])
    ours = run(as_tree(rows), aggregation)
    permuted = run(as_tree(rows[order]), aggregation, WEIGHTS[order])
    np.testing.assert_allclose(flat(ours), flat(permuted), rtol=1e-5)


@pytest.mark.parametrize("aggregation", RULES)
def test_only_two_aggregations_weigh_clients(aggregation, rows):
    weighed, equally = run(as_tree(rows), aggregation), run(as_tree(rows), aggregation, np.full(C, 1 / C, np.float32))
    same = np.allclose(weighed["b"], equally["b"], rtol=1e-4)
    assert same == (aggregation not in ("mean", "geometric_median"))


BAD = {"noise": 100 / np.sqrt(10), "nan": np.nan, "inf": np.inf, "-inf": -np.inf}
CASES = [(name, bad) for name, bad in itertools.product(ROBUST, BAD) if name != "geometric_median" or bad == "noise"]


def one_bad_client(rows, bad, client=0):
    """(rows of which one is bad, the least and greatest of the honest ones a coordinate)."""
    rows[2] -= 4.0
    rows[client] = BAD[bad]
    honest = np.delete(rows, client, axis=0)
    return rows, honest.min(axis=0), honest.max(axis=0)


@pytest.mark.parametrize(("aggregation", "bad"), CASES)
def test_one_bad_client_of_seven_is_resisted(aggregation, bad, rows):
    rows, least, greatest = one_bad_client(rows, bad)
    combined = flat(run(as_tree(rows), aggregation))
    assert np.all((combined >= least - 1e-6) & (combined <= greatest + 1e-6))


@pytest.mark.parametrize("bad", BAD)
def test_one_bad_client_of_seven_ruins_the_mean(bad, rows):
    rows, least, greatest = one_bad_client(rows, bad, client=6)
    combined = flat(run(as_tree(rows), "mean"))
    assert not np.any((combined >= least) & (combined <= greatest))


@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean", "krum", "multi_krum"])
def test_two_bad_clients_of_seven_are_resisted(aggregation, rows):
    """The most that Krum bears; opposite infinities, or NaN that agree, in the places of the first clients."""
    for first, second in [(np.inf, -np.inf), (np.nan, np.nan), (np.nan, np.inf)]:
        rows[0], rows[1] = first, second
        combined = flat(run(as_tree(rows), aggregation, byzantine=2))
        assert np.all((combined >= rows[2:].min(axis=0) - 1e-6) & (combined <= rows[2:].max(axis=0) + 1e-6))


@pytest.mark.parametrize("aggregation", RULES)
def test_clients_that_agree_are_taken_at_their_word(aggregation, rows):
    """Distances of zero divide nothing."""
    assert_combines_to(run(as_tree([rows[0]] * C), aggregation), rows[0])


def test_median_of_an_even_cohort_is_between_the_middle_two(rows):
    rows[3] = np.inf
    others = np.delete(rows[:6], 3, axis=0)
    expected = [sum(sorted(column)[2:4]) / 2 for column in others.T]
    assert_combines_to(run(as_tree(rows[:6]), "median", WEIGHTS[:6]), expected)


@pytest.mark.parametrize("aggregation", RULES)
def test_clients_that_are_left_out_do_not_count(aggregation, rows):
    left_out, weights = [1, 4], WEIGHTS.copy()
    rows[left_out], weights[left_out] = 0, 0
    others = [np.delete(array, left_out, axis=0) for array in (rows, weights / weights.sum())]
    expected = run(as_tree(others[0]), aggregation, others[1])
    np.testing.assert_allclose(
        flat(run(as_tree(rows), aggregation, weights / weights.sum())), flat(expected), rtol=1e-6
    )


def test_without_such_clients_every_bit_is_that_of_the_plain_formula(rows):
    tree = as_tree(rows)
    plain = {
        "median": lambda leaf: jnp.median(leaf, axis=0),
        "trimmed_mean": lambda leaf: jnp.sort(leaf, axis=0)[F : C - F].mean(axis=0),
        "krum": lambda leaf: leaf[by_hand_ranking(rows)[:1]].mean(axis=0),
    }
    for aggregation, formula in plain.items():
        np.testing.assert_array_equal(flat(run(tree, aggregation)), flat(jax.tree.map(formula, tree)), aggregation)


def test_clipping_scales_whole_trees_down_and_leaves_small_ones(rows):
    rows[4] *= 0.1
    clipped = np.array([row * 3.0 / norms(row) if norms(row) > 3.0 else row for row in rows])
    assert 0 < (norms(rows) > 3.0).sum() < C
    for aggregation in ("mean", "trimmed_mean", "krum"):
        expected = globals()[f"by_hand_{aggregation}"](clipped)
        assert_combines_to(run(as_tree(rows), aggregation, clip_norm=3.0), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_clipping_makes_zero_of_what_is_not_finite(bad, rows):
    zeroed = rows.copy()
    rows[5, 3], zeroed[5] = bad, 0.0
    assert_combines_to(run(as_tree(rows), "mean", clip_norm=1e3), by_hand_mean(zeroed))
    assert_combines_to(run(as_tree(rows), "geometric_median", clip_norm=1e3), by_hand_geometric_median(zeroed), 1e-2)


@pytest.mark.parametrize("aggregation", RULES)
def test_an_empty_tree_passes_through(aggregation):
    for tree in ({}, {"a": {}}):
        assert run(tree, aggregation) == tree


def test_a_cohort_that_is_too_small_is_told_of():
    assert check_cohort("krum", 1, 4) == "krum with 1 byzantine clients needs a cohort of at least 5"
    for aggregation, least in {"krum": 7, "multi_krum": 7, "trimmed_mean": 5}.items():
        assert str(least) in check_cohort(aggregation, 2, least - 1) and check_cohort(aggregation, 2, least) is None
    for aggregation in ("mean", "median", "geometric_median"):
        assert check_cohort(aggregation, 2, 1) is None
