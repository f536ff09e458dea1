"""A round in two phases, for FedRep and FedDPA: the first steps train the personal tree, the others the shared tree."""

from typing import Any

import optax
from optax.transforms import conditionally_mask

from flex_jax.federated.method import Trained


def count_personal_steps(fraction: float, num_steps: int) -> int:
    """Returns how many of a round's steps train the personal tree. Halves round to even."""
    return round(fraction * num_steps)


def personal_first(personal_steps, clip, adamw) -> optax.GradientTransformation:
    """Trains the personal tree in the first `personal_steps` steps and the shared tree in those after them.

    While one tree trains, the other one and its AdamW moments stay unchanged. Clipping is by the norm of the tree that
    trains.
    """

    def is_personal(step: Any, **extra: Any) -> Any:
        return step < personal_steps

    trained = optax.chain(clip, adamw)
    phases = {
        "personal": conditionally_mask(trained, is_personal),
        "shared": conditionally_mask(trained, lambda step, **extra: ~is_personal(step)),
    }
    return optax.partition(phases, Trained(shared="shared", personal="personal"))  # pyright: ignore[reportArgumentType]
