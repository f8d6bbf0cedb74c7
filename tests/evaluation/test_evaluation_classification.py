"""Accuracy: by likelihood as by brute force, generated as by a plain greedy loop, the interval Wilson's."""

from __future__ import annotations

import math

import pytest
from slow_truth import plain_greedy, plain_nats
from tiny_bases import LIMIT, random_ids, random_prompt

from softprompt.data import rows_from_records
from softprompt.data.labels import with_labels
from softprompt.errors import DataError
from softprompt.evaluation import accuracy, accuracy_by_likelihood, likeliest_labels
from softprompt.evaluation.classification import _named_label
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


def test_by_likelihood_is_brute_force(tiny_llama, prompt):
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


def test_generated_is_the_greedy_answers_label(tiny_llama, prompt):
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


@pytest.mark.parametrize(
    ("text", "label"),
    [(" w91", 1), ("w91 w88 w9", 2), (" w56\n", 0), ("", None), ("w9", None), ("w9 w91", None)],
)
def test_the_longest_label_that_an_answer_begins_with(text, label):
    assert _named_label(text, LABELS) == label


def test_empty_rows_are_left_out_and_a_stranger_is_named(tiny_llama):
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
