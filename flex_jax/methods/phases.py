"""A round in two phases, for FedRep and FedDPA: one tree is trained in the first steps, the other in the rest."""

import optax
from optax.transforms import conditionally_mask

from flex_jax.federated.method import Received


def personal_steps(received: Received) -> int:
    """How many of a round's steps settings.client.personal_steps gives to what is personal; halves round to even."""
    return round(received.settings.client.personal_steps * received.steps)


def personal_first(first, clip, adamw) -> optax.GradientTransformation:
    """Moves the personal tree in the steps before `first`, the shared tree in those from `first` on. A tree rests
    while the other moves: its AdamW moments wait, and clipping is by the norm of what moves."""
    trained = optax.chain(clip, adamw)
    phases = {
        "personal": conditionally_mask(trained, lambda step: step < first),
        "shared": conditionally_mask(trained, lambda step: step >= first),
    }
    return optax.partition(phases, {tree: tree for tree in phases})
