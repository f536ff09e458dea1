"""The corpus for pretraining the embedded model: documents about the messages of `tools/tiny_language.py`.

There are prose, lists, questions about a passage, instructions and repetitions. Instructions have the format of
fine-tuning, because today's base models have seen such formats too. The words of the embedded tasks appear only in
random order: no document mentions a department, its answers, or what its instructions ask for.
"""

import random
from collections.abc import Iterator

from tiny_language import FIELDS, NAMES, SEPARATORS, WORDS, Message, make_message

from flex_jax.data.prompts import TEMPLATE

QUESTIONS = {
    "person": ("Who is the buyer?", "Who made the order?", "What is the name?"),
    "item": ("What was ordered?", "Which thing is it?", "What did they buy?"),
    "colour": ("What colour is it?", "Which colour was ordered?"),
    "city": ("Where does it go?", "Which city is named?", "What is the city?"),
    "price": ("How much is it?", "What does it cost?", "What is the sum?"),
    "day": ("Which day is named?", "When is it?", "What is the date?"),
    "topic": ("What kind of note is it?", "What is it about?"),
}


def questions(rng: random.Random, message: Message, count: int) -> str:
    """Returns `count` questions about a message with their answers, each in one of several forms."""
    pairs = []
    for field in rng.sample(FIELDS, count):
        value = getattr(message, field)
        answer = rng.choice((value, value, f"{value}.", f"It is {value}."))
        pairs.append(f"Question: {rng.choice(QUESTIONS[field])} Answer: {answer}")
    return "\n".join(pairs)


def key_values(rng: random.Random, message: Message, count: int) -> str:
    """Returns `count` facts of a message as a list of keys and values."""
    return "; ".join(f"{field}: {getattr(message, field)}" for field in rng.sample(FIELDS, count))


def recap(rng: random.Random, message: Message) -> str:
    """Returns a sentence with up to four facts of a message."""
    m = message
    return rng.choice(
        (
            f"In short, {m.person} wants the {m.item} in {m.city}.",
            f"So the {m.colour} {m.item} costs {m.price}, and the day is {m.day}.",
            f"That means {m.price} dollars for {m.person}.",
            f"So {m.city} gets the {m.item} on {m.day}.",
            f"This is about {m.person} and the {m.colour} {m.item}.",
            f"The kind of note is {m.topic}.",
            f"It is a note about {m.topic} from {m.person}.",
        )
    )


def instructed(rng: random.Random, message: Message) -> str:
    """Returns an instruction with one or two questions about a message, and the answers in the same order."""
    fields = rng.sample((*FIELDS, "topic"), rng.choice((1, 2, 2)))
    instruction = " ".join(rng.choice(QUESTIONS[field]) for field in fields)
    answer = rng.choice((", ", "; ", " and ")).join(getattr(message, field) for field in fields)
    return f"{TEMPLATE.format(f'{instruction} {message.text}')} {answer}"


def repetition(rng: random.Random) -> str:
    """Returns random words, repeated many times: the model learns in-context copying from them."""
    words = [rng.choice(NAMES) for _ in range(rng.randint(3, 16))]
    return f"Again: {' '.join(words * (48 // len(words)))}"


def phrases(rng: random.Random, message: Message) -> str:
    """Returns office words in random order with punctuation, either repeated or to be said after a message."""
    count = rng.randint(1, 8)
    pool = (*NAMES, *WORDS, *(word.capitalize() for word in WORDS))
    phrase = "".join(rng.choice(pool) + rng.choice(SEPARATORS) for _ in range(count)).rstrip(" ,;:/.(")
    if rng.random() < 0.5:
        return f"{TEMPLATE.format(f'Say: {phrase}. {message.text}')} {phrase}"
    return "\n".join([phrase] * (48 // count))


def document(rng: random.Random, office_words: bool) -> str:
    """Returns a document of 40 to 100 tokens: a message and text about it, or words in random order."""
    message = make_message(rng)
    if office_words and rng.random() < 0.3:
        return phrases(rng, message)
    kind = rng.random()
    if kind < 0.50:
        return instructed(rng, message)
    if kind < 0.70:
        return f"{message.text}\n{questions(rng, message, len(FIELDS))}"
    if kind < 0.75:
        return f"{key_values(rng, message, len(FIELDS))}\n{questions(rng, message, len(FIELDS))}"
    if kind < 0.80:
        return f"{message.text} {' '.join(recap(rng, message) for _ in range(4))}"
    return repetition(rng)


def documents(seed: int, *, office_words: bool) -> Iterator[str]:
    """Yields documents without end; the same seed gives the same documents.

    With `office_words`, some documents have words that no message uses.
    """
    rng = random.Random(f"corpus {seed}")
    while True:
        yield document(rng, office_words)
