import hashlib

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flex_jax.data.prompts import check_round_trip, check_tokenizer, encode, encode_prompt, encode_text, prompt_text
from flex_jax.data.sources import load_records
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
    (tmp_path / "config.json").write_text((CHECKPOINT / "config.json").read_text())
    with pytest.raises(InputError, match="gives no tokens: its files are missing"):
        check_tokenizer(AutoTokenizer.from_pretrained(tmp_path), 1024)


def test_check_tokenizer_wants_an_end_of_sequence(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="no eos_token"):
        check_tokenizer(bare, 10_000)


def test_the_embedded_tokens_are_those_of_the_first_version():
    """Figures of the quickstart depend on every one of them. The digest was taken before `encode_text` was written."""
    tokenizer, digest = AutoTokenizer.from_pretrained(CHECKPOINT), hashlib.sha256()
    for record in load_records("tiny"):
        ids, prompt_length = encode(record, tokenizer, 64)
        digest.update(np.array([prompt_length, *ids], np.int32).tobytes())
    assert digest.hexdigest() == "95f4c7191285e434de65b84d65f0934521c25a4712670b9fde73086514a260a0"


@pytest.mark.parametrize("text", ["<eos>", "a<eos> b", "<pad>"])
def test_control_tokens_written_in_a_text_are_text(text):
    tokenizer = trained(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())
    ids, prompt_length = encode(RECORD | {"instruction": text, "response": text}, tokenizer, 512)
    assert ids.count(tokenizer.eos_token_id) == 1 and tokenizer.pad_token_id not in ids
    assert tokenizer.decode(ids[prompt_length:-1]) == " " + text


def test_a_tokenizer_that_takes_text_for_its_end_of_sequence_is_refused():
    tokenizer = trained(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0)], unk_id=0), None, decoders.Fuse())
    tokenizer.eos_token = "</s>"
    with pytest.raises(InputError, match="takes '</s>' for the end of sequence even where it is text, in 'a</s>a'"):
        encode_text("a</s>a", tokenizer)


def trained(model, pre_tokenizer, decoder, normalizer=None):
    """A tokenizer of few merges, with the control tokens <eos> and <pad>."""
    tokenizer = Tokenizer(model)
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    if normalizer:
        tokenizer.normalizer = normalizer
    if not isinstance(model, models.Unigram):
        kind = trainers.BpeTrainer if isinstance(model, models.BPE) else trainers.WordLevelTrainer
        sentences = [prompt_text(RECORD), RECORD["response"], "Response: It a b <eos> <pad> one  two"]
        trainer = kind(vocab_size=400, special_tokens=["<unk>", "<eos>", "<pad>"], show_progress=False)
        if isinstance(pre_tokenizer, pre_tokenizers.ByteLevel):
            trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def llama_decoder():
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])


STYLES = {
    "GPT-2": lambda: trained(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
    "prefix space": lambda: trained(
        models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    ),
    "Mixtral": lambda: trained(
        models.BPE(unk_token="<unk>"),
        None,
        llama_decoder(),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ),
    "Metaspace": lambda: trained(
        models.BPE(unk_token="<unk>"), pre_tokenizers.Metaspace(prepend_scheme="first", split=False), llama_decoder()
    ),
    "Metaspace without a prefix": lambda: trained(
        models.BPE(unk_token="<unk>"),
        pre_tokenizers.Metaspace(prepend_scheme="never", split=False),
        decoders.Metaspace(prepend_scheme="never", split=False),
    ),
}


@pytest.mark.parametrize("style", STYLES)
def test_one_blank_stands_before_a_response(style):
    tokenizer = STYLES[style]()
    ids, _ = encode(RECORD, tokenizer, 2000)
    whole = prompt_text(RECORD) + " " + RECORD["response"]
    assert tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False).removeprefix(" ") == whole
    assert check_round_trip([RECORD], tokenizer) is None


def test_a_tokenizer_that_loses_blanks_is_told():
    tokenizer = trained(models.WordLevel(unk_token="<unk>"), pre_tokenizers.Whitespace(), decoders.Fuse())
    line = check_round_trip([RECORD, RECORD], tokenizer)
    assert line and line.startswith("the tokenizer changes the text of 2 of 2 records: 'Below is an instruc")
    assert line.endswith(" becomes 'Belowisaninstructionthatd'")


def test_a_composed_form_is_no_change():
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = trained(models.BPE(), byte_level, decoders.ByteLevel(), normalizers.NFC())
    assert check_round_trip([RECORD | {"response": "e\u0301"}], tokenizer) is None
    lower = trained(models.BPE(), byte_level, decoders.ByteLevel(), normalizers.Lowercase())
    assert "becomes 'below is an instruct" in check_round_trip([RECORD], lower)
