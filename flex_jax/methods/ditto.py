"""Ditto on LoRA (Li et al. 2021, arXiv 2012.04221): FedAvg, and a personal model pulled towards the downloaded one.

    w: FedAvg's w_k        v: min F_k(v) + lambda / 2 ||v - w^t||^2        the client's model is v

Both take a step on every batch, as in the released code; v and w have separate clipping and AdamW. The paper's step is
SGD's, v <- v - lr (grad F_k(v) + lambda (v - w^t)). Here the pull is a proximal step after AdamW's, which gives v':
v <- (v' + lr lambda w^t) / (1 + lr lambda). With SGD's v' that is the paper's to first order in lr. It is stable for
every lambda, with v = w^t in the limit. It is decoupled, like AdamW's weight decay: the size of AdamW's step does not
depend on that of the gradient, so lambda does not balance the two as in the paper. K steps close a share
1 - (1 + lr lambda)^-K of the distance. At the small rates of LoRA that needs a lambda of about 1 / (K lr).
"""

import jax
import optax

from flex_jax.checks import NotNegative
from flex_jax.federated.method import ClientContext, ClientRule, Loss, Method, Trained
from flex_jax.methods._personal_copy import OWNERSHIP, copy_adapters, or_global


@or_global
def compose(adapters: dict, client_extra: dict, replicated: dict) -> dict:
    """v."""
    return adapters["personal"]


def objective(context: ClientContext, trained: Trained, loss: Loss) -> tuple[jax.Array, jax.Array]:
    """Two problems at once. Neither depends on the other's part."""
    personal_loss = loss(trained.personal)
    return loss(trained.shared) + personal_loss, personal_loss


def ditto(lambda_: NotNegative = 0.1) -> Method:
    """Trains v next to w; `lambda_` is the strength of the pull of w^t on v."""

    def optimizer(context: ClientContext, clip, adamw) -> optax.GradientTransformation:
        strength = context.learning_rate * lambda_
        share = strength / (1.0 + strength)  # of the way from v' to w^t
        w_t = context.download.shared["global"]

        def pull(updates, trained):
            v, step = trained.personal["personal"], updates.personal["personal"]
            pulled = jax.tree.map(lambda v, step, w: step + share * (w - (v + step)), v, step, w_t)
            return updates._replace(personal={"personal": pulled})

        step = optax.chain(clip, adamw)
        separate = optax.partition({"w": step, "v": step}, Trained(shared="w", personal="v"))  # pyright: ignore[reportArgumentType]
        return optax.chain(separate, optax.stateless(pull))

    return Method(
        ownership=OWNERSHIP,
        client=ClientRule(objective=objective, optimizer=optimizer),
        build=copy_adapters,
        compose=compose,
    )
