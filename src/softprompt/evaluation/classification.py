"""Accuracy on labelled rows: by the likelihood of each label, and by what is generated.

The log-likelihood of a label is the sum over its tokens, EOS excluded, in the context that training gave it. A context
longer than the base allows loses its start, as in training.

Calibrated, it is divided by the label's likelihood where the template's fields have no content ("N/A" and ""):
contextual calibration, Zhao et al. 2021, "Calibrate Before Use", arXiv 2102.09690, where
probabilities among the labels are averaged over those inputs. Each contender is calibrated by its own likelihoods.

M prompts, N texts, K labels. A precision, recall or F1 whose denominator is 0 rows is 0.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from torch import Tensor

from softprompt.base import Base
from softprompt.config import SamplingConfig
from softprompt.data import Rows, fill_template, label_ids, render_rows, template_fields
from softprompt.data.tokens import source_ids
from softprompt.engine import Request, generate
from softprompt.errors import DataError, LengthError
from softprompt.evaluation.heldout import CONFIDENCE, Interval, contenders, max_text_tokens, truncate_start
from softprompt.families import Forward, forward_of
from softprompt.loss import alternative_nlls, target_nlls
from softprompt.loss.objective import SLOTS_PER_BATCH
from softprompt.prompt import SoftPrompt
from softprompt.splice import Row

CONTENT_FREE = ("N/A", "")  # fill the fields of a template for calibration


@dataclass(frozen=True)
class Accuracy:
    """One prompt (or, with `prompt` None, the bare base; or several that vote) on one labelled held-out set."""

    held_out: str
    prompt: str | None  # its name, or that of the set of prompts
    num_rows: int
    by_likelihood: float  # share of rows whose own label is the likeliest, of a head that with the highest logit
    interval: Interval  # of `by_likelihood` (Wilson), at 95 %
    generated: float | None  # share of rows whose greedy answer is the label; None for a vote and for a head
    wrong_rows: tuple[int, ...]  # source indices, by likelihood
    calibrated: bool  # whether the likelihoods were; `generated` never is
    f1_macro: float  # mean F1 over the labels that occur, by likelihood
    classes: tuple[ClassScore, ...]  # one per label, by likelihood
    confusion: Confusion  # rows of data by true label, then by likeliest label, both in the order of `classes`
    members: Mapping[str, float] = field(default_factory=dict)  # of a vote: each prompt's own `by_likelihood`


@dataclass(frozen=True)
class LabelledRows:
    """The rows of a set that have a label; empty ones are left out, as in a loss."""

    texts: tuple[str, ...]  # the text before the label
    own: tuple[int, ...]  # each row's true label, as an index of `labels`
    indices: tuple[int, ...]  # in the source
    labels: tuple[str, ...]
    content_free: tuple[str, ...]  # the template with content-free fields


def accuracies(
    base: Base,
    forward: Forward,
    prompts: Mapping[str, SoftPrompt],
    sets: Mapping[str, Rows],
    max_length: int,
    *,
    calibrate: bool = False,
) -> list[Accuracy]:
    """The bare base and each prompt on each set that has labels; sets without are left out.

    `max_length` (tokens, virtual ones not counted) is one for all, so that all read the same tokens. Raises as
    `accuracy` does.
    """
    labelled = {name: rows for name, rows in sets.items() if rows.form.labels}
    return [
        accuracy(base, forward, set_name, rows, name, prompt, max_length, calibrate=calibrate)
        for set_name, rows in labelled.items()
        for name, prompt in contenders(prompts)
    ]


def accuracy(
    base: Base,
    forward: Forward,
    set_name: str,
    rows: Rows,
    name: str | None,
    prompt: SoftPrompt | None,
    max_length: int | None = None,
    *,
    calibrate: bool = False,
) -> Accuracy:
    """One contender on one labelled set. Raises DataError for a row whose completion is none of the form's labels."""
    known = labelled_rows(rows)
    found = _likeliest(base, forward, known, prompt, max_length, calibrate)
    answered = _generated_labels(base, forward, known, prompt, max_text_tokens(base, prompt, max_length))
    generated = sum(a == b for a, b in zip(answered, known.own, strict=True)) / len(answered)
    return accuracy_from_labels(set_name, name, known, found, generated, calibrated=calibrate)


def accuracy_from_labels(
    set_name: str,
    name: str | None,
    known: LabelledRows,
    found: Sequence[int],
    generated: float | None,
    *,
    calibrated: bool,
    members: Mapping[str, float] | None = None,
) -> Accuracy:
    """The figures of a contender that predicts for each row the label whose index is in `found`."""
    return accuracy_from_found(
        set_name, name, known.labels, known.own, known.indices, found, generated, calibrated=calibrated, members=members
    )


def accuracy_from_found(
    set_name: str,
    name: str | None,
    labels: Sequence[str],
    truth: Sequence[int],
    indices: Sequence[int],
    found: Sequence[int],
    generated: float | None = None,
    *,
    calibrated: bool = False,
    members: Mapping[str, float] | None = None,
) -> Accuracy:
    """The same of rows whose true labels are `truth` and whose indices in the source are `indices`."""
    confusion = confusion_matrix(truth, found, len(labels))
    classes = class_scores(labels, confusion)
    wrong = [index for index, own, guess in zip(indices, truth, found, strict=True) if own != guess]
    num_rows = len(found)
    return Accuracy(
        held_out=set_name,
        prompt=name,
        num_rows=num_rows,
        by_likelihood=share_right(confusion),
        interval=wilson_interval(num_rows - len(wrong), num_rows),
        generated=generated,
        wrong_rows=tuple(wrong),
        calibrated=calibrated,
        f1_macro=macro_f1(classes, confusion),
        classes=classes,
        confusion=confusion,
        members=members or {},
    )


def accuracy_by_likelihood(base: Base, forward: Forward, rows: Rows, prompt: SoftPrompt | None) -> float:
    """Share of rows whose own label is the likeliest. Raises as `accuracy` does."""
    return share_right(label_confusion(base, forward, labelled_rows(rows), prompt))


def label_confusion(base: Base, forward: Forward, known: LabelledRows, prompt: SoftPrompt | None) -> Confusion:
    """Rows of data by their own label, then by the likeliest one, uncalibrated."""
    return confusion_matrix(known.own, predicted_labels(base, forward, known, prompt), len(known.labels))


def predicted_labels(base: Base, forward: Forward, known: LabelledRows, prompt: SoftPrompt | None) -> list[int]:
    """For each row, the number of its likeliest label, uncalibrated."""
    return _likeliest(base, forward, known, prompt, None, False)


def likeliest_labels(
    base: Base,
    forward: Forward,
    texts: Sequence[str],
    labels: Sequence[str],
    prompt: SoftPrompt | None,
    max_length: int | None = None,
    content_free: Sequence[str] = (),
) -> list[int]:
    """For each text, the number of the label with the highest summed log-likelihood after it.

    With `content_free` texts, calibrated by what the labels have after those.
    """
    (scores_NK,) = label_scores(base, forward, texts, labels, [prompt], max_length, content_free)
    return [int(number) for number in scores_NK.argmax(axis=1)]


class LabelAnswer(NamedTuple):
    """The likeliest label after one text."""

    label: str
    ids: tuple[int, ...]  # its tokens
    log_probs: tuple[float, ...]  # of each of them
    log_likelihoods: Mapping[str, float]  # of every label: the sum over its tokens


def label_answers(base: Base, texts: Sequence[str], labels: Sequence[str], prompt: SoftPrompt) -> list[LabelAnswer]:
    """One answer per text, as `accuracy` counts them. Raises LengthError where text and label do not fit the base."""
    rows = [row for text in texts for row in label_rows(base, text, labels, prompt)]
    losses = target_nlls(base, forward_of(base), rows, [prompt.tensor])
    each = len(labels)
    return [
        _label_answer(labels, rows[start : start + each], losses[start : start + each])
        for start in range(0, len(rows), each)
    ]


def label_rows(base: Base, text: str, labels: Sequence[str], prompt: SoftPrompt) -> list[Row]:
    """For each label the row whose targets are its tokens, behind one text under a prompt, of which it is row 0.

    Raises LengthError where they do not fit the base.
    """
    rows = [_label_row(base, text, label, 0, sys.maxsize, prompt) for label in labels]
    limit = max_text_tokens(base, prompt)
    longest = max(max(len(row.ids), len(row.source)) for row in rows)
    if longest > limit:
        raise LengthError(
            f"the input and its label are {longest} tokens, and beside {prompt.num_virtual_tokens} virtual ones there "
            f"are {limit} positions of base {base.name!r}; shorten the input"
        )
    return rows


def _label_answer(labels: Sequence[str], rows: Sequence[Row], losses: Sequence[Mapping[int, float]]) -> LabelAnswer:
    likelihoods = [-sum(loss.values()) for loss in losses]
    best = max(range(len(labels)), key=likelihoods.__getitem__)
    columns = sorted(losses[best])
    return LabelAnswer(
        label=labels[best],
        ids=tuple(rows[best].ids[column] for column in columns),
        log_probs=tuple(-losses[best][column] for column in columns),
        log_likelihoods=dict(zip(labels, likelihoods, strict=True)),
    )


def label_scores(
    base: Base,
    forward: Forward,
    texts: Sequence[str],
    labels: Sequence[str],
    prompts: Sequence[SoftPrompt | None],
    max_length: int | None = None,
    content_free: Sequence[str] = (),
    batch_tokens: int = SLOTS_PER_BATCH,
) -> np.ndarray:
    """[M, N, K]: under each prompt, each label's summed log-likelihood after each text; all in one pass.

    With `content_free` texts, minus those of the labels after these (see the module's docstring).
    """
    scores_MNK = _log_likelihoods(base, forward, texts, labels, prompts, max_length, batch_tokens)
    if content_free:
        scores_MNK -= _log_summed_shares(_log_likelihoods(base, forward, content_free, labels, prompts, max_length))
    return scores_MNK


def usable_content_free(base: Base, known: LabelledRows) -> list[str]:
    """The content-free texts that can precede a label.

    An empty text has no token to predict from, unless the tokenizer puts one around it.
    """
    return [text for text in known.content_free if base.can_encode(text) or (not text and source_ids(base, text))]


def labelled_rows(rows: Rows) -> LabelledRows:
    """The rows that have one of the form's labels. Raises DataError for another completion, and where none is left."""
    labels = rows.form.labels
    kept = [(position, row) for position, row in enumerate(render_rows(rows)) if not row.is_empty]
    for position, row in kept:
        if row.text not in labels:
            raise DataError(
                f"{rows.where(position)}: {row.text!r} is none of the labels {', '.join(map(repr, labels))}"
            )
    if not kept:
        raise DataError(f"{rows.source}: all {len(rows):,} rows are empty; there is nothing to classify")
    return LabelledRows(
        texts=tuple(row.prompt for _, row in kept),
        own=tuple(labels.index(row.text) for _, row in kept),
        indices=tuple(rows.indices[position] for position, _ in kept),
        labels=labels,
        content_free=_content_free(rows),
    )


def _content_free(rows: Rows) -> tuple[str, ...]:
    template = rows.form.template
    assert template is not None, rows.form
    names = template_fields(template)
    return tuple(fill_template(template, dict.fromkeys(names, filling)) for filling in CONTENT_FREE)


def _likeliest(
    base: Base,
    forward: Forward,
    known: LabelledRows,
    prompt: SoftPrompt | None,
    max_length: int | None,
    calibrate: bool,
) -> list[int]:
    content_free = usable_content_free(base, known) if calibrate else []
    return likeliest_labels(base, forward, known.texts, known.labels, prompt, max_length, content_free)


def _log_likelihoods(
    base: Base,
    forward: Forward,
    texts: Sequence[str],
    labels: Sequence[str],
    prompts: Sequence[SoftPrompt | None],
    max_length: int | None,
    batch_tokens: int = SLOTS_PER_BATCH,
) -> np.ndarray:
    """[M, N, K]: under each prompt, each label's summed log-likelihood after each text."""
    runs: list[_LabelRun] = []
    tensors: list[Tensor] = []
    scores_MNK = np.empty((len(prompts), len(texts), len(labels)))
    for number, prompt in enumerate(prompts):
        index = None if prompt is None else len(tensors)
        tensors += [] if prompt is None else [prompt.tensor]
        limit = max_text_tokens(base, prompt, max_length)
        for place, text in enumerate(texts):
            runs += [run._replace(at=(number, place)) for run in _label_runs(base, text, labels, index, limit, prompt)]
    rows, alternatives = [run.row for run in runs], [run.last_ids for run in runs]
    losses = alternative_nlls(base, forward, rows, alternatives, tensors, batch_tokens)
    for run, nats in zip(runs, losses, strict=True):
        scores_MNK[run.at][list(run.labels)] = [-each for each in nats]
    return scores_MNK


class _LabelRun(NamedTuple):
    """A text behind which several labels are read at once: they have the same tokens but for the last."""

    row: Row  # with the first of the labels
    labels: tuple[int, ...]  # their numbers
    last_ids: tuple[int, ...]
    at: tuple[int, int] = (0, 0)  # the numbers of prompt and text


def _label_runs(
    base: Base, text: str, labels: Sequence[str], index: int | None, limit: int, prompt: SoftPrompt | None
) -> list[_LabelRun]:
    ids = [label_ids(base, text, label) for label in labels]
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, own in enumerate(ids):
        groups.setdefault(own[:-1], []).append(number)
    return [
        _LabelRun(
            _label_row(base, text, labels[numbers[0]], index, limit, prompt),
            tuple(numbers),
            tuple(ids[number][-1] for number in numbers),
        )
        for numbers in groups.values()
    ]


def wilson_interval(num_right: int, num_rows: int) -> Interval:
    """Wilson's score interval of a share (1927), at 95 %."""
    z, share = NormalDist().inv_cdf((1 + CONFIDENCE) / 2), num_right / num_rows
    middle = share + z * z / (2 * num_rows)
    reach = z * math.sqrt(share * (1 - share) / num_rows + z * z / (4 * num_rows * num_rows))
    low, high = ((middle + side * reach) / (1 + z * z / num_rows) for side in (-1, 1))
    return Interval(0.0 if num_right == 0 else low, 1.0 if num_right == num_rows else high)


def _log_summed_shares(scores_MNK: np.ndarray) -> np.ndarray:
    """[M, 1, K]: the log of each label's probability among the labels, summed over the texts."""
    from scipy import special

    logs_M1K: np.ndarray = special.logsumexp(special.log_softmax(scores_MNK, axis=-1), axis=-2, keepdims=True)
    return logs_M1K


def _label_row(base: Base, text: str, label: str, index: int | None, limit: int, prompt: SoftPrompt | None) -> Row:
    """The row whose targets are the label's tokens, under the prompt of this index, which is `prompt`."""
    own = label_ids(base, text, label)
    before = context_ids(base, text, limit, len(own))
    if base.kind == "seq2seq":
        has_decoder_prompt = prompt is not None and prompt.num_decoder_tokens > 0
        return Row(own, index, (True,) * len(own), source=before, has_decoder_prompt=has_decoder_prompt)
    return Row(before + own, index, (False,) * len(before) + (True,) * len(own))


def context_ids(base: Base, text: str, limit: int, num_behind: int) -> tuple[int, ...]:
    """What stands before `num_behind` tokens within the limit; of an encoder-decoder they are not in the same text."""
    return truncate_start(base, source_ids(base, text), limit - (0 if base.kind == "seq2seq" else num_behind))


def _generated_labels(
    base: Base, forward: Forward, known: LabelledRows, prompt: SoftPrompt | None, limit: int
) -> list[int | None]:
    longest = 1 + max(len(label_ids(base, known.texts[0], label)) for label in known.labels)
    contexts = [context_ids(base, text, limit, longest) for text in known.texts]
    requests = [Request(ids, prompt) for ids in contexts]
    sampling = SamplingConfig(max_new_tokens=longest)
    answers = generate(base, requests, sampling, forward=forward)
    return [label_of_answer(answer.text, known.labels) for answer in answers]


def label_of_answer(text: str, labels: Sequence[str]) -> int | None:
    """The longest label that the answer begins with, spaces around it aside."""
    answer = text.strip()
    fits = [label for label in labels if answer.startswith(label.strip())]
    return labels.index(max(fits, key=len)) if fits else None


Confusion = tuple[tuple[int, ...], ...]  # [K][K] rows of data: by the true label, then by the predicted one


@dataclass(frozen=True)
class ClassScore:
    """How one label was recognised; shares from 0 to 1."""

    label: str
    precision: float  # of the rows with this prediction, those that have the label
    recall: float  # of the rows that have the label, those with this prediction
    f1: float
    support: int  # rows that have the label


def confusion_matrix(truth: Sequence[int], predicted: Sequence[int], num_labels: int) -> Confusion:
    """Counts of rows by true label, then by predicted label; labels are numbers below `num_labels`."""
    counts = Counter(zip(truth, predicted, strict=True))
    labels = range(num_labels)
    return tuple(tuple(counts[true, guess] for guess in labels) for true in labels)


def class_scores(labels: Sequence[str], confusion: Confusion) -> tuple[ClassScore, ...]:
    """One score per label, in order."""
    predicted = [sum(column) for column in zip(*confusion, strict=True)]
    return tuple(
        _class_score(label, confusion[number][number], predicted[number], sum(confusion[number]))
        for number, label in enumerate(labels)
    )


def share_right(confusion: Confusion) -> float:
    """Accuracy: the share of all rows on the diagonal."""
    return sum(row[number] for number, row in enumerate(confusion)) / sum(map(sum, confusion))


def macro_f1(classes: Sequence[ClassScore], confusion: Confusion) -> float:
    """Mean F1 over the labels that occur, as a true or a predicted one."""
    predicted = [sum(column) for column in zip(*confusion, strict=True)]
    found = [item.f1 for item, times in zip(classes, predicted, strict=True) if item.support or times]
    return sum(found) / len(found)


def _class_score(label: str, right: int, predicted: int, support: int) -> ClassScore:
    return ClassScore(
        label=label,
        precision=right / predicted if predicted else 0.0,
        recall=right / support if support else 0.0,
        f1=2 * right / (predicted + support) if predicted + support else 0.0,
        support=support,
    )
