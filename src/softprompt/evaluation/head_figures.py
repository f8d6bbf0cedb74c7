"""The held-out figures of prompts with heads or label words, for a comparison: losses, accuracies, scores, baselines.

Accuracies are by the labels' logits. The bare base is a contender where it needs no head: the words at a cloze's mask,
and vectors. Beside it, or in its place, stands what needs no model at all: the commonest label, the whole context.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from softprompt.base import Base
from softprompt.data import Rows
from softprompt.data.rows import form_columns
from softprompt.errors import DataError
from softprompt.evaluation.baselines import Baselines
from softprompt.evaluation.calibrate import probabilities
from softprompt.evaluation.classification import Accuracy, accuracy_from_found
from softprompt.evaluation.heads import (
    WITH_LABELS,
    LabelledExamples,
    RowScores,
    constant_scores,
    label_logits,
    labelled_examples,
    ratio_interval,
    row_scores,
    rows_for,
)
from softprompt.evaluation.heldout import HeldOutLoss, held_out_loss
from softprompt.evaluation.scores import TaskScore
from softprompt.families import Forward
from softprompt.loss import RowScore
from softprompt.prompt import SoftPrompt
from softprompt.types import InputForm


@dataclass
class HeadFigures:
    """What the fields of a `Comparison` of these names have."""

    losses: list[HeldOutLoss] = field(default_factory=list)
    accuracies: list[Accuracy] = field(default_factory=list)
    scores: list[TaskScore] = field(default_factory=list)
    baselines: dict[str, Baselines] = field(default_factory=dict)


def head_figures(
    base: Base,
    forward: Forward,
    prompts: Mapping[str, SoftPrompt],
    sets: Mapping[str, Rows],
    max_length: int,
    seed: int = 0,
) -> HeadFigures:
    """Each prompt on each set, in its own form; `max_length` (virtual tokens not counted) is one for all.

    Raises DataError for a set that lacks what a prompt reads, or whose labels are none of a prompt's.
    """
    found = HeadFigures()
    for name, rows in sets.items():
        for prompt in prompts.values():
            _check_columns(name, rows, prompt)
        labelled = {own: prompt for own, prompt in prompts.items() if prompt.record.form.task in WITH_LABELS}
        _add_labels(found, base, forward, labelled, name, rows, max_length, seed)
        rest = {own: prompt for own, prompt in prompts.items() if own not in labelled}
        found.scores += _row_scores(base, forward, rest, name, rows, max_length, seed)
    return found


def _check_columns(name: str, rows: Rows, prompt: SoftPrompt) -> None:
    known = {column for record in rows.records[:1] for column in record}
    inputs, completions = form_columns(prompt.record.form)
    lacking = [column for column in (*inputs, completions[0]) if column not in known]
    if lacking:
        raise DataError(
            f"a prompt for task {prompt.record.form.task} reads column {lacking[0]!r}, and {name} is read without it; "
            "compare prompts that read the same columns, or give --data in its form"
        )


def _add_labels(
    found: HeadFigures, base: Base, forward: Forward, prompts: Mapping[str, SoftPrompt], name: str, rows: Rows,
    max_length: int, seed: int,
) -> None:  # fmt: skip
    bare: list[RowScore] | None = None
    for own, form, prompt in _with_bare(prompts):
        known = labelled_examples(base, rows_for(rows, form), max_length)
        logits_NK = label_logits(base, forward, known.examples, form, prompt)
        nats = [RowScore(each, 1, 0.0, 0) for each in _nats(logits_NK, known.own)]
        bare = nats if prompt is None else bare
        beside = bare if prompt is not None and form.task == "cloze" else None  # a head's loss is of another kind
        found.losses.append(held_out_loss(name, own, known.indices, nats, beside, seed, is_of_labels=True))
        guesses = [int(best) for best in logits_NK.argmax(axis=1)]
        found.accuracies.append(accuracy_from_found(name, own, form.labels, known.own, known.indices, guesses))
        if name not in found.baselines:
            share = found.accuracies[-1].by_likelihood if prompt is None else None
            found.baselines[name] = _baselines(name, form.labels, known, share)


def _with_bare(prompts: Mapping[str, SoftPrompt]) -> Iterator[tuple[str | None, InputForm, SoftPrompt | None]]:
    """Names, forms and prompts; the bare base first, in the form of the first cloze, if there is one."""
    clozes = [prompt.record.form for prompt in prompts.values() if prompt.record.form.task == "cloze"]
    if clozes:
        yield None, clozes[0], None
    yield from ((name, prompt.record.form, prompt) for name, prompt in prompts.items())


def _nats(logits_NK: np.ndarray, own: Sequence[int]) -> list[float]:
    shares_N = probabilities(logits_NK)[np.arange(len(own)), list(own)]
    nats: list[float] = (-np.log(np.maximum(shares_N, np.finfo(float).tiny))).tolist()
    return nats


def _baselines(name: str, labels: Sequence[str], known: LabelledExamples, template: float | None) -> Baselines:
    counts = [known.own.count(number) for number in range(len(labels))]
    majority = counts.index(max(counts))
    return Baselines(
        held_out=name, majority_label=labels[majority], majority=counts[majority] / len(known.own), template=template,
        num_templates=int(template is not None),
    )  # fmt: skip


def _row_scores(
    base: Base, forward: Forward, prompts: Mapping[str, SoftPrompt], name: str, rows: Rows, max_length: int, seed: int
) -> Iterator[TaskScore]:
    """Tag, answer and embed: by task and score, what needs no head or no model first, then the prompts."""
    by_task: dict[str, dict[str, SoftPrompt]] = {}
    for own, prompt in prompts.items():
        by_task.setdefault(prompt.record.form.task, {})[own] = prompt
    for rivals in by_task.values():
        form = next(iter(rivals.values())).record.form
        first: tuple[str | None, list[RowScores]]
        if form.task == "embed":
            first = None, row_scores(base, forward, rows_for(rows, form), None, max_length)
        else:
            first = constant_scores(base, rows_for(rows, form), max_length)
        contenders = [first]
        for own, prompt in rivals.items():
            contenders.append((own, row_scores(base, forward, rows_for(rows, prompt.record.form), prompt, max_length)))
        for number, baseline in enumerate(first[1]):
            yield from (_task_score(name, own, scores[number], baseline, seed) for own, scores in contenders)


def _task_score(name: str, own: str | None, scores: RowScores, baseline: RowScores, seed: int) -> TaskScore:
    is_baseline = scores is baseline
    is_paired = not is_baseline and scores.indices == baseline.indices
    pairs = list(zip(scores.indices, scores.values, baseline.values, strict=True)) if is_paired else []
    return TaskScore(
        held_out=name, prompt=own, name=scores.name, value=scores.value, num_rows=len(scores.values),
        num_available=len(scores.values), difference=scores.value - baseline.value if is_paired else None,
        interval=ratio_interval(scores, baseline, seed) if is_paired else None,
        better_rows=tuple(row for row, ours, theirs in pairs if ours > theirs),
        worse_rows=tuple(row for row, ours, theirs in pairs if ours < theirs),
        is_baseline=is_baseline,
    )  # fmt: skip
