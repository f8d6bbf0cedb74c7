"""Classification sets: which completions are labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from softprompt.data.rows import Rows, Written, write_rows
from softprompt.types import InputForm

MAX_LABELS = 50  # distinct completions; more than that is free text
MIN_ROWS_PER_LABEL = 2  # on average


def labels_of(completions: Sequence[str]) -> tuple[str, ...]:
    """The distinct completions, sorted, where they look like a closed set of labels; else nothing."""
    distinct = sorted(set(completions))
    is_closed_set = 2 <= len(distinct) <= MAX_LABELS and len(completions) >= MIN_ROWS_PER_LABEL * len(distinct)
    return tuple(distinct) if is_closed_set else ()


def labelled_form(form: InputForm, written: Sequence[Written]) -> InputForm:
    """The form with the labels that these rows show; labels already there are kept."""
    if form.kind != "template" or form.labels:
        return form
    return replace(form, labels=labels_of([row.text for row in written if not row.is_empty]))


def with_labels(rows: Rows) -> Rows:
    """The rows with their labels in the form."""
    if rows.form.kind != "template" or rows.form.labels:
        return rows
    return replace(rows, form=labelled_form(rows.form, write_rows(rows)))
