"""FLEx (arXiv 2506.00965): LoRA on attention is shared; the grafted expert and its gate stay with their client.

The whole method in six steps, and the function that does each:

1. Freeze. The backbone is the collection `params`, one copy for all clients; no step below trains it.
2. Choose. Each client, for each MoE layer, selects the pretrained expert that alone best reconstructs the layer's
   routed output R(X) on its own data, argmin_e sum_sequences ||E_e(X) - R(X)||_F:
   `grafting.selection.by_reconstruction`.
3. Graft. A copy of that expert fills the client's personal slot, and the expert's router row becomes the slot's gate:
   `grafting.surgery.fill_slots`. From then on a layer computes y = M(x) + sigmoid(g . x) P(x), where M is the frozen
   layer, P the personal expert and g its gate: `models.slot.PersonalSlot`.
4. Train. In a round each client takes a few AdamW steps on the shared LoRA and its slot, with the loss on response
   tokens: `federated.client.client_round`, all clients of a cohort under one `vmap`.
5. Aggregate. The server averages the changes of the LoRA, weighted by examples: `federated.server.aggregate`. It never
   gets a slot: the table below gives slots to the clients, so they are not in what is uploaded.
6. Answer. A client's model is the backbone, the averaged LoRA and its own slot: `federated.client.client_variables`.

Steps 4 and 5 are FedAvg's, so the method itself is only the table. The config sets what the paper varies: slot.* (how
experts are chosen, how many, the gate, full weights or LoRA), lora.* and optimizer.*.
"""

from flex_jax.federated.method import Method


def flex() -> Method:
    """Shares the LoRA on attention and leaves the slots with their clients."""
    return Method(
        ownership=((r"layers/moe/slot/.*", "personal"), (r"(dense_)?layers/attention/.*", "shared")), grafts="client"
    )
