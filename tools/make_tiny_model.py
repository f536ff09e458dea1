"""Makes the embedded checkpoint: generates the corpus, trains a tokenizer, and pretrains a small Qwen2-MoE.

    python tools/make_tiny_model.py --out DIR

Trains all weights from scratch on cross-entropy plus the load-balancing loss of the Switch Transformer (arXiv
2101.03961), and writes a Hugging Face checkpoint directory. The result depends only on the seed and the machine.

The checkpoint in flex_jax/tiny/checkpoint took 15 min 31 s for the first stage and about 6 min for the second, on two
shared x86 cores. On held-out documents, 95.7% of the first facts after a question and 100% of those after an
instruction are right (256 of each).
"""

import argparse
import itertools
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tiny_corpus import documents
from tiny_tasks import make_records
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import PreTrainedTokenizerFast

from flex_jax.data.prompts import RESPONSE_HEADING, TEMPLATE
from flex_jax.models.checkpoint import save_pretrained
from flex_jax.models.config import ModelConfig, Rope
from flex_jax.models.decoder import Decoder
from flex_jax.models.moe import route
from flex_jax.ops.experts import ExpertOps, ExpertWeights, swiglu

CONFIG = ModelConfig(
    family="qwen2_moe",
    vocab_size=1024,
    hidden_size=96,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=24,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=96,
    shared_expert_gate=True,
    norm_topk_prob=True,
    attention_bias=True,
    tie_word_embeddings=True,
    rms_norm_eps=1e-6,
    max_position_embeddings=2048,
    rope=Rope(theta=10000.0),
)
END, PAD = "<|endoftext|>", "<|pad|>"
BALANCE = 0.01  # weight of the load-balancing loss


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer for the corpus and the tasks; each fixed part of the prompt is one token."""
    texts = list(itertools.islice(documents(seed, office_words=False), 3000))
    texts += [" ".join((r["instruction"], r["context"], r["response"])) for r in make_records()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    parts = (TEMPLATE.partition("{}")[0], RESPONSE_HEADING)
    fixed = re.compile("|".join(map(re.escape, parts)))
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size - len(parts),
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((fixed.sub(" ", text) for text in texts), trainer)
    tokenizer.add_tokens([AddedToken(part, normalized=False) for part in parts])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def batches(
    tokenizer: PreTrainedTokenizerFast, stream: Iterator[str], batch: int, sequence: int
) -> Iterator[np.ndarray]:
    """Yields int32 arrays [batch, sequence + 1] without end: documents with an end-of-sequence token after each."""
    end = tokenizer.eos_token_id
    row = []
    while True:
        rows = []
        while len(rows) < batch:
            while len(row) <= sequence:
                row += [*tokenizer(next(stream))["input_ids"], end]
            rows.append(row[: sequence + 1])
            row = []  # the rest of a cut document is dropped: without its start it has no facts
        yield np.array(rows, np.int32)


def joined_experts(
    x: jax.Array, weights: ExpertWeights, expert_index: jax.Array, routing_weight: jax.Array
) -> jax.Array:
    """Computes all experts as one wide expert, with gradients for everything. Arguments as for `frozen_experts`."""
    gate_up, down = weights.dequantised()
    routing = (jax.nn.one_hot(expert_index, len(down)) * routing_weight[..., None]).sum(1)
    hidden = swiglu(jnp.einsum("td,edf->tef", x, gate_up)) * routing[..., None]
    return hidden.reshape(len(x), -1) @ down.reshape(-1, x.shape[1])


def loss(model: Decoder, params: dict, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (training loss, cross-entropy in nats per token)."""
    out = model.apply({"params": params}, tokens[:, :-1], output_router_logits=True)
    entropy = optax.softmax_cross_entropy_with_integer_labels(out.logits, tokens[:, 1:]).mean()
    num_experts = model.config.num_experts

    def imbalance(logits):  # of [B, S, E]; 1 if tokens and probabilities are spread evenly over experts
        index, _ = route(logits, model.config)
        share = jax.nn.one_hot(index, num_experts).mean((0, 1, 2))
        return num_experts * jnp.sum(share * jax.nn.softmax(logits).mean((0, 1)))

    return entropy + BALANCE * jax.vmap(imbalance)(out.router_logits).mean(), entropy


def answer_accuracy(model: Decoder, params: dict, tokenizer, seed: int, heading: str) -> float:
    """Returns the share of 256 held-out documents in which the model's most likely first fact is right.

    Only documents with `heading` ("Answer:" or the response heading) count, and the fact is the first one after it.
    All tokens of the fact must be the most likely ones.
    """
    sequences, answers = [], []
    for text in documents(seed, office_words=False):
        head, mark, rest = text.partition(heading)
        value = re.split(r"[.,;\n]| and ", rest)[0]
        if mark and not value.startswith(" It is"):
            sequences.append(tokenizer(head + mark)["input_ids"])
            answers.append(tokenizer(value)["input_ids"])
        if len(answers) == 256:
            break
    length = max(len(ids) + len(answer) for ids, answer in zip(sequences, answers, strict=True))
    rows = [(ids + answer + [0] * length)[:length] for ids, answer in zip(sequences, answers, strict=True)]
    apply = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens).logits.argmax(-1))
    predicted = np.asarray(apply(params, np.array(rows, np.int32)))
    right = [
        predicted[i, len(ids) - 1 : len(ids) - 1 + len(answer)].tolist() == answer
        for i, (ids, answer) in enumerate(zip(sequences, answers, strict=True))
    ]
    return float(np.mean(right))


def init_params(model: Decoder, seed: int) -> dict:
    """Returns random weights whose layers add little to the residual stream at first, so that tokens stay visible."""
    params = model.init(jax.random.PRNGKey(seed), jnp.zeros((1, 4), jnp.int32))["params"]
    scales = {"embedding": 5.0, "o_proj": 0.1, "down": 0.1}

    def scaled(path, leaf):
        return leaf * next((scale for name, scale in scales.items() if any(key.key == name for key in path)), 1.0)

    return jax.tree_util.tree_map_with_path(scaled, params)


def train(
    model: Decoder, params: dict, stream: Iterator[np.ndarray], *, steps: int, learning_rate: float, report
) -> dict:
    """Trains all weights with AdamW, a warm-up and a cosine schedule; returns them.

    Calls report(number, params, entropy) at every 200th step.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, steps, learning_rate / 50)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, tokens):
        gradients, entropy = jax.grad(partial(loss, model), has_aux=True)(params, tokens)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, entropy

    opt_state = optimizer.init(params)
    for number in trange(1, steps + 1, desc="pretraining", mininterval=5):
        params, opt_state, entropy = step(params, opt_state, next(stream))
        if number % 200 == 0 or number == steps:
            report(number, params, float(entropy))
    return params


def pretrain(out: Path, *, seed: int, steps: list[int], batch: int, sequence: int, learning_rate: float) -> None:
    """Trains the model and writes the checkpoint; prints the loss and the share of right facts every 200 steps.

    The first stage has only documents about messages: from these the model learns to find a fact. If random words were
    mixed in from the start, a model of this size would not learn it. The second stage adds the other words of the
    office, at half the learning rate.
    """
    tokenizer = train_tokenizer(seed)
    model = Decoder(CONFIG, experts=ExpertOps(joined_experts), remat=False)
    params = init_params(model, seed)

    def report(number, params, entropy):
        right = [answer_accuracy(model, params, tokenizer, seed + 1, mark) for mark in ("Answer:", RESPONSE_HEADING)]
        facts = "first facts right: {:.1%} of questions, {:.1%} of instructions".format(*right)
        print(f"\nstep {number}: loss {entropy:.3f} nats, {facts}", flush=True)
        save_pretrained(out, CONFIG, params, tokenizer=tokenizer)

    for stage, office_words in enumerate((False, True)):
        stream = batches(tokenizer, documents(seed, office_words=office_words), batch, sequence)
        rate = learning_rate / 2**stage
        params = train(model, params, stream, steps=steps[stage], learning_rate=rate, report=report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint directory to write")
    parser.add_argument("--seed", type=int, default=0, help="of the corpus and the weights")
    parser.add_argument("--steps", type=int, nargs=2, default=[3200, 1000], help="optimiser steps of the two stages")
    parser.add_argument("--batch", type=int, default=24, help="sequences per step")
    parser.add_argument("--sequence", type=int, default=112, help="tokens per sequence")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of the first stage; the second has half")
    pretrain(**vars(parser.parse_args()))
