"""FedRep on LoRA (arXiv 2102.07078): FedPer's cut; a client trains its upper layers first, then the shared ones.

    python -m flex_jax.main --config configs/methods/fedrep.py

Four of five steps on the upper layers: the released code's default is 4 epochs on the head, then 1 on the body.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("fedrep",)
    config.hparams.fedrep = {"personal_layers": 1, "personal_steps": 0.8}
    return config
