"""The Alpaca prompt on which FLEx (arXiv 2506.00965) trains, and its tokens.

Prompt and response are tokenised separately, so that generation starts from the prompt tokens seen in training.
"""

import os
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from flex_jax.errors import InputError

RESPONSE_HEADING = "\n\n### Response:"
TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{} " + RESPONSE_HEADING
)


def prompt_text(record: dict[str, str]) -> str:
    """Returns the prompt of a record, up to and including "### Response:".

    As in the authors' code, a space follows the instruction if the record has a context, even an empty one.
    """
    return TEMPLATE.format(" ".join(record[key] for key in ("instruction", "context") if key in record))


def encode(record: dict[str, str], tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> tuple[list[int], int]:
    """Returns the tokens of prompt, response and end of sequence, and how many of them belong to the prompt.

    If they exceed `sequence_length`, the response keeps at least its first sequence_length // 2 tokens. The prompt is
    cut at the end of its instruction and context; its heading "### Response:" is never cut. A response that is cut has
    no end of sequence. Raises InputError if there is no room for the heading.
    """
    ids, prompt_length, _ = encode_and_count(record, tokenizer, sequence_length)
    return ids, prompt_length


def encode_and_count(
    record: dict[str, str], tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> tuple[list[int], int, int]:
    """Returns what `encode` does, and how many tokens the record has before it is cut."""
    prompt, heading = _prompt_tokens(record, tokenizer)
    whole = [*_response_tokens(record, tokenizer), tokenizer.eos_token_id]
    response = whole[: max(sequence_length // 2, sequence_length - len(prompt))]
    cut = _cut_prompt(prompt, heading, sequence_length - len(response))
    return cut + response, len(cut), len(prompt) + len(whole)


def encode_prompt(record: dict[str, str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int]:
    """Returns the tokens of the prompt to generate from: at most `max_length`, cut as in `encode`."""
    return _cut_prompt(*_prompt_tokens(record, tokenizer), max_length)


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    """Returns what the tokenizer makes of a text. Control tokens written in it, such as "</s>", are text.

    Raises InputError if the tokenizer takes its end of sequence for a control token nevertheless.
    """
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False, **options)
    if tokenizer.eos_token_id in encoded["input_ids"]:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r} takes {tokenizer.eos_token!r} for the end of sequence even where it "
            f"is text, in {_excerpt(text, text.find(str(tokenizer.eos_token)))}: remove it there"
        )
    return encoded


def check_round_trip(records: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns a line if decoding the tokens of records gives other text than theirs, with the first example.

    Unicode's composed form (NFC) and a blank at the start make no difference.
    """
    changed = []
    for record in records:
        ids = _prompt_tokens(record, tokenizer)[0] + _response_tokens(record, tokenizer)
        decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        texts = prompt_text(record) + " " + record["response"], str(decoded)
        before, after = (unicodedata.normalize("NFC", text).removeprefix(" ") for text in texts)
        if before != after:
            place = len(os.path.commonprefix([before, after]))
            changed.append(f"{_excerpt(before, place)} becomes {_excerpt(after, place)}")
    return (
        f"the tokenizer changes the text of {len(changed)} of {len(records)} records: {changed[0]}" if changed else None
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises InputError if the tokenizer does not work or does not fit a model with `vocab_size` embedding rows."""
    if not tokenizer("a few words", add_special_tokens=False)["input_ids"]:  # transformers loads a folder without files
        raise InputError(f"tokenizer {tokenizer.name_or_path!r} gives no tokens: its files are missing or empty")
    if tokenizer.eos_token_id is None:
        raise InputError(f"tokenizer {tokenizer.name_or_path!r} has no eos_token; set it in tokenizer_config.json")
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r} does not fit the model: token {token!r} has id {largest}, "
            f"and the embedding has {vocab_size} rows"
        )


def _prompt_tokens(record: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Returns the tokens of the prompt, and how many cover the heading at its end; the first may cover more."""
    text = prompt_text(record)
    encoded = encode_text(text, tokenizer, return_offsets_mapping=True)
    heading_start = len(text) - len(RESPONSE_HEADING)
    return encoded["input_ids"], sum(end > heading_start for _, end in encoded["offset_mapping"])


def _response_tokens(record: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return encode_text(_separator(tokenizer) + record["response"], tokenizer)["input_ids"]


@lru_cache(maxsize=8)
def _separator(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns what to write before a response, so that exactly one blank follows the prompt.

    It is nothing for a tokenizer that puts a blank of its own before every text, such as Mixtral's.
    """
    heading, own = (encode_text(text, tokenizer)["input_ids"] for text in ("Response:", "It"))
    decoded = tokenizer.decode(heading + own, clean_up_tokenization_spaces=False)
    return "" if str(decoded).strip() == "Response: It" else " "


def _excerpt(text: str, place: int) -> str:
    """Returns the part of a text around a place, in quotes and escaped."""
    return repr(text[max(place - 20, 0) : place + 20])


def _cut_prompt(prompt: list[int], heading: int, room: int) -> list[int]:
    if len(prompt) <= room:
        return prompt
    if room < heading:
        raise InputError(
            f"sequence_length is too short: {room} tokens are left for a prompt whose heading '### Response:' alone "
            f"takes {heading}; sequence_length must be at least {2 * heading}"
        )
    return prompt[: room - heading] + prompt[len(prompt) - heading :]
