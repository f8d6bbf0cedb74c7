"""Compare prompts with the bare base: what they say, held-out loss, accuracy."""

from softprompt.evaluation.classification import (
    Accuracy,
    accuracies,
    accuracy,
    accuracy_by_likelihood,
    likeliest_labels,
)
from softprompt.evaluation.compare import BARE, Answered, Comparison, Input, compare
from softprompt.evaluation.heldout import HeldOutLoss, Interval, held_out_losses, mean_loss
from softprompt.evaluation.markdown import to_markdown
from softprompt.evaluation.tables import Table, accuracy_tables, answer_tables, loss_tables, memory_line

__all__ = [
    "BARE",
    "Accuracy",
    "Answered",
    "Comparison",
    "HeldOutLoss",
    "Input",
    "Interval",
    "Table",
    "accuracies",
    "accuracy",
    "accuracy_by_likelihood",
    "accuracy_tables",
    "answer_tables",
    "compare",
    "held_out_losses",
    "likeliest_labels",
    "loss_tables",
    "mean_loss",
    "memory_line",
    "to_markdown",
]
