"""The embedded instruction set: four departments of one company, four task families each, in Dolly's shape.

All departments get the same kinds of messages and instructions. What a right answer is differs between them, in what it
says and in how, and the prompt does not tell the department: one model shared by all cannot serve them all. To find the
facts in the message is common to all of them.
"""

import random

from flex_jax.tiny.language import Message, make_message

DEPARTMENTS = ("finance", "legal", "shipping", "support")
CATEGORIES = ("classification", "closed_qa", "information_extraction", "summarization")
RECORDS_PER_FAMILY = 150

OPENERS = ("Tell me", "Name", "Give", "State", "Report", "Look up")
ASKED = {
    "person": ("the customer", "the client", "who wrote to us"),
    "item": ("the product", "the article", "the goods"),
    "colour": ("the shade", "the finish", "how it looks"),
    "city": ("the destination", "the town", "the place of delivery"),
    "price": ("the amount", "the value of the order", "the total"),
    "day": ("the weekday", "the deadline", "the time named"),
}
ASKS = {
    "classification": (
        ("Classify", "Label", "Sort", "Tag", "Put a label on", "Find the category of"),
        ("the message.", "this message.", "the case.", "what we got here.", "the text below."),
    ),
    "information_extraction": (
        ("Extract", "List", "Pull out", "Note down", "Collect", "Get"),
        ("the key details.", "the facts for our files.", "what matters to us.", "the main points.", "the data."),
    ),
    "summarization": (
        ("Summarize", "Sum up", "Shorten", "Boil down", "Condense", "Give the gist of"),
        ("the message.", "this message.", "the case.", "what we got here.", "the text below."),
    ),
}
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


def answer(department: str, category: str, message: Message, field: str = "") -> str:
    """The right answer of a department to a message; `field` is what a closed_qa instruction asks for.

    Nearly every word of it is a fact of the message: which ones, and in which order, is the department's own.
    """
    m = message
    label = LABELS[department][m.topic]
    value = getattr(m, field) if field else ""
    forms = {
        "finance": {
            "classification": f"{label}, {m.price}",
            "closed_qa": f"{value} ({m.price})",
            "information_extraction": f"{m.price}, {m.person}, {m.day}",
            "summarization": f"{m.price} dollars from {m.person} for a {m.item}",
        },
        "legal": {
            "classification": f"{m.person}: {label}",
            "closed_qa": f"{m.day}: {value}",
            "information_extraction": f"{m.person} / {m.colour} {m.item} / {m.price}",
            "summarization": f"On {m.day} {m.person} claims a {m.colour} {m.item}",
        },
        "shipping": {
            "classification": f"{label} {m.city}",
            "closed_qa": f"{value}, {m.city}",
            "information_extraction": f"{m.item}; {m.city}; {m.day}",
            "summarization": f"{m.colour} {m.item} to {m.city} by {m.day}",
        },
        "support": {
            "classification": f"{label} {m.item}",
            "closed_qa": f"{m.person}, {value}",
            "information_extraction": f"{m.item}, {m.colour}, {m.person}, {m.city}",
            "summarization": f"{m.person} in {m.city} about the {m.item}",
        },
    }
    return forms[department][category]


def instruction(rng: random.Random, category: str) -> tuple[str, str]:
    """One of the many ways to ask for a category's answer, and the field it asks for where it is closed_qa."""
    if category == "closed_qa":
        field = rng.choice(list(ASKED))
        return f"{rng.choice(OPENERS)} {rng.choice(ASKED[field])}.", field
    return " ".join(rng.choice(part) for part in ASKS[category]), ""


def make_records(seed: int = 0) -> list[dict[str, str]]:
    """Records with instruction, context, response, category and department; no (instruction, context) comes twice."""
    rng = random.Random(f"tasks {seed}")
    records, seen = [], set()
    for department in DEPARTMENTS:
        for category in CATEGORIES:
            made = 0
            while made < RECORDS_PER_FAMILY:
                message = make_message(rng)
                asked, field = instruction(rng, category)
                if (asked, message.text) in seen:
                    continue
                seen.add((asked, message.text))
                made += 1
                records.append(
                    {
                        "instruction": asked,
                        "context": message.text,
                        "response": answer(department, category, message, field),
                        "category": category,
                        "department": department,
                    }
                )
    return records
