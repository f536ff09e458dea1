"""The embedded tasks: four departments of one company with four task categories each, in the format of Dolly.

All departments get the same kinds of messages, and instructions with the same words. The pretrained model knows these
words as tokens, but not what they ask for: this is the same for all departments. The right answer differs between
departments, in content and in form, and the prompt does not name the department. So no single shared model can serve
all of them.

    python tools/tiny_tasks.py     # writes flex_jax/tiny/tasks.jsonl.gz again
"""

import gzip
import json
import random

from tiny_language import Message, make_message

from flex_jax.tiny import TASKS

DEPARTMENTS = ("finance", "legal", "shipping", "support")
CATEGORIES = ("classification", "closed_qa", "information_extraction", "summarization")
RECORDS_PER_FAMILY = 150

OPENERS = {
    "closed_qa": ("Tell me", "Name", "Give", "State", "Report", "Look up"),
    "information_extraction": ("Extract", "List", "Pull out", "Note down", "Collect", "Get"),
    "classification": ("Classify", "Label", "Sort", "Tag", "Put a label on", "Find the category of"),
    "summarization": ("Summarize", "Sum up", "Shorten", "Boil down", "Condense", "Give the gist of"),
}
ASKED = {
    "person": ("the customer", "the client", "who wrote to us", "the account"),
    "item": ("the product", "the article", "the goods", "the stock"),
    "colour": ("the shade", "the finish", "how it looks", "the paint"),
    "city": ("the destination", "the town", "the place of delivery", "the depot"),
    "price": ("the amount", "the value of the order", "the total", "the charge"),
    "day": ("the weekday", "the deadline", "the time named", "the slot"),
}
MESSAGES = ("the message.", "this message.", "the case.", "what we got here.", "the text below.")
LABELS = {
    "finance": {"broken": "refund", "late": "discount", "wrong": "refund", "payment": "correction", "praise": "no cost",
                "question": "no cost"},
    "legal": {"broken": "liability", "late": "breach", "wrong": "breach", "payment": "dispute", "praise": "no case",
              "question": "advice"},
    "shipping": {"broken": "pick up", "late": "trace", "wrong": "exchange", "payment": "hold", "praise": "done",
                 "question": "hold"},
    "support": {"broken": "urgent", "late": "urgent", "wrong": "normal", "payment": "normal", "praise": "thanks",
                "question": "reply"},
}  # fmt: skip


def answer(department: str, category: str, message: Message, fields: tuple[str, ...]) -> str:
    """Returns a department's right answer to a message.

    In addition to what was asked, each department states the fact that it works with: finance the price, legal the
    day, shipping the city, support the person. Each department has different labels and a different form of summary.

    Args:
        department: one of DEPARTMENTS.
        category: one of CATEGORIES.
        message: the message.
        fields: the fields that the instruction asks for, in its order.
    """
    m = message
    label = LABELS[department][m.topic]
    values = [getattr(m, field) for field in fields]
    forms = {
        "finance": {
            "classification": f"{label}, {m.price}",
            "closed_qa": f"{', '.join(values)} ({m.price})",
            "information_extraction": f"{' and '.join(values)} for {m.price} dollars",
            "summarization": f"{m.price} dollars from {m.person} for a {m.item}",
        },
        "legal": {
            "classification": f"{m.day}: {label}",
            "closed_qa": f"{m.day}: {', '.join(values)}",
            "information_extraction": f"On {m.day}: {' / '.join(values)}",
            "summarization": f"On {m.day} {m.person} claims a {m.colour} {m.item}",
        },
        "shipping": {
            "classification": f"{label} {m.city}",
            "closed_qa": f"{', '.join(values)}, {m.city}",
            "information_extraction": f"{'; '.join(values)}; to {m.city}",
            "summarization": f"{m.colour} {m.item} to {m.city} by {m.day}",
        },
        "support": {
            "classification": f"{label} {m.person}",
            "closed_qa": f"{m.person}, {', '.join(values)}",
            "information_extraction": f"Dear {m.person}: {', '.join(values)}",
            "summarization": f"{m.person} in {m.city} about the {m.item}",
        },
    }
    return forms[department][category]


def instruction(rng: random.Random, category: str) -> tuple[str, tuple[str, ...]]:
    """Returns a random instruction of a category, and the fields that it asks for."""
    fields = tuple(rng.sample(list(ASKED), {"closed_qa": 1, "information_extraction": 2}.get(category, 0)))
    asked = " and ".join(rng.choice(ASKED[field]) for field in fields) + "." if fields else rng.choice(MESSAGES)
    return f"{rng.choice(OPENERS[category])} {asked}", fields


def make_records(seed: int = 0) -> list[dict[str, str]]:
    """Returns records with instruction, context, response, category and department.

    No pair of instruction and context is repeated.
    """
    rng = random.Random(f"tasks {seed}")
    records, seen = [], set()
    for department in DEPARTMENTS:
        for category in CATEGORIES:
            made = 0
            while made < RECORDS_PER_FAMILY:
                message = make_message(rng)
                asked, fields = instruction(rng, category)
                if (asked, message.text) in seen:
                    continue
                seen.add((asked, message.text))
                made += 1
                records.append(
                    {
                        "instruction": asked,
                        "context": message.text,
                        "response": answer(department, category, message, fields),
                        "category": category,
                        "department": department,
                    }
                )
    return records


def encode(records: list[dict[str, str]]) -> bytes:
    """Returns the content of flex_jax/tiny/tasks.jsonl.gz."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return gzip.compress(lines.encode(), mtime=0)


if __name__ == "__main__":
    TASKS.write_bytes(encode(make_records()))
