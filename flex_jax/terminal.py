"""Text for people: what may not be shown as it is, because it comes from data, files or models."""

import re
import sys

# Control characters but tab and newline, marks that reverse the direction of writing, halves of surrogate pairs.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Returns a text with escapes, such as \x1b, for characters that change what a terminal or a page shows."""
    return HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def tell(text: str) -> None:
    """Prints one line to standard error, whatever the text holds."""
    print(f"flex_jax: {visible(' '.join(text.split()))}", file=sys.stderr)
