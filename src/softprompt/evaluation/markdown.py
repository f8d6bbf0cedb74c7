"""A comparison as a Markdown document."""

from __future__ import annotations

import re

from softprompt.evaluation.compare import Comparison
from softprompt.evaluation.tables import (
    Table,
    accuracy_tables,
    answer_tables,
    class_tables,
    confusion_tables,
    ensemble_tables,
    loss_tables,
    memory_line,
    score_tables,
    verdict_lines,
)

# What Markdown and its dialects may read as more than text, addresses that they make links of included.
_MARKS = re.compile(r"[\\`*_{}\[\]<>#|!&~$@^]|:(?=//)|(?<=www)\.")


def to_markdown(comparison: Comparison) -> str:
    """Answers side by side, then the held-out figures; whatever an input, an answer or a name holds is text."""
    figures = (ensemble_tables, loss_tables, class_tables, confusion_tables, score_tables)
    first = [*answer_tables(comparison), *accuracy_tables(comparison)]
    rest = [table for of in figures for table in of(comparison)]
    title = f"# {_text(comparison.base_name)}: before and after"
    verdicts = map(_text, verdict_lines(comparison))
    return "\n\n".join([title, *map(_section, first), *verdicts, *map(_section, rest), memory_line(comparison)]) + "\n"


def _section(table: Table) -> str:
    lines = [[_text(cell) for cell in line] for line in (table.columns, *table.rows)]
    lines.insert(1, ["---"] * len(table.columns))
    return "\n".join([f"## {_text(table.title)}", "", *("| " + " | ".join(line) + " |" for line in lines)])


def _text(cell: str) -> str:
    """Model output is data: on one line, nothing of it markup."""
    return _MARKS.sub(r"\\\g<0>", " ".join(cell.split()))
