"""Figures of tasks with heads: those that plain transformers' logits give, and what the commonest answer gives."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.encoders import build_encoder
from support.headed_prompts import WORDS, records_of, rows_of, untrained
from support.tiny_bases import LIMIT

from softprompt import PredictConfig, predict
from softprompt.data import build_task_examples
from softprompt.errors import ConfigError
from softprompt.evaluation import criterion, judge
from softprompt.evaluation.heads import constant_scores, row_scores
from softprompt.families import forward_of
from softprompt.families.task_head import task_head
from softprompt.prompt import Judgement

TASKS = ["cloze", "classify", "tag", "answer", "embed"]


@pytest.fixture(scope="module")
def bert():
    return build_encoder("bert", words=WORDS)


def plain_states(base, example, prompt):
    """[T, D] of one row alone: its embeddings with the vectors behind the first ids, through plain transformers."""
    ids = torch.tensor(example.ids)
    embeds = base.embedding(ids)
    whole = torch.cat([embeds[: example.num_before], prompt.tensor, embeds[example.num_before :]])
    num_virtual = len(prompt.tensor)
    types = torch.zeros(len(whole), dtype=torch.long)
    types[num_virtual + (len(ids) if example.num_first is None else example.num_first) :] = 1  # of a second text
    hidden = base.model.base_model(inputs_embeds=whole[None], token_type_ids=types[None]).last_hidden_state[0]
    return torch.cat([hidden[: example.num_before], hidden[example.num_before + len(prompt.tensor) :]])


@torch.no_grad()
def plain_labels(base, rows, prompt):
    """The logits of each row [N, K]."""
    found = []
    for example in build_task_examples(base, rows, max_length=LIMIT - 3).examples:
        states = plain_states(base, example, prompt)[list(example.columns)]
        if rows.form.task == "cloze":
            logits = base.model.cls(states)[0]
            found.append([float(logits[base.encode(word)[0]]) for word in WORDS])
        else:
            head = task_head(base, rows.form)
            found.append(head.logits(prompt.head, states.mean(dim=0, keepdim=True))[0].tolist())
    return np.array(found)


@pytest.mark.parametrize("task", ["cloze", "classify"])
class TestLabels:
    def test_predict_gives_the_softmax_of_plain_transformers_logits(self, bert, task):
        rows = rows_of(bert, task)
        prompt = untrained(bert, rows.form)
        logits = plain_labels(bert, rows, prompt)
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        texts = [{"text": record["text"]} for record in records_of(task)]
        found = list(predict(bert, prompt, texts, PredictConfig(probabilities=True)))
        assert [item.label for item in found] == [WORDS[best] for best in logits.argmax(axis=1)]
        assert len({item.label for item in found}) == 2
        for item, own in zip(found, shares, strict=True):
            assert [item.probabilities[word] for word in WORDS] == pytest.approx(own, abs=2e-5)

    def test_criterion_and_judge_count_those_labels(self, bert, task):
        rows = rows_of(bert, task)
        own = [record["label"] for record in records_of(task)]
        for seed in range(3):
            prompt = untrained(bert, rows.form, seed)
            labels = [item.label for item in predict(bert, prompt, [r["text"] for r in records_of(task)])]
            right = sum(a == b for a, b in zip(labels, own, strict=True)) / len(own)
            assert criterion(bert, rows, "accuracy")(prompt) == right
            found = judge(bert, rows, prompt, "accuracy", train_rows=100)
            assert (found.prompt, found.rows, found.majority) == (right, 24, 16 / 24)
            if task == "classify":
                assert (found.bare_base, found.rival) == (16 / 24, "commonest label")
                assert "the commonest label, always given, in 16" in found.text
                assert found.better_rows == sum(a == b == "bad" for a, b in zip(labels, own, strict=True))
            else:
                assert found.rival == "bare base"
            assert found.calibration.rows == 24
            assert len(found.calibration.right) == round(right * 24)
            assert Judgement.from_json(found.to_json()) == found

    def test_a_form_that_only_the_prompt_knows_is_scored_by_its_head(self, bert, task):
        """Rows of a run whose task is resolved when it trains still have the form of generation."""
        rows = rows_of(bert, task)
        plain = dataclasses.replace(
            rows, form=dataclasses.replace(rows.form, task="generate", completion=" {label}", labels=())
        )
        prompt = untrained(bert, rows.form)
        assert criterion(bert, plain, "accuracy")(prompt) == criterion(bert, rows, "accuracy")(prompt)
        assert criterion(bert, plain, "f1_macro")(prompt) == criterion(bert, rows, "f1_macro")(prompt)


def test_the_bare_base_fills_the_mask_without_a_prompt(bert):
    rows = rows_of(bert, "cloze")
    own = [WORDS.index(record["label"]) for record in records_of("cloze")]
    right = 0
    for example, label in zip(build_task_examples(bert, rows, max_length=LIMIT).examples, own, strict=True):
        with torch.no_grad():
            logits = bert.model(torch.tensor([example.ids])).logits[0, example.columns[0]]
        right += int(logits[[bert.encode(word)[0] for word in WORDS]].argmax()) == label
    assert judge(bert, rows, untrained(bert, rows.form), "loss", train_rows=9).bare_base == right / 24


class TestTags:
    def test_tags_are_the_heads_likeliest_for_each_word(self, bert):
        rows = rows_of(bert, "tag")
        prompt, head = untrained(bert, rows.form), task_head(bert, rows.form)
        asked = [{"tokens": record["tokens"]} for record in records_of("tag")]
        found = list(predict(bert, prompt, asked, PredictConfig(probabilities=True, threshold=0.5)))
        for example, item in zip(build_task_examples(bert, rows, max_length=LIMIT).examples, found, strict=True):
            with torch.no_grad():
                logits = head.logits(prompt.head, plain_states(bert, example, prompt)[list(example.columns)])
            shares = logits.softmax(dim=-1).amax(dim=1).tolist()
            assert item.tags == tuple(rows.form.labels[best] for best in logits.argmax(dim=1).tolist())
            assert item.tag_confidences == pytest.approx(tuple(shares), abs=2e-5)
            assert item.confidence == min(item.tag_confidences)
            assert item.is_unsure == (item.confidence < 0.5)

    def test_words_apart_by_spaces_are_a_list_and_a_word_cut_off_has_no_tag(self, bert):
        prompt = untrained(bert, rows_of(bert, "tag").form)
        given, listed, long, empty = predict(bert, prompt, [
            {"tokens": "w7 w8"}, {"tokens": ["w7", "w8"]}, {"tokens": ["w7"] * 200}, {"tokens": []},
        ])  # fmt: skip
        assert given == listed
        assert (long.is_truncated, len(long.tags), long.tags[-1]) == (True, 200, None)
        assert empty.error == "the row is empty"

    def test_judge_and_criterion_have_the_entities_f1(self, bert):
        rows = rows_of(bert, "tag")
        prompt = untrained(bert, rows.form)
        by_name = {own.name: own for own in row_scores(bert, forward_of(bert), rows, prompt, LIMIT - 3)}
        found = judge(bert, rows, prompt, "loss", train_rows=9)
        assert found.prompt == by_name["entity_f1"].value == criterion(bert, rows, "f1")(prompt)
        assert criterion(bert, rows, "accuracy")(prompt) == by_name["accuracy"].value
        assert "(entity F1) and the commonest label, always given, 0.00" in found.text
        with pytest.raises(ConfigError, match="task 'tag' is scored by accuracy or f1"):
            criterion(bert, rows, "f1_macro")(prompt)


class TestAnswers:
    def test_the_answer_is_the_likeliest_span_of_the_context_with_its_place(self, bert):
        rows = rows_of(bert, "answer")
        prompt, head = untrained(bert, rows.form), task_head(bert, rows.form)
        asked = [{name: record[name] for name in ("question", "context")} for record in records_of("answer")]
        examples = build_task_examples(bert, rows, max_length=LIMIT).examples
        for example, item, record in zip(examples, predict(bert, prompt, asked), asked, strict=True):
            with torch.no_grad():
                logits = head.logits(prompt.head, plain_states(bert, example, prompt)[list(example.columns)])
            sums = (logits[:, :1] + logits[:, 1]).triu()
            sums[torch.ones_like(sums).tril(-1).bool()] = -torch.inf
            first, last = divmod(int(sums.argmax()), len(sums))
            words = record["context"].split()
            assert item.answer == " ".join(words[first : last + 1]) == record["context"][item.start : item.end]
            assert item.confidence == pytest.approx(float(sums.flatten().softmax(0).max()), abs=2e-5)

    def test_a_context_longer_than_the_base_is_read_whole(self, bert):
        rows = rows_of(bert, "answer")
        long = " ".join(f"w{10 + i % 80}" for i in range(400))
        (item,) = predict(bert, untrained(bert, rows.form), [{"question": "w50", "context": long}])
        assert not item.is_truncated
        assert long[item.start : item.end] == item.answer

    def test_judge_is_beside_the_whole_context(self, bert):
        rows = rows_of(bert, "answer")
        name, whole = constant_scores(bert, rows, LIMIT)
        found = judge(bert, rows, untrained(bert, rows.form), "loss", train_rows=9)
        assert (name, found.measure, found.rival) == ("the whole context", "f1", "whole context")
        assert found.bare_base == whole[1].value > 0
        assert criterion(bert, rows, "exact_match")(untrained(bert, rows.form)) <= 1


class TestEmbeddings:
    def test_vectors_are_the_means_of_plain_states_of_length_1(self, bert):
        rows = rows_of(bert, "embed")
        prompt = untrained(bert, rows.form)
        asked = [{"anchor": record["anchor"]} for record in records_of("embed")]
        examples = build_task_examples(bert, rows, max_length=LIMIT).examples
        for example, item in zip(examples, predict(bert, prompt, asked), strict=True):
            with torch.no_grad():
                mean = plain_states(bert, example, prompt).mean(dim=0)
            assert item.embedding == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)

    def test_retrieval_counts_the_rank_of_each_rows_own_positive(self, bert):
        rows = rows_of(bert, "embed")
        prompt = untrained(bert, rows.form)
        anchors, positives = (
            np.array(
                [item.embedding for item in predict(bert, prompt, [{"anchor": r[side]} for r in records_of("embed")])]
            )
            for side in ("anchor", "positive")
        )
        similar = anchors @ positives.T
        ranks = [1 + sum(other > row[i] for other in row) for i, row in enumerate(similar)]
        first, reciprocal = row_scores(bert, forward_of(bert), rows, prompt, LIMIT - 3)
        assert (first.name, first.value) == ("accuracy_at_1", sum(rank == 1 for rank in ranks) / 24)
        assert (reciprocal.name, reciprocal.values) == ("mrr", pytest.approx(tuple(1 / rank for rank in ranks)))
        found = judge(bert, rows, prompt, "accuracy", train_rows=9)
        bare = row_scores(bert, forward_of(bert), rows, None, LIMIT - 3)[0].value
        assert (found.prompt, found.bare_base, found.rival) == (first.value, bare, "bare base")
        assert criterion(bert, rows, "accuracy")(prompt) == first.value

    def test_a_copy_of_the_positive_elsewhere_is_no_rival(self, bert):
        rows = rows_of(bert, "embed", 6)
        twice = dataclasses.replace(rows, records=rows.records[:3] * 2)
        first, _ = row_scores(bert, forward_of(bert), twice, None, LIMIT)
        alone, _ = row_scores(bert, forward_of(bert), rows.select(range(3)), None, LIMIT)
        assert first.values == alone.values * 2
