"""The training objective: cross-entropy of the response tokens."""

from typing import cast

import jax
import jax.numpy as jnp

from flex_jax.models.decoder import Decoder, Features, head_weights
from flex_jax.models.lora import DROPOUT
from flex_jax.ops.cross_entropy import token_cross_entropy


def response_loss(model: Decoder, variables: dict, tokens, loss_mask, key=None) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of the cross-entropy (nats) over response tokens, and their number.

    tokens are int32 [B, S]. loss_mask [B, S] is 1 if the token is part of a response. A key activates LoRA dropout.
    Right padding needs no attention mask, because no real position attends to it.
    """
    rngs = None if key is None else {DROPOUT: key}
    # All S tokens go in, although nothing is predicted from the last: S is a multiple of what a chip computes at once.
    hidden = cast(Features, model.apply(variables, tokens, method=Decoder.features, rngs=rngs)).hidden
    targets = jnp.roll(tokens, -1, axis=1).reshape(-1)
    predicts_response = jnp.roll(loss_mask != 0, -1, axis=1).at[:, -1].set(False)
    head, flat = head_weights(model, variables["params"]), hidden.reshape(-1, hidden.shape[-1])
    loss = token_cross_entropy(flat, head, targets, predicts_response.reshape(-1))
    return cast(jax.Array, loss).sum(), predicts_response.sum().astype(jnp.float32)
