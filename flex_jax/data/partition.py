"""Partition of records into clients, with held-out test records that no client trains on."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from flex_jax.errors import InputError

Record = dict[str, str]
Share = tuple[str, list[Record]]  # a client's name and all its records, before test records are held out

KINDS = ("pathological", "dirichlet", "dirichlet_split", "iid", "column")
DIRICHLET_EXAMPLES = 1000  # the paper's client size, used if examples_per_client is 0

# Each purpose has its own random stream, so that changing one option leaves the other draws unchanged.
ASSIGN_STREAM, TEST_STREAM, DRAW_STREAM, ORDER_STREAM = 1, 2, 3, 4


class PartitionSettings(NamedTuple):
    """How `partition` divides records into clients. `kind` is one of these.

    - pathological: client i gets category i modulo the number of categories. Clients with the same category split it.
    - dirichlet: the setting of the FLEx paper. Test records of each category are held out first and shared by all
      clients. Then each client draws training records with replacement, with category proportions from Dir(alpha).
    - dirichlet_split: a disjoint split. Each category is divided among the clients in proportions from Dir(alpha)
      (Hsu et al. 2019).
    - iid: a disjoint split into equal parts.
    - column: one client for each value of `column`, sorted by value.
    """

    kind: str
    column: str = ""
    categories: tuple[str, ...] = ()  # only records of these are used, in this order; () means all, sorted
    alpha: float = 0.5  # the concentration of the Dirichlet distribution
    examples_per_client: int = 0  # at most, 0 for no limit; for "dirichlet" the exact number, and 0 means 1,000
    test_examples: int = 25  # of each client; for "dirichlet", of each category


class ClientRecords(NamedTuple):
    """The records of one client."""

    name: str
    train: list[Record]
    test: list[Record]


def partition(
    records: Sequence[Record], settings: PartitionSettings, *, num_clients: int, seed: int
) -> list[ClientRecords]:
    """Divides `records` into clients and holds out test records.

    Records with the same instruction and context form a group. Only one record of a group can be a test record. The
    other records of that group are removed from the training records of all clients. At most a third of a client's
    groups are held out.

    Raises:
        InputError: a setting is wrong, or a client is left without a training record or without a test record.
    """
    if settings.kind not in KINDS:
        raise InputError(f"data.partition={settings.kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if num_clients < 1:
        raise InputError(f"clients={num_clients}: there must be at least one client")
    if not (settings.alpha > 0 and math.isfinite(settings.alpha)):
        raise InputError(f"data.alpha={settings.alpha}: must be a positive number")
    found = sorted({record["category"] for record in records})
    for category, count in Counter(settings.categories).items():
        if category not in found:
            raise InputError(f"data.categories: no record of category {category!r}; found are {_listing(found)}")
        if count > 1:
            raise InputError(f"data.categories names {category!r} {count} times")
    settings = settings._replace(categories=settings.categories or tuple(found))
    used = [record for record in records if record["category"] in settings.categories]
    names = [f"client_{client}" for client in range(num_clients)]
    if settings.kind == "dirichlet":
        clients = _dirichlet(used, settings, names, seed)
    elif settings.kind == "dirichlet_split":
        clients = _hold_out(_dirichlet_split(used, settings, names, seed), settings, seed)
    elif settings.kind == "iid":
        clients = _hold_out(_split_evenly(names, used, seed, tag=0), settings, seed)
    elif settings.kind == "pathological":
        clients = _hold_out(_pathological(used, settings.categories, num_clients, seed), settings, seed)
    else:
        clients = _hold_out(_by_column(used, settings.column, num_clients), settings, seed)
    _check_not_empty(clients, settings)
    return clients


def _pathological(records: list[Record], categories: tuple[str, ...], num_clients: int, seed: int) -> list[Share]:
    shares = {}
    for i, category in enumerate(categories[:num_clients]):
        owners = range(i, num_clients, len(categories))
        names = [category] if len(owners) == 1 else [f"{category}_{number}" for number in range(1, len(owners) + 1)]
        shares |= zip(owners, _split_evenly(names, _of_category(records, category), seed, tag=i), strict=True)
    return [shares[client] for client in range(num_clients)]


def _by_column(records: list[Record], column: str, num_clients: int) -> list[Share]:
    if not column:
        raise InputError("data.partition='column' needs data.column, the column that names the client of a record")
    for record in records:
        if not record.get(column):
            raise InputError(
                f"data.column={column!r}: the record {record['instruction'][:40]!r} has no value there; its columns "
                f"are {_listing(record)}"
            )
    values = sorted({record[column] for record in records})
    if len(values) != num_clients:
        raise InputError(
            f"data.column={column!r} has {len(values)} values, but clients={num_clients}; set clients={len(values)} "
            f"or choose another column. The values: {_listing(values)}"
        )
    return [(value, [record for record in records if record[column] == value]) for value in values]


def _dirichlet_split(records: list[Record], settings: PartitionSettings, names: list[str], seed: int) -> list[Share]:
    shares: list[Share] = [(name, []) for name in names]
    for i, category in enumerate(settings.categories):
        rng = np.random.default_rng([seed, ASSIGN_STREAM, i])
        candidates = _of_category(records, category)
        proportions = rng.dirichlet(np.full(len(names), settings.alpha))
        ends = np.rint(np.cumsum(proportions)[:-1] * len(candidates)).astype(int)
        parts = np.split(rng.permutation(len(candidates)), ends)
        for (_, share), part in zip(shares, parts, strict=True):
            share.extend(candidates[j] for j in part)
    return shares


def _dirichlet(records: list[Record], settings: PartitionSettings, names: list[str], seed: int) -> list[ClientRecords]:
    categories, size = settings.categories, settings.examples_per_client or DIRICHLET_EXAMPLES
    test = []
    for i, category in enumerate(categories):
        rng = np.random.default_rng([seed, TEST_STREAM, i])
        candidates = _without_groups(_of_category(records, category), test)  # a prompt may be in several categories
        test += _test_records(candidates, settings.test_examples, rng)
    pool = _without_groups(records, test)
    by_category = [_of_category(pool, category) for category in categories]
    for category, candidates in zip(categories, by_category, strict=True):
        if not candidates:
            raise InputError(f"data.partition='dirichlet': category {category!r} has no record left to train on")

    sizes = np.array([len(candidates) for candidates in by_category])
    clients = []
    for client, name in enumerate(names):
        rng = np.random.default_rng([seed, DRAW_STREAM, client])
        proportions = rng.dirichlet(np.full(len(categories), settings.alpha))
        drawn = rng.choice(len(categories), size=size, p=proportions)
        train = [by_category[i][row] for i, row in zip(drawn, rng.integers(sizes[drawn]), strict=True)]
        clients.append(ClientRecords(name, train, list(test)))
    return clients


def _hold_out(shares: list[Share], settings: PartitionSettings, seed: int) -> list[ClientRecords]:
    tests = [
        _test_records(records, settings.test_examples, np.random.default_rng([seed, TEST_STREAM, client]))
        for client, (_, records) in enumerate(shares)
    ]
    all_tests = [record for test in tests for record in test]
    clients = []
    for client, (name, records) in enumerate(shares):
        train = _without_groups(records, all_tests)
        # Shuffled, because the first records calibrate the graft and must represent all of the client's records.
        order = np.random.default_rng([seed, ORDER_STREAM, client]).permutation(len(train))
        selected = order[: settings.examples_per_client or None]
        clients.append(ClientRecords(name, [train[i] for i in selected], tests[client]))
    return clients


def _test_records(records: list[Record], count: int, rng: np.random.Generator) -> list[Record]:
    """Returns the first records of up to `count` random groups, at most a third of all groups."""
    first_of_group = {}
    for record in records:
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


def _split_evenly(names: list[str], records: list[Record], seed: int, tag: int) -> list[Share]:
    order = np.random.default_rng([seed, ASSIGN_STREAM, tag]).permutation(len(records))
    parts = np.array_split(order, len(names))
    return [(name, [records[i] for i in part]) for name, part in zip(names, parts, strict=True)]


def _check_not_empty(clients: list[ClientRecords], settings: PartitionSettings) -> None:
    for number, client in enumerate(clients):
        if not (client.train and client.test):
            raise InputError(
                f"data.partition={settings.kind!r}: client {number} ({client.name!r}, of categories "
                f"{_listing(settings.categories)}) has no {'test' if client.train else 'training'} record, with "
                f"test_examples={settings.test_examples} and at most a third of its distinct prompts held out; use "
                "fewer clients, more records or "
                + ("a larger data.alpha" if settings.kind == "dirichlet_split" else "test_examples above 0")
            )


def _listing(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
