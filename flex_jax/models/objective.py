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
    # All S tokens go in, though nothing is predicted from the last: S is a multiple of what chips compute at once.
    hidden = model.apply(variables, tokens, method=Decoder.features, rngs=rngs).hidden
    targets = jnp.roll(tokens, -1, axis=1)
    wanted = jnp.roll(loss_mask != 0, -1, axis=1).at[:, -1].set(False)
    head = head_weights(model, variables["params"])
    loss = token_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), head, targets.reshape(-1), wanted.reshape(-1))
    return loss.sum(), wanted.sum().astype(jnp.float32)
