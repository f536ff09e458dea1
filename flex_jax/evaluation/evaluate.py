"""Every client's scores on its own held-out examples."""

from typing import NamedTuple

import numpy as np

from flex_jax.data.batches import Batch
from flex_jax.evaluation.generation import generate_texts
from flex_jax.evaluation.loss import evaluation_loss
from flex_jax.evaluation.rouge import rouge
from flex_jax.federated.method import Recipe
from flex_jax.federated.state import ClientState, Frozen, ServerState

EXAMPLES_SHOWN = 3  # generated answers a client's scores carry with them, for the report


class HeldOut(NamedTuple):
    """The held-out examples of C clients, ready to be scored."""

    records: list[list[dict]]  # per client
    prompts: list[list[list[int]]]  # token ids per client and record
    batches: list[Batch]  # the same records with their responses, leading axes [C, B, S]


def evaluate(
    recipe: Recipe,
    frozen: Frozen,
    server: ServerState,
    clients: ClientState,
    held_out: HeldOut,
    tokenizer,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[dict]:
    """Per client: eval_loss (nats per response token), perplexity, ROUGE of greedy answers (percent), examples."""
    losses = evaluation_loss(recipe, frozen, server, clients, held_out.batches)
    answers = generate_texts(
        recipe,
        frozen,
        server,
        clients,
        held_out.prompts,
        tokenizer,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    scores = []
    for loss, records, predictions in zip(losses, held_out.records, answers, strict=True):
        apart = -(-len(records) // EXAMPLES_SHOWN)  # spread over the client's records, which may be in order of task
        shown = [
            {
                "instruction": record["instruction"],
                "context": record.get("context", ""),
                "reference": record["response"],
                "prediction": prediction,
            }
            for record, prediction in list(zip(records, predictions, strict=True))[::apart]
        ]
        perplexity = float(np.exp(min(loss, 700.0)))
        references = [record["response"] for record in records]
        scores.append({"eval_loss": float(loss), "perplexity": perplexity, **rouge(predictions, references)})
        scores[-1]["examples"] = shown
    return scores
