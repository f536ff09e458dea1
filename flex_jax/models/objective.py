"""The training objective: cross-entropy of the response tokens."""

import jax
import jax.numpy as jnp

from flex_jax.models.decoder import Decoder, head_weights
from flex_jax.models.lora import DROPOUT
from flex_jax.ops.cross_entropy import token_cross_entropy


def response_loss(model: Decoder, variables: dict, tokens, loss_mask, key=None) -> tuple[jax.Array, jax.Array]:
    """Sum of the cross-entropy (nats) over response tokens, and their number.

    variables: the model's collections; tokens [B, S] int32; loss_mask [B, S], 1 where a token is part of a response and
    so is predicted from those before it. `key` turns LoRA dropout on. Right padding needs no attention mask: no real
    position sees it.
    """
    rngs = None if key is None else {DROPOUT: key}
    hidden = model.apply(variables, tokens[:, :-1], method=Decoder.features, rngs=rngs).hidden
    loss = token_cross_entropy(hidden, head_weights(model, variables["params"]), tokens[:, 1:])
    weight = loss_mask[:, 1:].astype(jnp.float32)
    return (loss * weight).sum(), weight.sum()
