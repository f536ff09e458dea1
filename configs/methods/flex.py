"""FLEx (arXiv 2506.00965): LoRA on attention is shared; the grafted expert and its gate stay with their client.

    python -m flex_jax.main --config configs/methods/flex.py

The slot is the paper's: one grafted expert per layer, selected by reconstruction and trained in full, with a gate that
starts from the expert's router row. These are the defaults, written out.
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
