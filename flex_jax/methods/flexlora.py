"""FlexLoRA (Bai et al. 2024, arXiv 2402.11505): the server averages products, and shares out their SVD by rank.

    client   train the first r_k columns of A and rows of B
    server   U S V' = svd(sum_k p_k A_k B_k);  A = U[:, :R],  B = S[:R] V'[:R]

The first r components are the best pair of every rank r. As in the released code the singular values go into B alone,
and a client's model is its own truncation. There the scale is alpha / r_k; here it is the same for all, and cancels.
Local steps are AdamW's. The server holds R components of a round's product, where the paper's has all of them.
"""

import jax
import jax.numpy as jnp

from flex_jax.federated.method import Arrived, ClientRule, Method, ServerRule, Settings
from flex_jax.methods.ranks import check_stackable, client_rank, finish, sent, stack, take, trained_pairs
from flex_jax.models.lora import map_pairs


def init_server(shared: dict, settings: Settings, key: jax.Array) -> dict:
    check_stackable(settings, "flexlora")
    return {}


def redistribute(a: jax.Array, b: jax.Array, rank: int) -> dict:
    """The pair of that rank nearest to the product of a [L, D, K] and b [L, K, F]; zero beyond min(D, F) ranks.

    QR first, so that the SVD is of [K, K] at most: the product itself is never needed.
    """
    with jax.default_matmul_precision("highest"):
        (left, a), (right, b) = jnp.linalg.qr(a), jnp.linalg.qr(b.mT)
        u, s, v = jnp.linalg.svd(a @ b.mT, full_matrices=False)
        a, b = left @ u[..., :rank], s[..., :rank, None] * (v[..., :rank, :] @ right.mT)
    none, spare = (0, 0), (0, rank - a.shape[-1])
    return {"lora_a": jnp.pad(a, (none, none, spare)), "lora_b": jnp.pad(b, (none, spare, none))}


def update(shared: dict, kept: dict, arrived: Arrived) -> tuple[dict, dict]:
    def average(pair):
        return redistribute(*stack(pair, arrived.weights), pair["lora_a"].shape[-1])

    return map_pairs(average, trained_pairs(shared, arrived.uploads)), kept


METHOD = Method(
    placement=((r".*", "shared"),),
    client=ClientRule(init=client_rank, take=take, finish=finish, sent=sent),
    server=ServerRule(init=init_server, update=update),
)
