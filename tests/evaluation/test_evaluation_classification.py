"""Accuracy: by likelihood as by brute force, calibrated as in the paper, generated as by a plain greedy loop, the
interval Wilson's.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import f1_score
from support.slow_truth import plain_greedy, plain_nats
from support.tiny_bases import LIMIT, random_ids, random_prompt

from softprompt.data import rows_from_records
from softprompt.data.rows import with_labels
from softprompt.errors import DataError
from softprompt.evaluation import accuracy, accuracy_by_likelihood, likeliest_labels
from softprompt.evaluation.classification import label_of_answer, wilson_interval
from softprompt.families import forward_of
from softprompt.prompt import SoftPrompt

LABELS = (" w56", " w91", " w91 w88")  # one begins like another; tiny_llama is of two minds about them


def labelled(count, texts=None):
    records = [
        {"text": " ".join(f"w{token}" for token in random_ids(2 + i % 7, i)), "label": LABELS[i % 3].strip()}
        for i in range(count)
    ]
    rows = rows_from_records(texts or records, template="w5 {text} w6", completion=" {label}")
    return with_labels(rows)


@pytest.fixture(params=[None, 0], ids=["bare", "prompted"])
def prompt(request, tiny_llama):
    return None if request.param is None else SoftPrompt(random_prompt(tiny_llama, 4, request.param))


def brute_force(base, rows, prompt):
    """For each row the label whose tokens sum to the least nats, one plain forward per row and label."""
    chosen = []
    for record in rows.records:
        before = base.bos_ids + base.encode(f"w5 {record['text']} w6")
        nats = []
        for label in LABELS:
            own = base.encode(label)
            targets = (False,) * len(before) + (True,) * len(own)
            nats.append(float(plain_nats(base, before + own, targets, None if prompt is None else prompt.tensor).sum()))
        chosen.append(nats.index(min(nats)))
    return chosen


def test_accuracy_by_likelihood_is_that_of_a_brute_force_loop(tiny_llama, prompt):
    rows = labelled(18)
    assert rows.form.labels == LABELS
    truth = brute_force(tiny_llama, rows, prompt)
    texts = [f"w5 {record['text']} w6" for record in rows.records]
    assert likeliest_labels(tiny_llama, forward_of(tiny_llama), texts, LABELS, prompt) == truth
    hits = [choice == i % 3 for i, choice in enumerate(truth)]
    found = accuracy(tiny_llama, forward_of(tiny_llama), "set", rows, "p", prompt)
    assert (
        found.by_likelihood
        == sum(hits) / 18
        == accuracy_by_likelihood(tiny_llama, forward_of(tiny_llama), rows, prompt)
    )
    assert found.wrong_rows == tuple(i for i, hit in enumerate(hits) if not hit)
    assert len(set(truth)) > 1


def test_the_generated_label_is_that_of_the_greedy_answer(tiny_llama, prompt):
    rows = labelled(18)
    said = []
    for record in rows.records:
        before = tiny_llama.bos_ids + tiny_llama.encode(f"w5 {record['text']} w6")
        ids, _, _ = plain_greedy(tiny_llama, before, None if prompt is None else prompt.tensor, 3)
        text = tiny_llama.decode(tuple(ids)).strip()
        said.append(next((i for i in (2, 0, 1) if text.startswith(LABELS[i].strip())), None))
    truth = sum(label == i % 3 for i, label in enumerate(said)) / 18
    assert accuracy(tiny_llama, forward_of(tiny_llama), "set", rows, "p", prompt).generated == truth


def test_the_interval_is_wilsons(tiny_llama):
    found = accuracy(tiny_llama, forward_of(tiny_llama), "set", labelled(18), None, None)
    share, n, z = found.by_likelihood, 18, 1.959963984540054
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    assert (found.interval.low, found.interval.high) == pytest.approx((middle - half, middle + half))


@pytest.mark.parametrize(("right", "rows"), [(0, 1), (1, 1), (0, 20), (20, 20), (1, 20), (37, 100), (99_999, 100_000)])
def test_the_interval_is_scipys(right, rows):
    truth = binomtest(right, rows).proportion_ci(0.95, method="wilson")
    found = wilson_interval(right, rows)
    assert (found.low, found.high) == pytest.approx((truth.low, truth.high), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("text", "label"),
    [(" w91", 1), ("w91 w88 w9", 2), (" w56\n", 0), ("", None), ("w9", None), ("w9 w91", None)],
)
def test_an_answer_has_the_longest_label_that_it_begins_with(text, label):
    assert label_of_answer(text, LABELS) == label


def test_empty_rows_are_left_out_and_an_unknown_label_is_named(tiny_llama):
    records = [{"text": "w7", "label": name} for name in ("w80", "w90", "w80", "w90", "")]
    found = accuracy(tiny_llama, forward_of(tiny_llama), "set", labelled(0, records), None, None)
    assert found.num_rows == 4
    rows = labelled(0, records[:4])
    strange = rows_from_records([{"text": "w7", "label": "w3"}], template="w5 {text} w6", completion=" {label}")
    strange = type(rows)(**{**vars(strange), "form": rows.form})
    with pytest.raises(DataError, match="row 1 of records: ' w3' is none of the labels ' w80', ' w90'"):
        accuracy(tiny_llama, forward_of(tiny_llama), "set", strange, None, None)


def test_a_text_longer_than_the_base_loses_its_start(tiny_llama):
    """Once it was handed to the base whole, beyond its positions."""
    ending = " ".join(f"w{token}" for token in random_ids(LIMIT, 3))
    records = [{"text": f"{'w9 ' * times}{ending}", "label": f"w{80 + 10 * (times % 2)}"} for times in range(4)]
    rows = labelled(0, records)
    prompt = SoftPrompt(random_prompt(tiny_llama, 4))
    found = accuracy(tiny_llama, forward_of(tiny_llama), "set", rows, "p", prompt)
    assert found.by_likelihood == 0.5  # the four end alike, so they are all taken for the same


def test_classes_and_confusion_are_of_the_likeliest_labels(tiny_llama, prompt):
    rows = labelled(18)
    truth = brute_force(tiny_llama, rows, prompt)
    found = accuracy(tiny_llama, forward_of(tiny_llama), "set", rows, "p", prompt)
    assert tuple(item.label for item in found.classes) == LABELS
    for true, row in enumerate(found.confusion):
        assert row == tuple(sum(truth[i] == guess for i in range(18) if i % 3 == true) for guess in range(3))
    assert sum(found.confusion[i][i] for i in range(3)) / 18 == found.by_likelihood
    assert found.f1_macro == pytest.approx(f1_score([i % 3 for i in range(18)], truth, average="macro"))
    assert not found.calibrated


class TestCalibration:
    """Against the arithmetic of the paper, on likelihoods by one plain forward per row and label."""

    def likelihood(self, base, text, label, prompt):
        before, own = base.bos_ids + base.encode(text), base.encode(label)
        targets = (False,) * len(before) + (True,) * len(own)
        return math.exp(
            -float(plain_nats(base, before + own, targets, None if prompt is None else prompt.tensor).sum())
        )

    def shares(self, base, text, prompt):
        found = [self.likelihood(base, text, label, prompt) for label in LABELS]
        return [one / sum(found) for one in found]

    def slow_choice(self, base, text, content_free, prompt):
        free = [self.shares(base, other, prompt) for other in content_free]
        means = [sum(column) / len(free) for column in zip(*free, strict=True)]
        weighed = [share / mean for share, mean in zip(self.shares(base, text, prompt), means, strict=True)]
        return weighed.index(max(weighed))

    def test_calibration_is_the_papers_arithmetic_and_changes_predictions(self, tiny_llama, prompt):
        rows = labelled(18)
        texts = [f"w5 {record['text']} w6" for record in rows.records]
        free = ("w5 N/A w6", "w5  w6")
        truth = [self.slow_choice(tiny_llama, text, free, prompt) for text in texts]
        forward = forward_of(tiny_llama)
        assert likeliest_labels(tiny_llama, forward, texts, LABELS, prompt, content_free=free) == truth
        found = accuracy(tiny_llama, forward, "set", rows, "p", prompt, calibrate=True)
        assert found.calibrated
        assert found.wrong_rows == tuple(i for i, guess in enumerate(truth) if guess != i % 3)
        plain = accuracy(tiny_llama, forward, "set", rows, "p", prompt)
        assert (found.confusion, found.generated) != (plain.confusion, plain.generated)
        assert found.generated == plain.generated

    def test_calibration_uses_both_content_free_inputs_under_the_prompt(self, tiny_llama):
        """Controls: the first input alone, and another prompt's likelihoods, choose otherwise somewhere."""
        prompt, forward = SoftPrompt(random_prompt(tiny_llama, 4, 0)), forward_of(tiny_llama)
        texts = [f"w5 w{token} w6" for token in range(5, 90)]
        free = ("w5 w7 w6", "w5  w6")
        both = likeliest_labels(tiny_llama, forward, texts, LABELS, prompt, content_free=free)
        assert both != likeliest_labels(tiny_llama, forward, texts, LABELS, prompt, content_free=free[:1])
        other = SoftPrompt(random_prompt(tiny_llama, 4, 1))
        assert both != likeliest_labels(tiny_llama, forward, texts, LABELS, other, content_free=free)

    def test_calibration_removes_the_lead_of_a_label_that_leads_for_every_text(self, tiny_llama):
        """Every text equals the content-free one but for its likelihoods' ratio: the leader flips."""
        forward = forward_of(tiny_llama)
        texts = [f"w5 w{token} w6" for token in range(5, 90)]
        plain = likeliest_labels(tiny_llama, forward, texts, LABELS, None)
        leader = max(set(plain), key=plain.count)
        first = next(i for i, label in enumerate(plain) if label == leader)
        others = [text for i, text in enumerate(texts) if plain[i] == leader and i != first]
        flipped = likeliest_labels(tiny_llama, forward, others, LABELS, None, content_free=texts[first : first + 1])
        assert set(flipped) - {leader}

    def test_calibration_of_a_very_unlikely_label_stays_finite(self, tiny_llama):
        long = "".join(f" w{token}" for token in random_ids(70, 1))
        forward = forward_of(tiny_llama)
        with np.errstate(all="raise"):
            likeliest_labels(tiny_llama, forward, ["w5"], (" w56", long), None, content_free=("w6",))

    def test_calibration_without_bos_leaves_out_the_empty_context(self, tiny_gpt2):
        """tiny_gpt2 has no BOS: the empty input leaves the bare base nothing to predict from."""
        records = [{"text": f"w{7 + i}", "label": f"w{90 + i % 2}"} for i in range(6)]
        rows = with_labels(rows_from_records(records, template="{text}", completion=" {label}"))
        forward, prompt = forward_of(tiny_gpt2), SoftPrompt(random_prompt(tiny_gpt2, 4))
        texts = [record["text"] for record in records]
        for contender in (None, prompt):
            found = accuracy(tiny_gpt2, forward, "set", rows, "p", contender, calibrate=True)
            truth = likeliest_labels(tiny_gpt2, forward, texts, (" w90", " w91"), contender, content_free=("N/A",))
            assert found.wrong_rows == tuple(i for i, guess in enumerate(truth) if guess != i % 2)
