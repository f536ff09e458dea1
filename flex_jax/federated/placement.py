"""Placement: the role of every adapter leaf, by a table of (pattern, role) on its whole path."""

import re
from typing import NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict

ROLES = ("frozen", "shared", "personal")
Placement = tuple[tuple[str, str], ...]  # (regular expression on a whole path "a/b/c", role); the first match wins


class Roles(NamedTuple):
    """An adapters tree divided by role: three trees that hold their own leaves only."""

    frozen: dict  # never trained, one for all clients
    shared: dict  # trained, and what the server averages
    personal: dict  # trained, and never leaves its client


def role_of(path: str, placement: Placement) -> str:
    """The role of the leaf at `path`. Raises ValueError when no row of the table covers it."""
    for pattern, role in placement:
        if re.fullmatch(pattern, path):
            if role not in ROLES:
                raise ValueError(f"placement of {pattern!r}: role {role!r} is not one of {', '.join(ROLES)}")
            return role
    raise ValueError(f"adapter {path} is covered by no row of the placement table {placement}")


def split(adapters: dict, placement: Placement) -> Roles:
    """Divide a nested dict of adapters by role; `merge` puts it together again. Raises as `role_of`."""
    divided = {role: {} for role in ROLES}
    for path, leaf in flatten_dict(adapters, sep="/").items():
        divided[role_of(path, placement)][path] = leaf
    return Roles(**{role: unflatten_dict(leaves, sep="/") for role, leaves in divided.items()})


def merge(*trees: dict) -> dict:
    """The nested dict that holds the leaves of all `trees`. Raises ValueError when two hold the same one."""
    leaves = {}
    for tree in trees:
        flat = flatten_dict(tree, sep="/")
        if twice := sorted(leaves.keys() & flat.keys()):
            raise ValueError(f"adapters held by two roles: {', '.join(twice)}")
        leaves |= flat
    return unflatten_dict(leaves, sep="/")
