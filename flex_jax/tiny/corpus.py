"""General documents of the world of `language`, for pretraining: prose, lists, questions on a passage, repetitions.

Nothing here knows of departments, of their answers, or of the instruction format that fine-tuning uses.
"""

import random
from collections.abc import Iterator

from flex_jax.tiny.language import CITIES, COLOURS, DAYS, FIELDS, ITEMS, PEOPLE, Message, make_message

QUESTIONS = {
    "person": ("Who is the buyer?", "Who made the order?", "What is the name?"),
    "item": ("What was ordered?", "Which thing is it?", "What did they buy?"),
    "colour": ("What colour is it?", "Which colour was ordered?"),
    "city": ("Where does it go?", "Which city is named?", "What is the city?"),
    "price": ("How much is it?", "What does it cost?", "What is the sum?"),
    "day": ("Which day is named?", "When is it?", "What is the date?"),
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


def repetition(rng: random.Random) -> str:
    """Words in no order, said again and again: what in-context copying is learned from."""
    words = [rng.choice((*PEOPLE, *ITEMS, *COLOURS, *CITIES, *DAYS)) for _ in range(rng.randint(3, 16))]
    return f"Again: {' '.join(words * (48 // len(words)))}"


def document(rng: random.Random) -> str:
    """One document of about 100 tokens: a message and what can be said of it, or a repetition."""
    message = make_message(rng)
    kind = rng.random()
    if kind < 0.40:
        return f"{message.text}\n{questions(rng, message, len(FIELDS))}"
    if kind < 0.50:
        return f"{message.text}\n{key_values(rng, message, len(FIELDS))}\n{questions(rng, message, 2)}"
    if kind < 0.65:
        return f"{key_values(rng, message, len(FIELDS))}\n{questions(rng, message, len(FIELDS))}"
    if kind < 0.75:
        return f"{message.text} {' '.join(recap(rng, message) for _ in range(4))}"
    return repetition(rng)


def documents(seed: int) -> Iterator[str]:
    """Documents without end, the same for the same seed."""
    rng = random.Random(f"corpus {seed}")
    while True:
        yield document(rng)
