"""The embedded instruction set: four departments of one company, four task families each, in Dolly's shape.

All departments get the same kinds of messages and are asked in the same words, the house words of the company. The
pretrained model knows them as words, not what they ask for: that is common to all. What a right answer is differs
between departments, in what it says and in how, and the prompt does not tell the department: one model shared by all
cannot serve them all.
"""

import random

from flex_jax.tiny.language import Message, make_message

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
    """The right answer of a department to a message; `fields` are those that the instruction asks for, in its order.

    A department adds the fact that it works with to what was asked (finance the price, legal the day, shipping the
    city, support the person), has labels of its own, and sums up in its own way.
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
    """One of the many ways to ask for a category's answer, and the fields it asks for."""
    fields = tuple(rng.sample(list(ASKED), {"closed_qa": 1, "information_extraction": 2}.get(category, 0)))
    asked = " and ".join(rng.choice(ASKED[field]) for field in fields) + "." if fields else rng.choice(MESSAGES)
    return f"{rng.choice(OPENERS[category])} {asked}", fields


def make_records(seed: int = 0) -> list[dict[str, str]]:
    """Records with instruction, context, response, category and department; no (instruction, context) comes twice."""
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
