"""Entities are conlleval's, spans the likeliest by trying them all, answers are scored as SQuAD scores them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompt.evaluation.spans import (
    MAX_ANSWER_TOKENS,
    Entity,
    answer_f1,
    best_span,
    entities,
    entity_f1,
    exact_match,
    has_prefixes,
)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),
        ("B-PER B-PER", [("PER", 0, 0), ("PER", 1, 1)]),
        ("I-PER I-PER O", [("PER", 0, 1)]),  # IOB1
        ("I-PER I-LOC", [("PER", 0, 0), ("LOC", 1, 1)]),
        ("B-PER I-LOC I-LOC", [("PER", 0, 0), ("LOC", 1, 2)]),
        ("O I-PER B-PER", [("PER", 1, 1), ("PER", 2, 2)]),
        ("B-PER E-PER S-LOC B-PER", [("PER", 0, 1), ("LOC", 2, 2), ("PER", 3, 3)]),
        ("B-PER L-PER U-LOC", [("PER", 0, 1), ("LOC", 2, 2)]),
        ("B-a-b I-a-b", [("a-b", 0, 1)]),
        ("O O", []),
        ("", []),
    ],
)
def test_entities_are_conllevals(tags, found):
    assert entities(tags.split()) == [Entity(*each) for each in found]


def test_tags_without_prefixes_are_runs():
    tags = ["PER", "PER", "O", "LOC", "PER", None, "PER"]
    assert not has_prefixes(["O", "PER", "LOC"])
    assert has_prefixes(["O", "B-PER", "I-PER"])
    assert entities(tags, has_prefixes=False) == [
        Entity("PER", 0, 1), Entity("LOC", 3, 3), Entity("PER", 4, 4), Entity("PER", 6, 6),
    ]  # fmt: skip


def test_f1_is_over_the_entities_of_all_rows():
    truth = [entities(["B-PER", "I-PER", "O"]), entities(["B-LOC", "O", "O"])]
    found = [entities(["B-PER", "O", "O"]), entities(["B-LOC", "O", "B-PER"])]
    assert entity_f1(truth, found) == pytest.approx(2 * 1 / (2 + 3))
    assert entity_f1(truth, truth) == 1
    assert entity_f1([[]], [[]]) == 0


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, MAX_ANSWER_TOKENS + 8), min_size=1, max_size=3), st.integers(0, 99))
def test_the_best_span_is_that_of_trying_all(sizes, seed):
    draws = np.random.default_rng(seed)
    windows = [draws.normal(size=(size, 2)) * 3 for size in sizes]
    sums = {
        (number, first, last): own[first, 0] + own[last, 1]
        for number, own in enumerate(windows)
        for first in range(len(own))
        for last in range(first, min(first + MAX_ANSWER_TOKENS, len(own)))
    }
    best = max(sums, key=sums.__getitem__)
    found = best_span(windows)
    assert (found.window, found.first, found.last) == best
    assert found.probability == pytest.approx(1 / np.exp(np.array(list(sums.values())) - sums[best]).sum())


WORDS = st.lists(st.sampled_from(["the", "Cat,", "a", "sat", "on", "mat!", "cat"]), max_size=6).map(" ".join)


@settings(max_examples=15, deadline=None)
@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_answers_are_scored_as_torchmetrics_scores_them(answer, references):
    text = pytest.importorskip("torchmetrics.functional.text")
    target = {"answers": {"answer_start": [0] * len(references), "text": references}, "id": "0"}
    truth = text.squad({"prediction_text": answer, "id": "0"}, target)
    assert exact_match(answer, references) == pytest.approx(float(truth["exact_match"]) / 100)
    assert answer_f1(answer, references) == pytest.approx(float(truth["f1"]) / 100)
