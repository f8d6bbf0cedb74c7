"""Answers to rows: those of compare, in the order of the rows, whatever stands beside them in a chunk."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from support import tiny_bases
from support.seq2seq_bases import build_seq2seq
from support.slow_truth import plain_logits
from support.tiny_bases import LIMIT, random_ids, random_prompt

from softprompt import PredictConfig, SamplingConfig, generate, predict
from softprompt.data import rows_from_records
from softprompt.data.rows import with_labels
from softprompt.errors import ConfigError, DataError
from softprompt.evaluation import compare
from softprompt.evaluation.classification import label_scores
from softprompt.families import forward_of
from softprompt.prompt import Calibration, Judgement, SoftPrompt
from softprompt.types import InputForm, PromptRecord

LABELS = (" w56", " w91")
FORM = InputForm(kind="template", template="w5 {text} w6", completion=" {label}", labels=LABELS)


def text_of(seed, length=None):
    return " ".join(f"w{token}" for token in random_ids(length or 2 + seed % 7, seed))


def soft(base, seed=3, form=FORM, **run):
    return SoftPrompt(random_prompt(base, 4, seed), PromptRecord(form=form, run=run))


def calibrated(base, right, wrong, temperature=2.0):
    calibration = Calibration(temperature=temperature, right=tuple(right), wrong=tuple(wrong))
    judgement = Judgement(
        measure="accuracy", rows=20, train_rows=100, prompt=0.8, bare_base=0.5, better_rows=6, worse_rows=0,
        calibration=calibration,
    )  # fmt: skip
    return soft(base, held_out=judgement.to_json())


def slow_scores(base, prompt, text):
    """Each label's log-likelihood, by plain transformers: one row, no padding, no cache."""
    found = []
    for label in LABELS:
        ids = base.bos_ids + base.encode(f"w5 {text} w6{label}")
        log_probs = plain_logits(base, ids, prompt.tensor).double().log_softmax(-1)
        found.append(float(log_probs[-2, ids[-1]]))
    return np.array(found)


@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.medium) for f in ("gemma2", "mpt"))])
def test_labels_that_share_all_but_their_last_token_are_read_at_once_with_the_same_likelihoods(family):
    """The slow truth: one row for each label."""
    base = tiny_bases.build_base(family)
    labels = (" w56", " w91", " w40 w41", " w40 w42", " w40 w41 w43", " w9 w56")
    prompts = [SoftPrompt(random_prompt(base, 3, seed)) for seed in range(2)]
    texts = [text_of(i, 3 + i * 9) for i in range(0, 10, 2)]  # the longest are cut
    (bare, *found) = label_scores(base, forward_of(base), texts, labels, [None, *prompts], LIMIT - 20)
    for own, prompt in zip([bare, *found], [None, *prompts], strict=True):
        for text, row in zip(texts, own, strict=True):
            for label, score in zip(labels, row, strict=True):
                (((alone,),),) = label_scores(base, forward_of(base), [text], [label], [prompt], LIMIT - 20)
                assert score == pytest.approx(alone, abs=2e-5)


class TestLabels:
    def test_labels_are_those_that_compare_counts(self, tiny_llama):
        records = [{"text": text_of(i), "label": ("w56", "w91")[i % 3 > 0]} for i in range(30)]
        rows = with_labels(rows_from_records(records, template="w5 {text} w6", completion=" {label}"))
        prompt = soft(tiny_llama)
        _, ours = compare(tiny_llama, {"p": prompt}, held_out={"set": rows}).accuracies
        found = [item.label for item in predict(tiny_llama, prompt, [{"text": r["text"]} for r in records])]
        wrong = tuple(
            i for i, (label, record) in enumerate(zip(found, records, strict=True)) if label != record["label"]
        )
        assert wrong == ours.wrong_rows
        assert 0 < len(wrong) < 30

    def test_confidence_is_the_softmax_of_plain_transformers_log_likelihoods(self, tiny_llama):
        prompt = soft(tiny_llama)
        texts = [text_of(i) for i in range(12)]
        for text, item in zip(
            texts, predict(tiny_llama, prompt, texts, PredictConfig(probabilities=True)), strict=True
        ):
            scores = slow_scores(tiny_llama, prompt, text)
            shares = np.exp(scores) / np.exp(scores).sum()
            assert item.probabilities == pytest.approx(dict(zip(("w56", "w91"), shares, strict=True)), abs=2e-5)
            assert item.confidence == max(item.probabilities.values())
            assert (item.is_unsure, item.error, item.is_truncated) == (None, None, False)

    def test_the_wrong_prompt_has_other_confidences(self, tiny_llama):
        texts = [text_of(i) for i in range(6)]
        ours, theirs = ([x.confidence for x in predict(tiny_llama, soft(tiny_llama, s), texts)] for s in (3, 4))
        assert all(abs(a - b) > 1e-4 for a, b in zip(ours, theirs, strict=True))

    def test_a_row_is_answered_as_it_is_alone_and_in_its_place(self, tiny_llama):
        prompt, config = soft(tiny_llama), PredictConfig(batch_tokens=100)  # chunks of few rows
        texts = [text_of(i, 3 + (i * 7) % 30) for i in range(40)]
        together = list(predict(tiny_llama, prompt, texts, config))
        for text, item in list(zip(texts, together, strict=True))[::7]:
            (alone,) = predict(tiny_llama, prompt, [text], config)
            assert alone.label == item.label
            assert alone.confidence == pytest.approx(item.confidence, abs=2e-6)

    def test_rows_come_one_chunk_at_a_time(self, tiny_llama):
        given = 0

        def endless():
            nonlocal given
            while True:
                given += 1
                yield text_of(given)

        answers = predict(tiny_llama, soft(tiny_llama), endless(), PredictConfig(batch_tokens=100))
        assert next(answers).label is not None
        assert given < 100

    def test_a_label_is_written_as_its_column_had_it(self, tiny_llama):
        form = dataclasses.replace(FORM, completion=" w7 {label} w8", labels=(" w7 w56 w8", " w7 w91 w8"))
        (found,) = predict(tiny_llama, soft(tiny_llama, form=form), ["w9"])
        assert found.label in ("w56", "w91")

    def test_a_text_too_long_is_cut_at_its_start_as_in_training_and_marked(self, tiny_llama):
        long = text_of(1, LIMIT + 20)
        prompt = soft(tiny_llama)
        cut, whole = predict(tiny_llama, prompt, [long, " ".join(long.split()[-20:])])
        assert (cut.is_truncated, whole.is_truncated, cut.error) == (True, False, None)
        tail = " ".join(f"w5 {long} w6".split()[-(LIMIT - 4 - 1 - 1) :])
        plain = soft(tiny_llama, form=dataclasses.replace(FORM, template="{text}"))
        (same,) = predict(tiny_llama, plain, [tail])
        assert (cut.label, same.is_truncated) == (same.label, False)
        assert cut.confidence == pytest.approx(same.confidence, abs=2e-6)


class TestRowsWithoutAnAnswer:
    def test_an_error_stands_in_the_row_s_place(self, tiny_llama):
        rows = [
            {"text": "w7 w8"},
            {"text": "  "},
            {"text": None},
            {"text": ["w7"]},
            {"text": "\ud800"},
            {},
            {"text": 7},
        ]
        found = list(predict(tiny_llama, soft(tiny_llama), rows))
        errors = [item.error for item in found]
        assert errors[0] is None
        assert errors[6] is None  # a whole number is its digits
        assert errors[1] == errors[2] == errors[5] == "the row is empty"
        assert "row 4 of the data: column 'text' holds no text but a list" in errors[3]
        assert "half of a surrogate pair" in errors[4]
        assert all((item.label is None) == (item.error is not None) for item in found)

    def test_columns_that_the_prompt_does_not_read_are_ignored(self, tiny_llama):
        prompt = soft(tiny_llama)
        (plain,) = predict(tiny_llama, prompt, ["w7 w8"])
        (beside,) = predict(tiny_llama, prompt, [{"id": 3, "review": "w7 w8"}], text_column="review")
        assert plain == beside

    def test_a_missing_column_is_refused_with_the_columns_there_are(self, tiny_llama):
        with pytest.raises(DataError, match=r"asks for 'text'; .*'review'.*text_column"):
            list(predict(tiny_llama, soft(tiny_llama), [{"review": "w7"}]))
        with pytest.raises(DataError, match="rows is one row"):
            list(predict(tiny_llama, soft(tiny_llama), "w7 w8"))

    def test_nothing_is_no_answer(self, tiny_llama):
        assert list(predict(tiny_llama, soft(tiny_llama), [])) == []


class TestUnsure:
    def test_confidence_is_divided_by_the_record_s_temperature(self, tiny_llama):
        texts = [text_of(i) for i in range(8)]
        raw, cooled = (
            list(predict(tiny_llama, prompt, texts, PredictConfig(probabilities=True)))
            for prompt in (soft(tiny_llama), calibrated(tiny_llama, [0.9] * 10, [], temperature=2.0))
        )
        for before, after in zip(raw, cooled, strict=True):
            odds = before.probabilities["w56"] / before.probabilities["w91"]
            assert after.probabilities["w56"] / after.probabilities["w91"] == pytest.approx(odds**0.5, rel=1e-3)
            assert before.label == after.label

    def test_an_answer_below_the_threshold_is_unsure(self, tiny_llama):
        texts = [text_of(i) for i in range(20)]
        plain = [item.confidence for item in predict(tiny_llama, calibrated(tiny_llama, [0.9] * 10, []), texts)]
        middle = sorted(plain)[10]
        prompt = calibrated(tiny_llama, [middle] * 10, [middle - 1e-6] * 3)
        found = list(predict(tiny_llama, prompt, texts))
        assert [item.is_unsure for item in found] == [share < middle for share in plain]
        assert sum(item.is_unsure for item in found) == 10
        given = predict(tiny_llama, prompt, texts, PredictConfig(threshold=0.0))
        assert not any(item.is_unsure for item in given)

    def test_where_no_threshold_gives_the_accuracy_every_answer_is_unsure(self, tiny_llama):
        prompt = calibrated(tiny_llama, [0.6] * 10, [0.99] * 8)
        assert all(item.is_unsure for item in predict(tiny_llama, prompt, [text_of(i) for i in range(5)]))
        low = PredictConfig(target_accuracy=0.5)
        assert not all(item.is_unsure for item in predict(tiny_llama, prompt, [text_of(i) for i in range(5)], low))


class TestEncoderDecoders:
    @pytest.fixture(scope="class")
    def t5(self):
        return build_seq2seq("t5")

    def test_labels_are_those_of_compare_and_written_texts_those_of_generate(self, t5):
        records = [{"text": text_of(i), "label": ("w56", "w91")[i % 3 > 0]} for i in range(12)]
        rows = with_labels(rows_from_records(records, template="w5 {text} w6", completion="{label}"))
        prompt = soft(t5, form=rows.form)
        _, ours = compare(t5, {"p": prompt}, held_out={"set": rows}).accuracies
        found = [item.label for item in predict(t5, prompt, [record["text"] for record in records])]
        own = [record["label"] for record in records]
        assert [i for i, (a, b) in enumerate(zip(found, own, strict=True)) if a != b] == list(ours.wrong_rows)
        writer = soft(t5, form=InputForm())
        written = predict(t5, writer, ["w5 w6", "w7"], PredictConfig(max_new_tokens=6))
        answers = generate(t5, ["w5 w6", "w7"], writer, SamplingConfig(max_new_tokens=6))
        assert [item.answer for item in written] == [answer.text for answer in answers]
        (cut,) = predict(t5, prompt, [text_of(1, 2_100)])
        assert cut.is_truncated


class TestTexts:
    @pytest.mark.parametrize(
        ("form", "rows"),
        [
            (InputForm(), ["w5 w6", "w7"]),
            (InputForm(kind="template", template="w5 {a} {b}", completion=" {c}"), [{"a": "w1", "b": "w2"}] * 2),
        ],
    )
    def test_a_prompt_without_labels_writes_what_generate_writes(self, tiny_llama, form, rows):
        prompt = soft(tiny_llama, form=form)
        found = list(predict(tiny_llama, prompt, rows, PredictConfig(max_new_tokens=6)))
        answers = generate(tiny_llama, rows, prompt, SamplingConfig(max_new_tokens=6))
        assert [item.answer for item in found] == [answer.text for answer in answers]
        for item, answer in zip(found, answers, strict=True):
            end = [] if answer.end_log_prob is None else [answer.end_log_prob.log_prob]
            nats = [*answer.log_probs, *end]
            assert item.mean_log_probability == pytest.approx(sum(nats) / len(nats), abs=1e-5)
            assert (item.label, item.finish_reason) == (None, answer.finish_reason)

    def test_settings_about_labels_are_refused(self, tiny_llama):
        prompt = soft(tiny_llama, form=InputForm())
        with pytest.raises(ConfigError, match="probabilities is about labels"):
            list(predict(tiny_llama, prompt, ["w5"], PredictConfig(probabilities=True)))
