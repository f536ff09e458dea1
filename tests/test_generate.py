"""The command that answers questions, on the embedded model after one round."""

import gzip
import json
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from flex_jax.evaluation.answers import converse, encode_question, read_questions
from flex_jax.evaluation.generation import GenerationSettings, Sampling
from flex_jax.federated.checkpoint import Checkpoints
from flex_jax.federated.ownership import merge
from flex_jax.generate import main
from flex_jax.main import main as train
from flex_jax.restored_run import open_run
from tests.program import ROOT, assert_refused, count_method_calls, read

NAMES = ["finance", "legal", "shipping", "support"]

NEW = 10
LINES = [  # of several clients and the shared model, in no order
    {"prompt": "Give the weekday.", "context": "A lamp was ordered by Helen. It was sent on Monday.", "client": 3},
    {"prompt": "Write a note.", "client": 0},
    {"prompt": "Write a note.", "client": "shared"},
    {"question_id": 81, "category": "writing", "turns": ["Write a note.", "Give the price."], "client": 3},
    {"prompt": "Write a note.", "client": 3},
    {"question_id": "q", "turns": ["Name the place."], "client": "shared", "reference": ["Paris"]},
]
FREE = ("--temperature", "1.5", "--top-p", "0.95", "--sample-seed", "5")


def index_of(line):
    return None if line["client"] == "shared" else line["client"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished run whose clients have moved away from each other."""
    workdir = tmp_path_factory.mktemp("generate") / "run"
    values = {
        "methods": "'flex','local'",
        "rounds": 1,
        "local_steps": 4,
        "batch_size": 2,
        "sequence_length": 64,
        "model.path": "tiny",
        "data.partition": "column",
        "data.column": "department",
        "data.examples_per_client": 12,
        "data.test_examples": 3,
        "lora.rank": 4,
        "optimizer.learning_rate": 1e-2,
        "evaluation.max_new_tokens": NEW,
        "evaluation.batch_size": 3,
        "slot.calibration_examples": 8,
    }
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    assert train(["--config", str(ROOT / "configs/default.py"), "--workdir", str(workdir), *flags]) == 0
    return workdir


@pytest.fixture(scope="module")
def trained(workdir):
    return open_run(workdir, client_ids=range(4))


def write(path, lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def ask(workdir, tmp_path, lines, *flags):
    """The lines of --out for these lines of --prompts."""
    out = tmp_path / "answers.jsonl"
    prompts = write(tmp_path / "questions.jsonl", lines)
    assert main(["--workdir", str(workdir), "--prompts", str(prompts), "--out", str(out), *flags]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def turns(answers):
    return [answer["choices"][0]["turns"] for answer in answers]


@partial(jax.jit, static_argnums=0)
def next_logits(model, variables, tokens, length):
    return model.apply(variables, tokens).logits[0, length - 1]


def naive(trained, client, ids):
    """The greedy continuation of one client or, for None, of the shared adapters alone; without a cache."""
    models = trained.shared_model() if client is None else trained.models([client])
    own = jax.tree.map(lambda leaf: leaf[0], models.clients)
    adapters = merge(trained.state.server.shared, own.personal)
    variables = {"params": trained.frozen.params, "adapters": adapters, "grafts": own.grafts}
    ids, new = list(ids), []
    while len(new) < NEW:
        tokens = jnp.array([[*ids, *[0] * (160 - len(ids))]])
        new.append(int(next_logits(trained.spec.model, variables, tokens, len(ids)).argmax()))
        if new[-1] == trained.backbone.tokenizer.eos_token_id:
            return new[:-1]
        ids.append(new[-1])
    return new


def test_the_command_gives_the_answers_of_the_evaluation(workdir, tmp_path):
    clients = read(workdir)["runs"][0]["clients"]
    lines, expected = [], []
    for client in clients:
        for example in client["examples"]:
            lines.append({"prompt": example["instruction"], "context": example["context"], "client": client["id"]})
            expected.append([example["prediction"]])
    assert turns(ask(workdir, tmp_path, lines)) == expected


def test_one_prompt_is_answered_on_stdout(workdir, tmp_path):
    command = [sys.executable, "-m", "flex_jax.generate", "--workdir", workdir, "--method", "local", "--client", "3"]
    done = subprocess.run([*command, "--prompt", "Write a note."], cwd=ROOT, capture_output=True, text=True, check=True)
    answers = ask(workdir, tmp_path, [LINES[4]], "--method", "local")
    assert done.stdout == f"{turns(answers)[0][0]}\n" and answers[0]["model_id"] == "local-seed0-support"
    assert "local-seed0 after round 1 of 1" in done.stderr


def test_a_context_and_the_name_of_a_client(workdir, tmp_path, capsys):
    line = LINES[0] | {"client": "support"}
    flags = ["--client", "support", "--prompt", line["prompt"], "--context", line["context"]]
    assert main(["--workdir", str(workdir), *flags]) == 0
    answers = ask(workdir, tmp_path, [line])
    assert capsys.readouterr().out.splitlines()[0] == turns(answers)[0][0] and answers[0]["client"] == "support"
    assert turns(answers) != turns(ask(workdir, tmp_path, [line | {"context": ""}]))


@pytest.mark.parametrize("flags", [(), FREE])
def test_mixed_lines_equal_those_of_each_client_alone(workdir, tmp_path, monkeypatch, flags):
    restored = count_method_calls(monkeypatch, Checkpoints, "read")
    mixed = ask(workdir, tmp_path, LINES, *flags)
    assert len(restored) == 1  # for two clients and the shared model
    assert [answer["client_index"] for answer in mixed] == [index_of(line) for line in LINES]
    for client in (0, 3, "shared"):
        own = [{key: line[key] for key in line if key != "client"} for line in LINES if line["client"] == client]
        alone = ask(workdir, tmp_path, own, "--client", str(client), "--batch-size", "1", *flags)
        index = None if client == "shared" else client
        assert turns(alone) == turns([answer for answer in mixed if answer["client_index"] == index])
    assert len({str(turns([mixed[row]])) for row in (1, 2, 4)}) == 3  # the same prompt


def test_the_order_of_clients_and_the_shared_model_does_not_matter(workdir, tmp_path):
    first, *_, last = LINES
    assert first["client"] == 3 and last["client"] == "shared"
    answers = turns(ask(workdir, tmp_path, LINES))
    assert turns(ask(workdir, tmp_path, LINES[::-1])) == answers[::-1]


def test_answers_have_fastchats_keys_and_stable_ids(workdir, tmp_path):
    answers = ask(workdir, tmp_path, LINES)
    for answer in answers:
        assert set(answer) == {"question_id", "answer_id", "model_id", "choices", "tstamp", "client", "client_index"}
        assert [set(choice) for choice in answer["choices"]] == [{"index", "turns"}]
        assert answer["choices"][0]["index"] == 0 and isinstance(answer["tstamp"], float)
    assert [answer["question_id"] for answer in answers] == [1, 2, 3, 81, 5, "q"]
    assert [answer["model_id"] for answer in answers] == [
        f"flex-seed0-{'shared' if line['client'] == 'shared' else NAMES[line['client']]}" for line in LINES
    ]
    assert list(map(len, turns(answers))) == [len(line.get("turns", [1])) for line in LINES]
    ids = [answer["answer_id"] for answer in answers]
    assert len(set(ids)) == len(ids) and ids == [answer["answer_id"] for answer in ask(workdir, tmp_path, LINES)]


def test_the_shared_model_is_the_backbone_with_the_shared_adapters_only(workdir, trained, tmp_path):
    questions = ["Write a note.", "Give the weekday."]
    answers = ask(workdir, tmp_path, [{"prompt": question} for question in questions], "--client", "shared")
    tokenizer = trained.backbone.tokenizer
    prompts = [tokenizer(alpaca(question))["input_ids"] for question in questions]
    assert turns(answers) == [[tokenizer.decode(naive(trained, None, prompt)).strip()] for prompt in prompts]
    assert turns(answers) != [[tokenizer.decode(naive(trained, 0, prompt)).strip()] for prompt in prompts]


def alpaca(question):
    opening = "Below is an instruction that describes a task. Write a response that appropriately completes"
    return f"{opening} the request.\n\n### Instruction:\n{question}  \n\n### Response:"


def test_the_second_turn_follows_the_first_and_its_answer(workdir, trained, tmp_path):
    answers = ask(workdir, tmp_path, LINES[1:2] + LINES[3:4])
    tokenizer = trained.backbone.tokenizer
    first = tokenizer(alpaca("Write a note."))["input_ids"]
    said = naive(trained, 3, first)
    later = tokenizer("### Instruction:\nGive the price.  \n\n### Response:")["input_ids"]
    then = naive(trained, 3, [*first, *said, tokenizer.eos_token_id, *later])
    assert turns(answers)[1] == [tokenizer.decode(ids).strip() for ids in (said, then)]
    assert then != naive(trained, 3, tokenizer(alpaca("Give the price."))["input_ids"])


def test_a_later_turn_reads_the_whole_conversation_and_draws_anew(monkeypatch):
    calls, said = [], [[[7, 7], [8]], [[9]]]  # what every turn is answered, by client and question

    def generate_tokens(models, prompts, settings, sampling):
        calls.append((prompts, jax.random.key_data(sampling.keys)))
        return said

    monkeypatch.setattr("flex_jax.evaluation.answers.generate_tokens", generate_tokens)
    questions = [[[[1, 2], [3]], [[4]]], [[[5], [6], [1]]]]
    keys = jax.random.split(jax.random.key(0), 2)
    settings = GenerationSettings(end=0, max_new_tokens=2, batch_size=1)
    conversations = converse(None, questions, settings, Sampling(keys, temperature=1.0, top_p=1.0))
    assert [prompts for prompts, _ in calls] == [
        [[[1, 2], [4]], [[5]]],
        [[[1, 2, 7, 7, 0, 3], []], [[5, 9, 0, 6]]],
        [[[], []], [[5, 9, 0, 6, 9, 0, 1]]],
    ]
    assert conversations == [[[[7, 7]] * 2, [[8]]], [[[9]] * 3]]
    assert len({tuple(row) for _, keys in calls for row in keys.reshape(-1, 2).tolist()}) == 3 * 2 * 2


def test_samples_go_by_the_sample_seed(workdir, tmp_path):
    lines = [{"prompt": "Write a note."}] * 3
    first, again = (turns(ask(workdir, tmp_path, lines, "--client", "1", *FREE)) for _ in range(2))
    assert first == again != turns(ask(workdir, tmp_path, lines, "--client", "1", *FREE[:-1], "6"))
    assert len(set(map(str, first))) == 3  # the same question, each time with its own chance


@pytest.mark.parametrize("name", ["mt-bench", "vicuna-bench"])
def test_the_real_benchmarks_are_answered(workdir, trained, shared_data, tmp_path, name):
    """All questions are read and encoded. Every eighth is answered: long prompts take seconds on a CPU."""
    file = shared_data / f"{name}.jsonl.gz"
    lines = [json.loads(line) for line in gzip.open(file, "rt", encoding="utf-8")]
    questions = read_questions(file)
    assert [question.id for question in questions] == [line["question_id"] for line in lines]
    for question, line in zip(questions, lines, strict=True):
        encoded = encode_question(question, trained.backbone.tokenizer, max_positions=2048, max_new_tokens=2)
        assert len(encoded) == len(line["turns"]) and all(encoded)
    answers = ask(workdir, tmp_path, lines[::8], "--client", "2", "--max-new-tokens", "2", "--batch-size", "80")
    assert [answer["question_id"] for answer in answers] == [line["question_id"] for line in lines[::8]]
    assert [*map(len, turns(answers))] == [len(line["turns"]) for line in lines[::8]]


FINE = {"prompt": "Write a note."}
BAD_LINES = {  # after six good ones
    "broken JSON": ('{"prompt": ', "questions.jsonl:7: broken JSON"),
    "no object": ("[1]", "questions.jsonl:7: .*object"),
    "no question": ({"client": 1}, "questions.jsonl:7: must have either prompt or turns"),
    "two kinds": ({"prompt": "a", "turns": ["b"]}, "questions.jsonl:7: must have either prompt or turns"),
    "empty": ({"prompt": " "}, "questions.jsonl:7: prompt is empty"),
    "no text": ({"prompt": 3}, "questions.jsonl:7: prompt must be a string"),
    "no turn": ({"turns": []}, "questions.jsonl:7: turns must be"),
    "turns that are one string": ({"turns": "abc"}, "questions.jsonl:7: turns must be"),
    "an empty turn": ({"turns": ["a", ""]}, "questions.jsonl:7: turn 2 is empty"),
    "a context that is none": ({"prompt": "a", "context": ["b"]}, "questions.jsonl:7: context must be a string"),
    "an unknown client": ({"prompt": "a", "client": 4}, "questions.jsonl:7: client '4': must be shared or one of"),
    "an unknown name": ({"prompt": "a", "client": "finances"}, "questions.jsonl:7: client 'finances'"),
    "too long": ({"prompt": "note " * 2100}, r"questions.jsonl:7: too long: a prompt of 2\d+ tokens and 80 .* 2048"),
    "too long in the end": (
        {"turns": ["note " * 990] * 2},
        "questions.jsonl:7: .* tokens, up to 81 of earlier answers",
    ),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_named_and_nothing_is_written(workdir, tmp_path, capsys, kind):
    line, words = BAD_LINES[kind]
    prompts, out = write(tmp_path / "questions.jsonl", [FINE] * 6 + [line]), write(tmp_path / "out.jsonl", ["old"])
    command = ["--workdir", workdir, "--client", "1", "--prompts", prompts, "--out", out, "--max-new-tokens", "80"]
    assert_refused(main, command, words, capsys)
    assert out.read_text() == "old\n" and len(list(tmp_path.iterdir())) == 2


ONE = ("--client", "1", "--prompt", "Write a note.")
FILES = ("--prompts", "IN", "--out", "OUT")
BAD_FLAGS = {
    "no question": (("--client", "1"), "either --prompt or --prompts"),
    "both": (ONE + FILES, "either --prompt or --prompts"),
    "no client": (ONE[2:], "--prompt needs --client"),
    "no client for a line": (FILES, "questions.jsonl:1: names no client"),
    "top-p alone": (("--top-p", "0.5", *ONE), "--top-p goes with --temperature"),
    "an unknown client": (("--client", "4", *ONE[2:]), "must be shared or one of finance .#0., legal .#1."),
    "a negative client": (("--client=-1", *ONE[2:]), "client '-1'"),
    "an empty client": (("--client", "", *ONE[2:]), "client ''"),
    "an empty prompt": (("--client", "1", "--prompt", " "), "--prompt is empty"),
    "a context for a file": ((*FILES, "--context", "a"), "--context goes with --prompt"),
    "no place for answers": (FILES[:2], "--out go together"),
    "a place for one answer": (ONE + FILES[2:], "--out go together"),
    "no file": (("--prompts", "IN.missing", "--out", "OUT"), "questions.jsonl.missing: no such file"),
    "a folder that is not there": (("--prompts", "IN", "--out", "OUT/answers"), "--out .*: must be a file in a dir"),
    "answers over questions": (("--prompts", "IN", "--out", "IN"), "is the file of --prompts"),
    "a cold temperature": ((*ONE, "--temperature", "-0.1"), "--temperature: -0.1: must be a finite number"),
    "no temperature": ((*ONE, "--temperature", "nan"), "--temperature: nan: must be a finite number"),
    "an empty nucleus": ((*ONE, "--top-p", "0"), "--top-p: 0: must be above 0 and at most 1"),
    "a nucleus above one": ((*ONE, "--top-p", "1.1"), "--top-p: 1.1: must be above 0 and at most 1"),
    "no new token": ((*ONE, "--max-new-tokens", "0"), "--max-new-tokens: 0: must be an integer of at least 1"),
    "too many new tokens": ((*ONE, "--max-new-tokens", "9999999999"), "at least 1 and at most 2147483647"),
    "too large a batch": ((*ONE, "--batch-size", "9999999999"), "at least 1 and at most 2147483647"),
    "no room for new tokens": ((*ONE, "--max-new-tokens", "2048"), "--prompt: too long: a prompt of"),
    "half a batch": ((*ONE, "--batch-size", "0.5"), "--batch-size: 0.5: must be an integer"),
    "an unknown method": ((*ONE, "--method", "fedavg"), "--method fedavg: .* has flex, local"),
    "an unknown seed": ((*ONE, "--seed", "3"), "--seed 3: .* has 0"),
    "no run": ((*ONE, "--workdir", "OUT"), "no run there"),
    "an unknown flag": ((*ONE, "--top-k", "3"), "--top-k"),
}


def test_a_cache_larger_than_the_memory_is_refused(workdir, tmp_path, monkeypatch, capsys):
    """Client 3 has two questions."""
    prompts, out = write(tmp_path / "questions.jsonl", [LINES[4], LINES[4]]), tmp_path / "answers.jsonl"
    command = ["--workdir", workdir, "--prompts", prompts, "--out", out, "--max-new-tokens", 900]
    monkeypatch.setattr("flex_jax.memory.device_memory", lambda: 2**20)
    words = "generation for 1 x 2 prompts at once, of 9.. tokens would take .* 1 MiB: lower --batch-size or --max-new"
    assert_refused(main, command, words, capsys)
    assert not out.exists()


@pytest.mark.parametrize("kind", BAD_FLAGS)
def test_a_bad_flag_gives_one_line_and_status_2(workdir, tmp_path, capsys, kind):
    flags, words = BAD_FLAGS[kind]
    prompts, out = write(tmp_path / "questions.jsonl", [FINE]), tmp_path / "answers.jsonl"
    flags = [flag.replace("IN", str(prompts)).replace("OUT", str(out)) for flag in flags]
    assert_refused(main, ["--workdir", workdir, *flags], words, capsys)
    assert not out.exists()
