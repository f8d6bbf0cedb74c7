"""Confusion matrices and per-class scores: scikit-learn's and torchmetrics' own, and two cases worked by hand."""

from __future__ import annotations

import pytest
import torch
from sklearn import metrics
from support.tiny_bases import random_ids
from torchmetrics.functional import classification as torchmetrics

from softprompt.evaluation.classification import class_scores, confusion_matrix, macro_f1, share_right

LABELS = ("no", "yes", "maybe", "never")


def drawn(seed, count=40, num_labels=3):
    """True and predicted labels, right about half of the time; the fourth label never occurs."""
    truth = [token % num_labels for token in random_ids(count, seed)]
    other = [token % num_labels for token in random_ids(count, seed + 100)]
    return truth, [a if i % 2 else b for i, (a, b) in enumerate(zip(truth, other, strict=True))]


@pytest.mark.parametrize("seed", range(5))
def test_precision_recall_and_f1_are_those_of_scikit_learn(seed):
    truth, predicted = drawn(seed)
    confusion = confusion_matrix(truth, predicted, 4)
    assert [list(row) for row in confusion] == metrics.confusion_matrix(truth, predicted, labels=range(4)).tolist()
    task = {"num_classes": 4}
    tensors = torch.tensor(predicted), torch.tensor(truth)
    assert torchmetrics.multiclass_confusion_matrix(*tensors, **task).tolist() == [list(row) for row in confusion]
    theirs = metrics.precision_recall_fscore_support(truth, predicted, labels=range(4), zero_division=0)
    classes = class_scores(LABELS, confusion)
    for ours, *figures in zip(classes, *theirs, strict=True):
        assert (ours.precision, ours.recall, ours.f1, ours.support) == pytest.approx(figures)
    assert macro_f1(classes, confusion) == pytest.approx(metrics.f1_score(truth, predicted, average="macro"))
    assert macro_f1(classes, confusion) == pytest.approx(float(torchmetrics.multiclass_f1_score(*tensors, **task)))
    assert share_right(confusion) == metrics.accuracy_score(truth, predicted)


def test_figures_of_a_small_matrix_are_those_computed_by_hand():
    confusion = confusion_matrix([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 1], 3)
    assert confusion == ((2, 1, 0), (1, 1, 0), (0, 1, 0))  # rows true, columns predicted; not the other way round
    no, yes, maybe = class_scores(LABELS[:3], confusion)
    assert (no.precision, no.recall, no.f1, no.support) == (2 / 3, 2 / 3, 2 / 3, 3)
    assert (yes.precision, yes.recall, yes.f1, yes.support) == (1 / 3, 1 / 2, 2 / 5, 2)
    assert (maybe.precision, maybe.recall, maybe.f1, maybe.support) == (0.0, 0.0, 0.0, 1)
    assert macro_f1((no, yes, maybe), confusion) == pytest.approx((2 / 3 + 2 / 5) / 3)


def test_one_label_predicted_for_all_divides_by_no_row():
    confusion = confusion_matrix([0, 1, 2], [1, 1, 1], 4)
    classes = class_scores(LABELS, confusion)
    assert [item.precision for item in classes] == [0.0, 1 / 3, 0.0, 0.0]
    assert [item.f1 for item in classes] == [0.0, 0.5, 0.0, 0.0]
    assert macro_f1(classes, confusion) == pytest.approx(0.5 / 3)  # "never" neither occurs nor is predicted
    assert share_right(confusion) == 1 / 3
