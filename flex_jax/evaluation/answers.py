"""Answers to questions with one or several turns, in the file formats of FastChat's MT-bench and Vicuna-bench."""

import hashlib
import json
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flex_jax.data.columns import listing
from flex_jax.data.prompts import TEMPLATE, encode_text, prompt_text
from flex_jax.data.readers import file_rows, text_column
from flex_jax.errors import InputError
from flex_jax.evaluation.generation import GenerationSettings, Sampling, generate_tokens
from flex_jax.federated.client import ClientModels
from flex_jax.terminal import tell

OPENING = TEMPLATE[: TEMPLATE.index("### Instruction:")]  # stands in the first turn of a conversation only

USED = {"prompt", "turns", "context", "client", "question_id"}  # keys of a line of questions
Conversation = list[list[int]]  # token ids by turn


class Question(NamedTuple):
    """One line of a file of questions."""

    place: str  # for error lines
    id: int | str
    client: str | None  # as it stands in the line
    turns: list[dict[str, str]]  # records without a response; later ones continue the conversation


def read_questions(file: Path) -> list[Question]:
    """Reads the questions of a JSONL file, or of any other that `load_records` reads, in its order.

    A line has either `prompt`, or `turns` as FastChat's questions do. It may have `context` (of the first turn),
    `client` and `question_id` (by default the number of the line). Raises InputError for a wrong line.
    """
    rows = file_rows(file)
    questions = [_question(number, place, row) for number, (place, row) in enumerate(rows, 1)]
    if unused := sorted({str(key) for _, row in rows for key in row} - USED):
        tell(f"{file}: not used: {listing(unused)}")
    return questions


def _question(number: int, place: str, row: dict) -> Question:
    if ("prompt" in row) == ("turns" in row):
        raise InputError(f"{place}: must have either prompt or turns")
    if "prompt" in row:
        asked = {"prompt": row["prompt"]}
    elif isinstance(row["turns"], list) and row["turns"]:
        asked = {f"turn {turn}": text for turn, text in enumerate(row["turns"], 1)}
    else:
        raise InputError(f"{place}: turns must be a list of at least one string")
    # Training gives every record a context, which is empty if the source has none.
    turns = [{"instruction": text_column(place, asked, name), "context": ""} for name in asked]
    if row.get("context") is not None:
        turns[0]["context"] = text_column(place, row, "context", blank=True)
    client = row.get("client")
    if type(client) not in (int, str, type(None)):
        raise InputError(f"{place}: client is {client!r:.60}: must be a client's name or index")
    return Question(place, row.get("question_id", number), None if client is None else str(client), turns)


def encode_question(question: Question, tokenizer, *, max_positions: int, max_new_tokens: int) -> Conversation:
    """Returns what each turn adds to the conversation: its prompt, from the second on without the opening sentence.

    Raises InputError if the conversation might exceed the model's positions.
    """
    first, *later = map(prompt_text, question.turns)
    texts = [first, *(text.removeprefix(OPENING) for text in later)]
    turns = [encode_text(text, tokenizer)["input_ids"] for text in texts]
    length, answers = sum(map(len, turns)), (len(turns) - 1) * (max_new_tokens + 1)
    if length + answers + max_new_tokens > max_positions:
        earlier = f", up to {answers} of earlier answers" if answers else ""
        raise InputError(
            f"{question.place}: too long: a prompt of {length} tokens{earlier} and {max_new_tokens} new tokens; the "
            f"model has {max_positions} positions"
        )
    return turns


def converse(
    models: ClientModels,
    questions: list[list[Conversation]],
    settings: GenerationSettings,
    sampling: Sampling | None = None,
) -> list[list[Conversation]]:
    """Returns the answers of every client to its own questions (see `encode_question`), by turn.

    A later turn is asked after the whole conversation before it, in which `settings.end` follows each answer. The keys
    of `sampling` are [C], one per client. A sample depends on its client's key, on the position of the question among
    the client's, and on the turn.
    """
    history = [[[] for _ in asked] for asked in questions]
    answers = [[[] for _ in asked] for asked in questions]
    most_questions = max(map(len, questions))
    for turn in range(max(len(question) for asked in questions for question in asked)):
        prompts = [
            [before + question[turn] if turn < len(question) else [] for before, question in zip(*client, strict=True)]
            for client in zip(history, questions, strict=True)
        ]
        drawn = sampling and sampling._replace(keys=_question_keys(sampling.keys, turn, most_questions))
        new = generate_tokens(models, prompts, settings, drawn)
        for c, asked in enumerate(questions):
            for i, question in enumerate(asked):
                if turn < len(question):
                    answers[c][i].append(new[c][i])
                    history[c][i] = [*prompts[c][i], *new[c][i], settings.end]
    return answers


def _question_keys(keys: jax.Array, turn: int, num_questions: int) -> jax.Array:
    """Returns keys [C, N] of the questions of clients with `keys` [C]."""
    turn_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, turn)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(turn_keys, jnp.arange(num_questions))


def fastchat_answer(question: Question, model_id: str, texts: list[str]) -> dict:
    """Returns the answers to a question's turns as a line in FastChat's format. Equal answers have equal ids."""
    content = json.dumps([model_id, question.id, question.turns, texts])
    return {
        "question_id": question.id,
        "answer_id": hashlib.sha256(content.encode()).hexdigest()[:22],
        "model_id": model_id,
        "choices": [{"index": 0, "turns": texts}],
        "tstamp": time.time(),
    }
