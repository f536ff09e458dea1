"""A small world of office messages: who ordered what, for how much, where it goes, and what went wrong.

WORDS are words of office English that no message uses. The model knows them as tokens, without a meaning.
"""

import random
from typing import NamedTuple

PEOPLE = (
    "Maria Tom Anna Ben Clara David Emma Felix Grace Henry Ida Jack Karen Leo Mona Nick Olga Paul Rosa Sam Tina Victor "
    "Wendy Yusuf Zoe Alan Bella Carl Dora Eric Fiona George Helen Ivan Julia Kevin Laura Martin Nora Oscar"
).split()
ITEMS = (
    "lamp chair table clock mirror carpet kettle printer desk sofa shelf vase bicycle camera radio tent blanket "
    "guitar helmet jacket laptop oven pillow ladder drill fan heater keyboard monitor stove toaster umbrella"
).split()
COLOURS = "red blue green black white grey brown yellow orange purple".split()
CITIES = (
    "Oslo Paris Rome Berlin Madrid Vienna Dublin Lisbon Prague Athens Warsaw Helsinki Geneva Milan Porto Hamburg "
    "Krakow Bergen Lyon Turin Ghent Cork Malaga Zurich"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
TOPICS = {
    "broken": (
        "The box arrived broken.", "It came with a crack.", "It stopped working at once.", "One part was smashed.",
    ),
    "late": (
        "It still has not arrived.", "The delivery is far too late.", "The parcel is delayed again.",
        "Nothing has come so far.",
    ),
    "wrong": (
        "The wrong one was in the box.", "This is not what was ordered.", "A different model was sent.",
        "The size is not the right one.",
    ),
    "payment": (
        "The card was charged twice.", "The bill is too high.", "The invoice shows a wrong sum.",
        "The money was taken two times.",
    ),
    "praise": (
        "It works very well.", "The service was excellent.", "Everything was perfect.", "It is a joy to use.",
    ),
    "question": (
        "Is there a manual for it?", "Can it be returned later?", "Does it have a guarantee?",
        "Are spare parts available?",
    ),
}  # fmt: skip
NAMES = (*PEOPLE, *ITEMS, *COLOURS, *CITIES, *DAYS)
WORDS = (
    "a about account advice amount and article at back boil breach by call case category charge check claims "
    "classify client closed collect condense copy correction cost customer day deadline dear delivery depot desk "
    "destination discount dispute dollars done down exchange extract file find finish first for form from get gist "
    "give goods got help here hold how in kind label last letter liability list look looks mail matter me message name "
    "named new no normal note note of office old on open order our out page paint pick place product pull put "
    "refund reply report returns second shade shorten slot sort state stock sum summarize tag team tell text thanks "
    "that the there third this time to today total town trace up urgent us value way we week weekday what who with "
    "work write wrote year you your below"
).split()
SEPARATORS = (*(" ",) * 6, ", ", "; ", ": ", " / ", ". ", " (", ") ")
FIELDS = ("person", "item", "colour", "city", "price", "day")


class Message(NamedTuple):
    """A message and its facts."""

    person: str
    item: str
    colour: str
    city: str
    price: str
    day: str
    topic: str
    text: str


def make_message(rng: random.Random) -> Message:
    """Returns a message: a sentence on who ordered what, then four sentences in random order."""
    person, item, colour = rng.choice(PEOPLE), rng.choice(ITEMS), rng.choice(COLOURS)
    city, price, day = rng.choice(CITIES), str(rng.randrange(11, 100)), rng.choice(DAYS)
    topic = rng.choice(list(TOPICS))
    opening = rng.choice(
        (f"{person} ordered a {colour} {item}.", f"{person} bought a {colour} {item}.",
         f"A {colour} {item} was ordered by {person}.")
    )  # fmt: skip
    others = [
        rng.choice((f"It goes to {city}.", f"The address is in {city}.", f"It should be sent to {city}.")),
        rng.choice((f"The price is {price} dollars.", f"It costs {price} dollars.", f"The sum was {price} dollars.")),
        rng.choice((f"It is due on {day}.", f"The date is {day}.", f"It was sent on {day}.")),
        rng.choice(TOPICS[topic]),
    ]
    rng.shuffle(others)
    return Message(person, item, colour, city, price, day, topic, " ".join([opening, *others]))
