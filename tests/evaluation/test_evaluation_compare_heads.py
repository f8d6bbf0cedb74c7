"""Comparisons of prompts with heads: the figures of predict and criterion, beside what needs no head."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from support.encoders import build_encoder
from support.headed_prompts import WORDS, records_of, rows_of, untrained
from support.tiny_bases import random_prompt

from softprompt import PredictConfig, compare, predict
from softprompt.data import rows_from_records
from softprompt.data.rows import with_labels
from softprompt.errors import ConfigError, DataError
from softprompt.evaluation import (
    ScoreConfig,
    accuracy_tables,
    criterion,
    loss_tables,
    score_tables,
    to_markdown,
    verdict_lines,
)
from softprompt.evaluation.heads import RowScores, ratio_interval
from softprompt.prompt import SoftPrompt
from softprompt.types import InputForm, PromptRecord


@pytest.fixture(scope="module")
def bert():
    return build_encoder("bert", words=WORDS)


def shares_of(base, prompt, task):
    texts = [record["text"] for record in records_of(task)]
    return [item.probabilities for item in predict(base, prompt, texts, PredictConfig(probabilities=True))]


@pytest.mark.parametrize("task", ["cloze", "classify"])
def test_labels_have_accuracy_classes_confusion_and_loss(bert, task):
    rows = rows_of(bert, task)
    prompts = {name: untrained(bert, rows.form, seed) for seed, name in enumerate(("a", "b"))}
    found = compare(bert, prompts, held_out={"set": rows})
    own = [record["label"] for record in records_of(task)]
    names = [None, "a", "b"] if task == "cloze" else ["a", "b"]
    assert [item.prompt for item in found.accuracies] == [item.prompt for item in found.losses] == names
    for name, prompt in prompts.items():
        accuracy = next(item for item in found.accuracies if item.prompt == name)
        loss = next(item for item in found.losses if item.prompt == name)
        shares = shares_of(bert, prompt, task)
        wrong = tuple(
            i for i, (each, label) in enumerate(zip(shares, own, strict=True)) if max(each, key=each.get) != label
        )
        assert accuracy.wrong_rows == wrong
        assert accuracy.by_likelihood == criterion(bert, rows, "accuracy")(prompt)
        assert accuracy.f1_macro == criterion(bert, rows, "f1_macro")(prompt)
        assert [item.label for item in accuracy.classes] == WORDS
        nats = -np.log([each[label] for each, label in zip(shares, own, strict=True)])
        assert loss.loss == pytest.approx(nats.mean(), abs=1e-4)
        assert (loss.num_rows, loss.num_tokens, loss.difference is None) == (24, 24, task == "classify")
    known = found.baselines["set"]
    assert (known.majority, known.template is None) == (16 / 24, task == "classify")
    text = to_markdown(found)
    assert "always" in text
    assert ("the bare base" in verdict_lines(found)[0]) == (task == "cloze")
    assert len(accuracy_tables(found)) == len(loss_tables(found)) == 1
    found.to_json()
    (losses,) = loss_tables(found)
    assert losses.title == f"Held-out loss on set: {len(own)} rows, {len(own)} labels"
    assert losses.columns[1:3] == ["nats/label", "change"]


def test_tags_answers_and_vectors_have_scores_beside_their_baseline(bert):
    for task, names, first in (
        ("tag", ["entity_f1", "accuracy"], "always 'O'"), ("answer", ["exact_match", "f1"], "the whole context"),
        ("embed", ["accuracy_at_1", "mrr"], None),
    ):  # fmt: skip
        rows = rows_of(bert, task)
        prompt = untrained(bert, rows.form)
        found = compare(bert, {"p": prompt}, held_out={"set": rows})
        assert [(item.name, item.prompt) for item in found.scores] == [(n, p) for n in names for p in (first, "p")]
        for baseline, own in zip(found.scores[::2], found.scores[1::2], strict=True):
            assert own.difference == own.value - baseline.value
            assert own.interval.low <= own.difference <= own.interval.high
            assert (baseline.is_baseline, baseline.difference) == (True, None)
        assert [table.title for table in score_tables(found)] == [f"{name} on set: 24 rows" for name in names]
        assert f"| {first or 'base'} |" in to_markdown(found).replace("\\", "")
        assert (found.losses, found.accuracies) == ((), ())
        found.to_json()


def test_prompts_of_two_tasks_read_the_same_rows_each_in_its_form(bert):
    rows = rows_of(bert, "classify")
    prompts = {task: untrained(bert, rows_of(bert, task).form) for task in ("classify", "cloze")}
    found = {item.prompt: item.by_likelihood for item in compare(bert, prompts, held_out={"set": rows}).accuracies}
    for task, prompt in prompts.items():
        alone = compare(bert, {task: prompt}, held_out={"set": rows_of(bert, task)}).accuracies
        assert found[task] == alone[-1].by_likelihood
    assert None in found
    with pytest.raises(DataError, match="reads column 'tokens', and set is read without it"):
        compare(bert, {"t": untrained(bert, rows_of(bert, "tag").form)}, held_out={"set": rows})


def test_a_head_stands_beside_a_prompt_that_writes_on_a_causal_base(tiny_llama):
    records = records_of("classify")
    words = {"bad": "w56", "good": "w91"}
    rows = with_labels(rows_from_records(
        [{"text": r["text"], "label": words[r["label"]]} for r in records], template="{text}", completion=" {label}"
    ))  # fmt: skip
    form = dataclasses.replace(rows.form, task="classify", completion="{label}", labels=("w56", "w91"), pooling="last")
    writer = SoftPrompt(random_prompt(tiny_llama, 3, 1), PromptRecord(form=rows.form))
    head = untrained(tiny_llama, form)
    found = compare(tiny_llama, {"writer": writer, "head": head}, ["w7 w8"], held_out={"set": rows})
    alone = compare(tiny_llama, {"writer": writer}, ["w7 w8"], held_out={"set": rows})
    assert found.accuracies[:2] == alone.accuracies
    assert [(item.held_out, item.prompt) for item in found.accuracies[2:]] == [("set (heads)", "head")]
    (answered,) = found.answered
    (own,) = predict(tiny_llama, head, ["w7 w8"])
    assert answered.answers == {**alone.answered[0].answers, "head": f"{own.label} ({own.confidence:.3f})"}


def test_inputs_are_answered_by_the_heads_alone_where_the_base_writes_nothing(bert):
    prompt = untrained(bert, rows_of(bert, "tag").form)
    (found,) = compare(bert, {"p": prompt}, ["w7 w8"]).answered
    (own,) = predict(bert, prompt, ["w7 w8"])
    assert found.answers == {"p": f"{' '.join(own.tags)} ({own.confidence:.3f})"}


@pytest.mark.parametrize(
    ("more", "message"),
    [({"raw": True}, "raw continues a text, and p .task tag. writes none"),
     ({"scoring": ScoreConfig(calibrate=True)}, "calibrate is about label likelihoods, and p has the logits"),
     ({"scoring": ScoreConfig(score=("f1",))}, "score 'f1' is about written answers, and p has the scores of its own"),
     ({"ensembles": {"e": "p"}}, "p of e is for task tag; such prompts do not vote yet")],
)  # fmt: skip
def test_what_a_head_cannot_do_is_refused_by_name(bert, more, message):
    prompt = untrained(bert, rows_of(bert, "tag").form)
    more = {name: {"e": {"p": prompt}} if name == "ensembles" else value for name, value in more.items()}
    with pytest.raises(ConfigError, match=message):
        compare(bert, {"p": prompt}, ["w7"], **more)


def test_the_interval_of_a_quotient_is_that_of_resampling_rows():
    parts = tuple((float(i % 3), 2.0 + i % 2) for i in range(30))
    ours = RowScores("x", parts, tuple(a / b for a, b in parts), tuple(range(30)))
    theirs = RowScores("x", tuple((1.0, b) for _, b in parts), (0.0,) * 30, tuple(range(30)))
    draws, gaps = np.random.default_rng(7), []
    for _ in range(2_000):
        chosen = draws.integers(0, 30, 30)
        gaps.append(sum((parts[i][0] - 1) for i in chosen) / sum(parts[i][1] for i in chosen))
    found = ratio_interval(ours, theirs)
    assert (found.low, found.high) == pytest.approx(np.quantile(gaps, [0.025, 0.975]), abs=0.03)
    assert ratio_interval(*(dataclasses.replace(each, parts=each.parts[:1]) for each in (ours, theirs))) is None


def test_a_form_that_writes_text_is_measured_as_before(tiny_llama):
    prompt = SoftPrompt(random_prompt(tiny_llama, 3), PromptRecord(form=InputForm()))
    found = compare(tiny_llama, {"p": prompt}, ["w7"])
    assert list(found.answered[0].answers) == [None, "p"]
