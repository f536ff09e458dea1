"""ROUGE F1 with stemming (Lin 2004), as the paper reports it."""

from functools import lru_cache
from statistics import fmean

KINDS = ("rouge1", "rouge2", "rougeL")


@lru_cache(maxsize=1)
def _scorer():
    from rouge_score.rouge_scorer import RougeScorer  # it imports nltk, which takes a second

    return RougeScorer(KINDS, use_stemmer=True)


def rouge(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Returns the mean F1 of unigrams, bigrams and the longest common subsequence, in percent (0 to 100).

    The tokeniser of rouge-score keeps only the letters a-z and digits, so text in another script scores 0.
    """
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"rouge needs as many predictions as references, at least one: got {len(predictions)} and {len(references)}"
        )
    scores = [_scorer().score(*pair) for pair in zip(references, predictions, strict=True)]
    return {kind: 100.0 * fmean(score[kind].fmeasure for score in scores) for kind in KINDS}
