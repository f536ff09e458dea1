"""Partition of records into clients, with held-out test records that no client trains on."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flex_jax.data.columns import Record, listing
from flex_jax.data.readers import NAME, is_name
from flex_jax.errors import InputError

Share = tuple[str, list[Record]]  # a client's name and all its records, before test records are held out

KINDS = ("pathological", "dirichlet", "dirichlet_split", "iid", "column")
SHARED = "shared"  # what commands call the aggregated model, so no client can have this name
MISSING = ("nan", "none", "null", "nat", "n/a", "na", "<na>")  # how programs write a value that is not there
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

    Values and categories that are numbers are sorted as numbers.
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
    records: Sequence[Record],
    settings: PartitionSettings,
    *,
    num_clients: int,
    seed: int,
    test: Sequence[Record] | None = None,
) -> list[ClientRecords]:
    """Divides `records` into clients and holds out test records, or divides the `test` records of another split.

    Records with the same instruction and context form a group. Only one record of a group can be a test record. The
    other records of that group are removed from the training records of all clients. At most a third of a client's
    groups are held out. All records of `test` are test records: each kind of partition divides them as it divides
    `records`, but "dirichlet" gives all of them to every client, and "dirichlet_split" refuses them.

    Raises:
        InputError: a setting is wrong, or a client is left without a training record or without a test record.
    """
    if settings.kind not in KINDS:
        raise InputError(f"data.partition={settings.kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if num_clients < 1:
        raise InputError(f"clients={num_clients}: there must be at least one client")
    if not (settings.alpha > 0 and math.isfinite(settings.alpha)):
        raise InputError(f"data.alpha={settings.alpha}: must be a positive number")
    found = sorted({record["category"] for record in records}, key=_order)
    for category, count in Counter(settings.categories).items():
        if category not in found:
            raise InputError(f"data.categories: no record of category {category!r}; found are {listing(found)}")
        if count > 1:
            raise InputError(f"data.categories names {category!r} {count} times")
    settings = settings._replace(categories=settings.categories or tuple(found))
    if settings.kind not in ("iid", "column"):
        _check_distinct("categories", settings.categories)
    used = [record for record in records if record["category"] in settings.categories]
    tested = None if test is None else [record for record in test if record["category"] in settings.categories]
    if settings.kind == "dirichlet":
        clients = _dirichlet(used, settings, num_clients, seed, tested)
    else:
        shares = _shares(used, settings, num_clients, seed)
        if tested is None:
            tests = [
                _test_records(share, settings.test_examples, np.random.default_rng([seed, TEST_STREAM, client]))
                for client, (_, share) in enumerate(shares)
            ]
        else:
            by_name = dict(_shares(tested, settings, num_clients, seed, [name for name, _ in shares]))
            tests = [by_name[name] for name, _ in shares]
        clients = _hold_out(shares, tests, settings, seed)
    name, count = Counter(client.name for client in clients).most_common(1)[0]
    if count > 1:  # category "a" divided in two, and a category "a_1"
        raise InputError(
            f"data.partition={settings.kind!r}: {count} clients would be called {name!r}: rename a category"
        )
    _check_not_empty(clients, settings, test is not None)
    for name in (client.name for client in clients):
        if name.strip().lower() == SHARED or re.fullmatch(r"\s*#\d+\s*", name):
            raise InputError(
                f"a client is called {name!r}: rename it, because commands give {SHARED} and #0 another meaning"
            )
    return clients


def partition_notes(
    records: Sequence[Record], clients: Sequence[ClientRecords], test: Sequence[Record] | None = None
) -> list[str]:
    """Returns a line for each thing about a partition that its user might not expect."""
    notes = []
    used = {id(record) for client in clients for record in (*client.train, *client.test)}
    for kind, given in (("", records), ("test ", test or ())):
        if unused := Counter(record["category"] for record in given if id(record) not in used):
            counts = (f"{category} {count}" for category, count in unused.most_common())
            notes.append(f"{unused.total()} of {len(given)} {kind}records are in no client: {listing(counts)}")
    if repeated := len(records) - len(_without_groups(records, test or ())):
        notes.append(f"{repeated} records have the same prompt as one of the test split: no client trains on them")
    if odd := [client.name for client in clients if client.name.strip().lower() in MISSING]:
        notes.append(f"a client is called {odd[0]!r}: check whether that is a missing value")
    return notes


def _shares(
    records: list[Record], settings: PartitionSettings, num_clients: int, seed: int, names: Sequence[str] = ()
) -> list[Share]:
    """Divides records among clients. `names` are those of the clients if they come from other records."""
    if settings.kind == "pathological":
        return _pathological(records, settings.categories, num_clients, seed)
    if settings.kind == "column":
        return _by_column(records, settings.column, num_clients, names)
    clients = [f"client_{client}" for client in range(num_clients)]
    if settings.kind == "iid":
        return _split_evenly(clients, records, seed, tag=0)
    return _dirichlet_split(records, settings, clients, seed)


def _order(name: str) -> tuple[float, str]:
    """Sorts numbers as numbers, before other names, which are sorted as text."""
    return (float(name) if re.fullmatch(r"-?\d+(\.\d+)?", name) else math.inf), name


def _check_distinct(what: str, names: Sequence[str]) -> None:
    """Raises InputError if two names differ only in blanks, in Unicode's form or in the way to write a number."""
    seen: dict[str, str] = {}
    for name in names:
        text = "".join(char for char in unicodedata.normalize("NFKC", name) if unicodedata.category(char) != "Cf")
        other = seen.setdefault(re.sub(r"^(-?\d+)\.0+$", r"\1", " ".join(text.split())), name)
        if other != name:
            raise InputError(
                f"{what}: {other!r} and {name!r} look the same ({ascii(other)}, {ascii(name)}): make them so"
            )


def _pathological(records: list[Record], categories: tuple[str, ...], num_clients: int, seed: int) -> list[Share]:
    shares = {}
    for i, category in enumerate(categories[:num_clients]):
        owners = range(i, num_clients, len(categories))
        names = [category] if len(owners) == 1 else [f"{category}_{number}" for number in range(1, len(owners) + 1)]
        shares |= zip(owners, _split_evenly(names, _of_category(records, category), seed, tag=i), strict=True)
    return [shares[client] for client in range(num_clients)]


def _by_column(records: list[Record], column: str, num_clients: int, names: Sequence[str]) -> list[Share]:
    if not column:
        raise InputError("data.partition='column' needs data.column, the column that names the client of a record")
    if missing := [record for record in records if not record.get(column, "").strip()]:
        raise InputError(
            f"data.column={column!r}: {len(missing)} of {len(records)} records have no value there, first "
            f"{missing[0]['instruction'][:40]!r}; its columns are {listing(missing[0])}"
        )
    values = sorted({record[column] for record in records}, key=_order)
    for value in values:
        if not is_name(value):
            raise InputError(f"data.column={column!r}: the name of a client {NAME}, not {value!r:.60}")
    _check_distinct(f"data.column={column!r}", list(dict.fromkeys((*names, *values))))
    if padded := [value for value in values if value != value.strip()]:
        raise InputError(f"data.column={column!r}: the name of a client has blanks at its ends: {padded[0]!r:.60}")
    if names:
        if strangers := [value for value in values if value not in names]:
            raise InputError(
                f"data.column={column!r}: no training record of {listing(strangers)}, which the test split has"
            )
        values = names
    if len(values) != num_clients:
        raise InputError(
            f"data.column={column!r} has {len(values)} values, but clients={num_clients}; set clients={len(values)} "
            f"or choose another column. The values: {listing(values)}"
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


def _dirichlet(
    records: list[Record], settings: PartitionSettings, num_clients: int, seed: int, tested: list[Record] | None
) -> list[ClientRecords]:
    categories, size = settings.categories, settings.examples_per_client or DIRICHLET_EXAMPLES
    test = tested or []
    for i, category in enumerate(categories if tested is None else ()):
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
    for client in range(num_clients):
        rng = np.random.default_rng([seed, DRAW_STREAM, client])
        proportions = rng.dirichlet(np.full(len(categories), settings.alpha))
        drawn = rng.choice(len(categories), size=size, p=proportions)
        train = [by_category[i][row] for i, row in zip(drawn, rng.integers(sizes[drawn]), strict=True)]
        clients.append(ClientRecords(f"client_{client}", train, list(test)))
    return clients


def _hold_out(
    shares: list[Share], tests: list[list[Record]], settings: PartitionSettings, seed: int
) -> list[ClientRecords]:
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


def _without_groups(records: Sequence[Record], excluded: Sequence[Record]) -> list[Record]:
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


def _check_not_empty(clients: list[ClientRecords], settings: PartitionSettings, has_test_split: bool) -> None:
    for number, client in enumerate(clients):
        if has_test_split and not client.test:
            raise InputError(
                f"data.partition={settings.kind!r}: client {number} ({client.name!r}) has no record in the test split"
            )
        if not (client.train and client.test):
            raise InputError(
                f"data.partition={settings.kind!r}: client {number} ({client.name!r}, of categories "
                f"{listing(settings.categories)}) has no {'test' if client.train else 'training'} record, with "
                f"test_examples={settings.test_examples} and at most a third of its distinct prompts held out; use "
                "fewer clients, more records or "
                + ("a larger data.alpha" if settings.kind == "dirichlet_split" else "test_examples above 0")
            )
