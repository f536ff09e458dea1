"""What a method is."""

from typing import NamedTuple

from flex_jax.federated.placement import Placement


class Method(NamedTuple):
    """The choices that make a federated method."""

    placement: Placement  # the role of every adapter
    personal_slot: bool  # whether clients graft experts into a personal slot
