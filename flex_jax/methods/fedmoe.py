"""FedMoE-style (Mei et al. 2024, arXiv 2408.11304): clients train sub-models of a mixture of experts; the server
averages attention over all of them and each expert over the clients that hold it.

Written from the paper's abstract; no code was released. A client's experts are those that config.slot.selection names:
"router", the most used ones, as in the paper's first stage, which also searches how many each layer keeps. Departures:
the router stays frozen and tokens keep their routes over all experts, of which those that a client does not hold are
the pretrained ones rather than cut; the server recommends no other experts between rounds; AdamW steps on LoRA, or with
config.slot.training="full" on the experts themselves, whose table at the server is then as large as all experts.
"""

from flex_jax.federated.method import Method
from flex_jax.methods.holders import partial_rules

client, server = partial_rules(
    "fedmoe", r"layers/moe/slot/.*", lambda received: received.client.grafts["layers"]["moe"]["slot"]["expert_index"]
)
METHOD = Method(placement=((r".*", "shared"),), grafts="all", client=client, server=server, common=False)
