"""Records into clients, with held-out test records that no client trains on."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flex_jax.errors import InputError

Record = dict[str, str]

KINDS = ("pathological", "dirichlet", "dirichlet_split", "iid", "column")
DIRICHLET_EXAMPLES = 1000  # the paper's client size, where examples_per_client is 0

# One random stream a purpose, so that a change to one option leaves the other draws as they were.
ASSIGN_STREAM, TEST_STREAM, DRAW_STREAM, ORDER_STREAM = 1, 2, 3, 4


class ClientRecords(NamedTuple):
    name: str
    train: list[Record]
    test: list[Record]


class Owned(NamedTuple):
    """What a client has before its test records are held out."""

    name: str
    records: list[Record]


def partition(
    records: Sequence[Record],
    *,
    kind: str,
    clients: int,
    seed: int,
    column: str = "",
    categories: Sequence[str] = (),
    alpha: float = 0.5,
    examples_per_client: int = 0,
    test_examples: int = 25,
) -> list[ClientRecords]:
    """The records of each of the C clients.

    kind:
        pathological: client i owns category i modulo their number; owners of the same category split it.
        dirichlet: the paper's setting. Test records of each category are held out first and are common to all
            clients; then each client draws its records with replacement, their categories in proportions ~ Dir(alpha).
        dirichlet_split: a disjoint split, the clients' proportions of each category ~ Dir(alpha) (Hsu et al. 2019).
        iid: a disjoint split in equal parts.
        column: one client for each value of `column`, sorted by value.

    Args:
        categories: only records of these are used, in this order of owners; empty means every category, sorted.
        examples_per_client: the most training records of a client (0: all); with "dirichlet" the exact number
            (0: 1,000).
        test_examples: test records of a client, with "dirichlet" of a category.

    Records of the same instruction and context are one group. A test record stands for its group: its group's other
    records, and those in other clients, are not trained on. At most a third of a client's groups are held out.

    Raises:
        InputError: an unknown kind, category or column, alpha that is not positive, or a client that is left without
            a training or a test record.
    """
    if kind not in KINDS:
        raise InputError(f"data.partition={kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if clients < 1:
        raise InputError(f"clients={clients}: there must be at least one client")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise InputError(f"data.alpha={alpha}: must be a positive number")
    categories = _choose_categories(records, categories)
    records = [record for record in records if record["category"] in categories]

    if kind == "dirichlet":
        parts = _dirichlet(records, categories, clients, seed, alpha, examples_per_client, test_examples)
    else:
        if kind == "pathological":
            owned = _pathological(records, categories, clients, seed)
        elif kind == "dirichlet_split":
            owned = _dirichlet_split(records, categories, clients, seed, alpha)
        elif kind == "iid":
            owned = _split_evenly(_numbered_names(clients), records, seed, tag=0)
        else:
            owned = _by_column(records, column, clients)
        parts = _hold_out(owned, seed, examples_per_client, test_examples)
    for client, part in enumerate(parts):
        _check_not_empty(client, part, kind, categories, test_examples)
    return parts


def _choose_categories(records: Sequence[Record], categories: Sequence[str]) -> tuple[str, ...]:
    found = sorted({record["category"] for record in records})
    for category, count in Counter(categories).items():
        if category not in found:
            raise InputError(f"data.categories: no record of category {category!r}; found are {_listing(found)}")
        if count > 1:
            raise InputError(f"data.categories names {category!r} {count} times")
    return tuple(categories) or tuple(found)


def _pathological(records: list[Record], categories: tuple[str, ...], clients: int, seed: int) -> list[Owned]:
    owned = {}
    for i, category in enumerate(categories[:clients]):
        owners = range(i, clients, len(categories))
        names = [category] if len(owners) == 1 else [f"{category}_{number}" for number in range(1, len(owners) + 1)]
        shares = _split_evenly(names, _of_category(records, category), seed, tag=i)
        owned |= zip(owners, shares, strict=True)
    return [owned[client] for client in range(clients)]


def _by_column(records: list[Record], column: str, clients: int) -> list[Owned]:
    if not column:
        raise InputError("data.partition='column' needs data.column, the column that tells the clients apart")
    for record in records:
        if not record.get(column):
            raise InputError(
                f"data.column={column!r}: the record {record['instruction'][:40]!r} has no value there; its columns "
                f"are {_listing(record)}"
            )
    values = sorted({record[column] for record in records})
    if len(values) != clients:
        raise InputError(
            f"data.column={column!r} has {len(values)} values, but clients={clients}; set clients={len(values)} or "
            f"choose another column. The values: {_listing(values)}"
        )
    return [Owned(value, [record for record in records if record[column] == value]) for value in values]


def _dirichlet_split(
    records: list[Record], categories: tuple[str, ...], clients: int, seed: int, alpha: float
) -> list[Owned]:
    owned = [Owned(name, []) for name in _numbered_names(clients)]
    for i, category in enumerate(categories):
        rng = np.random.default_rng([seed, ASSIGN_STREAM, i])
        own = _of_category(records, category)
        proportions = rng.dirichlet(np.full(clients, alpha))
        ends = np.rint(np.cumsum(proportions)[:-1] * len(own)).astype(int)
        for client, share in enumerate(np.split(rng.permutation(len(own)), ends)):
            owned[client].records.extend(own[j] for j in share)
    return owned


def _dirichlet(
    records: list[Record],
    categories: tuple[str, ...],
    clients: int,
    seed: int,
    alpha: float,
    examples_per_client: int,
    test_examples: int,
) -> list[ClientRecords]:
    test = []
    for i, category in enumerate(categories):
        rng = np.random.default_rng([seed, TEST_STREAM, i])
        own = _without_groups(_of_category(records, category), test)  # a prompt may be in several categories
        test += _test_records(own, test_examples, rng)
    pool = _without_groups(records, test)
    by_category = [_of_category(pool, category) for category in categories]
    for category, own in zip(categories, by_category, strict=True):
        if not own:
            raise InputError(f"data.partition='dirichlet': category {category!r} has no record left to train on")

    parts = []
    for client, name in enumerate(_numbered_names(clients)):
        rng = np.random.default_rng([seed, DRAW_STREAM, client])
        proportions = rng.dirichlet(np.full(len(categories), alpha))
        drawn = rng.choice(len(categories), size=examples_per_client or DIRICHLET_EXAMPLES, p=proportions)
        sizes = np.array([len(own) for own in by_category])
        rows = rng.integers(sizes[drawn])
        train = [by_category[i][row] for i, row in zip(drawn, rows, strict=True)]
        parts.append(ClientRecords(name, train, list(test)))
    return parts


def _hold_out(owned: list[Owned], seed: int, examples_per_client: int, test_examples: int) -> list[ClientRecords]:
    tests = [
        _test_records(own.records, test_examples, np.random.default_rng([seed, TEST_STREAM, client]))
        for client, own in enumerate(owned)
    ]
    all_tests = [record for test in tests for record in test]
    parts = []
    for client, (own, test) in enumerate(zip(owned, tests, strict=True)):
        train = _without_groups(own.records, all_tests)
        # In random order, so that the first records (those that calibrate the graft) stand for all of them.
        order = np.random.default_rng([seed, ORDER_STREAM, client]).permutation(len(train))
        parts.append(ClientRecords(own.name, [train[i] for i in order[: examples_per_client or None]], test))
    return parts


def _test_records(own: list[Record], count: int, rng: np.random.Generator) -> list[Record]:
    """The first record of each of `count` random groups, of a third of the groups at most, in the records' order."""
    first_of_group = {}
    for record in own:
        first_of_group.setdefault(_group(record), record)
    candidates = list(first_of_group.values())
    chosen = rng.permutation(len(candidates))[: min(count, len(candidates) // 3)]
    return [candidates[i] for i in np.sort(chosen)]


def _without_groups(records: list[Record], excluded: list[Record]) -> list[Record]:
    groups = {_group(record) for record in excluded}
    return [record for record in records if _group(record) not in groups]


def _group(record: Record) -> tuple[str, str]:
    return record["instruction"].strip(), record["context"].strip()


def _of_category(records: list[Record], category: str) -> list[Record]:
    return [record for record in records if record["category"] == category]


def _split_evenly(names: list[str], records: list[Record], seed: int, tag: int) -> list[Owned]:
    order = np.random.default_rng([seed, ASSIGN_STREAM, tag]).permutation(len(records))
    shares = np.array_split(order, len(names))
    return [Owned(name, [records[i] for i in share]) for name, share in zip(names, shares, strict=True)]


def _numbered_names(clients: int) -> list[str]:
    return [f"client_{client}" for client in range(clients)]


def _check_not_empty(client: int, part: ClientRecords, kind: str, categories: tuple[str, ...], tests: int) -> None:
    for what, records in (("training", part.train), ("test", part.test)):
        if not records:
            raise InputError(
                f"data.partition={kind!r}: client {client} ({part.name!r}, of categories {_listing(categories)}) has "
                f"no {what} record, with test_examples={tests} and at most a third of its distinct prompts held out; "
                "use fewer clients, more records"
                + (" or a larger data.alpha" if kind == "dirichlet_split" else " or test_examples above 0")
            )


def _listing(names: Sequence[str]) -> str:
    names = list(names)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
