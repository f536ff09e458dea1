"""FLEx (arXiv 2506.00965): LoRA on attention is shared; the grafted expert and its gate stay with their client.

    python -m flex_jax.main --config configs/methods/flex.py

The numbers of the slot are the paper's: one grafted expert in a layer, chosen by reconstruction and fully trained,
behind a gate that starts from its router row. They are the defaults, written out.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("flex",)
    config.slot.experts = 1
    config.slot.selection = "reconstruction"
    config.slot.training = "full"
    config.slot.gate = "sigmoid"
    config.slot.gate_init = "router"
    return config
