"""What a federation is built from, and what is told about it."""

import json

import pytest
from transformers import AutoTokenizer

from flex_jax.building import Backbone, build_federation, load_data_of
from flex_jax.config import default_config
from flex_jax.errors import InputError
from flex_jax.models.decoder import Decoder
from flex_jax.tiny import CHECKPOINT


@pytest.fixture(scope="module")
def backbone(model_config, params):
    return Backbone(Decoder(model_config), params, AutoTokenizer.from_pretrained(CHECKPOINT))  # it has 4,096 positions


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(count, **more):
    return [{"question": f"What is {i} {more}?", "answer": f"It is {i}.", **more} for i in range(count)]


def configured(path, **data):
    config = default_config()
    config.data.update(path=path, **data)
    return config


def test_what_a_user_might_not_expect_is_told(backbone, tmp_path):
    text = "word " * 200
    records = [*rows(6, category="a"), *rows(6, category="b"), *rows(6, category="c", context=text)]
    config = configured(written(tmp_path / "a.jsonl", records), test_examples=2)
    config.update(clients=2, sequence_length=64)
    federation = build_federation(config, backbone, load_data_of(config), seed=0)
    assert federation.notes == ["6 of 18 records are in no client: c 6"]
    config.update(clients=3)
    assert build_federation(config, backbone, load_data_of(config), seed=0).notes == [
        "4 of 12 training examples are longer than 64 tokens and are cut",
        "2 of 6 test examples are longer than 64 tokens and are cut",
    ]


def test_a_tokenizer_that_changes_text_is_told(backbone, tmp_path):
    config = configured(written(tmp_path / "a.jsonl", rows(9, note="x")), partition="iid")
    config.update(clients=1)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    from tokenizers.normalizers import Lowercase

    tokenizer.backend_tokenizer.normalizer = Lowercase()
    (line,) = build_federation(config, backbone._replace(tokenizer=tokenizer), load_data_of(config), seed=0).notes
    assert line.startswith("the tokenizer changes the text of 9 of 9 records: ")


def test_a_test_split_is_the_held_out_set(backbone, tmp_path):
    written(tmp_path / "train.jsonl", [*rows(12, site=1), *rows(12, site=10.0), {**rows(99)[-1], "site": "2"}])
    tests = [{"question": f"Test {i}?", "answer": "yes", "site": site} for i, site in enumerate((1, 2, 10, 10))]
    written(tmp_path / "test.jsonl", tests)
    config = configured(str(tmp_path), partition="column", column="site", test_split="test")
    config.update(clients=3)
    data = load_data_of(config)
    federation = build_federation(config, backbone, data, seed=0)
    assert [client.name for client in federation.train] == ["1", "2", "10"]
    assert [len(client.tokens) for client in federation.train] == [12, 1, 12]
    assert [[r["instruction"] for r in client] for client in federation.held_out.records] == [
        ["Test 0?"],
        ["Test 1?"],
        ["Test 2?", "Test 3?"],
    ]
    assert "not in the prompt" not in data.summary


@pytest.mark.parametrize(("length", "new_tokens"), [(4096, 1), (8192, 4), (4000, 97)])
def test_more_tokens_than_positions_are_refused(backbone, length, new_tokens):
    config = default_config()
    config.update(sequence_length=length)
    config.evaluation.max_new_tokens = new_tokens
    message = (
        f"sequence_length {length} .*max_new_tokens {new_tokens} is {length + new_tokens} tokens: .* 4096 positions"
    )
    with pytest.raises(InputError, match=message):
        build_federation(config, backbone, load_data_of(config), seed=0)
