"""Every client's scores on its own held-out examples."""

from typing import NamedTuple, cast

import numpy as np

from flex_jax.data.batches import Batch
from flex_jax.evaluation.generation import GenerationSettings, decode, generate_tokens
from flex_jax.evaluation.loss import evaluation_loss
from flex_jax.evaluation.rouge import rouge
from flex_jax.federated.client import ClientModels
from flex_jax.results import ClientScores, Example

EXAMPLES_SHOWN = 3  # generated answers in a client's scores, for the report


class HeldOut(NamedTuple):
    """The held-out examples of C clients, ready to be scored."""

    records: list[list[dict]]  # per client
    prompts: list[list[list[int]]]  # token ids per client and record
    batches: list[Batch]  # the same records with their responses, leading axes [C, B, S]

    def select(self, client_ids) -> "HeldOut":
        """Returns the examples of some of the clients, in this order."""
        batches = [Batch(batch.tokens[client_ids], batch.loss_mask[client_ids]) for batch in self.batches]
        return HeldOut([self.records[i] for i in client_ids], [self.prompts[i] for i in client_ids], batches)


def evaluate(models: ClientModels, held_out: HeldOut, tokenizer, settings: GenerationSettings) -> list[ClientScores]:
    """Returns each client's loss (nats per response token), perplexity, ROUGE of greedy answers (percent), examples."""
    losses = evaluation_loss(models, held_out.batches)
    answers = generate_tokens(models, held_out.prompts, settings)
    scores = []
    for loss, records, ids in zip(losses, held_out.records, answers, strict=True):
        predictions, references = decode(ids, tokenizer), [record["response"] for record in records]
        examples = [
            Example(instruction=record["instruction"], context=record["context"], reference=reference, prediction=text)
            for record, reference, text in zip(records, references, predictions, strict=True)
        ]
        step = -(-len(records) // EXAMPLES_SHOWN)  # spread over the records, which may be in order of task
        perplexity = float(np.exp(min(loss, 700.0)))
        client = {"eval_loss": float(loss), "perplexity": perplexity, **rouge(predictions, references)}
        scores.append(cast(ClientScores, client | {"examples": examples[::step]}))
    return scores
