"""ROUGE F1 with stemming (Lin 2004), as the paper reports it."""

from functools import lru_cache
from statistics import fmean

KINDS = ("rouge1", "rouge2", "rougeL")


@lru_cache(maxsize=1)
def _scorer():
    from rouge_score.rouge_scorer import RougeScorer  # nltk behind it takes a second to import

    return RougeScorer(KINDS, use_stemmer=True)


def rouge(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Mean F1 of unigrams, bigrams and the longest common subsequence, in percent (0 to 100).

    rouge-score's tokeniser keeps the letters a-z and the digits only: text in another script scores 0.

    Returns: {"rouge1": x, "rouge2": x, "rougeL": x}.
    Raises: ValueError when the lists are empty or differ in length.
    """
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"rouge needs as many predictions as references, at least one: got {len(predictions)} and {len(references)}"
        )
    scores = [
        _scorer().score(reference, prediction) for prediction, reference in zip(predictions, references, strict=True)
    ]
    return {kind: 100.0 * fmean(score[kind].fmeasure for score in scores) for kind in KINDS}
