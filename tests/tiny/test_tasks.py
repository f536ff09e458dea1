"""The embedded tasks, the pretraining corpus and the shipped checkpoint."""

import itertools
import json
import random
import re
from collections import Counter

import pytest
from tiny_language import FIELDS, TOPICS, Message, make_message
from tiny_tasks import ASKED, CATEGORIES, DEPARTMENTS, MESSAGES, OPENERS, answer, make_records
from transformers import AutoTokenizer

from flex_jax import load_pretrained
from flex_jax.data.prompts import RESPONSE_HEADING, encode
from flex_jax.data.sources import load_records
from flex_jax.tiny import CHECKPOINT
from tools.make_tiny_model import answer_accuracy
from tools.tiny_corpus import documents

QUERIES = [
    ("classification", ()),
    ("summarization", ()),
    *(("closed_qa", (field,)) for field in ASKED),
    *(("information_extraction", fields) for fields in itertools.permutations(ASKED, 2)),
]

FACT = r"([\w-]+)"


def forms(department, category):
    """Returns patterns of a department's answers with a blank for every fact; if answers name the topic, one each."""
    fields = next(fields for queried, fields in QUERIES if queried == category)
    blanks = [Message(*["@"] * len(FIELDS), topic=topic, text="") for topic in TOPICS]
    return {re.escape(answer(department, category, blank, fields)).replace("@", FACT) for blank in blanks}


@pytest.fixture(scope="module")
def records():
    return make_records()


@pytest.fixture(scope="module")
def corpus():
    return "\n".join(itertools.islice(documents(0, office_words=True), 12000))


@pytest.fixture(scope="module")
def messages():
    rng = random.Random(0)
    return [make_message(rng) for _ in range(40)]


def test_records_are_the_same_for_the_same_seed_only(records):
    assert make_records(0) == records
    assert make_records(1) != records


def test_the_shipped_records_are_those_of_the_program(records):
    assert load_records("tiny") == records


def test_documents_are_the_same_for_the_same_seed_only():
    first, again, other = (list(itertools.islice(documents(seed, office_words=True), 50)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_every_department_has_as_many_records_of_every_category(records):
    counts = Counter((record["department"], record["category"]) for record in records)
    assert counts == {(department, category): 150 for department in DEPARTMENTS for category in CATEGORIES}


def test_records_have_the_columns_of_dolly_and_a_department(records):
    for record in records:
        assert set(record) == {"instruction", "context", "response", "category", "department"}
        assert all(value.strip() for value in record.values())


def test_no_instruction_comes_twice_with_the_same_context(records):
    assert len({(record["instruction"], record["context"]) for record in records}) == len(records)


def test_every_response_is_in_the_form_of_its_department_with_facts_of_its_message(records):
    for record in records:
        patterns = forms(record["department"], record["category"])
        matches = [m for m in (re.fullmatch(pattern, record["response"]) for pattern in patterns) if m]
        assert matches, record
        assert all(fact in record["context"] for fact in matches[0].groups()), record


def test_departments_answer_the_same_request_differently(messages):
    for message, (category, fields) in itertools.product(messages, QUERIES):
        responses = {answer(department, category, message, fields) for department in DEPARTMENTS}
        assert len(responses) == len(DEPARTMENTS), (category, fields, message.text)


def test_answers_hold_the_facts_asked_for_in_their_order(messages):
    for message, (category, fields), department in itertools.product(messages, QUERIES, DEPARTMENTS):
        values = [rf"\b{getattr(message, field)}\b" for field in fields]
        assert re.search(".*".join(values), answer(department, category, message, fields))


def test_departments_add_the_fact_that_they_work_with(messages):
    for message, (category, fields) in itertools.product(messages, QUERIES):
        for department, own in {"finance": "price", "legal": "day", "shipping": "city", "support": "person"}.items():
            assert getattr(message, own) in answer(department, category, message, fields)


def test_all_departments_are_asked_in_the_same_words(records):
    for department in DEPARTMENTS:
        asked = " ".join(record["instruction"] for record in records if record["department"] == department)
        for way in itertools.chain(*OPENERS.values(), *ASKED.values(), MESSAGES):
            assert way in asked, (department, way)


def test_instructions_and_contexts_do_not_name_a_department(records):
    for record in records:
        assert not re.search("|".join(DEPARTMENTS), record["instruction"] + record["context"], re.IGNORECASE)


def test_corpus_has_no_department_and_no_instruction_or_answer_of_theirs(corpus):
    ways = itertools.product(OPENERS["closed_qa"], itertools.chain(*ASKED.values()))
    for words in [*map(" ".join, ways), *DEPARTMENTS]:
        assert not re.search(rf"\b{words}\b", corpus, re.IGNORECASE), words
    sentences = "\n".join(itertools.islice(documents(0, office_words=False), 3000))  # words in order
    for department, category in itertools.product(DEPARTMENTS, CATEGORIES):
        for pattern in forms(department, category):
            if re.search("[a-z]{3}", pattern.replace(FACT, "")):  # a form without words fits all departments
                assert not re.search(pattern, sentences), pattern


def test_corpus_uses_every_token_of_the_tasks(records, corpus):
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    used = {token for record in records for token in encode(record, tokenizer, 512)[0]}
    assert used <= {*tokenizer(corpus)["input_ids"], tokenizer.eos_token_id}


def test_checkpoint_is_at_most_eight_megabytes():
    assert 0 < sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 8_000_000


def test_fixed_parts_of_the_prompt_are_one_token_each(records):
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    tokens, prompt = encode(records[0], tokenizer, 64)
    assert tokenizer.decode(tokens[0]).startswith("Below is an instruction")
    assert tokenizer.decode(tokens[prompt - 1]) == RESPONSE_HEADING


def test_tokenizer_keeps_any_text():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    text = "Zoë wrote:\n\n  naïve 試験 №7, 12.50 € ✓"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<|pad|>"


def test_examples_fit_in_64_tokens(records):
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    for record in records:
        tokens, prompt = encode(record, tokenizer, 512)
        assert len(tokens) <= 64, record
        assert 2 <= len(tokens) - prompt <= 16, record  # the response and its end


@pytest.mark.parametrize("heading", ["Answer:", RESPONSE_HEADING])
def test_checkpoint_answers_questions_on_held_out_passages(heading):
    model, frozen = load_pretrained(CHECKPOINT)
    assert json.loads((CHECKPOINT / "config.json").read_text())["model_type"] == "qwen2_moe"
    assert answer_accuracy(model, frozen, AutoTokenizer.from_pretrained(CHECKPOINT), seed=1000, heading=heading) > 0.8
