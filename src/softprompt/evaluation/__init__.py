"""Compare prompts with the bare base: what they say, held-out loss, accuracy."""

from softprompt.evaluation.classification import Accuracy, accuracies, accuracy, likeliest_labels
from softprompt.evaluation.compare import Answered, Comparison, Input, compare
from softprompt.evaluation.heldout import HeldOutLoss, Interval, held_out_losses, mean_loss
from softprompt.evaluation.markdown import to_markdown

__all__ = [
    "Accuracy",
    "Answered",
    "Comparison",
    "HeldOutLoss",
    "Input",
    "Interval",
    "accuracies",
    "accuracy",
    "compare",
    "held_out_losses",
    "likeliest_labels",
    "mean_loss",
    "to_markdown",
]
