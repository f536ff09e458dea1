"""The command line: answers of a trained run.

    python -m flex_jax.generate --workdir RUN --client 2 --prompt "..."
    python -m flex_jax.generate --workdir RUN [--client 2] --prompts QUESTIONS.jsonl --out ANSWERS.jsonl

A line of QUESTIONS has `prompt` (and perhaps `context`) or, like FastChat's questions, `turns`. It may also have
`client` and `question_id`. ANSWERS has FastChat's format and the same order. Exit status: 0, or 2 with one line for a
mistake that the user can mend. A failed command does not change ANSWERS.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flex_jax.checks import COUNT
from flex_jax.command import Parser, run_command
from flex_jax.errors import InputError
from flex_jax.files import local_path
from flex_jax.terminal import tell, visible


def number(kind: type, allowed: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """Returns a reader of a flag's number. argparse reports any other text, and with `allowed` a wrong number."""

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
    """Returns the flags. Raises InputError for any mistake that shows without the run."""
    parser = Parser(prog="flex_jax.generate", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawTextHelpFormatter
    positive = number(int, COUNT.allowed, COUNT.accepts)
    seed = number(int, "an integer from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32)
    temperature = number(float, "a finite number of at least 0", lambda value: 0 <= value < math.inf)
    top_p = number(float, "above 0 and at most 1", lambda value: 0 < value <= 1)
    add = parser.add_argument
    add("--workdir", type=local_path, required=True, metavar="RUN", help="work directory of the run")
    client_help = "who answers: a client, or the aggregated model;\nwith --prompts, for lines that name no client"
    add("--client", metavar="NAME|#N|shared", help=client_help)
    add("--trust", type=Path, metavar="FILE", help="the file of the run's own method, to run it")
    add("--method", help="method of the run; default the first in its config")
    add("--seed", type=seed, metavar="N", help="seed of the run; default the first in its config")
    add("--prompt", metavar="TEXT", help="one question; its answer is printed")
    add("--context", metavar="TEXT", default="", help="the text that the question is about, if any")
    add("--prompts", type=Path, metavar="FILE", help="questions, .jsonl or .jsonl.gz")
    add("--out", type=Path, metavar="FILE", help="where the answers to --prompts go")
    add("--max-new-tokens", type=positive, metavar="N", help="default evaluation.max_new_tokens of the run")
    add("--temperature", type=temperature, default=0.0, metavar="T", help="default 0: the likeliest token")
    add("--top-p", type=top_p, default=1.0, metavar="P", help="nucleus to draw from; default 1, all tokens")
    add("--sample-seed", type=seed, default=0, metavar="N", help="default 0")
    batch_help = "questions of each client at a time;\ndefault evaluation.batch_size of the run"
    add("--batch-size", type=positive, metavar="N", help=batch_help)
    options = parser.parse_args(arguments)
    if (options.prompt is None) == (options.prompts is None):
        raise InputError("give either --prompt or --prompts")
    if options.prompt is not None and not options.prompt.strip():
        raise InputError("--prompt is empty")
    if options.prompt is not None and options.client is None:
        raise InputError("--prompt needs --client: a client's name, or shared")
    if options.prompts is not None and options.context:
        raise InputError("--context goes with --prompt; a line of --prompts has its own")
    if options.top_p != 1 and not options.temperature:
        raise InputError("--top-p goes with --temperature: without it the likeliest token is taken")
    if (options.prompts is None) != (options.out is None):
        raise InputError("--prompts and --out go together")
    if options.prompts is not None:
        if not options.prompts.is_file():
            raise InputError(f"--prompts {options.prompts}: no such file")
        if options.out.is_dir() or not os.access(options.out.absolute().parent, os.W_OK):
            raise InputError(f"--out {options.out}: must be a file in a directory that exists and can be written to")
        if options.out.resolve() == options.prompts.resolve():
            raise InputError(f"--out {options.out}: is the file of --prompts")
    return options


def answer(options: argparse.Namespace) -> None:
    """Generates what the flags ask for, then prints or writes it."""
    # Imported here, because these imports take seconds and a wrong flag should be told at once.
    from flex_jax.data.columns import listing
    from flex_jax.evaluation.answers import Question, encode_question, fastchat_answer, read_questions
    from flex_jax.evaluation.generation import GenerationSettings
    from flex_jax.files import write_text
    from flex_jax.memory import check_generation
    from flex_jax.restored_run import SHARED, client_label, open_run
    from flex_jax.workdir import read_client_names

    if options.prompt is None:
        questions = read_questions(options.prompts)
    else:
        questions = [Question("--prompt", 1, None, [{"instruction": options.prompt, "context": options.context}])]
    names = read_client_names(options.workdir)
    asked = asked_clients(questions, options.client, names)
    clients = [client for client in asked if client is not None]
    run = open_run(options.workdir, options.method, options.seed, clients, options.trust)
    evaluation, tokenizer = run.config.evaluation, run.backbone.tokenizer
    max_new_tokens = options.max_new_tokens or evaluation.max_new_tokens
    batch_size = options.batch_size or evaluation.batch_size
    settings = GenerationSettings(tokenizer.eos_token_id, max_new_tokens, batch_size)
    limit = run.spec.model.config.max_position_embeddings
    encoded = [encode_question(q, tokenizer, max_positions=limit, max_new_tokens=max_new_tokens) for q in questions]
    groups = group_clients(run, asked)
    longest = max(sum(map(len, turns)) + len(turns) * (max_new_tokens + 1) for turns in encoded)
    for group, _ in groups:
        shape = len(group), min(batch_size, max(map(asked.count, group))), longest
        check_generation(run.spec.model, run.frozen.params, shape, "--batch-size or --max-new-tokens")
    progress = f"{run.name} after round {int(run.state.round)} of {run.config.rounds}"
    answering = listing(dict.fromkeys(client_label(client, names) for client in asked))
    tell(f"{progress}, questions: {len(questions)}, answered by {answering}")
    texts = answer_all(run, groups, encoded, asked, settings, options)
    if options.out is None:
        print(visible(texts[0][0]))
        return
    lines = []
    for question, client, turns in zip(questions, asked, texts, strict=True):
        name = SHARED if client is None else names[client]
        line = fastchat_answer(question, f"{run.name}-{name}", turns) | {"client": name, "client_index": client}
        lines.append(json.dumps(line) + "\n")
    write_text(options.out, "".join(lines))


def asked_clients(questions: list, default: str | None, names: list[str]) -> list[int | None]:
    """Returns the client that each question is for, None for the shared model. Raises InputError for an unknown one."""
    from flex_jax.restored_run import parse_client

    if default is not None:
        parse_client(default, names)
    asked = []
    for question in questions:
        name = default if question.client is None else question.client
        if name is None:
            raise InputError(f"{question.place}: names no client; --client sets one for such lines")
        try:
            asked.append(parse_client(name, names))
        except InputError as error:
            raise InputError(f"{question.place}: {error}") from error
    return asked


def group_clients(run, asked: list[int | None]) -> list[tuple[list[int | None], Any]]:
    """Returns those who answer together, with their models: all clients, and the shared model, whose tree differs."""
    clients = sorted(client for client in set(asked) if client is not None)
    groups: list[tuple[list[int | None], Any]] = [([*clients], run.models(clients))] if clients else []
    return [*groups, ([None], run.shared_model())] if None in asked else groups


def answer_all(
    run, groups: list, questions: list[list[list[int]]], asked: list[int | None], settings, options: argparse.Namespace
) -> list[list[str]]:
    """Returns the answers to questions (token ids by turn), by turn. `groups` comes from `group_clients`."""
    import jax

    from flex_jax.evaluation.answers import converse
    from flex_jax.evaluation.generation import Sampling, decode

    key = jax.random.key(options.sample_seed)
    texts: list[list[str]] = [[] for _ in questions]
    for group, models in groups:
        positions = [[i for i, client in enumerate(asked) if client == member] for member in group]
        # The shared model draws as one more client.
        numbers = [run.config.clients if client is None else client for client in group]
        keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(jax.numpy.array(numbers))
        answers = converse(
            models,
            [[questions[i] for i in of_member] for of_member in positions],
            settings._replace(batch_size=min(settings.batch_size, max(map(len, positions)))),
            Sampling(keys, options.temperature, options.top_p) if options.temperature else None,
        )
        for of_member, conversations in zip(positions, answers, strict=True):
            for i, turns in zip(of_member, conversations, strict=True):
                texts[i] = decode(turns, run.backbone.tokenizer)
    return texts


def main(arguments: list[str]) -> int:
    """Runs the command line and returns its exit status."""
    return run_command(lambda flags: answer(parse(flags)), arguments, interrupted="nothing was written")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
