"""FLEx (arXiv 2506.00965): LoRA on attention is shared; the grafted expert and its gate stay with their client."""

from flex_jax.federated.method import Method

METHOD = Method(
    placement=(
        (r"layers/moe/slot/.*", "personal"),
        (r"(dense_)?layers/attention/.*", "shared"),
    ),
    grafts="own",
)
