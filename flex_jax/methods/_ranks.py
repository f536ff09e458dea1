"""Clients whose LoRA pairs A, B have different ranks: what FLoRA, FlexLoRA and HetLoRA have in common.

Pairs are stored with the rank R of the LoRA. If a client has rank r, the columns of A and rows of B from r on are zero.
They stay zero in training: the gradient of a zero column is zero if its row is zero, and AdamW and weight decay do not
move it. The scale alpha / R is the same for all.
"""

import jax
import jax.numpy as jnp

from flex_jax.errors import InputError
from flex_jax.federated.compression import ByteCount, tree_bytes
from flex_jax.federated.method import (
    ClientContext,
    ClientResult,
    ClientRule,
    Download,
    Settings,
    Trained,
    Upload,
    delta,
)
from flex_jax.federated.state import ClientState
from flex_jax.models.decoder import Decoder
from flex_jax.models.lora import is_pair, map_pairs


def full_rank(tree: dict) -> int:  # R
    return jax.tree.leaves(tree, is_leaf=is_pair)[0]["lora_a"].shape[-1]


def truncate(tree: dict, rank) -> dict:
    """Sets all but the first `rank` columns of A and rows of B to zero."""

    def cut(pair):
        keep = jnp.arange(pair["lora_a"].shape[-1]) < rank
        return {"lora_a": jnp.where(keep, pair["lora_a"], 0), "lora_b": jnp.where(keep[:, None], pair["lora_b"], 0)}

    return map_pairs(cut, tree)


def select_download(offered: Download, client: ClientState) -> Download:
    """A client downloads its rank's part of the shared pairs. The aggregated model, which has no rank, has them all."""
    return offered._replace(shared=truncate(offered.shared, client.extra["rank"])) if client.extra else offered


def make_result(context: ClientContext, trained: Trained) -> ClientResult:
    """A real upload has the shape of the client's rank. Padding hides it here, so the rank is uploaded too."""
    extra = context.state.extra
    return ClientResult(Upload(delta(context, trained), {"rank": extra["rank"]}), trained.personal, extra)


def unpadded_bytes(tree, full: int, rank) -> ByteCount:
    """Returns the bytes of pairs with rank `full`, compressed or not, without the padding beyond `rank`.

    Leaves without an axis of ranks (a rank, the scale of int8, the entries of topk) count whole.
    """
    leaves = jax.tree.leaves(tree)
    padded = tree_bytes([leaf for leaf in leaves if leaf.ndim > 1])
    return ByteCount(tree_bytes(leaves) - padded, padded // full, rank)


def wire_bytes(context: ClientContext, upload: Upload) -> tuple[ByteCount, ByteCount]:
    full, rank = full_rank(context.download.shared), context.state.extra["rank"]
    return unpadded_bytes(upload, full, upload.extra["rank"]), unpadded_bytes(context.download, full, rank)


def client_rule(ranks: tuple[int, ...]) -> ClientRule:
    """Returns the rule of a client with one of the `ranks`, in turn by its number; () means R for all."""

    def init_extra(shared: dict, client_id) -> dict:
        choices = jnp.array(ranks or (full_rank(shared),), jnp.int32)
        return {"rank": choices[client_id % len(choices)]}

    return ClientRule(
        init_extra=init_extra, select_download=select_download, make_result=make_result, wire_bytes=wire_bytes
    )


def trained_pairs(shared: dict, uploads: Upload) -> dict:
    """Returns the pairs that the clients of a cohort have trained, leading axis C."""

    def of_client(delta, rank):
        return truncate(jax.tree.map(jnp.add, shared, delta), rank)

    return jax.vmap(of_client)(uploads.delta, uploads.extra["rank"])


def stack(pair: dict, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns A [L, D, C R] and B [L, C R, F] with A B = sum_k weights_k A_k B_k, from the pairs of C clients."""
    weighted = weights[:, None, None, None] * pair["lora_a"]  # A alone, or the weights would be squared
    return jnp.concatenate(weighted, axis=-1), jnp.concatenate(pair["lora_b"], axis=-2)


def check_ranks(model: Decoder, ranks: tuple[int, ...]) -> None:
    """Raises InputError if a client's rank is above that of the LoRA."""
    rank = model.adapters.lora.rank
    if any(own > rank for own in ranks):
        raise InputError(f"ranks is {ranks}: must be at most config.lora.rank, {rank}")


def check_stackable(settings: Settings) -> None:
    """Raises InputError for settings that combine single factors instead of products.

    A factor means nothing without the other one. If adapters are stacked, the factors of two clients, or of two rounds,
    do not belong to one matrix.
    """
    for name, value, allowed in (
        ("server.aggregation", settings.aggregation, ("mean",)),
        ("server.clip_norm", settings.clip_norm, (0,)),
        ("client.compression", settings.compression, ("none", "bfloat16", "int8")),
    ):
        if value not in allowed:
            words = " or ".join(map(str, allowed))
            raise InputError(f"config.{name} is {value!r}: must be {words}, because it stacks adapters")
