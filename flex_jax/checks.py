"""What a value of the config or a hyperparameter of a method may be."""

import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple


class Check(NamedTuple):
    """A test of a value, and the words that an error line uses for what is allowed."""

    allowed: str
    accepts: Callable[[Any], bool]


LARGEST_INTEGER = 2**31 - 1  # of int32, in which JAX counts
LARGEST_NUMBER = 1e38  # a larger one is infinite in float32


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return (is_integer(value) or isinstance(value, float)) and abs(value) <= LARGEST_NUMBER


def is_text(value: Any) -> bool:
    return is_any_text(value) and value.strip() != ""


def is_any_text(value: Any) -> bool:
    return isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)  # no file name can have these


def is_hyperparameter(value: Any) -> bool:
    """Whether a value can be written in a config, read back from JSON unchanged, and hashed."""
    items = value if isinstance(value, tuple) else (value,)
    return all(isinstance(item, (bool, str)) or is_number(item) for item in items)


def is_distinct(value: Any, accepts: Callable[[Any], bool]) -> bool:
    """Whether a value is a tuple of different items that are all accepted."""
    return isinstance(value, tuple) and all(map(accepts, value)) and len(set(value)) == len(value)


def misfit(value: Any, kind: Any, place: str) -> str | None:
    """Returns what is wrong if a value read from JSON is not of a type, such as a TypedDict, else None."""
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is typing.NotRequired:
        return misfit(value, arguments[0], place)
    if origin in (typing.Union, types.UnionType):
        return None if any(misfit(value, one, place) is None for one in arguments) else f"{place} is {value!r:.40}"
    if typing.is_typeddict(origin):
        if not isinstance(value, dict):
            return f"{place} is {value!r:.40}"
        if missing := sorted(origin.__required_keys__ - value.keys()):
            return f"{place} lacks {', '.join(missing)}"
        hints = typing.get_type_hints(origin, include_extras=True)
        items = [(value[key], hint, f"{key} of {place}") for key, hint in hints.items() if key in value]
    elif origin is list and isinstance(value, list):
        items = [(item, arguments[0], f"an item of {place}") for item in value]
    elif origin in (dict, Mapping) and isinstance(value, dict):
        items = [(item, arguments[1], f"{key} of {place}") for key, item in value.items()]
    else:
        return None if type(value) in ((float, int) if origin is float else (origin,)) else f"{place} is {value!r:.40}"
    return next((wrong for item in items if (wrong := misfit(*item))), None)


def at_least(low: int) -> Check:
    return Check(
        f"an integer of at least {low} and at most {LARGEST_INTEGER}",
        lambda value: is_integer(value) and low <= value <= LARGEST_INTEGER,
    )


def one_of(*choices: str) -> Check:
    return Check(f"one of {', '.join(choices)}", lambda value: value in choices)


POSITIVE = Check("a number above 0 and at most 1e38", lambda value: is_number(value) and value > 0)
NOT_NEGATIVE = Check("a number of at least 0 and at most 1e38", lambda value: is_number(value) and value >= 0)
PROBABILITY = Check("a number of at least 0 and below 1", lambda value: is_number(value) and 0 <= value < 1)
UNIT = Check("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
FRACTION = Check("a number above 0 and at most 1", lambda value: is_number(value) and 0 < value <= 1)
FLAG = Check("True or False", lambda value: isinstance(value, bool))
TEXT = Check("a text that is not empty", is_text)
ANY_TEXT = Check("a text", is_any_text)
TEXTS = Check("a tuple of different texts", lambda value: is_distinct(value, is_text))
HYPERPARAMETER = Check("a number, a text or a tuple of them; numbers of at most 1e38", is_hyperparameter)
COUNT = at_least(1)
RANKS = Check(
    f"a tuple of integers of at least 1 and at most {LARGEST_INTEGER}, such as (8, 16), or ()",
    lambda value: isinstance(value, tuple) and all(map(COUNT.accepts, value)),
)

# Types for the hyperparameters of methods: the type checker sees the plain type, the config the check.
Positive = Annotated[float, POSITIVE]
NotNegative = Annotated[float, NOT_NEGATIVE]
Probability = Annotated[float, PROBABILITY]
Unit = Annotated[float, UNIT]
Fraction = Annotated[float, FRACTION]
Count = Annotated[int, COUNT]
Ranks = Annotated[tuple[int, ...], RANKS]
PLAIN = {  # checks of hyperparameters that are annotated with a plain type
    bool: FLAG,
    int: Check("an integer of at most 2147483647", lambda value: is_integer(value) and abs(value) <= LARGEST_INTEGER),
    float: Check("a number of at most 1e38", is_number),
    str: ANY_TEXT,
    tuple: Check("a tuple", lambda value: isinstance(value, tuple)),
}
