"""Compare prompts with the bare base: what they say, held-out loss, accuracy, task scores."""

from softprompt.config import ScoreConfig, TextScore
from softprompt.data import Input
from softprompt.evaluation.baselines import Baselines, Verdict, verdict_of
from softprompt.evaluation.classification import (
    Accuracy,
    ClassScore,
    accuracies,
    accuracy,
    accuracy_by_likelihood,
    label_answers,
    likeliest_labels,
)
from softprompt.evaluation.compare import BARE, Answered, Comparison, compare
from softprompt.evaluation.ensemble import Ensembles, vote, vote_accuracies, vote_accuracy
from softprompt.evaluation.heldout import (
    HeldOutLoss,
    Interval,
    LeaveOneOut,
    LeftOut,
    held_out_losses,
    leave_one_out,
    mean_loss,
)
from softprompt.evaluation.report import (
    Table,
    accuracy_tables,
    answer_tables,
    class_tables,
    confusion_tables,
    ensemble_tables,
    is_small,
    loss_tables,
    memory_line,
    score_tables,
    to_markdown,
    verdict_lines,
)
from softprompt.evaluation.scores import CRITERIA, TaskScore, criterion

__all__ = [
    "BARE",
    "CRITERIA",
    "Accuracy",
    "Answered",
    "Baselines",
    "ClassScore",
    "Comparison",
    "Ensembles",
    "HeldOutLoss",
    "Input",
    "Interval",
    "LeaveOneOut",
    "LeftOut",
    "ScoreConfig",
    "Table",
    "TaskScore",
    "TextScore",
    "Verdict",
    "accuracies",
    "accuracy",
    "accuracy_by_likelihood",
    "accuracy_tables",
    "answer_tables",
    "class_tables",
    "compare",
    "confusion_tables",
    "criterion",
    "ensemble_tables",
    "held_out_losses",
    "is_small",
    "label_answers",
    "leave_one_out",
    "likeliest_labels",
    "loss_tables",
    "mean_loss",
    "memory_line",
    "score_tables",
    "to_markdown",
    "verdict_lines",
    "verdict_of",
    "vote",
    "vote_accuracies",
    "vote_accuracy",
]
