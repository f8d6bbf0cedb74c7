"""A confusion matrix, and what follows from it for each class. Only counts: neither a model nor a text.

K labels. A precision, recall or F1 that divides by no row is 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

Confusion = tuple[tuple[int, ...], ...]  # [K][K] rows of data: by the true label, then by the predicted one


@dataclass(frozen=True)
class ClassScore:
    """How one label was recognised; shares from 0 to 1."""

    label: str
    precision: float  # of the rows taken for this label, those that have it
    recall: float  # of the rows that have it, those taken for it
    f1: float
    support: int  # rows that have it


def confusion_matrix(truth: Sequence[int], predicted: Sequence[int], num_labels: int) -> Confusion:
    """Counts of rows by true label, then by predicted label; labels are numbers below `num_labels`."""
    counts = Counter(zip(truth, predicted, strict=True))
    labels = range(num_labels)
    return tuple(tuple(counts[true, guess] for guess in labels) for true in labels)


def class_scores(labels: Sequence[str], confusion: Confusion) -> tuple[ClassScore, ...]:
    """One score per label, in order."""
    taken = [sum(column) for column in zip(*confusion, strict=True)]
    return tuple(
        _class_score(label, confusion[number][number], taken[number], sum(confusion[number]))
        for number, label in enumerate(labels)
    )


def share_right(confusion: Confusion) -> float:
    """Accuracy: the share of all rows on the diagonal."""
    return sum(row[number] for number, row in enumerate(confusion)) / sum(map(sum, confusion))


def macro_f1(classes: Sequence[ClassScore], confusion: Confusion) -> float:
    """Mean F1 over the labels that occur, as a true or a predicted one."""
    taken = [sum(column) for column in zip(*confusion, strict=True)]
    found = [item.f1 for item, times in zip(classes, taken, strict=True) if item.support or times]
    return sum(found) / len(found)


def _class_score(label: str, right: int, taken: int, support: int) -> ClassScore:
    return ClassScore(
        label=label,
        precision=right / taken if taken else 0.0,
        recall=right / support if support else 0.0,
        f1=2 * right / (taken + support) if taken + support else 0.0,
        support=support,
    )
