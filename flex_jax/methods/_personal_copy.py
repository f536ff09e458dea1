"""Personal adapters in addition to the global ones, which the tree has under "global"."""

from functools import wraps

from flex_jax.federated.method import Compose

OWNERSHIP = ((r"global/.*", "shared"), (r".*", "personal"))


def copy_adapters(adapters: dict, key) -> dict:
    """`Method.build`: a personal copy that starts equal to the global adapters."""
    return {"global": adapters, "personal": adapters}


def or_global(compose: Compose) -> Compose:
    """Returns `compose`, but the global adapters alone in the aggregated model and in a loss on the shared tree."""

    @wraps(compose)
    def composed(adapters: dict, client_extra: dict, replicated: dict) -> dict:
        if "personal" not in adapters:
            return adapters["global"]
        return compose(adapters, client_extra, replicated)

    return composed
