"""Which clients take part in a round."""

import json

import jax
import numpy as np

from flex_jax.errors import InputError


def sample_cohort(
    key: jax.Array,
    round: int,
    sizes: np.ndarray,
    cohort_size: int,
    *,
    sampling: str = "uniform",
    available: np.ndarray | None = None,
) -> np.ndarray:
    """Draws the cohort of a round without replacement, [cohort_size] int32 in order.

    Args:
        key: of the run; the number of the round is folded into it.
        round: finished rounds.
        sizes: [N] numbers of training examples.
        cohort_size: at most the number of available clients.
        sampling: "uniform", or "size" for each draw in proportion to the sizes of the clients not drawn yet.
        available: [A] the only clients that can be drawn, in order; by default all.
    """
    reachable = np.array(np.arange(len(sizes)) if available is None else available, np.int32)
    if len(reachable) == cohort_size:
        return reachable
    shares = {"uniform": None, "size": sizes[reachable] / sizes[reachable].sum()}[sampling]
    # Positions are drawn, not clients, so a round in which all are available draws the same with and without a trace.
    key = jax.random.fold_in(key, round)
    drawn = jax.random.choice(key, len(reachable), (cohort_size,), replace=False, p=shares)
    return np.sort(reachable[np.asarray(drawn)])


def read_availability(path: str, num_clients: int, cohort_size: int) -> list[np.ndarray]:
    """Reads which clients are available in each round, [A] int32 in order, A at least `cohort_size`.

    Line i of the text file is the JSON list of round i. After the last line the first one follows again.

    Raises InputError that names file and line.
    """
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:  # bytes that are not UTF-8 fail as JSON below
            lines = file.read().rstrip().split("\n")
    except OSError as error:
        allowed = _allowed(num_clients)
        raise InputError(f"{path}: cannot be read ({error.strerror}): each line must be {allowed}") from error
    if lines == [""]:
        raise InputError(f"{path}: empty: each line must be {_allowed(num_clients)}")
    return [_parse_line(f"{path}:{number}", line, num_clients, cohort_size) for number, line in enumerate(lines, 1)]


def _allowed(num_clients: int) -> str:
    return f"a JSON list of distinct integers from 0 to {num_clients - 1}"


def _parse_line(place: str, line: str, num_clients: int, cohort_size: int) -> np.ndarray:
    try:
        ids = json.loads(line)
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits is a ValueError too
        raise InputError(f"{place}: broken JSON: must be {_allowed(num_clients)}") from error
    # `type`, because True is an integer to isinstance.
    valid = isinstance(ids, list) and all(type(client) is int and 0 <= client < num_clients for client in ids)
    if not valid or len(set(ids)) < len(ids):
        raise InputError(f"{place}: must be {_allowed(num_clients)}")
    if len(ids) < cohort_size:
        raise InputError(f"{place}: has {len(ids)} clients: must have at least {cohort_size}, the size of a cohort")
    return np.sort(np.array(ids, np.int32))
