"""The Alpaca prompt on which FLEx (arXiv 2506.00965) trains, and its tokens.

Prompt and response are tokenised separately, so that generation starts from the prompt tokens seen in training.
"""

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
    prompt, heading = _prompt_tokens(record, tokenizer)
    response = tokenizer(" " + record["response"], add_special_tokens=False, verbose=False)["input_ids"]
    response = [*response, tokenizer.eos_token_id][: max(sequence_length // 2, sequence_length - len(prompt))]
    prompt = _cut_prompt(prompt, heading, sequence_length - len(response))
    return prompt + response, len(prompt)


def encode_prompt(record: dict[str, str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int]:
    """Returns the tokens of the prompt to generate from: at most `max_length`, cut as in `encode`."""
    return _cut_prompt(*_prompt_tokens(record, tokenizer), max_length)


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
