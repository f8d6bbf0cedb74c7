"""Scores of answers against references: torchmetrics' own on a whole set, cases by hand, and the edges of text."""

from __future__ import annotations

import sys
from typing import get_args

import pytest
from torchmetrics.functional import text as torchmetrics

from softprompt.errors import MissingDependencyError
from softprompt.evaluation import TextScore
from softprompt.evaluation.scores import text_scores

NAMES = get_args(TextScore)
ANSWERS = ["the cat sat on a mat", "Positive!", "nothing of the kind", "", "four score and seven years"]
REFERENCES = ["A cat sat on the mat.", "positive", "quite another thing", "an answer", "seven score years"]


def mean(scores):
    return sum(scores) / len(scores)


def one(name, answer, reference):
    (score,) = text_scores(name, [answer], [reference])
    return score


def near(value):
    return pytest.approx(value, abs=1e-6)


def test_means_are_torchmetrics_own_over_the_whole_set():
    """Its defaults, where ours are the same: ASCII text, and references of six characters and more."""
    said = [{"prediction_text": text, "id": str(i)} for i, text in enumerate(ANSWERS)]
    true = [{"answers": {"answer_start": [0], "text": [text]}, "id": str(i)} for i, text in enumerate(REFERENCES)]
    squad = torchmetrics.squad(said, true)
    rouge = torchmetrics.rouge_score(ANSWERS, REFERENCES, rouge_keys="rougeL")["rougeL_fmeasure"]
    _, chrf = torchmetrics.chrf_score(
        ANSWERS, [[text] for text in REFERENCES], n_word_order=0, return_sentence_level_score=True
    )
    truth = {
        "exact_match": float(squad["exact_match"]) / 100,
        "f1": float(squad["f1"]) / 100,
        "rouge_l": float(rouge),
        "chrf": float(chrf.mean()),
    }
    for name in NAMES:
        assert mean(text_scores(name, ANSWERS, REFERENCES)) == pytest.approx(truth[name], abs=1e-6), name
    assert len({round(value, 4) for value in truth.values()}) == 4


def test_scores_of_small_texts_are_those_computed_by_hand():
    assert one("exact_match", "The cat.", "cat") == near(1)
    assert one("exact_match", "cat sat", "cat") == near(0)
    assert one("f1", "the cat sat", "cat") == near(2 / 3)  # "the" is no word here: precision 1/2, recall 1
    assert one("rouge_l", "the cat sat", "cat") == near(1 / 2)  # and here it is one: precision 1/3, recall 1
    assert one("rouge_l", "sat the cat", "the cat sat") == near(2 / 3)  # the order counts
    assert one("f1", "sat the cat", "the cat sat") == near(1)
    # F2 of 1-grams (precision 1, recall 2/3) and 2-grams (1, 1/2); the answer has no 3-gram.
    assert one("chrf", "ab", "abc") == near((5 * 2 / 3 / (4 + 2 / 3) + 5 / 2 / (4 + 1 / 2) + 0) / 3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "text", ["a short answer", "cat", "5", "café crème", "Да, конечно", "日本語", "हिन्दी में", "naïve"]
)
def test_the_reference_itself_scores_1_whatever_its_length_and_script(name, text):
    """With torchmetrics' defaults `chrf` of a short text is below 1, and `rouge_l` of one without a to z is 0."""
    assert one(name, text, text) == near(1)
    assert one(name, f" {text}\n", text) == near(1)
    assert one(name, "something else", text) < 1


def test_words_of_every_script_count():
    assert one("rouge_l", "日本語", "中国語") == near(0)
    assert one("rouge_l", "caf", "café") == near(0)
    assert one("f1", "Да конечно", "да нет") == near(1 / 2)
    assert 0 < one("chrf", "日本語", "中国語") < 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("empty", ["", " ", "\n\n"])
def test_an_empty_answer_scores_0(name, empty):
    assert text_scores(name, [empty], ["an answer"]) == [0.0]


def test_scores_without_torchmetrics_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.text", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'softprompt\[scores\]'"):
        text_scores("chrf", ["a"], ["b"])
