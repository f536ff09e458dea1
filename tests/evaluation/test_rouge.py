import random
import unicodedata

import pytest
from rouge_score.rouge_scorer import RougeScorer

from flex_jax.data.sources import load_records
from flex_jax.evaluation.rouge import rouge


def test_f1_by_hand_in_percent():
    # 3 words of 4 in common, of a reference of 3: precision 3/4, recall 1; bigrams 1 of 3 and 1 of 2; in order 3
    scores = rouge(["the big cat sat"], ["the cat sat"])
    assert scores == pytest.approx({"rouge1": 600 / 7, "rouge2": 40.0, "rougeL": 600 / 7})


def test_words_are_stemmed():
    assert rouge(["running dogs"], ["run dog"])["rougeL"] == pytest.approx(100.0)


def test_order_counts_for_rouge_l_only():
    scores = rouge(["b a"], ["a b"])
    assert scores["rouge1"] == pytest.approx(100.0)
    assert scores["rougeL"] == pytest.approx(50.0)


def test_mean_over_examples_an_empty_answer_is_zero():
    assert rouge(["a b", ""], ["a b", "c"])["rouge1"] == pytest.approx(50.0)


@pytest.mark.parametrize("predictions, references", [([], []), (["a"], ["a", "b"])])
def test_nothing_to_score_or_unequal_lengths_raise(predictions, references):
    with pytest.raises(ValueError, match="as many predictions as references"):
        rouge(predictions, references)


RIGHT = [
    "Größe",
    "Ответ: Москва",
    "北京是首都",
    "ประเทศไทย",
    "मुंबई में",
    "اَلْعَرَبِيَّةُ",
    "서울",
    "Tiếng Việt",
    "東京タワー",
    "၁၂၃",
    "😀",
]


@pytest.mark.parametrize("text", RIGHT)
def test_a_right_answer_scores_100_in_every_script(text):
    assert rouge([text], [text])["rougeL"] == pytest.approx(100.0)
    decomposed = unicodedata.normalize("NFD", text)
    assert rouge([decomposed], [text])["rouge1"] == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("prediction", "reference", "rouge_l"),
    [
        ("gr e", "Größe", 0.0),  # as rouge-score sees it without its letters
        ("मुबई", "मुंबई", 0.0),  # a mark is part of its word
        ("北京", "北平", 50.0),  # no blanks between words: characters are the words
        ("ที่ นี่", "ที่", 200 / 3),  # a vowel and a tone mark stay with their letter
        ("Müller lacht", "Müller weint", 50.0),
        ("می\u200cخواهم", "می خواهم", 0.0),  # one word with a zero-width non-joiner
        ("3 °C", "3 C", 100.0),
    ],
)
def test_words_of_other_scripts(prediction, reference, rouge_l):
    assert rouge([prediction], [reference])["rougeL"] == pytest.approx(rouge_l)


def test_ascii_text_scores_exactly_as_with_rouge_score():
    draw = random.Random(0)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    words = "running dogs' Dogs relational 3.5_x can't e-mail 1999 it! generalisation ... flies".split()
    for _ in range(200):
        prediction, reference = (" ".join(draw.choices(words, k=draw.randrange(8))) for _ in range(2))
        expected = scorer.score(reference, prediction)
        assert rouge([prediction], [reference]) == {kind: 100.0 * score.fmeasure for kind, score in expected.items()}


def test_real_answers_in_ascii_score_exactly_as_with_rouge_score(shared_data):
    texts = [record["response"] for record in load_records(shared_data / "dolly-15k.jsonl.gz")]
    texts = [text[:300] for text in texts if text.isascii()][:600]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for reference, prediction in zip(texts[::2], texts[1::2], strict=True):
        expected = {kind: 100.0 * score.fmeasure for kind, score in scorer.score(reference, prediction).items()}
        assert rouge([prediction], [reference]) == expected
