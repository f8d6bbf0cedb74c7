"""The judgement at the end of a training: the prompt beside the bare base on the validation rows, in the same form.

Labels are compared by their likelihood, other answers as greedy decoding gives them, by the score that chose the
checkpoint. The bare base has no head: classify and tag are compared with the commonest label, answers with the whole
context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np

from softprompt.base import Base
from softprompt.config import Criterion, TextScore
from softprompt.data import Rows
from softprompt.evaluation.calibrate import calibrate
from softprompt.evaluation.classification import (
    class_scores,
    confusion_matrix,
    label_scores,
    labelled_rows,
    macro_f1,
    predicted_labels,
)
from softprompt.evaluation.heads import (
    WITH_LABELS,
    constant_scores,
    label_logits,
    labelled_examples,
    ratio_interval,
    row_scores,
)
from softprompt.evaluation.heldout import CONFIDENCE, NUM_RESAMPLES, bootstrap_interval, max_text_tokens
from softprompt.evaluation.scores import greedy_answers, questions_of, text_scores
from softprompt.families import forward_of
from softprompt.prompt import Judgement, SoftPrompt
from softprompt.prompt.judgement import Rival
from softprompt.types import Task

MOST_ROWS = 400  # of labels; compare reads all of them
MOST_LABEL_SCORES = 4_000  # rows times labels: each label of a row is read
LEAST_ROWS = 20
MOST_ANSWERS = 200


def judge(base: Base, rows: Rows, prompt: SoftPrompt, best_by: Criterion, *, train_rows: int) -> Judgement | None:
    """How the prompt and the bare base do on the first rows; None where they have neither labels nor a task score.

    `rows` have the prompt's form. Raises DataError for a row whose completion is none of the labels.
    """
    labels, task = rows.form.labels, rows.form.task
    if task not in ("generate", *WITH_LABELS):
        return _by_rows(base, rows.select(range(min(len(rows), MOST_ROWS))), prompt, best_by, train_rows)
    if labels:
        count = min(len(rows), MOST_ROWS, max(LEAST_ROWS, MOST_LABEL_SCORES // len(labels)))
        found = _head_labels if task in WITH_LABELS else _likely_labels
        return _by_labels(found(base, rows.select(range(count)), prompt), best_by, train_rows)
    if best_by in ("loss", "accuracy", "f1_macro"):
        return None
    return _by_answers(base, rows, prompt, cast(TextScore, best_by), train_rows)


class _Found(NamedTuple):
    """The labels of some rows: the true ones, and what prompt and rival say."""

    labels: Sequence[str]
    own: Sequence[int]
    scores_NK: np.ndarray  # the prompt's
    rival: Sequence[int]
    rival_name: Rival = "bare base"

    @property
    def ours(self) -> list[int]:
        return [int(best) for best in self.scores_NK.argmax(axis=1)]


def _likely_labels(base: Base, rows: Rows, prompt: SoftPrompt) -> _Found:
    known, forward = labelled_rows(rows), forward_of(base)
    (scores_NK,) = label_scores(base, forward, known.texts, known.labels, [prompt])
    return _Found(known.labels, known.own, scores_NK, predicted_labels(base, forward, known, None))


def _head_labels(base: Base, rows: Rows, prompt: SoftPrompt) -> _Found:
    """Beside the bare base's label words at the mask; of a head, beside the commonest label."""
    forward, form = forward_of(base), rows.form
    known = labelled_examples(base, rows, max_text_tokens(base, prompt))
    scores_NK = label_logits(base, forward, known.examples, form, prompt)
    if form.task == "cloze":
        bare_NK = label_logits(base, forward, known.examples, form, None)
        return _Found(form.labels, known.own, scores_NK, [int(best) for best in bare_NK.argmax(axis=1)])
    commonest = max(range(len(form.labels)), key=known.own.count)
    return _Found(form.labels, known.own, scores_NK, [commonest] * len(known.own), "commonest label")


def _by_labels(found: _Found, best_by: Criterion, train_rows: int) -> Judgement:
    own, count, ours = found.own, len(found.own), found.ours
    majority = max(own.count(label) for label in set(own)) / count
    is_constant = len(set(ours)) == 1 and majority < 1.0
    right, base_right = ([a == b for a, b in zip(guess, own, strict=True)] for guess in (ours, found.rival))
    better = sum(a and not b for a, b in zip(right, base_right, strict=True))
    worse = sum(b and not a for a, b in zip(right, base_right, strict=True))
    shares = (sum(right) / count, sum(base_right) / count)
    difference = None
    if best_by == "f1_macro":
        scores = _f1_of(found.labels, own)
        everything = np.arange(count)
        shares = (scores(ours, everything), scores(found.rival, everything))
        difference = _f1_difference(scores, ours, found.rival)
    return Judgement(
        measure="f1_macro" if best_by == "f1_macro" else "accuracy", rows=count, train_rows=train_rows,
        prompt=shares[0], bare_base=shares[1], better_rows=better, worse_rows=worse, difference=difference,
        majority=None if best_by == "f1_macro" else majority, is_constant=is_constant,
        calibration=calibrate(found.scores_NK, own), rival=found.rival_name,
    )  # fmt: skip


_MEASURES: Mapping[Task, str] = {"tag": "entity_f1", "answer": "f1", "embed": "accuracy_at_1"}
_RIVALS: Mapping[Task, Rival] = {"tag": "commonest label", "answer": "whole context"}


def _by_rows(base: Base, rows: Rows, prompt: SoftPrompt, best_by: Criterion, train_rows: int) -> Judgement:
    """Tags, answers and embeddings: the score of each row."""
    forward, task, max_length = forward_of(base), rows.form.task, max_text_tokens(base, prompt)
    measure = "exact_match" if best_by == "exact_match" else _MEASURES[task]
    ours = row_scores(base, forward, rows, prompt, max_length)
    if task in _RIVALS:
        theirs = constant_scores(base, rows, max_length)[1]
    else:
        theirs = row_scores(base, forward, rows, None, max_length)
    own, bare = ((next(each for each in scores if each.name == measure)) for scores in (ours, theirs))
    gaps = [a - b for a, b in zip(own.values, bare.values, strict=True)]
    is_right_or_wrong = measure in ("exact_match", "accuracy_at_1")
    interval = None if is_right_or_wrong else ratio_interval(own, bare)
    return Judgement(
        measure=measure, rows=len(gaps), train_rows=train_rows, prompt=own.value, bare_base=bare.value,
        better_rows=sum(gap > 0 for gap in gaps), worse_rows=sum(gap < 0 for gap in gaps),
        difference=None if interval is None else (interval.low, interval.high), has_template=False,
        rival=_RIVALS.get(task, "bare base"),
    )  # fmt: skip


MacroF1 = Callable[[Sequence[int], np.ndarray], float]  # of predicted labels, on the rows of these numbers


def _f1_of(labels: Sequence[str], own: Sequence[int]) -> MacroF1:
    def score(found: Sequence[int], chosen: np.ndarray) -> float:
        confusion = confusion_matrix([own[i] for i in chosen], [found[i] for i in chosen], len(labels))
        return macro_f1(class_scores(labels, confusion), confusion)

    return score


def _f1_difference(score: MacroF1, ours: Sequence[int], bare: Sequence[int]) -> tuple[float, float]:
    """Percentile bootstrap over rows of the difference in macro F1, as `compare` does for a mean."""
    generator = np.random.default_rng(0)
    draws = generator.integers(0, len(ours), (NUM_RESAMPLES, len(ours)))
    gaps = [score(ours, chosen) - score(bare, chosen) for chosen in draws]
    low, high = np.quantile(gaps, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _by_answers(base: Base, rows: Rows, prompt: SoftPrompt, score: TextScore, train_rows: int) -> Judgement | None:
    questions, forward = questions_of(base, rows, MOST_ANSWERS).items, forward_of(base)
    if not questions:
        return None
    references = [question.reference for question in questions]
    ours, bare = (
        text_scores(score, greedy_answers(base, forward, questions, each), references) for each in (prompt, None)
    )
    gaps = [a - b for a, b in zip(ours, bare, strict=True)]
    interval = None if score == "exact_match" else bootstrap_interval(gaps, [1] * len(gaps), 0)
    return Judgement(
        measure=score, rows=len(gaps), train_rows=train_rows, prompt=sum(ours) / len(gaps),
        bare_base=sum(bare) / len(gaps), better_rows=sum(gap > 0 for gap in gaps),
        worse_rows=sum(gap < 0 for gap in gaps),
        difference=None if interval is None else (interval.low, interval.high),
        has_template=rows.form.kind == "template",
    )  # fmt: skip
