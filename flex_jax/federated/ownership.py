"""Ownership: who owns each adapter leaf, by a table of (pattern, owner) on the leaf's whole path."""

import re
from typing import NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict

OWNERS = ("frozen", "shared", "personal")
Ownership = tuple[tuple[str, str], ...]  # (regular expression on a whole path "a/b/c", owner); the first match wins


class OwnedTrees(NamedTuple):
    """An adapters tree divided by owner: three trees, each with its leaves only."""

    frozen: dict  # never trained; one copy for all clients
    shared: dict  # trained; the server averages it
    personal: dict  # trained; never leaves its client


def owner_of(path: str, ownership: Ownership) -> str:
    """Returns the owner of the leaf at `path`. Raises ValueError if no row covers it, or if the row names no owner."""
    for pattern, owner in ownership:
        if re.fullmatch(pattern, path):
            if owner not in OWNERS:
                raise ValueError(f"ownership of {pattern!r}: owner {owner!r} is not one of {', '.join(OWNERS)}")
            return owner
    raise ValueError(f"adapter {path} is covered by no row of the ownership table {ownership}")


def split(adapters: dict, ownership: Ownership) -> OwnedTrees:
    """Divides a nested dict of adapters by owner. `merge` is its inverse. Raises as `owner_of`."""
    divided = {owner: {} for owner in OWNERS}
    for path, leaf in flatten_dict(adapters, sep="/").items():
        divided[owner_of(path, ownership)][path] = leaf
    return OwnedTrees(**{owner: unflatten_dict(leaves, sep="/") for owner, leaves in divided.items()})


def merge(*trees: dict) -> dict:
    """Returns the nested dict with the leaves of all `trees`. Raises ValueError if two have the same leaf."""
    leaves = {}
    for tree in trees:
        flat = flatten_dict(tree, sep="/")
        if duplicates := sorted(leaves.keys() & flat.keys()):
            raise ValueError(f"adapters with two owners: {', '.join(duplicates)}")
        leaves |= flat
    return unflatten_dict(leaves, sep="/")
