"""FLoRA (Wang et al. 2024, arXiv 2409.05976): adapters of any ranks are stacked, not averaged.

    client   A_k random, B_k = 0, of rank r_k; train them on W
    server   A = [p_1 A_1 ... p_C A_C],  B = [B_1; ...; B_C]:  A B = sum_k p_k A_k B_k, exactly
    all      W <- W + alpha / rank A B; the pairs are discarded

The merged sum stays in float32, separate from the frozen W: a small change would be rounded away in bfloat16. As in the
released code p_k is on A only, the scale is the same for all ranks, and each client draws A itself, here from a seed
that all know. In the first round clients start from the run's first adapter, cut to their rank. Local steps are
AdamW's.

A download is counted as the stack of the last cohort, with the sum of its ranks; in the first round as the start. A
client that missed rounds would need their stacks too, which is not counted.
"""

import jax
import jax.numpy as jnp

from flex_jax.checks import Ranks
from flex_jax.federated.compression import ByteCount
from flex_jax.federated.method import ClientContext, Loss, Method, ServerContext, ServerRule, Settings, Trained, Upload
from flex_jax.federated.state import ServerState
from flex_jax.methods._ranks import (
    check_ranks,
    check_stackable,
    client_rule,
    full_rank,
    stack,
    trained_pairs,
    truncate,
    unpadded_bytes,
)
from flex_jax.models.adapters import ProjectionAdapter, apply_lora, merge_lora_kernel
from flex_jax.models.config import LoraConfig
from flex_jax.models.decoder import Decoder
from flex_jax.models.lora import Dropout, Leaves, fresh_pairs, map_pairs


def apply_merged(leaves: Leaves, lora: LoraConfig, x: jax.Array, y: jax.Array, dropout: Dropout) -> jax.Array:
    """A projection with what clients have merged into it, `merged` [D, F], and a LoRA."""
    y = y + x @ (leaves["merged"] * lora.scale).astype(x.dtype)
    return apply_lora(leaves, lora, x, y, dropout)


def merge_merged(leaves: Leaves, lora: LoraConfig, kernel: jax.Array) -> jax.Array:
    return merge_lora_kernel(leaves, lora, kernel) + leaves["merged"] * lora.scale


def init_trained(context: ClientContext, loss: Loss) -> Trained:
    """A random, B zero; in the first round the run's first adapter."""
    first, extra = context.download.shared, context.state.extra
    key = jax.random.fold_in(jax.random.fold_in(context.replicated["key"], context.round), extra["client_id"])
    drawn = truncate(fresh_pairs(key, first), extra["rank"])
    pairs = jax.tree.map(lambda first, drawn: jnp.where(context.round == 0, first, drawn), first, drawn)
    return Trained(shared=pairs, personal=context.state.personal)


def wire_bytes(context: ClientContext, upload: Upload) -> tuple[ByteCount, ByteCount]:
    full, stacked = full_rank(context.download.shared), context.replicated["stacked_ranks"]
    rank = upload.extra["rank"]
    down = unpadded_bytes(context.download, full, jnp.where(stacked == 0, rank, stacked))
    return unpadded_bytes(upload, full, rank), down


def init_server(shared: dict, key: jax.Array) -> dict:
    merged = map_pairs(lambda pair: jnp.zeros_like(pair["lora_a"] @ pair["lora_b"]), shared)
    return {"merged": merged, "key": key, "stacked_ranks": jnp.int32(0)}


def update(server: ServerState, context: ServerContext) -> ServerState:
    """Merges the stack. Between rounds there is no pair, so the shared one is zero from here on."""

    def merge(pair, merged):
        return merged + jnp.matmul(*stack(pair, context.weights), precision=jax.lax.Precision.HIGHEST)

    merged = map_pairs(merge, trained_pairs(server.shared, context.uploads), server.extra["merged"])
    ranks = context.uploads.extra["rank"].sum()
    zero = jax.tree.map(jnp.zeros_like, server.shared)
    return ServerState(zero, server.extra | {"merged": merged, "stacked_ranks": ranks})


def compose(adapters: dict, client_extra: dict, replicated: dict) -> dict:
    return map_pairs(lambda pair, merged: pair | {"merged": merged}, adapters, replicated["merged"])


def flora(ranks: Ranks = ()) -> Method:
    """Stacks adapters. `ranks` are those of the clients, in turn; () means config.lora.rank for all."""
    ranked = client_rule(ranks)

    def init_extra(shared: dict, client_id) -> dict:
        return ranked.init_extra(shared, client_id) | {"client_id": jnp.int32(client_id)}

    def check(model: Decoder, settings: Settings) -> None:
        check_ranks(model, ranks)
        check_stackable(settings)

    return Method(
        ownership=((r".*", "shared"),),
        client=ranked._replace(init_extra=init_extra, init_trained=init_trained, wire_bytes=wire_bytes),
        server=ServerRule(init_extra=init_server, extra_visibility="replicated", update=update),
        compose=compose,
        projection=ProjectionAdapter(apply_merged, merge_merged),
        check=check,
    )
