"""Rows to examples to batches: reading data, rendering it as text, encoding it with its targets, ordering it in steps.

This package knows files, columns, tokenizers and token ids. It knows no soft prompt, no tensor and no loss: callers
subtract the soft prompt's length from `max_length`, and `plan_epoch` works on integers. The text of a row is exactly
the text in its file; control tokens written inside it are text.
"""

import warnings
from typing import Any

from softprompt.data.chat import chat_prompt_ids
from softprompt.data.chat_template import DEFAULT_CHAT_TEMPLATE
from softprompt.data.examples import build_examples, plan_epoch, report_lines
from softprompt.data.form import Input, form_ids, input_ids, prompt_text, template_text
from softprompt.data.read import as_rows, read_rows, rows_from_records, rows_from_texts
from softprompt.data.rows import (
    Rows,
    RowText,
    fill_template,
    render_row,
    render_rows,
    rows_hash,
    task_of,
    template_fields,
)
from softprompt.data.split import Split, held_out_record, split_rows, with_split_task
from softprompt.data.task_examples import TaskInput, build_task_examples, task_inputs
from softprompt.data.tasks import with_task
from softprompt.data.tokens import completion_ids, label_ids

__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "Input",
    "RowText",
    "Rows",
    "Split",
    "TaskInput",
    "as_rows",
    "build_examples",
    "build_task_examples",
    "chat_prompt_ids",
    "completion_ids",
    "fill_template",
    "form_ids",
    "held_out_record",
    "input_ids",
    "label_ids",
    "plan_epoch",
    "prompt_text",
    "read_rows",
    "render_row",
    "render_rows",
    "report_lines",
    "rows_from_records",
    "rows_from_texts",
    "rows_hash",
    "split_rows",
    "task_inputs",
    "task_of",
    "template_fields",
    "template_text",
    "with_split_task",
    "with_task",
]

_RENAMED = {"Written": "RowText", "write_row": "render_row", "write_rows": "render_rows"}


def __getattr__(name: str) -> Any:  # Any: a module's attribute
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"softprompt.data.{name} is now {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
