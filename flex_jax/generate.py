"""Answers of a trained run.

    python -m flex_jax.generate --workdir RUN --client 2 --prompt "..."
    python -m flex_jax.generate --workdir RUN [--client 2] --prompts QUESTIONS.jsonl --out ANSWERS.jsonl

A line of QUESTIONS has `prompt` (and perhaps `context`) or, as FastChat's questions, `turns`; it may also have `client`
and `question_id`. ANSWERS has FastChat's answers in the same order. Exit status: 0, or 2 with one line for a mistake
that the user can mend; a failed command leaves ANSWERS as it was.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

from flex_jax.command import Parser, run_command
from flex_jax.errors import InputError


def number(kind: type, allowed: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """Reads a flag's number; argparse reports what is no number, and with `allowed` one for which `holds` is false."""

    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{text}: must be {allowed}")
        return value

    return read


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags; raises InputError for any mistake in them that shows without the run."""
    parser = Parser(
        prog="flex_jax.generate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    positive = number(int, "an integer of at least 1", lambda value: value >= 1)
    seed = number(int, "an integer from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32)
    temperature = number(float, "a finite number of at least 0", lambda value: 0 <= value < math.inf)
    top_p = number(float, "above 0 and at most 1", lambda value: 0 < value <= 1)
    add = parser.add_argument
    add("--workdir", type=Path, required=True, metavar="RUN", help="work directory of the run")
    add(
        "--client",
        metavar="N|NAME|shared",
        help="whose answers: a client's, or the aggregated model's;\nwith --prompts that of the lines without a client",
    )
    add("--method", help="method of the run; default the first in its config")
    add("--seed", type=seed, metavar="N", help="seed of the run; default the first in its config")
    add("--prompt", metavar="TEXT", help="one question; its answer is printed")
    add("--context", metavar="TEXT", default="", help="what the question is about, where the task has such a text")
    add("--prompts", type=Path, metavar="FILE", help="questions, .jsonl or .jsonl.gz")
    add("--out", type=Path, metavar="FILE", help="where the answers to --prompts go")
    add("--max-new-tokens", type=positive, metavar="N", help="default evaluation.max_new_tokens of the run")
    add("--temperature", type=temperature, default=0.0, metavar="T", help="default 0, the most likely token each time")
    add("--top-p", type=top_p, default=1.0, metavar="P", help="nucleus to draw from; default 1, all tokens")
    add("--sample-seed", type=seed, default=0, metavar="N", help="default 0")
    add(
        "--batch-size",
        type=positive,
        metavar="N",
        help="questions of each client at a time;\ndefault evaluation.batch_size of the run",
    )
    options = parser.parse_args(arguments)
    if (options.prompt is None) == (options.prompts is None):
        raise InputError("give either --prompt or --prompts")
    if options.prompt is not None:
        if not options.prompt.strip():
            raise InputError("--prompt is empty")
        if options.client is None:
            raise InputError("--prompt needs --client: a client's number, or shared")
    if options.prompts is not None and options.context:
        raise InputError("--context goes with --prompt; a line of --prompts has its own")
    if (options.prompts is None) != (options.out is None):
        raise InputError("--prompts and --out go together")
    if options.prompts is not None:
        check_files(options.prompts, options.out)
    return options


def check_files(prompts: Path, out: Path) -> None:
    """Raises InputError where there are no questions or no answers could be written."""
    if not prompts.is_file():
        raise InputError(f"--prompts {prompts}: no such file")
    if out.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise InputError(f"--out {out}: must be a file in a directory that exists and can be written to")
    if out.resolve() == prompts.resolve():
        raise InputError(f"--out {out}: is the file of --prompts")


def answer(options: argparse.Namespace) -> None:
    """Generates what the flags ask for, then prints or writes it."""
    # Imported here and not above: the imports take seconds, and a wrong flag is told at once.
    from flex_jax.evaluation.answers import Question, encode_question, fastchat_answer, read_questions
    from flex_jax.reporting.writers import write_text
    from flex_jax.trained import SHARED, client_names, open_run

    if options.prompt is None:
        questions = read_questions(options.prompts)
    else:
        questions = [Question("--prompt", 1, None, [{"instruction": options.prompt, "context": options.context}])]
    asked = asked_clients(questions, options.client, client_names(options.workdir))
    trained = open_run(options.workdir, options.method, options.seed)
    max_new_tokens = options.max_new_tokens or trained.config.evaluation.max_new_tokens
    max_positions, tokenizer = trained.recipe.model.config.max_positions, trained.backbone.tokenizer
    encoded = [
        encode_question(question, tokenizer, max_positions=max_positions, max_new_tokens=max_new_tokens)
        for question in questions
    ]
    finished = f"{trained.name} after round {int(trained.state.round)} of {trained.config.rounds}"
    print(f"flex_jax: {finished}, questions: {len(questions)}", file=sys.stderr)
    texts = answer_all(
        trained,
        encoded,
        asked,
        max_new_tokens=max_new_tokens,
        batch_size=options.batch_size or trained.config.evaluation.batch_size,
        sample_seed=options.sample_seed,
        temperature=options.temperature,
        top_p=options.top_p,
    )
    if options.out is None:
        print(texts[0][0])
        return
    lines = []
    for question, client, turns in zip(questions, asked, texts, strict=True):
        model_id = f"{trained.name}-{SHARED if client is None else f'client{client}'}"
        line = fastchat_answer(question, model_id, turns) | {"client": SHARED if client is None else client}
        lines.append(json.dumps(line) + "\n")
    write_text(options.out, "".join(lines))


def asked_clients(questions: list, default: str | None, names: list[str]) -> list[int | None]:
    """The client that each question is put to, None for the shared model. Raises InputError for one that is not."""
    from flex_jax.trained import parse_client

    if default is not None:
        parse_client(default, names)
    asked = []
    for question in questions:
        name = default if question.client is None else question.client
        if name is None:
            raise InputError(f"{question.place}: has no client; --client would give the lines without one theirs")
        try:
            asked.append(parse_client(name, names))
        except InputError as error:
            raise InputError(f"{question.place}: {error}") from error
    return asked


def answer_all(
    trained,
    questions: list[list[list[int]]],
    asked: list[int | None],
    *,
    max_new_tokens: int,
    batch_size: int,
    sample_seed: int,
    temperature: float,
    top_p: float,
) -> list[list[str]]:
    """The answers to questions (token ids by turn), by turn. All clients answer in the same batches; the shared model,
    whose adapters have another structure, in its own."""
    import jax

    from flex_jax.evaluation.answers import converse
    from flex_jax.evaluation.generation import decode
    from flex_jax.trained import clients_of

    tokenizer, key = trained.backbone.tokenizer, jax.random.key(sample_seed)
    texts = [[] for _ in questions]
    groups = sorted(set(asked) - {None}), [None] if None in asked else []
    for group in filter(None, groups):
        rows = [[row for row, client in enumerate(asked) if client == own] for own in group]
        # The shared model draws as one more client.
        numbers = [trained.config.clients if client is None else client for client in group]
        answers = converse(
            trained.recipe,
            trained.frozen,
            trained.state.server,
            clients_of(trained, group),
            [[questions[row] for row in own] for own in rows],
            end=tokenizer.eos_token_id,
            max_new_tokens=max_new_tokens,
            batch_size=min(batch_size, max(map(len, rows))),
            keys=jax.vmap(lambda number: jax.random.fold_in(key, number))(jax.numpy.array(numbers)),
            temperature=temperature,
            top_p=top_p,
        )
        for own, conversations in zip(rows, answers, strict=True):
            for row, turns in zip(own, conversations, strict=True):
                texts[row] = decode(turns, tokenizer)
    return texts


def main(arguments: list[str]) -> int:
    """Runs the command line and returns its exit status."""

    def run(arguments):
        answer(parse(arguments))

    return run_command(run, arguments, interrupted="nothing was written")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
