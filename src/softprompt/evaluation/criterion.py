"""What chooses the best checkpoint beside the loss: a task score of a soft prompt on held-out rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from softprompt.base import Base
from softprompt.config import Criterion, TextScore
from softprompt.data import Rows
from softprompt.data.labels import with_labels
from softprompt.errors import ConfigError
from softprompt.evaluation.classes import class_scores, macro_f1, share_right
from softprompt.evaluation.classification import label_confusion, labelled_rows
from softprompt.evaluation.questions import ask, greedy_answers
from softprompt.evaluation.text_scores import text_scores, torchmetrics_text
from softprompt.families import forward_of
from softprompt.prompt import SoftPrompt

CRITERIA: tuple[Criterion, ...] = get_args(Criterion)


def criterion(base: Base, rows: Rows, name: Criterion) -> Callable[[SoftPrompt], float]:
    """A score of a prompt on these rows, from 0 to 1, higher is better; the base is not changed.

    `accuracy` and `f1_macro` are by label likelihood; the others score greedy answers, all rows of them at every call.
    Raises ConfigError where the rows do not fit the score or the name is no score (`loss` is what training measures
    itself), DataError for a row whose completion is none of the labels, MissingDependencyError without torchmetrics.
    """
    if name in ("accuracy", "f1_macro"):
        return _by_labels(base, rows, name)
    for text_score in get_args(TextScore):
        if name == text_score:
            return _by_answers(base, rows, text_score)
    raise ConfigError(
        f"{name!r} is no task score; known are {', '.join(known for known in CRITERIA if known != 'loss')}"
    )


def _by_labels(base: Base, rows: Rows, name: Criterion) -> Callable[[SoftPrompt], float]:
    labelled = with_labels(rows)
    if not labelled.form.labels:
        raise ConfigError(
            f"{name!r} needs labelled rows, and {rows.source} has no closed set of completions; "
            "choose another score, or a template whose completion is the label"
        )
    known, forward = labelled_rows(labelled), forward_of(base)

    def score(prompt: SoftPrompt) -> float:
        confusion = label_confusion(base, forward, known, prompt)
        if name == "accuracy":
            return share_right(confusion)
        return macro_f1(class_scores(known.labels, confusion), confusion)

    return score


def _by_answers(base: Base, rows: Rows, name: TextScore) -> Callable[[SoftPrompt], float]:
    asked = ask(base, rows).asked
    if not asked:
        raise ConfigError(
            f"{name!r} compares answers with completions, and none of the {len(rows):,} rows of {rows.source} "
            "has one; choose another score, or rows with a completion or a chat"
        )
    forward = forward_of(base)
    torchmetrics_text()
    references = [question.reference for question in asked]

    def score(prompt: SoftPrompt) -> float:
        values = text_scores(name, greedy_answers(base, forward, asked, prompt), references)
        return sum(values) / len(values)

    return score
