"""Rows for tasks other than generation: what a base can do with them, and the examples that its head reads.

cloze      a template with one mask, and label words
classify   a text (or its template) and its label
tag        words and one tag for each: lists, as token classification sets have them
answer     a question, a context, and the span of the context that answers it, as SQuAD has them
embed      an anchor and a positive text, and negative ones if there are any
"""

from __future__ import annotations

from softprompt.base import Base
from softprompt.config import TrainConfig
from softprompt.data.rows import Rows
from softprompt.types import ExampleSet


def with_task(rows: Rows, base: Base, config: TrainConfig) -> Rows:
    """The rows with the form of their task on this base: task, placement, pooling, label words; `auto` resolved.

    Raises ConfigError where the base or the rows cannot do what the settings ask for, naming why.
    """
    if rows.form.task != "generate" or base.kind != "encoder":
        return rows
    raise NotImplementedError


def build_task_examples(base: Base, rows: Rows, *, max_length: int) -> ExampleSet:
    """The rows as examples of at most `max_length` ids each (the soft prompt not counted), with columns and labels.

    Raises DataError, naming the row, for one that cannot be used, and where no row is left.
    """
    raise NotImplementedError
