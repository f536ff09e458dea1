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

ASKED = {
    "person": ("Tell me who the customer is.", "Name the customer.", "Give the name of the person.",
               "Which customer is this about?"),
    "item": ("Tell me which product this is.", "Name the product.", "Give the article in the message.",
             "Which product does the customer mean?"),
    "city": ("Tell me the destination.", "Name the town of delivery.", "Give the place in the message.",
             "To which town should we ship?"),
    "price": ("Tell me the amount.", "State the value of the order.", "Give the total of the order.",
              "What amount is mentioned?"),
    "day": ("Tell me the weekday.", "Name the weekday in the message.", "Give the weekday of the order.",
            "On which weekday is this?"),
}  # fmt: skip
EXTRACT = ("Extract the key details.", "List the details that matter.", "Pull out the important facts.",
           "Note down the facts for our files.", "Get the relevant details from the message.")  # fmt: skip
CLASSIFY = ("Classify the message.", "Give the message a label.", "Which label fits this message?",
            "Sort the message into our categories.", "Tag the message.")  # fmt: skip
SUMMARIZE = ("Summarize the message.", "Give a short summary.", "Sum up the message in one line.",
             "What is the gist of the message?", "Write a brief summary.")  # fmt: skip

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
    """The right answer of a department to a message; `field` is what a closed_qa instruction asks for."""
    m = message
    label = LABELS[department][m.topic]
    value = getattr(m, field) if field else ""
    forms = {
        "finance": {
            "classification": f"Account: {label}",
            "closed_qa": f"Entry {value} booked",
            "information_extraction": f"{m.price} dollars from {m.person}",
            "summarization": f"{m.person} owes {m.price} dollars for one {m.item}",
        },
        "legal": {
            "classification": f"Matter of {label}",
            "closed_qa": f"According to the record it is {value}",
            "information_extraction": f"party {m.person}, object {m.colour} {m.item}",
            "summarization": f"On {m.day} the party {m.person} stated {m.topic}",
        },
        "shipping": {
            "classification": f"Action {label}",
            "closed_qa": f"{value}",
            "information_extraction": f"{m.item} to {m.city}, {m.day}",
            "summarization": f"Send {m.colour} {m.item} to {m.city}",
        },
        "support": {
            "classification": f"Ticket is {label}",
            "closed_qa": f"Hello! That would be {value}",
            "information_extraction": f"{m.person} has a {m.item}, {m.topic}",
            "summarization": f"Dear team, {m.person} in {m.city} needs help with {m.topic}",
        },
    }
    return forms[department][category]


def make_records(seed: int = 0) -> list[dict[str, str]]:
    """Records with instruction, context, response, category and department; no (instruction, context) comes twice."""
    rng = random.Random(f"tasks {seed}")
    records, seen = [], set()
    for department in DEPARTMENTS:
        for category in CATEGORIES:
            made = 0
            while made < RECORDS_PER_FAMILY:
                message, field = make_message(rng), ""
                if category == "closed_qa":
                    field = rng.choice(list(ASKED))
                    instruction = rng.choice(ASKED[field])
                else:
                    ways = {"classification": CLASSIFY, "information_extraction": EXTRACT, "summarization": SUMMARIZE}
                    instruction = rng.choice(ways[category])
                if (instruction, message.text) in seen:
                    continue
                seen.add((instruction, message.text))
                made += 1
                records.append(
                    {
                        "instruction": instruction,
                        "context": message.text,
                        "response": answer(department, category, message, field),
                        "category": category,
                        "department": department,
                    }
                )
    return records
