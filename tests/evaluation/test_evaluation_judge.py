"""The judgement's figures are those that compare would show for the prompt and the bare base on the same rows."""

from __future__ import annotations

import pytest
from support.tiny_bases import random_ids, random_prompt

from softprompt.data import rows_from_records, rows_from_texts
from softprompt.data.rows import with_labels
from softprompt.evaluation import ScoreConfig, compare, criterion, judge
from softprompt.prompt import SoftPrompt


@pytest.fixture
def labelled():
    records = [
        {"text": " ".join(f"w{token}" for token in random_ids(2 + i % 7, i)), "label": ("w56", "w91")[i % 3 > 0]}
        for i in range(24)
    ]
    return with_labels(rows_from_records(records, template="w5 {text} w6", completion=" {label}"))


def soft(base, seed):
    return SoftPrompt(random_prompt(base, 4, seed))


def test_labels_are_counted_as_compare_counts_them(tiny_llama, labelled):
    conclusions = set()
    for seed in range(4):
        prompt = soft(tiny_llama, seed)
        found = judge(tiny_llama, labelled, prompt, "loss", train_rows=100)
        bare, ours = compare(tiny_llama, {"p": prompt}, held_out={"set": labelled}).accuracies
        assert (found.prompt, found.bare_base) == (ours.by_likelihood, bare.by_likelihood)
        assert found.better_rows == len(set(bare.wrong_rows) - set(ours.wrong_rows))
        assert found.worse_rows == len(set(ours.wrong_rows) - set(bare.wrong_rows))
        assert (found.measure, found.rows, found.majority, found.train_rows) == ("accuracy", 24, 16 / 24, 100)
        predicted = [sum(column) > 0 for column in zip(*ours.confusion, strict=True)]
        assert found.is_constant == (sum(predicted) == 1)
        conclusions.add(found.better_rows - found.worse_rows)
    assert len(conclusions) > 1


def test_macro_f1_is_judged_where_it_chose_the_checkpoint(tiny_llama, labelled):
    prompt = soft(tiny_llama, 1)
    found = judge(tiny_llama, labelled, prompt, "f1_macro", train_rows=100)
    bare, ours = compare(tiny_llama, {"p": prompt}, held_out={"set": labelled}).accuracies
    assert found.measure == "f1_macro"
    assert (found.prompt, found.bare_base) == (pytest.approx(ours.f1_macro), pytest.approx(bare.f1_macro))
    assert found.difference is not None
    assert found.difference[0] <= found.prompt - found.bare_base <= found.difference[1]


@pytest.mark.parametrize("score", ["exact_match", "chrf"])
def test_answers_are_scored_as_compare_scores_them(tiny_llama, score):
    records = [{"q": f"w{i + 3}", "a": f"w{i % 50 + 40} w{i % 20 + 10}"} for i in range(20)]
    rows = rows_from_records(records, template="w5 {q} w6", completion=" {a}")
    prompt = soft(tiny_llama, 2)
    found = judge(tiny_llama, rows, prompt, score, train_rows=100)
    scoring = ScoreConfig(score=(score,))
    bare, ours = compare(tiny_llama, {"p": prompt}, held_out={"set": rows}, scoring=scoring).scores
    assert (found.prompt, found.bare_base, found.rows) == (ours.value, bare.value, 20)
    assert found.prompt == criterion(tiny_llama, rows, score)(prompt)
    assert (found.better_rows, found.worse_rows) == (len(ours.better_rows), len(ours.worse_rows))
    assert found.difference == (None if score == "exact_match" else (ours.interval.low, ours.interval.high))


def test_text_without_labels_or_a_score_is_not_judged(tiny_llama):
    rows = rows_from_texts(["w5 w6", "w7 w8"])
    assert judge(tiny_llama, rows, soft(tiny_llama, 0), "loss", train_rows=2) is None


def test_the_base_is_its_own_equal(tiny_llama, labelled):
    """The control: judged against itself, no prompt helps."""
    found = judge(tiny_llama, labelled, None, "loss", train_rows=100)
    assert (found.prompt, found.better_rows, found.worse_rows) == (found.bare_base, 0, 0)
    assert found.conclusion == "does not help"
