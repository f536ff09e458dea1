"""FedPer on LoRA (Arivazhagan et al. 2019, arXiv 1912.00818): adapters of the last layers stay with their client.

Those of the lower layers are shared, and both are trained together. The last layers replace the paper's last blocks and
classifier, because the head of the language model is frozen. Local steps are AdamW's instead of SGD's, in a fixed
number.
"""

import jax
import jax.numpy as jnp

from flex_jax.checks import Count
from flex_jax.errors import InputError
from flex_jax.federated.method import Method, Settings
from flex_jax.models.decoder import Decoder


def compose(adapters: dict, client_extra: dict, replicated: dict) -> dict:
    lower, upper = (adapters[part]["layers"] for part in ("lower", "upper"))
    return adapters["lower"] | {"layers": jax.tree.map(lambda *parts: jnp.concatenate(parts), lower, upper)}


def fedper(personal_layers: Count = 1) -> Method:
    """Leaves the adapters of the last P = `personal_layers` layers with their client."""

    def build(adapters: dict, key: jax.Array) -> dict:
        """Cuts the leaves [L, ...] under "layers" into "lower" [L - P, ...] and "upper" [P, ...].

        "dense_layers", if a model has them, come before all these and belong to "lower".
        """
        lower = jax.tree.map(lambda leaf: leaf[:-personal_layers], adapters["layers"])
        upper = jax.tree.map(lambda leaf: leaf[-personal_layers:], adapters["layers"])
        return {"lower": adapters | {"layers": lower}, "upper": {"layers": upper}}

    def check(model: Decoder, settings: Settings) -> None:
        num_layers = model.config.num_moe_layers
        if personal_layers >= num_layers:
            raise InputError(f"personal_layers is {personal_layers}: must be below {num_layers}, the model's layers")

    return Method(
        ownership=((r"lower/.*", "shared"), (r"upper/.*", "personal")),
        build=build,
        compose=compose,
        check=check,
        has_global_model=False,
    )
