from collections import Counter

import pytest

from flex_jax.config import SCHEMA
from flex_jax.data.partition import KINDS, PartitionSettings, partition, partition_notes
from flex_jax.data.sources import load_records
from flex_jax.errors import InputError

CATEGORIES = ("a", "b", "c")


def make(category: str, count: int, **columns: str) -> list[dict[str, str]]:
    return [
        {"instruction": f"{category}{i}", "context": "", "response": f"r{i}", "category": category, **columns}
        for i in range(count)
    ]


RECORDS = make("a", 60, team="red") + make("b", 90, team="blue") + make("c", 30, team="blue")


def divide(records, kind, num_clients=3, seed=0, **settings):
    return partition(records, PartitionSettings(kind, **settings), num_clients=num_clients, seed=seed)


def group(record):
    return record["instruction"].strip(), record["context"].strip()


def ids(records):
    return [(r["instruction"], r["context"], r["response"], r["category"]) for r in records]


def assert_no_leak(clients):
    test = {group(record) for client in clients for record in client.test}
    assert all(group(record) not in test for client in clients for record in client.train)


def divide_as(kind, records, seed):
    return divide(records, kind, 2 if kind == "column" else 3, seed, column="team", test_examples=6)


def test_the_config_accepts_exactly_the_kinds_of_partition():
    check = SCHEMA["data.partition"].check
    assert check.allowed == f"one of {', '.join(KINDS)}"
    assert all(map(check.accepts, KINDS)) and not check.accepts("sorted")


def test_pathological_clients_own_one_category_each():
    clients = divide(RECORDS, "pathological", test_examples=7)
    assert [client.name for client in clients] == ["a", "b", "c"]
    assert [len(client.test) for client in clients] == [7, 7, 7]
    assert [len(client.train) for client in clients] == [53, 83, 23]
    assert all({r["category"] for r in c.train + c.test} == {c.name} for c in clients)


def test_pathological_owners_of_one_category_split_it():
    clients = divide(RECORDS, "pathological", categories=("b", "a"), test_examples=5)
    assert [client.name for client in clients] == ["b_1", "a", "b_2"]
    first, second = (set(ids(clients[i].train + clients[i].test)) for i in (0, 2))
    assert first.isdisjoint(second) and first | second == set(ids(make("b", 90)))
    assert len(first) == len(second) == 45


def test_fewer_clients_than_categories():
    clients = divide(RECORDS, "pathological", num_clients=2)
    assert [client.name for client in clients] == ["a", "b"]


@pytest.mark.parametrize("kind", ["iid", "dirichlet_split"])
def test_a_split_is_disjoint_and_complete(kind):
    clients = divide(RECORDS, kind, seed=1, alpha=2.0, test_examples=6)
    everything = [record for client in clients for record in ids(client.train + client.test)]
    assert sorted(everything) == sorted(ids(RECORDS))
    sizes = [len(client.train) + len(client.test) for client in clients]
    assert sizes == [60, 60, 60] if kind == "iid" else len(set(sizes)) > 1


def test_alpha_tells_how_unequal_a_dirichlet_split_is():
    def largest_share(alpha):
        records = make("a", 900) + make("b", 900) + make("c", 900)
        clients = divide(records, "dirichlet_split", alpha=alpha)
        return max(sum(record["category"] == "a" for record in client.train + client.test) for client in clients) / 900

    assert largest_share(1000.0) == pytest.approx(1 / 3, abs=0.03)
    assert largest_share(0.3) > 0.6


def test_dirichlet_draws_with_replacement_and_shares_its_test():
    clients = divide(RECORDS, "dirichlet", num_clients=4, alpha=1.0, test_examples=8)
    assert all(len(client.train) == 1000 for client in clients)
    assert all(client.test == clients[0].test for client in clients)
    assert Counter(record["category"] for record in clients[0].test) == {"a": 8, "b": 8, "c": 8}
    assert clients[0].train != clients[1].train
    capped = divide(RECORDS, "dirichlet", num_clients=4, examples_per_client=40)
    assert {len(client.train) for client in capped} == {40}


def test_dirichlet_proportions_do_not_follow_category_sizes():
    records = make("a", 3000) + make("b", 300)
    clients = divide(records, "dirichlet", num_clients=20, alpha=1e6, test_examples=8)
    share = sum(record["category"] == "b" for client in clients for record in client.train) / 20_000
    assert share == pytest.approx(0.5, abs=0.02)


def test_column_gives_one_client_a_value():
    clients = divide(RECORDS, "column", num_clients=2, column="team")
    assert [client.name for client in clients] == ["blue", "red"]
    assert {record["team"] for record in clients[0].train + clients[0].test} == {"blue"}


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_prompts_never_leak(kind):
    repeated = [
        {"instruction": f" {r['instruction']}\n", "context": " ", "response": "again", "category": other, "team": team}
        for r in RECORDS
        for other, team in (("a", "red"), ("b", "blue"))
    ]
    clients = divide_as(kind, RECORDS + repeated, seed=0)
    assert_no_leak(clients)
    for client in clients:
        assert len({group(record) for record in client.test}) == len(client.test)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_alone_decides(kind):
    first, again = (divide_as(kind, list(RECORDS), seed=3) for _ in range(2))
    assert first == again
    assert divide_as(kind, RECORDS, seed=4) != first


def test_at_most_a_third_is_held_out():
    clients = divide(make("a", 10), "iid", num_clients=1, test_examples=25)
    assert (len(clients[0].test), len(clients[0].train)) == (3, 7)


def test_examples_per_client_caps_training_and_leaves_the_test():
    free = divide(RECORDS, "pathological", test_examples=6)
    capped = divide(RECORDS, "pathological", test_examples=6, examples_per_client=10)
    assert [len(client.train) for client in capped] == [10, 10, 10]
    assert [client.test for client in capped] == [client.test for client in free]


def test_training_records_come_in_random_order():
    # The first records calibrate the graft, so they must not all come from one part of a sorted file.
    sorted_file = make("a", 300, team="red") + make("b", 300, team="red")
    train = divide(sorted_file, "column", num_clients=1, column="team")[0].train
    assert 30 < sum(record["category"] == "a" for record in train[:128]) < 98


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sorted"}, "'sorted' is unknown; choose one of pathological, dirichlet"),
        ({"kind": "iid", "num_clients": 0}, "clients=0"),
        ({"kind": "dirichlet", "alpha": 0.0}, "data.alpha=0.0: must be a positive number"),
        ({"kind": "dirichlet_split", "alpha": float("nan")}, "data.alpha=nan"),
        ({"kind": "iid", "categories": ("a", "z")}, "no record of category 'z'; found are a, b, c"),
        ({"kind": "iid", "categories": ("a", "a")}, "names 'a' 2 times"),
        ({"kind": "column"}, "needs data.column"),
        (
            {"kind": "column", "column": "floor"},
            "'floor': 180 of 180 records have no value there, first 'a0'; its columns are ins",
        ),
        ({"kind": "column", "column": "team", "num_clients": 3}, "has 2 values, but clients=3.*The values: blue, red"),
        (
            {"kind": "pathological", "categories": ("c",), "num_clients": 20},
            "client 0 .'c_1', of categories c. has no test record",
        ),
        ({"kind": "dirichlet_split", "alpha": 1e-3, "num_clients": 20}, r"client \d+ .* larger data.alpha"),
        ({"kind": "iid", "test_examples": 0}, "client 0 .* has no test record"),
    ],
)
def test_mistakes_are_one_clear_line(options, message):
    with pytest.raises(InputError, match=message):
        divide(RECORDS, **({"num_clients": 2} | options))


def test_a_client_left_without_training_records_is_named():
    # All clients have the same three prompts, and each prompt is held out by some client.
    letters = "abcdefghij"
    records = [dict(record, category=letter) for letter in letters for record in make("same", 3)]
    with pytest.raises(InputError, match="client 0 .'a', of categories a, b, .* has no training record"):
        divide(records, "pathological", num_clients=len(letters))


@pytest.fixture(scope="module")
def dolly(shared_data):
    return load_records(str(shared_data / "dolly-15k.jsonl.gz"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "column"])
def test_dolly_does_not_leak(dolly, kind):
    clients = divide(dolly, kind, num_clients=16, alpha=5.0)
    assert_no_leak(clients)
    assert all(len(client.test) == (200 if kind == "dirichlet" else 25) for client in clients)


def test_the_papers_dolly_clients(dolly):
    tasks = ("closed_qa", "information_extraction", "classification", "summarization")
    clients = divide(dolly, "pathological", num_clients=4, categories=tasks)
    counts = {"closed_qa": 1773, "information_extraction": 1506, "classification": 2136, "summarization": 1188}
    assert [client.name for client in clients] == list(tasks)
    for client in clients:
        # The missing records repeat a held-out prompt.
        assert 0.99 * counts[client.name] < len(client.train) + len(client.test) <= counts[client.name]


def by_site(*sites, count=4):
    return [record for site in sites for record in make(f"{site}-", count, site=site)]


def test_clients_with_numbers_are_in_the_order_of_numbers():
    clients = divide(by_site("10", "b", "2", "1", "-1.5"), "column", num_clients=5, column="site")
    assert [client.name for client in clients] == ["-1.5", "1", "2", "10", "b"]
    categories = make("10", 4) + make("9", 4)
    assert [client.name for client in divide(categories, "pathological", num_clients=2)] == ["9", "10"]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (by_site("a", " "), "'site': 4 of 8 records have no value there, first ' -0'"),
        (by_site("a") + make("b", 4), "'site': 4 of 8 records have no value there, first 'b0'"),
        (by_site("a", "a "), r"'a' and 'a ' look the same"),
        (by_site("é", "e\u0301"), r"look the same .*u0301.*xe9"),
        (by_site("a", "a\u200b"), "look the same .*u200b"),
        (by_site("1", "1.0"), "'1' and '1.0' look the same"),
        (by_site("a", "b\x1b[2J"), r"the name of a client must .* not 'b.x1b"),
        (by_site("a", "b" * 300), "the name of a client must have at most 200 characters"),
    ],
)
def test_names_of_clients_that_mislead_are_refused(records, message):
    with pytest.raises(InputError, match=message):
        divide(records, "column", num_clients=2, column="site")


def test_two_clients_of_one_name_are_refused():
    with pytest.raises(InputError, match="2 clients would be called 'a_1': rename a category"):
        divide(make("a", 9) + make("a_1", 9), "pathological", num_clients=3)


def test_categories_that_look_the_same_are_refused():
    with pytest.raises(InputError, match="categories: 'a' and 'a ' look the same"):
        divide(make("a", 9) + make("a ", 9), "pathological", num_clients=2)


def test_records_of_no_client_are_counted_by_category():
    clients = divide(RECORDS, "pathological", num_clients=2)
    assert partition_notes(RECORDS, clients) == ["30 of 180 records are in no client: c 30"]
    clients = divide(RECORDS, "pathological", examples_per_client=20, test_examples=5)
    assert partition_notes(RECORDS, clients) == ["105 of 180 records are in no client: b 65, a 35, c 5"]
    assert partition_notes(RECORDS, divide(RECORDS, "iid")) == []


def test_a_client_named_as_a_missing_value_is_told():
    records = by_site("a", "NaN")
    clients = divide(records, "column", num_clients=2, column="site")
    assert partition_notes(records, clients) == ["a client is called 'NaN': check whether that is a missing value"]


TEST = [record | {"instruction": f"t-{record['instruction']}"} for record in RECORDS[::6]]  # 10 a, 15 b, 5 c


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("pathological", [10, 15, 5]), ("iid", [10, 10, 10]), ("column", [20, 10]), ("dirichlet", [30] * 3)],
)
def test_a_test_split_is_divided_by_the_same_rule(kind, sizes):
    settings = PartitionSettings(kind, "team")
    clients = partition(RECORDS, settings, num_clients=len(sizes), seed=0, test=TEST)
    assert [len(client.test) for client in clients] == sizes
    assert all(record in TEST for client in clients for record in client.test)
    if kind != "dirichlet":
        assert sum(len(client.train) for client in clients) == len(RECORDS)
    for client in clients:
        if kind in ("pathological", "column"):
            assert (
                len({(r["category"] if kind == "pathological" else r["team"]) for r in client.train + client.test}) == 1
            )


def test_a_dirichlet_split_gives_a_test_split_in_the_proportions_of_training():
    records = make("a", 3000)
    settings = PartitionSettings("dirichlet_split", alpha=5.0)
    clients = partition(
        records, settings, num_clients=3, seed=0, test=[r | {"instruction": "t"} for r in records[:300]]
    )
    assert [len(client.test) for client in clients] == pytest.approx([len(c.train) / 10 for c in clients], abs=1)


def test_prompts_of_a_test_split_are_not_trained_on():
    test = [*TEST, RECORDS[3]]
    clients = partition(RECORDS, PartitionSettings("pathological"), num_clients=3, seed=0, test=test)
    assert_no_leak(clients)
    assert partition_notes(RECORDS, clients, test)[-1].startswith(
        "1 records have the same prompt as one of the test split"
    )


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (make("t", 3, site="c"), "no training record of c, which the test split has"),
        (make("t", 3, site="a"), r"client 1 \('b'\) has no record in the test split"),
    ],
)
def test_a_test_split_of_other_clients_is_refused(test, message):
    records, settings = by_site("a", "b"), PartitionSettings("column", "site", ())
    test = [record | {"category": "a-"} for record in test]
    with pytest.raises(InputError, match=message):
        partition(records, settings, num_clients=2, seed=0, test=test)
