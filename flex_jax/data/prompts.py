"""The Alpaca prompt as FLEx (arXiv 2506.00965) trains on it, and its tokens.

Prompt and response are tokenised apart, so that the prompt's tokens in training are those that generation starts from.
"""

from transformers import PreTrainedTokenizerBase

from flex_jax.errors import InputError

RESPONSE_HEADING = "\n\n### Response:"
TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{} " + RESPONSE_HEADING
)


def prompt_text(record: dict[str, str]) -> str:
    """The prompt of a record, up to and including "### Response:".

    The blank between instruction and context stands wherever the record has a context, be it empty, as in the
    authors' code.
    """
    question = record["instruction"] + " " + record["context"] if "context" in record else record["instruction"]
    return TEMPLATE.format(question)


def encode(record: dict[str, str], tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> tuple[list[int], int]:
    """Tokens of prompt, response and end of sequence, at most `sequence_length`, and how many are the prompt's.

    Where both do not fit, the response keeps at least its first sequence_length // 2 tokens and the prompt loses the
    end of its instruction and context, never its heading "### Response:". A response that was cut ends without the
    end of sequence.

    Raises:
        InputError: sequence_length leaves no room for the heading.
    """
    prompt, heading = _prompt_tokens(record, tokenizer)
    response = tokenizer(" " + record["response"], add_special_tokens=False, verbose=False)["input_ids"]
    response = response + [tokenizer.eos_token_id]
    response = response[: max(sequence_length // 2, sequence_length - len(prompt))]
    prompt = _cut_prompt(prompt, heading, sequence_length - len(response))
    return prompt + response, len(prompt)


def encode_prompt(record: dict[str, str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int]:
    """Tokens of the prompt alone, to generate from: at most `max_length`, cut as `encode` cuts them.

    Raises:
        InputError: max_length leaves no room for the heading "### Response:".
    """
    return _cut_prompt(*_prompt_tokens(record, tokenizer), max_length)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Checks that the tokenizer fits a model of `vocab_size` embedding rows.

    Raises:
        InputError: it has no vocabulary, some token has no embedding, or there is no end-of-sequence token to learn.
    """
    if not tokenizer("a few words", add_special_tokens=False)["input_ids"]:  # what transformers makes of no files
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
    """Tokens of the whole prompt, and how many at its end cover the heading (the first may also cover text before)."""
    text = prompt_text(record)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    heading_start = len(text) - len(RESPONSE_HEADING)
    return encoded["input_ids"], sum(end > heading_start for _, end in encoded["offset_mapping"])


def _cut_prompt(prompt: list[int], heading: int, room: int) -> list[int]:
    if len(prompt) <= room:
        return prompt
    if room < heading:
        raise InputError(
            f"sequence_length is too short: {room} tokens are left for a prompt whose heading '### Response:' alone "
            f"takes {heading}; sequence_length must be at least {2 * heading}"
        )
    return prompt[: room - heading] + prompt[len(prompt) - heading :]
