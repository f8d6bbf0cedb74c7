"""What the heads of tasks find in rows whose truth is known: cloze, classify, tag, answer and embed.

Each prompt reads the rows in its own form: its placement, pooling, label words. The bare base has the label words of a
cloze at the same template's mask, and the vectors of an embedding; it has no head, so classify and tag are measured
beside always answering the commonest label, and an answer beside the whole context.

N rows, K labels, D hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from softprompt.base import Base
from softprompt.data import Rows, build_task_examples, render_rows
from softprompt.data.rows import RowText
from softprompt.data.task_examples import TaskEncoder, TaskInput
from softprompt.errors import ConfigError, DataError, EncodingError
from softprompt.evaluation.classification import class_scores, confusion_matrix, macro_f1, share_right
from softprompt.evaluation.heldout import CONFIDENCE, NUM_RESAMPLES, Interval, max_text_tokens
from softprompt.evaluation.spans import Entity, answer_f1, best_span, entities, entity_f1, exact_match, has_prefixes
from softprompt.families import Forward
from softprompt.loss.objective import head_outputs
from softprompt.prompt import SoftPrompt
from softprompt.types import Example, InputForm, Task

WITH_LABELS: tuple[Task, ...] = ("cloze", "classify")
WITHOUT_BARE: tuple[Task, ...] = ("classify", "tag", "answer")  # tasks whose head the bare base lacks


def rows_for(rows: Rows, form: InputForm) -> Rows:
    """The rows in a prompt's own form."""
    return replace(rows, form=form)


def label_logits(
    base: Base, forward: Forward, examples: Sequence[Example], form: InputForm, prompt: SoftPrompt | None
) -> np.ndarray:
    """[N, K] of cloze and classify, under the prompt or, of cloze, the bare base."""
    outputs = head_outputs(base, forward, examples, prompt, form=form)
    return np.stack([logits.double().numpy() for logits in outputs])


@dataclass(frozen=True)
class LabelledExamples:
    """Rows of cloze or classify that have a label."""

    examples: tuple[Example, ...]
    own: tuple[int, ...]  # each row's true label, as an index of the form's
    indices: tuple[int, ...]  # in the source


def labelled_examples(base: Base, rows: Rows, max_length: int) -> LabelledExamples:
    """Raises DataError for a row with another label, and where no row is left."""
    examples = build_task_examples(base, rows, max_length=max_length).examples
    own, indices = zip(*((example.labels[0], example.row) for example in examples), strict=True)
    return LabelledExamples(examples, own, indices)


@dataclass(frozen=True)
class RowScores:
    """One score of one contender. Each row is so much of so much, and the whole the quotient of the two sums."""

    name: str
    parts: tuple[tuple[float, float], ...]  # of each row: words right and words, say
    values: tuple[float, ...]  # of each row alone
    indices: tuple[int, ...]  # of the rows, in the source

    @property
    def value(self) -> float:
        """Of all rows together; 0 where there is nothing to find."""
        return _quotient(*(sum(own) for own in zip(*self.parts, strict=True)))

    @classmethod
    def mean(cls, name: str, values: Sequence[float], indices: tuple[int, ...]) -> RowScores:
        """A score that is the mean over the rows."""
        return cls(name, tuple((value, 1.0) for value in values), tuple(values), indices)


def _quotient(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def ratio_interval(ours: RowScores, theirs: RowScores, seed: int = 0) -> Interval | None:
    """Percentile bootstrap over rows of the difference of two scores of the same rows; None for a single row."""
    num_rows = len(ours.parts)
    if num_rows < 2:
        return None
    draws = np.random.default_rng(seed).integers(0, num_rows, (NUM_RESAMPLES, num_rows))
    values = []
    for scores in (ours, theirs):
        part, whole = np.array(scores.parts)[draws].sum(axis=1).T
        values.append(np.divide(part, whole, out=np.zeros_like(part), where=whole > 0))
    low, high = np.quantile(values[0] - values[1], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high))


def row_scores(base: Base, forward: Forward, rows: Rows, prompt: SoftPrompt | None, max_length: int) -> list[RowScores]:
    """The scores of tag, answer and embed; none of other tasks. `prompt` is None for the bare base, which embeds.

    Raises DataError where the rows have no truth to compare with.
    """
    score = {"tag": _tag_scores, "answer": _answer_scores, "embed": _embed_scores}.get(rows.form.task)
    if prompt is None and rows.form.pooling == "peft":  # which reads a virtual token
        rows = replace(rows, form=replace(rows.form, pooling="mean"))
    return [] if score is None else score(base, forward, rows, prompt, max_length)


def constant_scores(base: Base, rows: Rows, max_length: int) -> tuple[str, list[RowScores]]:
    """What answers without a model would score, and how they are called: the commonest tag, the whole context."""
    if rows.form.task == "tag":
        tagged = _tagged_rows(base, rows, max_length)
        tags = [tag for truth in tagged.truth for tag in truth if tag is not None]
        commonest = max(sorted(set(tags)), key=tags.count)
        guesses = [[commonest] * len(truth) for truth in tagged.truth]
        return f"always {commonest!r}", _scores_of_tags(rows.form, tagged, guesses)
    asked = _asked_rows(rows)
    return "the whole context", _scores_of_answers(asked, [context for _, context, _ in asked.texts])


@dataclass(frozen=True)
class _Tagged:
    inputs: tuple[TaskInput, ...]
    truth: tuple[tuple[str | None, ...], ...]  # a tag for each word
    indices: tuple[int, ...]


def _tag_scores(
    base: Base, forward: Forward, rows: Rows, prompt: SoftPrompt | None, max_length: int
) -> list[RowScores]:
    tagged = _tagged_rows(base, rows, max_length)
    outputs = head_outputs(base, forward, [item.example for item in tagged.inputs], prompt, form=rows.form)
    guesses = [
        tags_of(rows.form, item, output.numpy(), len(truth))
        for item, output, truth in zip(tagged.inputs, outputs, tagged.truth, strict=True)
    ]
    return _scores_of_tags(rows.form, tagged, guesses)


def tags_of(form: InputForm, item: TaskInput, logits_CK: np.ndarray, num_words: int) -> list[str | None]:
    """A tag for each word; None for one that was cut off, or that the tokenizer leaves out."""
    found: list[str | None] = [None] * num_words
    for unit, best in zip(item.units, logits_CK.argmax(axis=1).tolist(), strict=True):
        found[unit] = form.labels[best]
    return found


def _tagged_rows(base: Base, rows: Rows, max_length: int) -> _Tagged:
    encoder = TaskEncoder(base, rows.form, max_length)
    found = [
        (each, text.answers, rows.indices[position])
        for position, text in enumerate(render_rows(rows))
        if text.answers and not text.is_empty
        for each in _inputs(encoder, rows, position, text)
    ]
    if not found:
        raise DataError(f"{rows.source}: none of the {len(rows):,} rows has words with tags")
    return _Tagged(*zip(*found, strict=True))


def _scores_of_tags(form: InputForm, tagged: _Tagged, guesses: Sequence[Sequence[str | None]]) -> list[RowScores]:
    """Words whose tag does not count are left out, on both sides."""
    prefixed = has_prefixes(form.labels)
    pairs = [
        [(own, guess) for own, guess in zip(truth, found, strict=True) if own is not None]
        for truth, found in zip(tagged.truth, guesses, strict=True)
    ]
    kept = [(pair, index) for pair, index in zip(pairs, tagged.indices, strict=True) if pair]
    truth, found = (
        [entities([both[side] for both in pair], has_prefixes=prefixed) for pair, _ in kept] for side in (0, 1)
    )
    indices = tuple(index for _, index in kept)
    both = list(zip(truth, found, strict=True))
    each = tuple(_row_f1(own, guess) for own, guess in both)
    right = [sum(own == guess for own, guess in pair) for pair, _ in kept]
    shares = tuple(count / len(pair) for count, (pair, _) in zip(right, kept, strict=True))
    counts = tuple((2.0 * len(set(own) & set(guess)), float(len(own) + len(guess))) for own, guess in both)
    words = tuple((float(count), float(len(pair))) for count, (pair, _) in zip(right, kept, strict=True))
    return [RowScores("entity_f1", counts, each, indices), RowScores("accuracy", words, shares, indices)]


def _row_f1(truth: Sequence[Entity], found: Sequence[Entity]) -> float:
    """1 where a row has no entity and none is found."""
    return entity_f1([truth], [found]) if truth or found else 1.0


@dataclass(frozen=True)
class _Asked:
    texts: tuple[tuple[RowText, str, tuple[str, ...]], ...]  # each row, its context, and the answers to it
    positions: tuple[int, ...]
    indices: tuple[int, ...]


def _asked_rows(rows: Rows) -> _Asked:
    found = [
        ((text, text.parts[1], tuple(answer for answer, _ in text.answers)), position, rows.indices[position])
        for position, text in enumerate(render_rows(rows))
        if text.answers and not text.is_empty
    ]
    if not found:
        raise DataError(f"{rows.source}: none of the {len(rows):,} rows has a question with an answer")
    return _Asked(*zip(*found, strict=True))


def _answer_scores(
    base: Base, forward: Forward, rows: Rows, prompt: SoftPrompt | None, max_length: int
) -> list[RowScores]:
    asked, encoder = _asked_rows(rows), TaskEncoder(base, rows.form, max_length)
    windows = [
        _inputs(encoder, rows, position, text)
        for position, (text, _, _) in zip(asked.positions, asked.texts, strict=True)
    ]
    outputs = iter(head_outputs(base, forward, [w.example for own in windows for w in own], prompt, form=rows.form))
    answers = [
        context[slice(*characters_of(own, [next(outputs).numpy() for _ in own])[:2])]
        for own, (_, context, _) in zip(windows, asked.texts, strict=True)
    ]
    return _scores_of_answers(asked, answers)


def characters_of(windows: Sequence[TaskInput], logits: Sequence[np.ndarray]) -> tuple[int, int, float]:
    """First and end character of the likeliest span of a context, and its probability."""
    span = best_span(logits)
    spans = windows[span.window].spans
    return spans[span.first][0], spans[span.last][1], span.probability


def _scores_of_answers(asked: _Asked, answers: Sequence[str]) -> list[RowScores]:
    scores = {"exact_match": exact_match, "f1": answer_f1}
    found = []
    for name, score in scores.items():
        pairs = zip(answers, asked.texts, strict=True)
        values = tuple(score(answer, references) for answer, (_, _, references) in pairs)
        found.append(RowScores.mean(name, values, asked.indices))
    return found


def _embed_scores(
    base: Base, forward: Forward, rows: Rows, prompt: SoftPrompt | None, max_length: int
) -> list[RowScores]:
    """The rank of each row's positive text among those of all rows, by the cosine to its own text."""
    kept = [(position, text) for position, text in enumerate(render_rows(rows)) if _is_pair(text)]
    if len(kept) < 2:
        raise DataError(f"{rows.source}: to find a text among others takes two pairs or more, and it has {len(kept)}")
    encoder = TaskEncoder(base, rows.form, max_length)
    anchors_ND, positives_ND = (
        _vectors(base, forward, encoder, rows, [(at, text._replace(parts=(text.parts[side],))) for at, text in kept],
                 prompt)
        for side in (0, 1)
    )  # fmt: skip
    similar_NN = anchors_ND @ positives_ND.T
    texts = np.array([text.parts[1] for _, text in kept])
    similar_NN[texts[:, None] == texts[None, :]] = -np.inf  # the same text elsewhere is no other one
    own_N = (anchors_ND * positives_ND).sum(axis=1)
    ranks_N = 1 + (similar_NN >= own_N[:, None]).sum(axis=1)
    indices = tuple(rows.indices[position] for position, _ in kept)
    values = {"accuracy_at_1": (ranks_N == 1).astype(float), "mrr": 1 / ranks_N}
    return [RowScores.mean(name, own.tolist(), indices) for name, own in values.items()]


def _is_pair(text: RowText) -> bool:
    return len(text.parts) > 1 and all(part.strip() for part in text.parts[:2])


def _vectors(
    base: Base, forward: Forward, encoder: TaskEncoder, rows: Rows, texts: Sequence[tuple[int, RowText]],
    prompt: SoftPrompt | None,
) -> np.ndarray:  # fmt: skip
    """[N, D], of length 1."""
    examples = [_inputs(encoder, rows, position, text)[0].example for position, text in texts]
    return np.stack([own.double().numpy() for own in head_outputs(base, forward, examples, prompt, form=rows.form)])


def _inputs(encoder: TaskEncoder, rows: Rows, position: int, text: RowText) -> tuple[TaskInput, ...]:
    """Raises DataError, naming the row, for text that the tokenizer refuses."""
    try:
        return encoder.inputs(rows.indices[position], text)
    except EncodingError as error:
        raise DataError(f"{rows.where(position)}: {error}") from error


_CRITERIA: Mapping[Task, Mapping[str, str]] = {  # of --best-by, for each task that has no labels
    "tag": {"accuracy": "accuracy", "f1": "entity_f1"},
    "answer": {"exact_match": "exact_match", "f1": "f1"},
    "embed": {"accuracy": "accuracy_at_1"},
}


def criterion_score(base: Base, forward: Forward, rows: Rows, prompt: SoftPrompt, name: str) -> float:
    """The score called `name` among those of `--best-by`, of a prompt with a head or label words.

    Raises ConfigError where its task has no such score.
    """
    own = rows_for(rows, prompt.record.form)
    task, max_length = own.form.task, max_text_tokens(base, prompt)
    known = _CRITERIA.get(task, {"accuracy": "", "f1_macro": ""})
    if name not in known:
        raise ConfigError(f"best_by is {name!r}, and task {task!r} is scored by {' or '.join(known)}; choose one")
    if task in WITH_LABELS:
        return _label_score(base, forward, own, prompt, name, max_length)
    (found,) = [each for each in row_scores(base, forward, own, prompt, max_length) if each.name == known[name]]
    return found.value


def _label_score(base: Base, forward: Forward, rows: Rows, prompt: SoftPrompt, name: str, max_length: int) -> float:
    known = labelled_examples(base, rows, max_length)
    found = label_logits(base, forward, known.examples, rows.form, prompt).argmax(axis=1).tolist()
    confusion = confusion_matrix(known.own, found, len(rows.form.labels))
    if name == "accuracy":
        return share_right(confusion)
    return macro_f1(class_scores(rows.form.labels, confusion), confusion)
