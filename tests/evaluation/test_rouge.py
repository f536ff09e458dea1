import pytest

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
