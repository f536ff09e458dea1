"""Which clients take part in a round."""

import json

import jax
import numpy as np

from flex_jax.errors import InputError

SAMPLINGS = ("uniform", "size")


def sample_cohort(
    key: jax.Array,
    round: int,
    sizes: np.ndarray,
    cohort: int,
    *,
    sampling: str = "uniform",
    available: np.ndarray | None = None,
) -> np.ndarray:
    """`cohort` of the clients without replacement and in order, [cohort] int32; by key and round.

    Args:
      sizes: [N] numbers of training examples.
      sampling: "uniform", or "size" for each draw in proportion to the sizes of the clients not drawn yet.
      available: [A] numbers, in order, of the only clients that can be drawn (all N where None), at least `cohort`.
    """
    reachable = np.array(np.arange(len(sizes)) if available is None else available, np.int32)
    if len(reachable) == cohort:
        return reachable
    shares = {"uniform": None, "size": sizes[reachable] / sizes[reachable].sum()}[sampling]
    # Positions are drawn, not clients, so that a round in which all can be reached is one without a trace.
    drawn = jax.random.choice(jax.random.fold_in(key, round), len(reachable), (cohort,), replace=False, p=shares)
    return np.sort(reachable[np.asarray(drawn)])


def read_availability(path: str, clients: int, cohort: int) -> list[np.ndarray]:
    """The clients that can be reached in each round, [A] int32 in order, A at least `cohort`.

    Line i of the text file is the JSON list of round i; after the last line the rounds begin again at the first.
    Raises InputError naming file and line.
    """
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:  # what is not UTF-8 is no list in its line
            lines = file.read().rstrip().split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): each line must be {_allowed(clients)}") from error
    if lines == [""]:
        raise InputError(f"{path}: empty: each line must be {_allowed(clients)}")
    return [_reachable(f"{path}:{number}", line, clients, cohort) for number, line in enumerate(lines, 1)]


def _allowed(clients: int) -> str:
    return f"a JSON list of distinct integers from 0 to {clients - 1}"


def _reachable(place: str, line: str, clients: int, cohort: int) -> np.ndarray:
    try:
        numbers = json.loads(line)
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits is a ValueError of its own
        raise InputError(f"{place}: broken JSON: must be {_allowed(clients)}") from error
    # The type itself is asked for: True is an integer to isinstance.
    known = isinstance(numbers, list) and all(type(number) is int and 0 <= number < clients for number in numbers)
    if not known or len(set(numbers)) < len(numbers):
        raise InputError(f"{place}: must be {_allowed(clients)}")
    if len(numbers) < cohort:
        raise InputError(f"{place}: has {len(numbers)} of the clients: must be at least {cohort}, as many as a cohort")
    return np.sort(np.array(numbers, np.int32))
