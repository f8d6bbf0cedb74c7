"""A criterion is the score that compare would show, refuses rows that do not fit, and leaves the base as it was."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import get_args

import pytest
import torch
from sklearn.metrics import f1_score
from support.tiny_bases import build_base, random_ids, random_prompt

from softprompt import TrainConfig, train
from softprompt.config import Criterion
from softprompt.data import rows_from_records, rows_from_texts
from softprompt.data.rows import with_labels
from softprompt.errors import ConfigError, DataError, MissingDependencyError
from softprompt.evaluation import CRITERIA, ScoreConfig, TextScore, accuracy, compare, criterion, likeliest_labels
from softprompt.families import forward_of
from softprompt.prompt import SoftPrompt

LABELS = (" w56", " w91")
GENERATED = get_args(TextScore)


def labelled(count=24):
    records = [
        {"text": " ".join(f"w{token}" for token in random_ids(2 + i % 7, i)), "label": LABELS[i % 3 > 0].strip()}
        for i in range(count)
    ]
    return rows_from_records(records, template="w5 {text} w6", completion=" {label}")


def soft(base, seed=0):
    return SoftPrompt(random_prompt(base, 4, seed))


def test_the_criteria_are_these():
    assert get_args(Criterion) == CRITERIA
    assert set(CRITERIA) == {"loss", "accuracy", "f1_macro", *GENERATED}


def test_a_criterion_of_labels_is_the_score_by_likelihood(tiny_llama):
    rows, forward = labelled(), forward_of(tiny_llama)
    texts = [f"w5 {record['text']} w6" for record in rows.records]
    score = {name: criterion(tiny_llama, rows, name) for name in ("accuracy", "f1_macro")}
    seen = set()
    for seed in range(4):
        prompt = soft(tiny_llama, seed)
        found = likeliest_labels(tiny_llama, forward, texts, LABELS, prompt)
        truth = [int(i % 3 > 0) for i in range(24)]
        assert score["f1_macro"](prompt) == pytest.approx(f1_score(truth, found, average="macro"))
        assert (
            score["accuracy"](prompt)
            == accuracy(tiny_llama, forward, "set", with_labels(rows), None, prompt).by_likelihood
        )
        seen.add(score["f1_macro"](prompt))
    assert len(seen) > 1


@pytest.mark.parametrize("name", GENERATED)
def test_a_criterion_of_answers_is_the_score_of_greedy_answers(tiny_llama, name):
    rows = labelled(12)
    rows = replace(rows, records=({**rows.records[0], "label": "w62"}, *rows.records[1:]))  # free text will do
    prompts = {f"p{seed}": soft(tiny_llama, seed) for seed in range(3)}
    scoring = ScoreConfig(score=(name,))
    shown = {
        item.prompt: item.value for item in compare(tiny_llama, prompts, held_out={"": rows}, scoring=scoring).scores
    }
    score = criterion(tiny_llama, rows, name)
    assert {key: score(prompt) for key, prompt in prompts.items()} == {key: shown[key] for key in prompts}


def test_a_criterion_changes_neither_the_base_nor_a_later_training():
    """Answers are generated in inference mode; nothing of it may stay where a gradient passes."""
    base, untouched = build_base("llama"), build_base("llama")
    before = torch.cat([parameter.flatten().clone() for parameter in base.model.parameters()])
    state = torch.random.get_rng_state()
    for name in ("chrf", "f1_macro"):
        criterion(base, labelled(), name)(soft(base))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(before, torch.cat([parameter.flatten() for parameter in base.model.parameters()]))
    texts = ["w5 w6 w7 w8", "w9 w10 w11"]
    config = TrainConfig(virtual_tokens=3, epochs=2)
    assert train(base, texts, config).losses == train(untouched, texts, config).losses


class TestRefusals:
    def test_a_criterion_of_labels_refuses_rows_without_labels(self, tiny_llama):
        records = [{"q": f"w{5 + i}", "a": f"w{20 + i}"} for i in range(6)]
        free = rows_from_records(records, template="{q}", completion=" {a}")
        for rows in (free, rows_from_texts(["w5 w6"])):
            with pytest.raises(ConfigError, match=r"'f1_macro' needs labelled rows, and .* has no closed set"):
                criterion(tiny_llama, rows, "f1_macro")

    def test_a_criterion_of_answers_refuses_rows_without_answers(self, tiny_llama):
        with pytest.raises(ConfigError, match="none of the 2 rows of texts has one"):
            criterion(tiny_llama, rows_from_texts(["w5 w6", "w7"]), "chrf")

    def test_a_row_with_an_unknown_label_is_refused(self, tiny_llama):
        rows = labelled(6)
        form = replace(rows.form, labels=(" w56", " w62"))
        with pytest.raises(DataError, match="row 2 of records: ' w91' is none of the labels"):
            criterion(tiny_llama, replace(rows, form=form), "accuracy")

    @pytest.mark.parametrize("name", ["loss", "bleu"])
    def test_a_name_that_is_no_task_score_is_refused(self, tiny_llama, name):
        with pytest.raises(
            ConfigError, match=f"'{name}' is not a task score; known are accuracy, f1_macro, exact_match"
        ):
            criterion(tiny_llama, labelled(), name)

    def test_a_criterion_without_torchmetrics_is_refused_before_training(self, tiny_llama, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchmetrics.functional.text", None)
        with pytest.raises(MissingDependencyError, match="need torchmetrics"):
            criterion(tiny_llama, labelled(), "chrf")
        assert 0 <= criterion(tiny_llama, labelled(), "accuracy")(soft(tiny_llama)) <= 1
