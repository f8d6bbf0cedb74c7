"""A comparison as a Markdown document."""

from __future__ import annotations

from collections.abc import Sequence

from softprompt.evaluation.classification import Accuracy
from softprompt.evaluation.compare import Answered, Comparison
from softprompt.evaluation.heldout import HeldOutLoss

BARE = "base"


def to_markdown(comparison: Comparison) -> str:
    """Answers side by side, then the held-out figures."""
    parts = [f"# {comparison.base_name}: before and after", *(_answers(item) for item in comparison.answered)]
    if comparison.losses:
        parts.append(_table("Held-out loss", loss_columns(), [loss_cells(loss) for loss in comparison.losses]))
    if comparison.accuracies:
        parts.append(_table("Accuracy", accuracy_columns(), [accuracy_cells(item) for item in comparison.accuracies]))
    return "\n\n".join([*parts, memory_line(comparison)]) + "\n"


def loss_columns() -> list[str]:
    return ["held-out set", "prompt", "nats/token", "perplexity", "against base (95 %)", "rows", "tokens", "worse rows"]


def loss_cells(loss: HeldOutLoss) -> list[str]:
    """One row of the loss table, as text."""
    against = ""
    if loss.difference is not None:
        share = loss.difference / (loss.loss - loss.difference)
        spread = f" [{loss.interval.low:+.3f}, {loss.interval.high:+.3f}]" if loss.interval is not None else ""
        against = f"{loss.difference:+.3f}{spread} = {share:+.0%}"
    worse = "" if loss.prompt is None else str(len(loss.worse_rows))
    return [
        loss.held_out, loss.prompt or BARE, f"{loss.loss:.3f}", f"{loss.perplexity:.1f}", against,
        f"{loss.num_rows}", f"{loss.num_tokens}", worse,
    ]  # fmt: skip


def accuracy_columns() -> list[str]:
    return ["held-out set", "prompt", "by label likelihood (95 %)", "generated", "rows"]


def accuracy_cells(item: Accuracy) -> list[str]:
    """One row of the accuracy table, as text."""
    likelihood = f"{item.by_likelihood:.1%} [{item.interval.low:.1%}, {item.interval.high:.1%}]"
    return [item.held_out, item.prompt or BARE, likelihood, f"{item.generated:.1%}", f"{item.num_rows}"]


def memory_line(comparison: Comparison) -> str:
    return (
        f"One base of {comparison.base_bytes / 2**20:,.1f} MiB, {len(comparison.prompts)} prompts of "
        f"{comparison.prompt_bytes / 2**10:,.1f} KiB together; "
        f"peak resident size {comparison.peak_bytes / 2**20:,.0f} MiB."
    )


def _answers(item: Answered) -> str:
    rows = [[name or BARE, text] for name, text in item.answers.items()]
    return _table(f"Input: {_cell(item.input)}", ["prompt", "answer"], rows)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join([f"## {title}", "", *("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)])


def _cell(text: str) -> str:
    """Model output is data: it may hold bars, line ends and markup."""
    flat = " ".join(text.split("\n")).replace("\\", "\\\\")
    for mark in "|`<>*_":
        flat = flat.replace(mark, f"\\{mark}")
    return flat
