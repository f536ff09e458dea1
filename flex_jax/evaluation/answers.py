"""Answers to questions of one or several turns, read and written as FastChat's judges (MT-bench, Vicuna-bench) do."""

import hashlib
import json
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flex_jax.data.prompts import TEMPLATE, prompt_text
from flex_jax.data.sources import file_rows, text_column
from flex_jax.errors import InputError
from flex_jax.evaluation.generation import Sampling, generate_tokens
from flex_jax.federated.method import Recipe
from flex_jax.federated.state import ClientState, Frozen, ServerState

OPENING = TEMPLATE[: TEMPLATE.index("### Instruction:")]  # of a conversation, not of its later turns

Conversation = list[list[int]]  # token ids by turn


class Question(NamedTuple):
    """What one line of a file of questions asks."""

    place: str  # for error lines
    id: int | str
    client: str | None  # as the line has it
    turns: list[dict[str, str]]  # records without a response; all but the first go on from the answer before


def read_questions(file: Path) -> list[Question]:
    """The questions of a JSONL file (any that `load_records` reads), in its order.

    A line has either `prompt`, or `turns` as FastChat's questions do; `context` (of the first turn), `client` and
    `question_id` (else the number of the line) may be there. Raises InputError naming file and line.
    """
    return [_question(number, place, row) for number, (place, row) in enumerate(file_rows(file), 1)]


def _question(number: int, place: str, row: dict) -> Question:
    if ("prompt" in row) == ("turns" in row):
        raise InputError(f"{place}: must have either prompt or turns")
    asked = [row["prompt"]] if "prompt" in row else row["turns"]
    if not isinstance(asked, list) or not asked:
        raise InputError(f"{place}: turns must be a list of at least one string")
    names = ["prompt"] if "prompt" in row else [f"turn {turn}" for turn in range(1, len(asked) + 1)]
    turns = [
        # Training gives every record a context, an empty one where the source has none.
        {"instruction": text_column(place, {name: text}, name), "context": ""}
        for name, text in zip(names, asked, strict=True)
    ]
    if row.get("context") is not None:
        turns[0]["context"] = text_column(place, row, "context", blank=True)
    client = row.get("client")
    return Question(place, row.get("question_id", number), None if client is None else str(client), turns)


def encode_question(question: Question, tokenizer, *, max_positions: int, max_new_tokens: int) -> Conversation:
    """What each turn adds to the conversation: its prompt, without the opening sentence from the second on.

    Raises:
        InputError: the last answer might not end within the model's positions.
    """
    first, *later = map(prompt_text, question.turns)
    texts = [first, *(text.removeprefix(OPENING) for text in later)]
    turns = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    length, answers = sum(map(len, turns)), (len(turns) - 1) * (max_new_tokens + 1)
    if length + answers + max_new_tokens > max_positions:
        beside = f" beside up to {answers} of the answers before" if answers else ""
        raise InputError(
            f"{question.place}: too long: a prompt of {length} tokens{beside} and {max_new_tokens} new tokens; the "
            f"model has {max_positions} positions"
        )
    return turns


def converse(
    recipe: Recipe,
    frozen: Frozen,
    server: ServerState,
    clients: ClientState,
    questions: list[list[Conversation]],
    *,
    end: int,
    max_new_tokens: int,
    batch_size: int,
    keys: jax.Array,
    temperature: float,
    top_p: float,
) -> list[list[Conversation]]:
    """The answers of every client, leading axis C, to its own questions, by turn; most likely ones at temperature 0.

    A later turn is asked after the whole conversation before it, each answer closed by `end`. keys [C]: a question's
    samples depend on its client's key, its number among the client's questions and its turn.
    """
    rows = jnp.arange(max(map(len, questions)))
    so_far = [[[] for _ in own] for own in questions]
    answers = [[[] for _ in own] for own in questions]
    for turn in range(max(len(question) for own in questions for question in own)):
        prompts = [
            [before + question[turn] if turn < len(question) else [] for before, question in zip(*client, strict=True)]
            for client in zip(so_far, questions, strict=True)
        ]
        new = generate_tokens(
            recipe,
            frozen,
            server,
            clients,
            prompts,
            end=end,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            sampling=Sampling(_row_keys(keys, turn, rows), temperature, top_p) if temperature else None,
        )
        for c, own in enumerate(questions):
            for row, question in enumerate(own):
                if turn < len(question):
                    answers[c][row].append(new[c][row])
                    so_far[c][row] = [*prompts[c][row], *new[c][row], end]
    return answers


def _row_keys(keys: jax.Array, turn: int, rows: jax.Array) -> jax.Array:
    """[C, N] keys of the rows of clients with `keys` [C]."""

    def of_client(key):
        return jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, turn)))(rows)

    return jax.vmap(of_client)(keys)


def fastchat_answer(question: Question, model_id: str, texts: list[str]) -> dict:
    """The answers to the turns of a question as a line of FastChat's; the same ones have the same answer_id."""
    content = json.dumps([model_id, question.id, question.turns, texts])
    return {
        "question_id": question.id,
        "answer_id": hashlib.sha256(content.encode()).hexdigest()[:22],
        "model_id": model_id,
        "choices": [{"index": 0, "turns": texts}],
        "tstamp": time.time(),
    }
