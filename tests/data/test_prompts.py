import pytest

from flex_jax.data.prompts import check_tokenizer, encode, encode_prompt, prompt_text
from flex_jax.errors import InputError
from flex_jax.tiny import CHECKPOINT

RECORD = {"instruction": "Add them.", "context": "2 and 3", "response": "It is 5 — “five”.", "category": "maths"}
LONG = {"instruction": "Sum up.", "context": "word " * 200, "response": "answer " * 100, "category": "x"}
TAIL = "\n\n### Response:"


def test_prompt_is_the_authors_text():
    assert prompt_text(RECORD) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd them. 2 and 3 \n\n### Response:"
    )
    assert "Add them.  \n\n" in prompt_text(RECORD | {"context": ""})
    without = {key: value for key, value in RECORD.items() if key != "context"}
    assert "Add them. \n\n" in prompt_text(without)


def test_braces_of_a_record_are_text():
    assert "f'{x}' {}" in prompt_text(RECORD | {"context": "f'{x}' {}"})


def test_encode_of_what_fits_is_the_prompt_then_the_response_then_eos(tokenizer):
    ids, prompt_length = encode(RECORD, tokenizer, 512)
    assert tokenizer.decode(ids[:prompt_length]) == prompt_text(RECORD)
    assert tokenizer.decode(ids[prompt_length:-1]) == " " + RECORD["response"]
    assert ids[-1] == tokenizer.eos_token_id
    assert encode(RECORD, tokenizer, len(ids)) == (ids, prompt_length)
    assert encode_prompt(RECORD, tokenizer, 512) == ids[:prompt_length]


def test_a_long_prompt_gives_way_to_a_short_response(tokenizer):
    record = LONG | {"response": "Yes, all of it."}
    ids, prompt_length = encode(record, tokenizer, 100)
    assert len(ids) == 100
    assert tokenizer.decode(ids[prompt_length:]) == " Yes, all of it.<eos>"
    prompt = tokenizer.decode(ids[:prompt_length])
    assert prompt.endswith(TAIL) and prompt_text(record).startswith(prompt.removesuffix(TAIL).rstrip())


def test_a_long_prompt_and_a_long_response_share_the_sequence(tokenizer):
    ids, prompt_length = encode(LONG, tokenizer, 101)
    assert (len(ids), prompt_length) == (101, 51)
    assert tokenizer.decode(ids[:prompt_length]).endswith(TAIL)
    assert (" " + LONG["response"]).startswith(tokenizer.decode(ids[prompt_length:]))
    assert tokenizer.eos_token_id not in ids


def test_a_long_response_takes_what_a_short_prompt_leaves(tokenizer):
    record = LONG | {"context": ""}
    whole = len(tokenizer(prompt_text(record))["input_ids"])
    ids, prompt_length = encode(record, tokenizer, whole + 200)
    assert (prompt_length, len(ids)) == (whole, whole + 200)


def test_the_prompt_for_generation_is_cut_like_the_one_for_training(tokenizer):
    ids, prompt_length = encode(LONG, tokenizer, 101)
    assert encode_prompt(LONG, tokenizer, prompt_length) == ids[:prompt_length]


def test_the_heading_survives_a_merge_across_its_start(shared_data):
    # In this vocabulary the blank before the heading and its line breaks are one token.
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(shared_data / "tokenizer-qwen2.json"), eos_token="<|endoftext|>"
    )
    prompt = tokenizer.decode(encode_prompt(LONG, tokenizer, 40))
    assert prompt.endswith("word" + " " + TAIL) or prompt.endswith("word" + "  " + TAIL)


def test_no_room_for_the_heading_is_an_input_error(tokenizer):
    with pytest.raises(InputError, match=r"sequence_length is too short.*at least \d+"):
        encode(LONG, tokenizer, 8)


def test_check_tokenizer(tokenizer):
    check_tokenizer(tokenizer, len(tokenizer))
    with pytest.raises(InputError, match=f"id {len(tokenizer) - 1}, and the embedding has {len(tokenizer) - 1} rows"):
        check_tokenizer(tokenizer, len(tokenizer) - 1)


def test_check_tokenizer_wants_a_vocabulary(tmp_path):
    """What transformers makes of a checkpoint directory without tokenizer files, without a word."""
    from transformers import AutoTokenizer

    (tmp_path / "config.json").write_text((CHECKPOINT / "config.json").read_text())
    with pytest.raises(InputError, match="gives no tokens: its files are missing"):
        check_tokenizer(AutoTokenizer.from_pretrained(tmp_path), 1024)


def test_check_tokenizer_wants_an_end_of_sequence(tokenizer):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="no eos_token"):
        check_tokenizer(bare, 10_000)
