"""What a method is."""

from typing import NamedTuple

from flex_jax.federated.placement import Placement
from flex_jax.federated.rules import FEDAVG, Rules


class Method(NamedTuple):
    """The choices that make a federated method."""

    placement: Placement  # the role of every adapter
    personal_slot: bool = False  # whether clients graft experts into a personal slot
    rules: Rules = FEDAVG  # how clients train and the server updates
