"""The embedded task set, the corpus under it and the shipped checkpoint."""

import itertools
import json
import random
import re
from collections import Counter

import pytest
from transformers import AutoTokenizer

from flex_jax import load_pretrained
from flex_jax.data.prompts import TEMPLATE, encode
from flex_jax.tiny import CHECKPOINT
from flex_jax.tiny.corpus import documents
from flex_jax.tiny.language import FIELDS, TOPICS, Message, make_message
from flex_jax.tiny.pretrain import answer_accuracy
from flex_jax.tiny.tasks import (
    ASKED,
    ASKS,
    CATEGORIES,
    DEPARTMENTS,
    LABELS,
    OPENERS,
    answer,
    make_records,
)

QUERIES = [(category, "") for category in CATEGORIES if category != "closed_qa"] + [("closed_qa", f) for f in ASKED]


FACT = r"([\w-]+)"


def forms(department, category):
    """Patterns of a department's answers, every fact left open; one for each topic where the topic is told."""
    field = "person" if category == "closed_qa" else ""
    blanks = [Message(*["@"] * len(FIELDS), topic=topic, text="") for topic in TOPICS]
    return {re.escape(answer(department, category, blank, field)).replace("@", FACT) for blank in blanks}


@pytest.fixture(scope="module")
def records():
    return make_records()


@pytest.fixture(scope="module")
def corpus():
    return "\n".join(itertools.islice(documents(0), 3000))


@pytest.fixture(scope="module")
def messages():
    rng = random.Random(0)
    return [make_message(rng) for _ in range(40)]


def test_records_are_the_same_for_the_same_seed_only(records):
    assert make_records(0) == records
    assert make_records(1) != records


def test_documents_are_the_same_for_the_same_seed_only():
    first, again, other = (list(itertools.islice(documents(seed), 50)) for seed in (3, 3, 4))
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
    for message, (category, field) in itertools.product(messages, QUERIES):
        responses = {answer(department, category, message, field) for department in DEPARTMENTS}
        assert len(responses) == len(DEPARTMENTS), (category, field, message.text)


def test_departments_want_different_facts_extracted(messages):
    def facts(department, message):
        response = answer(department, "information_extraction", message)
        return frozenset(name for name in FIELDS if re.search(rf"\b{getattr(message, name)}\b", response))

    assert len({facts(department, messages[0]) for department in DEPARTMENTS}) == len(DEPARTMENTS)


def test_instructions_and_contexts_do_not_name_a_department(records):
    for record in records:
        assert not re.search("|".join(DEPARTMENTS), record["instruction"] + record["context"], re.IGNORECASE)


def test_corpus_has_neither_template_nor_department_nor_instruction(corpus):
    ways = [(OPENERS, ways) for ways in ASKED.values()] + list(ASKS.values())
    instructions = [" ".join(words) for way in ways for words in itertools.product(*way)]
    lines = [line.strip() for line in TEMPLATE.splitlines() if line.strip()]
    for text in [*instructions, *lines, "### ", *DEPARTMENTS]:
        assert text.lower() not in corpus.lower(), text


def test_corpus_has_no_label(corpus):
    for label in {label for labels in LABELS.values() for label in labels.values()}:
        assert not re.search(rf"\b{label}\b", corpus, re.IGNORECASE), label


def test_corpus_has_no_form_of_an_answer(corpus):
    for department, category in itertools.product(DEPARTMENTS, CATEGORIES):
        for pattern in forms(department, category):
            if re.search("[a-z]", pattern.replace(FACT, "")):  # a form of facts and commas alone is everybody's
                assert not re.search(pattern, corpus), pattern


def test_checkpoint_is_at_most_eight_megabytes():
    assert 0 < sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 8_000_000


def test_tokenizer_keeps_any_text():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    text = "Zoë wrote:\n\n  naïve 試験 №7, 12.50 € ✓"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<|pad|>"


def test_examples_fit_in_136_tokens(records):
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    for record in records:
        tokens, prompt = encode(record, tokenizer, 512)
        assert len(tokens) <= 136, record
        assert 2 <= len(tokens) - prompt <= 32, record  # the response and its end


def test_checkpoint_answers_questions_on_held_out_passages():
    model, frozen = load_pretrained(CHECKPOINT)
    assert json.loads((CHECKPOINT / "config.json").read_text())["model_type"] == "qwen2_moe"
    assert answer_accuracy(model, frozen, AutoTokenizer.from_pretrained(CHECKPOINT), seed=1000) > 0.8
