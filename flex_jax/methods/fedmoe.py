"""FedMoE-style (Mei et al. 2024, arXiv 2408.11304): clients train sub-models of a mixture of experts.

The server averages attention over all clients and each expert over the clients that train it. Written from the paper's
abstract; no code was released. A client's experts are those that config.slot.selection selects: "router", the most used
ones, as in the paper's first stage, which also searches how many each layer keeps.

Departures: the router stays frozen, and tokens keep their routes over all experts; those that a client does not train
are the pretrained ones instead of being cut. The server recommends no other experts between rounds. Steps are AdamW's,
on LoRA or, with config.slot.training="full", on the experts themselves, whose table at the server is then as large as
all experts.
"""

from flex_jax.federated.method import Method
from flex_jax.methods._expert_subsets import check_mean, expert_subset_rules


def fedmoe() -> Method:
    """Shares everything; each client downloads, trains and uploads only its experts."""
    client, server = expert_subset_rules(
        r"layers/moe/slot/.*", lambda client: client.grafts["layers"]["moe"]["slot"]["expert_index"]
    )
    return Method(
        ownership=((r".*", "shared"),),
        grafts="all",
        client=client,
        server=server,
        check=check_mean,
        has_global_model=False,
    )
