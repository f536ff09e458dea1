"""FedPer on LoRA (Arivazhagan et al. 2019, arXiv 1912.00818): the adapters of the last layers stay with their client,
those of the layers below are shared; both are trained jointly.

What is personal are the last settings.client.personal_layers layers in the place of the paper's last blocks and
classifier: the head of the language model is frozen. Local steps are AdamW's, not SGD's, in a fixed number.
"""

import jax
import jax.numpy as jnp

from flex_jax.errors import InputError
from flex_jax.federated.method import Method, Received, Settings


def build(adapters: dict, key: jax.Array, settings: Settings) -> dict:
    """The leaves [L, ...] under "layers" cut into "lower" [L - P, ...] and "upper" [P, ...], with the P last layers;
    "dense_layers", where a model has such, come before all these and are part of "lower"."""
    layers, personal = adapters["layers"], settings.client.personal_layers
    count = len(jax.tree.leaves(layers)[0])
    if personal >= count:
        raise InputError(f"config.client.personal_layers is {personal}: must be below {count}, the layers of the model")
    lower = jax.tree.map(lambda leaf: leaf[:-personal], layers)
    upper = jax.tree.map(lambda leaf: leaf[-personal:], layers)
    return {"lower": adapters | {"layers": lower}, "upper": {"layers": upper}}


def compose(tree: dict, received: Received) -> dict:
    lower, upper = (tree[part]["layers"] for part in ("lower", "upper"))
    return tree["lower"] | {"layers": jax.tree.map(lambda *parts: jnp.concatenate(parts), lower, upper)}


METHOD = Method(
    placement=((r"lower/.*", "shared"), (r"upper/.*", "personal")),
    build=build,
    compose=compose,
    common=False,
)
