"""Examples of tasks whose hidden states a head reads: token ids, the columns that are read, and what is found there.

A text is [CLS] or BOS, its tokens, and what the tokenizer puts behind it ([SEP]); `num_before` of the ids stand in
front of the virtual tokens. One too long is cut: a mask stays, and so does the end of a template behind its text; words
at the end of a tagged text are left out; a long context is read in windows that overlap by half, and trained on in the
first one that has the whole answer. The second text of a pair has the token type that the tokenizer gives it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from softprompt.base import Base
from softprompt.compute_share import yield_point
from softprompt.data.examples import check_ids, row_list, show_example
from softprompt.data.rows import Rows, RowText, parse_template, render_row, render_rows, text_hash, with_labels
from softprompt.data.tasks import split_at_mask
from softprompt.data.tokens import continuation_ids, control_tokens, first_ids, own_tokenizer
from softprompt.errors import ConfigError, DataError, EncodingError, LengthError, shortened
from softprompt.families.task_head import task_head
from softprompt.loss import num_labels
from softprompt.types import DataReport, Example, ExampleSet, InputForm

_FEWEST_IDS = 1  # of a text, besides those around it


class TaskInput(NamedTuple):
    """One text as a head reads it, without what it should find."""

    example: Example  # without labels
    units: tuple[int, ...] = ()  # task "tag": the number of the word of each column
    spans: tuple[
        tuple[int, int], ...
    ] = ()  # task "answer": the characters of the context of each column, first and end
    is_truncated: bool = False


class _Labelled(NamedTuple):
    input: TaskInput | None  # None for a row that is not used
    shown: str = ""  # what the head should find, for the report
    problem: str = ""  # why it is not used


def build_task_examples(base: Base, rows: Rows, *, max_length: int) -> ExampleSet:
    """The rows as examples of at most `max_length` ids each (the soft prompt not counted), with columns and labels.

    `labels` index the form's labels; of an answer they are its first and last column, as numbers among the columns.
    Raises DataError, naming the row, for one that cannot be used, and where no row is left.
    """
    rows = with_labels(rows)
    encoder = TaskEncoder(base, rows.form, max_length)
    texts = render_rows(rows)
    found = [_labelled(encoder, rows, position, text) for position, text in enumerate(texts)]
    examples = [each.input.example for each in found if each.input is not None]
    for example in examples:
        check_ids(base, rows, example)
    if not examples:
        reasons = ", ".join(dict.fromkeys(each.problem for each in found))
        raise DataError(f"{rows.source}: none of the {len(rows):,} rows can be learned from ({reasons})")
    return ExampleSet(
        examples=tuple(examples),
        form=rows.form,
        report=_report(base, rows, found, examples),
        data_hash=text_hash(texts),
    )


def task_inputs(
    base: Base,
    form: InputForm,
    item: str | Mapping[str, Any],
    *,
    max_length: int,  # Any: a cell, checked here
) -> tuple[TaskInput, ...]:
    """One input in the form of a trained prompt: the fields of its template by name, or the text of the only field.

    Several where a context is read in windows. Raises DataError for an input that does not suit the form.
    """
    rows = Rows(records=(_record(form, item),), indices=(0,), source="the input", form=form)
    try:
        return TaskEncoder(base, form, max_length).inputs(0, render_row(rows, 0))
    except EncodingError as error:
        raise DataError(str(error)) from error


def _record(form: InputForm, item: str | Mapping[str, Any]) -> Mapping[str, Any]:  # Any: as above
    names = rows_fields(form)
    if isinstance(item, str):
        if len(names) != 1:
            raise DataError(f"the form has the fields {', '.join(map(repr, names))}; give each of them by its name")
        return {names[0]: item}
    for name in names:
        if name not in item:
            raise DataError(f"there is no field {name!r}; the form has {', '.join(map(repr, names))}")
    return {name: item[name] for name in names}


def rows_fields(form: InputForm) -> tuple[str, ...]:
    """The columns that a task's inputs are read from."""
    assert form.template is not None, form
    return tuple(dict.fromkeys(token.text for token in parse_template(form.template) if token.is_field))


class TaskEncoder:
    """Encodes the rows of one form on one base, within one limit.

    Raises LengthError where what stands around every text already fills `max_length`.
    """

    def __init__(self, base: Base, form: InputForm, max_length: int) -> None:
        self.base, self.form, self._max_length = base, form, max_length
        self._num_free = max_length - len(base.bos_ids) - len(base.end_ids)
        if self._num_free < _FEWEST_IDS:
            raise LengthError(f"max_length is {max_length} tokens; no text fits behind the soft prompt")

    def inputs(self, row: int, text: RowText) -> tuple[TaskInput, ...]:
        """A row's input; several where its context is read in windows, none for a row without text.

        Raises EncodingError for text that the tokenizer refuses.
        """
        yield_point()
        encode = {
            "cloze": self._cloze, "classify": self._classified, "tag": self._tagged, "answer": self._windows,
            "embed": self._embedded,
        }[self.form.task]  # fmt: skip
        return tuple(encode(row, text))

    def _cloze(self, row: int, text: RowText) -> Iterator[TaskInput]:
        """The mask stays: what is cut is the start of what is before it, or the end of what is behind it."""
        before, behind = self._around_mask(text.fields)
        excess = max(len(before) + 1 + len(behind) - self._num_free, 0)
        cut_before = min(excess, len(before)) if len(before) >= len(behind) else max(excess - len(behind), 0)
        before, behind = before[cut_before:], behind[: len(behind) - (excess - cut_before)]
        assert self.base.mask_id is not None, "tasks.py has checked"
        column = len(self.base.bos_ids) + len(before)
        yield TaskInput(self._example(row, (*before, self.base.mask_id, *behind), (column,)), is_truncated=excess > 0)

    def _around_mask(self, fields: Mapping[str, str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids before and behind the mask, as the tokenizer gives them for the whole text.

        Where a field contains a special token, which is only text, both sides are encoded apart.
        """
        base, tokenizer = self.base, self.base.tokenizer
        assert self.form.template is not None and base.mask_id is not None
        before, behind = (_filled(part, fields) for part in split_at_mask(base, self.form.template))
        special = control_tokens(tokenizer, "")
        if not any(special.found_in(before + behind)):
            ids = base.encode_with(own_tokenizer(tokenizer), f"{before}{tokenizer.mask_token}{behind}")
            if ids.count(base.mask_id) == 1:
                column = ids.index(base.mask_id)
                return ids[:column], ids[column + 1 :]
        token = tokenizer.added_tokens_decoder.get(base.mask_id)
        has_space = token is not None and token.lstrip
        return base.encode(before.rstrip() if has_space else before), continuation_ids(base, behind)

    def _classified(self, row: int, text: RowText) -> Iterator[TaskInput]:
        """Cut at the end, or at the start where the template goes on behind its text."""
        assert self.form.template is not None
        if parse_template(self.form.template)[-1].is_field:
            ids = tuple(first_ids(self.base.encode, text.prompt, self._num_free + 1))
            kept = ids[: self._num_free]
        else:
            ids = self.base.encode(text.prompt)
            kept = ids[-self._num_free :]
        if ids:
            example = self._example(row, kept, ())
            yield TaskInput(self._pooled(example), is_truncated=len(ids) > len(kept))

    def _embedded(self, row: int, text: RowText) -> Iterator[TaskInput]:
        texts = [self.base.encode(part) for part in text.parts if part.strip()]
        if not texts or not texts[0]:
            return
        kept = [ids[: self._num_free] for ids in texts]
        example = self._pooled(self._example(row, kept[0], ()))
        others = tuple((*self.base.bos_ids, *ids, *self.base.end_ids) for ids in kept[1:])
        columns = tuple(pooled_columns(self.base, self.form, len(ids)) for ids in others)
        example = replace(example, others=others, other_columns=columns)
        yield TaskInput(example, is_truncated=any(map(_is_cut, texts, kept)))

    def _pooled(self, example: Example) -> Example:
        return replace(example, columns=pooled_columns(self.base, self.form, len(example.ids)))

    def _tagged(self, row: int, text: RowText) -> Iterator[TaskInput]:
        """Each word's first token; a word that the tokenizer leaves out, or that is cut off, has no column."""
        joined, firsts = " ".join(text.parts), _word_starts(text.parts)
        ids, spans = self.base.encode_with_spans(joined)
        kept = ids[: self._num_free]
        columns, units = [], []
        for unit, (word, first) in enumerate(zip(text.parts, firsts, strict=True)):
            column = _token_of(spans[: len(kept)], first, first + len(word))
            if column is not None:
                columns.append(len(self.base.bos_ids) + column)
                units.append(unit)
        if columns:
            yield TaskInput(self._example(row, kept, columns), units=tuple(units), is_truncated=len(kept) < len(ids))

    def _windows(self, row: int, text: RowText) -> Iterator[TaskInput]:
        """Question, separator and context; a context that does not fit is read in windows, each half over the last.

        A question of more than half of the tokens is cut.
        """
        question, context = text.parts
        between = self._between
        asked = self.base.encode(question)[: max(self._num_free // 2 - len(between), 0)]
        ids, spans = self.base.encode_with_spans(context)
        length = self._num_free - len(asked) - len(between)
        first_column = len(self.base.bos_ids) + len(asked) + len(between)
        for first in window_starts(len(ids), length):
            own = ids[first : first + length]
            example = self._example(row, (*asked, *between, *own), range(first_column, first_column + len(own)))
            example = replace(example, num_first=first_column)
            yield TaskInput(example, spans=spans[first : first + length], is_truncated=len(own) < len(ids))

    @property
    def _between(self) -> tuple[int, ...]:
        """The tokenizer's own ids between two texts, else a line break."""
        return self.base.pair_ids or continuation_ids(self.base, "\n")

    def _example(self, row: int, ids: Sequence[int], columns: Sequence[int]) -> Example:
        whole = (*self.base.bos_ids, *ids, *self.base.end_ids)
        num_bos = len(self.base.bos_ids)
        return Example(
            ids=whole, target_mask=(False,) * len(whole), num_special=num_bos, has_eos=False, row=row,
            num_before=num_bos if self.form.placement == "after-cls" else 0, columns=tuple(columns),
        )  # fmt: skip


def pooled_columns(base: Base, form: InputForm, num_ids: int) -> tuple[int, ...]:
    """The columns of a text of so many ids whose states classify and embed read; -1 is the first virtual token.

    The mean is over all real tokens, those around the text included, as in sentence-transformers. PEFT reads what the
    model's own class does, of most encoders the first position, which is then a virtual token.
    """
    if form.pooling == "peft":
        return (-1,) if peft_position(base, form) == "first" else (num_ids - 1,)
    return {"cls": (0,), "last": (num_ids - 1,)}.get(form.pooling or "cls", tuple(range(num_ids)))


def peft_position(base: Base, form: InputForm) -> str:
    """Whose state PEFT reads, "first" or "last". Raises ConfigError where it is the mean over virtual tokens too."""
    head = task_head(base, form)
    position = head.position if head is not None else "first" if base.kind == "encoder" else "last"
    if position == "mean":
        raise ConfigError(
            f"pooling is 'peft', but base {base.name!r} is classified by the mean over all positions, virtual ones "
            "included; use pooling mean, over the text",
            param="pooling",
        )
    return position


def window_starts(num_ids: int, length: int) -> list[int]:
    """The first ids of windows of `length` over so many ids: each half a window on, the last at the end."""
    if num_ids <= length:
        return [0]
    return [*range(0, num_ids - length, max(length // 2, 1)), num_ids - length]


def _filled(template: str, fields: Mapping[str, str]) -> str:
    return "".join(fields[token.text] if token.is_field else token.text for token in parse_template(template))


def _is_cut(ids: Sequence[int], kept: Sequence[int]) -> bool:
    return len(kept) < len(ids)


def _word_starts(words: Sequence[str]) -> list[int]:
    """Where each word begins in the words joined by spaces."""
    starts, done = [], 0
    for word in words:
        starts.append(done)
        done += len(word) + 1
    return starts


def _token_of(spans: Sequence[tuple[int, int]], first: int, end: int) -> int | None:
    """The first token that has characters of the text from `first` to `end`. Spans are in order."""
    low, high = 0, len(spans)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if spans[middle][1] <= first else (low, middle)
    is_found = low < len(spans) and spans[low][0] < end
    return low if is_found else None


def _labelled(encoder: TaskEncoder, rows: Rows, position: int, text: RowText) -> _Labelled:
    """A row with what the head should find in it. Raises DataError, naming the row."""
    where, task = rows.where(position), rows.form.task
    if text.is_empty:
        return _Labelled(None, problem="nothing to learn")
    try:
        inputs = encoder.inputs(rows.indices[position], text)
    except EncodingError as error:
        raise DataError(f"{where}: {error}") from error
    if not inputs:
        return _Labelled(None, problem="no token of it is read")
    if task == "answer":
        return _with_answer(inputs, text)
    if task == "tag":
        return _with_tags(inputs[0], text, rows.form, where)
    if task == "embed":
        return _Labelled(inputs[0], " and ".join(map(shortened, text.parts[1:])))
    if text.text not in rows.form.labels:
        raise DataError(f"{where}: the label {shortened(text.text)} is none of those trained on, {_listed(rows.form)}")
    example = replace(inputs[0].example, labels=(rows.form.labels.index(text.text),))
    return _Labelled(inputs[0]._replace(example=example), _shown_label(rows.form, text.text))


def _with_tags(found: TaskInput, text: RowText, form: InputForm, where: str) -> _Labelled:
    """The columns of words with a tag that counts."""
    if not text.answers:
        raise DataError(f"{where} has words without tags; give each word one")
    pairs = [(column, text.answers[unit]) for column, unit in zip(found.example.columns, found.units, strict=True)]
    known = [(column, tag) for column, tag in pairs if tag is not None]
    unknown = next((tag for _, tag in known if tag not in form.labels), None)
    if unknown is not None:
        raise DataError(f"{where}: the tag {shortened(unknown)} is none of those trained on, {_listed(form)}")
    if not known:
        return _Labelled(None, problem="no word has a tag that counts")
    columns, tags = zip(*known, strict=True)
    example = replace(found.example, columns=columns, labels=tuple(form.labels.index(tag) for tag in tags))
    return _Labelled(found._replace(example=example), " ".join(tags))


def _with_answer(inputs: Sequence[TaskInput], text: RowText) -> _Labelled:
    """The first window with the whole of the first answer that the context has."""
    context = text.parts[1]
    places = [place for answer, start in text.answers if (place := _place(context, answer, start)) is not None]
    if not places:
        return _Labelled(None, problem="the answer is not in the context" if text.answers else "it has no answer")
    first, end = places[0]
    for each in inputs:
        span = _columns_of(each.spans, first, end)
        if span is not None:
            example = replace(each.example, labels=span, is_span=True)
            return _Labelled(each._replace(example=example), shortened(context[first:end]))
    return _Labelled(None, problem="the answer is longer than a window of its context")


def _place(context: str, answer: str, start: int | None) -> tuple[int, int] | None:
    """The characters of an answer in its context: where it is said to begin, else where it is nearest to that."""
    answer = answer.strip()
    found = [i for i in range(len(context)) if context.startswith(answer, i)] if answer in context else []
    if not found:
        return None
    first = min(found, key=lambda own: (abs(own - (start or 0)), own))
    return first, first + len(answer)


def _columns_of(spans: Sequence[tuple[int, int]], first: int, end: int) -> tuple[int, int] | None:
    """The first and the last token of the characters, if all of them are among the spans."""
    start, last = _token_of(spans, first, end), _token_of(spans, end - 1, end)
    if start is None or last is None or spans[start][0] > first or (start == 0 and spans[0][0] > first):
        return None
    return start, last


def _listed(form: InputForm) -> str:
    more = f" and {len(form.labels) - 8:,} more" if len(form.labels) > 8 else ""
    return ", ".join(map(shortened, form.labels[:8])) + more


def _shown_label(form: InputForm, label: str) -> str:
    words = form.label_words[form.labels.index(label)] if form.label_words else (label,)
    return label if words == (label,) else f"{label} ({', '.join(words)})"


def _report(base: Base, rows: Rows, found: Sequence[_Labelled], examples: Sequence[Example]) -> DataReport:
    lengths = [example.num_tokens for example in examples]
    first = next(each for each in found if each.input is not None)
    return DataReport(
        source=rows.source,
        num_read=len(rows),
        num_used=len(examples),
        empty_rows=tuple(rows.indices[i] for i, each in enumerate(found) if each.problem == "nothing to learn"),
        truncated_rows=tuple(rows.indices[i] for i, each in enumerate(found) if each.input and each.input.is_truncated),
        num_tokens=sum(lengths),
        num_targets=sum(map(num_labels, examples)),
        min_tokens=min(lengths),
        max_tokens=max(lengths),
        example=f"{show_example(base, examples[0])} -> {first.shown}",
        notes=(*(f"{rows.source}: {note}" for note in rows.notes), *_skipped(rows, found)),
        task=rows.form.task,
    )


def _skipped(rows: Rows, found: Sequence[_Labelled]) -> Iterator[str]:
    """Why rows are not used, besides those that have nothing to learn."""
    for problem in dict.fromkeys(each.problem for each in found if each.problem not in ("", "nothing to learn")):
        indices = [rows.indices[i] for i, each in enumerate(found) if each.problem == problem]
        yield f"{rows.source}: skipped, {problem}: {row_list(indices)}"
