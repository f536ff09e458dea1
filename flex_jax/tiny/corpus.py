"""General documents of the world of `language`, for pretraining: prose, lists, questions on a passage, instructions,
repetitions.

The format of the instructions is the one that fine-tuning uses, as a base model of our day has met it. Words of
the embedded tasks come up in no order only: nothing here knows of departments, of their answers, or of what their
instructions ask for.
"""

import random
from collections.abc import Iterator

from flex_jax.data.prompts import TEMPLATE
from flex_jax.tiny.language import FIELDS, NAMES, SEPARATORS, WORDS, Message, make_message

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
    """Question and answer pairs on a message, each asked in one of several ways, answered in one of a few forms."""
    pairs = []
    for field in rng.sample(FIELDS, count):
        value = getattr(message, field)
        answer = rng.choice((value, value, f"{value}.", f"It is {value}."))
        pairs.append(f"Question: {rng.choice(QUESTIONS[field])} Answer: {answer}")
    return "\n".join(pairs)


def key_values(rng: random.Random, message: Message, count: int) -> str:
    """Facts of a message as a list of keys and values."""
    return "; ".join(f"{field}: {getattr(message, field)}" for field in rng.sample(FIELDS, count))


def recap(rng: random.Random, message: Message) -> str:
    """A sentence that joins two or three facts."""
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
    """One or two questions before the message, answered after it in their order."""
    fields = rng.sample((*FIELDS, "topic"), rng.choice((1, 2, 2)))
    instruction = " ".join(rng.choice(QUESTIONS[field]) for field in fields)
    answer = rng.choice((", ", "; ", " and ")).join(getattr(message, field) for field in fields)
    return f"{TEMPLATE.format(f'{instruction} {message.text}')} {answer}"


def repetition(rng: random.Random) -> str:
    """Words in no order, said again and again: what in-context copying is learned from."""
    words = [rng.choice(NAMES) for _ in range(rng.randint(3, 16))]
    return f"Again: {' '.join(words * (48 // len(words)))}"


def phrases(rng: random.Random, message: Message) -> str:
    """Words of the office in no order, with marks between them: to be said after a message, or said again and again."""
    count = rng.randint(1, 8)
    pool = (*NAMES, *WORDS, *(word.capitalize() for word in WORDS))
    phrase = "".join(rng.choice(pool) + rng.choice(SEPARATORS) for _ in range(count)).rstrip(" ,;:/.(")
    if rng.random() < 0.5:
        return f"{TEMPLATE.format(f'Say: {phrase}. {message.text}')} {phrase}"
    return "\n".join([phrase] * (48 // count))


def document(rng: random.Random, office_words: bool) -> str:
    """One document of 40 to 100 tokens: a message and what can be said of it, or words in no order."""
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
    """Documents without end, the same for the same seed; with or without the words that no message uses."""
    rng = random.Random(f"corpus {seed}")
    while True:
        yield document(rng, office_words)
