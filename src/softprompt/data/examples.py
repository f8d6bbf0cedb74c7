"""Rows to examples to batches: token ids with their targets, cut to the maximum length; what the user is shown of them;
and which rows make up which step.

`softprompt.types.Example` defines what a target is, `softprompt.data.tokens` where a completion begins. `plan_epoch` is
a pure function of integers: it knows no tokens, tensors or ranks.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from softprompt.base import Base
from softprompt.compute_share import yield_point
from softprompt.data.chat import chat_ids
from softprompt.data.rows import Rows, RowText, labelled_form, render_rows, text_hash
from softprompt.data.tokens import completion_ids, first_ids
from softprompt.errors import DataError, EncodingError, LengthError
from softprompt.types import DataReport, Example, ExampleSet, FormKind


class _Ids(NamedTuple):
    """A row's ids, and whether the length limit took some."""

    ids: tuple[int, ...]
    target_mask: tuple[bool, ...]
    num_special: int
    has_eos: bool
    is_truncated: bool


class _Limits(NamedTuple):
    eos: bool  # the end is taught
    eos_ids: tuple[int, ...]  # what is added at the end: EOS, or nothing where it is not taught or not known
    max_length: int  # tokens, BOS and EOS included


def build_examples(base: Base, rows: Rows, *, eos: bool, max_length: int) -> ExampleSet:
    """The rows as examples of at most `max_length` ids each (the soft prompt not counted).

    EOS is supervised if `eos` and the base has one. A row without anything to learn is skipped and reported; a longer
    one is cut, gets no EOS and is reported.
    Raises DataError, naming the row, for one that cannot be used, and where no row is left; LengthError where
    `max_length` leaves no room for text.
    """
    if max_length <= len(base.bos_ids):
        raise LengthError(f"max_length is {max_length} tokens; it leaves no room for text behind the soft prompt")
    written = render_rows(rows)
    limits = _Limits(eos, (base.eos_id,) if eos and base.eos_id is not None else (), max_length)
    results = [_tokenised(base, row, limits, rows, i) for i, row in enumerate(written)]
    examples = [_example(base, rows, i, result) for i, result in enumerate(results) if any(result.target_mask)]
    if not examples:
        raise DataError(_nothing_left(rows, any(result.is_truncated for result in results), max_length))
    return ExampleSet(
        examples=tuple(examples),
        form=labelled_form(rows.form, written),
        report=_report(base, rows, results, examples),
        data_hash=text_hash(written),
    )


def _tokenised(base: Base, row: RowText, limits: _Limits, rows: Rows, position: int) -> _Ids:
    where = rows.where(position)
    try:
        return _TOKENISERS[rows.form.kind](base, row, limits, where)
    except EncodingError as error:
        raise DataError(f"{where}: {error}") from error


def _plain(base: Base, row: RowText, limits: _Limits, where: str) -> _Ids:
    return _fitted(
        base, (), () if row.is_empty else tuple(first_ids(base.encode, row.text, limits.max_length + 1)), limits
    )


def _template(base: Base, row: RowText, limits: _Limits, where: str) -> _Ids:
    if row.is_empty:
        return _fitted(base, (), (), limits)
    return _fitted(base, base.encode(row.prompt), completion_ids(base, row.prompt, row.text), limits)


def _fitted(base: Base, context: tuple[int, ...], target: tuple[int, ...], limits: _Limits) -> _Ids:
    """BOS, context, targets, EOS. Where they do not fit, EOS goes, then the context's start, then the targets' end.

    The context keeps its end, because a template's last words ("\\nSentiment:") say what is asked.
    """
    yield_point()
    special, end = base.bos_ids, limits.eos_ids if target else ()
    room = limits.max_length - len(special)
    is_truncated = len(context) + len(target) + len(end) > room
    if is_truncated:
        target, end = target[:room], ()
        context = context[max(0, len(context) + len(target) - room) :]
    before = len(special) + len(context)
    mask = (False,) * before + (True,) * (len(target) + len(end))
    return _Ids(special + context + target + end, mask, len(special), bool(end), is_truncated)


def _chat(base: Base, row: RowText, limits: _Limits, where: str) -> _Ids:
    """Cut at the end. Turns end as the template ends them; EOS is added only behind a last turn that has no end."""
    if row.is_empty:
        return _fitted(base, (), (), limits)
    yield_point()
    ids, mask, num_special, end_id = chat_ids(base, row.messages, where, limits.max_length)
    ends = {*base.stop_ids, base.eos_id, end_id}
    if not limits.eos:  # neither between the turns nor at the end
        mask = tuple(counted and token not in ends for token, counted in zip(ids, mask, strict=True))
    elif ids[-1] not in ends:
        ids, mask = ids + limits.eos_ids, mask + (True,) * len(limits.eos_ids)
    is_truncated = len(ids) > limits.max_length
    length = _target_length(mask[: limits.max_length])
    ids, mask = ids[:length], mask[:length]
    has_eos = limits.eos and bool(ids) and ids[-1] in ends
    return _Ids(ids, mask, min(num_special, length), has_eos, is_truncated)


_TOKENISERS: dict[FormKind, Callable[[Base, RowText, _Limits, str], _Ids]] = {
    "plain": _plain,
    "template": _template,
    "chat": _chat,
}


def _target_length(mask: Sequence[bool]) -> int:
    """The length up to the last target."""
    return max((index + 1 for index, counted in enumerate(mask) if counted), default=0)


def _example(base: Base, rows: Rows, position: int, result: _Ids) -> Example:
    yield_point()
    largest = max(result.ids)
    if largest >= base.vocab_size:
        token = base.tokenizer.convert_ids_to_tokens(largest)
        raise DataError(
            f"{rows.where(position)}: token {token!r} has id {largest:,}, but base {base.name!r} embeds ids below "
            f"{base.vocab_size:,}; the tokenizer belongs to another model"
        )
    return Example(
        ids=result.ids,
        target_mask=result.target_mask,
        num_special=result.num_special,
        has_eos=result.has_eos,
        row=rows.indices[position],
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


def _report(base: Base, rows: Rows, results: Sequence[_Ids], examples: Sequence[Example]) -> DataReport:
    lengths = [len(example.ids) for example in examples]
    return DataReport(
        source=rows.source,
        num_read=len(rows),
        num_used=len(examples),
        empty_rows=tuple(i for i, result in zip(rows.indices, results, strict=True) if not any(result.target_mask)),
        truncated_rows=tuple(i for i, result in zip(rows.indices, results, strict=True) if result.is_truncated),
        num_tokens=sum(lengths),
        num_targets=sum(sum(example.target_mask) for example in examples),
        min_tokens=min(lengths),
        max_tokens=max(lengths),
        example=show_example(base, examples[0]),
        notes=tuple(f"{rows.source}: {note}" for note in rows.notes),
    )


SOFT_PROMPT = "[soft prompt]"  # stands for the virtual tokens, whose number the data does not know
_OPEN, _CLOSE = "⟦", "⟧"  # around what training counts
_SHOWN_ROWS = 5
_SHOWN_CHARACTERS = 600
_CONTEXT_IDS = 32  # that a stretch is decoded behind


def report_lines(report: DataReport) -> list[str]:
    """Rows used, skipped and cut (counted from 1), tokens, and one example as the model sees it."""
    lines = [
        f"{report.source}: {report.num_used:,} of {_count(report.num_read, 'row')} used, "
        f"{report.num_tokens:,} tokens ({report.min_tokens:,} to {report.max_tokens:,} a row), "
        f"{report.num_targets:,} of them counted",
    ]
    if report.empty_rows:
        lines.append(f"skipped, nothing to learn: {_row_list(report.empty_rows)}")
    if report.truncated_rows:
        lines.append(f"cut at the length limit, without EOS: {_row_list(report.truncated_rows)}")
    lines.append(f"as the model sees it ({_OPEN}counted{_CLOSE}): {_shortened(report.example)}")
    return lines


def show_example(base: Base, example: Example) -> str:
    """An example's text behind a placeholder for the soft prompt, special tokens shown, targets in ⟦ ⟧."""
    shown = SOFT_PROMPT
    done = 0
    for counted, group in itertools.groupby(example.target_mask):
        end = done + len(list(group))
        text = _text_between(base, example.ids, done, end)
        shown += f"{_OPEN}{text}{_CLOSE}" if counted else text
        done = end
    return shown


def _text_between(base: Base, ids: Sequence[int], start: int, end: int) -> str:
    """Decoded behind some of what stands before it: many tokenizers drop the space of whatever they are given first."""
    first = max(0, start - _CONTEXT_IDS)
    before, both = _decode(base, ids[first:start]), _decode(base, ids[first:end])
    return both[len(before) :] if both.startswith(before) else _decode(base, ids[start:end])


def _decode(base: Base, ids: Sequence[int]) -> str:
    text = base.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _row_list(indices: Sequence[int]) -> str:
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
    batch_tokens: int | None = None,  # tokens per batch at most, pads not counted; takes the place of batch_rows
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
    room = 0
    for position in order:
        if not batches or lengths[position] > room:
            batches.append([])
            room = batch_tokens
        batches[-1].append(position)
        room -= lengths[position]
    return batches
