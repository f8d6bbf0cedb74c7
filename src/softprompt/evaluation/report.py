"""A comparison as tables of text, narrow enough for a terminal, and as a Markdown document."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, get_args

from rich.cells import cell_len

from softprompt.config import TextScore
from softprompt.evaluation.baselines import Baselines
from softprompt.evaluation.classification import Accuracy, Confusion
from softprompt.evaluation.compare import BARE, Comparison
from softprompt.evaluation.heldout import HeldOutLoss, Interval
from softprompt.evaluation.scores import TaskScore

_NOTHING = "-"
MAX_SHOWN_CLASSES = 12  # of a confusion matrix on a terminal
_MATRIX_WIDTH = 66  # columns of a narrow terminal beside the names of the rows


class ReportTable(NamedTuple):
    """One table; every row has a cell per column. The bare base's row comes first."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def answer_tables(comparison: Comparison) -> list[ReportTable]:
    """One table per input, one row per answer."""
    return [
        ReportTable(
            f"Input: {item.input}", ["prompt", "answer"], [[name or BARE, text] for name, text in item.answers.items()]
        )
        for item in comparison.answered
    ]


def loss_tables(comparison: Comparison) -> list[ReportTable]:
    """One table per held-out set."""
    groups = [list(group) for _, group in groupby(comparison.losses, key=lambda loss: loss.held_out)]
    labelled = {item.held_out for item in comparison.accuracies}
    return [
        ReportTable(
            _loss_title(group[0], group[0].held_out in labelled),
            ["prompt", *_loss_columns(group[0]), "change", "95 % interval", "better/worse"],
            [_loss_row(loss) for loss in group],
        )
        for group in groups
    ]


def accuracy_tables(comparison: Comparison) -> list[ReportTable]:
    """One table per labelled held-out set, the baselines in its last rows."""
    groups = [list(group) for _, group in groupby(comparison.accuracies, key=lambda item: item.held_out)]
    return [_accuracy_table(group, comparison.baselines.get(group[0].held_out)) for group in groups]


def _accuracy_table(group: Sequence[Accuracy], known: Baselines | None) -> ReportTable:
    """Heads and label words generate nothing."""
    rows = [*(_accuracy_row(item) for item in group), *_baseline_rows(known)]
    if any(item.generated is not None for item in group):
        return ReportTable(_accuracy_title(group[0]), ["prompt", "by likelihood", "95 % interval", "generated"], rows)
    return ReportTable(_accuracy_title(group[0]), ["prompt", "accuracy", "95 % interval"], [row[:-1] for row in rows])


def verdict_lines(comparison: Comparison) -> list[str]:
    """The meaning of the accuracies: a sentence or two for each prompt on each labelled set."""
    return [item.text for item in comparison.verdicts]


def ensemble_tables(comparison: Comparison) -> list[ReportTable]:
    """One table per labelled held-out set and ensemble: the accuracy of each member alone."""
    votes = [item for item in comparison.accuracies if item.members]
    return [ReportTable(_ensemble_title(item), ["member", "by likelihood"], _member_rows(item)) for item in votes]


def class_tables(comparison: Comparison) -> list[ReportTable]:
    """One table per labelled held-out set and contender, one row per label."""
    columns = ["label", "precision", "recall", "F1", "rows"]
    return [ReportTable(_class_title(item), columns, _class_rows(item)) for item in comparison.accuracies]


def confusion_tables(comparison: Comparison) -> list[ReportTable]:
    """One table per labelled held-out set and contender: a row per true label, a column per predicted one.

    Column heads are the labels, or their numbers where the labels are too wide for a terminal.
    """
    return [_confusion_table(item) for item in comparison.accuracies]


def is_small(matrix: ReportTable) -> bool:
    """Whether a confusion matrix suits a terminal: few classes, and not too wide."""
    return len(matrix.rows) <= MAX_SHOWN_CLASSES and _fits(matrix)


def score_tables(comparison: Comparison) -> list[ReportTable]:
    """One table per held-out set and score of generated text."""
    groups = [list(group) for _, group in groupby(comparison.scores, key=lambda item: (item.held_out, item.name))]
    return [
        ReportTable(
            _score_title(group[0]),
            ["prompt", group[0].name, "change", "95 % interval", "better/worse"],
            [_score_row(item) for item in group],
        )
        for group in groups
    ]


def memory_line(comparison: Comparison) -> str:
    """The memory that the comparison used."""
    count = len(comparison.prompts) + sum(comparison.ensembles.values())
    return (
        f"One base of {comparison.base_bytes / 2**20:,.1f} MiB, {count} prompt{'' if count == 1 else 's'} of "
        f"{comparison.prompt_bytes / 2**10:,.1f} KiB{'' if count == 1 else ' together'}; "
        f"peak resident size {comparison.peak_bytes / 2**20:,.0f} MiB."
    )


def _loss_columns(loss: HeldOutLoss) -> list[str]:
    return ["nats/label"] if loss.is_of_labels else ["nats/token", "perplexity"]


def _loss_title(loss: HeldOutLoss, is_labelled: bool) -> str:
    if loss.is_of_labels:
        return f"Held-out loss on {loss.held_out}: {loss.num_rows:,} rows, {loss.num_tokens:,} labels"
    of_what = ", of the labels" if is_labelled else ""
    return f"Held-out loss on {loss.held_out}: {loss.num_rows:,} rows, {loss.num_tokens:,} text tokens{of_what}"


def _loss_row(loss: HeldOutLoss) -> list[str]:
    rows = (
        _NOTHING
        if loss.prompt is None or loss.difference is None
        else f"{len(loss.better_rows)}/{len(loss.worse_rows)}"
    )
    interval = _signed(loss.interval)
    figures = [_figure(loss.loss, ".3f")] + ([] if loss.is_of_labels else [_figure(loss.perplexity, ",.1f")])
    return [loss.prompt or BARE, *figures, _change(loss), interval, rows]


def _change(loss: HeldOutLoss) -> str:
    if loss.difference is None:
        return _NOTHING
    bare = loss.loss - loss.difference
    return f"{loss.difference:+.3f}" + (f" ({loss.difference / bare:+.1%})" if bare > 0 else "")


def _signed(interval: Interval | None) -> str:
    return _NOTHING if interval is None else f"{interval.low:+.3f} to {interval.high:+.3f}"


def _accuracy_title(item: Accuracy) -> str:
    return f"Accuracy on {item.held_out}: {item.num_rows:,} rows{_calibrated(item)}"


def _calibrated(item: Accuracy) -> str:
    return ", calibrated" if item.calibrated else ""


def _accuracy_row(item: Accuracy) -> list[str]:
    interval = f"{item.interval.low:.1%} to {item.interval.high:.1%}"
    generated = _NOTHING if item.generated is None else f"{item.generated:.1%}"
    return [item.prompt or BARE, f"{item.by_likelihood:.1%}", interval, generated]


def _baseline_rows(known: Baselines | None) -> list[list[str]]:
    if known is None:
        return []
    share = _NOTHING if known.template is None else f"{known.template:.1%}"
    best = [[f"{BARE}, best of {known.num_templates} templates", share, _NOTHING, _NOTHING]]
    always = [f"always {known.majority_label!r}", f"{known.majority:.1%}", _NOTHING, _NOTHING]
    return [*(best if known.num_templates > 1 else []), always]


def _ensemble_title(item: Accuracy) -> str:
    mean = sum(item.members.values()) / len(item.members)
    return f"Members of {item.prompt} on {item.held_out}: {len(item.members)} vote, {mean:.1%} on average"


def _member_rows(item: Accuracy) -> list[list[str]]:
    return [[Path(name).name, f"{share:.1%}"] for name, share in item.members.items()]


def _class_title(item: Accuracy) -> str:
    contender = item.prompt or BARE
    return f"Classes of {item.held_out} by {contender}: macro F1 {item.f1_macro:.1%}{_calibrated(item)}"


def _class_rows(item: Accuracy) -> list[list[str]]:
    return [
        [_shown_label(scores.label), *(f"{share:.1%}" for share in (scores.precision, scores.recall, scores.f1)),
         f"{scores.support:,}"]
        for scores in item.classes
    ]  # fmt: skip


def _confusion_table(item: Accuracy) -> ReportTable:
    title = f"Confusion of {item.held_out} by {item.prompt or BARE}{_calibrated(item)}"
    labels = [_shown_label(scores.label) for scores in item.classes]
    named = _matrix(title, labels, labels, item.confusion)
    if _fits(named):
        return named
    numbers = [str(number) for number in range(1, len(labels) + 1)]
    numbered = [f"{number} {label}" for number, label in zip(numbers, labels, strict=True)]
    return _matrix(title, numbered, numbers, item.confusion)


def _matrix(title: str, names: Sequence[str], heads: Sequence[str], counts: Confusion) -> ReportTable:
    rows = [[name, *map(str, row)] for name, row in zip(names, counts, strict=True)]
    return ReportTable(title, ["true / predicted", *heads], rows)


def _fits(matrix: ReportTable) -> bool:
    cells = list(zip(matrix.columns, *matrix.rows, strict=True))[1:]
    return sum(2 + max(map(cell_len, column)) for column in cells) <= _MATRIX_WIDTH


def _shown_label(label: str) -> str:
    return label.strip() or repr(label)


def _score_title(item: TaskScore) -> str:
    of_head = item.is_baseline  # the first of each table
    of_all = f" of {item.num_available:,}" if item.num_available > item.num_rows else ""
    what = f"{item.name} of greedy answers" if item.name in get_args(TextScore) and not of_head else item.name
    return f"{what} on {item.held_out}: {item.num_rows:,}{of_all} rows"


def _score_row(item: TaskScore) -> list[str]:
    is_first = item.prompt is None or item.is_baseline
    rows = _NOTHING if is_first else f"{len(item.better_rows)}/{len(item.worse_rows)}"
    change = _NOTHING if item.difference is None else f"{item.difference:+.3f}"
    return [item.prompt or BARE, f"{item.value:.3f}", change, _signed(item.interval), rows]


def _figure(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else _NOTHING


# Characters with a meaning in Markdown and its dialects, including those of addresses that become links.
_MARKS = re.compile(r"[\\`*_{}\[\]<>#|!&~$@^]|:(?=//)|(?<=www)\.")


def to_markdown(comparison: Comparison) -> str:
    """Answers side by side, then the held-out figures; everything in an input, an answer or a name is text."""
    figures = (ensemble_tables, loss_tables, class_tables, confusion_tables, score_tables)
    first = [*answer_tables(comparison), *accuracy_tables(comparison)]
    rest = [table for of in figures for table in of(comparison)]
    title = f"# {_text(comparison.base_name)}: before and after"
    verdicts = map(_text, verdict_lines(comparison))
    return "\n\n".join([title, *map(_section, first), *verdicts, *map(_section, rest), memory_line(comparison)]) + "\n"


def _section(table: ReportTable) -> str:
    lines = [[_text(cell) for cell in line] for line in (table.columns, *table.rows)]
    lines.insert(1, ["---"] * len(table.columns))
    return "\n".join([f"## {_text(table.title)}", "", *("| " + " | ".join(line) + " |" for line in lines)])


def _text(cell: str) -> str:
    """Model output on one line, with markup escaped: it is data."""
    return _MARKS.sub(r"\\\g<0>", " ".join(cell.split()))
