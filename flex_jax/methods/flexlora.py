"""FlexLoRA (Bai et al. 2024, arXiv 2402.11505): the server averages products and distributes their SVD by rank.

    client   train the first r_k columns of A and rows of B
    server   U S V' = svd(sum_k p_k A_k B_k);  A = U[:, :R],  B = S[:R] V'[:R]

For every rank r, the first r components are the best pair of that rank. As in the released code the singular values go
into B alone, and a client's model is its own truncation. There the scale is alpha / r_k; here it is the same for all
and cancels. Local steps are AdamW's. The server stores R components of a round's product; the paper's stores all.
"""

import jax
import jax.numpy as jnp

from flex_jax.checks import Ranks
from flex_jax.federated.method import Method, ServerContext, ServerRule, Settings
from flex_jax.federated.state import ServerState
from flex_jax.methods._ranks import check_ranks, check_stackable, client_rule, stack, trained_pairs
from flex_jax.models.decoder import Decoder
from flex_jax.models.lora import map_pairs


def redistribute(a: jax.Array, b: jax.Array, rank: int) -> dict:
    """Returns the pair of that rank nearest to the product of a [L, D, K] and b [L, K, F].

    It is zero beyond min(D, F) ranks. QR comes first, so that the SVD is of [K, K] at most and the product itself never
    exists.
    """
    with jax.default_matmul_precision("highest"):
        (left, a), (right, b) = jnp.linalg.qr(a), jnp.linalg.qr(b.mT)
        u, s, v = jnp.linalg.svd(a @ b.mT, full_matrices=False)
        a, b = left @ u[..., :rank], s[..., :rank, None] * (v[..., :rank, :] @ right.mT)
    none, spare = (0, 0), (0, rank - a.shape[-1])
    return {"lora_a": jnp.pad(a, (none, none, spare)), "lora_b": jnp.pad(b, (none, spare, none))}


def update(server: ServerState, context: ServerContext) -> ServerState:
    def average(pair):
        return redistribute(*stack(pair, context.weights), pair["lora_a"].shape[-1])

    return server._replace(shared=map_pairs(average, trained_pairs(server.shared, context.uploads)))


def flexlora(ranks: Ranks = ()) -> Method:
    """Averages products. `ranks` are those of the clients, in turn; () means config.lora.rank for all."""

    def check(model: Decoder, settings: Settings) -> None:
        check_ranks(model, ranks)
        check_stackable(settings)

    return Method(
        ownership=((r".*", "shared"),), client=client_rule(ranks), server=ServerRule(update=update), check=check
    )
