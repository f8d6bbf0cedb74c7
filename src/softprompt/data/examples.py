"""Rows to examples to batches: token ids with their targets, cut to the maximum length; the report for the user;
the rows of each step.

`softprompt.types.Example` defines the targets, `softprompt.data.tokens` where a completion begins. `plan_epoch` is
a pure function of integers: it knows no tokens, tensors or ranks.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import NamedTuple

from softprompt.base import Base
from softprompt.compute_share import yield_point
from softprompt.data.chat import ChatIds, chat_ids, chat_prompt_ids
from softprompt.data.messages import last_answer
from softprompt.data.rows import Rows, RowText, labelled_form, render_rows, text_hash
from softprompt.data.tokens import completion_ids, first_ids, fit_source, label_branches, source_ids, target_ids
from softprompt.errors import DataError, EncodingError, LengthError
from softprompt.types import COUNTED, Branch, DataReport, Example, ExampleSet


class _Encoded(NamedTuple):
    example: Example
    is_truncated: bool  # the length limit cut some ids off
    is_source_truncated: bool = False  # only ids that an encoder reads, not the targets


def build_examples(base: Base, rows: Rows, *, eos: bool, max_length: int, branches: bool = True) -> ExampleSet:
    """The rows as examples of at most `max_length` ids each (the soft prompt not counted).

    Of an encoder-decoder that is the limit of what the encoder reads, and of what the decoder does.
    EOS is a target if `eos` and the base has one. A row without anything to learn is skipped and reported; a longer
    one is cut, gets no EOS and is reported. `branches` finds where labels differ, for a loss among them.
    Raises DataError, naming the row, for one that cannot be used, and where no row is left; LengthError where BOS
    alone fills `max_length`.
    """
    if max_length <= len(base.bos_ids):
        raise LengthError(f"max_length is {max_length} tokens; no text fits behind the soft prompt")
    if base.kind == "seq2seq" and rows.form.kind == "plain":
        raise DataError(
            f"{rows.source}: base {base.name!r} is an encoder-decoder, which reads one text and writes another; say "
            'which is which with a template and a completion (--template "{text}" --completion "{summary}")'
        )
    texts = render_rows(rows)
    form = labelled_form(rows.form, texts)
    encoder = _Encoder(base, rows, eos, max_length, form.labels if branches else ())
    encoded = [encoder.encode(position, text) for position, text in enumerate(texts)]
    examples = [row.example for row in encoded if any(row.example.target_mask)]
    for example in examples:
        check_ids(base, rows, example)
    if not examples:
        raise DataError(_nothing_left(rows, any(row.is_truncated for row in encoded), max_length))
    return ExampleSet(
        examples=tuple(examples),
        form=form,
        report=_report(base, rows, encoded, examples),
        data_hash=text_hash(texts),
    )


class _Encoder:
    """Encodes the rows of one source, each within the same limits."""

    def __init__(self, base: Base, rows: Rows, eos: bool, max_length: int, labels: Sequence[str]) -> None:
        self._base, self._rows, self._max_length, self._labels = base, rows, max_length, labels
        self._teaches_end = eos
        self._eos_ids = (base.eos_id,) if eos and base.eos_id is not None else ()

    def encode(self, position: int, text: RowText) -> _Encoded:
        """Raises DataError, naming the row, for text that the tokenizer or its chat template refuses."""
        base, kind, row = self._base, self._rows.form.kind, self._rows.indices[position]
        where = self._rows.where(position)
        yield_point()
        try:
            if text.is_empty:
                return self._fit(row, (), ())
            if base.kind == "seq2seq":
                return self._fit_pair(row, *self._pair(text, where), self._branches(text))
            if kind == "chat":
                return self._fit_chat(row, chat_ids(base, text.messages, where, self._max_length))
            if kind == "template":
                target = completion_ids(base, text.prompt, text.text)
                return self._fit(row, base.encode(text.prompt), target, self._branches(text))
            return self._fit(row, (), tuple(first_ids(base.encode, text.text, self._max_length + 1)))
        except EncodingError as error:
            raise DataError(f"{where}: {error}") from error

    def _branches(self, text: RowText) -> tuple[Branch, ...]:
        if not self._labels:
            return ()
        return label_branches(self._base, text.prompt, text.text, self._labels, self._eos_ids)

    def _fit(
        self, row: int, context: tuple[int, ...], target: tuple[int, ...], branches: Sequence[Branch] = ()
    ) -> _Encoded:
        """BOS, context, targets, EOS. Where they do not fit, EOS is dropped, then the context's start, then the
        targets' end.

        The context keeps its end, because a template's last words ("\\nSentiment:") contain the question.
        """
        bos, eos = self._base.bos_ids, self._eos_ids if target else ()
        max_ids = self._max_length - len(bos)
        is_truncated = len(context) + len(target) + len(eos) > max_ids
        if is_truncated:
            target, eos = target[:max_ids], ()
            context = context[max(0, len(context) + len(target) - max_ids) :]
        mask = (False,) * (len(bos) + len(context)) + (True,) * (len(target) + len(eos))
        ids = bos + context + target + eos
        first = len(bos) + len(context)
        kept = tuple(Branch(first + column, among) for column, among in branches if first + column < len(ids))
        example = Example(ids=ids, target_mask=mask, num_special=len(bos), has_eos=bool(eos), row=row, branches=kept)
        return _Encoded(example, is_truncated)

    def _pair(self, text: RowText, where: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the encoder reads of a row and what the decoder is to write, without EOS. Nothing, where there is none.

        Of a chat the last turn of the assistant is written, and what comes before it read.
        """
        base = self._base
        if not text.messages:
            source = source_ids(base, text.prompt, self._max_length)
            if not source:
                raise DataError(f"{where}: there is nothing for the encoder to read; the template gives an empty text")
            return source, target_ids(base, text.text)
        position = last_answer(text.messages)
        if position is None:
            return (), ()
        source = chat_prompt_ids(base, text.messages[:position], where)
        return source, target_ids(base, text.messages[position]["content"])

    def _fit_pair(
        self, row: int, source: tuple[int, ...], target: tuple[int, ...], branches: Sequence[Branch]
    ) -> _Encoded:
        """Each side within the limit by itself. Where the targets do not fit, EOS is dropped and then their end."""
        base, eos = self._base, self._eos_ids if target else ()
        read = fit_source(base, source, self._max_length, keep_end=self._rows.form.kind == "chat")
        most = self._max_length + 1 - len(base.decoder_start_ids)
        is_truncated = len(target) + len(eos) > most
        if is_truncated:
            target, eos = target[:most], ()
        ids = target + eos
        example = Example(
            ids=ids, target_mask=(True,) * len(ids), num_special=0, has_eos=bool(eos), row=row, source=read,
            branches=tuple(branch for branch in branches if branch.column < len(ids)),
            has_decoder_prompt=self._rows.form.has_decoder_prompt,
        )  # fmt: skip
        return _Encoded(example, is_truncated, is_source_truncated=not is_truncated and len(read) < len(source))

    def _fit_chat(self, row: int, chat: ChatIds) -> _Encoded:
        """Cut at the end. Turns end as the template ends them; EOS is added only to a last turn without an end."""
        yield_point()
        ids, mask = chat.ids, chat.target_mask
        ends = {*self._base.stop_ids, self._base.eos_id, chat.end_id}
        if not self._teaches_end:  # neither between the turns nor at the end
            mask = tuple(counted and token not in ends for token, counted in zip(ids, mask, strict=True))
        elif ids[-1] not in ends:
            ids, mask = ids + self._eos_ids, mask + (True,) * len(self._eos_ids)
        is_truncated = len(ids) > self._max_length
        length = _target_length(mask[: self._max_length])
        ids, mask = ids[:length], mask[:length]
        has_eos = self._teaches_end and bool(ids) and ids[-1] in ends
        special = min(chat.num_special, length)
        return _Encoded(Example(ids=ids, target_mask=mask, num_special=special, has_eos=has_eos, row=row), is_truncated)


def _target_length(mask: Sequence[bool]) -> int:
    """The length up to the last target."""
    return max((index + 1 for index, counted in enumerate(mask) if counted), default=0)


def check_ids(base: Base, rows: Rows, example: Example) -> None:
    """Raises DataError, naming the row, for an id that the base does not embed."""
    largest = max(*example.ids, *example.source, 0)
    if largest >= base.vocab_size:
        token = base.tokenizer.convert_ids_to_tokens(largest)
        raise DataError(
            f"row {example.row + 1:,} of {rows.source}: token {token!r} has id {largest:,}, but base {base.name!r} "
            f"embeds ids below {base.vocab_size:,}; the tokenizer belongs to another model"
        )


def _nothing_left(rows: Rows, is_truncated: bool, max_length: int) -> str:
    if is_truncated:
        return f"{rows.source}: cut to {max_length:,} tokens, none of the {len(rows):,} rows keeps anything to learn"
    if rows.form.kind == "chat":
        return (
            f"{rows.source}: there is nothing to learn from: none of the {len(rows):,} rows has a turn of the "
            'assistant with words in it and without "weight": 0'
        )
    what = f"column {rows.column!r}" if rows.column else f"completion {rows.form.completion!r}"
    return f"{rows.source}: all {len(rows):,} rows are empty ({what}); there is nothing to learn from"


def _report(base: Base, rows: Rows, encoded: Sequence[_Encoded], examples: Sequence[Example]) -> DataReport:
    lengths = [example.num_tokens for example in examples]
    return DataReport(
        source=rows.source,
        num_read=len(rows),
        num_used=len(examples),
        empty_rows=tuple(row.example.row for row in encoded if not any(row.example.target_mask)),
        truncated_rows=tuple(row.example.row for row in encoded if row.is_truncated),
        truncated_sources=tuple(row.example.row for row in encoded if row.is_source_truncated),
        num_tokens=sum(lengths),
        num_targets=sum(sum(example.target_mask) for example in examples),
        min_tokens=min(lengths),
        max_tokens=max(lengths),
        example=show_example(base, examples[0]),
        notes=tuple(f"{rows.source}: {note}" for note in rows.notes),
    )


SOFT_PROMPT = "[soft prompt]"  # a placeholder: the data does not know the number of virtual tokens
_OPEN, _CLOSE = "⟦", "⟧"  # around targets
_ARROW = " → "  # from what an encoder reads to what the decoder writes
_SHOWN_ROWS = 5
_SHOWN_CHARACTERS = 600
_CONTEXT_IDS = 32  # decoded before a span, and cut off again


def report_lines(report: DataReport) -> list[str]:
    """Rows used, skipped and cut (counted from 1), tokens, and one example as the model sees it."""
    is_text = report.task == "generate"
    counted = f"{report.num_targets:,} of them counted" if is_text else _count(report.num_targets, COUNTED[report.task])
    lines = [
        f"{report.source}: {report.num_used:,} of {_count(report.num_read, 'row')} used, "
        f"{report.num_tokens:,} tokens ({report.min_tokens:,} to {report.max_tokens:,} a row), {counted}",
    ]
    if report.empty_rows:
        lines.append(f"skipped, nothing to learn: {row_list(report.empty_rows)}")
    if report.truncated_rows:
        lines.append(f"cut at the length limit{', without EOS' if is_text else ''}: {row_list(report.truncated_rows)}")
    if report.truncated_sources:
        lines.append(f"read up to the length limit only: {row_list(report.truncated_sources)}")
    marks = f" ({_OPEN}counted{_CLOSE})" if is_text else ""
    lines.append(f"as the model sees it{marks}: {_shortened(report.example)}")
    return lines


def show_example(base: Base, example: Example) -> str:
    """An example's text with a placeholder for the soft prompt, with special tokens, targets in ⟦ ⟧.

    Of an encoder-decoder what the encoder reads, then, behind an arrow, the decoder's start token and targets.
    """
    done = example.num_before
    shown = _decode(base, example.ids[:done]) + SOFT_PROMPT
    if example.source:
        before_decoder = SOFT_PROMPT if example.has_decoder_prompt else ""
        shown += f"{_decode(base, example.source)}{_ARROW}{before_decoder}{_decode(base, base.decoder_start_ids)}"
    for counted, group in itertools.groupby(example.target_mask[done:]):
        end = done + len(list(group))
        text = _text_between(base, example.ids, done, end)
        shown += f"{_OPEN}{text}{_CLOSE}" if counted else text
        done = end
    return shown


def _text_between(base: Base, ids: Sequence[int], start: int, end: int) -> str:
    """Decoded with some preceding ids: many tokenizers drop the leading space of a text."""
    first = max(0, start - _CONTEXT_IDS)
    before, both = _decode(base, ids[first:start]), _decode(base, ids[first:end])
    return both[len(before) :] if both.startswith(before) else _decode(base, ids[start:end])


def _decode(base: Base, ids: Sequence[int]) -> str:
    text = base.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def row_list(indices: Sequence[int]) -> str:
    shown = ", ".join(f"{index + 1:,}" for index in indices[:_SHOWN_ROWS])
    more = f" and {len(indices) - _SHOWN_ROWS:,} more" if len(indices) > _SHOWN_ROWS else ""
    return f"{_count(len(indices), 'row')} (row {shown}{more})"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _shortened(text: str) -> str:
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    half = _SHOWN_CHARACTERS // 2
    return f"{text[:half]} … {text[-half:]}"


def plan_epoch(
    lengths: Sequence[int],  # tokens of each row
    *,
    batch_rows: int,
    batch_tokens: int | None = None,  # tokens per batch at most, pads not counted; replaces batch_rows
    seed: int,
    epoch: int,
) -> list[list[int]]:
    """Batches of row positions: a permutation by seed and epoch, cut by rows or by tokens. Every row exactly once.

    A row longer than `batch_tokens` is a batch of its own.
    """
    order = list(range(len(lengths)))
    # Seeded by text, which `random` hashes the same on every machine, so that (0, 1) and (1, 0) differ.
    random.Random(f"epoch:{seed}:{epoch}").shuffle(order)
    if batch_tokens is None:
        return [order[start : start + batch_rows] for start in range(0, len(order), batch_rows)]
    return _cut_by_tokens(order, lengths, batch_tokens)


def _cut_by_tokens(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    batches: list[list[int]] = []
    tokens_left = 0
    for position in order:
        if not batches or lengths[position] > tokens_left:
            batches.append([])
            tokens_left = batch_tokens
        batches[-1].append(position)
        tokens_left -= lengths[position]
    return batches
