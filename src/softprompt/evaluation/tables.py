"""A comparison as tables of text, narrow enough for a terminal: what the command line and Markdown both show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from softprompt.evaluation.classification import Accuracy
from softprompt.evaluation.compare import BARE, Comparison
from softprompt.evaluation.heldout import HeldOutLoss

_NOTHING = "-"


class Table(NamedTuple):
    """One table; every row has a cell per column. The bare base's row comes first."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def answer_tables(comparison: Comparison) -> list[Table]:
    """One table per input, one row per answer."""
    return [
        Table(
            f"Input: {item.input}", ["prompt", "answer"], [[name or BARE, text] for name, text in item.answers.items()]
        )
        for item in comparison.answered
    ]


def loss_tables(comparison: Comparison) -> list[Table]:
    """One table per held-out set."""
    groups = [list(group) for _, group in groupby(comparison.losses, key=lambda loss: loss.held_out)]
    columns = ["prompt", "nats/token", "perplexity", "change", "95 % interval", "better/worse"]
    return [Table(_loss_title(group[0]), columns, [_loss_row(loss) for loss in group]) for group in groups]


def accuracy_tables(comparison: Comparison) -> list[Table]:
    """One table per labelled held-out set."""
    groups = [list(group) for _, group in groupby(comparison.accuracies, key=lambda item: item.held_out)]
    columns = ["prompt", "by likelihood", "95 % interval", "generated"]
    return [
        Table(
            f"Accuracy on {group[0].held_out}: {group[0].num_rows:,} rows", columns, [_accuracy_row(a) for a in group]
        )
        for group in groups
    ]


def memory_line(comparison: Comparison) -> str:
    """What the comparison held in memory."""
    count = len(comparison.prompts)
    return (
        f"One base of {comparison.base_bytes / 2**20:,.1f} MiB, {count} prompt{'' if count == 1 else 's'} of "
        f"{comparison.prompt_bytes / 2**10:,.1f} KiB{'' if count == 1 else ' together'}; "
        f"peak resident size {comparison.peak_bytes / 2**20:,.0f} MiB."
    )


def _loss_title(loss: HeldOutLoss) -> str:
    return f"Held-out loss on {loss.held_out}: {loss.num_rows:,} rows, {loss.num_tokens:,} text tokens"


def _loss_row(loss: HeldOutLoss) -> list[str]:
    rows = _NOTHING if loss.prompt is None else f"{len(loss.better_rows)}/{len(loss.worse_rows)}"
    interval = _NOTHING if loss.interval is None else f"{loss.interval.low:+.3f} to {loss.interval.high:+.3f}"
    figures = [_figure(loss.loss, ".3f"), _figure(loss.perplexity, ",.1f")]
    return [loss.prompt or BARE, *figures, _change(loss), interval, rows]


def _change(loss: HeldOutLoss) -> str:
    if loss.difference is None:
        return _NOTHING
    bare = loss.loss - loss.difference
    return f"{loss.difference:+.3f}" + (f" ({loss.difference / bare:+.1%})" if bare > 0 else "")


def _accuracy_row(item: Accuracy) -> list[str]:
    interval = f"{item.interval.low:.1%} to {item.interval.high:.1%}"
    return [item.prompt or BARE, f"{item.by_likelihood:.1%}", interval, f"{item.generated:.1%}"]


def _figure(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else _NOTHING
