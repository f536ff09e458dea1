"""Who is drawn for a round, how often, and what an availability trace may say."""

import jax
import numpy as np
import pytest

from flex_jax.errors import InputError
from flex_jax.federated.cohort import read_availability, sample_cohort

KEY = jax.random.PRNGKey(3)
SIZES = np.array([40, 10, 30, 5, 15, 20, 60, 20], np.float32)
N = len(SIZES)
every_sampling = pytest.mark.parametrize("sampling", ["uniform", "size"])


@pytest.mark.parametrize("cohort", [1, 3, 7])
def test_uniform_draws_are_those_of_the_first_release(cohort):
    for number in range(10):
        drawn = jax.random.choice(jax.random.fold_in(KEY, number), N, (cohort,), replace=False)
        expected = np.sort(np.asarray(drawn, np.int32))
        np.testing.assert_array_equal(sample_cohort(KEY, number, SIZES, cohort), expected)
        # A trace that reaches everyone changes nothing.
        np.testing.assert_array_equal(sample_cohort(KEY, number, SIZES, cohort, available=np.arange(N)), expected)


@every_sampling
@pytest.mark.parametrize("available", [None, np.array([0, 3, 5])])
def test_everyone_takes_part_where_there_are_no_more_than_a_cohort(sampling, available):
    expected = np.arange(N) if available is None else available
    for number in range(3):
        cohort = sample_cohort(KEY, number, SIZES, len(expected), sampling=sampling, available=available)
        assert cohort.dtype == np.int32
        np.testing.assert_array_equal(cohort, expected)


@every_sampling
@pytest.mark.parametrize("available", [None, np.array([1, 2, 4, 6, 7])])
def test_a_cohort_is_in_order_distinct_and_of_the_available(sampling, available):
    allowed = set(range(N)) if available is None else set(available.tolist())
    seen = set()
    for number in range(60):
        cohort = sample_cohort(KEY, number, SIZES, 3, sampling=sampling, available=available)
        assert cohort.shape == (3,) and cohort.dtype == np.int32
        assert (np.diff(cohort) > 0).all()
        seen |= set(cohort.tolist())
    assert seen == allowed


@every_sampling
def test_key_and_round_alone_decide(sampling):
    def cohorts(key, rounds):
        return {number: tuple(sample_cohort(key, number, SIZES, 3, sampling=sampling)) for number in rounds}

    ours = cohorts(KEY, range(8))
    assert cohorts(KEY, reversed(range(8))) == ours  # nothing is remembered from one round to the next
    assert len(set(ours.values())) > 1
    assert cohorts(jax.random.PRNGKey(4), range(8)) != ours


def how_often(shares, cohort):
    """Probability of each client to be in a cohort of one or two drawn one after the other."""
    if cohort == 1:
        return shares
    return shares * (1 + (shares / (1 - shares)).sum() - shares / (1 - shares))


@pytest.mark.parametrize("cohort", [1, 2])
@pytest.mark.parametrize("available", [None, np.array([0, 1, 2, 6])])
def test_size_draws_in_proportion_to_examples(cohort, available):
    rounds, counts = 400, np.zeros(N)
    for number in range(rounds):
        counts[sample_cohort(KEY, number, SIZES, cohort, sampling="size", available=available)] += 1
    reachable = np.arange(N) if available is None else available
    expected = how_often(SIZES[reachable] / SIZES[reachable].sum(), cohort)
    # Three standard deviations of a frequency over the rounds are at most 3 * 0.5 / 20 = 0.075; uniform is 0.17 off.
    np.testing.assert_allclose(counts[reachable] / rounds, expected, atol=0.075)


def written(directory, content):
    (directory / "trace.jsonl").write_bytes(content)
    return str(directory / "trace.jsonl")


@pytest.mark.parametrize("text", [b"[2, 0]\n[0, 1, 3]\n", b"[2, 0]\r\n[3,1,0]", b"\xef\xbb\xbf[2, 0]\n [0, 1, 3] \n\n"])
def test_a_trace_is_read_line_by_line_and_sorted(tmp_path, text):
    trace = read_availability(written(tmp_path, text), 4, 2)
    assert [line.tolist() for line in trace] == [[0, 2], [0, 1, 3]]
    assert all(line.dtype == np.int32 for line in trace)


ALLOWED, LEAST = "a JSON list of distinct integers from 0 to 3", "must have at least 2, the size of a cohort"
BAD_LINES = ["3", "null", '{"0": 1}', "[0, 4]", "[-1, 0]", "[0, 1.0]", "[0, true]", '[0, "1"]', "[0, [1]]", "[0, 1, 0]"]
BROKEN = ["", "[0, 1", "0, 1", "[0 1]", "[" * 100_000, f"[0, {'9' * 5000}]", "[0, \xff]"]


@pytest.mark.parametrize(
    ("line", "message"),
    [(line, f"must be {ALLOWED}") for line in BAD_LINES]
    + [(line, f"broken JSON: must be {ALLOWED}") for line in BROKEN]
    + [(line, f"has {n} clients: {LEAST}") for n, line in enumerate(["[]", "[3]"])],
    ids=lambda text: text[:12],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = written(tmp_path, f"[0, 1]\n{line}\n[0, 1]\n".encode("latin-1"))  # its \xff is not UTF-8
    with pytest.raises(InputError) as caught:
        read_availability(path, 4, 2)
    assert str(caught.value) == f"{path}:2: {message}"


UNUSABLE = {"none": "cannot be read (No such file or directory)", ".": "cannot be read (Is a directory)"}


@pytest.mark.parametrize(("name", "reason"), ({"empty": "empty", "blank": "empty"} | UNUSABLE).items())
def test_a_file_without_lines_is_named(tmp_path, name, reason):
    (tmp_path / "empty").touch()
    (tmp_path / "blank").write_text("\n \n")
    with pytest.raises(InputError) as caught:
        read_availability(str(tmp_path / name), 4, 2)
    assert str(caught.value) == f"{tmp_path / name}: {reason}: each line must be {ALLOWED}"
