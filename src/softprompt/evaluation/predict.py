"""Answers to rows of any number, in their order: the label, how sure it is, or the text that the prompt makes.

Rows are answered in chunks, which depend on nothing but the rows, so that a job that goes on at a chunk's beginning
writes the same bytes. A row that cannot be answered has an `error`, and stops nothing.

Confidence is the softmax of the labels' scores, divided by the temperature of the prompt's `Calibration` if its
training had labelled validation rows. Scores are what `evaluation.accuracy` compares: summed log-likelihoods, or the
logits of a head or of the words at a mask. Tags and spans of a context have the softmax of their head, uncalibrated.

N rows, K labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from softprompt.base import Base
from softprompt.config import DataConfig, PredictConfig, SamplingConfig
from softprompt.data import Input, Rows, label_ids
from softprompt.data.inputs import MESSAGES, TEXT, input_columns, input_row_ids, input_rows, input_text
from softprompt.data.rows import parse_template, render_row, template_fields
from softprompt.data.task_examples import TaskEncoder, TaskInput
from softprompt.data.tokens import source_ids
from softprompt.data.write import AddedColumn
from softprompt.engine import Answer, Request, generate
from softprompt.errors import ConfigError, DataError, LengthError
from softprompt.evaluation.calibrate import probabilities
from softprompt.evaluation.classification import context_ids, label_scores
from softprompt.evaluation.heads import characters_of, tags_of
from softprompt.evaluation.heldout import max_text_tokens, truncate_start
from softprompt.families import forward_of
from softprompt.loss.objective import head_outputs
from softprompt.prompt import Calibration, Judgement, SoftPrompt
from softprompt.prompt.calibration import rounded
from softprompt.settings import check_kinds
from softprompt.types import InputForm, brief_repr

CHUNK_ROWS = 256
_CHUNK_BATCHES = 8  # of `batch_tokens`: a chunk of long rows has fewer of them
_DIGITS = 6  # of a written number
_VECTOR_DIGITS = 7  # behind the point, of the numbers of a vector of length 1


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer to one row. What the prompt's task does not give is None."""

    __repr__ = brief_repr

    label: str | None = None
    confidence: float | None = None  # probability of the label, of the least sure tag or of the span, from 0 to 1
    is_unsure: bool | None = None  # below the threshold; None where there is none
    probabilities: Mapping[str, float] = field(default_factory=dict)  # of each label
    tags: tuple[str | None, ...] | None = None  # one for each word; None for one that was cut off
    tag_confidences: tuple[float | None, ...] = ()  # probability of each
    answer: str | None = None  # a written text, or the span of the context
    start: int | None = None  # its first character in the context
    end: int | None = None  # and the one behind its last
    mean_log_probability: float | None = None  # of a written text: nats per token, its end included
    finish_reason: str | None = None
    embedding: tuple[float, ...] | None = None  # [D], of length 1
    is_truncated: bool = False  # the row was cut, as in training, to fit beside the prompt
    error: str | None = None  # why there is no answer


class Sureness(NamedTuple):
    """How the confidences of one prompt are made and judged."""

    temperature: float | None  # None where the probabilities are not calibrated
    threshold: float | None  # None: no answer is marked; infinite where no threshold gives the accuracy
    calibration: Calibration | None = None


def sureness(prompt: SoftPrompt, config: PredictConfig) -> Sureness:
    """By the calibration in the prompt's record, and the settings."""
    judgement = Judgement.from_json(prompt.record.run.get("held_out"))
    calibration = None if judgement is None else judgement.calibration
    if calibration is None:
        return Sureness(None, config.threshold)
    choice = calibration.choose(config.target_accuracy)
    chosen = math.inf if choice is None else choice.threshold
    return Sureness(calibration.temperature, chosen if config.threshold is None else config.threshold, calibration)


def predict(
    base: Base,
    prompt: SoftPrompt,
    rows: Rows | Iterable[Input],
    config: PredictConfig | None = None,
    *,
    text_column: str | None = None,
) -> Iterator[Prediction]:
    """One answer per row, in order, as the rows come: texts, mappings with the columns of the prompt's template, chats.

    Rows need no labels, and may have further columns. `text_column` names the column of the text where that is not the
    template's field.
    Raises DataError, at the first row, where the columns lack what the prompt reads, and LengthError where not even one
    token fits beside the prompt. A row that cannot be answered has an `error`.
    """
    check_kinds(base=(base, Base), prompt=(prompt, SoftPrompt), config=(config, PredictConfig))
    records = iter(rows.records) if isinstance(rows, Rows) else _records(prompt.record.form, rows)
    first = list(islice(records, 1))
    if not first:
        return
    settings = DataConfig(data="the data", text_column=text_column or (rows.column if isinstance(rows, Rows) else None))
    columns = input_columns(prompt.record.form, list(first[0]), settings)
    answerer = answerer_of(base, prompt, config or PredictConfig())
    for chunk in predict_chunks(answerer, chain(first, records), columns):
        yield from chunk.predictions


def _records(form: InputForm, rows: Iterable[Input]) -> Iterator[Mapping[str, Any]]:
    """Texts and chats as records with the column that the form reads."""
    if isinstance(rows, (str, bytes, Mapping)):
        raise DataError("rows is one row; give a list of them")
    names = template_fields(form.template) if form.template is not None else ()
    for row in rows:
        if isinstance(row, Mapping):
            yield row
        elif isinstance(row, str):
            name = names[0] if len(names) == 1 else MESSAGES if form.kind == "chat" else TEXT
            yield {name: row}
        else:
            yield {MESSAGES: row}


class Chunk(NamedTuple):
    """Some rows with their answers."""

    records: Sequence[Mapping[str, Any]]  # Any: cells of all kinds
    predictions: Sequence[Prediction]


def predict_chunks(
    answerer: Answerer,
    records: Iterable[Mapping[str, Any]],
    columns: Mapping[str, str],
    source: str = "the data",
    first: int = 0,
) -> Iterator[Chunk]:
    """The answers in chunks; `columns` as `input_columns` gives them, `first` is the number of the first record."""
    chunk: list[tuple[Mapping[str, Any], _Item | Prediction]] = []
    num_tokens = 0
    for number, record in enumerate(records, start=first):
        item = answerer.read(input_rows(answerer.form, [record], columns, source, number))
        tokens = item.num_tokens if isinstance(item, _Item) else 0
        if chunk and (len(chunk) == CHUNK_ROWS or num_tokens + tokens > answerer.chunk_tokens):
            yield _answered(answerer, chunk)
            chunk, num_tokens = [], 0
        chunk.append((record, item))
        num_tokens += tokens
    if chunk:
        yield _answered(answerer, chunk)


class _Item(NamedTuple):
    """A row that can be answered."""

    num_tokens: int  # that the base computes for it
    is_truncated: bool
    text: str = ""  # labels by likelihood: what is before them; task "answer": the context
    ids: tuple[int, ...] = ()  # of a text to continue
    inputs: tuple[TaskInput, ...] = ()  # of a task that reads columns: one, or the windows of a context
    num_words: int = 0  # task "tag"


def _answered(answerer: Answerer, chunk: Sequence[tuple[Mapping[str, Any], _Item | Prediction]]) -> Chunk:
    """The chunk's answers; what is one already stays."""
    items = [item for _, item in chunk if isinstance(item, _Item)]
    found = iter(answerer.answer(items) if items else [])
    answers = [next(found) if isinstance(item, _Item) else item for _, item in chunk]
    return Chunk([record for record, _ in chunk], answers)


@dataclass(frozen=True)
class Answerer:
    """How the rows of one prompt are read and answered."""

    form: InputForm
    chunk_tokens: int  # of a chunk, at most
    columns: tuple[AddedColumn, ...]  # of the answers
    read_row: Callable[[Rows], _Item | None]  # the only row; None where it is empty
    answer: Callable[[Sequence[_Item]], list[Prediction]]

    def read(self, rows: Rows) -> _Item | Prediction:
        """The row, or why it has no answer."""
        try:
            found = self.read_row(rows)
        except (DataError, LengthError) as error:
            return Prediction(error=str(error))
        return Prediction(error="the row is empty") if found is None else found

    def cells(self, prediction: Prediction) -> list[Any]:  # Any: a cell of each column's kind
        """The prediction's cells in the columns."""
        known = {
            "label": prediction.label, "confidence": prediction.confidence, "unsure": prediction.is_unsure,
            "answer": prediction.answer, "mean_log_probability": prediction.mean_log_probability,
            "finish_reason": prediction.finish_reason, "truncated": prediction.is_truncated, "error": prediction.error,
            "tags": prediction.tags, "tag_confidences": prediction.tag_confidences or None, "start": prediction.start,
            "end": prediction.end, "embedding": prediction.embedding,
            **{f"p({label})": share for label, share in prediction.probabilities.items()},
        }  # fmt: skip
        return [known.get(column.name) for column in self.columns]


def _chunk_tokens(config: PredictConfig) -> int:
    return _CHUNK_BATCHES * config.batch_tokens


_COMMON = (AddedColumn("truncated", "flag"), AddedColumn("error", "text"))


def answerer_of(base: Base, prompt: SoftPrompt, config: PredictConfig) -> Answerer:
    """By the prompt's task. Raises ConfigError for settings that it does not have."""
    form = prompt.record.form
    _check_settings(form, config)
    if form.task != "generate":
        return _by_head(base, prompt, config)
    return _by_labels(base, prompt, config) if form.labels else _by_text(base, prompt, config)


def _check_settings(form: InputForm, config: PredictConfig) -> None:
    has_labels = bool(form.labels)
    if config.probabilities and not has_labels:
        raise ConfigError("probabilities is about labels, and this prompt has none; leave it out")
    if config.threshold is not None and not has_labels and form.task != "answer":
        what = "gives vectors" if form.task == "embed" else "writes text"
        raise ConfigError(f"threshold is about how sure an answer is, and this prompt {what}; leave it out")


_LABEL_COLUMNS = (AddedColumn("label", "text"), AddedColumn("confidence", "number"), AddedColumn("unsure", "flag"))


def _label_columns(names: Sequence[str], config: PredictConfig) -> tuple[AddedColumn, ...]:
    return (*_LABEL_COLUMNS, *(AddedColumn(f"p({name})", "number") for name in names if config.probabilities))


def _by_labels(base: Base, prompt: SoftPrompt, config: PredictConfig) -> Answerer:
    forward, form = forward_of(base), prompt.record.form
    names, sure = label_names(form), sureness(prompt, config)
    limit = max_text_tokens(base, prompt)

    def read(rows: Rows) -> _Item | None:
        text = input_text(rows, 0)
        if not text:
            return None
        own = [label_ids(base, text, label) for label in form.labels]
        longest = max(map(len, own))
        kept = context_ids(base, text, limit, longest)
        num_runs = len({ids[:-1] for ids in own})
        return _Item((len(kept) + longest) * num_runs, len(kept) < len(source_ids(base, text)), text=text)

    def answer(items: Sequence[_Item]) -> list[Prediction]:
        texts = [item.text for item in items]
        (scores_NK,) = label_scores(base, forward, texts, form.labels, [prompt], batch_tokens=config.batch_tokens)
        return [
            _labelled(names, own_K, sure, config, item.is_truncated)
            for own_K, item in zip(scores_NK, items, strict=True)
        ]

    return Answerer(form, _chunk_tokens(config), (*_label_columns(names, config), *_COMMON), read, answer)


def _labelled(
    names: Sequence[str], scores_K: np.ndarray, sure: Sureness, config: PredictConfig, is_truncated: bool
) -> Prediction:
    if not np.isfinite(scores_K).all():
        return Prediction(error="the base computes no number for this row", is_truncated=is_truncated)
    shares = rounded(probabilities(scores_K[None], sure.temperature or 1.0)[0].tolist())
    best = int(scores_K.argmax())
    return Prediction(
        label=names[best],
        confidence=shares[best],
        is_unsure=None if sure.threshold is None else shares[best] < sure.threshold,
        probabilities=dict(zip(names, shares, strict=True)) if config.probabilities else {},
        is_truncated=is_truncated,
    )


def label_names(form: InputForm) -> tuple[str, ...]:
    """The labels as the column of the training rows had them: without the words of the completion around them."""
    tokens = parse_template(form.completion) if form.completion is not None else ()
    if sum(token.is_field for token in tokens) != 1:
        return tuple(label.strip() or label for label in form.labels)
    place = next(number for number, token in enumerate(tokens) if token.is_field)
    before, after = ("".join(token.text for token in some) for some in (tokens[:place], tokens[place + 1 :]))
    return tuple(label.removeprefix(before).removesuffix(after) or label for label in form.labels)


def _by_text(base: Base, prompt: SoftPrompt, config: PredictConfig) -> Answerer:
    forward = forward_of(base)
    limit = max_text_tokens(base, prompt)
    if base.kind != "seq2seq":  # whose answer is not in the same text
        limit -= config.max_new_tokens
    if limit <= len(base.bos_ids):
        raise LengthError(
            f"max_new_tokens is {config.max_new_tokens}, and base {base.name!r} has {base.max_length:,} positions for "
            f"the prompt's {prompt.num_virtual_tokens}, the text and the answer; ask for fewer"
        )
    sampling = SamplingConfig(max_new_tokens=config.max_new_tokens)

    def read(rows: Rows) -> _Item | None:
        ids = input_row_ids(base, rows, 0)
        if not ids:
            return None
        kept = truncate_start(base, ids, limit, is_chat=prompt.record.form.kind == "chat")
        return _Item(len(kept) + config.max_new_tokens, len(kept) < len(ids), ids=kept)

    def answer(items: Sequence[_Item]) -> list[Prediction]:
        found = generate(base, [Request(item.ids, prompt) for item in items], sampling=sampling, forward=forward)
        return [_written(one, item.is_truncated) for one, item in zip(found, items, strict=True)]

    columns = (
        AddedColumn("answer", "text"), AddedColumn("mean_log_probability", "number"),
        AddedColumn("finish_reason", "text"),
    )  # fmt: skip
    return Answerer(prompt.record.form, _chunk_tokens(config), (*columns, *_COMMON), read, answer)


def _written(answer: Answer, is_truncated: bool) -> Prediction:
    end = answer.end_log_prob
    log_probs = [*answer.log_probs, *([] if end is None else [end.log_prob])]
    return Prediction(
        answer=answer.text,
        mean_log_probability=round(sum(log_probs) / len(log_probs), _DIGITS) if log_probs else None,
        finish_reason=answer.finish_reason,
        is_truncated=is_truncated,
    )


def _by_head(base: Base, prompt: SoftPrompt, config: PredictConfig) -> Answerer:
    """Tasks that read the states of columns: cloze, classify, tag, answer and embed."""
    forward, form, sure = forward_of(base), prompt.record.form, sureness(prompt, config)
    encoder = TaskEncoder(base, form, max_text_tokens(base, prompt))

    def read(rows: Rows) -> _Item | None:
        text = render_row(rows, 0)
        is_blank = not text.parts[-1 if form.task == "answer" else 0].strip() if text.parts else not text.prompt.strip()
        inputs = () if is_blank or (form.task == "tag" and not text.prompt.strip()) else encoder.inputs(0, text)
        if not inputs:
            return None
        num_tokens = sum(len(own.example.ids) + prompt.num_virtual_tokens for own in inputs)
        is_truncated = form.task != "answer" and inputs[0].is_truncated  # every window of a context is read
        context = text.parts[1] if form.task == "answer" else ""
        return _Item(num_tokens, is_truncated, context, inputs=inputs, num_words=len(text.parts))

    def answer(items: Sequence[_Item]) -> list[Prediction]:
        examples = [own.example for item in items for own in item.inputs]
        outputs = iter(head_outputs(base, forward, examples, prompt, max_slots=config.batch_tokens))
        found = [[next(outputs).double().numpy() for _ in item.inputs] for item in items]
        return [_from_head(form, item, own, sure, config) for item, own in zip(items, found, strict=True)]

    columns = {
        "tag": [AddedColumn("tags", "texts"), *_LABEL_COLUMNS[1:],
                *([AddedColumn("tag_confidences", "numbers")] if config.probabilities else [])],
        "answer": [AddedColumn("answer", "text"), AddedColumn("start", "count"), AddedColumn("end", "count"),
                   *_LABEL_COLUMNS[1:]],
        "embed": [AddedColumn("embedding", "numbers")],
    }  # fmt: skip
    own = columns.get(form.task, _label_columns(form.labels, config))
    return Answerer(form, _chunk_tokens(config), (*own, *_COMMON), read, answer)


def _from_head(
    form: InputForm, item: _Item, outputs: Sequence[np.ndarray], sure: Sureness, config: PredictConfig
) -> Prediction:
    if not all(np.isfinite(own).all() for own in outputs):
        return Prediction(error="the base computes no number for this row", is_truncated=item.is_truncated)
    if form.task == "embed":
        return Prediction(
            embedding=tuple(round(float(each), _VECTOR_DIGITS) for each in outputs[0]), is_truncated=item.is_truncated
        )
    if form.task == "tag":
        return _tagged(form, item, outputs[0], sure, config)
    if form.task == "answer":
        return _answered_span(item, outputs, sure)
    return _labelled(form.labels, outputs[0], sure, config, item.is_truncated)


def _tagged(form: InputForm, item: _Item, logits_CK: np.ndarray, sure: Sureness, config: PredictConfig) -> Prediction:
    (own,) = item.inputs
    shares = rounded(probabilities(logits_CK).max(axis=1).tolist())
    by_word = dict(zip(own.units, shares, strict=True))
    least = min(shares)
    return Prediction(
        tags=tuple(tags_of(form, own, logits_CK, item.num_words)),
        tag_confidences=tuple(by_word.get(word) for word in range(item.num_words)) if config.probabilities else (),
        confidence=least,
        is_unsure=None if sure.threshold is None else least < sure.threshold,
        is_truncated=item.is_truncated,
    )


def _answered_span(item: _Item, windows: Sequence[np.ndarray], sure: Sureness) -> Prediction:
    start, end, probability = characters_of(item.inputs, windows)
    (share,) = rounded([probability])
    return Prediction(
        answer=item.text[start:end],
        start=start,
        end=end,
        confidence=share,
        is_unsure=None if sure.threshold is None else share < sure.threshold,
        is_truncated=item.is_truncated,
    )
