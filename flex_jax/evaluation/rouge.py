"""ROUGE F1 with stemming (Lin 2004), as the paper reports it, for every script."""

import unicodedata
from functools import lru_cache
from statistics import fmean

KINDS = ("rouge1", "rouge2", "rougeL")
JOINERS = str.maketrans(
    "", "", "\u00ad\u200c\u200d"
)  # soft hyphen, zero-width (non-)joiner: they stand inside of words
WITHOUT_BLANKS = (  # beginnings of the Unicode names of characters in scripts that put no blanks between words
    ("CJK ", "HIRAGANA ", "KATAKANA", "BOPOMOFO ", "IDEOGRAPHIC ", "YI ", "THAI ", "LAO ", "KHMER ", "MYANMAR ")
    + ("TAI ", "NEW TAI ", "JAVANESE ", "BALINESE ", "VERTICAL KANA ")
)


class Words:
    """Divides text into words as rouge-score does, but keeps the letters and digits of every script.

    Scripts that put no blanks between words, such as Chinese, Japanese and Thai, give one word per character. Words of
    a-z have Porter's stem.
    """

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer  # here, because it takes a second

        self._stem = lru_cache(maxsize=100_000)(PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        """Returns the words. A text of nothing but symbols, such as an emoji, gives its symbols."""
        text = unicodedata.normalize("NFKC", text.translate(JOINERS)).lower()
        words, last = [], ""
        for char in text:
            kind = _kind(char)
            if last and (kind == "mark" or kind == last == "letter"):
                words[-1] += char
            else:
                words += [char] if kind else []
                last = kind
        words = words or [char for char in text if not char.isascii() and unicodedata.category(char).startswith("S")]
        return [self._stem(word) if len(word) > 3 and word.isascii() else word for word in words]


@lru_cache(maxsize=100_000)
def _kind(char: str) -> str:
    """Returns what a character is to a word: a letter (or digit), a mark on one, a word of its own, or "": no part."""
    category = unicodedata.category(char)[0]
    if category == "M":
        return "mark"
    if category not in "LN":
        return ""
    return "word" if unicodedata.name(char, "").startswith(WITHOUT_BLANKS) else "letter"


@lru_cache(maxsize=1)
def _scorer():
    from rouge_score.rouge_scorer import RougeScorer  # it imports nltk, which takes a second

    return RougeScorer(KINDS, tokenizer=Words())


def rouge(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Returns the mean F1 of unigrams, bigrams and the longest common subsequence, in percent (0 to 100).

    Text of a-z and digits has exactly the scores of rouge-score with its stemmer. See `Words` for other text.
    """
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"rouge needs as many predictions as references, at least one: got {len(predictions)} and {len(references)}"
        )
    scores = [_scorer().score(*pair) for pair in zip(references, predictions, strict=True)]
    return {kind: 100.0 * fmean(score[kind].fmeasure for score in scores) for kind in KINDS}
