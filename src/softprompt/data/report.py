"""What was read, said to a human before the training starts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from softprompt.base import Base
from softprompt.types import DataReport, Example

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
